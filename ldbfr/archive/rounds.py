"""Work off what is left of a run: in waves, and again in rounds while the storage fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from ldbfr.archive.ledger import Ledger, UnitDone
from ldbfr.archive.plan import Mode, UnitId, WorkItem
from ldbfr.archive.steps import UnitFailed
from ldbfr.errors import LDBFRError, StorageError

log = logging.getLogger(__name__)

UNITS_IN_A_WAVE = 8192
"""Units that go through one execution, a million images: what it costs to begin and end one does not count then."""
FAILED_IN_A_ROW = 16
"""Units after which a round ends, if all of them failed: the storage needs a pause, not more requests."""
FRUITLESS_ROUNDS = 3
PAUSE_S = 20.0
JUDGED_FROM = 100
"""Inputs that must be done before their failure rate can end a run early."""

Execution = Callable[[Sequence[WorkItem]], Iterator[UnitDone | UnitFailed]]


class TooManyFailuresError(LDBFRError):
    """More inputs failed than the run may have."""


@dataclass
class Rounds:
    """Drives a run to its end.

    Args:
        ledger: of the run.
        execute: does work items, in any order.
        max_failures: the highest share of inputs that may fail.
        progress: called after every unit.
        pause: waits so many seconds; for tests.
    """

    ledger: Ledger
    execute: Execution
    max_failures: float = 1.0
    progress: Callable[[UnitDone], None] = lambda _: None
    pause: Callable[[float], None] = time.sleep
    failed: set[UnitId] = field(default_factory=set)
    """Units that failed in this round."""

    def __call__(self) -> None:
        """Do everything that is left.

        Raises:
            TooManyFailuresError: more failed than may; what is done stays done.
            StorageError: the output fails, or the inputs' storage fails on and on.
        """
        fruitless = 0
        while left := self.ledger.left():
            before = self.ledger.done.total
            trouble: UnitFailed | None = None
            for wave in waves(self.in_order(left)):
                trouble, hopeless = self.wave(wave)
                if hopeless:
                    break
            if trouble is None and self.ledger.done.total > before:
                continue
            if trouble is None:
                raise StorageError(f"units of {self.ledger.output} came to no end and no error; look into Ray's logs")
            fruitless = 0 if self.ledger.done.total > before else fruitless + 1
            missing = self.ledger.plan.num_rows - self.ledger.done.total
            if fruitless == FRUITLESS_ROUNDS:
                raise StorageError(
                    f"{trouble.reason} ({missing:,} inputs are left after {FRUITLESS_ROUNDS} rounds in which none "
                    "could be done; mend this, and run the same command again)"
                )
            seconds = PAUSE_S * 2**fruitless
            log.warning("%s inputs wait for the storage, again in %.0f s: %s", f"{missing:,}", seconds, trouble.reason)
            self.pause(seconds)

    def in_order(self, left: Mapping[int, tuple[Collection[int], Mode]]) -> Iterator[WorkItem]:
        """The work that is left; what failed in the round before comes last, for it may fail again."""
        failed, late = frozenset(self.failed), []
        self.failed.clear()
        for item in self.ledger.plan.items(left):
            if failed.isdisjoint(item.units):
                yield item
            else:
                late.append(item)
        yield from late

    def wave(self, items: Sequence[WorkItem]) -> tuple[UnitFailed | None, bool]:
        """One execution: what failed last of what is worth another attempt, and whether nothing else came any more."""
        trouble: UnitFailed | None = None
        in_a_row = 0
        with closing(self.execute(items)) as results:  # type: ignore[type-var]
            for result in results:
                if isinstance(result, UnitFailed):
                    if result.fatal:
                        raise StorageError(f"{result.reason}; then run the same command again")
                    trouble, in_a_row = result, in_a_row + 1
                    self.failed.add(result.id)
                    if in_a_row == FAILED_IN_A_ROW:
                        return trouble, True
                    continue
                in_a_row = 0
                if self.ledger.take(result):
                    self.progress(result)
                    self.judge()
        return trouble, False

    def judge(self, at_the_end: bool = False) -> None:
        """TooManyFailuresError if more inputs failed than may."""
        done = self.ledger.done
        if done.failure_rate > self.max_failures and (at_the_end or done.restored + done.failed >= JUDGED_FROM):
            raise TooManyFailuresError(
                f"{done.failed:,} of {done.restored + done.failed:,} inputs failed, {done.failure_rate:.1%}: expected "
                f"at most --max-failures {self.max_failures:g}; look at the reasons in the manifest, or allow more"
            )


def waves(items: Iterable[WorkItem]) -> Iterator[list[WorkItem]]:
    """The items in lots of so many units."""
    wave: list[WorkItem] = []
    units = 0
    for item in items:
        wave.append(item)
        units += len(item.units)
        if units >= UNITS_IN_A_WAVE:
            yield wave
            wave, units = [], 0
    if wave:
        yield wave
