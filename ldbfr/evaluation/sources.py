"""The high-quality faces that a test set is made from: folders, tar and zip files, here or in a bucket, by name."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from ldbfr.errors import InputError, LDBFRError
from ldbfr.evaluation.digests import named_digest
from ldbfr.evaluation.pairing import listed
from ldbfr.inputs.containers import list_archive
from ldbfr.inputs.entries import Container, Entry
from ldbfr.inputs.keys import path_of_key
from ldbfr.inputs.reading import Inputs
from ldbfr.inputs.sources import check_source, find_inputs, label_sources
from ldbfr.progress import Progress, Tally

log = logging.getLogger(__name__)

Face = tuple[str, Container, Entry]
"""Name in the test set, what it was listed in, where its bytes are."""


def list_faces(sources: Sequence[str], limit: int | None = None) -> list[Face]:
    """The first images of the sources, each source's in the order of its paths: an index means the same everywhere.

    A name is the path below the source without its suffix; with several sources the source's label stands before it.

    Raises:
        InputError: a source is missing, empty or damaged, is of a kind that cannot be read in the names' order, or two
            faces have one name.
        ConfigError: two sources overlap.
        StorageError: a source cannot be listed.
    """
    labels = label_sources(sources)
    faces: list[Face] = []
    for source in sources:
        check_source(source)
        found = sorted(images_in(source, labels[source]), key=lambda one: path_of_key(one[1].key))
        prefix = "" if len(sources) > 1 else f"{labels[source]}/"
        faces += [(name_of(entry.key, prefix), container, entry) for container, entry in found]
    faces = faces[:limit]
    if not faces:
        raise InputError(f"no image in {', '.join(sources)}; check the places")
    counts = Counter(name for name, _, _ in faces)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise InputError(f"{len(twice):,} names come twice, with different suffixes: {listed(twice)}; rename the files")
    return faces


def images_in(source: str, label: str) -> Iterator[tuple[Container, Entry]]:
    """Every image of a source, those in its archives too.

    Raises:
        InputError, StorageError: as `list_faces`.
    """
    loose = Container("file", source, label)
    for _, found in find_inputs(source, label):
        if isinstance(found, Entry):
            yield loose, checked(found)
        elif isinstance(found, Container):
            if found.kind not in ("tar", "zip"):
                raise InputError(
                    f"{found.uri}: a {found.kind} file cannot be read in the order of its names; unpack it, or give a "
                    "folder, a .tar or a .zip"
                )
            yield from ((found, checked(entry)) for entry in list_archive(found) if isinstance(entry, Entry))


def checked(entry: Entry) -> Entry:
    """InputError for what the listing refuses: a test set leaves nothing out."""
    if entry.refused is not None:
        raise InputError(f"{entry.name}: {entry.refused}")
    return entry


def name_of(key: str, prefix: str) -> str:
    """A face's name from its key ("label/folder/000012-jpg")."""
    short = key.removeprefix(prefix)
    folders, slash, last = short.rpartition("/")
    return folders + slash + (last.rpartition("-")[0] or last)


def read_faces(faces: Sequence[Face]) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of every face, in order.

    Raises:
        InputError, StorageError: the first that cannot be read.
    """
    for container, group in groupby(faces, key=lambda face: face[1]):
        of_container = list(group)
        for (name, _, _), data in zip(
            of_container, Inputs(container).read([entry for _, _, entry in of_container]), strict=True
        ):
            if isinstance(data, LDBFRError):
                raise data
            yield name, data


def faces_digest(faces: Sequence[Face]) -> str:
    """One SHA-256 of the faces' names and of all their bytes; where they lie, in folders or archives, does not matter.

    Names with sizes would not tell faces that were made again from the same ones. Reading and hashing the bytes costs a
    millisecond a megabyte from a disk; making the images of one face takes a hundred times that.

    Raises:
        InputError, StorageError: the first that cannot be read.
    """
    log.info("reading %s faces, to know them again", f"{len(faces):,}")
    tally = Tally(len(faces))
    progress = Progress(tally)

    def hashed() -> Iterator[tuple[str, str]]:
        for name, data in read_faces(faces):
            yield name, hashlib.sha256(data).hexdigest()
            tally.restored += 1
            progress.update()

    return named_digest(hashed())
