"""The pictures that a report shows: some at random, and the least sharp results.

A gallery keeps what is needed for both and nothing else, so it can be put together from the pictures of units in any
order, in any grouping, and any number of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from heapq import nsmallest
from typing import Any

from ldbfr import storage
from ldbfr.archive.naming import WORK_FOLDER
from ldbfr.archive.rows import Picture
from ldbfr.tables import read_rows, write_rows

RANDOM = 12
"""Pictures with the smallest rank."""
WORST = 8
"""Pictures with the smallest sharpness."""
GALLERY_FILE = "gallery.parquet"

Order = Callable[[Picture], tuple[Any, ...]]


def wanted(rows: Sequence[tuple[int, float]]) -> list[int]:
    """Indexes of the rows (rank, sharpness) whose pictures a gallery of these rows could show, in order."""
    places = range(len(rows))
    random = nsmallest(RANDOM, places, key=lambda place: (rows[place][0], _number(rows[place][1]), place))
    worst = nsmallest(WORST, places, key=lambda place: (_number(rows[place][1]), rows[place][0], place))
    return sorted({*random, *worst})


class Gallery:
    """A commutative, idempotent monoid of pictures: ∅ is the empty gallery, `merge` its sum.

    Of pictures with the same key, one is shown in each group: the first in the group's order.
    """

    def __init__(self, pictures: Iterable[Picture] = ()) -> None:
        self.random: list[Picture] = []
        self.worst: list[Picture] = []
        self.add(pictures)

    @classmethod
    def read(cls, output: str) -> Gallery:
        """The gallery of a run; empty where there is none yet."""
        uri = gallery_uri(output)
        return cls(read_rows(uri, Picture)) if storage.exists(uri) else cls()

    def write(self, output: str) -> None:
        """Put the gallery into the run's folder."""
        write_rows(gallery_uri(output), self.pictures(), Picture)

    def add(self, pictures: Iterable[Picture]) -> None:
        """Take in more pictures, and let go of those that are not shown any more."""
        new = list(pictures)
        self.random = _first(RANDOM, [*self.random, *new], _by_rank)
        self.worst = _first(WORST, [*self.worst, *new], _by_sharpness)

    def replace(self, pictures: Iterable[Picture]) -> None:
        """Take in pictures that are newer than those of the same keys, which go."""
        new = list(pictures)
        keys = {picture.key for picture in new}
        self.random = [picture for picture in self.random if picture.key not in keys]
        self.worst = [picture for picture in self.worst if picture.key not in keys]
        self.add(new)

    def merge(self, other: Gallery) -> None:
        """Take in another gallery."""
        self.add(other.pictures())

    def pictures(self) -> list[Picture]:
        """All that must be kept, each once."""
        return list({_by_rank(picture): picture for picture in (*self.random, *self.worst)}.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gallery) and self._identity() == other._identity()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _identity(self) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        return [_by_rank(picture) for picture in self.random], [_by_rank(picture) for picture in self.worst]


def gallery_uri(output: str) -> str:
    """Where a run keeps its gallery."""
    return storage.join(output, WORK_FOLDER, GALLERY_FILE)


def _first(count: int, pictures: Iterable[Picture], order: Order) -> list[Picture]:
    """The first `count` in a total order, one for each key."""
    kept: dict[str, Picture] = {}
    for picture in sorted(pictures, key=order):
        kept.setdefault(picture.key, picture)
        if len(kept) == count:
            break
    return list(kept.values())


# Every field takes part, so that only equal pictures tie: otherwise the order of adding would show.
def _by_rank(picture: Picture) -> tuple[Any, ...]:
    return (picture.rank, _number(picture.sharpness), *_rest(picture))


def _by_sharpness(picture: Picture) -> tuple[Any, ...]:
    return (_number(picture.sharpness), picture.rank, *_rest(picture))


def _rest(picture: Picture) -> tuple[Any, ...]:
    return picture.key, picture.input, picture.before, picture.after


def _number(sharpness: float) -> float:
    """NaN has no place in an order; it goes last."""
    return math.inf if math.isnan(sharpness) else sharpness
