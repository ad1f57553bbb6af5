"""The client for programs with an event loop; it does what `Client` does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any, Self, TypeVar, Unpack

from ldbfr.client.answers import Found, Job, Limits, Model, Preview, Restoration
from ldbfr.client.calls import ImageSource, Options
from ldbfr.client.conversation import Conversation, Open, Read, Steps, Wait
from ldbfr.client.errors import ServerError
from ldbfr.client.retries import DEFAULT_RETRIES, Retries
from ldbfr.client.transport import AsyncLine, Line, http_library

Result = TypeVar("Result")


class AsyncClient:
    """Asks an endpoint of ldbfr, as `Client` does, for any number of tasks at a time.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            (await client.restore("photo.jpg", steps=8)).save("better.jpg")

    Args:
        url: the server's address.
        api_key: a key for it; the environment's LDBFR_API_KEY when left out.
        timeout: seconds for a request, from its first try to the end of its answer.
        retries: when a request is tried again.
        sleep: waits, for tests.

    Raises:
        ConfigError: the address or the key cannot be one, or httpx2 is not installed (extra "client").
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 300.0,
        retries: Retries = DEFAULT_RETRIES,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._line = Line.to(url, api_key)
        self._talk = Conversation(self._line.url, timeout, retries)
        self._sleep = sleep
        self._http = http_library().AsyncClient(follow_redirects=False)

    def __repr__(self) -> str:
        """With the address alone."""
        return f"{type(self).__name__}({self._line.url!r})"

    async def restore(self, image: ImageSource, **options: Unpack[Options]) -> Restoration:
        """A restored image; see `Client.restore`."""
        return await self._run(self._talk.restore(image, options))

    def stream(self, image: ImageSource, **options: Unpack[Options]) -> AsyncIterator[Preview | Restoration]:
        """Previews, and at the end the result; see `Client.stream`."""
        return self._iterate(self._talk.stream(image, options))

    async def faces(self, image: ImageSource) -> Found:
        """The faces of a photo; see `Client.faces`."""
        return await self._run(self._talk.faces(image))

    async def models(self) -> tuple[Model, ...]:
        """What restores."""
        return await self._run(self._talk.models())

    async def limits(self) -> Limits:
        """What the server takes."""
        return await self._run(self._talk.limits())

    async def submit_job(self, input: str, output: str, *, faces: str | None = None, format: str | None = None) -> Job:
        """Begin a batch; see `Client.submit_job`."""
        return await self._run(
            self._talk.submit_job({"input": input, "output": output, "faces": faces, "format": format})
        )

    async def job(self, id: str) -> Job:
        """How a batch stands."""
        return await self._run(self._talk.job(id))

    async def jobs(self) -> tuple[Job, ...]:
        """All batches that this server began."""
        return await self._run(self._talk.jobs())

    async def cancel_job(self, id: str) -> Job:
        """Stop a batch; see `Client.cancel_job`."""
        return await self._run(self._talk.cancel_job(id))

    async def wait_job(self, id: str, *, every: float = 5.0, timeout: float | None = None) -> Job:
        """A batch that ended; see `Client.wait_job`."""
        return await self._run(self._talk.wait_job(id, every, timeout))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    # ---- steps ----

    async def _run(self, steps: Steps[Result]) -> Result:
        """Take the steps of a conversation; its result."""
        line, answer = self._new_line(), None
        try:
            while True:
                answer = await self._take(line, steps.send(answer))
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            await line.close()

    async def _iterate(self, steps: Generator[Any, Any, None]) -> AsyncIterator[Preview | Restoration]:
        """Take the steps of a stream; what it gives."""
        line, answer = self._new_line(), None
        try:
            while True:
                step = steps.send(answer)
                answer = None
                if isinstance(step, Preview | Restoration):
                    yield step
                else:
                    answer = await self._take(line, step)
        except StopIteration:
            return
        finally:
            await line.close()

    def _new_line(self) -> AsyncLine:
        """For one request."""
        if self._http.is_closed:
            raise ServerError(f"{self._line.url}: this client is closed; make another")
        return AsyncLine(self._http, self._line)

    async def _take(self, line: AsyncLine, step: object) -> object:
        """One step."""
        match step:
            case Open():
                return await line.open(step)
            case Read():
                return await line.read()
            case Wait(seconds):
                await line.close()
                await self._sleep(seconds)
        return None
