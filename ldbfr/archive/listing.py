"""List the sources of a run, once and streaming, into the parts of its plan; taken up where it was broken off.

    _ldbfr/plan/parts/000000.parquet        loose files first; each part says up to where the sources are listed
    _ldbfr/plan/containers/000000.parquet   archives found on the way, since the part before
    _ldbfr/plan/listed.json                 all sources are listed
    _ldbfr/plan/archives/000000/…           what is in an archive, as parts; 000000.json is written after them
    _ldbfr/plan/index.parquet               one row for every part; written last: now there is a plan

What is in an archive that is read by byte ranges is pooled into units with what is in others; one that can only be read
forward has units of its own.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from ldbfr import storage
from ldbfr.archive.naming import WORK_FOLDER
from ldbfr.archive.parts import (
    FORWARD,
    ROWS_PER_PART,
    Cutter,
    PartInfo,
    Parts,
    about_part,
    part_info,
    part_numbers,
    part_uri,
    plan_folder,
    read_part,
    sized,
)
from ldbfr.archive.rows import NOT_AN_IMAGE, PlanRow
from ldbfr.data.ranges import THREADS, in_parallel
from ldbfr.errors import InputError, StorageError
from ldbfr.inputs.containers import list_archive
from ldbfr.inputs.entries import Container, Entry, Kind, Other, Stretch
from ldbfr.inputs.keys import path_of_key, printable
from ldbfr.inputs.reading import is_about_one_input
from ldbfr.inputs.sources import find_inputs, label_sources
from ldbfr.runner import Runner
from ldbfr.tables import read_rows, write_rows

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
MOST_CONTAINERS = 10_000
"""Archives found before they are written down."""


class ContainerRow(NamedTuple):
    """A `Container` as a row."""

    kind: Kind
    uri: str
    prefix: str
    size: int

    def container(self) -> Container:
        """As the reader of archives wants it."""
        return Container(*self)


@dataclass(frozen=True)
class Sources:
    """Where the inputs of a run come from.

    Args:
        uris: folders, archives, lists, images; absolute.
        output: URI of the run, which may lie in a source and is left out of it.
        column: of parquet files with several that may be meant.
        unit_images: most images of a unit.
    """

    uris: tuple[str, ...]
    output: str
    column: str | None
    unit_images: int

    @cached_property
    def labels(self) -> dict[str, str]:
        """What the keys of each source begin with, in the order in which they are listed."""
        labels = label_sources(self.uris)
        return {source: labels[source] for source in sorted(self.uris, key=lambda source: labels[source])}

    def key(self, quoted: str) -> str:
        """The path of an input in the mirrored layout; below its source's label where there are several sources."""
        return path_of_key(quoted.removeprefix(self._dropped))

    @cached_property
    def _dropped(self) -> str:
        return f"{self.labels[self.uris[0]]}/" if len(self.uris) == 1 else ""

    def row(self, found: Entry | Other) -> PlanRow:
        """The row of what a listing found."""
        if isinstance(found, Other):
            reason = f"{NOT_AN_IMAGE}: by its name; rename or convert it if it is one"
            return PlanRow(self.key(found.key), found.name, "file", found.name, status="skipped", reason=reason)
        key = found.name if found.refused else self.key(found.key)
        row = PlanRow(key, found.name, *found[2:9])
        return row._replace(status="failed", reason=found.refused) if found.refused else row


def work_uri(output: str, *parts: str) -> str:
    """A place in the plan's folder."""
    return storage.join(output, WORK_FOLDER, "plan", *parts)


def is_planned(output: str) -> bool:
    """Whether the plan is finished."""
    return storage.exists(work_uri(output, "index.parquet"))


def make_plan(sources: Sources, run: Runner) -> list[PartInfo]:
    """List the sources into parts, or take up what an earlier attempt left; what every part holds.

    Args:
        sources: see there.
        run: lists the archives.

    Raises:
        InputError: nothing is there, or archives and folders cannot be told apart.
        StorageError: a source cannot be listed, or the output not written.
    """
    output, uri = sources.output, work_uri(sources.output, "index.parquet")
    if is_planned(output):
        return read_rows(uri, PartInfo)
    num_parts, containers = list_sources(sources)
    parts = Parts(plan_folder(output), num_parts)
    pool(sources, list_archives(sources, containers, run), parts)
    sizes = part_numbers(parts.folder)
    infos = [*in_parallel(lambda number: part_info(parts.folder, number, sizes[number]), parts.number, THREADS)]
    if all(info.rows == info.skipped for info in infos):
        forget(output)  # the next attempt lists anew
        names, others = ", ".join(map(printable, sources.uris)), sum(info.skipped for info in infos)
        text = f"{others:,} other files" if others else "nothing is there"
        raise InputError(f"--input: no images in {names}: {text}; check the place, and the suffixes of the files")
    write_rows(uri, infos, PartInfo)
    return infos


def forget(output: str) -> None:
    """Remove an unfinished plan, what the rest follows from last."""
    last = work_uri(output, "listed.json")
    for found in [*storage.list_objects(work_uri(output))]:
        if found.uri != last:
            storage.delete(found.uri)
    storage.delete(last)


# ---- loose files ----


def list_sources(sources: Sources) -> tuple[int, list[Container]]:
    """Write the loose files into parts, and the archives beside them: the number of parts, and all archives."""
    listed = work_uri(sources.output, "listed.json")
    if not storage.exists(listed):
        num_parts = _list_loose(sources)
        storage.write_bytes(listed, json.dumps({"parts": num_parts}).encode())
    num_parts = json.loads(storage.read_bytes(listed))["parts"]
    folder = work_uri(sources.output, "containers")
    found = [row for number in range(num_parts) for row in read_rows(part_uri(folder, number), ContainerRow)]
    return num_parts, sorted((row.container() for row in found), key=lambda container: container.prefix)


def _list_loose(sources: Sources) -> int:
    """Go through the sources from where the last part says; how many parts there are then."""
    parts = Parts(plan_folder(sources.output))
    known = part_numbers(parts.folder)
    source, position = 0, None
    while parts.number in known:
        parts.number += 1
    if parts.number:
        about = about_part(parts.folder, parts.number - 1, known[parts.number - 1])
        source, position = about["source"], about["position"]
    cutter = Cutter(sources.unit_images, parts)
    archives: list[Container] = []
    watch = Watch()

    def write(**where: Any) -> None:
        cutter.end()
        rows = [ContainerRow(one.kind, one.uri, one.prefix, one.size) for one in archives]
        write_rows(part_uri(work_uri(sources.output, "containers"), parts.number), rows, ContainerRow)
        archives.clear()
        parts.write(**where)

    for number, (uri, label) in enumerate(sources.labels.items()):
        if number < source:
            continue
        after = position if number == source else None
        for where, found in find_inputs(uri, label, start_after=after, exclude=(sources.output,)):
            if isinstance(found, Container):
                archives.append(found)
            else:
                cutter.add(sources.row(found))
            if parts.full or len(archives) == MOST_CONTAINERS:
                write(source=number, position=where)
                watch.look(parts.number)
    write(source=len(sources.uris), position=None)
    return parts.number


class Watch:
    """A line now and then, while a long listing goes on."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def look(self, num_parts: int) -> None:
        """Say how far it is, if it is time."""
        if time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            log.info("listing: about %s inputs so far", f"{num_parts * ROWS_PER_PART:,}")


# ---- archives ----


@dataclass(frozen=True)
class ArchiveLister:
    """Lists archives, wherever it is run, each into parts of its own.

    Args:
        sources: of the run.
    """

    sources: Sources

    def __call__(self, item: tuple[int, Container]) -> Iterator[int]:
        """List the archive of that number; a damaged one as far as it goes, and a row that says what is lost.

        Raises:
            StorageError: the place itself fails, or the output.
        """
        number, container = item
        parts = Parts(archive_folder(self.sources.output, number))
        cutter = Cutter(self.sources.unit_images, parts)
        try:
            self.list(container, cutter, parts)
        except InputError as error:
            cutter.add(lost(container, error))
        except StorageError as error:
            if not is_about_one_input(error):
                raise
            cutter.add(lost(container, error))
        cutter.end()
        parts.write()
        storage.write_bytes(listing_uri(self.sources.output, number), json.dumps({"parts": parts.number}).encode())
        yield number

    def list(self, container: Container, cutter: Cutter, parts: Parts) -> None:
        """What the archive holds, into units and parts."""
        cutter.forward = container.kind == "tar.gz"
        for found in list_archive(sized(container), self.sources.column):
            if isinstance(found, Stretch):
                cutter.stretch(found.rows)
            else:
                cutter.forward = cutter.forward or (isinstance(found, Entry) and found.kind in FORWARD)
                cutter.add(self.sources.row(found))
            if parts.full:
                parts.write()


def lost(container: Container, error: Exception) -> PlanRow:
    """The row for what a damaged archive does not give any more."""
    name = printable(container.uri)
    reason = f"damaged archive: {printable(str(error)).removeprefix(f'{name}: ')}"
    return PlanRow(name, name, "file", container.uri, status="failed", reason=reason)


def archive_folder(output: str, number: int) -> str:
    """Where the parts of an archive's listing are."""
    return work_uri(output, "archives", f"{number:06d}")


def listing_uri(output: str, number: int) -> str:
    """What says that an archive is listed."""
    return work_uri(output, "archives", f"{number:06d}.json")


def list_archives(sources: Sources, containers: Sequence[Container], run: Runner) -> Iterator[tuple[str, int]]:
    """List the archives that are not listed yet; then the parts of all listings, in order: folder and number."""
    output = sources.output
    known = {found.key for found in storage.list_objects(work_uri(output, "archives")) if "/" not in found.key}
    missing = [item for item in enumerate(containers) if f"{item[0]:06d}.json" not in known]
    for _ in run(ArchiveLister(sources), missing):
        pass
    for number in range(len(containers)):
        count = json.loads(storage.read_bytes(listing_uri(output, number)))["parts"]
        yield from ((archive_folder(output, number), part) for part in range(count))


def pool(sources: Sources, listings: Iterator[tuple[str, int]], parts: Parts) -> None:
    """Append what is in the archives to the plan: pooled where it can be read by ranges, else in units of its own."""
    cutter = Cutter(sources.unit_images, parts)
    for folder, number in listings:
        rows, info = read_part(folder, number)
        if not any(row.kind in FORWARD for row in rows):
            for row in rows:
                cutter.add(row)
                if parts.full:
                    parts.write()
            continue
        cutter.end()
        for unit in units_of(rows):
            parts.take(unit, unit[0].unit in info.joined_units)
            if parts.full:
                parts.write()
    cutter.end()
    if parts.rows:
        parts.write()


def units_of(rows: Sequence[PlanRow]) -> Iterator[list[PlanRow]]:
    """The rows of a part, by their units."""
    for _, unit in groupby(rows, lambda row: row.unit):
        yield list(unit)
