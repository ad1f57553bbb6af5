"""Where images come from: folders, tar, tar.gz, zip and parquet files, local or in a bucket; and their keys.

A key is `label/folders/name-suffix`, or `label/archive.tar/folders/name-suffix` for a member of an archive: a function
of the input's own path alone, and a different one for every path. The label is the source's last path component (more
of them where two sources would share it). Shards want keys in printable characters without a dot in the last part, so
the dot before the suffix becomes a hyphen, and every other character that they cannot hold becomes %XX, as in a URL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

from ldbfr import storage
from ldbfr.errors import ConfigError, InputError
from ldbfr.images import IMAGE_SUFFIXES
from ldbfr.inputs.entries import Container, Entry, Kind
from ldbfr.places import overlap, place

ARCHIVES: dict[str, Kind] = {
    ".tar": "tar",
    ".tar.gz": "tar.gz",
    ".tgz": "tar.gz",
    ".zip": "zip",
    ".parquet": "parquet",
}
BAD_NAME = "bad name: expected a path without empty, '.' or '..' parts; rename the file"


def is_image(name: str) -> bool:
    """Whether a name's suffix is that of an image that can be read."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def archive_kind(name: str) -> Kind | None:
    """What kind of archive a name's suffix says; None if none."""
    return next((kind for suffix, kind in ARCHIVES.items() if name.lower().endswith(suffix)), None)


def image_key(prefix: str, path: str) -> str | None:
    """The key of the image `path` ("folders/name.suffix") below `prefix`; None if a folder is empty, '.' or '..'."""
    *folders, last = path.split("/")
    stem, _, suffix = last.rpartition(".")
    if any(part in ("", ".", "..") for part in folders):
        return None
    parts = [*map(quoted, folders), f"{quoted(stem).replace('.', '%2E')}-{suffix}"]
    return "/".join([prefix, *parts] if prefix else parts)


def quoted(part: str) -> str:
    """A part of a path in printable characters: others, the backslash and % itself become %XX of their UTF-8 bytes."""
    return "".join(
        char if char.isprintable() and char not in "%\\" else quote(char, safe="", errors="surrogateescape")
        for char in part
    )


def printable(name: str) -> str:
    """A name with what is not valid UTF-8 as escapes, for people."""
    return name.encode(errors="backslashreplace").decode()


def label_sources(sources: Sequence[str]) -> dict[str, str]:
    """A label for every source: its last path component, or as many as tell it from the others.

    Raises:
        ConfigError: two sources are one place, or one lies in another: images would come twice.
    """
    for number, one in enumerate(sources):
        for other in sources[:number]:
            if overlap(one, other):
                raise ConfigError(
                    f"--input {other} and {one}: one is the other or lies in it, so images would come twice; name each "
                    "place once"
                )
    paths = {source: _path_as_given(source) for source in sources}
    lengths = dict.fromkeys(sources, 1)
    while clash := _clashing({source: paths[source][-lengths[source] :] for source in sources}):
        longer = [source for source in clash if lengths[source] < len(paths[source])]
        if not longer:
            raise ConfigError(f"--input {', '.join(clash)}: their keys would be the same; rename one of them")
        for source in longer:
            lengths[source] += 1
    return {source: "/".join(map(quoted, paths[source][-lengths[source] :])) for source in sources}


def _clashing(labels: dict[str, tuple[str, ...]]) -> list[str]:
    """Sources whose label is that of another, or begins or continues it."""
    ordered = sorted(labels, key=lambda source: labels[source])  # what continues a label comes right after it
    clashing: list[str] = []
    for one, other in pairwise(ordered):
        if labels[other][: len(labels[one])] == labels[one]:
            clashing += [one, other]
    return list(dict.fromkeys(clashing))


def _path_as_given(uri: str) -> tuple[str, ...]:
    """The parts of an absolute location, links not followed: the name that the user gave stays."""
    if storage.is_local(uri):
        return ("root", *Path(os.path.abspath(storage.local_path(uri))).parts[1:])
    return ("s3", *place(uri)[1:])


def check_source(source: str, output: str) -> None:
    """Refuse a source that is missing or not of a known kind, and one that overlaps with the output.

    Raises:
        ConfigError, InputError: naming the option, what was given and what to do.
    """
    if overlap(source, output):
        raise ConfigError(
            f"--output {output} and --input {source}: one is the other or lies in it, so results would be read as "
            "input; name another output"
        )
    if storage.is_local(source):
        path = storage.local_path(source)
        if not path.exists():
            raise InputError(f"--input {source}: there is no such file or folder; check the path")
        if path.is_file() and not is_image(path.name) and not archive_kind(path.name):
            raise InputError(
                f"--input {source}: expected a folder, an image or an archive ({', '.join(ARCHIVES)}), by its name"
            )


def find_inputs(source: str, label: str) -> Iterator[Entry | Container | None]:
    """Everything in a source, streamed in the order of its names: images, archives, None for any other file.

    Raises:
        InputError: nothing is there, or an archive and a folder of a bucket have one name.
        StorageError: the place cannot be listed.
    """
    archives: set[str] = set()
    empty = True
    for found in storage.list_objects(source):
        # A source that is one file itself is listed under its name, with which its label ends already.
        itself = empty and place(found.uri) == place(source)
        prefix = label.rpartition("/")[0] if itself else label
        empty = False
        if archives and not archives.isdisjoint(_parents(found.key)):
            raise InputError(f"{found.uri}: its folder has the name of an archive; rename the archive or the folder")
        if kind := archive_kind(found.key):
            archives.add(found.key)
            parts = [*map(quoted, found.key.split("/"))]
            yield Container(kind, found.uri, "/".join([prefix, *parts] if prefix else parts), found.size)
        elif is_image(found.key):
            key = image_key(prefix, found.key)
            refused = None if key else BAD_NAME
            name = printable(found.uri)
            yield Entry(name, key or name, "file", found.uri, span=found.size, size=found.size, refused=refused)
        else:
            yield None
    if empty:
        raise InputError(f"--input {source}: nothing is there; check the place")


def _parents(key: str) -> Iterator[str]:
    """The folders that a key lies in."""
    for number, char in enumerate(key):
        if char == "/":
            yield key[:number]
