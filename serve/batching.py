"""The requests that wait for the model, and which of them share its next batch.

`ray.serve.batch` would put a request that does not fit behind all later ones, run what nobody waits for any more, and
mix requests that the model cannot restore together; so the line is our own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ldbfr.images import Pixels
from serve.protocol import FacePreview, FaceResult

FIRST_STAGE_COST = 2
"""What the first stage and the decoder take, in denoising steps."""


class Sampling(NamedTuple):
    """What the faces of a batch must have in common: the pipeline takes one of each."""

    steps: int
    seed: int
    condition_scale: float
    samples: int

    @property
    def cost(self) -> int:
        """Of a face, in denoising steps."""
        return FIRST_STAGE_COST + self.steps * self.samples


@dataclass(eq=False)
class Waiting:
    """Faces in line, no more than a batch has.

    Args:
        faces: (n, S, S, 3).
        sampling: how to restore them.
        deadline: in `time.monotonic()`'s seconds.
        answer: gets the result; once it is done, by cancellation too, nobody waits any more.
        tell: gets previews; called by the thread that runs the model.
    """

    faces: Pixels
    sampling: Sampling
    deadline: float
    answer: asyncio.Future[FaceResult]
    tell: Callable[[FacePreview], None] | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it, and may still get it in time."""
        return not self.answer.done() and time.monotonic() < self.deadline

    @property
    def cost(self) -> int:
        """In denoising steps of one face."""
        return len(self.faces) * self.sampling.cost


class Line:
    """First come, first served; what fits to the first and finds room goes along with it.

    Whoever is first is served next, whatever it asks for, so nobody is overtaken for ever.
    """

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []

    def add(self, one: Waiting) -> None:
        """Stand at the end."""
        self.waiting.append(one)

    def drop_unwanted(self) -> None:
        """Let go what nobody waits for; `asyncio.timeout` tells those who do that their time is up."""
        self.waiting = [one for one in self.waiting if one.is_wanted]

    def fitting(self, most: int) -> list[Waiting]:
        """Who would be in the next batch of at most so many faces."""
        self.drop_unwanted()
        batch: list[Waiting] = []
        room = most
        for one in self.waiting:
            if one.sampling == self.waiting[0].sampling and (len(one.faces) <= room or not batch):
                batch.append(one)
                room -= len(one.faces)
        return batch

    def take(self, most: int) -> list[Waiting]:
        """The next batch, which leaves the line; empty if nobody waits."""
        batch = self.fitting(most)
        self.waiting = [one for one in self.waiting if one not in batch]
        return batch

    @property
    def cost(self) -> int:
        """Of all who wait, in denoising steps of one face."""
        return sum(one.cost for one in self.waiting)


class Pace:
    """How long the model takes: seconds for a face and denoising step, in batches that are full or nearly so.

    A small batch takes longer for each face. So it says nothing if it was slower than what is known; but if it was
    faster, then what is known is of harder times, and would keep requests out for ever.
    """

    SLOWNESS = 0.7
    """Share of what was known before that is kept."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def learn(self, cost: int, seconds: float, *, is_full: bool = True) -> None:
        """From a batch."""
        new = seconds / cost
        if not is_full and self.seconds is not None and new >= self.seconds:
            return
        self.seconds = new if self.seconds is None else self.SLOWNESS * self.seconds + (1 - self.SLOWNESS) * new

    def estimate(self, cost: float) -> float:
        """Seconds for this much; 0 as long as nothing is known."""
        return 0.0 if self.seconds is None else self.seconds * cost
