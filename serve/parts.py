"""A job that is larger than a batch is restored in parts; what its client sees is whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import numpy as np

from ldbfr.images import Pixels
from serve.batching import Waiting
from serve.protocol import DeadlineExceeded, FacePreview, FaceResult

T = TypeVar("T")

PREVIEWS_KEPT = 2
"""Of a request whose client reads slower than the model goes on."""


class Events:
    """Previews on their way from the model's thread to a client: the latest few of each part of a job."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, FacePreview]] = []
        self.event = asyncio.Event()

    def put(self, number: int, preview: FacePreview) -> None:
        """Keep one of a part; the oldest goes if nobody takes them."""
        self.kept = [*self.kept[-PREVIEWS_KEPT + 1 :], (number, preview)]
        self.event.set()

    def wake(self, _: object = None) -> None:
        """Something else happened."""
        self.event.set()

    async def something(self) -> None:
        """Wait until something happens."""
        await self.event.wait()
        self.event.clear()

    def take(self) -> list[tuple[int, FacePreview]]:
        """What there is."""
        kept, self.kept = self.kept, []
        return kept


def overall(preview: FacePreview, number: int, count: int, shown: Pixels) -> FacePreview:
    """The preview of a whole job, given that of one of its parts, which are restored one after the other."""
    return FacePreview(number * preview.steps + preview.step, count * preview.steps, shown.copy())


def joined(results: Sequence[FaceResult]) -> FaceResult:
    """The result of a job that was restored in parts."""
    if len(results) == 1:
        return results[0]
    samples = [one.samples for one in results if one.samples is not None]
    maps = [one.uncertainty for one in results if one.uncertainty is not None]
    return FaceResult(
        np.concatenate([one.images for one in results]),
        results[0].model,
        np.concatenate(samples, axis=1) if samples else None,
        np.concatenate(maps) if maps else None,
        queue_seconds=results[0].queue_seconds,
        model_seconds=sum(one.model_seconds for one in results),
        batch_faces=max(one.batch_faces for one in results),
    )


async def answers(waiting: Sequence[Waiting]) -> list[FaceResult]:
    """All results, or the first error."""
    return [await one.answer for one in waiting]


def is_over(waiting: Sequence[Waiting]) -> bool:
    """Whether all are done, or one has failed."""
    done = [one.answer for one in waiting if one.answer.done()]
    return len(done) == len(waiting) or any(one.cancelled() or one.exception() is not None for one in done)


async def until(deadline: float, awaitable: Awaitable[T]) -> T:
    """Wait, but no longer than until the deadline, in `time.monotonic()`'s seconds.

    Raises:
        DeadlineExceeded: it has passed.
    """
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await awaitable
    except TimeoutError as error:
        raise DeadlineExceeded("the time for this request ran out before its result was there") from error


def cancel(waiting: Sequence[Waiting]) -> None:
    """Say that nobody waits any more."""
    for one in waiting:
        if not one.answer.cancel() and not one.answer.cancelled():
            one.answer.exception()  # seen, though another part's came first
