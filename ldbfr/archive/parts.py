"""Rows cut into units, and units collected into the parts of a plan.

A unit is what one worker takes at a time, and what is recorded at a time; a part is a file of many units. Rows come in
the order of the listing and stay in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from io import BufferedReader
from typing import TYPE_CHECKING, Any, NamedTuple

from ldbfr import storage
from ldbfr.archive.naming import WORK_FOLDER
from ldbfr.archive.rows import PlanRow
from ldbfr.inputs.entries import Container, Kind
from ldbfr.inputs.objects import ObjectFile
from ldbfr.tables import arrow, from_table, parquet_bytes, read_columns, to_table

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_PART = 8192
SETTLED_PER_WORK = 8
"""A unit ends after so many rows for each image that it may have: an archive may hold far more notes than images."""

FORWARD: tuple[Kind, ...] = ("tar.gz", "parquet")
"""Kinds of archives that can only be read forward."""

TAIL = 2**16
"""Bytes at the end of a parquet file that its footer mostly fits into."""

_INFO = b"ldbfr"


class PartInfo(NamedTuple):
    """What a part of the plan holds."""

    rows: int
    units: int
    failed: int
    """Rows that the listing alone settled as failed."""
    skipped: int
    joined: str = ""
    """Numbers of units that are read forward from where the unit before them ended, with spaces between."""

    @property
    def joined_units(self) -> frozenset[int]:
        """`joined` as numbers."""
        return frozenset(map(int, self.joined.split()))


class Cutter:
    """Cuts rows into units and hands them on.

    Args:
        images: most images of a unit.
        parts: takes the units.
    """

    def __init__(self, images: int, parts: Parts) -> None:
        self.images, self.parts = images, parts
        self.rows: list[PlanRow] = []
        self.work = 0
        self.joined = False
        self.forward = False
        """Whether what comes is read forward, one unit from where the last ended."""

    def add(self, row: PlanRow) -> None:
        """Take a row."""
        self.rows.append(row)
        self.work += row.status is None
        if self.work == self.images or len(self.rows) >= SETTLED_PER_WORK * self.images:
            self.end(goes_on=self.forward)

    def stretch(self, rows: int) -> None:
        """So many rows follow that are best read in one go, from their start."""
        if not self.rows or self.work + rows > self.images:
            self.end()

    def end(self, goes_on: bool = False) -> None:
        """End the unit here; `goes_on`: the next one is read forward from here."""
        if self.rows:
            self.parts.take(self.rows, self.joined)
            self.rows, self.work = [], 0
        self.joined = goes_on


class Parts:
    """Collects units, and writes them as parts.

    Args:
        folder: URI where the parts go.
        number: of the first part.
    """

    def __init__(self, folder: str, number: int = 0) -> None:
        self.folder, self.number = folder, number
        self.rows: list[PlanRow] = []
        self.units = 0
        self.joined: list[int] = []

    @property
    def full(self) -> bool:
        """Whether the part should be written before more comes."""
        return len(self.rows) >= ROWS_PER_PART

    def take(self, rows: Sequence[PlanRow], joined: bool) -> None:
        """Append a unit to the part."""
        if joined:
            self.joined.append(self.units)
        self.rows += [row._replace(unit=self.units) for row in rows]
        self.units += 1

    def write(self, **about: Any) -> PartInfo:
        """Write the part, with what else is to be known of it, and begin the next one."""
        count = [row.status for row in self.rows].count
        joined = " ".join(map(str, self.joined))
        info = PartInfo(len(self.rows), self.units, count("failed"), count("skipped"), joined)
        text = json.dumps({"info": list(info), **about})
        table = to_table(self.rows, PlanRow).replace_schema_metadata({_INFO: text.encode()})
        storage.write_bytes(part_uri(self.folder, self.number), parquet_bytes(table))
        self.number += 1
        self.rows, self.units, self.joined = [], 0, []
        return info


def sized(container: Container) -> Container:
    """The archive with its size as it is now, which a list of URIs does not say; 0 if it is not there any more."""
    return replace(container, size=storage.size_of(container.uri) or 0)


def part_uri(folder: str, number: int) -> str:
    """Where a part is; the manifest's have the same numbers as the plan's."""
    return storage.join(folder, f"{number:06d}.parquet")


def part_numbers(folder: str) -> dict[int, int]:
    """The parts that are there, ascending, with their sizes in bytes."""
    suffix = ".parquet"
    found = ((entry.key.removesuffix(suffix), entry.size) for entry in storage.list_objects(folder))
    return dict(sorted((int(name), size) for name, size in found if name.isdigit()))


def plan_folder(output: str) -> str:
    """Where the parts of the plan are."""
    return storage.join(output, WORK_FOLDER, "plan", "parts")


def read_part(folder: str, number: int) -> tuple[list[PlanRow], PartInfo]:
    """The rows of a part, and what is known of it."""
    table = read_columns(part_uri(folder, number))
    return from_table(table, PlanRow), PartInfo(*_about(table.schema)["info"])


def about_part(folder: str, number: int, size: int) -> dict[str, Any]:
    """What was written down about a part, from the end of its file alone."""
    return _about(read_schema(part_uri(folder, number), size))


def part_info(folder: str, number: int, size: int) -> PartInfo:
    """What a part holds, from the end of its file alone."""
    return PartInfo(*about_part(folder, number, size)["info"])


def read_schema(uri: str, size: int) -> pyarrow.Schema:
    """The schema of a parquet file of that many bytes, of which only the end is read."""
    file: pyarrow.parquet.ParquetFile = arrow().parquet.ParquetFile(BufferedReader(ObjectFile(uri, size), TAIL))
    return file.schema_arrow


def _about(schema: pyarrow.Schema) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((schema.metadata or {})[_INFO])
    return about
