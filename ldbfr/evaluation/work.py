"""The units of an evaluation, which any process of any machine can do: restore a batch, measure it, measure a set.

What a unit gives lies below the output when it is reported, so that a stopped evaluation goes on from there:

    images/RESTORER/NAME.png             restored images
    work/RESTORER/about.json             what they were made of: others are refused
    work/RESTORER/restored-000012.json   that batch 12 is restored, and the seconds it took
    work/RESTORER/KEY-000012.json        the numbers of batch 12; KEY names the metrics
    work/RESTORER/KEY-sets.json          the numbers of its sets
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.evaluation.machine import kind_of_machine
from ldbfr.evaluation.measuring import Pair, measure
from ldbfr.evaluation.results import Entry, Measure, PairMetric, Restorer, SetMetric, TestSet
from ldbfr.images import Pixels, decode_image, encode_image
from ldbfr.progress import Progress, Tally

log = logging.getLogger(__name__)

ALL = "all"
"""The split that holds every image."""
_SPLITS = ("mild", "medium", "severe")

Values = dict[str, dict[str, float]]
"""Image -> metric -> number."""
SetValues = dict[str, dict[str, dict[str, Any]]]
"""Split -> metric -> {"value": number, "remark": text}, or {"reason": why there is none}."""


@dataclass(frozen=True)
class Batch:
    """Images that are restored together. Which they are follows from the test set and the batch size alone, because a
    network's last bit may depend on its batch."""

    number: int
    entries: tuple[Entry, ...]


def batches_of(entries: Sequence[Entry], size: int) -> list[Batch]:
    """All entries, in order."""
    starts = range(0, len(entries), size)
    return [Batch(number, tuple(entries[start : start + size])) for number, start in enumerate(starts)]


def splits_of(entries: Sequence[Entry]) -> list[str]:
    """The splits that there are: "all" first, then mild, medium, severe, then others by name."""
    found = {entry.split for entry in entries} - {ALL}
    return [ALL, *(split for split in _SPLITS if split in found), *sorted(found - set(_SPLITS))]


def slug(name: str) -> str:
    """A restorer's name as the name of a folder."""
    plain = re.sub(r"[^A-Za-z0-9._=,@+-]", "_", name).lstrip(".") or "_"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def digest_of(what: Any) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Places:
    """Where what a restorer gives lies, below the output of the evaluation (a folder or s3://bucket/prefix)."""

    output: str
    restorer: str

    def image(self, name: str) -> str:
        """The restored image of that name."""
        return storage.join(self.output, "images", slug(self.restorer), f"{name}.png")

    def work(self, *parts: str) -> str:
        """A record."""
        return storage.join(self.output, "work", slug(self.restorer), *parts)

    def read_image(self, name: str) -> Pixels:
        """The restored image, (H, W, 3) uint8."""
        return decode_image(storage.read_bytes(self.image(name)), name=self.image(name))


def write_json(uri: str, value: Any) -> None:
    """Write a record; floats come back bit for bit, "Infinity" included."""
    storage.write_bytes(uri, json.dumps(value, indent=1).encode())


def read_json(uri: str) -> Any:
    """Read a record; None where there is none."""
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None


def differences_of(known: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """What two records of what a restorer's folder is made of (about.json) differ in, one text for each part."""
    texts = []
    for key in [key for key in {**about, **known} if known.get(key) != about.get(key)]:
        there: Any = known.get(key)
        here: Any = about.get(key)
        if key == "restorer" and isinstance(there, dict):
            names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
            own = "; ".join(f"{name} {there.get(name)!r} there, {here.get(name)!r} here" for name in names)
            texts.append(f"another restorer ({own})")
        elif key == "test_set" and known.get("images") == about["images"]:
            texts.append(f"another test_set ({same_names(there, here, about['images'])})")
        elif key == "images":
            texts.append("other images (by their names or splits, or by --limit)")
        else:
            texts.append(f"another {key} ({there} there, {here} here)")
    return texts


def same_names(there: str | None, here: str, names: str) -> str:
    """Why two test sets with images of the same names are two, from their digests and that of the names.

    Before folders had digests, the digest of the names stood for them.
    """
    if there == names:
        return (
            "an earlier version of ldbfr recorded only the images' names, which are the same; nobody knows whether the "
            "files are"
        )
    return f"its images have the same names, but the files are others: digest {there} there, {here} here"


@dataclass(frozen=True)
class RestoreStep:
    """Restores batches."""

    test_set: TestSet
    restorer: Restorer
    output: str

    def __call__(self, batch: Batch) -> Iterator[int]:
        """Restore a batch, and give its number.

        Raises:
            InputError: a result has another shape than its input.
        """
        places = Places(self.output, self.restorer.name)
        self.restorer.prepare()
        lq = [self.test_set.read(entry)[0] for entry in batch.entries]
        started = time.perf_counter()
        restored = self.restorer(batch.entries, lq)
        seconds = time.perf_counter() - started
        for entry, own, image in zip(batch.entries, lq, restored, strict=True):
            if image.shape != own.shape:
                raise InputError(
                    f"{self.restorer.name}: {entry.name} came out as {image.shape}, its input is {own.shape}"
                )
            storage.write_bytes(places.image(entry.name), encode_image(image, "png"))
        record = {"seconds": seconds, "images": len(lq), "made_on": kind_of_machine()}
        write_json(places.work(f"restored-{batch.number:06d}.json"), record)
        yield batch.number


def measures_key(measures: Sequence[Measure]) -> str:
    """Names a set of metrics: other metrics, or others' protocols, are measured anew."""
    return digest_of([measure.model_dump() for measure in measures])[:16]


@dataclass(frozen=True)
class MeasureStep:
    """Measures every image of a batch."""

    test_set: TestSet
    restorer: str
    output: str
    metrics: tuple[PairMetric, ...]

    @property
    def key(self) -> str:
        """Names the metrics."""
        return measures_key([metric.measure for metric in self.metrics])

    def uri(self, batch: Batch) -> str:
        """Where the numbers of a batch are."""
        return Places(self.output, self.restorer).work(f"{self.key}-{batch.number:06d}.json")

    def pairs(self, batch: Batch) -> Iterator[Pair]:
        """The restored images with their originals."""
        places = Places(self.output, self.restorer)
        for entry in batch.entries:
            _, original = self.test_set.read(entry)
            yield entry.name, places.read_image(entry.name), original

    def __call__(self, batch: Batch) -> Iterator[int]:
        """Measure a batch in this process, and give its number.

        Raises:
            InputError: an image cannot be measured.
        """
        self.record(batch, dict(measure(self.metrics, self.pairs(batch), 1)))
        yield batch.number

    def record(self, batch: Batch, values: Values) -> None:
        """Keep the numbers of a batch."""
        write_json(self.uri(batch), values)

    def recorded(self, batch: Batch) -> Values | None:
        """What was kept."""
        values: Values | None = read_json(self.uri(batch))
        return values


@dataclass(frozen=True)
class SetStep:
    """Measures the sets of a restorer: each split, and all images.

    The images come in the test set's order, so that sums are the same wherever this runs.
    """

    test_set: TestSet
    entries: tuple[Entry, ...]
    output: str
    metrics: tuple[SetMetric, ...]

    def uri(self, restorer: str) -> str:
        """Where the numbers are; other settings or another reference of a metric are measured anew."""
        measures = [metric.measure.model_dump() | metric.settings for metric in self.metrics]
        return Places(self.output, restorer).work(f"{digest_of(measures)[:16]}-sets.json")

    def __call__(self, restorer: str) -> Iterator[str]:
        """Measure the sets of one restorer, and give its name."""
        splits = splits_of(self.entries)
        own = {split: [metric.fresh() for metric in self.metrics] for split in splits}
        places = Places(self.output, restorer)
        log.info("%s: measuring sets of %s images", restorer, f"{len(self.entries):,}")
        tally = Tally(len(self.entries))
        progress = Progress(tally)
        for entry in self.entries:
            tally.restored += 1
            progress.update()
            _, original = self.test_set.read(entry)
            image = places.read_image(entry.name)
            for split in {ALL, entry.split}:
                for metric in own[split]:
                    metric.update(image, original, entry.name)
        record: SetValues = {split: {} for split in splits}
        for split in splits:
            for metric in own[split]:
                name = metric.measure.name
                try:
                    record[split][name] = {"value": metric.value(), "remark": metric.remark}
                except InputError as error:
                    record[split][name] = {"reason": str(error)}
        write_json(self.uri(restorer), record)
        yield restorer

    def recorded(self, restorer: str) -> SetValues | None:
        """What was kept."""
        values: SetValues | None = read_json(self.uri(restorer))
        return values
