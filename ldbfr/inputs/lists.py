"""A text file that names inputs: a URI or path a line, in UTF-8; blank lines and those that start with # do not count.

A relative path starts at the list's own folder. The key of what a line names is `label/bucket/path` for an object, and
`label/_local/path` for a file on this machine: no bucket's name starts with an underscore, so they cannot meet. A place
that is named twice comes twice, with one key: a list of any length is read without being held.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from functools import lru_cache

from ldbfr import storage
from ldbfr.errors import InputError, StorageError
from ldbfr.inputs.entries import Container, Entry, Other
from ldbfr.inputs.keys import input_at, printable
from ldbfr.inputs.objects import ObjectFile
from ldbfr.places import absolute

SUFFIX = ".txt"
LONGEST_LINE = 2**16
"""Bytes: far more than any path has, and a bound on what is held of a file that is no list."""

_BUFFER = 2**20
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]+")


def is_list(uri: str) -> bool:
    """Whether a source's name says that it is a list."""
    return uri.lower().endswith(SUFFIX)


def find_listed(uri: str, size: int, label: str, taken: int = 0) -> Iterator[tuple[str, Entry | Container | Other]]:
    """What the list names, in its order, each with the number of its line; sizes are not known.

    Args:
        uri: of the list.
        size: its bytes.
        label: all keys start with it.
        taken: lines at the start to pass over.

    Raises:
        InputError: a line is too long for a path.
        StorageError: the list cannot be read.
    """
    folder = absolute(uri).rpartition("/")[0]
    for number, line in lines(uri, size):
        if number > taken and line.strip() and not line.startswith("#"):
            yield str(number), _named(line, folder, label)


def lines(uri: str, size: int) -> Iterator[tuple[int, str]]:
    """The lines of a text object with their numbers, from 1 on, without their ends."""
    with io.BufferedReader(ObjectFile(uri, size), _BUFFER) as file:
        number = 0
        while data := file.readline(LONGEST_LINE):
            number += 1
            if len(data) == LONGEST_LINE and not data.endswith(b"\n"):
                raise InputError(
                    f"{printable(uri)}, line {number:,}: over {LONGEST_LINE:,} bytes, expected a URI or path a line; "
                    "name a list"
                )
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")  # some editors mark UTF-8 so
            yield number, data.removesuffix(b"\n").removesuffix(b"\r").decode(errors="surrogateescape")


def _named(line: str, folder: str, label: str) -> Entry | Container | Other:
    """What a line names."""
    try:
        uri, path = located(line, folder)
    except InputError as error:
        return Entry(printable(line), printable(line), "file", line, refused=f"bad name: {error}")
    return input_at(uri, label, path)


def located(line: str, folder: str) -> tuple[str, str]:
    """The URI that a line of a list in `folder` means, and its path below the list's label.

    Raises:
        InputError: nothing can be there.
    """
    if "\0" in line:
        raise InputError("it has a null character, which no file's name has; write the list anew")
    match = _SCHEME.match(line)
    scheme = match[1].lower() if match else ""
    if scheme == "s3":
        return _in_bucket(line[len("s3://") :])
    if scheme == "file":
        try:
            return _on_disk(os.fspath(storage.local_path(line)))
        except StorageError as error:
            raise InputError("expected file:///path on this machine; copy it here first") from error
    if scheme:
        raise InputError(
            f"{scheme}:// cannot be read, expected a path, file:///path or s3://bucket/key; copy it to such a place"
        )
    if line.startswith("/") or storage.is_local(folder):
        return _on_disk(line if line.startswith("/") else f"{folder}/{line}")
    return _in_bucket(os.path.normpath(f"{folder[len('s3://') :]}/{line}"))


def _on_disk(path: str) -> tuple[str, str]:
    uri = "/" + os.path.normpath(path).lstrip("/")  # of two slashes at the start, normpath keeps both
    return uri, "_local" + uri


def _in_bucket(path: str) -> tuple[str, str]:
    if not _is_bucket(path.partition("/")[0]):
        raise InputError(f"{path.partition('/')[0]!r} is no bucket's name, expected s3://bucket/key; correct the list")
    if not path.isascii():
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise InputError("it is not UTF-8, as all keys of a bucket are; save the list as UTF-8") from error
    return f"s3://{path}", path


@lru_cache(maxsize=64)
def _is_bucket(name: str) -> bool:
    return _BUCKET.fullmatch(name) is not None
