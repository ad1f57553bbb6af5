"""Where images come from: folders, tar, tar.gz, zip and parquet files and lists of them, local or in a bucket.

All keys of a source start with its label: its last path component, or more of them where two sources would share it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path

from ldbfr import storage
from ldbfr.errors import ConfigError, InputError
from ldbfr.inputs.entries import Container, Entry, Other
from ldbfr.inputs.keys import ARCHIVES, archive_kind, input_at, is_image, quoted
from ldbfr.inputs.keys import path_of_key as path_of_key
from ldbfr.inputs.keys import printable as printable
from ldbfr.inputs.lists import SUFFIX, find_listed, is_list
from ldbfr.places import overlap, place


def label_sources(sources: Sequence[str]) -> dict[str, str]:
    """A label for every source: its last path component, or as many as tell it from the others.

    Raises:
        ConfigError: two sources are one place, or one lies in another: images would come twice.
    """
    for one, other in _overlapping(sources):
        raise ConfigError(
            f"--input {one} and {other}: one is the other or lies in it, so images would come twice; name each "
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


def _overlapping(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of which one lies in the other, or is it: in the order of their places they stand side by side."""
    ordered = sorted((place(source), source) for source in sources)
    for (outer, one), (inner, other) in pairwise(ordered):
        if inner[: len(outer)] == outer:
            yield one, other


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


def check_source(source: str, output: str | None = None) -> None:
    """Refuse a source that is missing or not of a known kind, and one that overlaps with the output, if that is given.

    Raises:
        ConfigError, InputError: naming the option, what was given and what to do.
    """
    if output is not None and overlap(source, output):
        raise ConfigError(
            f"--output {output} and --input {source}: one is the other or lies in it, so results would be read as "
            "input; name another output"
        )
    if storage.is_local(source):
        path = storage.local_path(source)
        if not path.exists():
            raise InputError(f"--input {source}: there is no such file or folder; check the path")
        if path.is_file() and not (is_image(path.name) or archive_kind(path.name) or is_list(path.name)):
            raise InputError(
                f"--input {source}: expected a folder, an image, an archive ({', '.join(ARCHIVES)}) or a list of URIs "
                f"({SUFFIX}), by its name"
            )


def find_inputs(
    source: str, label: str, start_after: str | None = None, exclude: Sequence[str] = ()
) -> Iterator[tuple[str, Entry | Container | Other]]:
    """Everything in a source, streamed: images, archives and other files, each with its position.

    A folder's come in the order of their names; a list's in its own.

    Args:
        source: a folder, an image, an archive, or a list.
        label: all keys start with it.
        start_after: a position, to go on from there.
        exclude: places whose objects are not inputs, though they lie in the source.

    Raises:
        InputError: nothing is there, or an archive and a folder of a bucket have one name.
        StorageError: the place cannot be listed.
    """
    listed = is_list(source)
    objects = storage.list_objects(source, None if listed else start_after)
    first = next(objects, None)
    itself = first is not None and (listed or start_after is None) and place(first.uri) == place(source)
    found: Iterator[tuple[str, Entry | Container | Other]]
    if first is not None and itself and listed:
        found = find_listed(source, first.size, label, int(start_after or 0))
    else:
        if listed and start_after is not None:  # a folder, in spite of its name
            objects = storage.list_objects(source, start_after)
        elif first is not None:
            objects = chain([first], objects)
        # A source that is one file itself is listed under its name, with which its label ends already.
        below = label.rpartition("/")[0] if itself else label
        found = _among_objects(_without(exclude, objects), below, start_after)
    empty = start_after is None
    for position, one in found:
        empty = False
        yield position, one
    if empty:
        raise InputError(f"--input {source}: nothing is there; check the place")


def _among_objects(
    objects: Iterator[storage.ObjectInfo], prefix: str, start_after: str | None
) -> Iterator[tuple[str, Entry | Container | Other]]:
    """The objects of a listing by their names; none may lie in a folder with the name of an archive."""
    archives = _Archives(start_after)
    for found in objects:
        archives.check(found)
        one = input_at(found.uri, prefix, found.key, found.size)
        if isinstance(one, Container):
            archives.seen.add(found.key)
        yield found.key, one


class _Archives:
    """The archives of a listing, which in a bucket may have the name of a folder: their members' keys could meet.

    Args:
        start_after: what lies before was seen by another; it is looked up.
    """

    def __init__(self, start_after: str | None) -> None:
        self.start_after = start_after or ""
        self.seen: set[str] = set()
        self.looked_up: set[str] = set()

    def check(self, found: storage.ObjectInfo) -> None:
        """InputError if the object lies in a folder with the name of an archive."""
        for folder in _parents(found.key):
            if folder in self.seen or (folder <= self.start_after and self._was_there(found, folder)):
                raise InputError(
                    f"{found.uri}: its folder has the name of an archive; rename the archive or the folder"
                )

    def _was_there(self, found: storage.ObjectInfo, folder: str) -> bool:
        if folder in self.looked_up or not archive_kind(folder) or storage.is_local(found.uri):
            return False
        self.looked_up.add(folder)
        return storage.exists(found.uri.removesuffix(found.key) + folder)


def _without(exclude: Sequence[str], objects: Iterator[storage.ObjectInfo]) -> Iterator[storage.ObjectInfo]:
    """The objects that are in none of these places; links are followed, so folders are looked at one by one."""
    left_out = [place(uri) for uri in exclude]
    folder: str | None = None
    names: set[str] = set()
    inside = False
    for found in objects:
        parent, _, name = found.uri.rpartition("/")
        if left_out and parent != folder:
            folder, where = parent, place(parent or "/")
            inside = any(where[: len(one)] == one for one in left_out)
            names = {one[-1] for one in left_out if one[:-1] == where}
        if not inside and name not in names:
            yield found


def _parents(key: str) -> Iterator[str]:
    """The folders that a key lies in."""
    for number, char in enumerate(key):
        if char == "/":
            yield key[:number]
