"""One log line every few seconds: how much is done, how fast, how long it will take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

FAILURES_SHOWN = 10
LEAST_SECONDS = 0.5
"""A rate over less says nothing."""


@dataclass
class Tally:
    """How a run stands. `failures` are the first few, as lines for a person."""

    planned: int
    restored: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Inputs that have their row."""
        return self.restored + self.failed + self.skipped

    def fail(self, line: str) -> None:
        """Count an input that failed."""
        self.failed += 1
        self.note(line)

    def note(self, line: str) -> None:
        """Keep the line of a failure that is counted elsewhere; what a terminal would obey in it is escaped."""
        if len(self.failures) < FAILURES_SHOWN:
            self.failures.append("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line))

    def describe_failures(self) -> list[str]:
        """One line per failure shown, and one for the rest."""
        rest = self.failed - len(self.failures)
        return [f"  {line}" for line in self.failures] + ([f"  … and {rest:,} more: see the manifest"] if rest else [])


class Progress:
    """Reports a tally.

    The rate counts from the first results on: before them, processes start and weights load.

    Args:
        tally: updated elsewhere.
        every: seconds between lines.
        clock: seconds, for tests.
        tell: gets every line too.
    """

    def __init__(
        self,
        tally: Tally,
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.tally, self.every, self.clock, self.tell = tally, every, clock, tell
        self.started = self.last = clock()
        self.before = tally.done
        self.first: tuple[float, int] | None = None

    def update(self) -> None:
        """Log a line if it is time for one."""
        now = self.clock()
        if self.first is None and self.tally.done > self.before:
            self.first = (now, self.tally.done)
        if now - self.last >= self.every:
            self.last = now
            log.info("%s", self.line())
            self.tell(self.line())

    def line(self) -> str:
        """done/total, failures, images/s, time left."""
        tally = self.tally
        text = f"{tally.done:,}/{tally.planned:,} images"
        if tally.failed:
            text += f", {tally.failed:,} failed"
        rate = self.rate()
        if rate:
            text += f", {rate:.1f} images/s, {duration((tally.planned - tally.done) / rate)} left"
        return text

    def rate(self) -> float | None:
        """Images per second since the first results; None until there are more."""
        if self.first is None or self.tally.done == self.first[1]:
            return None
        seconds = self.clock() - self.first[0]
        return (self.tally.done - self.first[1]) / seconds if seconds >= LEAST_SECONDS else None

    def summary(self) -> str:
        """The line for the end."""
        tally, seconds = self.tally, self.clock() - self.started
        text = f"{tally.restored:,} of {tally.planned:,} images restored, {tally.failed:,} failed"
        text += f", {tally.skipped:,} skipped" if tally.skipped else ""
        rate = self.rate()
        return f"{text}, in {duration(seconds)}" + (f" ({rate:.1f} images/s after start-up)" if rate else "")


def duration(seconds: float) -> str:
    """Seconds as a text: 42 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
