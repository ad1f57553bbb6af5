"""A proxy in front of the S3 server that fails as networks and servers do, when it is told to.

A test module names this one in `pytest_plugins` and takes the fixture `faulty_s3`: S3 requests of this process, and of
processes that it starts, then go through the proxy. Without faults it passes everything on.

    faulty_s3.fail(times=2, method="PUT", path="manifest.json")      # answer 500, twice, then no more
    faulty_s3.fail(status=403)                                       # from now on, until clear()
    faulty_s3.cut_upload(1000, path="network/")                      # hang up after 1000 bytes of a request's body
    faulty_s3.cut_download(1000, path="network/")                    # hang up after 1000 bytes of an answer's body
    faulty_s3.lose_answers(method="PUT")                             # do what is asked, then hang up
    faulty_s3.hang(path="lease")                                     # answer nothing until clear() or the test's end
    faulty_s3.refuse()                                               # hang up at once
    faulty_s3.clear()                                                # no faults any more
    faulty_s3.requests                                               # [(method, path)] as they came, retries included

`path` is a part of the percent-decoded path with its query; several faults may stand, the first that fits is taken.
A fault says in `.hits` how often it struck. botocore repeats a failed request four times, in these tests without
waiting in between (in this process; others wait for up to 15 s).

PYTEST_DONT_REWRITE: there is no assertion in here, and test modules import the class beside the fixture.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Literal
from urllib.parse import unquote, urlsplit

import pytest

from ldbfr import storage

Action = Literal["fail", "cut_upload", "cut_download", "lose_answers", "hang", "refuse"]
PIECE = 1 << 16
HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade")


@dataclass
class Fault:
    """What goes wrong, with which requests, how often; see the module."""

    action: Action
    times: int | None = None
    method: str = ""
    path: str = ""
    status: int = 500
    after: int = 0
    hits: int = 0

    def fits(self, method: str, path: str) -> bool:
        """Whether it strikes this request."""
        return self.hits != self.times and self.method in ("", method) and self.path in path


class FaultyProxy(ThreadingHTTPServer):
    """The proxy; listens on a free port of this machine while it is used as a context."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(endpoint).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.cleared = threading.Event()

    def fail(self, times: int | None = None, method: str = "", path: str = "", status: int = 500) -> Fault:
        """Answer with a status, without passing the request on."""
        return self.add(Fault("fail", times, method, path, status=status))

    def cut_upload(self, after: int, times: int | None = None, method: str = "PUT", path: str = "") -> Fault:
        """Hang up after some bytes of a request's body; the server sees nothing of it."""
        return self.add(Fault("cut_upload", times, method, path, after=after))

    def cut_download(self, after: int, times: int | None = None, method: str = "GET", path: str = "") -> Fault:
        """Hang up after some bytes of an answer's body."""
        return self.add(Fault("cut_download", times, method, path, after=after))

    def lose_answers(self, times: int | None = None, method: str = "", path: str = "") -> Fault:
        """Pass the request on, and hang up instead of answering."""
        return self.add(Fault("lose_answers", times, method, path))

    def hang(self, times: int | None = None, method: str = "", path: str = "") -> Fault:
        """Answer nothing, and keep the connection."""
        return self.add(Fault("hang", times, method, path))

    def refuse(self, times: int | None = None, method: str = "", path: str = "") -> Fault:
        """Hang up at once."""
        return self.add(Fault("refuse", times, method, path))

    def add(self, fault: Fault) -> Fault:
        """Let a fault strike from now on."""
        with self.lock:
            self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """End all faults; requests that hang are hung up on."""
        with self.lock:
            self.faults.clear()
            self.cleared.set()
            self.cleared = threading.Event()

    def strike(self, method: str, path: str) -> tuple[Fault | None, threading.Event]:
        """Note a request; the fault that it suffers, and what to wait for while it hangs."""
        with self.lock:
            self.requests.append((method, path))
            fault = next((fault for fault in self.faults if fault.fits(method, path)), None)
            if fault is not None:
                fault.hits += 1
            return fault, self.cleared

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    """Passes one request on, or fails."""

    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def handle_request(self) -> None:
        """Any method."""
        path = unquote(self.path)
        fault, cleared = self.server.strike(self.command, path)
        action = fault.action if fault else ""
        after = fault.after if fault else 0
        if action in ("refuse", "hang"):
            if action == "hang":
                cleared.wait()
            return self.hang_up()
        body = self.read_body(after if action == "cut_upload" else None)
        if body is None:
            return self.hang_up()
        if fault is not None and action == "fail":
            return self.answer(fault.status, {}, b"")
        status, headers, content = self.pass_on(body)
        if action == "lose_answers":
            return self.hang_up()
        self.answer(status, headers, content, after if action == "cut_download" else None)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

    def hang_up(self) -> None:
        """End the connection without another word."""
        self.close_connection = True
        with suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self, cut_after: int | None) -> bytes | None:
        """The request's body, chunks put together; None when as many bytes came as are let through."""
        parts: list[bytes] = []
        read = 0
        for size in self.body_pieces():
            if cut_after is not None and read + size > cut_after:
                self.rfile.read(cut_after - read)
                return None
            parts.append(self.rfile.read(size))
            read += size
        return None if cut_after is not None else b"".join(parts)

    def body_pieces(self) -> Iterator[int]:
        """Sizes of what is to be read from the connection next."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            yield from (min(PIECE, length - start) for start in range(0, length, PIECE))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield size
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # what follows the last chunk

    def pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Ask the server: its status, headers and content."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        headers.pop("Expect", None)
        headers["Content-Length"] = str(len(body))
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            upstream.close()

    def answer(self, status: int, headers: dict[str, str], content: bytes, cut_after: int | None = None) -> None:
        """Send an answer, or only the first bytes of its content."""
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in (*HOP_BY_HOP, "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        with suppress(OSError):  # the client was faster
            self.wfile.write(content if cut_after is None else content[:cut_after])
            self.wfile.flush()
        if cut_after is not None and len(content) > cut_after:
            time.sleep(0.01)
            self.hang_up()


@pytest.fixture
def faulty_s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The proxy, through which all S3 requests go; URIs below `s3_root` mean the same as without it."""
    import botocore.endpoint

    # The module's own name for `time`, so that nobody else's sleep is cut short.
    monkeypatch.setattr(botocore.endpoint, "time", SimpleNamespace(sleep=lambda _seconds: None))
    with FaultyProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage._s3_client.cache_clear()
        yield proxy
        storage._s3_client.cache_clear()  # the next test's client is made for the server itself
