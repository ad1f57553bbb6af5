"""What a photo says beside its pixels: EXIF and ICC profile through a restoration, and the result's provenance.

An EXIF block is a small TIFF file: a header, then directories (IFDs) of tags. Its values are copied byte for byte, in
their own byte order, rather than through Pillow, which guesses their types anew and turns accented letters into "?".
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ldbfr.errors import ConfigError
from ldbfr.images import (
    BAD_PROFILE,
    DEFAULT_LIMITS,
    ImageFormat,
    ImageLimits,
    Pixels,
    decode_file,
    encode_image,
    open_header,
)

MAX_EXIF_BYTES = 65_533
"""The longest EXIF block that fits into a JPEG file's APP1 marker; the other formats keep to it too."""

MAX_ICC_BYTES = 2**20

_PREFIX = b"Exif\0\0"
_ASCII, _SHORT, _LONG = 2, 3, 4
_BYTES_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 129: 1}
_POINTER_TYPES = {4: "I", 13: "I", 16: "Q", 18: "Q"}  # LONG, IFD, and BigTIFF's two

_PROCESSING_SOFTWARE, _ORIENTATION = 0x000B, 0x0112
_EXIF, _GPS, _INTEROP = 0x8769, 0x8825, 0xA005
_SUB_IFDS = (_EXIF, _GPS, _INTEROP)

# Named one by one, because a TIFF file's first directory also says where its pixels are. ProcessingSoftware is not
# among them: it says who made this file, which the result's writer knows.
_KEPT_IN_FIRST_IFD = {
    0x010D: "DocumentName",
    0x010E: "ImageDescription",
    0x010F: "Make",
    0x0110: "Model",
    0x0112: "Orientation",
    0x011D: "PageName",
    0x0131: "Software",
    0x0132: "DateTime",
    0x013B: "Artist",
    0x013C: "HostComputer",
    0x4746: "Rating",
    0x4749: "RatingPercent",
    0x8298: "Copyright",
    0x8769: "the Exif directory",
    0x8825: "the GPS directory",
    0x9C9B: "XPTitle",
    0x9C9C: "XPComment",
    0x9C9D: "XPAuthor",
    0x9C9E: "XPKeywords",
    0x9C9F: "XPSubject",
}
_DROPPED_FROM_EXIF_IFD = {
    0x9214: "SubjectArea, in pixels of the input",
    0x927C: "MakerNote: its offsets break where it is moved, and it may hold a preview of the input",
    0xA002: "PixelXDimension",
    0xA003: "PixelYDimension",
    0xA20E: "FocalPlaneXResolution, in pixels of the input",
    0xA20F: "FocalPlaneYResolution",
    0xA210: "FocalPlaneResolutionUnit",
    0xA214: "SubjectLocation, in pixels of the input",
    0xEA1C: "Padding",
    0xEA1D: "OffsetSchema, of the MakerNote",
}
_KEPT_IN_INTEROP_IFD = {0x0001: "InteropIndex", 0x0002: "InteropVersion"}

_KEEPS: dict[int, Callable[[int], bool]] = {
    0: _KEPT_IN_FIRST_IFD.__contains__,
    _EXIF: lambda tag: tag not in _DROPPED_FROM_EXIF_IFD and tag not in (_EXIF, _GPS),
    _GPS: lambda tag: tag <= 0x1F,
    _INTEROP: _KEPT_IN_INTEROP_IFD.__contains__,
}


@dataclass(frozen=True)
class Metadata:
    """What goes from a photo into its restoration.

    `exif` is an EXIF block, as `PIL.Image.Exif.tobytes` gives one, or empty: of an upright picture, and without what
    is true of the input alone (thumbnail, size and places in pixels, resolution, the maker's private notes).
    `icc_profile` is the photo's RGB profile, or empty; a grey or CMYK profile is left out, because a restoration is
    RGB: the result is then sRGB without a profile.
    """

    exif: bytes = b""
    icc_profile: bytes = b""


def decode_with_metadata(data: bytes, *, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[Pixels, Metadata]:
    """The pixels and the errors of `decode_image`, and what the file says beside the pixels.

    The pixels are sRGB whatever the profile, as always. Damaged EXIF data and a broken profile say nothing, and so does
    an EXIF block over MAX_EXIF_BYTES or a profile over MAX_ICC_BYTES.
    """
    pixels, image = decode_file(data, name=name, limits=limits)
    return pixels, Metadata(exif_of(data, image), _usable_profile(image.info.get("icc_profile")))


def exif_of(data: bytes, image: ImageFile) -> bytes:
    """What `Metadata.exif` is of a file, given its bytes and what `decode_file` made of them."""
    return _exif_bytes(_read_exif(_exif_source(data, image), _KEEPS))


def encode_with_metadata(
    pixels: Pixels,
    format: ImageFormat,
    *,
    quality: int = 95,
    metadata: Metadata = Metadata(),
    provenance: Mapping[str, str | int] | None = None,
) -> bytes:
    """Encode sRGB pixels as `encode_image` does, with metadata and provenance; equal arguments give equal bytes.

    With a profile the pixels are converted from sRGB into its space, and it is embedded; where it cannot be converted
    into, they stay sRGB without a profile. The provenance becomes the EXIF tag ProcessingSoftware, as canonical JSON;
    where it and the photo's EXIF do not fit together, the photo's is dropped. ConfigError if it does not fit alone.
    """
    shown = _from_srgb(pixels, metadata.icc_profile)
    return encode_image(
        pixels if shown is None else shown,
        format,
        quality=quality,
        exif=exif_block(metadata.exif, provenance),
        icc_profile=b"" if shown is None else metadata.icc_profile,
    )


def read_provenance(data: bytes, *, name: str) -> dict[str, Any] | None:
    """The provenance that `encode_with_metadata` put into a file, or None; no pixel is decoded.

    InputError, in whose text `name` stands for the file, if it is no image.
    """
    block = _read_exif(_exif_source(data, open_header(data, name)), {0: {_PROCESSING_SOFTWARE}.__contains__})
    value = block.tags.get(_PROCESSING_SOFTWARE)
    if not isinstance(value, _Value) or value.type != _ASCII:
        return None
    try:
        found = json.loads(value.raw.rstrip(b"\0"))
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(found, dict) and all(type(value) in (str, int) for value in found.values())
    return found if is_ours else None


# ---- colour ----


def _usable_profile(profile: object) -> bytes:
    """An embedded profile that sRGB can be converted into, or nothing."""
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_ICC_BYTES:
        return b""
    return profile if _from_srgb(np.zeros((1, 1, 3), np.uint8), profile) is not None else b""


def _from_srgb(pixels: Pixels, profile: bytes) -> Pixels | None:
    """Convert sRGB pixels into an RGB profile's space; None if it is none, or too large to be embedded."""
    if not 0 < len(profile) <= MAX_ICC_BYTES:
        return None
    try:
        target = ImageCms.ImageCmsProfile(BytesIO(profile))
        if target.profile.xcolor_space.strip() != "RGB":
            return None
        image = Image.fromarray(np.ascontiguousarray(pixels))
        converted = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), target, outputMode="RGB")
    except BAD_PROFILE:
        return None
    return np.array(converted)


# ---- EXIF ----


class _Value(NamedTuple):
    """A tag's value as its file has it: a number for the type, and bytes in the file's order."""

    type: int
    raw: bytes


_Tags = dict[int, "_Value | _Tags"]


class _Block(NamedTuple):
    """A TIFF structure's byte order, as `struct` writes it, and its first directory."""

    order: str
    tags: _Tags


class _Layout:
    """How a TIFF structure lays out its directories: with 32-bit offsets, or BigTIFF's 64-bit ones."""

    def __init__(self, order: str, big: bool) -> None:
        self.order, self.first = order, 8 if big else 4
        self.length, self.entry, self.offset = (
            struct.Struct(order + form) for form in (("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I"))
        )


def _exif_source(data: bytes, image: ImageFile) -> bytes:
    """The TIFF structure in which a file keeps its EXIF tags: a TIFF file is one itself."""
    if isinstance(image, TiffImageFile):
        return data
    block = image.info.get("exif")
    if isinstance(image, PngImageFile):
        block = _png_exif(data) or _png_text_exif(image.info.get("Raw profile type exif"))
    return re.sub(rb"^(Exif\0\0){1,2}", b"", block) if isinstance(block, bytes) else b""


def _png_exif(data: bytes) -> bytes:
    """The eXIf chunk; Pillow finds one behind the pixels only by decoding them."""
    offset = 8
    while offset + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        if kind == b"eXIf":
            return data[offset + 8 : offset + 8 + length]
        offset += 12 + length
    return b""


def _png_text_exif(text: object) -> bytes:
    """EXIF in hexadecimal digits, below three lines of heading: PNG files from before there was a chunk for it."""
    try:
        return bytes.fromhex("".join(str(text).split("\n")[3:]))
    except ValueError:
        return b""


def _read_exif(data: bytes, keeps: Mapping[int, Callable[[int], bool]]) -> _Block:
    """The tags of a TIFF structure that are kept; none if it is damaged, or if they are more than a block can hold."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return _Block("<", {})
    try:
        (magic,) = struct.unpack_from(order + "H", data, 2)
        layout = _Layout(order, big=magic == 43)
        (start,) = layout.offset.unpack_from(data, layout.first)
        tags = _read_ifd(data, start, 0, layout, keeps)
    except (struct.error, OverflowError, ValueError):
        return _Block("<", {})
    if _ORIENTATION in tags:
        tags[_ORIENTATION] = _Value(_SHORT, struct.pack(order + "H", 1))
    return _Block(order, tags)


def _read_ifd(data: bytes, start: int, ifd: int, layout: _Layout, keeps: Mapping[int, Callable[[int], bool]]) -> _Tags:
    """The kept tags of the directory at `start` and below it; what lies outside the data is left out."""
    tags: _Tags = {}
    total = 0
    (length,) = layout.length.unpack_from(data, start)
    for index in range(min(length, 2**16)):
        place = start + layout.length.size + index * layout.entry.size
        tag, type_, count, field = layout.entry.unpack_from(data, place)
        if tag in tags or not keeps[ifd](tag):
            continue
        if tag in _SUB_IFDS:
            if type_ in _POINTER_TYPES:
                (below,) = struct.unpack_from(layout.order + _POINTER_TYPES[type_], field)
                with suppress(struct.error, OverflowError):  # programs that move a directory forget those below it
                    tags[tag] = _read_ifd(data, below, tag, layout, keeps)
            continue
        size = count * _BYTES_OF_TYPE.get(type_, 0)
        inside = size <= len(field)
        begin = 0 if inside else layout.offset.unpack(field)[0]
        if size == 0 or begin + size > len(data):
            continue
        total += size
        if total > MAX_EXIF_BYTES:  # looked at before it is copied: all may point at the same large value
            raise ValueError(f"over {MAX_EXIF_BYTES} bytes")
        tags[tag] = _Value(type_, (field if inside else data)[begin : begin + size])
    return {tag: value for tag, value in tags.items() if value}


def _exif_bytes(block: _Block) -> bytes:
    """Write a block; nothing if it has no tags, or is too long."""
    if not block.tags:
        return b""
    magic = b"II*\0" if block.order == "<" else b"MM\0*"
    exif = _PREFIX + magic + struct.pack(block.order + "I", 8) + _ifd_bytes(block.tags, 8, block.order)
    return exif if len(exif) <= MAX_EXIF_BYTES else b""


def _ifd_bytes(tags: _Tags, start: int, order: str) -> bytes:
    """A directory that begins at `start`: its table, then the values and directories that do not fit into it."""
    table, behind = struct.pack(order + "H", len(tags)), b""
    end_of_table = start + len(table) + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        place = end_of_table + len(behind)
        field = struct.pack(order + "I", place)
        if isinstance(value, dict):
            type_, count = _LONG, 1
            behind += _ifd_bytes(value, place, order)
        else:
            type_, count = value.type, len(value.raw) // _BYTES_OF_TYPE[value.type]
            if len(value.raw) <= 4:
                field = value.raw.ljust(4, b"\0")
            else:
                behind += value.raw + bytes(len(value.raw) % 2)
        table += struct.pack(order + "HHI", tag, type_, count) + field
    return table + bytes(4) + behind


def exif_block(exif: bytes, provenance: Mapping[str, str | int] | None) -> bytes:
    """The EXIF block of a result: a photo's, see `Metadata`, and the provenance, see `encode_with_metadata`."""
    block = _read_exif(exif.removeprefix(_PREFIX), _KEEPS)
    if provenance is None:
        return _exif_bytes(block)
    text = json.dumps(dict(provenance), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    tags: _Tags = {_PROCESSING_SOFTWARE: _Value(_ASCII, text.encode("ascii") + b"\0")}
    written = _exif_bytes(_Block(block.order, block.tags | tags)) or _exif_bytes(_Block("<", tags))
    if not written:
        raise ConfigError(
            f"provenance of {len(text):,} characters, expected one that fits into an EXIF block of "
            f"{MAX_EXIF_BYTES:,} bytes; give fewer or shorter values"
        )
    return written
