"""PhotoService, the `Restorer` behind the HTTP side: everything but the networks, which a `FaceModel` runs."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

from ldbfr.errors import ConfigError, WeightsError
from ldbfr.faces.detection import YuNet
from ldbfr.faces.face import Face, FaceDetector
from ldbfr.images import DEFAULT_LIMITS, ImageLimits, Pixels
from ldbfr.photos.settings import PhotoSettings
from serve.parts import until
from serve.protocol import (
    DeadlineExceeded,
    FaceJob,
    FaceModel,
    FacePreview,
    FaceResult,
    Found,
    ModelInfo,
    OtherModelError,
    Overloaded,
    Preview,
    RestorationOptions,
    Restored,
)
from serve.steps import (
    AlignedWork,
    PhotoWork,
    Timings,
    check_samples,
    decode,
    look,
    photo_settings,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 4
"""To find out for which weights faces are to be cut out, while weights are being replaced."""
LOOK_AGAIN_SECONDS = 60.0
"""After which a detector's file that was missing is looked for again."""
DETECTING = threading.Lock()
"""YuNet's network, of which a process has one, is not for several threads."""


class Threads:
    """A bounded number of threads for steps that block, and a bounded number of those who wait for one.

    Args:
        name: for people.
        count: threads.
        most_waiting: steps that wait; one that comes then is refused.
    """

    def __init__(self, name: str, count: int, most_waiting: int) -> None:
        self.name, self.most_waiting = name, most_waiting
        self.free = asyncio.Semaphore(count)
        self.waiting = 0
        self.pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, deadline: float, step: Callable[[], T]) -> T:
        """Run a step in a thread; one whose time is up, or that nobody waits for, is not begun.

        Raises:
            Overloaded: too many wait.
            DeadlineExceeded: the time is up.
        """
        if self.free.locked() and self.waiting >= self.most_waiting:
            raise Overloaded(f"{self.waiting} images wait for {self.name} already; ask again later")
        self.waiting += 1
        try:
            await until(deadline, self.free.acquire())
        finally:
            self.waiting -= 1
        future = self.pool.submit(step)
        # The thread is taken until the step has ended, also if nobody waits for it any more.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self.free.release))
        return await until(deadline, asyncio.wrap_future(future))

    def close(self) -> None:
        """Begin no further step."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class PhotoService:
    """A `Restorer`.

    Args:
        model: restores aligned faces.
        limits: of an image, checked before it is decoded.
        detector: finds faces, or the file of YuNet; $LDBFR_FACE_DETECTOR, the cache or a download when left out.
        threads: for decoding, pasting and encoding; faces are found in one more.
        most_waiting: images that wait for a thread.
    """

    def __init__(
        self,
        model: FaceModel,
        *,
        limits: ImageLimits = DEFAULT_LIMITS,
        detector: FaceDetector | str | Path | None = None,
        threads: int = 2,
        most_waiting: int = 64,
    ) -> None:
        self.model, self.limits = model, limits
        self.threads = Threads("a processor", threads, most_waiting)
        self.finding = Threads("the face detector", 1, most_waiting)
        self._detector = detector if callable(detector) else None
        self._detector_file = None if callable(detector) else detector
        self._looking, self._looked = asyncio.Lock(), float("-inf")
        self._starting: asyncio.Task[None] | None = None  # the event loop itself keeps no strong reference
        self._info: ModelInfo | None = None

    def start(self) -> None:
        """Look for the detector already, in the background: a download takes a while, and a log should tell early."""
        self._starting = asyncio.get_running_loop().create_task(self._look_for_detector())

    # ---- Restorer ----

    async def ready(self) -> bool:
        """Whether a request would be answered now; photos need the detector, but aligned faces do without."""
        try:
            self._info = await self.model.info()
        except (Overloaded, DeadlineExceeded):
            return False
        return True

    async def info(self) -> ModelInfo:
        """About the model that answers now."""
        self._info = await self.model.info()
        return self._info

    async def find(self, data: bytes, deadline: float) -> Found:
        """The faces of a photo."""
        settings = PhotoSettings()
        detector = await self.detector(deadline)
        model, timings = await self.assumed(deadline), Timings()
        photo = await self.threads.run(deadline, lambda: decode(data, self.limits, timings))
        found = await self.finding.run(deadline, lambda: look(photo, detector, settings, model, timings))
        faces = [
            {
                "box": [round(value, 2) for value in one.face.box],
                "landmarks": [[round(x, 2), round(y, 2)] for x, y in one.face.landmarks],
                "score": round(one.face.score, 4),
                "reason": one.reason,
            }
            for one in found.faces
        ]
        return Found(photo.width, photo.height, faces)

    async def restore(self, data: bytes, options: RestorationOptions, deadline: float) -> Restored:
        """Restore an image."""
        for _ in range(ATTEMPTS):
            try:
                work = await self.begin(data, options, deadline)
                if work.faces is None:
                    return await self.finish(work, None, deadline)
                result = await self.model.restore(self.job(work, work.faces), deadline)
                return await self.finish(work, result, deadline)
            except OtherModelError as error:
                self._info = error.model
        raise weights_change()

    async def stream(
        self, data: bytes, options: RestorationOptions, deadline: float
    ) -> AsyncIterator[Preview | Restored]:
        """Restore an image, with previews."""
        for _ in range(ATTEMPTS):
            try:
                work = await self.begin(data, options, deadline)
                if work.faces is None:
                    yield await self.finish(work, None, deadline)
                    return
                job = self.job(work, work.faces, previews=True)
                async with aclosing(self.model.stream(job, deadline)) as events:  # type: ignore[type-var]
                    async for event in events:
                        if isinstance(event, FacePreview):
                            image = await self.preview(work, event.images, deadline)
                            yield Preview(event.step, event.steps, image)
                        else:
                            yield await self.finish(work, event, deadline)
                            return
            except OtherModelError as error:
                self._info = error.model
        raise weights_change()

    async def close(self) -> None:
        """Begin nothing further."""
        if self._starting is not None:
            self._starting.cancel()
        self.threads.close()
        self.finding.close()

    # ---- the steps ----

    async def begin(self, data: bytes, options: RestorationOptions, deadline: float) -> AlignedWork | PhotoWork:
        """Decode, find and cut out."""
        settings, model = photo_settings(options), await self.assumed(deadline)
        check_samples(options, model)
        if settings is None:
            return await self.threads.run(deadline, lambda: AlignedWork.begin(data, options, self.limits, model))
        detector = await self.detector(deadline)
        timings = Timings()
        photo = await self.threads.run(deadline, lambda: decode(data, self.limits, timings))
        found = await self.finding.run(deadline, lambda: look(photo, detector, settings, model, timings))
        return PhotoWork(data, options, model, photo, found, settings, timings=timings)

    def job(self, work: AlignedWork | PhotoWork, faces: Pixels, previews: bool = False) -> FaceJob:
        """What the model is to do."""
        options = work.options
        return FaceJob(
            faces,
            work.model.template,
            options.steps,
            options.seed,
            options.condition_scale,
            options.samples,
            previews,
        )

    async def preview(self, work: AlignedWork | PhotoWork, images: Pixels, deadline: float) -> bytes:
        """A JPEG of an image on its way."""
        return await self.threads.run(deadline, lambda: work.preview(images))

    async def finish(self, work: AlignedWork | PhotoWork, result: FaceResult | None, deadline: float) -> Restored:
        """Put back and encode."""
        if result is not None:
            self._info = result.model  # the next faces are cut out for the weights that answered last
            work.timings.add("queue", result.queue_seconds)
            work.timings.add("model", result.model_seconds)
        if isinstance(work, PhotoWork):
            photo = work
            return await self.threads.run(deadline, lambda: photo.finish(result))
        assert result is not None, "an aligned image always has its face"
        aligned, made = work, result
        return await self.threads.run(deadline, lambda: aligned.finish(made))

    async def assumed(self, deadline: float) -> ModelInfo:
        """The model that most probably answers."""
        if self._info is None:
            self._info = await until(deadline, self.model.info())
        return self._info

    async def detector(self, deadline: float) -> FaceDetector:
        """The face detector, which is looked for once a minute if its file was missing.

        Raises:
            ConfigError: there is none.
        """
        if self._detector is None:
            await until(deadline, self._look_for_detector())
        if self._detector is None:
            raise ConfigError(
                "mode photo: this service has no face detector at the moment, so it restores aligned faces only; ask "
                "for mode aligned, or tell its operator, whose log says which file is missing"
            )
        return self._detector

    async def _look_for_detector(self) -> None:
        """Load the detector, unless it was missing a short while ago; one request looks, others wait for that."""
        async with self._looking:
            if self._detector is not None or time.monotonic() - self._looked < LOOK_AGAIN_SECONDS:
                return
            try:
                await asyncio.to_thread(self.load_detector)
            except WeightsError as error:
                log.error("photos cannot be restored, only aligned faces: %s", error)
            self._looked = time.monotonic()

    def load_detector(self) -> None:
        """Look for YuNet's file, and load it.

        Raises:
            WeightsError: it is nowhere, or cannot be read.
        """
        settings = PhotoSettings()
        assert not callable(self._detector_file)
        yunet = YuNet(self._detector_file, min_score=settings.min_score, min_size=settings.min_face)

        def detect(pixels: Pixels) -> list[Face]:
            with DETECTING:
                return yunet(pixels)

        self._detector = detect


def weights_change() -> Overloaded:
    """What to say when the model was another one at every attempt."""
    return Overloaded("the model's weights are being replaced; ask again", 2.0)
