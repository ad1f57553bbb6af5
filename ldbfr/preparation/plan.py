"""The plan of a preparation: every input listed once, cut into units, in parquet files below the work folder.

    _prepare/settings.json                 what was asked for; another request on the same output is refused
    _prepare/plan/containers.json          the sources' loose files, and the archives found in them; written after...
    _prepare/plan/000000/000000.parquet    ...the entries of the units of a container
    _prepare/plan/000001.json              an archive's units, written after them
    _prepare/scan/, _prepare/units/        what became of the entries, a file for every unit

The order of the units, and so of the data set, follows from the names of the inputs alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ldbfr import storage
from ldbfr.errors import InputError, StorageError
from ldbfr.inputs.containers import Stretch, list_archive
from ldbfr.inputs.entries import Container, Entry, Other
from ldbfr.inputs.keys import printable
from ldbfr.inputs.lists import is_list
from ldbfr.inputs.reading import is_about_one_input
from ldbfr.inputs.sources import find_inputs, label_sources
from ldbfr.preparation.outcomes import WORK_FOLDER
from ldbfr.preparation.units import Unit, WorkItem
from ldbfr.tables import write_rows

CONTAINERS_FILE = "containers.json"


@dataclass(frozen=True)
class Listing:
    """What a container holds.

    `joined` are the units that go on where the one before ended, of what can only be read forward. `damage` says what
    is wrong with the archive; what could be listed is in the units.
    """

    container: Container
    units: tuple[int, ...] = ()
    """How many inputs each has."""
    skipped: int = 0
    joined: tuple[int, ...] = ()
    damage: str | None = None


@dataclass
class Plan:
    """All containers of a preparation; `listings` has None for those that are not listed yet."""

    output: str
    containers: list[Container]
    listings: list[Listing | None]

    @property
    def missing(self) -> list[int]:
        """Numbers of the containers that have to be listed."""
        return [number for number, listing in enumerate(self.listings) if listing is None]

    @property
    def done(self) -> list[Listing]:
        """The listings; all of them must be there."""
        listings = [listing for listing in self.listings if listing is not None]
        assert len(listings) == len(self.containers)
        return listings

    @property
    def num_inputs(self) -> int:
        """Images that were listed."""
        return sum(sum(listing.units) for listing in self.done)

    @property
    def num_skipped(self) -> int:
        """Files and members that are neither images nor archives."""
        return sum(listing.skipped for listing in self.done)

    @property
    def num_units(self) -> int:
        """Units, done or not."""
        return sum(len(listing.units) for listing in self.done)

    @property
    def damaged(self) -> list[str]:
        """What is wrong with archives that could not be listed to their end."""
        return [listing.damage for listing in self.done if listing.damage]

    def unit_sizes(self) -> Iterator[int]:
        """How many inputs every unit has, in order."""
        return (count for listing in self.done for count in listing.units)

    def units(self) -> Iterator[tuple[Listing, int, Unit]]:
        """Every unit with its listing and its place in it, in order."""
        number = 0
        for container, listing in enumerate(self.done):
            for position in range(len(listing.units)):
                yield listing, position, Unit(number, entries_uri(self.output, container, position))
                number += 1

    def work(self, finished: set[int]) -> list[WorkItem]:
        """The units that are not finished, as items; the longest first, since they decide when the last is done."""
        items: list[WorkItem] = []
        current: list[Unit] = []
        last: Container | None = None
        for listing, position, unit in self.units():
            if current and last is not None and not (listing.container is last and position in listing.joined):
                items.append(WorkItem(last, tuple(current)))
                current = []
            last = listing.container
            current += [] if unit.number in finished else [unit]
        if current and last is not None:
            items.append(WorkItem(last, tuple(current)))
        return sorted(items, key=lambda item: -len(item.units))


class UnitCutter:
    """Cuts the entries of a container into units, and writes them.

    Args:
        output: URI of the data set.
        number: of the container.
        most: entries of a unit.
    """

    def __init__(self, output: str, number: int, most: int) -> None:
        self.output, self.number, self.most = output, number, most
        self.waiting: list[Entry] = []
        self.skipped = 0
        self.units: list[int] = []
        self.joined: list[int] = []
        self.at_start = True

    def add(self, found: Entry | Stretch | Other) -> None:
        """Take what a listing gives."""
        if isinstance(found, Other):
            self.skipped += 1
        elif isinstance(found, Stretch):
            if len(self.waiting) + found.rows > self.most:
                self.flush()
            self.at_start = not self.waiting
        else:
            if not self.waiting and not self.at_start and found.kind in ("tar.gz", "parquet"):
                self.joined.append(len(self.units))
            self.at_start = False
            self.waiting.append(found)
            if len(self.waiting) == self.most:
                self.flush()

    def flush(self) -> None:
        """Write the waiting entries as a unit."""
        if self.waiting:
            write_rows(entries_uri(self.output, self.number, len(self.units)), self.waiting, Entry)
            self.units.append(len(self.waiting))
            self.waiting = []

    def listing(self, container: Container, damage: str | None = None) -> Listing:
        """The listing, once all entries are in."""
        self.flush()
        return Listing(container, tuple(self.units), self.skipped, tuple(self.joined), damage)


@dataclass(frozen=True)
class ListStep:
    """Lists archives into units.

    Args:
        output: URI of the data set.
        most: entries of a unit.
        column: of parquet files.
        allow_damaged: what can be listed of a damaged archive is all that will be used of it.
    """

    output: str
    most: int
    column: str | None = None
    allow_damaged: bool = False

    def __call__(self, item: tuple[int, Container]) -> Iterator[tuple[int, Listing]]:
        """The listing of the archive with that number.

        It is written down, and with it the numbers of all units settled, unless the archive is damaged: then it may be
        replaced and listed again.
        """
        number, container = item
        size = next((found.size for found in storage.list_objects(container.uri)), container.size)
        container = replace(container, size=size)
        cutter = UnitCutter(self.output, number, self.most)
        damage = None
        try:
            for found in list_archive(container, self.column):
                cutter.add(found)
        except InputError as error:
            damage = str(error)
        except StorageError as error:
            if not is_about_one_input(error):
                raise
            damage = str(error)
        if damage:
            name = printable(container.uri)
            cutter.add(Entry(name, container.prefix, "file", container.uri, refused=f"damaged archive: {damage}"))
        listing = cutter.listing(container, damage)
        if not damage or self.allow_damaged:
            write_listing(self.output, number, listing)
        yield number, listing


def make_plan(output: str, sources: Sequence[str], most: int) -> Plan:
    """List the sources, or take up a plan that is there; archives are left to `ListStep`.

    Raises:
        ConfigError, InputError: the sources cannot be used together, or one of them not at all.
        StorageError: they cannot be listed, or the output not written.
    """
    uri = containers_uri(output)
    if not storage.exists(uri):
        loose, archives = list_sources(output, sources, most)
        about = {"loose": [asdict(listing) for listing in loose], "archives": [asdict(found) for found in archives]}
        storage.write_bytes(uri, json.dumps(about).encode())
    about = json.loads(storage.read_bytes(uri))
    loose = [_listing(values) for values in about["loose"]]
    archives = [Container(**values) for values in about["archives"]]
    folder = storage.join(output, WORK_FOLDER, "plan")
    names = {found.key for found in storage.list_objects(folder) if "/" not in found.key} if archives else set()
    listings: list[Listing | None] = [*loose]
    for number, archive in enumerate(archives, len(loose)):
        name = f"{number:06d}.json"
        known = _listing(json.loads(storage.read_bytes(storage.join(folder, name)))) if name in names else None
        same = known is not None and replace(known.container, size=archive.size) == archive
        listings.append(known if same else None)  # not where the sources were listed anew, and hold other archives
    return Plan(output, [*(listing.container for listing in loose), *archives], listings)


def list_sources(output: str, sources: Sequence[str], most: int) -> tuple[list[Listing], list[Container]]:
    """Cut the loose files of every source into units, and collect the archives, in the order of their labels."""
    labels = label_sources(sources)
    loose: list[Listing] = []
    archives: list[Container] = []
    for number, source in enumerate(sorted(sources, key=lambda source: labels[source])):
        cutter = UnitCutter(output, number, most)
        for found in _once(source, labels[source]):
            if isinstance(found, Container):
                archives.append(found)
            else:
                cutter.add(found)
        loose.append(cutter.listing(Container("file", source, labels[source])))
    return loose, sorted(archives, key=lambda archive: archive.prefix)


def _once(source: str, label: str) -> Iterator[Entry | Container | Other]:
    """What is in a source; what a list names again is refused, since a data set has every key once."""
    seen: set[str] = set()
    for _, found in find_inputs(source, label):
        if is_list(source) and not isinstance(found, Other):
            key = found.prefix if isinstance(found, Container) else found.key
            if key in seen:
                name = printable(found.uri)
                found = Entry(
                    name, name, "file", found.uri, refused="repeated name: the list has it before; name it once"
                )
            seen.add(key)
        yield found


def containers_uri(output: str) -> str:
    """Where the containers are written down, once all sources are listed."""
    return storage.join(output, WORK_FOLDER, "plan", CONTAINERS_FILE)


def write_listing(output: str, number: int, listing: Listing) -> None:
    """Write down that a container is listed."""
    uri = storage.join(output, WORK_FOLDER, "plan", f"{number:06d}.json")
    storage.write_bytes(uri, json.dumps(asdict(listing)).encode())


def entries_uri(output: str, container: int, position: int) -> str:
    """Where the entries of a container's unit are."""
    return storage.join(output, WORK_FOLDER, "plan", f"{container:06d}", f"{position:06d}.parquet")


def _listing(values: dict[str, Any]) -> Listing:
    container, units, joined = Container(**values["container"]), tuple(values["units"]), tuple(values["joined"])
    return Listing(container, units, values["skipped"], joined, values["damage"])
