"""Whether a bucket or folder allows what runs do there, tried with an object of our own that goes again."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from ldbfr import storage
from ldbfr.doctor.findings import Finding, ok, problem
from ldbfr.errors import StorageError
from ldbfr.places import absolute

FIRST, SECOND = b"ldbfr doctor: " + bytes(range(50)), b"written over"
PATIENCE_S = 10.0
"""For an answer; a run waits longer and tries again."""


@dataclass(frozen=True)
class Right:
    """One thing that runs do.

    Args:
        name: of it.
        action: of S3's policies, that allows it.
        use: what runs do it for.
        attempt: does it on an object; what is wrong with the outcome, or "".
    """

    name: str
    action: str
    use: str
    attempt: Callable[[str], str]


def create(uri: str) -> str:
    """Create an object, and be refused the second time."""
    if not storage.create_bytes(uri, FIRST):
        return "a new object was said to be there already"
    if storage.create_bytes(uri, SECOND):
        return "an object that was there was created again: the server ignores If-None-Match"
    return ""


def read(uri: str) -> str:
    """Read what was written."""
    return "" if storage.read_bytes(uri) == FIRST else "other bytes came back than were written"


def read_range(uri: str) -> str:
    """Read a part of it."""
    return "" if storage.read_range(uri, 20, 8) == FIRST[20:28] else "other bytes came back than were asked for"


def look(uri: str) -> str:
    """Find it in a listing."""
    folder, _, key = uri.rpartition("/")
    found = [item.key for item in storage.list_objects(folder)]
    return "" if found == [key] else f"the listing has {found}, expected what was just written, {key}"


def overwrite(uri: str) -> str:
    """Replace it."""
    storage.write_bytes(uri, SECOND)
    return "" if storage.read_bytes(uri) == SECOND else "the old bytes came back after it was replaced"


def delete(uri: str) -> str:
    """Remove it."""
    storage.delete(uri)
    return "it is still there" if storage.exists(uri) else ""


RIGHTS = (
    Right("create once", "s3:PutObject", "the lock of a run", create),
    Right("read", "s3:GetObject", "inputs, checkpoints", read),
    Right("read a range", "s3:GetObject", "shards and archives", read_range),
    Right("list", "s3:ListBucket", "inputs, finding out what is done", look),
    Right("overwrite", "s3:PutObject", "the lock's renewal, results done again", overwrite),
    Right("delete", "s3:DeleteObject", "old checkpoints, records, the lock", delete),
)


def check_place(uri: str) -> Iterator[Finding]:
    """What runs need below a bucket's prefix or a folder, tried one after the other."""
    root = absolute(uri)
    if storage.is_local(root) and not storage.local_path(root).is_dir():
        yield problem(uri, "there is no such folder", "make it, and let every machine of a cluster see it")
        return
    folder = storage.join(root, f"_ldbfr-doctor-{uuid.uuid4().hex[:8]}")
    probe = storage.join(folder, "probe")
    with storage.impatient(PATIENCE_S):
        yield from attempts(uri, probe)
        clear(folder, probe)


def check_readable(uri: str) -> Iterator[Finding]:
    """What runs need where their inputs lie: a listing, and a part of the first object of it."""
    listing, reading = f"{uri}: list", f"{uri}: read a range"
    with storage.impatient(PATIENCE_S):
        try:
            first = next(storage.list_objects(absolute(uri)), None)
        except StorageError as error:
            yield problem(listing, str(error), "on S3, s3:ListBucket allows it")
            return
        if first is None:
            yield problem(listing, "nothing is there", "check the name; a bucket cannot tell an empty place from none")
            return
        yield ok(listing, f"works, {first.key} comes first")
        try:
            storage.read_range(first.uri, 0, min(first.size, len(FIRST)))
        except StorageError as error:
            yield problem(reading, str(error), "on S3, s3:GetObject allows it")
        else:
            yield ok(reading, "works")


def attempts(uri: str, probe: str) -> Iterator[Finding]:
    """A finding for each right; none after the first that fails for want of an answer at all."""
    made = True
    for right in RIGHTS:
        name = f"{uri}: {right.name}"
        if not made and right.name != "list":
            continue  # nothing was created that it could be tried on
        try:
            wrong = right.attempt(probe)
        except StorageError as error:
            wrong = str(error)
        if not made and "the listing has" in wrong:
            wrong = ""  # it could be listed, and there is nothing
        if wrong:
            yield problem(name, wrong, f"needed for {right.use}; on S3, {right.action} allows it")
        else:
            yield ok(name, f"works ({right.use})")
        made = made and not (wrong and right.name == "create once")


def clear(folder: str, probe: str) -> None:
    """Leave nothing behind, as far as that is allowed."""
    with suppress(StorageError):
        storage.delete(probe)
    if storage.is_local(folder):
        with suppress(OSError):
            storage.local_path(folder).rmdir()
