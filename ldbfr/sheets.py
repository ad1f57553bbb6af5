"""Contact sheets: many pictures on one, in a titled table."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldbfr.errors import InputError
from ldbfr.images import Pixels, resize


def contact_sheet(
    rows: Sequence[Sequence[Pixels]],
    column_titles: Sequence[str],
    row_titles: Sequence[str] = (),
    cell: int = 192,
) -> Pixels:
    """Lay pictures, (H, W, 3) uint8 of any size, out in a titled table on white: (H', W', 3) uint8.

    Each picture is scaled so that its longer side is `cell` pixels; titles too long for their place are shortened in
    the middle. InputError if a row is longer than `column_titles`, or if there are row titles but not one per row.
    """
    if not rows or any(len(row) > len(column_titles) for row in rows):
        lengths = [len(row) for row in rows]
        raise InputError(
            f"rows of {lengths} pictures, expected at least one row, each at most {len(column_titles)} long"
        )
    if row_titles and len(row_titles) != len(rows):
        raise InputError(f"{len(row_titles)} row titles for {len(rows)} rows, expected one per row or none")
    gap, margin = max(4, cell // 24), max(8, cell // 12)
    font = ImageFont.load_default(size=max(10, cell / 13))
    line = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 12
    shown_rows = [_shorten(title, font, cell) for title in row_titles]
    shown_columns = [_shorten(title, font, cell) for title in column_titles]
    left = margin + (max(int(font.getlength(title)) for title in shown_rows) + 2 * gap if shown_rows else 0)
    top = margin + (line + gap if any(shown_columns) else 0)
    width = left + len(column_titles) * (cell + gap) - gap + margin
    height = top + len(rows) * (cell + gap) - gap + margin
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    ink = (40, 40, 40)
    for column, title in enumerate(shown_columns):
        x = left + column * (cell + gap) + cell / 2
        draw.text((x, top - gap), title, fill=ink, font=font, anchor="md")
    for row, pictures in enumerate(rows):
        y = top + row * (cell + gap)
        if shown_rows:
            draw.text((left - 2 * gap, y + cell / 2), shown_rows[row], fill=ink, font=font, anchor="rm")
        for column, picture in enumerate(pictures):
            fitted = _fit_longer_side(picture, cell)
            x = left + column * (cell + gap)
            offset = ((cell - fitted.shape[1]) // 2, (cell - fitted.shape[0]) // 2)
            sheet.paste(Image.fromarray(fitted), (x + offset[0], y + offset[1]))
    return np.array(sheet)


def _fit_longer_side(pixels: Pixels, side: int) -> Pixels:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    return resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))


def _shorten(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Take characters out of the middle of a title until it is at most `width` pixels wide."""
    one_line = " ".join(title.split())  # a line break cannot be measured
    shown = "".join(
        c for c in unicodedata.normalize("NFKD", one_line) if not unicodedata.combining(c)
    )  # not in the font
    kept = len(shown)
    text = shown
    while font.getlength(text) > width and kept > 1:
        kept -= 1
        text = f"{shown[: (kept + 1) // 2]}…{shown[len(shown) - kept // 2 :]}"
    return text
