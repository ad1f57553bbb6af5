"""What a source of images holds: loose files, archives, and where the bytes of each image are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["file", "tar", "tar.gz", "zip", "parquet"]


@dataclass(frozen=True)
class Container:
    """Inputs that are listed together: the loose files of a source (kind "file"), or one archive."""

    kind: Kind
    uri: str
    prefix: str
    """Of the keys of all inputs in it."""
    size: int = 0
    """Bytes of the archive."""


class Entry(NamedTuple):
    """One input: what it is called, and where its bytes are."""

    name: str
    """What a person looks for: the file's URI, or archive/member."""
    key: str
    """In the data set; unique among the entries that are not refused."""
    kind: Kind
    uri: str
    """Of the file or the archive."""
    place: int = 0
    """tar: first byte of the image; zip: that of the member's header; tar.gz: number of the member; parquet: row."""
    span: int = 0
    """Bytes to read from there; 0 where only reading tells."""
    size: int = 0
    """Bytes of the image, once unpacked; 0 where only reading tells."""
    packing: int = 0
    """zip's compression method."""
    checksum: int = 0
    """zip's CRC-32 of the image."""
    refused: str | None = None
    """Why the listing alone rejects it: "cause: detail"."""


class Other(NamedTuple):
    """What is neither an image nor an archive."""

    name: str
    """What a person looks for, as of an entry."""
    key: str
    """Its path, quoted as an image's; the name itself where that has unusable parts."""


class Stretch(NamedTuple):
    """Of a parquet file: from here, that many rows must be read from their start on."""

    rows: int
