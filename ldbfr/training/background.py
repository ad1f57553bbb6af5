"""Work beside the training: one job at a time, whose error is not lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

log = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs one job at a time in a thread, such as saving a checkpoint.

    A job's error comes out once, at the next `submit`, `poll` or `wait`. Whoever submits must `wait` before the
    interpreter ends, or leave a `with` block of this: an upload cannot start its threads after that.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._job: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Start a job, after the one before has ended well."""
        self.wait()
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._job = self._pool.submit(work)

    def poll(self) -> None:
        """Raise the error of a job that has failed; does not wait."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the job to end, and raise its error."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        job, self._job = self._job, None
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        failure = job.exception() if job is not None else None
        if failure is not None and error is None:
            raise failure
        if failure is not None:
            log.error("beside the error that ends this: %s", failure)
