"""A real HTTP server that answers as a script says: what an endpoint does when things go wrong."""

from __future__ import annotations

import base64
import json
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ldbfr.images import encode_image
from tests import tiny

PNG = encode_image(tiny.blob_faces(1)[0], "png")
JPEG = encode_image(tiny.blob_faces(1)[0], "jpeg")


@dataclass(frozen=True)
class Asked:
    """A request that came in."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


class Handler(BaseHTTPRequestHandler):
    """Answers with the script's next answer; the last one stays."""

    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def answer(self) -> None:
        """Note the request, and answer it."""
        length = int(self.headers.get("Content-Length") or 0)
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, parts.path, parse_qs(parts.query), headers, self.rfile.read(length))
        self.server.next_answer(asked)(self)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def say(self, status: int, body: bytes, **headers: str) -> None:
        """A whole answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def drop(self) -> None:
        """Break the connection off, as a process that is killed does."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


Reply = Callable[[Handler], None]


class ScriptedServer(ThreadingHTTPServer):
    """The server, and what it was asked."""

    daemon_threads = True

    def __init__(self, script: Sequence[Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.lock = list(script), list[Asked](), Lock()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_answer(self, asked: Asked) -> Reply:
        """The script's next line."""
        with self.lock:
            self.asked.append(asked)
            return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that a test broke off is no news."""


@contextmanager
def serving(*script: Reply) -> Iterator[ScriptedServer]:
    """A server that answers so."""
    server = ScriptedServer(script)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---- answers ----


def as_json(value: object, status: int = 200, **headers: str) -> Reply:
    """JSON."""
    return lambda handler: handler.say(
        status, json.dumps(value).encode(), **{"Content_Type": "application/json"} | headers
    )


def raw(status: int, body: bytes, **headers: str) -> Reply:
    """Anything."""
    return lambda handler: handler.say(status, body, **headers)


def problem_of(status: int, slug: str, detail: str = "so it is", **more: object) -> dict[str, object]:
    """Problem details."""
    return {"type": f"/problems/{slug}", "title": slug, "status": status, "detail": detail, "request_id": "r1", **more}


def problem(status: int, slug: str, detail: str = "so it is", *, retry_after: str | None = None, **more: Any) -> Reply:
    """A refusal."""
    headers = {"Content_Type": "application/problem+json"} | ({"Retry_After": retry_after} if retry_after else {})
    return as_json(problem_of(status, slug, detail, **more), status, **headers)


def drop(handler: Handler) -> None:
    """No answer at all."""
    handler.drop()


def half(handler: Handler) -> None:
    """The beginning of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"image":')
    handler.drop()


def restored_of(**changes: object) -> dict[str, object]:
    """The JSON of a restoration."""
    return {
        "image": base64.b64encode(PNG).decode(),
        "media_type": "image/png",
        "width": tiny.SIDE,
        "height": tiny.SIDE,
        "seed": 0,
        "weights_digest": "d" * 64,
        "faces": [{"box": [1, 2, 3, 4], "score": 0.9}],
        "samples": [],
        "uncertainty": None,
        "timings": {"model": 0.5},
        "notes": "",
        **changes,
    }


def restored(**changes: object) -> Reply:
    """A restoration."""
    return as_json(restored_of(**changes), X_Request_Id="r7")


def preview_of(step: int) -> dict[str, object]:
    """A preview on its way."""
    return {"step": step, "steps": 2, "image": base64.b64encode(JPEG).decode()}


@dataclass(frozen=True)
class Events:
    """A stream of events, which may break off."""

    events: Sequence[tuple[str, object]]
    breaks_off: bool = False
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream", "X-Request-Id": "r9"})

    def __call__(self, handler: Handler) -> None:
        """Send them, in chunks that cut lines anywhere."""
        handler.send_response(200)
        for name, value in {**self.headers, "Transfer-Encoding": "chunked"}.items():
            handler.send_header(name, value)
        handler.end_headers()
        text = ": keep-alive\n\n"
        for name, value in self.events:
            text += f"event: {name}\r\ndata: {json.dumps(value)}\r\n\r\n"
        body = text.encode()
        for start in range(0, len(body), 701):
            piece = body[start : start + 701]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if self.breaks_off:
            handler.drop()
        else:
            handler.wfile.write(b"0\r\n\r\n")
