"""Rows as named tuples <-> Arrow tables <-> parquet files.

A row's class is its schema: int, float, bool and bytes fields are what they say, everything else is text. A field named
`uri` is kept as bytes, for a file's name need not be valid UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args, get_type_hints

from ldbfr import storage
from ldbfr.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

RowKind = type[NamedTuple]
Row = TypeVar("Row", bound=tuple[Any, ...])

_RAW = "uri"


def arrow() -> Any:
    """The pyarrow module; ConfigError with the remedy where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("tables of images need pyarrow, which is not here; pip install 'ldbfr[data]'") from error
    return pyarrow


def schema_of(kind: Any, columns: Sequence[str] | None = None) -> pyarrow.Schema:
    """Arrow schema of a row's class, or of some of its columns."""
    pa = arrow()
    kinds = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), bytes: pa.large_binary()}
    hints = get_type_hints(kind)

    def column(name: str) -> Any:
        parts = [part for part in (get_args(hints[name]) or (hints[name],)) if part is not type(None)]
        return pa.binary() if name == _RAW else kinds.get(parts[0], pa.string())

    return pa.schema([(name, column(name)) for name in columns or kind._fields])


def to_table(rows: Iterable[tuple[Any, ...]], kind: Any, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """Rows as an Arrow table, whole or some of their columns."""
    names = columns or kind._fields
    taken = list(zip(*rows, strict=True)) or [() for _ in kind._fields]
    schema = schema_of(kind, names)
    arrays = [_to_arrow(taken[kind._fields.index(name)], name, schema.field(name).type) for name in names]
    return arrow().Table.from_arrays(arrays, schema=schema)


def from_table(table: pyarrow.Table, kind: type[Row]) -> list[Row]:
    """The inverse of `to_table`; a column that is not there has its default."""
    names = [name for name in kind._fields if name in table.column_names]  # type: ignore[attr-defined]
    values = [_from_arrow(table[name].to_pylist(), name) for name in names]
    return [kind(**dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)]


def parquet_bytes(table: pyarrow.Table) -> bytes:
    """The table as one parquet file."""
    output = BytesIO()
    arrow().parquet.write_table(table, output, compression="zstd")
    return output.getvalue()


def write_rows(uri: str, rows: Iterable[tuple[Any, ...]], kind: Any) -> None:
    """Put rows into a parquet file, in one step."""
    storage.write_bytes(uri, parquet_bytes(to_table(rows, kind)))


def read_rows(uri: str, kind: type[Row]) -> list[Row]:
    """The rows of a parquet file that `write_rows` wrote."""
    return from_table(read_columns(uri), kind)


def read_columns(uri: str, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """Some columns of a parquet file, or all."""
    pa = arrow()
    return pa.parquet.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=columns and list(columns))


def _to_arrow(values: Sequence[Any], name: str, kind: Any) -> Any:
    if name == _RAW:
        values = [value.encode(errors="surrogateescape") for value in values]
    return arrow().array(values, type=kind)


def _from_arrow(values: list[Any], name: str) -> list[Any]:
    return [value.decode(errors="surrogateescape") for value in values] if name == _RAW else values
