"""One unit of the preparation: a few hundred inputs -> one shard, and one parquet file with what became of each.

A unit's result is a function of the unit alone, and its rows are written after its shard: a unit whose rows are there
is done, and two processes that work at one write the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from ldbfr import storage
from ldbfr.config import Settings
from ldbfr.data.shards import ShardWriter
from ldbfr.errors import InputError, LDBFRError
from ldbfr.images import Pixels, decode_image, encode_image, fit_to_side, resize
from ldbfr.inputs.entries import Container, Entry
from ldbfr.inputs.reading import Inputs
from ldbfr.preparation.duplicates import fingerprint
from ldbfr.preparation.outcomes import WORK_FOLDER, Outcome
from ldbfr.seeds import derive_seed
from ldbfr.tables import read_rows, write_rows

NearDuplicates = Literal["keep", "drop"]

PICTURES_PER_UNIT = 8
"""Rejected pictures of a unit that are kept for the contact sheet."""
PICTURE_SIDE = 160
SPLITS = ("train", "val")


class PrepareSettings(Settings):
    """Everything that a data set's digests depend on, besides the images themselves."""

    inputs: tuple[str, ...]
    """Absolute places, in order."""
    side: int
    """S, in px."""
    min_side: int
    """Of an input's shorter side, in px."""
    val_share: float
    near_duplicates: NearDuplicates
    seed: int
    shard_images: int
    """Most images of a unit."""
    column: str | None
    """Of parquet files; None finds it."""


@dataclass(frozen=True)
class Unit:
    """Where a unit's entries are listed; its number is its shard's."""

    number: int
    entries_uri: str


@dataclass(frozen=True)
class WorkItem:
    """Units that one task does in order: one, or those of an archive that can only be read forward.

    `duplicates` gives for a key the one for which it is dropped; `shown` are those that go onto the contact sheet.
    """

    container: Container
    units: tuple[Unit, ...]
    duplicates: dict[str, str] = field(default_factory=dict)
    shown: frozenset[str] = frozenset()


@dataclass(frozen=True)
class UnitDone:
    """Counts of one finished unit."""

    number: int
    inputs: int
    kept: int


@dataclass(frozen=True)
class UnitStep:
    """Does work items.

    Args:
        output: URI of the data set.
        settings: of the preparation.
        scan: only look at the images, for their fingerprints; no shard is written.
    """

    output: str
    settings: PrepareSettings
    scan: bool = False

    def __call__(self, item: WorkItem) -> Iterator[UnitDone]:
        """The units of an item, one after the other.

        Raises:
            StorageError: the inputs' place or the output fails; what is done stays done.
        """
        inputs = Inputs(item.container, self.settings.column)
        for unit in item.units:
            entries = read_rows(unit.entries_uri, Entry)
            outcomes = self.outcomes(unit, entries, inputs, item)
            write_rows(outcome_uri(self.output, unit.number, self.scan), outcomes, Outcome)
            kept = sum(outcome.status == "kept" for outcome in outcomes)
            yield UnitDone(unit.number, len(outcomes), kept)

    def outcomes(self, unit: Unit, entries: Sequence[Entry], inputs: Inputs, item: WorkItem) -> list[Outcome]:
        """What becomes of each entry; the shard is written if any is kept."""
        to_read = [
            *(e for e in entries if not e.refused and (e.key not in item.duplicates or e.key in item.shown)),
        ]
        wanted = {entry.key for entry in to_read}
        gallery = Gallery(self.settings.seed)
        outcomes: list[Outcome] = []
        with ShardWriter(self.output, unit.number) as shard, closing(inputs.read(to_read)) as data:
            for number, entry in enumerate(entries):
                if entry.refused:
                    outcomes.append(Outcome(entry.name, entry.key, "rejected", entry.refused))
                    continue
                found = next(data) if entry.key in wanted else None
                if entry.key in item.duplicates:
                    outcomes.append(duplicate(entry, item.duplicates[entry.key], found))
                    continue
                outcome, pixels = self.outcome(entry, found)
                if pixels is not None and outcome.status == "kept" and not self.scan:
                    shard.add(entry.key, encode_image(pixels, "png"))
                elif pixels is not None and outcome.status == "rejected" and not self.scan:
                    gallery.add(number, entry.key, pixels)
                outcomes.append(outcome)
            placed = {row.key: row._asdict() for row in shard.close()}
        kept = [
            outcome._replace(**placed[outcome.key]) if outcome.key in placed and outcome.status == "kept" else outcome
            for outcome in outcomes
        ]
        return [
            outcome._replace(picture=gallery.pictures.get(number, outcome.picture))
            for number, outcome in enumerate(kept)
        ]

    def outcome(self, entry: Entry, data: bytes | LDBFRError | None) -> tuple[Outcome, Pixels | None]:
        """Decode, check, fit to the side; with the face (S, S, 3) of what is kept, the picture of what is too small."""
        settings = self.settings
        if not isinstance(data, bytes):
            return rejected(entry, "unreadable", data), None
        try:
            pixels = decode_image(data, name=entry.name)
            height, width = pixels.shape[:2]
            if min(height, width) < settings.min_side:
                detail = f"{width} x {height} px, expected at least {settings.min_side} px on the shorter side"
                return rejected(entry, "too small", detail), pixels
            face = fit_to_side(pixels, settings.side)
        except InputError as error:
            return rejected(entry, "broken", error), None
        except MemoryError:
            return rejected(entry, "too large", "the memory does not suffice to decode it"), None
        split = split_of(entry.key, settings.seed, settings.val_share)
        mark = fingerprint(face) if self.scan else None
        return Outcome(entry.name, entry.key, "kept", split=split, fingerprint=mark), face


class Gallery:
    """Pictures of rejected inputs, those that a hash of seed and key picks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.pictures: dict[int, bytes] = {}
        self._draws: dict[int, int] = {}

    def add(self, number: int, key: str, pixels: Pixels) -> None:
        """Keep the picture (H, W, 3) of an entry, by its number in the unit, or not."""
        self._draws[number] = draw(self.seed, key)
        self.pictures[number] = thumbnail(pixels)
        if len(self.pictures) > PICTURES_PER_UNIT:
            last = max(self.pictures, key=lambda other: self._draws[other])
            del self.pictures[last]


def rejected(entry: Entry, cause: str, why: object) -> Outcome:
    """The outcome of an entry that cannot be used; `why` is an error or a text."""
    detail = " ".join(str(why).removeprefix(f"{entry.name}: ").split())
    return Outcome(entry.name, entry.key, "rejected", f"{cause}: {detail}")


def duplicate(entry: Entry, of: str, data: bytes | LDBFRError | None) -> Outcome:
    """The outcome of a face that is dropped for another; with its picture where there are bytes."""
    picture = None
    if isinstance(data, bytes):
        try:
            picture = thumbnail(decode_image(data, name=entry.name))
        except InputError:  # it was readable when it was scanned; only the sheet lacks it now
            picture = None
    return Outcome(entry.name, entry.key, "duplicate", f"near-duplicate: of {of}", picture=picture)


def split_of(key: str, seed: int, val_share: float) -> str:
    """The split of a key: a hash of it and the seed alone, whatever else is in the set."""
    return "val" if derive_seed("split", seed, key) < val_share * 2**63 else "train"


def draw(seed: int, key: str) -> int:
    """A number by which a few of many are picked for the contact sheet: those with the smallest."""
    return derive_seed("contact sheet", seed, key)


def thumbnail(pixels: Pixels) -> bytes:
    """A PNG of a picture, its longer side PICTURE_SIDE at most."""
    height, width = pixels.shape[:2]
    scale = min(1.0, PICTURE_SIDE / max(height, width))
    return encode_image(resize(pixels, max(1, round(height * scale)), max(1, round(width * scale))), "png")


def outcome_uri(output: str, number: int, scan: bool = False) -> str:
    """Where the rows of a unit are."""
    return storage.join(output, WORK_FOLDER, "scan" if scan else "units", f"{number:06d}.parquet")
