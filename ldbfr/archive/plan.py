"""Plan a run: list the input once, streaming, into parquet parts with one row per image."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from ldbfr import storage
from ldbfr.archive.naming import WORK_FOLDER, OutputFormat, is_image, output_key
from ldbfr.archive.rows import PLAN_COLUMNS, FaceRow, to_table
from ldbfr.errors import ConfigError, InputError
from ldbfr.images import IMAGE_SUFFIXES
from ldbfr.places import place
from ldbfr.seeds import derive_seed
from ldbfr.tables import parquet_bytes

ROWS_PER_PART = 10_000
SHEET_CANDIDATES = 64
"""More inputs are picked for the contact sheet than it shows, since some may fail."""


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    `picks` are the indexes of the inputs that may go onto the contact sheet, best first.
    """

    parts: tuple[str, ...]
    num_images: int
    num_skipped: int
    picks: tuple[int, ...]


def make_plan(input: str, output: str, *, format: OutputFormat, seed: int) -> Plan:
    """List `input` into parquet parts below `output`; memory is bounded by one part.

    The picks are those whose hash of seed and key is smallest, so that they are spread over the whole input.

    Raises:
        ConfigError: input and output lie in one another such that results could overwrite inputs.
        InputError: the input does not exist, or has no images.
        StorageError: the input cannot be listed, or the output not written.
    """
    own = check_places(input, output)
    remove_leftovers(output)
    folder = storage.join(output, WORK_FOLDER, "plan")
    parts: list[str] = []
    rows: list[FaceRow] = []
    picks: list[tuple[int, int]] = []  # a heap of (-hash, index): the largest hash goes first
    num_images = num_skipped = 0
    for found in storage.list_objects(input):
        if own and found.key.startswith(own):
            continue
        if not is_image(found.key):
            num_skipped += 1
            continue
        row = plan_row(num_images, found, format)
        if row.status == "planned":
            entry = (-derive_seed("contact sheet", seed, row.key), row.index)
            (heapq.heappush if len(picks) < SHEET_CANDIDATES else heapq.heappushpop)(picks, entry)
        rows.append(row)
        num_images += 1
        if len(rows) == ROWS_PER_PART:
            parts.append(write_part(folder, len(parts), rows))
            rows = []
    if not num_images:
        others = f" ({num_skipped:,} files that are no images)" if num_skipped else ""
        raise InputError(f"no images in {input}{others}: expected files named {', '.join(IMAGE_SUFFIXES)}")
    if rows:
        parts.append(write_part(folder, len(parts), rows))
    return Plan(tuple(parts), num_images, num_skipped, tuple(index for _, index in sorted(picks, reverse=True)))


def plan_row(index: int, found: storage.ObjectInfo, format: OutputFormat) -> FaceRow:
    """The row of one input; failed from the start if its name is no text, and so cannot be written down."""
    try:
        found.key.encode()
    except UnicodeEncodeError:
        key, uri = printable(found.key), printable(found.uri)
        reason = f"{key}: the name is not valid UTF-8; rename the file"
        return FaceRow(index, key, uri, found.size, output_key(key, format), "failed", reason)
    return FaceRow(index, found.key, found.uri, found.size, output_key(found.key, format))


def printable(name: str) -> str:
    """The name with what is not valid UTF-8 as escapes."""
    return name.encode(errors="backslashreplace").decode()


def write_part(folder: str, number: int, rows: list[FaceRow]) -> str:
    """Write one part of the plan; its URI."""
    uri = storage.join(folder, f"{number:06d}.parquet")
    storage.write_bytes(uri, parquet_bytes(to_table(rows, PLAN_COLUMNS)))
    return uri


def check_places(input: str, output: str) -> str | None:
    """Refuse places where results could overwrite inputs.

    Returns:
        The prefix of keys below `input` that are the output's own; None where the output lies elsewhere.

    Raises:
        ConfigError: the same place, or the input inside the output.
        InputError: a local input that does not exist.
    """
    if storage.is_local(input) and not storage.local_path(input).exists():
        raise InputError(f"--input {input}: there is no such folder; check the path")
    if storage.is_local(input) != storage.is_local(output):
        return None
    source, target = place(input), place(output)
    if source == target:
        raise ConfigError(f"--output {output} is the input: results would overwrite it; name another folder")
    if source[: len(target)] == target:
        raise ConfigError(f"--input {input} lies inside --output {output}: results could overwrite it; name another")
    return "/".join(target[len(source) :]) + "/" if target[: len(source)] == source else None


def remove_leftovers(output: str) -> None:
    """Remove what an earlier run left in the work folder; results and the manifest stay."""
    for uri in list(work_files(output)):
        storage.delete(uri)


def work_files(output: str) -> Iterator[str]:
    """The plan's and the manifest's parts."""
    for name in ("plan", "manifest"):
        for found in storage.list_objects(storage.join(output, WORK_FOLDER, name)):
            yield found.uri
