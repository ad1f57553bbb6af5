"""Test sets as evaluations read them: our own with a manifest, pairs of folders, and folders without ground truth.

LFW-Test and WIDER-Test are folders without ground truth, aligned to 512 px, of which the number of images is known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ldbfr import storage
from ldbfr.degradations import Degradation
from ldbfr.errors import ConfigError, InputError
from ldbfr.evaluation.digests import file_digests, named_digest
from ldbfr.evaluation.manifest import (
    MANIFEST_FILE,
    TESTSET_FILE,
    ManifestRow,
    read_description,
    read_rows,
    rows_digest,
)
from ldbfr.evaluation.pairing import ImageFiles, listed, pair
from ldbfr.evaluation.reading import decode_exactly, read_image, size_of_image
from ldbfr.evaluation.results import Entry, TestSet
from ldbfr.images import DEFAULT_LIMITS, Pixels
from ldbfr.storage import join

Kind = Literal["auto", "lfw", "wider", "folder"]
NO_SPLITS = "all"


@dataclass(frozen=True)
class KnownSet:
    """A published test set without ground truth."""

    title: str
    count: int
    side: int = 512


KNOWN = {"lfw": KnownSet("LFW-Test", 1_711), "wider": KnownSet("WIDER-Test", 970)}
"""GFPGAN (Wang et al. 2021): the first image of every person of LFW's validation part; CodeFormer (Zhou et al. 2022):
WIDER Face's heavily degraded faces. Both are published aligned to FFHQ's frame."""


def open_testset(place: str, hq: str | None = None, kind: Kind = "auto") -> TestSet:
    """A test set: one that `ldbfr testset` built, two folders of pairs, or one folder without ground truth.

    Args:
        place: of the set, or of the low-quality images.
        hq: of the originals, where they are in a folder of their own.
        kind: "lfw" or "wider" for these sets, whose number and size of images are then checked; "folder" for any.

    Raises:
        InputError: it is empty, unfinished, damaged, or not what `kind` says; pairs that do not fit are listed.
        ConfigError: originals are given for a set that has its own, or has none.
        StorageError: a place cannot be read.
    """
    if kind in KNOWN:
        if hq is not None:
            raise ConfigError(f"{KNOWN[kind].title} has no ground truth: leave {hq} out, or say kind 'folder'")
        return PlainFolder.known(place, kind)
    ours = storage.exists(join(place, TESTSET_FILE))
    if hq is not None:
        if ours:
            raise ConfigError(f"{place} is a test set with originals of its own: leave {hq} out")
        return PairedFolders(place, hq)
    if ours and kind == "auto":
        return BuiltTestSet(place)
    if storage.exists(join(place, "building.json")) and kind == "auto":
        raise InputError(f"{place} is an unfinished test set; the command that began it goes on with it")
    return PlainFolder(place)


class BuiltTestSet:
    """What `ldbfr testset` built; every file is held against its SHA-256 when it is read.

    Raises:
        InputError: it is damaged, or its manifest is not the one that it was finished with.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.description = read_description(join(place, TESTSET_FILE))
        self.rows = {row.name: row for row in read_rows(join(place, MANIFEST_FILE))}
        if rows_digest(self.rows.values()) != self.description.digest:
            raise InputError(
                f"{join(place, MANIFEST_FILE)} is not the manifest that the set was finished with (its digest is "
                f"another than {TESTSET_FILE}'s); copy the set again, or build it again"
            )
        self.entries: Sequence[Entry] = tuple(
            Entry(name=row.name, split=row.split, lq=join(place, row.lq), hq=join(place, row.hq))
            for row in self.rows.values()
        )

    @property
    def name(self) -> str:
        """Such as "CelebA-Test (3,000 images, seed 0)"."""
        return f"{self.description.name} ({len(self.rows):,} images, seed {self.description.settings['seed']})"

    @property
    def about(self) -> dict[str, Any]:
        """Place, settings, counts, versions, digest."""
        return {"place": self.place, **self.description.model_dump(exclude={"format", "name"})}

    def degradation(self, entry: Entry) -> Degradation:
        """The draw of equation (7) that an image was made with."""
        return Degradation.from_json(json.dumps(self.rows[entry.name].degradation))

    def read(self, entry: Entry) -> tuple[Pixels, Pixels | None]:
        """The low-quality image and its original.

        Raises:
            InputError: a file is not the one that was written.
            StorageError: it cannot be read.
        """
        row = self.rows[entry.name]
        return self._checked(row, row.lq, row.sha256.lq), self._checked(row, row.hq, row.sha256.hq)

    def _checked(self, row: ManifestRow, path: str, sha256: str) -> Pixels:
        uri = join(self.place, path)
        data = storage.read_bytes(uri, max_bytes=DEFAULT_LIMITS.max_bytes)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(
                f"{uri} was changed: its SHA-256 is not the manifest's {sha256}; copy it again, or build the set again"
            )
        return decode_exactly(data, uri)


class PairedFolders:
    """Low-quality images and originals in two folders, paired by name, strictly.

    Raises:
        InputError: listing what is missing, comes twice or has two sizes.
    """

    def __init__(self, lq: str, hq: str) -> None:
        self.lq, self.hq = lq, hq
        self._files = (ImageFiles.of(lq), ImageFiles.of(hq))
        pairs = pair(*self._files)
        self.entries: Sequence[Entry] = tuple(
            Entry(name=name, split=NO_SPLITS, lq=low, hq=high) for name, low, high in pairs
        )

    @property
    def name(self) -> str:
        """The folders' places."""
        return f"{self.lq} with {self.hq} ({len(self.entries):,} images)"

    @cached_property
    def digest(self) -> str:
        """One SHA-256 of the names and of what both files of each hold, so that an output is not gone on with when
        other files have come under the same names. All of them are read for it, once.

        Raises:
            StorageError: a file cannot be read.
        """
        names = [entry.name for entry in self.entries]
        low, high = (file_digests(one.place, [one.files[name] for name in names]) for one in self._files)
        return named_digest((name, lq + hq) for name, lq, hq in zip(names, low, high, strict=True))

    @property
    def about(self) -> dict[str, Any]:
        """Places, count, a digest of the names, and one of what the files hold.

        Raises:
            StorageError: a file cannot be read.
        """
        places = {"lq": self.lq, "hq": self.hq, "counts": {NO_SPLITS: len(self.entries)}}
        return {**places, **names_of(self.entries), "digest": self.digest}

    def read(self, entry: Entry) -> tuple[Pixels, Pixels | None]:
        """The low-quality image and its original.

        Raises:
            InputError: an image is damaged, has more than 8 bits, or the two have two sizes.
            StorageError: it cannot be read.
        """
        assert entry.hq is not None
        image, original = read_image(entry.lq), read_image(entry.hq)
        if image.shape != original.shape:  # turned by EXIF
            raise InputError(f"{entry.name}: {image.shape} and {original.shape} once upright; give pairs of one size")
        return image, original


class PlainFolder:
    """A folder of low-quality images without ground truth.

    Args:
        place: of the images, at any depth.
        title: how reports call it; its place when left out.

    Raises:
        InputError: no image, or two of one name.
    """

    def __init__(self, place: str, title: str | None = None) -> None:
        self.place, self.title = place, title or place
        files = ImageFiles.of(place)
        files.check_doubled()
        self.files = files.files
        self.entries: Sequence[Entry] = tuple(
            Entry(name=name, split=NO_SPLITS, lq=self.files[name].uri) for name in sorted(self.files)
        )

    @classmethod
    def known(cls, place: str, kind: str) -> PlainFolder:
        """LFW-Test or WIDER-Test, which must be whole.

        Raises:
            InputError: another number of images, or other sizes, than the set has.
        """
        expected, found = KNOWN[kind], cls(place, KNOWN[kind].title)
        if len(found.entries) != expected.count:
            raise InputError(
                f"{place}: {len(found.entries):,} images, and {expected.title} has {expected.count:,}: figures of a "
                "part cannot be compared with others'. Complete it, or open it as a plain folder"
            )
        sizes = ((name, *size_of_image(info)) for name, info in sorted(found.files.items()))
        wrong = [f"{name} ({w} × {h} px)" for name, w, h in sizes if (w, h) != (expected.side, expected.side)]
        if wrong:
            raise InputError(
                f"{place}: {len(wrong):,} images of {expected.title} are not {expected.side} px aligned faces: "
                f"{listed(wrong)}. Take the published aligned set, or open it as a plain folder"
            )
        return found

    @property
    def name(self) -> str:
        """Its title and how many images it has."""
        return f"{self.title} ({len(self.entries):,} images)"

    @cached_property
    def digest(self) -> str:
        """One SHA-256 of the names and of what each file holds, as that of `PairedFolders`.

        Raises:
            StorageError: a file cannot be read.
        """
        names = [entry.name for entry in self.entries]
        digests = file_digests(self.place, [self.files[name] for name in names])
        return named_digest(zip(names, digests, strict=True))

    @property
    def about(self) -> dict[str, Any]:
        """Place, count, a digest of the names, and one of what the files hold.

        Raises:
            StorageError: a file cannot be read.
        """
        place = {"place": self.place, "counts": {NO_SPLITS: len(self.entries)}}
        return {**place, **names_of(self.entries), "digest": self.digest}

    def read(self, entry: Entry) -> tuple[Pixels, Pixels | None]:
        """The image, and None.

        Raises:
            InputError: it is damaged or has more than 8 bits.
            StorageError: it cannot be read.
        """
        return read_image(entry.lq), None


def names_of(entries: Sequence[Entry]) -> dict[str, str]:
    """SHA-256 of the names in order."""
    return {"names_sha256": hashlib.sha256("\n".join(entry.name for entry in entries).encode()).hexdigest()}
