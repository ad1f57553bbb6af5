"""What is said to a server and when, without any input or output: a generator asks for each step, a client takes it.

So the synchronous and the asynchronous client cannot differ in what they do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ldbfr.client import calls
from ldbfr.client.answers import (
    Answer,
    Found,
    Job,
    Jobs,
    Limits,
    MalformedAnswerError,
    Model,
    Models,
    Preview,
    Restoration,
    parse,
)
from ldbfr.client.calls import Call, ImageSource, read_image
from ldbfr.client.errors import ServerError, UnreachableError, error_of
from ldbfr.client.events import EventParser, EventTooLongError
from ldbfr.client.retries import REFUSED_UNSEEN, RETRIED, Retries
from ldbfr.errors import ConfigError

MOST_ANSWER = 2**30
"""Bytes of an answer: eight samples of the largest photo would be about as many."""
SILENCE_SECONDS = 45.0
"""A stream that says nothing for so long is dead: a server sends a sign of life every 10 s."""

Kind = TypeVar("Kind", bound=Answer)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Open:
    """Send a request and read the answer's head; gives a Head, or a Failure."""

    call: Call
    seconds: float
    """Most for the whole answer."""
    silence: float
    """Most without a byte."""


@dataclass(frozen=True)
class Read:
    """Read on; gives some bytes, none at the end, or a Failure."""


@dataclass(frozen=True)
class Wait:
    """Close what is open, and do nothing for some seconds."""

    seconds: float


@dataclass(frozen=True)
class Head:
    """The beginning of an answer; names of headers have small letters."""

    status: int
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Failure:
    """There is no answer, or no rest of it.

    Args:
        error: why.
        lasting: whether trying again is no use.
        unsent: whether the server cannot have got the request.
    """

    error: UnreachableError
    lasting: bool = False
    unsent: bool = False


Step = Open | Read | Wait
Steps = Generator[Step, Any, Result]
"""Asks for steps, ends with a result."""


@dataclass(frozen=True)
class Conversation:
    """All that can be asked of a server.

    Args:
        url: its address.
        timeout: seconds for a request, from its first try to the end of its answer.
        retries: when it is tried again.
        most_answer: bytes of an answer.
    """

    url: str
    timeout: float
    retries: Retries
    most_answer: int = MOST_ANSWER

    def __post_init__(self) -> None:
        """Refuse a time that is none.

        Raises:
            ConfigError: naming it.
        """
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"timeout {self.timeout:g}: expected seconds above 0; 300 is the default")

    # ---- what is asked ----

    def restore(self, image: ImageSource, options: Mapping[str, Any]) -> Steps[Restoration]:
        """A restored image."""
        return self._restore(calls.restoration(read_image(image), options))

    def _restore(self, call: Call) -> Steps[Restoration]:
        head, body = yield from self.ask(call)
        return self.restoration(head, body)

    def faces(self, image: ImageSource) -> Steps[Found]:
        """The faces of a photo."""
        return self.get(calls.faces(read_image(image)), Found)

    def models(self) -> Steps[tuple[Model, ...]]:
        """What restores."""
        return (yield from self.get(calls.models(), Models)).models

    def limits(self) -> Steps[Limits]:
        """What is taken."""
        return self.get(calls.limits(), Limits)

    def submit_job(self, values: Mapping[str, Any]) -> Steps[Job]:
        """A batch that was begun."""
        return self.get(calls.new_job(values), Job)

    def jobs(self) -> Steps[tuple[Job, ...]]:
        """All batches."""
        return (yield from self.get(calls.jobs(), Jobs)).jobs

    def job(self, id: str) -> Steps[Job]:
        """How a batch stands."""
        return self.get(calls.job(id), Job)

    def cancel_job(self, id: str) -> Steps[Job]:
        """A batch that was stopped: how it stands."""
        yield from self.ask(calls.cancelled_job(id))
        return (yield from self.job(id))

    def wait_job(self, id: str, every: float, timeout: float | None) -> Steps[Job]:
        """A batch that ended."""
        started = self.retries.clock()
        while True:
            job = yield from self.job(id)
            if job.is_finished:
                return job
            if timeout is not None and self.retries.clock() + every - started > timeout:
                raise ServerError(f"{self.url}: job {id} is {job.status} after {timeout:g} s; wait for it longer")
            yield Wait(every)

    # ---- one answer ----

    def get(self, call: Call, kind: type[Kind]) -> Steps[Kind]:
        """An answer of a kind."""
        head, body = yield from self.ask(call)
        return self.parse(kind, head, body)

    def ask(self, call: Call) -> Steps[tuple[Head, bytes]]:
        """The answer to a request, tried as often as may be.

        Raises:
            ServerError: the last try's.
        """
        turn = Turn(self, call)
        while True:
            head = yield turn.open()
            if isinstance(head, Head):
                body = yield from self.rest(turn)
                if isinstance(body, bytes) and 200 <= head.status < 300:
                    return head, body
                yield turn.again(body if isinstance(body, Failure) else self.refusal(head, body))
            else:
                yield turn.again(head)

    def rest(self, turn: Turn) -> Steps[bytes | Failure]:
        """The rest of an answer."""
        body = bytearray()
        while True:
            piece = yield Read()
            if isinstance(piece, Failure) or not piece:
                return piece if isinstance(piece, Failure) else bytes(body)
            body += piece
            turn.check()
            if len(body) > self.most_answer:
                raise ServerError(f"{self.url} answers with more than {self.most_answer:,} bytes; ask for less")

    # ---- a stream ----

    def stream(
        self, image: ImageSource, options: Mapping[str, Any]
    ) -> Generator[Step | Preview | Restoration, Any, None]:
        """Previews, and at the end the result."""
        return self._stream(calls.restoration_stream(read_image(image), options))

    def _stream(self, call: Call) -> Generator[Step | Preview | Restoration, Any, None]:
        """A stream that breaks off is begun anew; what was shown already is not shown again."""
        turn, shown = Turn(self, call), -1
        while True:
            head = yield turn.open(SILENCE_SECONDS)
            failed: Failure | ServerError | None = None
            if not isinstance(head, Head):
                failed = head
            elif head.status != 200:
                body = yield from self.rest(turn)
                failed = body if isinstance(body, Failure) else self.refusal(head, body)
            else:
                parser = EventParser(self.most_answer)
                while failed is None:
                    piece = yield Read()
                    turn.check()
                    if isinstance(piece, Failure):
                        failed = piece
                        break
                    if not piece:
                        failed = Failure(UnreachableError(f"{self.url} ended the stream before its result"))
                        break
                    for item in self.items(parser, piece, head):
                        if isinstance(item, ServerError):
                            failed = item
                            break
                        if isinstance(item, Preview) and item.step > shown:
                            shown = item.step
                            yield item
                        elif isinstance(item, Restoration):
                            yield item
                            return
            yield turn.again(failed)

    def items(
        self, parser: EventParser, piece: bytes, head: Head
    ) -> Generator[Preview | Restoration | ServerError, None, None]:
        """What a piece of a stream says; events of other names are passed over."""
        if not head.headers.get("content-type", "").startswith("text/event-stream"):
            raise self.garbage(head, "it is no stream of events")
        try:
            for event in parser.feed(piece):
                if event.name == "preview":
                    yield self.parse(Preview, head, event.data)
                elif event.name == "result":
                    yield self.restoration(head, event.data)
                elif event.name == "error":
                    yield self.problem(head, event.data)
        except EventTooLongError as error:
            raise self.garbage(head, str(error)) from error

    def problem(self, head: Head, data: str) -> ServerError:
        """An error that came in a stream."""
        status = self.parse(Problem, head, data).status
        return self.refusal(Head(status, {**head.headers, "content-type": "application/problem+json"}), data.encode())

    # ---- what an answer is ----

    def restoration(self, head: Head, body: bytes | str) -> Restoration:
        """A result, with its request's id."""
        found = self.parse(Restoration, head, body)
        return found.model_copy(update={"request_id": head.headers.get("x-request-id")})

    def refusal(self, head: Head, body: bytes) -> ServerError:
        """What an answer without success means."""
        return error_of(self.url, head.status, head.headers, body, time.time())

    def parse(self, kind: type[Kind], head: Head, body: bytes | str) -> Kind:
        """An answer of a kind.

        Raises:
            ServerError: it is none.
        """
        try:
            return parse(kind, body)
        except MalformedAnswerError as error:
            raise self.garbage(head, str(error)) from error

    def garbage(self, head: Head, why: str) -> ServerError:
        """An answer that says success, and is not what it should be."""
        return ServerError(
            f"{self.url} answers {head.status} with something else than was asked for ({why}); is this an endpoint of "
            "ldbfr, and of this version?",
            status=head.status,
            request_id=head.headers.get("x-request-id"),
        )


class Problem(Answer):
    """Of problem details what a stream needs."""

    status: int


class Turn:
    """The tries of one request.

    Args:
        talk: to whom.
        call: the request.
    """

    def __init__(self, talk: Conversation, call: Call) -> None:
        self.talk, self.call = talk, call
        self.retries = talk.retries
        self.until = self.retries.clock() + talk.timeout
        self.tries = 0
        self.last: ServerError | None = None

    def open(self, silence: float | None = None) -> Open:
        """The next try."""
        left = max(0.001, self.until - self.retries.clock())
        self.tries += 1
        return Open(self.call, left, left if silence is None else min(silence, left))

    def again(self, failed: Failure | ServerError) -> Wait:
        """What to wait for before the next try.

        Raises:
            ServerError: there is none, because it would be no use, there were enough, or the time does not suffice.
        """
        error = failed.error if isinstance(failed, Failure) else failed
        error.attempts = self.tries
        self.last = error
        if not self.is_worth(failed) or self.tries > self.retries.max_retries:
            raise error
        seconds = self.retries.wait(self.tries - 1, error.retry_after)
        if self.retries.clock() + seconds >= self.until:
            raise error
        return Wait(seconds)

    def is_worth(self, failed: Failure | ServerError) -> bool:
        """Whether another try may succeed, and do no harm."""
        if isinstance(failed, Failure):
            return not failed.lasting and (self.call.repeatable or failed.unsent)
        return failed.status in (RETRIED if self.call.repeatable else REFUSED_UNSEEN)

    def check(self) -> None:
        """Raise if the time is over.

        Raises:
            UnreachableError: it is.
        """
        if self.retries.clock() >= self.until:
            error = UnreachableError(
                f"{self.talk.url} did not finish its answer within {self.talk.timeout:g} s; allow a longer timeout"
            )
            error.attempts = self.tries
            raise error from self.last
