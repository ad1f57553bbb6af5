"""Work beside the training: in order, not waited for, and no error is lost."""

import threading
import time
from collections.abc import Callable

import pytest

from ldbfr.errors import StorageError
from ldbfr.training.background import BackgroundWriter


def test_one_job_at_a_time_in_the_order_of_submission() -> None:
    log: list[str] = []
    going = threading.Event()

    def work(number: int) -> None:
        log.append(f"begin {number}")
        time.sleep(0.02)
        log.append(f"end {number}")
        going.set()

    with BackgroundWriter() as writer:
        for number in range(3):
            writer.submit(lambda number=number: work(number))
        writer.wait()
        assert log == [f"{what} {number}" for number in range(3) for what in ("begin", "end")]
        writer.submit(lambda: work(3))
    assert log[-1] == "end 3"  # to leave is to wait


def test_submitting_does_not_wait_for_the_job_itself() -> None:
    hold = threading.Event()
    with BackgroundWriter() as writer:
        writer.submit(lambda: hold.wait(60) or None)
        writer.poll()
        hold.set()
        writer.wait()
        writer.wait()


def failing() -> None:
    raise StorageError("the disk is full")


@pytest.mark.parametrize("way", ["submit", "poll", "wait", "exit"])
def test_an_error_comes_out_once(way: str) -> None:
    ran: list[int] = []
    writer = BackgroundWriter()
    writer.submit(failing)
    while writer._job is not None and not writer._job.done():
        time.sleep(0.01)
    ways: dict[str, Callable[[], None]] = {
        "submit": lambda: writer.submit(lambda: ran.append(1)),
        "poll": writer.poll,
        "wait": writer.wait,
        "exit": lambda: writer.__exit__(None, None, None),
    }
    with pytest.raises(StorageError, match="the disk is full"):
        ways[way]()
    assert ran == []
    writer.poll()
    writer.wait()
    writer.submit(lambda: ran.append(1))
    writer.wait()
    assert ran == [1]


def test_the_error_that_ends_the_training_is_not_hidden_by_that_of_a_save(caplog: pytest.LogCaptureFixture) -> None:
    def train() -> None:
        with BackgroundWriter() as writer:
            writer.submit(failing)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert "beside the error that ends this: the disk is full" in caplog.text
