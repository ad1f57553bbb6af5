"""Pair files by their names, strictly: what is missing, comes twice or has another size is an error that lists it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.evaluation.reading import size_of_image
from ldbfr.inputs.keys import is_image
from ldbfr.storage import ObjectInfo

SHOWN = 10
"""Names that an error lists of a kind; the rest are counted."""
READERS = 16
"""Headers that are read at once: a bucket answers slowly, but many at once."""


def listed(names: Sequence[str]) -> str:
    """The first names, and how many there are beyond them."""
    rest = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


@dataclass
class ImageFiles:
    """The images of a folder by name: the path below it, without the suffix."""

    place: str
    files: dict[str, ObjectInfo] = field(default_factory=dict)
    doubled: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, place: str) -> ImageFiles:
        """Look a folder through, at any depth.

        Raises:
            InputError: there is no image in it.
            StorageError: it cannot be listed.
        """
        found = cls(place)
        for info in storage.list_objects(place):
            if not is_image(info.key):
                continue
            name = stem(info.key)
            if name in found.files:
                found.doubled.append(f"{name} ({found.files[name].key} and {info.key})")
            else:
                found.files[name] = info
        if not found.files:
            raise InputError(f"{place}: there is no image in it; check the place")
        return found

    def check_doubled(self) -> None:
        """InputError if two files have one name."""
        if self.doubled:
            raise InputError(
                f"{self.place}: {len(self.doubled):,} names come twice, with different suffixes, so nobody knows which "
                f"is meant: {listed(self.doubled)}; remove one of each"
            )


def stem(key: str) -> str:
    """A path without its last suffix."""
    folders, slash, last = key.rpartition("/")
    return folders + slash + (last.rpartition(".")[0] or last)


def pair(left: ImageFiles, right: ImageFiles, same_sizes: bool = True) -> list[tuple[str, str, str]]:
    """(name, place of the left, place of the right) in the names' order.

    Args:
        left: such as the low-quality images.
        right: such as the originals.
        same_sizes: whether to compare widths and heights too, by the files' headers.

    Raises:
        InputError: listing what is missing on either side, comes twice, or has two sizes.
        StorageError: a file cannot be read.
    """
    faults = []
    for one, other in ((left, right), (right, left)):
        if one.doubled:
            faults.append(f"{len(one.doubled):,} names twice in {one.place}: {listed(one.doubled)}")
        if missing := sorted(other.files.keys() - one.files.keys()):
            faults.append(f"{len(missing):,} missing in {one.place}: {listed(missing)}")
    both = sorted(left.files.keys() & right.files.keys())
    if same_sizes and (different := sizes_that_differ([(left.files[name], right.files[name], name) for name in both])):
        faults.append(f"{len(different):,} of two sizes: {listed(different)}")
    if faults:
        raise InputError(
            f"{left.place} and {right.place} are not pairs. {'. '.join(faults)}. Pairs are made by name without its "
            "suffix, and nothing is resized before it is measured"
        )
    return [(name, left.files[name].uri, right.files[name].uri) for name in both]


def sizes_that_differ(pairs: Iterable[tuple[ObjectInfo, ObjectInfo, str]]) -> list[str]:
    """The pairs whose images have two sizes, as lines, in the order given."""

    def compare(one: tuple[ObjectInfo, ObjectInfo, str]) -> str | None:
        (width, height), (other_width, other_height) = size_of_image(one[0]), size_of_image(one[1])
        if (width, height) == (other_width, other_height):
            return None
        return f"{one[2]} ({width} × {height} and {other_width} × {other_height} px)"

    with ThreadPoolExecutor(READERS) as pool:
        return [line for line in pool.map(compare, pairs) if line is not None]
