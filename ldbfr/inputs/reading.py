"""Read the images of a unit: by byte ranges, several at a time from a bucket, or forward if that is the only way."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ldbfr import storage
from ldbfr.errors import InputError, LDBFRError, StorageError
from ldbfr.images import DEFAULT_LIMITS
from ldbfr.inputs.containers import tar_values, unpack_zip
from ldbfr.inputs.entries import Container, Entry
from ldbfr.inputs.objects import Stream
from ldbfr.inputs.parquet import parquet_values

AHEAD = 6
"""Images asked for before they are needed: a bucket answers slowly, but many at once."""

_ABOUT_ONE_FILE = tuple(
    getattr(errno, name)
    for name in ("ENOENT", "EACCES", "EPERM", "EISDIR", "ENOTDIR", "ELOOP", "ENAMETOOLONG", "EIO", "ENXIO", "EINVAL")
)
_ABOUT_ONE_OBJECT = (
    *("NoSuchKey", "NoSuchBucket", "404", "InvalidRange", "416", "AccessDenied", "403"),
    *("InvalidObjectState", "KMS.DisabledException", "KMS.NotFoundException", "PermanentRedirect", "301"),
    "InvalidBucketName",
)
"""An object may have permissions of its own, and a list may name any bucket; wrong credentials have other codes."""


def is_about_one_input(error: StorageError) -> bool:
    """Whether the other inputs may be readable all the same: this one is missing, cut short, barred or too large.

    Otherwise the disk, the network or the credentials fail, and going on would reject every input there is.
    """
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno in _ABOUT_ONE_FILE
    answer = getattr(cause, "response", None)
    if isinstance(answer, dict):  # botocore's ClientError
        return str(answer.get("Error", {}).get("Code")) in _ABOUT_ONE_OBJECT
    if isinstance(cause, UnicodeError) or type(cause).__name__ == "ParamValidationError":  # botocore's; may be absent
        return True  # no place can have that name
    return cause is None  # what storage itself found: the size, the range, the URI


class Inputs:
    """Reads entries. Of a tar.gz and within a parquet file it goes forward only, and keeps its place between units.

    Args:
        container: that the entries were listed in.
        column: of a parquet file.
    """

    def __init__(self, container: Container, column: str | None = None) -> None:
        self.container, self.column = container, column
        self._stream: Stream | None = None
        self._position = -1

    def read(self, entries: Sequence[Entry]) -> Generator[bytes | LDBFRError, None, None]:
        """The bytes of each entry, in order, or why there are none.

        Raises:
            StorageError: the place itself cannot be read.
        """
        sequential = self.container.kind in ("tar.gz", "parquet") and any(e.kind != "file" for e in entries)
        if sequential or all(storage.is_local(entry.uri) for entry in entries):
            for entry in entries:
                yield self._attempt(entry)
            return
        with ThreadPoolExecutor(AHEAD) as pool:
            waiting: deque[Future[bytes | LDBFRError]] = deque()
            try:
                for entry in entries:
                    waiting.append(pool.submit(self._attempt, entry))
                    if len(waiting) > AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _attempt(self, entry: Entry) -> bytes | LDBFRError:
        try:
            return self._bytes(entry)
        except InputError as error:
            return error
        except StorageError as error:
            if is_about_one_input(error):
                return error
            raise

    def _bytes(self, entry: Entry) -> bytes:
        limit = DEFAULT_LIMITS.max_bytes
        if max(entry.size, entry.span) > limit:
            raise InputError(f"{entry.name}: {entry.size:,} bytes, expected at most {limit:,}; shrink it")
        if entry.kind == "file":
            return storage.read_bytes(entry.uri, max_bytes=limit)
        if entry.kind == "tar":
            return storage.read_range(entry.uri, entry.place, entry.span)
        if entry.kind == "zip":
            return unpack_zip(entry, storage.read_range(entry.uri, entry.place, entry.span))
        return self._from_stream(entry)

    def _from_stream(self, entry: Entry) -> bytes:
        """Go forward to the entry; from the start, if it lies behind."""
        if self._stream is None or self._position >= entry.place:
            self._stream = self._open_stream(entry)
        for position, read in self._stream:
            self._position = position
            if position == entry.place:
                if (data := read()) is None:
                    raise InputError(f"{entry.name}: there are no bytes in it; fill it in or leave it out")
                return data
        raise InputError(f"{entry.name}: the archive ends before it; copy it again, or leave it out")

    def _open_stream(self, first: Entry) -> Stream:
        self._position = -1
        if first.kind == "parquet":
            return parquet_values(self.container, self.column, first.place)
        return tar_values(self.container)
