"""Calls of the restorer that end: with a result, at the deadline, or when the client goes away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from serve.protocol import DeadlineExceeded

log = logging.getLogger("serve.calls")

Result = TypeVar("Result")

STOP_SECONDS = 5.0
"""In which a cancelled call should have stopped: it does so between two denoising steps."""

_dismissed: set[asyncio.Task[Any]] = set()  # the event loop itself keeps no strong reference


async def call(request: Request, work: Coroutine[Any, Any, Result], deadline: float) -> Result:
    """What `work` returns.

    At the deadline (in `time.monotonic()`'s seconds), and when the client goes away, it is cancelled, whether or not
    it has looked at the clock itself. The request's body must have been read.

    Raises:
        DeadlineExceeded: there was no time left.
        ClientDisconnect: nobody waits for the result any more.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(request))
    try:
        return await first(task, gone, deadline)
    finally:
        gone.cancel()
        dismiss(task)


async def first(task: asyncio.Task[Result], gone: asyncio.Task[None], deadline: float) -> Result:
    """The result of `task`, if it comes before the deadline and before `gone`; raises as `call`."""
    left = max(0.0, deadline - time.monotonic())
    await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return task.result()
    if gone.done():
        raise ClientDisconnect
    raise DeadlineExceeded(
        "the result was not there when the request's time was over; ask for fewer steps or samples, or later"
    )


async def disconnected(request: Request) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def dismiss(task: asyncio.Task[Any]) -> None:
    """Cancel a task that nobody waits for; one that goes on all the same is logged as an error."""
    if task.done():
        return
    task.cancel()
    complaint = asyncio.get_running_loop().call_later(STOP_SECONDS, _complain)
    _dismissed.add(task)

    def ended(task: asyncio.Task[Any]) -> None:
        complaint.cancel()
        _dismissed.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("a dismissed restoration ended with %s: %s", type(error).__name__, error)

    task.add_done_callback(ended)


def _complain() -> None:
    log.error("a cancelled restoration has not stopped after %g s; it goes on without anybody waiting", STOP_SECONDS)
