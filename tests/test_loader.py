"""Batches made ahead, by a thread or by processes."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ldbfr.data.index import FaceImages
from ldbfr.data.loader import load_batches
from ldbfr.data.sampler import Batch, BatchSampler, NoiseDraw
from ldbfr.errors import InputError
from tests import tiny
from tests.serve_load import wait_for

DRAW = NoiseDraw((3, 4, 4), 1000, 2.0)
SAMPLER = BatchSampler(tiny.face_images(), 4, 0, "enhancer", True, "wide", noise=DRAW)


def fields(batch: Batch) -> dict[str, torch.Tensor]:
    """What a batch holds, by name."""
    return {key: value for key, value in vars(batch).items() if value is not None}


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same."""
    left, right = fields(one), fields(other)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("processes", [0, 1, 2])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_whoever_makes_them_batches_come_in_order_and_hold_the_same(processes: int, rank: int, world_size: int) -> None:
    batches = list(load_batches(SAMPLER, range(3, 8), rank, world_size, processes, pin=False))
    assert len(batches) == 5
    for step, batch in zip(range(3, 8), batches, strict=True):
        assert same(batch, SAMPLER.batch(step, rank, world_size))


@pytest.mark.timeout(60)
def test_processes_work_beside_threads_of_opencv_and_those_come_back() -> None:
    """A child of a process that has OpenCV's threads is born without them, and must not wait for them."""
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        cv2.GaussianBlur(np.zeros((2048, 2048, 3), np.float32), (31, 31), 4)  # starts them
        assert len(list(load_batches(SAMPLER, range(4), 0, 1, 2, pin=False))) == 4
        assert cv2.getNumThreads() == 4
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("processes", [0, 2])
def test_no_steps_are_no_batches(processes: int) -> None:
    assert list(load_batches(SAMPLER, range(5, 5), 0, 1, processes, pin=False)) == []


@pytest.mark.parametrize("processes", [0, 2])
def test_whoever_stops_early_leaves_nothing_behind(processes: int) -> None:
    before = set(threading.enumerate())
    batches = load_batches(SAMPLER, range(100), 0, 1, processes, pin=False)
    assert same(next(batches), SAMPLER.batch(0))
    batches.close()  # type: ignore[attr-defined]
    wait_for(lambda: set(threading.enumerate()) <= before, 20)  # the queues' own threads take a moment


class Unreadable(FaceImages):
    """Images of which one cannot be read."""

    def read(self, indices: object) -> np.ndarray:
        raise InputError("faces.tar/3.jpg: damaged; leave it out")


@pytest.mark.parametrize("processes", [0, 1])
def test_what_cannot_be_read_is_said_in_the_same_words(processes: int) -> None:
    images = tiny.face_images()
    sampler = replace(SAMPLER, images=Unreadable(images.pixels, list(images.names)))
    with pytest.raises(InputError, match=r"faces\.tar/3\.jpg: damaged; leave it out"):
        next(load_batches(sampler, range(3), 0, 1, processes, pin=False))


def own_children() -> set[int]:
    """The processes that this thread started."""
    return {int(child) for child in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()}


def test_ctrl_c_is_the_trainer_s_to_answer() -> None:
    """Sent to the whole group, as a terminal does, it leaves the processes at work."""
    heard: list[int] = []
    others = own_children()
    old = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        batches = load_batches(SAMPLER, range(60), 0, 1, 2, pin=False)
        next(batches)
        loaders = own_children() - others  # not the S3 server of other tests
        assert len(loaders) == 2
        for child in (*loaders, os.getpid()):
            os.kill(child, signal.SIGINT)
        assert len(list(batches)) == 59
    finally:
        signal.signal(signal.SIGINT, old)
    assert heard == [signal.SIGINT]


def test_what_the_loader_draws_is_what_the_stage_would() -> None:
    stage = tiny.new_stage("prior")
    plain = BatchSampler(tiny.face_images(), 4, 0, "prior", True, None).batch(2)
    drawn = BatchSampler(tiny.face_images(), 4, 0, "prior", True, None, noise=stage.noise).batch(2)
    with torch.no_grad():
        for one, other in zip(stage.noisy(plain), stage.noisy(drawn), strict=True):
            assert torch.equal(one, other)
        part = torch.tensor([3, 1])
        for one, other in zip(stage.noisy(plain.take(part)), stage.noisy(drawn.take(part)), strict=True):
            assert torch.allclose(one, other)
