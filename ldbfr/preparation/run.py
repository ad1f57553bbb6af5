"""Turn folders and archives of images into a data set of shards: list, look for near-duplicates, write, describe.

Everything is done in steps over independent items, which a `Runner` carries out, here or on a cluster; what a step has
finished lies in the work folder, and is not done again. Results depend on the inputs and the settings alone.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldbfr import storage
from ldbfr.data.dataset import IndexRow, is_dataset, read_dataset, write_dataset, write_index
from ldbfr.data.ranges import THREADS, in_parallel
from ldbfr.errors import ConfigError, InputError, StorageError
from ldbfr.inputs.keys import printable
from ldbfr.inputs.sources import check_source, label_sources
from ldbfr.preparation.duplicates import FINGERPRINT_BYTES, near_duplicates
from ldbfr.preparation.outcomes import REPORT_COLUMNS, WORK_FOLDER, Outcome
from ldbfr.preparation.plan import ListStep, Plan, containers_uri, make_plan
from ldbfr.preparation.sheet import COLUMNS, Sheet
from ldbfr.preparation.units import SPLITS, PrepareSettings, UnitDone, UnitStep, WorkItem, draw, outcome_uri
from ldbfr.runner import Result, Runner
from ldbfr.tables import arrow, read_columns, read_rows, schema_of, to_table

log = logging.getLogger(__name__)

REPORT_FILE = "report.parquet"
SETTINGS_FILE = "settings.json"
MOST_UNITS = 1_000_000
REASONS_SHOWN = 10


@dataclass(frozen=True)
class Summary:
    """What a data set was made of. inputs = kept + rejected + duplicates."""

    inputs: int
    kept: dict[str, int]
    """By split."""
    rejected: dict[str, int]
    """By cause."""
    duplicates: int
    skipped: int
    """Files that are neither images nor archives."""
    damaged: list[str] = field(default_factory=list)
    """Archives that could not be listed to their end."""

    def lines(self) -> list[str]:
        """For a person."""
        kept = ", ".join(f"{split} {count:,}" for split, count in self.kept.items())
        text = f"{self.inputs:,} inputs: {sum(self.kept.values()):,} kept ({kept})"
        text += f", {sum(self.rejected.values()):,} rejected, {self.duplicates:,} near-duplicates"
        text += f"; passed over: {self.skipped:,} other files" if self.skipped else ""
        causes = [f"  {count:,} {cause}" for cause, count in self.rejected.items()]
        return [text, *causes, *(f"  damaged: {damage}" for damage in self.damaged)]


@dataclass
class Preparation:
    """A data set in the making.

    Args:
        output: URI of the data set, absolute.
        settings: see there; `inputs` too are absolute.
    """

    output: str
    settings: PrepareSettings

    def begin(self) -> Summary | None:
        """Refuse what cannot work, and write down what was asked for; what came of it, if it is finished already.

        Raises:
            ConfigError: other settings on an output that is there, or a setting that makes no sense.
            InputError: an input is missing.
            StorageError: the output cannot be written.
        """
        if is_dataset(self.output):
            about = read_dataset(self.output).settings
            self.check_same(about.get("preparation"))
            self.tidy()  # the run that finished it may have been stopped before that
            return Summary(**about["summary"])
        for source in self.settings.inputs:
            check_source(source, self.output)
        label_sources(self.settings.inputs)
        asked = json.dumps(self.settings.model_dump(mode="json"), indent=1).encode()
        uri = storage.join(self.output, WORK_FOLDER, SETTINGS_FILE)
        if not storage.create_bytes(uri, asked):
            if storage.exists(containers_uri(self.output)):
                self.check_same(json.loads(storage.read_bytes(uri)))
            storage.write_bytes(uri, asked)  # nothing was made with the others yet
        return None

    def check_same(self, there: dict[str, Any] | None) -> None:
        """ConfigError, with the difference, unless these are the settings."""
        if there is None:
            raise ConfigError(f"--output {self.output} holds a data set that was made otherwise; name another output")
        now = self.settings.model_dump(mode="json")
        different = [
            f"{option(name)} {there.get(name)} there, {now[name]} now" for name in now if there.get(name) != now[name]
        ]
        if different:
            raise ConfigError(
                f"--output {self.output} was begun with other settings ({'; '.join(different)}); repeat those to go "
                "on, or name another output"
            )

    def plan(self) -> Plan:
        """List the sources, or take up the list that is there; archives in them are still to be listed.

        Raises:
            InputError: nothing is in a source, or archives and folders of it cannot be told apart.
            StorageError: a source cannot be listed.
        """
        return make_plan(self.output, self.settings.inputs, self.settings.shard_images)

    def discard(self, plan: Plan) -> None:
        """Let the next run list the sources anew, unless units are done: damaged archives may be taken out then."""
        if not self.finished(scan=True) and not self.finished(scan=False):
            storage.delete(containers_uri(plan.output))

    def list_archives(self, plan: Plan, run: Runner, allow_damaged: bool) -> None:
        """List the archives that are not listed yet, into the plan.

        Raises:
            InputError: there is no image in any input.
            ConfigError: more units than shards can be numbered.
        """
        step = ListStep(self.output, self.settings.shard_images, self.settings.column, allow_damaged)
        for number, listing in run(step, [(number, plan.containers[number]) for number in plan.missing]):
            plan.listings[number] = listing
        if not plan.num_inputs:
            raise InputError(
                f"no image in {', '.join(map(printable, self.settings.inputs))} ({plan.num_skipped:,} other files); "
                "check the place, and the suffixes of the files"
            )
        if plan.num_units > MOST_UNITS:
            raise ConfigError(
                f"--shard-images {self.settings.shard_images}: {plan.num_units:,} shards, expected at most "
                f"{MOST_UNITS:,}; take more images to a shard"
            )

    def missing(self, plan: Plan, scan: bool = False) -> list[WorkItem]:
        """The work that is left of a step."""
        return plan.work(self.finished(scan))

    def inputs_left(self, plan: Plan, scan: bool = False) -> int:
        """How many inputs that work has."""
        finished = self.finished(scan)
        return sum(count for number, count in enumerate(plan.unit_sizes()) if number not in finished)

    def finished(self, scan: bool) -> set[int]:
        """Numbers of the units that a step has finished."""
        folder = storage.join(self.output, WORK_FOLDER, "scan" if scan else "units")
        return {int(found.key.removesuffix(".parquet")) for found in storage.list_objects(folder)}

    def scan(self, plan: Plan, run: Runner) -> Iterator[UnitDone]:
        """Look at every image, for its fingerprint."""
        yield from run(UnitStep(self.output, self.settings, scan=True), self.missing(plan, scan=True))

    def write(self, plan: Plan, run: Runner) -> Iterator[UnitDone]:
        """Write the shards; without near-duplicates, where these are to be dropped."""
        items = self.missing(plan)
        if items and self.settings.near_duplicates == "drop":
            items = self.without_duplicates(plan, items)
        yield from run(UnitStep(self.output, self.settings), items)

    def without_duplicates(self, plan: Plan, items: list[WorkItem]) -> list[WorkItem]:
        """The items, each told which of its images are dropped, for which; all units must have been scanned.

        Memory: about 150 bytes an image, for fingerprints and keys.
        """
        pa = arrow()
        columns = ("key", "status", "fingerprint")
        tables = list(read_all(lambda n: read_columns(outcome_uri(self.output, n, True), columns), plan.num_units))
        units = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        table = pa.concat_tables(tables).append_column("unit", pa.array(units))
        table = table.filter(pa.array(table["status"].to_numpy() == "kept")).sort_by("key")
        marks = np.frombuffer(b"".join(table["fingerprint"].to_pylist()), np.uint8).reshape(-1, FINGERPRINT_BYTES)
        kept_for = near_duplicates(marks)
        places = np.flatnonzero(kept_for >= 0)
        late, early = table.take(pa.array(places)), table["key"].take(pa.array(kept_for[places]))
        of_unit: dict[int, dict[str, str]] = {}
        for unit, key, of in zip(late["unit"].to_pylist(), late["key"].to_pylist(), early.to_pylist(), strict=True):
            of_unit.setdefault(unit, {})[key] = of
        shown = frozenset(sorted(late["key"].to_pylist(), key=lambda key: draw(self.settings.seed, key))[:COLUMNS])

        def told(item: WorkItem) -> WorkItem:
            mine = {key: of for unit in item.units for key, of in of_unit.get(unit.number, {}).items()}
            return replace(item, duplicates=mine, shown=shown & mine.keys())

        return [told(item) for item in items]

    def finish(self, plan: Plan) -> Summary:
        """Describe what was written: report, contact sheet, indexes, and dataset.json last. The work folder goes.

        Raises:
            InputError: no image could be used.
            StorageError: inputs are unaccounted for, or the output cannot be written.
        """
        sheet = Sheet(self.settings.seed)
        summary = self.report(plan, sheet)
        wanted = sheet.originals
        originals: dict[str, Outcome] = {}
        for split in SPLITS:
            write_index(self.output, split, self.index_rows(plan, split, wanted, originals))
        sheet.write(self.output, originals)
        about = {"preparation": self.settings.model_dump(mode="json"), "summary": asdict(summary)}
        write_dataset(self.output, self.settings.side, SPLITS, about)
        self.tidy()
        return summary

    def report(self, plan: Plan, sheet: Sheet) -> Summary:
        """Write the report, a unit at a time, and count."""
        kept, rejected = Counter(dict.fromkeys(SPLITS, 0)), Counter[str]()
        duplicates = 0
        first: list[str] = []
        with tempfile.TemporaryDirectory(prefix="ldbfr-") as folder:
            file = Path(folder) / REPORT_FILE
            with arrow().parquet.ParquetWriter(file, schema_of(Outcome, REPORT_COLUMNS), compression="zstd") as writer:
                for outcomes in self.outcomes(plan):
                    writer.write_table(to_table(outcomes, Outcome, REPORT_COLUMNS))
                    for outcome in outcomes:
                        sheet.add(outcome)
                        duplicates += outcome.status == "duplicate"
                        if outcome.status == "kept":
                            kept[str(outcome.split)] += 1
                        elif outcome.status == "rejected":
                            rejected[str(outcome.reason).partition(":")[0]] += 1
                            first += [f"{outcome.name}: {outcome.reason}"] if len(first) < REASONS_SHOWN else []
            done = kept.total() + rejected.total() + duplicates
            if done != plan.num_inputs:
                raise StorageError(
                    f"{plan.num_inputs:,} inputs were planned, but {done:,} have a result, in {self.output}; delete "
                    f"its {WORK_FOLDER} and run the same command again"
                )
            storage.put_file(file, storage.join(self.output, REPORT_FILE))
        if not kept.total():
            causes = ", ".join(f"{count:,} {cause}" for cause, count in rejected.most_common())
            raise InputError("\n  ".join([f"no usable image among {done:,}: {causes}", *first]))
        counts = dict(rejected.most_common())
        return Summary(done, dict(kept), counts, duplicates, plan.num_skipped, plan.damaged)

    def index_rows(
        self, plan: Plan, split: str, wanted: Iterable[str], originals: dict[str, Outcome]
    ) -> Iterator[IndexRow]:
        """The index of a split, in the order of the plan; outcomes of the wanted keys are put into `originals`."""
        wanted = set(wanted)
        for outcomes in self.outcomes(plan):
            for outcome in outcomes:
                if outcome.status == "kept" and outcome.split == split:
                    if outcome.key in wanted:
                        originals[outcome.key] = outcome
                    yield IndexRow(*(getattr(outcome, name) for name in IndexRow._fields))

    def outcomes(self, plan: Plan) -> Iterator[list[Outcome]]:
        """What became of the entries, by unit, in order."""
        return read_all(lambda number: read_rows(outcome_uri(self.output, number), Outcome), plan.num_units)

    def tidy(self) -> None:
        """Remove the work folder."""
        folder = storage.join(self.output, WORK_FOLDER)
        if storage.is_local(folder):
            try:
                shutil.rmtree(storage.local_path(folder))
            except FileNotFoundError:
                return
            except OSError as error:  # the data set is whole all the same
                log.warning("%s is left over and may be deleted: %s", folder, error)
            return
        uris = [found.uri for found in storage.list_objects(folder)]
        in_parallel(lambda number: storage.delete(uris[number]), len(uris), THREADS)


def read_all(read: Callable[[int], Result], count: int) -> Iterator[Result]:
    """`read(0)` to `read(count - 1)`, a few at a time."""
    at_once = 4 * THREADS
    for start in range(0, count, at_once):
        numbers = range(start, min(start + at_once, count))
        yield from in_parallel(partial(_read_nth, read, numbers), len(numbers), THREADS)


def _read_nth(read: Callable[[int], Result], numbers: Sequence[int], place: int) -> Result:
    return read(numbers[place])


def option(name: str) -> str:
    """The option that a setting is given by."""
    return "--" + name.replace("inputs", "input").replace("_", "-")
