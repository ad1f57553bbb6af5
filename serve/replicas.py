"""The model as a deployment of Ray Serve, and how other processes ask it.

Errors that a client is to see go from process to process as values: raised, Ray would wrap them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ray.exceptions import ObjectLostError, RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.util.metrics import Histogram

from ldbfr.errors import LDBFRError
from serve.deployment import DeploymentSettings
from serve.observability import log_as_json
from serve.parts import until
from serve.protocol import DeadlineExceeded, FaceJob, FacePreview, FaceResult, ModelInfo, Overloaded

if TYPE_CHECKING:
    from serve.model import LocalFaceModel

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 2
"""A request whose replica dies is sent to another one, once."""
INFO_SECONDS = 5.0
"""In which a replica that works says what it is."""
LAST_SECONDS = 0.25
"""Before its deadline a request has no use for a replica any more, and it may be said why it was not answered."""
RETRY_SECONDS = 2.0
"""After which it is worth asking again when a replica was lost: the others have taken over by then."""

LOST = (RayActorError, ObjectLostError, TaskCancelledError, DeploymentUnavailableError)
"""What a request meets when its replica dies, or there is none. We ourselves cancel only what we wait for no more."""


class Due(NamedTuple):
    """A deadline on its way to another machine: how much time was left, and when that was, by the clock on the wall."""

    left: float
    then: float

    @classmethod
    def of(cls, deadline: float) -> Due:
        """Of a deadline in this process's `time.monotonic()`."""
        return cls(deadline - time.monotonic(), time.time())

    @classmethod
    def early(cls, deadline: float) -> Due:
        """For a replica: so early that it can say itself that the time is up, before it is not listened to any more."""
        return cls.of(deadline - 2 * LAST_SECONDS)

    def here(self) -> float:
        """The same in this process; a clock that is late does not give more time."""
        return time.monotonic() + self.left - max(0.0, time.time() - self.then)


class FaceModelReplica:
    """One copy of the model, in a process of its own.

    Args:
        settings: of the endpoint.
    """

    def __init__(self, settings: DeploymentSettings) -> None:
        from serve.model import LocalFaceModel  # torch takes memory and time, which the ingress can do without

        log_as_json()
        self.period = settings.health_check_seconds
        self.model = LocalFaceModel.load(
            settings.weights,
            device=settings.device,
            threads=settings.torch_threads,
            batch_faces=settings.batch_faces,
            batch_wait=settings.batch_wait_seconds,
        )
        faces = [2**power for power in range(9)]
        seconds = [0.001 * 2**power for power in range(17)]
        self.faces = Histogram("ldbfr_serve_batch_faces", "Faces in the batch of a request", faces)
        self.queue = Histogram("ldbfr_serve_queue_seconds", "That a request waited for its batch", seconds)
        self.seconds = Histogram("ldbfr_serve_model_seconds", "That the batch of a request took", seconds)

    async def info(self) -> ModelInfo:
        """About the model."""
        return await self.model.info()

    async def restore(self, job: FaceJob, due: Due) -> FaceResult | LDBFRError:
        """Restore faces; see `FaceModel`."""
        try:
            result = await self.model.restore(job, due.here())
        except LDBFRError as error:
            end_if_broken(self.model)
            return error
        self.observe(result)
        return result

    async def stream(self, job: FaceJob, due: Due) -> AsyncIterator[FacePreview | FaceResult | LDBFRError]:
        """Restore faces, with previews; see `FaceModel`."""
        try:
            async with aclosing(self.model.stream(job, due.here())) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, FaceResult):
                        self.observe(event)
                    yield event
        except LDBFRError as error:
            end_if_broken(self.model)
            yield error

    def observe(self, result: FaceResult) -> None:
        """Count a result in the metrics, which Ray exports."""
        self.faces.observe(result.batch_faces)
        self.queue.observe(result.queue_seconds)
        self.seconds.observe(result.model_seconds)

    async def check_health(self) -> None:
        """Called by Serve, which starts a replica anew whose check fails.

        Raises:
            RuntimeError: the model does not work.
        """
        try:
            await self.model.check(self.period)
        finally:
            end_if_broken(self.model)

    async def __del__(self) -> None:
        """Called by Serve at the end, once the requests under way are done."""
        if hasattr(self, "model"):
            await self.model.close()


class RayFaceModel:
    """A `FaceModel` that asks the replicas of a deployment.

    Args:
        handle: of the deployment of `FaceModelReplica`.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle
        self.known: ModelInfo | None = None
        self.heard = float("-inf")
        """When a replica answered last."""
        self._asking: asyncio.Task[ModelInfo] | None = None

    async def info(self) -> ModelInfo:
        """About the model; what was heard a moment ago is not asked again, so that a full queue does not matter.

        Raises:
            Overloaded: no replica answers.
        """
        if self.known is not None and time.monotonic() - self.heard <= INFO_SECONDS:
            return self.known
        if self._asking is None or self._asking.done():  # whoever comes meanwhile waits for the same answer
            self._asking = asyncio.create_task(self._learn())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, if all have gone
        return await asyncio.shield(self._asking)

    async def _learn(self) -> ModelInfo:
        """Ask what the model is, unless all are too busy to say and it is known already; see `info`."""
        begun = time.monotonic()
        try:
            known: ModelInfo = await self._ask(begun + INFO_SECONDS, lambda: self.handle.info.remote())
        except (Overloaded, DeadlineExceeded):
            if self.known is None or self.heard < begun:
                raise
            return self.known
        self.known = known
        return known

    async def restore(self, job: FaceJob, deadline: float) -> FaceResult:
        """Restore faces; see `FaceModel`."""
        answer: FaceResult | LDBFRError = await self._ask(
            deadline, lambda: self.handle.restore.remote(job, Due.early(deadline))
        )
        if isinstance(answer, LDBFRError):
            raise answer
        self.known = answer.model
        return answer

    async def stream(self, job: FaceJob, deadline: float) -> AsyncIterator[FacePreview | FaceResult]:
        """Restore faces, with previews; see `FaceModel`. If a replica dies, another one begins anew."""
        begun = time.monotonic()
        for attempt in range(ATTEMPTS):
            responses, is_over = None, False
            try:
                responses = self._stream(job, deadline)
                while not is_over:
                    event = await until(deadline - LAST_SECONDS, following(responses))
                    self.heard = time.monotonic()
                    is_over = not isinstance(event, FacePreview)
                    if isinstance(event, LDBFRError):
                        raise event
                    if isinstance(event, FaceResult):
                        self.known = event.model
                    yield event
                return
            except LOST as error:
                is_over = True
                give_up(error, attempt)
            except BackPressureError as error:
                is_over = True  # to cancel it would raise the error once more
                raise self._busy() from error
            except DeadlineExceeded as error:
                raise self._late(error, begun) from error
            finally:
                if responses is not None and not is_over:
                    responses.cancel()

    async def _ask(self, deadline: float, call: Callable[[], Any]) -> Any:
        """Call a replica, and another one if it dies.

        Raises:
            Overloaded: no room, or the second one died too.
            DeadlineExceeded: the time is up.
        """
        begun = time.monotonic()
        for attempt in range(ATTEMPTS):
            response, is_over = None, False
            try:
                response = call()
                answer = await until(deadline - LAST_SECONDS, awaited(response))
                is_over, self.heard = True, time.monotonic()
                return answer
            except LOST as error:
                is_over = True
                give_up(error, attempt)
            except BackPressureError as error:
                is_over = True  # to cancel it would raise the error once more
                raise self._busy() from error
            except DeadlineExceeded as error:
                raise self._late(error, begun) from error
            finally:
                if response is not None and not is_over:
                    response.cancel()
        raise AssertionError("the last attempt gives up")

    def _stream(self, job: FaceJob, deadline: float) -> DeploymentResponseGenerator[Any]:
        """Ask for a stream."""
        responses = self.handle.options(stream=True).stream.remote(job, Due.early(deadline))
        assert isinstance(responses, DeploymentResponseGenerator)
        return responses

    def _busy(self) -> Overloaded:
        """What to say when there is no room; a full queue is a sign of life too."""
        self.heard = time.monotonic()
        return Overloaded("all copies of the model are busy, and enough requests wait; ask again")

    def _late(self, error: DeadlineExceeded, begun: float) -> LDBFRError:
        """What to say when the time is up: whether the request took too long, or there was nobody to take it."""
        if self.heard >= begun:
            return error
        return Overloaded("no copy of the model answered in time; ask again", RETRY_SECONDS)


def end_if_broken(model: LocalFaceModel) -> None:
    """End this process if the model's device failed: whoever asked goes to another replica at once.

    Serve would wait for several failed checks, and a replica that refuses everything is free for ever more requests.
    """
    if model.broken is not None:
        log.critical("the device failed, so this replica ends: %s", model.broken)
        logging.shutdown()
        os._exit(1)


def give_up(error: Exception, attempt: int) -> None:
    """Note that a replica is gone.

    Raises:
        Overloaded: this was the last attempt.
    """
    log.warning("a replica of the model was lost (%s)", type(error).__name__)
    if attempt + 1 == ATTEMPTS:
        text = "the copies of the model that had this request were lost; ask again"
        raise Overloaded(text, RETRY_SECONDS) from error


async def awaited(response: Awaitable[T]) -> T:
    """What a response comes to."""
    return await response


async def following(responses: AsyncIterator[T]) -> T:
    """The next of several."""
    return await responses.__anext__()
