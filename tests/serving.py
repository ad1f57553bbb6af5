"""What tests of the endpoint share: a restorer without a model, an image to send, the application on a real port.

    with running(make_app(FakeRestorer(), EndpointSettings())) as url:
        httpx2.post(f"{url}/v1/restorations", content=picture())

Without API keys the application answers to names of this machine only, so an in-process test client needs the base URL
http://127.0.0.1.
"""

from __future__ import annotations

import asyncio
import io
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from PIL import Image, ImageOps

from ldbfr.images import ImageFormat, decode_image, encode_image, format_of_data
from serve.jobs_protocol import JobNotFound, JobRequest, JobStatus
from serve.protocol import Found, ModelInfo, Preview, RestorationOptions, Restored

DIGEST = "d" * 64
FACE = {"box": [8.0, 6.0, 16.0, 20.0], "landmarks": [[12.0, 14.0]], "score": 0.97, "outcome": "restored"}
LEFT_ALONE = {"box": [40.0, 4.0, 5.0, 6.0], "score": 0.9, "outcome": "left", "reason": "smaller than 16 px: it has 6"}
START_SECONDS = 20


def picture(width: int = 64, height: int = 48, format: ImageFormat = "png") -> bytes:
    """An image file with some colours in it."""
    image = Image.linear_gradient("L").resize((width, height))
    file = io.BytesIO()
    Image.merge("RGB", (image, ImageOps.mirror(image), ImageOps.flip(image))).save(file, format.upper())
    return file.getvalue()


@dataclass
class FakeRestorer:
    """Inverts colours, as fast or as slowly as a test wants it.

    Args:
        seconds: that a restoration takes, spread over its steps.
        error: raised instead of a result.
        error_after: steps of a stream before the error.
        is_ready: what `ready` says.
        faces: what it finds in every photo.
        stubborn: whether it ignores its cancellation, and its deadline, until `release` is set.
    """

    seconds: float = 0.0
    error: Exception | None = None
    error_after: int = 0
    is_ready: bool = True
    faces: list[dict[str, Any]] = field(default_factory=lambda: [FACE, LEFT_ALONE])
    stubborn: bool = False
    steps: int = 4
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released by each call, so that a test knows when one has begun."""
    cancelled: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released by each call that is cancelled."""
    release: threading.Event = field(default_factory=threading.Event)
    calls: list[RestorationOptions | None] = field(default_factory=list)

    async def ready(self) -> bool:
        """As told."""
        return self.is_ready

    async def info(self) -> ModelInfo:
        """Of a model that does not exist."""
        return ModelInfo("fake_64", 64, "ffhq", DIGEST, {"steps": self.steps, "condition_scale": 1.0}, "Apache-2.0")

    async def find(self, data: bytes, deadline: float) -> Found:
        """The same faces for every photo: unless told, one that would be restored and one that would not."""
        await self._work(None, 1)
        pixels = decode_image(data, name="the upload")
        return Found(pixels.shape[1], pixels.shape[0], self.faces)

    async def restore(self, data: bytes, options: RestorationOptions, deadline: float) -> Restored:
        """The inverted image."""
        if self.error is not None:
            raise self.error
        await self._work(options, 1)
        return self._result(data, options)

    async def stream(
        self, data: bytes, options: RestorationOptions, deadline: float
    ) -> AsyncIterator[Preview | Restored]:
        """A preview of the first stage and of each step, then the inverted image."""
        steps = self.steps if options.steps is None else options.steps
        for step in range(steps + 1):
            if self.error is not None and step >= self.error_after:
                raise self.error
            await self._work(options if step == 0 else None, steps + 1)
            yield Preview(step, steps, picture(16, 16, "jpeg"))
        yield self._result(data, options)

    async def _work(self, options: RestorationOptions | None, parts: int) -> None:
        self.calls.append(options)
        self.started.release()
        try:
            await asyncio.sleep(self.seconds / parts)
        except asyncio.CancelledError:
            self.cancelled.release()
            while self.stubborn and not self.release.is_set():  # as a call does that never looks up
                await asyncio.sleep(0.01)
            raise

    def _result(self, data: bytes, options: RestorationOptions) -> Restored:
        pixels = 255 - decode_image(data, name="the upload")
        format = options.format or format_of_data(data) or "png"
        image = encode_image(pixels, format, quality=options.quality)
        several = options.samples > 1
        return Restored(
            image,
            format,
            pixels.shape[1],
            pixels.shape[0],
            options.seed,
            DIGEST,
            faces=self.faces if options.mode == "photo" else [],
            samples=[image] * options.samples if several else [],
            uncertainty=encode_image(pixels, "png") if several else None,
            timings=dict.fromkeys(("decode", "detect", "queue", "model", "paste", "encode"), 0.001),
        )


class FakeJobs:
    """Jobs that never run: they stay as they are until they are cancelled."""

    def __init__(self) -> None:
        self.statuses: dict[str, JobStatus] = {}

    async def submit(self, request: JobRequest) -> JobStatus:
        """A pending job."""
        id = f"restore-{len(self.statuses)}"
        self.statuses[id] = JobStatus(id=id, status="pending", input=request.input, output=request.output)
        return self.statuses[id]

    async def get(self, id: str) -> JobStatus:
        """As it is."""
        if id not in self.statuses:
            raise JobNotFound(f"there is no job {id!r}; GET /v1/jobs lists them")
        return self.statuses[id]

    async def list(self) -> list[JobStatus]:
        """The newest first."""
        return list(self.statuses.values())[::-1]

    async def cancel(self, id: str) -> JobStatus:
        """A cancelled job."""
        self.statuses[id] = (await self.get(id)).model_copy(update={"status": "cancelled"})
        return self.statuses[id]


@contextmanager
def running(app: Any, **options: Any) -> Iterator[str]:
    """The application on uvicorn, in a thread, at a free port of 127.0.0.1; its URL."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + START_SECONDS
        while not server.started:
            if time.monotonic() > until or not thread.is_alive():
                raise RuntimeError(f"uvicorn did not start within {START_SECONDS} s")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)
        listener.close()
