"""What is known of every input while a data set is prepared, as rows that wait in parquet files between the steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from ldbfr import storage
from ldbfr.data.dataset import arrow

if TYPE_CHECKING:
    import pyarrow

WORK_FOLDER = "_prepare"
"""Below the output, while the work is under way."""

Kind = Literal["file", "tar", "tar.gz", "zip", "parquet"]
Status = Literal["kept", "rejected", "duplicate"]
Row = TypeVar("Row", bound="Entry | Outcome")


@dataclass(frozen=True)
class Container:
    """Inputs that are listed together: the loose files of a source (kind "file"), or one archive."""

    kind: Kind
    uri: str
    prefix: str
    """Of the keys of all inputs in it."""
    size: int = 0
    """Bytes of the archive."""


class Entry(NamedTuple):
    """One input: what it is called, and where its bytes are."""

    name: str
    """What a person looks for: the file's URI, or archive/member."""
    key: str
    """In the data set; unique among the entries that are not refused."""
    kind: Kind
    uri: str
    """Of the file or the archive."""
    place: int = 0
    """tar: first byte of the image; zip: that of the member's header; tar.gz: number of the member; parquet: row."""
    span: int = 0
    """Bytes to read from there; 0 where only reading tells."""
    size: int = 0
    """Bytes of the image, once unpacked; 0 where only reading tells."""
    packing: int = 0
    """zip's compression method."""
    checksum: int = 0
    """zip's CRC-32 of the image."""
    refused: str | None = None
    """Why the listing alone rejects it, as a reason (see Outcome)."""


class Outcome(NamedTuple):
    """What became of one input."""

    name: str
    key: str
    status: Status
    reason: str | None = None
    """"cause: detail" for what is rejected; the counts at the end are by cause."""
    split: str | None = None
    shard: str | None = None
    offset: int | None = None
    size: int | None = None
    sha256: str | None = None
    fingerprint: bytes | None = None
    """See `ldbfr.data.prepare_duplicates`."""
    picture: bytes | None = None
    """Small PNG of what was left out, for the contact sheet."""


REPORT_COLUMNS = ("name", "status", "reason", "split", "key")
_INTEGERS = ("place", "span", "size", "packing", "checksum", "offset")
_BINARY = ("uri", "fingerprint", "picture")  # a URI may hold a file name that is not valid UTF-8


def schema(columns: Sequence[str]) -> pyarrow.Schema:
    """Arrow schema of columns of an Entry or an Outcome."""
    pa = arrow()
    kinds = {**dict.fromkeys(_INTEGERS, pa.int64()), **dict.fromkeys(_BINARY, pa.binary())}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in columns])


def write_rows(uri: str, rows: Sequence[Entry] | Sequence[Outcome], kind: type[Entry] | type[Outcome]) -> None:
    """Put rows into a parquet file, in one step."""
    output = BytesIO()
    arrow().parquet.write_table(to_table(rows, kind._fields), output, compression="zstd")
    storage.write_bytes(uri, output.getvalue())


def read_rows(uri: str, kind: type[Row]) -> list[Row]:
    """The rows of a parquet file that `write_rows` wrote."""
    table = read_columns(uri, kind._fields)
    return [kind(**{name: _from_arrow(name, value) for name, value in row.items()}) for row in table.to_pylist()]


def read_columns(uri: str, columns: Sequence[str]) -> pyarrow.Table:
    """Some columns of such a file."""
    pa = arrow()
    return pa.parquet.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=list(columns))


def to_table(rows: Iterable[Entry] | Iterable[Outcome], columns: Sequence[str]) -> pyarrow.Table:
    """Rows as an Arrow table of the given columns."""
    records = [{name: _to_arrow(name, getattr(row, name)) for name in columns} for row in rows]
    return arrow().Table.from_pylist(records, schema=schema(columns))


def _to_arrow(name: str, value: Any) -> Any:
    return value.encode(errors="surrogateescape") if name == "uri" else value


def _from_arrow(name: str, value: Any) -> Any:
    return value.decode(errors="surrogateescape") if name == "uri" else value
