"""The client for programs that wait for each answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self, TypeVar, Unpack

from ldbfr.client.answers import Found, Job, Limits, Model, Preview, Restoration
from ldbfr.client.calls import ImageSource, Options
from ldbfr.client.conversation import Conversation, Open, Read, Steps, Wait
from ldbfr.client.errors import ServerError
from ldbfr.client.retries import DEFAULT_RETRIES, Retries
from ldbfr.client.transport import Line, SyncLine, http_library

Result = TypeVar("Result")


class Client:
    """Asks an endpoint of ldbfr; threads may share it.

    A request that meets a full or restarting server, or a broken connection, is sent again, which is harmless: its seed
    is explicit. No redirect is followed.

        with Client("http://127.0.0.1:8000") as client:
            client.restore("photo.jpg", steps=8).save("better.jpg")

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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._line = Line.to(url, api_key)
        self._talk = Conversation(self._line.url, timeout, retries)
        self._sleep = sleep
        self._http = http_library().Client(follow_redirects=False)

    def __repr__(self) -> str:
        """With the address alone."""
        return f"{type(self).__name__}({self._line.url!r})"

    def restore(self, image: ImageSource, **options: Unpack[Options]) -> Restoration:
        """Restore an image.

        Args:
            image: its bytes, or the path of its file.
            options: see `Options`.

        Raises:
            InputError: the image cannot be read, or the server does not take it.
            ConfigError: nor the options.
            ServerError: it is not there, overloaded, or fails; after the last retry.
        """
        return self._run(self._talk.restore(image, options))

    def stream(self, image: ImageSource, **options: Unpack[Options]) -> Iterator[Preview | Restoration]:
        """Restore an image, with a preview after each step; the last item is the result. Raises as `restore` does."""
        return self._iterate(self._talk.stream(image, options))

    def faces(self, image: ImageSource) -> Found:
        """The faces of a photo; none is restored. Raises as `restore` does."""
        return self._run(self._talk.faces(image))

    def models(self) -> tuple[Model, ...]:
        """What restores."""
        return self._run(self._talk.models())

    def limits(self) -> Limits:
        """What the server takes."""
        return self._run(self._talk.limits())

    def submit_job(self, input: str, output: str, *, faces: str | None = None, format: str | None = None) -> Job:
        """Begin a batch from one place in a bucket to another.

        Args:
            input: s3://bucket/prefix of the images.
            output: s3://bucket/prefix for the results.
            faces: "all", "largest" or "center" of the faces of photos; "none": each image is one aligned face.
            format: of the results; the inputs' when left out.
        """
        return self._run(self._talk.submit_job({"input": input, "output": output, "faces": faces, "format": format}))

    def job(self, id: str) -> Job:
        """How a batch stands."""
        return self._run(self._talk.job(id))

    def jobs(self) -> tuple[Job, ...]:
        """All batches that this server began."""
        return self._run(self._talk.jobs())

    def cancel_job(self, id: str) -> Job:
        """Stop a batch; what is written stays, and the same batch goes on from there."""
        return self._run(self._talk.cancel_job(id))

    def wait_job(self, id: str, *, every: float = 5.0, timeout: float | None = None) -> Job:
        """Wait until a batch ended.

        Args:
            id: of the batch.
            every: seconds between two looks at it.
            timeout: seconds to wait at most.

        Raises:
            ServerError: it has not ended by then.
        """
        return self._run(self._talk.wait_job(id, every, timeout))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    # ---- steps ----

    def _run(self, steps: Steps[Result]) -> Result:
        """Take the steps of a conversation; its result."""
        line, answer = self._new_line(), None
        try:
            while True:
                answer = self._take(line, steps.send(answer))
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            line.close()

    def _iterate(self, steps: Generator[Any, Any, None]) -> Iterator[Preview | Restoration]:
        """Take the steps of a stream; what it gives."""
        line, answer = self._new_line(), None
        try:
            while True:
                step = steps.send(answer)
                answer = None
                if isinstance(step, Preview | Restoration):
                    yield step
                else:
                    answer = self._take(line, step)
        except StopIteration:
            return
        finally:
            line.close()

    def _new_line(self) -> SyncLine:
        """For one request."""
        if self._http.is_closed:
            raise ServerError(f"{self._line.url}: this client is closed; make another")
        return SyncLine(self._http, self._line)

    def _take(self, line: SyncLine, step: object) -> object:
        """One step."""
        match step:
            case Open():
                return line.open(step)
            case Read():
                return line.read()
            case Wait(seconds):
                line.close()
                self._sleep(seconds)
        return None
