"""What becomes of every input while a data set is prepared, as rows that wait in parquet files between the steps."""

from __future__ import annotations

from typing import Literal, NamedTuple

WORK_FOLDER = "_prepare"
"""Below the output, while the work is under way."""

Status = Literal["kept", "rejected", "duplicate"]


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
    """See `ldbfr.preparation.duplicates`."""
    picture: bytes | None = None
    """Small PNG of what was left out, for the contact sheet."""


REPORT_COLUMNS = ("name", "status", "reason", "split", "key")
