"""Around every request: its id, its log line, its metrics and trace, the security headers, and the last resort."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.bodies import drain
from serve.headers import security_headers
from serve.observability import Metrics
from serve.problems import Problem

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

log = logging.getLogger("serve.requests")

CLIENT_GONE = 499
"""What the log and the metrics say of a request whose client went away; nobody reads it."""

SEND_SECONDS = 30.0
"""In which a client must take the next part of an answer; one that does not read is as good as gone."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Requests:
    """ASGI middleware; see the module.

    A well-formed X-Request-Id is taken over. `state.held` is an ExitStack that is closed when the answer has been
    sent, however it ended.

    Args:
        app: whose requests these are.
        metrics: to count in.
        tracer: for a span of every request, if any.
        echo_id: whether answers get X-Request-Id here; Ray Serve's proxy adds one of its own.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracer | None = None, echo_id: bool = True) -> None:
        self.app, self.metrics, self.tracer, self.echo_id = app, metrics, tracer, echo_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self.echo_id)
        with ExitStack() as held, self.metrics.in_progress.track_inprogress():
            scope["state"] = {**scope.get("state", {}), "request_id": exchange.id, "held": held}
            if self.tracer is not None:
                held.enter_context(server_span(self.tracer, exchange))
            try:
                await exchange.run(self.app)
            finally:
                self._account(exchange)

    def _account(self, exchange: Exchange) -> None:
        seconds = time.monotonic() - exchange.started
        state, route = exchange.scope["state"], exchange.route
        method = exchange.scope["method"] if exchange.scope["method"] in _METHODS else "other"
        self.metrics.requests.labels(method, route, str(exchange.status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        if problem := state.get("problem"):
            self.metrics.problems.labels(problem).inc()
        about = {
            "request_id": exchange.id,
            "method": method,
            "route": route,
            "status": exchange.status,
            "seconds": round(seconds, 4),
            "bytes_in": exchange.bytes_in,
            "bytes_out": exchange.bytes_out,
            "key": state.get("key"),
            "problem": problem,
            **state.get("noted", {}),
        }
        level = logging.DEBUG if route in ("/healthz", "/readyz", "/metrics") else logging.INFO
        log.log(level, "request", extra={name: value for name, value in about.items() if value is not None})


class Exchange:
    """One request and its answer, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, echo_id: bool) -> None:
        self.scope, self._receive, self._send, self.echo_id = scope, receive, send, echo_id
        headers = Headers(scope=scope)
        self.id = request_id(headers.get("x-request-id"))
        self.started = time.monotonic()
        self.status, self.bytes_in, self.bytes_out = CLIENT_GONE, 0, 0
        self.answering = self.answered = False
        length = headers.get("content-length", "0")
        self.body_is_read = "transfer-encoding" not in headers and length.strip("0") == ""

    @property
    def route(self) -> str:
        """The route's template, such as /v1/jobs/{id}: its values stay out of logs and metrics."""
        return getattr(self.scope.get("route"), "path", None) or "none"

    async def run(self, app: ASGIApp) -> None:
        """Let the application answer; what it did not foresee is logged, and answered with problem internal."""
        try:
            await app(self.scope, self.receive, self.send)
        except ClientDisconnect:
            self.status = CLIENT_GONE
        except Exception as error:
            log.exception("request failed", extra={"request_id": self.id, "route": self.route})
            if self.answering and not self.answered:
                raise  # the server breaks the connection off, so the client sees that something is missing
            if not self.answering:
                request = Request(self.scope, self.receive)
                await Problem.of(error).response(request)(self.scope, self.receive, self.send)

    async def receive(self) -> Message:
        """The next part of the request."""
        message = await self._receive()
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
            self.body_is_read = self.body_is_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            self.answering, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            if self.echo_id:
                headers["X-Request-Id"] = self.id
            for name, value in security_headers(self.scope["path"]).items():
                headers.setdefault(name, value)
            if not self.body_is_read and self.scope.get("http_version", "1.1").startswith("1"):
                headers["Connection"] = "close"
        elif message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.answered = True
                if not self.body_is_read:
                    await self._pass_on({**message, "more_body": True})
                    await drain(self.receive)
                    message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send(message)
        except TimeoutError:
            raise ClientDisconnect from None


def request_id(given: str | None) -> str:
    """The id that a client gave, if it is well-formed, or a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


@contextmanager
def server_span(tracer: Tracer, exchange: Exchange) -> Iterator[None]:
    """A span, the child of the client's (traceparent), until the answer is sent."""
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind, StatusCode

    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.scope["headers"]}
    with tracer.start_as_current_span(exchange.scope["method"], extract(carrier), SpanKind.SERVER) as span:
        try:
            yield
        finally:
            span.update_name(f"{exchange.scope['method']} {exchange.route}")
            span.set_attributes(
                {
                    "http.request.method": exchange.scope["method"],
                    "http.route": exchange.route,
                    "http.response.status_code": exchange.status,
                    "ldbfr.request_id": exchange.id,
                    **{f"ldbfr.{name}": value for name, value in exchange.scope["state"].get("noted", {}).items()},
                }
            )
            if exchange.status >= 500:
                span.set_status(StatusCode.ERROR)
