"""An object, on a disk or in a bucket, as a file that is read by ranges."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any

from ldbfr import storage

HEADER_BUFFER = 2**17
"""Bytes read at a time while headers are looked for: small members come along, large ones are jumped over."""
STREAM_BUFFER = 2**22
"""Bytes read at a time of what has to be read through."""

Stream = Iterator[tuple[int, Callable[[], bytes | None]]]
"""Of what can only be read forward: where each image is, and a call that reads it before the next is asked for."""


class ObjectFile(io.RawIOBase):
    """An object as a seekable file that is read by ranges."""

    def __init__(self, uri: str, size: int) -> None:
        self.uri, self.size, self.position = uri, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; the new position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or what the object still has; how many bytes."""
        length = min(len(buffer), max(0, self.size - self.position))
        if length:
            buffer[:length] = storage.read_range(self.uri, self.position, length)
        self.position += length
        return length
