"""Server-sent events: a restoration's previews and its result, as they come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.calls import disconnected, dismiss, first
from serve.problems import Problem
from serve.protocol import DeadlineExceeded, Preview, Restored

KEEP_ALIVE_SECONDS = 10.0
"""Of silence, after which a comment is sent; proxies cut connections that say nothing."""
KEEP_ALIVE = b": keep-alive\n\n"

Item = Preview | Restored


class Items:
    """The items of a stream, one by one, each before the deadline and only as long as the client is there.

    Args:
        request: whose body has been read.
        items: of the restorer; the last one is the result.
        deadline: in `time.monotonic()`'s seconds.
    """

    def __init__(self, request: Request, items: AsyncIterator[Item], deadline: float) -> None:
        self.deadline = deadline
        self._queue: asyncio.Queue[Item | None] = asyncio.Queue()
        self._gone = asyncio.create_task(disconnected(request))
        self._task = asyncio.create_task(self._run(items))
        self._task.add_done_callback(lambda _: self._queue.put_nowait(None))

    async def next(self, patience: float) -> Item | None:
        """The next item, or None at the end.

        Raises:
            TimeoutError: none came for `patience` seconds; ask again.
            DeadlineExceeded, ClientDisconnect: as `serve.calls.call`, and what the restorer raises.
        """
        until = min(self.deadline, time.monotonic() + patience)
        getting = asyncio.create_task(self._queue.get())
        try:
            item = await first(getting, self._gone, until)
        except DeadlineExceeded:
            if until == self.deadline:
                raise
            raise TimeoutError from None
        finally:
            getting.cancel()
        if item is None:
            self._task.result()  # raises what ended it
        return item

    def close(self) -> None:
        """Stop the restoration, where it has not ended."""
        self._gone.cancel()
        dismiss(self._task)

    async def _run(self, items: AsyncIterator[Item]) -> None:
        async for item in items:
            self._queue.put_nowait(item)


class EventStream(Response):
    """A response of server-sent events.

    Args:
        request: that it answers.
        items: still to come; closed at the end.
        early: that came before the response started.
        event: an item's name and data; it sees each item once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        items: Items,
        early: Item | None,
        event: Callable[[Item], tuple[str, bytes]],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.request, self.items, self.early, self.event = request, items, early, event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ClientDisconnect:
            raise
        except Exception as error:
            problem = Problem.of(error)
            self.request.state.problem = problem.slug
            data = json.dumps(problem.details(self.request)).encode()
            await send({"type": "http.response.body", "body": format_event("error", data), "more_body": False})
            if problem.slug == "internal":
                raise  # to the log
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.items.close()

    async def _chunks(self) -> AsyncIterator[bytes]:
        item = self.early
        while True:
            if item is not None:
                yield format_event(*self.event(item))
                if isinstance(item, Restored):
                    return
            try:
                item = await self.items.next(KEEP_ALIVE_SECONDS)
            except TimeoutError:
                item = None
                yield KEEP_ALIVE
                continue
            if item is None:
                raise RuntimeError("the restorer's stream ended without a result")


def format_event(name: str, data: bytes) -> bytes:
    """An event with one line of JSON."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
