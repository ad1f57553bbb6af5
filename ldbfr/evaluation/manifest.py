"""What is written about a test set: testset.json, building.json, and the rows of the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import Field, ValidationError

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.evaluation.results import Record

FORMAT = 1
TESTSET_FILE, BUILDING_FILE, MANIFEST_FILE = "testset.json", "building.json", "manifest.jsonl"


class Digests(Record):
    """SHA-256 in hexadecimal of the low-quality image and of its original."""

    lq: str
    hq: str


class ManifestRow(Record):
    """A row of the manifest. `lq` and `hq` are paths within the set."""

    name: str
    split: str
    lq: str
    hq: str
    side: int
    degradation: dict[str, Any]
    """`Degradation.from_json` reads it."""
    sha256: Digests
    """Of the files."""
    pixels_sha256: Digests
    """Of the pixels, see `ldbfr.evaluation.reading.pixels_digest`."""


class Description(Record):
    """What testset.json says; building.json has the same without counts and digest."""

    format: int = FORMAT
    name: str
    settings: dict[str, Any]
    versions: dict[str, str]
    counts: dict[str, int] = Field(default_factory=dict)
    digest: str = ""


def read_description(uri: str) -> Description:
    """testset.json or building.json.

    Raises:
        InputError: it is damaged or of another format.
        StorageError: it cannot be read.
    """
    try:
        found = Description.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        raise InputError(f"{uri} is damaged, or of another version of ldbfr ({error}); build the set again") from error
    if found.format != FORMAT:
        raise InputError(f"{uri} is of format {found.format}, expected {FORMAT}; use the version that wrote it")
    return found


def differences_of(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What two settings differ in, one text for each."""
    names = [*wanted, *(name for name in found if name not in wanted)]
    return [
        f"{name} {found.get(name)!r} there, {wanted.get(name)!r} wanted"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def row_lines(rows: Iterable[ManifestRow]) -> bytes:
    """A line of JSON for every row."""
    return "".join(row.model_dump_json() + "\n" for row in rows).encode()


def read_rows(uri: str) -> list[ManifestRow]:
    """Rows of a manifest or a part of one.

    Raises:
        InputError: it is damaged.
        StorageError: it cannot be read.
    """
    try:
        return [ManifestRow.model_validate_json(line) for line in storage.read_bytes(uri).splitlines()]
    except ValidationError as error:
        raise InputError(f"{uri} is damaged ({error}); build the test set again") from error


def rows_digest(rows: Iterable[ManifestRow]) -> str:
    """One SHA-256 for a set: names, draws and pixels, in order."""
    digest = hashlib.sha256()
    for row in rows:
        line = [row.name, row.degradation, row.pixels_sha256.lq, row.pixels_sha256.hq]
        digest.update(json.dumps(line, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def dumped(description: Description) -> bytes:
    """As a file."""
    return (description.model_dump_json(indent=1) + "\n").encode()


def counts_text(description: Description) -> str:
    """How many images of each split."""
    return ", ".join(f"{count:,} {split}" for split, count in description.counts.items())
