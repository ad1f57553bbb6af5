"""The plan of a run: what its parts hold, and the work that is left of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ldbfr.archive.parts import PartInfo

Mode = Literal["new", "failed", "restore", "fail"]
"""What is done of a unit: everything; what failed before; or every input is read again, what failed is done again, and
what has other bytes than when it was restored is restored again, or fails."""


class UnitId(NamedTuple):
    """A unit, by its part's number in the plan and its own in the part."""

    part: int
    unit: int


@dataclass(frozen=True)
class WorkItem:
    """Units that one reader takes in order: one, or those of an archive that can only be read forward."""

    units: tuple[UnitId, ...]
    mode: Mode = "new"


@dataclass(frozen=True)
class Plan:
    """All inputs of a run, listed once.

    Args:
        parts: what each part holds; it has as many units, numbered from 0.
    """

    parts: tuple[PartInfo, ...]

    @property
    def num_rows(self) -> int:
        """All inputs: restored + failed + skipped, in the end."""
        return sum(part.rows for part in self.parts)

    def items(self, left: Mapping[int, tuple[Collection[int], Mode]]) -> Iterator[WorkItem]:
        """The work that is left, in the order of the plan.

        Args:
            left: for a part's number, which of its units are to be done and how; other parts are done.
        """
        current: list[UnitId] = []
        mode: Mode = "new"
        for number in sorted(left):
            units, wanted = left[number]
            joined = self.parts[number].joined_units
            for unit in sorted(units):
                follows = bool(current) and self._follows(current[-1], UnitId(number, unit), joined)
                if current and not (follows and mode == wanted):
                    yield WorkItem(tuple(current), mode)
                    current = []
                current.append(UnitId(number, unit))
                mode = wanted
        if current:
            yield WorkItem(tuple(current), mode)

    def _follows(self, last: UnitId, unit: UnitId, joined: frozenset[int]) -> bool:
        """Whether a unit is read on from where an earlier one of the same stretch ended."""
        if last.part == unit.part:
            return all(number in joined for number in range(last.unit + 1, unit.unit + 1))
        between = range(last.part + 1, unit.part)
        rest = range(last.unit + 1, self.parts[last.part].units)
        return (
            all(number in self.parts[last.part].joined_units for number in rest)
            and all(len(self.parts[part].joined_units) == self.parts[part].units for part in between)
            and all(number in joined for number in range(unit.unit + 1))
        )
