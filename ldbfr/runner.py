"""A step over independent items, and who carries it out: this process, or a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Runner(Protocol):
    """Carries a step out over items, in any order and anywhere; results come as they are there."""

    def __call__(self, step: Callable[[Item], Iterator[Result]], items: Sequence[Item]) -> Iterator[Result]: ...


def run_here(step: Callable[[Item], Iterator[Result]], items: Sequence[Item]) -> Iterator[Result]:
    """The runner that uses this process alone."""
    for item in items:
        yield from step(item)
