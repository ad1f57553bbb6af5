"""The contact sheet: input | first stage | restored, for a few inputs picked by a hash of their keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldbfr import storage
from ldbfr.archive.naming import SHEET_FILE
from ldbfr.archive.rows import FaceRow
from ldbfr.images import Pixels, contact_sheet, decode_image, encode_image

TITLES = ("input", "first stage", "restored")
MAX_PICTURES = 16
ROWS_PER_BLOCK = 8
CELL = 192


class ContactSheet:
    """Keeps the small pictures of the picked inputs until all are there.

    Args:
        picks: their indexes, best first.
    """

    def __init__(self, picks: Sequence[int]) -> None:
        self.order = {index: place for place, index in enumerate(picks)}
        self.rows: dict[int, FaceRow] = {}

    def add(self, row: FaceRow) -> None:
        """Keep a restored row if it was picked."""
        if row.status == "restored" and row.index in self.order:
            self.rows[self.order[row.index]] = row
            if len(self.rows) > MAX_PICTURES:
                del self.rows[max(self.rows)]

    def draw(self) -> Pixels | None:
        """The sheet (H, W, 3), in blocks of ROWS_PER_BLOCK side by side; None if nothing was restored."""
        rows = [self.rows[place] for place in sorted(self.rows)]
        blocks = [rows[start : start + ROWS_PER_BLOCK] for start in range(0, len(rows), ROWS_PER_BLOCK)]
        drawn = [contact_sheet([pictures(r) for r in block], TITLES, [r.key for r in block], CELL) for block in blocks]
        if not drawn:
            return None
        height = max(len(block) for block in drawn)
        return np.concatenate([below_white(block, height) for block in drawn], axis=1)

    def write(self, output: str) -> str | None:
        """Draw the sheet into the output; its URI, None if nothing was restored."""
        drawn = self.draw()
        if drawn is None:
            return None
        uri = storage.join(output, SHEET_FILE)
        storage.write_bytes(uri, encode_image(drawn, "png"))
        return uri


def pictures(row: FaceRow) -> list[Pixels]:
    """The three pictures of a row."""
    stored = (row.sheet_input, row.sheet_first_stage, row.sheet_restored)
    return [decode_image(data or b"", name=row.key) for data in stored]


def below_white(pixels: Pixels, height: int) -> Pixels:
    """Fill up with white to a height."""
    return np.pad(pixels, ((0, height - len(pixels)), (0, 0), (0, 0)), constant_values=255)
