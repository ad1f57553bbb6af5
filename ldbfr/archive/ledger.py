"""The ledger of a run: which inputs have their row, and which are left. All of it can be taken up after a crash.

    _ldbfr/units/000012/000003.parquet            record of a unit: its rows, written after its outputs
    _ldbfr/units/000012/000003.pictures.parquet   pictures for the report, written before the record
    _ldbfr/gallery.parquet                        the pictures that the report shows, of all parts so far
    manifest/000012.parquet                       the rows of a part, once all of its units are recorded
    _ldbfr/again/000012.json                      units of a finished part that are to be done again

Whatever is written twice is written the same, so a crash between any two of these writes loses nothing and counts
nothing twice: a part counts once it is in the manifest, a unit once it has its record, and whatever lies about beyond
that is passed over.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ldbfr import storage
from ldbfr.archive.faults import scope
from ldbfr.archive.gallery import Gallery
from ldbfr.archive.naming import MANIFEST_FOLDER, WORK_FOLDER
from ldbfr.archive.parts import part_numbers, part_uri, plan_folder, read_part, read_schema
from ldbfr.archive.plan import Mode, Plan, UnitId
from ldbfr.archive.rows import CHANGED, Picture, ResultRow
from ldbfr.data.ranges import THREADS, in_parallel
from ldbfr.errors import StorageError
from ldbfr.tables import from_table, parquet_bytes, read_columns, read_rows, to_table, write_rows

log = logging.getLogger(__name__)

PAUSES_S = (5.0, 20.0, 60.0)

_COUNTS = b"ldbfr"


class Counts(NamedTuple):
    """How many inputs ended how."""

    restored: int = 0
    failed: int = 0
    skipped: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))

    def minus(self, other: Counts) -> Counts:
        """Without the others."""
        return Counts(*(mine - its for mine, its in zip(self, other, strict=True)))

    @property
    def failure_rate(self) -> float:
        """The share of the failed among those that were tried."""
        tried = self.restored + self.failed
        return self.failed / tried if tried else 0.0

    @classmethod
    def of(cls, rows: Iterable[ResultRow]) -> Counts:
        """Of some rows."""
        counter = Counter(row.status for row in rows)
        return cls(counter["restored"], counter["failed"], counter["skipped"])


def sum_counts(counts: Iterable[Counts]) -> Counts:
    """All of them together."""
    return Counts(*(sum(column) for column in zip(Counts(), *counts, strict=True)))


class UnitDone(NamedTuple):
    """A unit whose outputs and record are written."""

    id: UnitId
    rows: Sequence[ResultRow]
    pictures: Sequence[Picture] = ()


class Again(NamedTuple):
    """What is to be done again of a finished part: units, and how their inputs ended the last time."""

    mode: Mode
    units: dict[int, Counts]


@dataclass
class Ledger:
    """What is done of a plan.

    Args:
        output: URI of the run.
        plan: of the run.
        check: raises once somebody else has the run; called before the manifest is changed.
    """

    output: str
    plan: Plan
    check: Callable[[], None] = lambda: None
    finished: dict[int, Counts] = field(default_factory=dict)
    """Parts that are in the manifest."""
    again: dict[int, Again] = field(default_factory=dict)
    open: dict[int, dict[int, Sequence[ResultRow]]] = field(default_factory=dict)
    """Rows of recorded units, for parts that wait for others."""
    gallery: Gallery = field(default_factory=Gallery)
    done: Counts = field(default_factory=Counts)
    """Inputs that have their row."""

    @classmethod
    def read(cls, output: str, plan: Plan, check: Callable[[], None] = lambda: None) -> Ledger:
        """The ledger as earlier runs left it.

        Raises:
            StorageError: it cannot be read, or the manifest is not this plan's.
        """
        ledger = cls(output, plan, check, gallery=Gallery.read(output))
        ledger.finished = read_counts(output)
        for number, counts in ledger.finished.items():
            if number >= len(plan.parts) or counts.total != plan.parts[number].rows:
                raise StorageError(
                    f"{part_uri(manifest_folder(output), number)} is not of the plan in {output}: it holds "
                    f"{counts.total:,} rows; it was changed, or the folder is mixed up: name another output"
                )
        ledger.again = read_again(output)
        ledger._take_records()
        ledger.done = ledger._count()
        return ledger

    def _count(self) -> Counts:
        """All inputs that have their row and need no other."""
        done = sum_counts(self.finished.values())
        for again in self.again.values():
            done = done.minus(sum_counts(again.units.values()))
        return done.plus(sum_counts(Counts.of(rows) for units in self.open.values() for rows in units.values()))

    def _take_records(self) -> None:
        """Take up the records of parts that are not finished, or not again."""
        units, parts = recorded_units(self.output)
        for number in parts:
            if not self._units_left(number):
                remove_records(self.output, number)
        found = [unit for unit in units if unit.unit in self._units_left(unit.part)]
        read = in_parallel(lambda place: read_record(self.output, found[place]), len(found), THREADS)
        for done in read:
            self.take(done)
        for number in list(self.plan_parts_without_rows()):
            self.finished[number] = Counts()
        for number in set(self.again) - set(self.open):  # nothing in it is left to do
            if not self.again[number].units:
                self._settle(number)

    def plan_parts_without_rows(self) -> Iterable[int]:
        """Parts that hold nothing, and so need nothing."""
        return (number for number, part in enumerate(self.plan.parts) if not part.rows)

    def _units_left(self, part: int) -> set[int]:
        """Units of a part that have no record."""
        if part in self.again:
            wanted = set(self.again[part].units)
        elif part in self.finished or part >= len(self.plan.parts):
            return set()
        else:
            wanted = set(range(self.plan.parts[part].units))
        return wanted - self.open.get(part, {}).keys()

    def left(self) -> dict[int, tuple[Collection[int], Mode]]:
        """For every part with work, which of its units are to be done, and how."""
        result: dict[int, tuple[Collection[int], Mode]] = {}
        units: Collection[int]
        mode: Mode
        for number, part in enumerate(self.plan.parts):
            if number in self.again:
                units, mode = self._units_left(number), self.again[number].mode
            elif number in self.open:
                units, mode = self._units_left(number), "new"
            else:  # most parts of a large plan: nothing is held for each unit of them
                units, mode = range(0 if number in self.finished else part.units), "new"
            if units:
                result[number] = (units, mode)
        return result

    def take(self, unit: UnitDone) -> bool:
        """Count a recorded unit; the last of its part puts the part into the manifest. False if it was counted before.

        Raises:
            StorageError: the manifest cannot be written, or rows are missing.
        """
        part, number = unit.id
        if number not in self._units_left(part):
            return False
        self.open.setdefault(part, {})[number] = unit.rows
        self.gallery.replace(unit.pictures)
        self.done = self.done.plus(Counts.of(unit.rows))
        if not self._units_left(part):
            self._commit(part)
        return True

    def _commit(self, part: int) -> None:
        """Put the rows of a part into the manifest; then what led there can go."""
        rows = [row for _, unit in sorted(self._rows_by_unit(part).items()) for row in unit]
        if len(rows) != self.plan.parts[part].rows:
            records = storage.join(self.output, WORK_FOLDER, "units", f"{part:06d}")
            raise StorageError(
                f"part {part} of the plan in {self.output} has {self.plan.parts[part].rows:,} inputs, but "
                f"{len(rows):,} rows came of it; delete {records} and run the same command again"
            )
        self.check()
        patiently(lambda: self.gallery.write(self.output))
        patiently(lambda: write_manifest_part(self.output, part, rows))
        self.finished[part] = Counts.of(rows)
        self._settle(part)

    def _rows_by_unit(self, part: int) -> dict[int, Sequence[ResultRow]]:
        """All rows of a part: those recorded, and for a part that is done again what the manifest has of the others."""
        recorded = dict(self.open[part])
        if part not in self.again:
            return recorded
        return {**manifest_rows(self.output, part), **recorded}

    def _settle(self, part: int) -> None:
        """Remove what a part that is in the manifest needs no more: first what asks for it again, then its records."""
        if self.again.pop(part, None) is not None:
            patiently(lambda: storage.delete(again_uri(self.output, part)))
        self.open.pop(part, None)
        patiently(lambda: remove_records(self.output, part))


# ---- places ----


def manifest_folder(output: str) -> str:
    """The manifest: a parquet dataset."""
    return storage.join(output, MANIFEST_FOLDER)


def again_uri(output: str, part: int) -> str:
    """What asks for units of a part again."""
    return storage.join(output, WORK_FOLDER, "again", f"{part:06d}.json")


def record_uri(output: str, unit: UnitId, kind: str = "") -> str:
    """A unit's record, or its `kind` ".pictures"."""
    return storage.join(output, WORK_FOLDER, "units", f"{unit.part:06d}", f"{unit.unit:06d}{kind}.parquet")


# ---- records ----


def write_record(output: str, done: UnitDone) -> None:
    """Record a unit whose outputs are written: from here on it is done."""
    write_rows(record_uri(output, done.id, ".pictures"), done.pictures, Picture)
    write_rows(record_uri(output, done.id), done.rows, ResultRow)


def read_record(output: str, unit: UnitId) -> UnitDone:
    """The record of a unit."""
    pictures = read_rows(record_uri(output, unit, ".pictures"), Picture)
    return UnitDone(unit, read_rows(record_uri(output, unit), ResultRow), pictures)


def recorded_units(output: str) -> tuple[list[UnitId], set[int]]:
    """The units that have a record, and all parts that have anything of the kind."""
    found, parts = [], set()
    for entry in storage.list_objects(storage.join(output, WORK_FOLDER, "units")):
        part, _, name = entry.key.removesuffix(".parquet").partition("/")
        if part.isdigit():
            parts.add(int(part))
            if name.isdigit():
                found.append(UnitId(int(part), int(name)))
    return found, parts


def remove_records(output: str, part: int) -> None:
    """Remove the records of a part, and their pictures after them."""
    folder = storage.join(output, WORK_FOLDER, "units", f"{part:06d}")
    found = sorted((entry.uri for entry in storage.list_objects(folder)), key=lambda uri: ".pictures." in uri)
    for uri in found:
        storage.delete(uri)


# ---- manifest ----


def write_manifest_part(output: str, part: int, rows: Sequence[ResultRow]) -> None:
    """Put a part of the manifest in place, or in the place of an older one."""
    about = {_COUNTS: json.dumps(Counts.of(rows)._asdict()).encode()}
    table = to_table(rows, ResultRow).replace_schema_metadata(about)
    storage.write_bytes(part_uri(manifest_folder(output), part), parquet_bytes(table))


def read_counts(output: str) -> dict[int, Counts]:
    """How the inputs of every part in the manifest ended; only the ends of the files are read."""
    folder = manifest_folder(output)
    sizes = list(part_numbers(folder).items())

    def counts(place: int) -> Counts:
        number, size = sizes[place]
        return Counts(**json.loads((read_schema(part_uri(folder, number), size).metadata or {})[_COUNTS]))

    return dict(zip((number for number, _ in sizes), in_parallel(counts, len(sizes), THREADS), strict=True))


def manifest_rows(output: str, part: int) -> dict[int, list[ResultRow]]:
    """The rows of a part of the manifest, by unit."""
    rows = from_table(read_columns(part_uri(manifest_folder(output), part)), ResultRow)
    planned, _ = read_part(plan_folder(output), part)
    units: dict[int, list[ResultRow]] = {}
    for row, plan in zip(rows, planned, strict=True):
        units.setdefault(plan.unit, []).append(row)
    return units


# ---- again ----


def read_again(output: str) -> dict[int, Again]:
    """What is to be done again, by part."""
    result = {}
    for entry in storage.list_objects(storage.join(output, WORK_FOLDER, "again")):
        about = json.loads(storage.read_bytes(entry.uri))
        units = {int(unit): Counts(*counts) for unit, counts in about["units"].items()}
        result[int(entry.key.removesuffix(".json"))] = Again(about["mode"], units)
    return result


def do_again(output: str, mode: Mode) -> int:
    """Ask for inputs of finished parts again: those that failed, or all, to see whether their bytes changed.

    A check of all of them that was broken off goes on where it was. Returns how many inputs were asked for now.
    """
    known = read_again(output)
    if mode == "failed":
        asked = sum(_retry_open(output, part) for part in _open_parts(output, known))
        finished = (part for part, counts in read_counts(output).items() if counts.failed and part not in known)
        return asked + sum(_mark(output, part, mode) for part in finished)
    if any(again.mode == mode for again in known.values()):
        return 0
    return sum(_mark(output, part, mode) for part in read_counts(output))


def _mark(output: str, part: int, mode: Mode) -> int:
    """Ask for a part again, in place of what was asked of it before; how many of its inputs that concerns."""
    units = manifest_rows(output, part)
    wanted = {
        unit: Counts.of(rows) for unit, rows in units.items() if mode != "failed" or any(map(is_worth_again, rows))
    }
    if not wanted:
        return 0
    remove_records(output, part)  # of an older time: they would count as done
    storage.write_bytes(again_uri(output, part), json.dumps({"mode": mode, "units": wanted}).encode())
    rows = [row for unit in wanted for row in units[unit]]
    return sum(map(is_worth_again, rows)) if mode == "failed" else len(rows)


def _open_parts(output: str, known: Mapping[int, Again]) -> list[int]:
    """Parts that have records and are not in the manifest yet."""
    finished = part_numbers(manifest_folder(output))
    return sorted(recorded_units(output)[1] - finished.keys() - known.keys())


def _retry_open(output: str, part: int) -> int:
    """Let the units of an unfinished part that have failures be done as if they never were; how many failed."""
    failures = 0
    for unit in recorded_units(output)[0]:
        if unit.part == part and (worth := sum(map(is_worth_again, read_record(output, unit).rows))):
            storage.delete(record_uri(output, unit))
            failures += worth
    return failures


def is_worth_again(row: ResultRow) -> bool:
    """Whether to try a failed input again: not what the listing alone refused, nor what changed and is left alone."""
    return row.status == "failed" and row.seconds_read is not None and row.cause != CHANGED


def patiently(work: Callable[[], None]) -> None:
    """Do something, again after a pause where the storage asks for one.

    Raises:
        StorageError: it does not work out.
    """
    for pause in PAUSES_S:
        try:
            return work()
        except StorageError as error:
            if scope(error) != "later":
                raise
            log.warning("trying again in %.0f s: %s", pause, error)
            time.sleep(pause)
    return work()
