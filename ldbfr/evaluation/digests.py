"""What files hold, as one digest: so that files of the same names are not taken for the same files."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ldbfr.inputs.objects import STREAM_BUFFER, ObjectFile
from ldbfr.progress import Progress, Tally
from ldbfr.storage import ObjectInfo

log = logging.getLogger(__name__)

READERS = 8
"""Files that are read at once, each in pieces of `STREAM_BUFFER`."""
TOGETHER = 1_024
"""Files whose digests are asked for before the next are."""


def named_digest(named: Iterable[tuple[str, str]]) -> str:
    """SHA-256 of names in order, each with the SHA-256 of what it stands for (of two files, one after the other)."""
    digest = hashlib.sha256()
    for name, content in named:
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def file_digests(place: str, files: Sequence[ObjectInfo]) -> Iterator[str]:
    """SHA-256 of each file's bytes in hexadecimal, in order; every few seconds a log line says how far it is.

    Args:
        place: of the files, for the log.
        files: as they were listed.

    Raises:
        StorageError: one cannot be read, or has become shorter since it was listed.
    """
    log.info("%s: reading %s files, to know them again", place, f"{len(files):,}")
    tally = Tally(len(files))
    progress = Progress(tally)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), TOGETHER):
            for digest in pool.map(file_digest, files[start : start + TOGETHER]):
                tally.restored += 1
                progress.update()
                yield digest


def file_digest(file: ObjectInfo) -> str:
    """SHA-256 of a file's bytes in hexadecimal; of a large one no more than a piece is held.

    Raises:
        StorageError: it cannot be read.
    """
    with io.BufferedReader(ObjectFile(file.uri, file.size), STREAM_BUFFER) as pieces:
        return hashlib.file_digest(pieces, "sha256").hexdigest()
