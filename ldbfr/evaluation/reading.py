"""Read images to measure: 8 bits a sample, no transparency, exactly the pixels that the file has.

Restoring takes any picture and settles what it can (`ldbfr.images`); a measurement must not. 8-bit grey becomes RGB by
repeating it, which loses nothing. Deeper samples, transparency and, where asked for, lossy files are refused.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.images import DEFAULT_LIMITS, Pixels, decode_image, open_header

_HEAD = 64 * 1024
"""Bytes in which a header is found nearly always."""
_BITS_PER_SAMPLE = 258  # TIFF tag


def read_image(uri: str, lossless: bool = False) -> Pixels:
    """The pixels of a file, (H, W, 3) uint8; see `decode_exactly`.

    Raises:
        InputError: as `decode_exactly`.
        StorageError: it cannot be read.
    """
    return decode_exactly(storage.read_bytes(uri, max_bytes=DEFAULT_LIMITS.max_bytes), uri, lossless)


def decode_exactly(data: bytes, name: str, lossless: bool = False) -> Pixels:
    """The pixels of an encoded image, (H, W, 3) uint8: RGB as it is, 8-bit grey three times.

    The EXIF orientation is applied and an embedded colour profile is converted to sRGB, as when it is restored.

    Args:
        data: the file.
        name: for errors.
        lossless: refuse JPEG and WebP too, for images that somebody computed: their losses would be measured.

    Raises:
        InputError: it is no image, or one that has more than 8 bits a sample or transparency, or is lossy.
    """
    if data:
        check_kind(data, name, lossless)
    return decode_image(data, name=name)


def check_kind(data: bytes, name: str, lossless: bool) -> None:
    """Refuse by its header what cannot be measured exactly; InputError says how to convert it."""
    header = open_header(data, name)
    if lossless and isinstance(header, JpegImageFile | WebPImageFile):
        raise InputError(
            f"{name}: a {header.format} file, whose losses would be measured as the method's; write the images as PNG"
        )
    if (bits := bits_per_sample(data, header)) > 8:
        raise InputError(
            f"{name}: {bits} bits a sample, and metrics are defined on 8; convert the whole set the same way, for "
            "example with ImageMagick: magick IN.png -depth 8 OUT.png"
        )
    if header.has_transparency_data or header.mode in ("LA", "La"):
        raise InputError(
            f"{name}: it has transparency, which no metric defines; remove the alpha channel, for example with "
            "ImageMagick: magick IN.png -alpha off OUT.png"
        )


def bits_per_sample(data: bytes, header: Image.Image) -> int:
    """Of a file; Pillow itself gives RGB of 16 bits as 8 without a word."""
    if isinstance(header, PngImageFile):
        return int(struct.unpack_from(">B", data, 24)[0])
    if isinstance(header, TiffImageFile):
        bits: Any = header.tag_v2.get(_BITS_PER_SAMPLE, (1,))
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 16 if header.mode.startswith("I") else 32 if header.mode == "F" else 8


def size_of_image(info: storage.ObjectInfo) -> tuple[int, int]:
    """Width and height of an image file, as stored, from its header alone where that is near the start.

    Raises:
        InputError: it is no image.
        StorageError: it cannot be read.
    """
    head = storage.read_range(info.uri, 0, min(info.size, _HEAD)) if info.size else b""
    if not head:
        raise InputError(f"{info.uri}: the file is empty (0 bytes), expected an image; copy it again from its source")
    try:
        return open_header(head, info.uri).size
    except InputError:
        if len(head) == info.size:
            raise
        return open_header(storage.read_bytes(info.uri, max_bytes=DEFAULT_LIMITS.max_bytes), info.uri).size


def pixels_digest(pixels: Pixels) -> str:
    """SHA-256 of an image's shape and samples, in hexadecimal: equal pixels, equal digest, however they are stored."""
    digest = hashlib.sha256(f"{pixels.shape} {pixels.dtype}\n".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
