"""Images in the rows of parquet files: their bytes, or the URIs of files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ldbfr.errors import InputError
from ldbfr.inputs.entries import Container, Entry, Stretch
from ldbfr.inputs.keys import printable
from ldbfr.inputs.objects import HEADER_BUFFER, ObjectFile, Stream
from ldbfr.tables import arrow

if TYPE_CHECKING:
    import pyarrow

URI_COLUMNS = ("uri", "url", "path", "file", "file_name", "filename", "image", "image_uri", "image_path")


@contextmanager
def open_parquet(container: Container, column: str | None) -> Iterator[tuple[pyarrow.parquet.ParquetFile, str, bool]]:
    """A parquet file, its column with images, and whether that holds bytes (else URIs).

    Pages are read as needed; a writer may have put a whole row group into one, which then has to fit into memory.

    Raises:
        InputError: it is not readable, or no column, or more than one, may be meant.
    """
    pa = arrow()
    raw = ObjectFile(container.uri, container.size)
    try:
        with pa.parquet.ParquetFile(io.BufferedReader(raw, HEADER_BUFFER), buffer_size=2**20, pre_buffer=False) as file:
            name, is_bytes = image_column(file.schema_arrow, column, printable(container.uri))
            yield file, name, is_bytes
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{printable(container.uri)} is not a readable parquet file ({error}); copy it again or leave it out"
        ) from error


def image_column(schema: pyarrow.Schema, wanted: str | None, name: str) -> tuple[str, bool]:
    """The column with images and whether it holds bytes: binary, or a struct with a binary `bytes`; else URIs.

    Without `wanted`, the only column of bytes, or else the only one of text with a usual name.
    """
    pa = arrow()

    def is_binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found: dict[str, tuple[str, bool]] = {}
    for field in schema:
        if is_binary(field.type):
            found[field.name] = (field.name, True)
        elif pa.types.is_struct(field.type) and any(f.name == "bytes" and is_binary(f.type) for f in field.type):
            found[field.name] = (f"{field.name}.bytes", True)
        elif pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            found[field.name] = (field.name, False)
    candidates = [column for column, is_bytes in found.values() if is_bytes] or [
        column for column, (_, is_bytes) in found.items() if not is_bytes and column.lower() in URI_COLUMNS
    ]
    if wanted is None and len(candidates) == 1:
        return next(value for value in found.values() if value[0] == candidates[0])
    if wanted not in found:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        given = "none given" if wanted is None else repr(wanted)
        raise InputError(
            f"{name}: --column {given}, expected the one with the images' bytes or URIs among {columns}; name it"
        )
    return found[wanted]


def list_parquet(container: Container, column: str | None) -> Iterator[Entry | Stretch]:
    """The rows of a parquet file; those with URIs become entries of the files that they name."""
    with open_parquet(container, column) as (file, name, is_bytes):
        row = 0
        for group in range(file.num_row_groups):
            if is_bytes:
                rows = file.metadata.row_group(group).num_rows
                yield Stretch(rows)
                for place in range(row, row + rows):
                    yield _row_entry(container, place)
                row += rows
                continue
            for batch in file.iter_batches(row_groups=[group], columns=[name]):
                for value in batch.column(0).to_pylist():
                    yield _uri_entry(container, row, value)
                    row += 1


def parquet_values(container: Container, column: str | None, first: int) -> Stream:
    """The images from row `first` on, by row."""
    with open_parquet(container, column) as (file, name, _):
        start = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start + rows > first:
                row = start
                for batch in file.iter_batches(batch_size=8, row_groups=[group], columns=[name]):
                    values = batch.column(0)
                    values = values.field("bytes") if arrow().types.is_struct(values.type) else values
                    for value in values:
                        if row >= first:
                            yield row, value.as_py
                        row += 1
            start += rows


def _row_entry(container: Container, row: int) -> Entry:
    return Entry(f"{printable(container.uri)}/{row}", f"{container.prefix}/{row:09d}", "parquet", container.uri, row)


def _uri_entry(container: Container, row: int, value: str | None) -> Entry:
    """The entry of a file that a row names, relative to the parquet file's folder if it is not absolute."""
    key = f"{container.prefix}/{row:09d}"
    if not value:
        name = f"{printable(container.uri)}/{row}"
        return Entry(name, key, "file", container.uri, refused="empty: the row names no file; fill it in")
    if "\0" in value:
        return Entry(
            printable(value), key, "file", container.uri, refused="bad name: it has a null character; correct it"
        )
    scheme = value.partition("://")[0].lower() if "://" in value else ""
    if scheme not in ("", "s3", "file"):
        reason = f"bad name: {scheme}:// cannot be read, expected a path or s3://bucket/key; copy it there"
        return Entry(printable(value), key, "file", container.uri, refused=reason)
    folder = container.uri.rpartition("/")[0]
    uri = value if "://" in value or value.startswith("/") or not folder else f"{folder}/{value}"
    return Entry(printable(uri), key, "file", uri)
