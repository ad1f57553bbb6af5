"""One input on its way through a run, as a row that travels between processes in an Arrow table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from ldbfr.tables import arrow

if TYPE_CHECKING:
    import pyarrow

Status = Literal["planned", "read", "modelled", "restored", "failed"]


@dataclass(frozen=True)
class FaceRow:
    """What is known about an input so far; a step fills in its part.

    `pixels` and `first_stage_pixels` are (S, S, 3) uint8 as bytes; the `sheet_…` fields are small PNG files, present
    for the inputs picked for the contact sheet. Neither leaves the run.
    """

    index: int
    """Place in the plan, from 0."""
    key: str
    """Path relative to the input."""
    input: str
    """URI of the input."""
    size: int
    """Bytes."""
    output_key: str
    """Path relative to the output."""
    status: Status = "planned"
    reason: str | None = None
    """Why it failed, and what to do."""
    note: str | None = None
    """What was done to the picture before the model saw it."""
    digest: str | None = None
    """SHA-256 of the input's bytes."""
    width: int | None = None
    """Of the upright input, in px."""
    height: int | None = None
    output: str | None = None
    """URI of the restored image."""
    first_stage: str | None = None
    """URI of the first stage's image, where it is kept."""
    seconds_read: float | None = None
    """Reading, decoding, cropping."""
    seconds_model: float | None = None
    """The batch's time over its length."""
    seconds_write: float | None = None
    """Encoding and writing."""
    pixels: bytes | None = None
    first_stage_pixels: bytes | None = None
    sheet_input: bytes | None = None
    sheet_first_stage: bytes | None = None
    sheet_restored: bytes | None = None

    def failed(self, reason: str, **known: Any) -> FaceRow:
        """This row with its reason, without its pictures."""
        pictures = dict.fromkeys(PICTURE_COLUMNS)
        return replace(self, status="failed", reason=reason, **{**pictures, **known})


PLAN_COLUMNS = ("index", "key", "input", "size", "output_key", "status", "reason")
PICTURE_COLUMNS = ("pixels", "first_stage_pixels", "sheet_input", "sheet_first_stage", "sheet_restored")
ALL_COLUMNS = tuple(field.name for field in fields(FaceRow))
RESULT_COLUMNS = tuple(name for name in ALL_COLUMNS if name not in ("index", "output_key", *PICTURE_COLUMNS))
"""What the manifest keeps of a row."""


def schema(columns: Sequence[str] = ALL_COLUMNS) -> pyarrow.Schema:
    """Arrow schema of the columns of a FaceRow."""
    pa = arrow()
    kinds = {"index": pa.int64(), "size": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    kinds |= dict.fromkeys(("seconds_read", "seconds_model", "seconds_write"), pa.float32())
    kinds |= dict.fromkeys(PICTURE_COLUMNS, pa.binary())
    return pa.schema([(name, kinds.get(name, pa.string())) for name in columns])


def to_table(rows: Iterable[FaceRow], columns: Sequence[str] = ALL_COLUMNS) -> pyarrow.Table:
    """Rows as an Arrow table of the given columns."""
    records = [{name: getattr(row, name) for name in columns} for row in rows]
    return arrow().Table.from_pylist(records, schema=schema(columns))


def from_table(table: pyarrow.Table) -> list[FaceRow]:
    """The inverse of `to_table`; columns that are not there have their defaults."""
    return [FaceRow(**record) for record in table.to_pylist()]
