"""Pieces of large files: read by byte range, checked by SHA-256, and kept on the local disk if they are in a bucket."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

import numpy as np

from ldbfr import storage
from ldbfr.errors import StorageError
from ldbfr.weights import cache_folder

log = logging.getLogger(__name__)

Result = TypeVar("Result")

THREADS = 8
"""Pieces read at once: a batch of 8 from a bucket then waits for one answer instead of for eight."""

_COUNTER = "bytes"
_PART_SUFFIX = ".part"
_ABANDONED_S = 3600


class Piece(NamedTuple):
    """Some bytes of a file, and what they must be."""

    uri: str
    start: int
    """First byte."""
    length: int
    sha256: bytes
    """The digest itself, 32 bytes."""
    name: str
    """What the piece is, for the text of an error."""


def read_piece(piece: Piece, cache: RangeCache | None = None) -> bytes:
    """The bytes of a piece, from the cache where it has them.

    Raises:
        StorageError: the file is gone, cut short or unreachable, or its bytes are not those that were prepared.
    """
    if cache is not None and (kept := cache.get(piece.sha256)) is not None:
        return kept
    where = f"{piece.name} (bytes {piece.start:,} to {piece.start + piece.length:,} of {piece.uri})"
    try:
        data = storage.read_range(piece.uri, piece.start, piece.length)
    except StorageError as error:
        raise StorageError(
            f"cannot read {where}: {error}. If the file is gone or damaged, put it back or prepare the data set again"
        ) from error
    if (found := hashlib.sha256(data)).digest() != piece.sha256:
        raise StorageError(
            f"{where} was changed: SHA-256 {found.hexdigest()}, expected {piece.sha256.hex()}; "
            "put the original file back or prepare the data set again"
        )
    if cache is not None:
        cache.put(piece.sha256, data)
    return data


def checked_places(indices: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """The indices as (n,) int64; IndexError for one outside of 0 to count - 1."""
    places = np.asarray(indices, dtype=np.int64).reshape(-1)
    wrong = places[(places < 0) | (places >= count)]
    if len(wrong):
        raise IndexError(f"index {wrong[0]}: expected 0 to {count - 1}")
    return places


def in_parallel(work: Callable[[int], Result], count: int, threads: int) -> list[Result]:
    """`work(0)` to `work(count - 1)` in a few threads, results in order; the first error is raised."""
    if threads == 1 or count == 1:
        return [work(number) for number in range(count)]
    return list(_pool(os.getpid(), threads).map(work, range(count)))


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool for all data sets of a process; `process` is its id, since threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ldbfr-read")


class RangeCache:
    """A bounded cache on the local disk, shared by the processes of a machine that read the same data set.

    An entry is addressed by the SHA-256 of its bytes, which is checked whenever it is read: a damaged one is fetched
    again. Once the cache is full it stays as it is, and the rest is read from the bucket every time. An epoch visits
    every face once in an order of its own, so what is let go is as likely to be needed next as what takes its place.
    Holding a share s of the data, a cache that keeps answers s of the reads, one that lets the oldest go only
    s + (1 - s) ln(1 - s): 50 % against 15 % where half fits. A disk that fails or is full stops the caching, with one
    warning, and not the training.

    Args:
        folder: is made.
        max_bytes: of all entries together, whichever process wrote them.
        keep_free: bytes of the disk to leave for others, such as checkpoints.
    """

    def __init__(self, folder: str | Path, max_bytes: int, keep_free: int = 0) -> None:
        self.folder, self.max_bytes, self.keep_free = Path(folder), max_bytes, keep_free
        self._full = self._failed = False
        with self._surviving("open"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._counter() as counter:
                _rewrite(counter, self._count())

    @classmethod
    def of_data(cls, digest: str, max_bytes: int, keep_free: int = 0) -> RangeCache:
        """The cache of a data set, below $LDBFR_CACHE or ~/.cache/ldbfr."""
        return cls(cache_folder() / "ranges" / digest[:16], max_bytes, keep_free)

    def get(self, sha256: bytes) -> bytes | None:
        """The bytes with this digest; None where they are not kept."""
        path = self._path(sha256)
        with self._surviving("read"):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return None
            if hashlib.sha256(data).digest() == sha256:
                return data
            log.warning("the cached %s is damaged and will be fetched again", path)
            self._drop(path)
        return None

    def put(self, sha256: bytes, data: bytes) -> None:
        """Keep bytes whose digest has been checked, where there is room."""
        if self._full or self._failed:
            return
        path = self._path(sha256)
        part = path.with_name(f"{uuid.uuid4().hex}{_PART_SUFFIX}")
        with self._surviving("write"):
            try:
                if self._reserve(path, part, len(data)):
                    with part.open("r+b") as file:
                        file.write(data)
                    self._settle(part, path, len(data))
            finally:
                part.unlink(missing_ok=True)  # its bytes stay counted until the cache is opened again

    def _path(self, sha256: bytes) -> Path:
        name = sha256.hex()
        return self.folder / name[:2] / name

    def _reserve(self, path: Path, part: Path, size: int) -> bool:
        """Make the file `part`, to be filled and renamed to `path`, unless that exists or finds no room.

        The file has its size before the lock is let go, so that a process that opens the cache counts it.
        """
        with self._counter() as counter:
            if path.exists():
                return False
            used = self._used(counter)
            if used + size > self.max_bytes or shutil.disk_usage(self.folder).free - size < self.keep_free:
                self._full = True
                log.info("the cache %s is full at %d bytes; what it lacks is read from its source", self.folder, used)
                return False
            path.parent.mkdir(exist_ok=True)
            with part.open("xb") as file:
                file.truncate(size)
            _rewrite(counter, used + size)
            return True

    def _settle(self, part: Path, path: Path, size: int) -> None:
        """Give a finished file its name, while nobody counts; or give its room back if another process was faster."""
        with self._counter() as counter:
            if path.exists():
                part.unlink()
                _rewrite(counter, max(0, self._used(counter) - size))
            else:
                os.replace(part, path)

    def _drop(self, path: Path) -> None:
        """Remove a damaged entry. Another process may have replaced it meanwhile: it is fetched once more then."""
        with self._counter() as counter:
            path.unlink(missing_ok=True)
            _rewrite(counter, self._count())  # nobody knows what it was counted with
        self._full = False

    def _used(self, counter: TextIO) -> int:
        """Bytes that are taken; counted anew where the number was lost."""
        text = counter.read()
        return int(text) if text.isdecimal() else self._count()

    def _count(self) -> int:
        """Bytes of all entries, finished or not, once what dead processes and machines left behind is removed."""
        used = 0
        for folder in filter(Path.is_dir, self.folder.iterdir()):
            for entry in os.scandir(folder):
                try:
                    status = entry.stat()
                    abandoned = entry.name.endswith(_PART_SUFFIX) and status.st_mtime < time.time() - _ABANDONED_S
                    if abandoned or not status.st_size:  # a power cut leaves empty files
                        os.unlink(entry)
                    else:
                        used += status.st_size
                except FileNotFoundError:  # given up meanwhile by the process that was writing it
                    continue
        return used

    @contextmanager
    def _counter(self) -> Iterator[TextIO]:
        """The file that holds the number of bytes in use, locked against other processes and threads."""
        with (self.folder / _COUNTER).open("a+", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file

    @contextmanager
    def _surviving(self, action: str) -> Iterator[None]:
        """A disk that fails turns the cache off; whoever reads goes on without it."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                log.warning(
                    "the cache %s is off: cannot %s it (%s). Reading goes on without it, but slower; free some space "
                    "or point LDBFR_CACHE at another disk",
                    self.folder,
                    action,
                    error.strerror or error,
                )
            self._failed = True


def _rewrite(counter: TextIO, used: int) -> None:
    counter.seek(0)
    counter.truncate()
    counter.write(str(used))
