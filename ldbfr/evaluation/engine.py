"""An evaluation: every restorer over a test set, every image and every set measured, scores with their intervals."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import parent_process
from typing import Any

import numpy as np

from ldbfr import storage
from ldbfr.errors import ConfigError, InputError
from ldbfr.evaluation.bootstrap import LEVEL, RESAMPLES, interval
from ldbfr.evaluation.machine import machine, versions
from ldbfr.evaluation.measuring import in_processes, measure
from ldbfr.evaluation.results import (
    Entry,
    Missing,
    PairMetric,
    Restorer,
    Results,
    Row,
    Score,
    SetMetric,
    TestSet,
)
from ldbfr.evaluation.work import (
    ALL,
    Batch,
    MeasureStep,
    Places,
    RestoreStep,
    SetStep,
    batches_of,
    differences_of,
    digest_of,
    read_json,
    splits_of,
    write_json,
)
from ldbfr.progress import Progress, Tally, duration
from ldbfr.runner import Runner, run_here

log = logging.getLogger(__name__)

RESULTS_FILE, ROWS_FILE = "results.json", "rows.jsonl"

Measuring = Callable[[MeasureStep, Sequence[Batch]], Iterator[int]]
"""Measures batches and gives their numbers as they are done, in any order and anywhere."""


@dataclass(frozen=True)
class Metrics:
    """What is measured, and what could not be.

    Args:
        pair: of every image.
        sets: of every split.
        missing: were asked for and cannot be had.
    """

    pair: tuple[PairMetric, ...]
    sets: tuple[SetMetric, ...] = ()
    missing: tuple[Missing, ...] = ()


@dataclass(frozen=True)
class Execution:
    """Who does the work: this process (and processes beside it that measure), or a cluster.

    Args:
        restoring: carries out `RestoreStep` over batches, for one restorer after the other.
        measuring: carries out `MeasureStep`.
        sets: carries out `SetStep` over the restorers' names.
    """

    restoring: Callable[[RestoreStep, Sequence[Batch]], Iterator[int]]
    measuring: Measuring
    sets: Runner = run_here


@dataclass(frozen=True)
class MeasureHere:
    """Measures on this machine, in several processes that each load their networks once."""

    processes: int = 1

    def __call__(self, step: MeasureStep, batches: Sequence[Batch]) -> Iterator[int]:
        """The numbers of the batches, in order, as they are measured."""
        pairs = (pair for batch in batches for pair in step.pairs(batch))
        measured = measure(step.metrics, pairs, self.processes)
        for batch in batches:
            step.record(batch, dict(next(measured) for _ in batch.entries))
            yield batch.number


@dataclass(frozen=True)
class SetsHere:
    """Measures the sets of several restorers on this machine, each in a process of its own."""

    processes: int = 1

    def __call__(self, step: Callable[[Any], Iterator[Any]], items: Sequence[Any]) -> Iterator[Any]:
        """What the step gives for each item, in order."""
        for results in in_processes(EachItem(step), items, min(self.processes, len(items)) or 1):
            yield from results


@dataclass(frozen=True)
class EachItem:
    """A step as a function, which can be sent to a process; that process says how far it is, as this one does."""

    step: Callable[[Any], Iterator[Any]]

    def __call__(self, item: Any) -> list[Any]:
        """All that the step gives for an item."""
        if parent_process() is not None:
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        return list(self.step(item))


def on_this_machine(processes: int = 1) -> Execution:
    """The networks in this process, the metrics in so many."""
    return Execution(run_here, MeasureHere(processes), SetsHere(processes))


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated, and where to; the same evaluation goes on where it was stopped.

    Args:
        test_set: the images.
        restorers: in the order of the report.
        metrics: what is measured.
        output: a folder or s3://bucket/prefix.
        batch_size: images that are restored together.
        limit: images of each split, the first by name; all where None.
        seed: of the bootstrap.
        settings: what else the results should state, such as the command.
    """

    test_set: TestSet
    restorers: Sequence[Restorer]
    metrics: Metrics
    output: str
    batch_size: int = 16
    limit: int | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def entries(self) -> tuple[Entry, ...]:
        """The images that are taken."""
        taken: dict[str, int] = {}
        result = []
        for entry in self.test_set.entries:
            taken[entry.split] = taken.get(entry.split, 0) + 1
            if self.limit is None or taken[entry.split] <= self.limit:
                result.append(entry)
        return tuple(result)

    def __call__(self, execution: Execution) -> Results:
        """Restore, measure, and write `results.json` and `rows.jsonl`.

        Raises:
            LDBFRError: a restorer does not fit the test set, the output holds something else, or work failed.
        """
        entries = self.entries()
        self.check(entries)
        batches = batches_of(entries, self.batch_size)
        for restorer in self.restorers:
            self.begin(restorer, entries)
        for restorer in self.restorers:
            step = RestoreStep(self.test_set, restorer, self.output)
            places = Places(self.output, restorer.name)
            left = [one for one in batches if not storage.exists(places.work(f"restored-{one.number:06d}.json"))]
            follow(f"{restorer.name}: restoring", execution.restoring(step, left), left)
        for restorer in self.restorers:
            measuring = self.measure_step(restorer.name)
            left = [one for one in batches if not storage.exists(measuring.uri(one))]
            follow(f"{restorer.name}: measuring", execution.measuring(measuring, left), left)
        self.measure_sets(entries, execution)
        results = self.gather(entries, batches)
        storage.write_bytes(storage.join(self.output, RESULTS_FILE), results.model_dump_json(indent=1).encode())
        return results

    def check(self, entries: Sequence[Entry]) -> None:
        """Refuse what cannot work before anything is done.

        Raises:
            InputError: an empty test set.
            ConfigError: a restorer does not fit it.
        """
        if not entries:
            raise InputError(f"{self.test_set.name} has no images: build it again with `ldbfr testset`")
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError(f"batch size {self.batch_size}, limit {self.limit}: expected at least 1 of each")
        originals = any(entry.hq is not None for entry in entries)
        if not self.metrics.sets and all(one.needs_original and not originals for one in self.metrics.pair):
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in self.metrics.missing)
            why = "" if originals else f"{self.test_set.name} has no originals; "
            raise ConfigError(f"nothing can be measured: {why}{reasons or 'name metrics that need none, such as blur'}")
        side = self.test_set.read(entries[0])[0].shape[0]
        for restorer in self.restorers:
            restorer.check(self.test_set.entries, side)

    def begin(self, restorer: Restorer, entries: Sequence[Entry]) -> None:
        """Record what a restorer's folder is made of.

        Raises:
            ConfigError: it holds what is made of something else, or of what may be something else; the text says what.
        """
        names = digest_of([[entry.name, entry.split] for entry in entries])
        test_set = self.test_set.about.get("digest", names)
        about = {"restorer": restorer.about, "test_set": test_set, "images": names, "batch_size": self.batch_size}
        about = json.loads(json.dumps(about))
        uri = Places(self.output, restorer.name).work("about.json")
        known = read_json(uri)
        if known is None:
            write_json(uri, about)
        elif known != about:
            raise ConfigError(
                f"{self.output} has results of {restorer.name} with {' and '.join(differences_of(known, about))}: name "
                "another --output, or take that folder away"
            )

    def measure_step(self, restorer: str) -> MeasureStep:
        """What measures the images of a restorer."""
        return MeasureStep(self.test_set, restorer, self.output, self.metrics.pair)

    def measure_sets(self, entries: tuple[Entry, ...], execution: Execution) -> None:
        """Measure the sets of every restorer, where that has not been done."""
        if self.metrics.sets:
            step = SetStep(self.test_set, entries, self.output, self.metrics.sets)
            left = [one.name for one in self.restorers if not storage.exists(step.uri(one.name))]
            started = time.monotonic()
            for number, name in enumerate(execution.sets(step, left), 1):
                seconds = (time.monotonic() - started) / number * (len(left) - number)
                log.info("%s: sets measured; %d of %d, %s left", name, number, len(left), duration(seconds))

    def gather(self, entries: tuple[Entry, ...], batches: Sequence[Batch]) -> Results:
        """The scores, from what was recorded; only numbers are held, no images."""
        scores: dict[str, dict[str, dict[str, Score]]] = {}
        seconds: dict[str, float] = {}
        missing = list(self.metrics.missing)
        lines = []
        for restorer in self.restorers:
            rows = self.rows(restorer.name, batches)
            lines += [json.dumps({"restorer": row.restorer, **_flat(row)}) for row in rows]
            scores[restorer.name] = self.scores(rows)
            if restorer.is_timed:
                seconds[restorer.name] = seconds_per_image(Places(self.output, restorer.name), batches)
        missing += self.set_scores(entries, scores)
        storage.write_bytes(storage.join(self.output, ROWS_FILE), ("\n".join(lines) + "\n").encode())
        found = {name for by_split in scores.values() for values in by_split.values() for name in values}
        measures = [*(one.measure for one in self.metrics.pair), *(one.measure for one in self.metrics.sets)]
        for one in measures:
            if one.name not in found and not any(known.name == one.name for known in missing):
                missing.append(Missing(name=one.name, reason="the test set has no originals to measure against"))
        return Results(
            test_set={"name": self.test_set.name, "images": len(entries), **self.test_set.about},
            restorers={restorer.name: restorer.about | self.made_on(restorer, batches) for restorer in self.restorers},
            measures=tuple(one for one in measures if one.name in found),
            missing=tuple(missing),
            scores=scores,
            settings={
                **self.settings,
                "batch_size": self.batch_size,
                "limit": self.limit,
                "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "seed": self.seed},
            },
            versions=versions(),
            machine=machine(),
            seconds=seconds,
        )

    def made_on(self, restorer: Restorer, batches: Sequence[Batch]) -> dict[str, Any]:
        """The machines whose work a restorer's images are, each kind once; none of images that are only read."""
        if not restorer.is_timed:
            return {}
        places = Places(self.output, restorer.name)
        found = [read_json(places.work(f"restored-{batch.number:06d}.json")).get("made_on") for batch in batches]
        return {"made_on": list(dict.fromkeys(one for one in found if one))}

    def rows(self, restorer: str, batches: Sequence[Batch]) -> list[Row]:
        """What was measured on each image."""
        step = self.measure_step(restorer)
        rows = []
        for batch in batches:
            values = step.recorded(batch)
            assert values is not None  # all are measured
            rows += [Row(restorer, entry, values[entry.name]) for entry in batch.entries]
        return rows

    def all_rows(self) -> list[Row]:
        """What was measured on each image of each restorer."""
        batches = batches_of(self.entries(), self.batch_size)
        return [row for restorer in self.restorers for row in self.rows(restorer.name, batches)]

    def scores(self, rows: Sequence[Row]) -> dict[str, dict[str, Score]]:
        """Split -> metric -> mean and interval."""
        result: dict[str, dict[str, Score]] = {}
        for split in splits_of([row.entry for row in rows]):
            own = [row for row in rows if split in (ALL, row.entry.split)]
            result[split] = {}
            for metric in self.metrics.pair:
                name = metric.measure.name
                measured = [row for row in own if name in row.values]
                if measured:
                    result[split][name] = score_of(measured, name, len(own), self.seed)
        return result

    def set_scores(self, entries: tuple[Entry, ...], scores: dict[str, dict[str, dict[str, Score]]]) -> list[Missing]:
        """Add the sets' numbers to the scores; what has none comes back, each reason once."""
        step = SetStep(self.test_set, entries, self.output, self.metrics.sets)
        reasons: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for restorer in scores if self.metrics.sets else ():
            for split, values in (step.recorded(restorer) or {}).items():
                count = sum(split in (ALL, entry.split) for entry in entries)
                for name, value in values.items():
                    if "reason" in value:
                        reasons.setdefault((name, value["reason"]), []).append((restorer, split))
                    else:
                        score = Score(mean=value["value"], num_images=count, remark=value["remark"])
                        scores[restorer][split][name] = score
        missing = []
        for (name, reason), places in reasons.items():
            restorers, splits = (list(dict.fromkeys(part)) for part in zip(*places, strict=True))
            of = ", ".join(restorers) + ": " if len(restorers) < len(scores) else ""
            missing.append(Missing(name=name, reason=f"{of}{', '.join(splits)}: {reason}"))
        return missing


def _flat(row: Row) -> dict[str, Any]:
    return {"name": row.entry.name, "split": row.entry.split, **row.values}


def score_of(rows: Sequence[Row], measure: str, images: int, seed: int) -> Score:
    """Mean and interval of a measure over the images that have it; `images` were there."""
    values = np.array([row.values[measure] for row in rows])
    remarks = [] if len(values) == images else [f"of {images:,} images, {images - len(values):,} have no original"]
    if not np.isfinite(values).all():
        remarks.append(f"{int(np.isinf(values).sum()):,} images equal their originals")
        return Score(mean=float(values.mean()), num_images=len(values), remark="; ".join(remarks))
    low, high = interval(strata_of(rows, measure), seed=seed)
    return Score(mean=float(values.mean()), low=low, high=high, num_images=len(values), remark="; ".join(remarks))


def strata_of(rows: Sequence[Row], measure: str) -> list[np.ndarray]:
    """What the bootstrap draws from: the numbers of each split by themselves, whose counts are fixed.

    Where every face is in every split (`ldbfr testset --every`), the faces' means: what is drawn is a face with all of
    its images, which are not independent.
    """
    splits: dict[str, dict[str, float]] = {}
    for row in rows:
        face = row.entry.name.removeprefix(f"{row.entry.split}/")
        splits.setdefault(row.entry.split, {})[face] = row.values[measure]
    faces = next(iter(splits.values())).keys()
    if len(splits) > 1 and all(own.keys() == faces for own in splits.values()):
        return [np.array([np.mean([own[face] for own in splits.values()]) for face in faces])]
    return [np.array(list(own.values())) for own in splits.values()]


def seconds_per_image(places: Places, batches: Sequence[Batch]) -> float:
    """The median over batches of the time of an image."""
    records = [read_json(places.work(f"restored-{batch.number:06d}.json")) for batch in batches]
    return float(np.median([record["seconds"] / record["images"] for record in records]))


def follow(what: str, done: Iterator[int], batches: Sequence[Batch]) -> None:
    """Log how far it is while batches are done."""
    if not batches:
        return
    sizes = {batch.number: len(batch.entries) for batch in batches}
    log.info("%s %s images", what, f"{sum(sizes.values()):,}")
    tally = Tally(sum(sizes.values()))
    progress = Progress(tally)
    for number in done:
        tally.restored += sizes.pop(number)
        progress.update()
    assert not sizes, f"{what}: batches {sorted(sizes)} were not done"
