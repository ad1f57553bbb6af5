"""What came of a run, in numbers: one pass over the manifest, in memory that does not grow with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldbfr.archive.rows import ResultRow
from ldbfr.data.ranges import THREADS, in_parallel
from ldbfr.errors import StorageError
from ldbfr.tables import arrow, read_columns, to_table

if TYPE_CHECKING:
    import pyarrow

EXAMPLES = 5
"""Inputs shown for a cause."""
CAUSES = 200
"""Causes that are told apart; a manifest with more of them was made by somebody else, and the rest is one more."""
OTHER_CAUSES = "other causes"
NO_CAUSE = "no cause given"
STEPS = ("read", "model", "write")
IDLE_MINUTES = 10
"""So many minutes without a result part two sessions."""

_COLUMNS = (
    *("input", "status", "cause", "reason", "size", "faces", "worker", "finished", "sharpness_input", "sharpness"),
    *(f"seconds_{step}" for step in STEPS),
)
_WAVE = 4 * THREADS  # parts whose numbers are held at once
_EARLIEST, _LATEST = 946_684_800.0, 4_102_444_800.0  # 2000 and 2100: outside of them, a clock was not set


class Example(NamedTuple):
    """An input, and why it was not restored."""

    input: str
    reason: str


@dataclass
class Cause:
    """The inputs that ended for the same reason; the first few as examples."""

    count: int = 0
    examples: list[Example] = field(default_factory=list)

    def merge(self, other: Cause) -> None:
        """Take in later inputs."""
        self.count += other.count
        self.examples = (self.examples + other.examples)[:EXAMPLES]


class Histogram:
    """Counts of positive numbers in bins of 1 % each, so that a median is right to 1 %."""

    _SMALLEST, _LARGEST, _STEP = 1e-3, 1e3, np.log(1.01)
    _BINS = 1 + round(np.log(_LARGEST / _SMALLEST) / _STEP)

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(self._BINS, np.int64)

    def add(self, values: NDArray[np.float64]) -> None:
        """Count numbers; what is not finite is left out."""
        known = np.clip(values[np.isfinite(values)], self._SMALLEST, self._LARGEST)
        bins = np.rint(np.log(known / self._SMALLEST) / self._STEP).astype(np.int64)
        self.counts += np.bincount(bins, minlength=self._BINS)

    def median(self) -> float | None:
        """Of all that was counted; None where nothing was."""
        total = int(self.counts.sum())
        if not total:
            return None
        place = int(np.searchsorted(self.counts.cumsum(), (total + 1) // 2))
        return float(self._SMALLEST * np.exp(place * self._STEP))


class Session(NamedTuple):
    """Minutes (since 1970) in which results came, without a long pause: first and last."""

    first: int
    last: int

    @property
    def length(self) -> int:
        """Minutes, at least 1."""
        return self.last - self.first + 1


@dataclass
class Summary:
    """Numbers about the rows of a manifest. Merging two gives those of both, the earlier rows first."""

    restored: int = 0
    failed: int = 0
    skipped: int = 0
    failures: dict[str, Cause] = field(default_factory=dict)
    skips: dict[str, Cause] = field(default_factory=dict)
    size: int = 0
    """Bytes of the inputs that were not skipped."""
    faces: int = 0
    minutes: Counter[int] = field(default_factory=Counter)
    """Restored inputs by the minute (since 1970, UTC) in which they were finished."""
    first: float | None = None
    """When the first was finished, in seconds since 1970."""
    last: float | None = None
    undated: int = 0
    """Restored inputs whose time is missing or impossible."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    """By step, of all workers together."""
    workers: Counter[str] = field(default_factory=Counter)
    """Restored inputs by worker."""
    sharpness_input: Histogram = field(default_factory=Histogram)
    sharpness: Histogram = field(default_factory=Histogram)

    @classmethod
    def of(cls, rows: Iterable[ResultRow]) -> Summary:
        """Of rows in memory."""
        return cls.of_table(to_table(rows, ResultRow))

    @classmethod
    def of_table(cls, table: pyarrow.Table) -> Summary:
        """Of a part of the manifest."""
        by_status = {status: _where(table, status) for status in ("restored", "failed", "skipped")}
        summary = cls(**{status: part.num_rows for status, part in by_status.items()})
        summary.failures, summary.skips = _causes(by_status["failed"]), _causes(by_status["skipped"])
        restored = by_status["restored"]
        summary.size = sum(_whole(by_status[status], "size") for status in ("restored", "failed"))
        summary.faces = _whole(restored, "faces")
        summary.workers = Counter(_value_counts(restored["worker"].drop_null()))
        summary.seconds = {step: _sum(table, f"seconds_{step}") for step in STEPS}
        summary.sharpness_input.add(_numbers(restored, "sharpness_input"))
        summary.sharpness.add(_numbers(restored, "sharpness"))
        summary._take_times(_numbers(restored, "finished"))
        return summary

    @property
    def total(self) -> int:
        """All inputs that have a row."""
        return self.restored + self.failed + self.skipped

    def sessions(self) -> list[Session]:
        """When the run was up, in order of time: long pauses part them."""
        result: list[Session] = []
        for minute in sorted(self.minutes):
            if result and minute - result[-1].last <= IDLE_MINUTES:
                result[-1] = Session(result[-1].first, minute)
            else:
                result.append(Session(minute, minute))
        return result

    def active_seconds(self) -> float:
        """From the first result to the last, without the pauses between sessions; right to a minute for each."""
        if self.first is None or self.last is None:
            return 0.0
        whole = 60.0 * sum(session.length for session in self.sessions())
        return max(0.0, whole - self.first % 60 - (60 - self.last % 60))

    def rate(self) -> float | None:
        """Restored inputs per second while the run was up; None where they came too fast to tell."""
        seconds = self.active_seconds()
        return self.restored / seconds if self.restored > 1 and seconds >= 1 else None

    def merge(self, other: Summary) -> None:
        """Take in the numbers of later rows."""
        for name in ("restored", "failed", "skipped", "size", "faces", "undated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        _merge_causes(self.failures, other.failures)
        _merge_causes(self.skips, other.skips)
        self.minutes.update(other.minutes)
        self.workers.update(other.workers)
        self.seconds = {step: self.seconds[step] + other.seconds[step] for step in STEPS}
        self.sharpness_input.counts += other.sharpness_input.counts
        self.sharpness.counts += other.sharpness.counts
        self.first = min((time for time in (self.first, other.first) if time is not None), default=None)
        self.last = max((time for time in (self.last, other.last) if time is not None), default=None)

    def _take_times(self, times: NDArray[np.float64]) -> None:
        possible = times[(times >= _EARLIEST) & (times < _LATEST)]
        self.undated = len(times) - len(possible)
        if len(possible):
            self.first, self.last = float(possible.min()), float(possible.max())
            minutes, counts = np.unique((possible // 60).astype(np.int64), return_counts=True)
            self.minutes = Counter(dict(zip(minutes.tolist(), counts.tolist(), strict=True)))


def summarise(output: str, parts: Sequence[str]) -> Summary:
    """The numbers of a run, from the parts of its manifest.

    Args:
        output: URI of the run, for the text of an error.
        parts: URIs; a few are read at once.

    Raises:
        StorageError: a part cannot be read, or is no part of a manifest.
    """
    total = Summary()
    for start in range(0, len(parts), _WAVE):
        wave = parts[start : start + _WAVE]
        for part in in_parallel(partial(_of_part, output, wave), len(wave), THREADS):
            total.merge(part)
    return total


def _of_part(output: str, parts: Sequence[str], place: int) -> Summary:
    try:
        return Summary.of_table(read_columns(parts[place], _COLUMNS))
    except (arrow().ArrowInvalid, KeyError) as error:
        what = str(error).partition("\n")[0]  # the rest is the whole schema
        raise StorageError(
            f"{parts[place]} is no part of a manifest ({what}), expected parquet with the columns of {output}'s "
            "manifest; put the original file back, or restore into another output"
        ) from error


def _where(table: pyarrow.Table, status: str) -> pyarrow.Table:
    import pyarrow.compute

    return table.filter(pyarrow.compute.equal(table["status"], status))


def _numbers(table: pyarrow.Table, column: str) -> NDArray[np.float64]:
    """A column, NaN for what is not there."""
    return np.asarray(table[column].to_numpy(), dtype=np.float64)


def _whole(table: pyarrow.Table, column: str) -> int:
    """The sum of integers, exactly."""
    import pyarrow.compute

    return int(pyarrow.compute.sum(table[column]).as_py() or 0)


def _sum(table: pyarrow.Table, column: str) -> float:
    """The sum of what is there and makes sense; a clock that was set back can make a duration negative."""
    values = _numbers(table, column)
    return float(values[np.isfinite(values) & (values > 0)].sum())


def _value_counts(column: Any) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def _causes(table: pyarrow.Table) -> dict[str, Cause]:
    """Rows of one status by their cause; the causes in the order of the rows."""
    import pyarrow.compute

    causes: dict[str, Cause] = {}
    column = pyarrow.compute.fill_null(table["cause"], NO_CAUSE)
    for name, count in _value_counts(column).items():
        rows = table.filter(pyarrow.compute.equal(column, name)).slice(0, EXAMPLES)
        reasons = (reason or name for reason in rows["reason"].to_pylist())
        examples = [Example(*pair) for pair in zip(rows["input"].to_pylist(), reasons, strict=True)]
        _merge_causes(causes, {name: Cause(count, examples)})
    return causes


def _merge_causes(causes: dict[str, Cause], others: dict[str, Cause]) -> None:
    for name, cause in others.items():
        known = name if name in causes or len(causes) < CAUSES else OTHER_CAUSES
        causes.setdefault(known, Cause()).merge(cause)
