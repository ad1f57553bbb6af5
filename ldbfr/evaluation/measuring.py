"""Measure many images in several processes: in order, with a bounded number of them in flight.

Pixels go to a process and numbers come back, so that memory does not grow with the number of images. Processes are
spawned: they share no locks and no threads with their parent.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

import cv2

from ldbfr.errors import ConfigError, InputError, LDBFRError
from ldbfr.evaluation.results import PairMetric
from ldbfr.images import Pixels

Item = TypeVar("Item")
Result = TypeVar("Result")
Pair = tuple[str, Pixels, Pixels | None]
"""A key, an image and its original, if there is one; of one shape."""

AHEAD = 3
"""Items in flight for every process: one in work, one on its way there, one on its way back."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(
    metrics: Sequence[PairMetric], pairs: Iterable[Pair], processes: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Every metric of every pair, as (key, numbers by the metrics' names), in the pairs' order.

    A metric that needs an original is left out where there is none. `pairs` is read as the work goes on, a few ahead.

    Args:
        metrics: that can be sent to another process (they load their networks there, on first use).
        pairs: keys and pixels.
        processes: to measure in; 1 is this one.

    Raises:
        InputError: a pair has two shapes, or something cannot be measured: the text begins with the key.
    """
    yield from in_processes(MeasurePair(tuple(metrics)), pairs, processes)


class MeasurePair:
    """One pair's numbers."""

    def __init__(self, metrics: Sequence[PairMetric]) -> None:
        self.metrics = metrics

    def __call__(self, pair: Pair) -> tuple[str, dict[str, float]]:
        """The numbers of (key, image, original).

        Raises:
            InputError: as `measure`.
        """
        key, image, original = pair
        if original is not None and image.shape != original.shape:
            raise InputError(
                f"{key}: the image is {shape_text(image)}, its original {shape_text(original)}; give images of their "
                "originals' sizes, nothing is resized before it is measured"
            )
        numbers: dict[str, float] = {}
        for metric in self.metrics:
            if original is None and metric.needs_original:
                continue
            name = metric.measure.name
            try:
                value = metric(image, original)
            except InputError as error:
                raise InputError(f"{key}: {name} cannot be measured: {error}") from error
            if value != value:
                raise InputError(f"{key}: {name} is not a number; look at the image, and leave it out if it is damaged")
            numbers[name] = value
        return key, numbers


def shape_text(image: Pixels) -> str:
    """Width × height of (H, W, ...)."""
    return f"{image.shape[1]} × {image.shape[0]} px"


def in_processes(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """`function` of every item, in their order, in so many processes; few items are in flight at a time.

    Args:
        function: that can be sent to another process, as can items and results. It is sent once.
        items: read as the work goes on.
        processes: 1 is this one.

    Raises:
        ConfigError: `processes` is not positive.
        LDBFRError: a process ended without a word, most often for want of memory.
    """
    if processes < 1:
        raise ConfigError(f"{processes} processes: expected at least 1")
    if processes == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start, initargs=(function,))
    waiting: deque[Future[Result]] = deque()
    queue = iter(items)
    try:
        waiting.extend(pool.submit(_work, item) for item in islice(queue, AHEAD * processes))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(_work, item) for item in islice(queue, 1))
            yield result
    except BrokenProcessPool as error:
        raise LDBFRError("a measuring process was ended from outside, often for want of memory; use fewer") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_function: Callable[..., object] | None = None


def _start(function: Callable[..., object]) -> None:
    """Make ready a process: each works on one core, so libraries are not to start threads beside the others."""
    global _function
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which is imported by those metrics that need it
    cv2.setNumThreads(1)
    _function = function


def _work(item: Any) -> Any:
    assert _function is not None
    return _function(item)
