"""Images that are made to cost more than they look: refused by their first bytes, before any pixel is decoded."""

from __future__ import annotations

from ldbfr.errors import InputError
from ldbfr.images import open_header
from serve.problems import Problem

NAME = "the upload"

MOST_PARTS = 4096
"""Chunks of a PNG, segments and stray bytes of a JPEG, before the pixels. Pillow reads them one by one in Python: 20 MB
of empty ones take seconds. The largest photos with all their metadata have some hundred."""

MOST_SCANS = 256
"""Of a JPEG. Each goes over all pixels, however few bytes it has: 20 MB of short ones take many minutes. Ten are usual;
the bytes of metadata, and of a film behind the picture, look like one now and then."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_SCAN = b"\xff\xda"  # which cannot stand among a scan's own bytes
_ENDS = (0xD9, 0xDA)  # end of image, start of scan
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a segment


def check_header(data: bytes, max_pixels: int) -> None:
    """Refuse what is no image, or one that is too large, by its header alone.

    Raises:
        InputError: empty, of another format, damaged, or with a header of too many parts or a JPEG of too many scans.
        Problem: too-large.
    """
    if not data:
        raise InputError(f"{NAME} is empty (0 bytes), expected an image file; send its bytes as the body")
    parts = png_chunks(data) if data.startswith(_PNG) else jpeg_segments(data) if data.startswith(_JPEG) else 0
    if parts >= MOST_PARTS:
        raise InputError(f"{NAME} has {MOST_PARTS:,} parts or more before its pixels; export it again without metadata")
    if data.startswith(_JPEG) and (scans := data.count(_SCAN)) > MOST_SCANS:
        raise InputError(f"{NAME} has {scans:,} scans, expected at most {MOST_SCANS}; save it again as a usual JPEG")
    width, height = open_header(data, NAME).size
    if width * height > max_pixels:
        raise Problem(
            "too-large",
            f"{width} x {height} pixels, expected at most {max_pixels:,} in all; send a smaller image",
            max_pixels=max_pixels,
        )


def png_chunks(data: bytes) -> int:
    """Chunks before the pixels, counted up to MOST_PARTS."""
    position = len(_PNG)
    for count in range(MOST_PARTS):
        if data[position + 4 : position + 8] in (b"IDAT", b"IEND", b""):
            return count
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return MOST_PARTS


def jpeg_segments(data: bytes) -> int:
    """Segments, and bytes that belong to none, before the pixels, counted up to MOST_PARTS."""
    position = len(_JPEG)
    for count in range(MOST_PARTS):
        if position + 1 >= len(data):
            return count
        start, marker = data[position], data[position + 1]
        if start != 0xFF or marker in (0x00, 0xFF):
            position += 1
        elif marker in _ENDS:
            return count
        elif marker in _ALONE:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return MOST_PARTS
