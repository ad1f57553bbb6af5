"""The model in this process: requests wait in line, and a thread restores them in batches.

On Ray every replica of the model's deployment has one of these, see `serve.app`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np

from ldbfr.errors import ConfigError
from ldbfr.pipeline import LDBFRPipeline
from serve.batching import Line, Pace, Sampling, Waiting
from serve.inference import AbandonedError, BatchRunner, BrokenDeviceError, Outcome, lacks_memory
from serve.model_info import describe
from serve.parts import Events, answers, cancel, is_over, joined, overall, until
from serve.protocol import (
    DeadlineExceeded,
    FaceJob,
    FacePreview,
    FaceResult,
    ModelInfo,
    OtherModelError,
    Overloaded,
)

log = logging.getLogger(__name__)

ONE_STEP = Sampling(steps=1, seed=0, condition_scale=1.0, samples=1)
HOPELESS = 2.0
"""What would take so many times longer than there is time is not even begun, however idle the model is."""
MARGIN = 1.2
"""What is promised in a busy time may take so many times longer than the estimate and is still there in time."""
WARM_UP_SECONDS = 10.0
"""A full batch is restored before the first request only if it takes no longer."""


class LocalFaceModel:
    """A `FaceModel` over LDBFRPipeline.

    The event loop that runs the first request must be the one of all others.

    Args:
        pipeline: the model.
        info: about it, see `describe`.
        batch_faces: faces at a time.
        batch_wait: seconds for which a batch that is not full waits for more faces.
        most_waiting: faces in line; a request that comes then is refused.
    """

    def __init__(
        self,
        pipeline: LDBFRPipeline,
        info: ModelInfo,
        *,
        batch_faces: int = 16,
        batch_wait: float = 0.01,
        most_waiting: int = 1_024,
    ) -> None:
        self.runner = BatchRunner(pipeline, info, batch_faces)
        self.batch_wait, self.most_waiting = batch_wait, most_waiting
        self.line, self.pace = Line(), Pace()
        self.broken: str | None = None
        self.last_success = float("-inf")
        self._running: tuple[float, int, Sampling] | None = None  # since when, what it costs, and how
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._arrived = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    @classmethod
    def load(
        cls, weights: str, *, device: str | None = None, threads: int | None = None, batch_faces: int, batch_wait: float
    ) -> Self:
        """Load weights, by name or folder, and restore something with them, so that the first request does not wait.

        Raises:
            WeightsError: they are missing, cut short or changed.
            ConfigError: the device is not there.
        """
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError('device cuda: torch sees no GPU in this process; give it one, or say "cpu"')
        pipeline: LDBFRPipeline = LDBFRPipeline.from_pretrained(weights, device=device)
        model = cls(
            pipeline,
            describe(pipeline.preset, pipeline.weights_digest, weights),
            batch_faces=batch_faces,
            batch_wait=batch_wait,
        )
        model.warm_up()
        return model

    def warm_up(self) -> None:
        """Let torch choose its kernels and take its memory, and learn how fast the model is."""
        self.measure(1)
        while (most := self.runner.most) > 1 and self.pace.estimate(most * ONE_STEP.cost) <= WARM_UP_SECONDS:
            try:
                return self.measure(most)
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
            self.runner.halve(most)
            log.warning("the memory does not suffice for %d faces at a time, %d are tried", most, self.runner.most)

    def measure(self, count: int) -> None:
        """Restore so many faces in one step, and take how long it took for the model's pace."""
        pipeline = self.runner.pipeline
        faces = np.zeros((count, pipeline.side, pipeline.side, 3), np.uint8)
        pipeline(faces, num_inference_steps=1)  # the first time is no measure
        started = time.monotonic()
        pipeline(faces, num_inference_steps=1)
        self.pace = Pace()
        self.pace.learn(count * ONE_STEP.cost, time.monotonic() - started)

    # ---- FaceModel ----

    async def info(self) -> ModelInfo:
        """About the model."""
        return self.runner.info

    async def restore(self, job: FaceJob, deadline: float) -> FaceResult:
        """Restore faces; see `FaceModel`."""
        waiting = self.enqueue(job, deadline)
        try:
            return joined(await until(deadline, answers(waiting)))
        finally:
            cancel(waiting)

    async def stream(self, job: FaceJob, deadline: float) -> AsyncIterator[FacePreview | FaceResult]:
        """Restore faces, with previews; see `FaceModel`."""
        loop = asyncio.get_running_loop()
        events = Events()

        def watch(number: int) -> Callable[[FacePreview], None]:
            def tell(preview: FacePreview) -> None:
                loop.call_soon_threadsafe(events.put, number, preview)

            return tell

        waiting = self.enqueue(job, deadline, watch)
        for one in waiting:
            one.answer.add_done_callback(events.wake)
        shown = job.faces.copy()
        places = np.cumsum([0, *(len(one.faces) for one in waiting)])
        try:
            while not is_over(waiting):
                await until(deadline, events.something())
                for number, preview in events.take():
                    shown[places[number] : places[number + 1]] = preview.images
                    yield overall(preview, number, len(waiting), shown)
            yield joined([await one.answer for one in waiting])
        finally:
            cancel(waiting)

    async def check(self, period: float) -> None:
        """Find out whether the model works: by what it did lately, or else by restoring a face in one step.

        Args:
            period: seconds for which a batch that succeeded is proof enough.

        Raises:
            RuntimeError: it does not.
        """
        if self.broken is not None:
            raise RuntimeError(f"the model cannot go on: {self.broken}")
        if time.monotonic() - self.last_success < period:
            return
        side = self.runner.info.side
        job = FaceJob(np.zeros((1, side, side, 3), np.uint8), self.runner.info.template, steps=1)
        try:
            await self.restore(job, time.monotonic() + 60)
        except Overloaded:
            return  # those who wait will tell

    async def close(self) -> None:
        """Refuse what waits, and stop after the step under way."""
        for one in self.line.waiting:
            if not one.answer.done():
                one.answer.set_exception(Overloaded("the service is being shut down; ask again", 1.0))
        if self._work is not None:
            self._work.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- the line ----

    def enqueue(
        self, job: FaceJob, deadline: float, watch: Callable[[int], Callable[[FacePreview], None]] | None = None
    ) -> list[Waiting]:
        """Put a job in line, in as many parts as batches are needed.

        Raises:
            OtherModelError: the faces are not this model's.
            ConfigError: the settings are out of range.
            Overloaded: it could not be done in time.
        """
        info, pipeline = self.runner.info, self.runner.pipeline
        if job.template != info.template or job.faces.shape[1:] != (info.side, info.side, 3) or not len(job.faces):
            raise OtherModelError(info)
        sampling = self.sampling(job)
        pipeline.check_settings(
            sampling.steps, pipeline.preset.sampling.start_step, sampling.condition_scale, sampling.samples
        )
        if self.broken is not None:
            raise Overloaded("the model is being started again", 5.0)
        self.admit(len(job.faces), sampling, deadline)
        loop = asyncio.get_running_loop()
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._batches())
        most = self.runner.most
        waiting = []
        for number, start in enumerate(range(0, len(job.faces), most)):
            faces = job.faces[start : start + most]
            tell = watch(number) if watch is not None else None
            waiting.append(Waiting(faces, sampling, deadline, loop.create_future(), tell))
            self.line.add(waiting[-1])
        self._arrived.set()
        return waiting

    def sampling(self, job: FaceJob) -> Sampling:
        """How a job's faces are restored, with the preset's settings where it has none."""
        own = self.runner.pipeline.preset.sampling
        return Sampling(
            own.num_inference_steps if job.steps is None else job.steps,
            job.seed,
            own.condition_scale if job.condition_scale is None else job.condition_scale,
            job.samples,
        )

    def admit(self, num_faces: int, sampling: Sampling, deadline: float) -> None:
        """Refuse at once what could not be done in time, rather than let it wait for nothing.

        Raises:
            Overloaded: with the time after which there is room.
        """
        self.line.drop_unwanted()
        waiting = sum(len(one.faces) for one in self.line.waiting)
        ahead = self.seconds_ahead()
        cost = num_faces * sampling.cost
        own = self.pace.estimate(cost)
        left = deadline - time.monotonic()
        if waiting and waiting + num_faces > self.most_waiting:
            raise Overloaded(f"{waiting} faces wait for the model already; ask again later", max(1.0, ahead / 2))
        if left <= 0:
            raise DeadlineExceeded("the time for this request ran out before its result was there")
        if own > HOPELESS * left:
            raise DeadlineExceeded(
                f"{num_faces} faces in {sampling.steps} steps, {sampling.samples} times, would take about {own:.0f} s, "
                f"of which {left:.0f} s are left; ask for fewer steps, samples or faces"
            )
        there = [one.sampling for one in self.line.waiting]
        if self._running is not None:
            there.append(self._running[-1])
        cost, company = self.line.cost + cost, ""
        if sampling in there:
            # In a busy time others like it fill up the batch that it will be in, and it comes out when they do.
            batch = self.runner.most * sampling.cost
            cost, company = math.ceil(cost / batch) * batch, " with others in its batch"
        through = MARGIN * (self.seconds_running() + self.pace.estimate(cost))
        if there and through > left:
            raise Overloaded(
                f"the model has {ahead:.0f} s of work before this request, which has {left:.0f} s left and may be "
                f"through after {through:.0f} s{company}; ask again later",
                max(1.0, through - left),
            )

    def seconds_ahead(self) -> float:
        """Of work that was there before, by estimate."""
        return self.seconds_running() + self.pace.estimate(self.line.cost)

    def seconds_running(self) -> float:
        """Until the batch under way is done, by estimate."""
        if self._running is None:
            return 0.0
        since, cost, _ = self._running
        return max(0.0, self.pace.estimate(cost) - (time.monotonic() - since))

    async def _batches(self) -> None:
        """Restore what is in line, batch after batch."""
        while True:
            await self._arrived.wait()
            await self._fill()
            batch = self.line.take(self.runner.most)
            if not batch:
                self._arrived.clear()
                continue
            await self._restore(batch)

    async def _fill(self) -> None:
        """Wait a little for more faces, if the batch would not be full."""
        batch = self.line.fitting(self.runner.most)
        while batch and sum(len(one.faces) for one in batch) < self.runner.most:
            left = batch[0].since + self.batch_wait - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                self._arrived.set()
                return
            batch = self.line.fitting(self.runner.most)

    async def _restore(self, batch: list[Waiting]) -> None:
        """Let the thread restore a batch, and hand the results out."""
        cost, faces = sum(one.cost for one in batch), sum(len(one.faces) for one in batch)
        started = time.monotonic()
        self._running = started, cost, batch[0].sampling
        outcomes: list[Outcome] = []
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self.runner, batch)
        except AbandonedError:
            log.info("%d faces were given up: nobody waits for them any more", faces)
        except BrokenDeviceError as error:
            self.broken = str(error)
            log.error("the device failed: %s", error)
            outcomes = [Overloaded("the model's device failed; it is being started again", 5.0) for _ in batch]
        except Exception as error:  # whatever it is, those who wait must hear of it, and the others go on
            log.exception("a batch of %d faces failed", faces)
            outcomes = [error for _ in batch]
        finally:
            self._running = None
        seconds = time.monotonic() - started
        if any(isinstance(outcome, FaceResult) for outcome in outcomes):
            self.last_success = time.monotonic()
            self.pace.learn(cost, seconds, is_full=faces * 2 > self.runner.most or bool(self.line.waiting))
        for one, outcome in zip(batch, outcomes, strict=False):
            if one.answer.done() or isinstance(outcome, AbandonedError):
                continue
            if isinstance(outcome, FaceResult):
                one.answer.set_result(outcome)
            else:
                one.answer.set_exception(outcome)
