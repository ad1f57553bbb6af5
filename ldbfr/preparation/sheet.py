"""The contact sheet: some faces that were kept, some that were not, so that a person sees what was cut."""

from __future__ import annotations

import heapq

from ldbfr import storage
from ldbfr.images import Pixels, decode_image, encode_image
from ldbfr.preparation.outcomes import Outcome
from ldbfr.preparation.units import draw
from ldbfr.sheets import contact_sheet

SHEET_FILE = "contact-sheet.png"
COLUMNS = 8
KEPT_ROWS, REJECTED_ROWS = 4, 2
CELL = 144


class Picks:
    """The few outcomes with the smallest draws, of all that are added in any order."""

    def __init__(self, seed: int, most: int) -> None:
        self.seed, self.most = seed, most
        self._heap: list[tuple[int, str, Outcome]] = []  # the largest draw goes first

    def add(self, outcome: Outcome) -> None:
        """Take an outcome, or leave it."""
        entry = (-draw(self.seed, outcome.key), outcome.key, outcome)
        (heapq.heappush if len(self._heap) < self.most else heapq.heappushpop)(self._heap, entry)

    def best(self) -> list[Outcome]:
        """Those taken, best first."""
        return [outcome for _, _, outcome in sorted(self._heap, key=lambda entry: -entry[0])]


class Sheet:
    """Collects what the sheet shows: kept faces, images too small, and pairs of a dropped face and the one that stays.

    Args:
        seed: of the draw.
    """

    def __init__(self, seed: int) -> None:
        self.kept = Picks(seed, KEPT_ROWS * COLUMNS)
        self.rejected = Picks(seed, REJECTED_ROWS * COLUMNS)
        self.duplicates = Picks(seed, COLUMNS)

    def add(self, outcome: Outcome) -> None:
        """Consider an outcome; only those that have a picture, or a face in a shard, can be shown."""
        if outcome.status == "kept":
            self.kept.add(outcome)
        elif outcome.picture is not None:
            (self.duplicates if outcome.status == "duplicate" else self.rejected).add(outcome)

    @property
    def originals(self) -> set[str]:
        """Keys of the faces for which those shown were dropped."""
        return {original_of(outcome) for outcome in self.duplicates.best()}

    def draw(self, output: str, originals: dict[str, Outcome]) -> Pixels | None:
        """The sheet (H, W, 3); None if there is nothing to show.

        Raises:
            StorageError: a shard cannot be read.
        """
        dropped = [outcome for outcome in self.duplicates.best() if original_of(outcome) in originals]
        groups = [
            ("kept", [face(output, outcome) for outcome in self.kept.best()]),
            ("too small", [picture(outcome) for outcome in self.rejected.best()]),
            ("dropped", [picture(outcome) for outcome in dropped]),
            ("… as near to", [face(output, originals[original_of(outcome)]) for outcome in dropped]),
        ]
        rows, titles = [], []
        for title, pictures in groups:
            for start in range(0, len(pictures), COLUMNS):
                rows.append(pictures[start : start + COLUMNS])
                titles.append(title)
        return contact_sheet(rows, [""] * COLUMNS, titles, CELL) if rows else None

    def write(self, output: str, originals: dict[str, Outcome]) -> str:
        """Draw the sheet into the output; its URI."""
        uri = storage.join(output, SHEET_FILE)
        if (drawn := self.draw(output, originals)) is not None:
            storage.write_bytes(uri, encode_image(drawn, "png"))
        return uri


def original_of(outcome: Outcome) -> str:
    """The key of the face for which one was dropped."""
    return (outcome.reason or "").removeprefix("near-duplicate: of ")


def face(output: str, outcome: Outcome) -> Pixels:
    """A kept face, out of its shard."""
    assert outcome.shard is not None and outcome.offset is not None and outcome.size is not None
    data = storage.read_range(storage.join(output, "shards", outcome.shard), outcome.offset, outcome.size)
    return decode_image(data, name=outcome.key)


def picture(outcome: Outcome) -> Pixels:
    """The small picture of what was left out."""
    return decode_image(outcome.picture or b"", name=outcome.key)
