"""Names and keys: what a name says of a file, its key among all inputs, and the way back.

A key is `label/folders/name-suffix`, or `label/archive.tar/folders/name-suffix` for a member of an archive: a function
of the input's own path alone, and a different one for every path. Shards want keys in printable characters without a
dot in the last part, so the dot before the suffix becomes a hyphen, and every other character that they cannot hold
becomes %XX, as in a URL.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from ldbfr.images import IMAGE_SUFFIXES
from ldbfr.inputs.entries import Container, Entry, Kind, Other

ARCHIVES: dict[str, Kind] = {
    ".tar": "tar",
    ".tar.gz": "tar.gz",
    ".tgz": "tar.gz",
    ".zip": "zip",
    ".parquet": "parquet",
}
BAD_NAME = "bad name: expected a path without empty, '.' or '..' parts; rename the file"

_ARCHIVE_SUFFIXES = tuple(ARCHIVES)
_UNUSABLE = frozenset(("", ".", ".."))
_DECODED = re.compile("%(?:25(?![0-9A-Fa-f]{2})|5C|2E|2D)")
"""The escapes of what can be printed; a % only where it could not be read as the start of an escape."""


def is_image(name: str) -> bool:
    """Whether a name's suffix is that of an image that can be read."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def archive_kind(name: str) -> Kind | None:
    """What kind of archive a name's suffix says; None if none."""
    lower = name.lower()
    if not lower.endswith(_ARCHIVE_SUFFIXES):
        return None
    return next(kind for suffix, kind in ARCHIVES.items() if lower.endswith(suffix))


def image_key(prefix: str, path: str) -> str | None:
    """The key of `path` ("folders/name.suffix") below `prefix`; None if a part of it is empty, '.' or '..'.

    A name without a dot gets no hyphen: its own become %2D.
    """
    *folders, last = path.split("/")
    if not _UNUSABLE.isdisjoint(folders) or last in _UNUSABLE:
        return None
    stem, dot, suffix = last.rpartition(".")
    parts = [*map(quoted, folders), quoted(suffix).replace("-", "%2D")]
    if dot:
        parts[-1] = f"{quoted(stem).replace('.', '%2E')}-{parts[-1]}"
    return "/".join([prefix, *parts] if prefix else parts)


def archive_prefix(prefix: str, path: str) -> str | None:
    """Of the keys of all members of the archive `path` below `prefix`; None as for `image_key`."""
    parts = path.split("/")
    if not _UNUSABLE.isdisjoint(parts):
        return None
    return "/".join([*([prefix] if prefix else ()), *map(quoted, parts)])


def quoted(part: str) -> str:
    """A part of a path in printable characters: others, the backslash and % itself become %XX of their UTF-8 bytes."""
    if part.isprintable() and "%" not in part and "\\" not in part:
        return part
    return "".join(
        char if char.isprintable() and char not in "%\\" else quote(char, safe="", errors="surrogateescape")
        for char in part
    )


def path_of_key(key: str) -> str:
    """The path as it was named, from its key: another one for every key.

    The last hyphen of the last part is the dot again, and %XX the character, except for what cannot be printed. So that
    such an escape is not taken for a name that has it literally, a % before two hexadecimal digits stays %25.
    """
    folders, slash, last = key.rpartition("/")
    stem, hyphen, suffix = last.rpartition("-")
    path = f"{folders}{slash}{stem}{'.' if hyphen else ''}{suffix}"
    return _DECODED.sub(lambda escape: chr(int(escape[0][1:], 16)), path) if "%" in path else path


def printable(name: str) -> str:
    """A name with what is not valid UTF-8 as escapes, for people."""
    return name if name.isascii() else name.encode(errors="backslashreplace").decode()


def input_at(uri: str, prefix: str, path: str, size: int = 0) -> Entry | Container | Other:
    """What the file `path` below `prefix` is, by its name."""
    name = printable(uri)
    if is_image(path):
        key = image_key(prefix, path)
        refused = None if key else BAD_NAME
        return Entry(name, key or name, "file", uri, span=size, size=size, refused=refused)
    if kind := archive_kind(path):
        below = archive_prefix(prefix, path)
        return Entry(name, name, "file", uri, refused=BAD_NAME) if below is None else Container(kind, uri, below, size)
    return Other(name, image_key(prefix, path) or name)
