"""Makes batches ahead of the step that trains on them, in a thread or in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
from torch.utils.data import DataLoader, Dataset

from ldbfr.data.sampler import Batch, BatchSampler


@dataclass(frozen=True)
class StepBatches(Dataset[Batch]):
    """A worker's batches of a range of steps, as torch's loader takes them."""

    sampler: BatchSampler
    steps: range
    rank: int
    world_size: int

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> Batch:
        return self.sampler.batch(self.steps[place], self.rank, self.world_size)


def load_batches(
    sampler: BatchSampler, steps: range, rank: int, world_size: int, processes: int, pin: bool
) -> Iterator[Batch]:
    """A worker's batches in order; what they hold does not depend on who makes them.

    Args:
        sampler: makes them.
        steps: whose batches.
        rank, world_size: which part of the global batch.
        processes: how many make batches, no more than there are cores; 0: a thread of this process, one batch ahead.
        pin: put them into page-locked memory, from which a GPU takes them while it computes.
    """
    batches = StepBatches(sampler, steps, rank, world_size)
    processes = min(processes, len(batches), len(os.sched_getaffinity(0)))
    if processes:
        # Forked: the images that are in memory are shared, not copied. The children never touch the GPU.
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=processes,
            pin_memory=pin,
            multiprocessing_context="fork",
            worker_init_fn=_quiet_worker,
        )
        with _opencv_on_one_thread():
            forked = iter(loader)
        yield from forked
        return
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = [pool.submit(batches.__getitem__, place) for place in range(min(1, len(batches)))]
        for place in range(len(batches)):
            batch = ahead.pop().result()
            if place + 1 < len(batches):
                ahead.append(pool.submit(batches.__getitem__, place + 1))
            yield batch.pin_memory() if pin else batch


@contextmanager
def _opencv_on_one_thread() -> Iterator[None]:
    """Without OpenCV's threads: a fork does not take them along, and its child would wait for them without end."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _quiet_worker(number: int) -> None:
    """Ctrl-C is the trainer's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
