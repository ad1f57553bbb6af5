"""The manifest: exactly one row per planned input, collected in parts, put in place in one step."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from ldbfr import storage
from ldbfr.archive.naming import MANIFEST_FILE, WORK_FOLDER
from ldbfr.archive.rows import RESULT_COLUMNS, FaceRow, schema, to_table
from ldbfr.errors import StorageError
from ldbfr.progress import Tally
from ldbfr.tables import arrow, parquet_bytes

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_PART = 10_000


class ManifestWriter:
    """Collects result rows of one run.

    Args:
        output: URI of the run's output.
        num_planned: how many rows must come.
        about: columns that are the same for every row: seed, weights and settings digest.
    """

    def __init__(self, output: str, num_planned: int, about: dict[str, Any]) -> None:
        self.output, self.about = output, about
        self.tally = Tally(num_planned)
        self.parts: list[str] = []
        self.pending: list[FaceRow] = []
        self.seen = np.zeros(num_planned, dtype=bool)

    def add(self, row: FaceRow) -> None:
        """Take the result of one input; a second one for the same input, as after a repeated task, changes nothing."""
        assert row.status in ("restored", "failed"), f"{row.key} left the run as {row.status}"
        if self.seen[row.index]:
            return
        self.seen[row.index] = True
        if row.status == "restored":
            self.tally.restored += 1
        else:
            self.tally.fail(f"{row.key}: {(row.reason or '').removeprefix(f'{row.key}: ')}")
        self.pending.append(row)
        if len(self.pending) == ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows as a part."""
        if self.pending:
            uri = storage.join(self.output, WORK_FOLDER, "manifest", f"{len(self.parts):06d}.parquet")
            storage.write_bytes(uri, parquet_bytes(self.table(self.pending)))
            self.parts.append(uri)
            self.pending = []

    def table(self, rows: list[FaceRow]) -> pyarrow.Table:
        """Rows with the columns that they share."""
        table = to_table(rows, RESULT_COLUMNS)
        for name, value in self.about.items():
            table = table.append_column(name, arrow().array([value] * len(rows)))
        return table

    def finish(self) -> str:
        """Put the manifest in place of an earlier one, and remove the parts; its URI.

        Raises:
            StorageError: rows are missing, and so the parts stay as they are.
        """
        self.flush()
        missing = self.tally.planned - self.tally.done
        if missing:
            raise StorageError(
                f"{missing:,} of {self.tally.planned:,} planned inputs have no result: {MANIFEST_FILE} is not written; "
                "run the same command again"
            )
        pa = arrow()
        output = BytesIO()
        shared = [(name, pa.array([value]).type) for name, value in self.about.items()]
        whole = pa.schema([*schema(RESULT_COLUMNS), *(pa.field(name, kind) for name, kind in shared)])
        with pa.parquet.ParquetWriter(output, whole, compression="zstd") as writer:
            for part in self.parts:
                writer.write_table(pa.parquet.read_table(BytesIO(storage.read_bytes(part))))
        uri = storage.join(self.output, MANIFEST_FILE)
        storage.write_bytes(uri, output.getvalue())
        for part in self.parts:
            storage.delete(part)
        return uri
