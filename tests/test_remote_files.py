"""Files that others publish: downloaded once, checked always, and never half there."""

import hashlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldbfr import weights
from ldbfr.errors import WeightsError
from ldbfr.weights import RemoteFile, download, find_file

CONTENT = bytes(range(256)) * 300


class Server(ThreadingHTTPServer):
    """A publisher's server on this machine: what it has, how it fails, and what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.status, self.closes_after = CONTENT, 200, None
        self.requests: list[str] = []
        self.gate: threading.Barrier | None = None

    @property
    def file(self) -> RemoteFile:
        """What it says it publishes."""
        return RemoteFile(
            name="net.onnx",
            size=len(CONTENT),
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            url=f"http://127.0.0.1:{self.server_port}/net.onnx",
            variable="LDBFR_TEST_NET",
            about="the network of a test",
        )


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.server.gate is not None:
            self.server.gate.wait(timeout=20)
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("Location", "/elsewhere")
            self.server.status = 200
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.closes_after])

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that does not exist yet, and nothing of this machine's environment."""
    folder = tmp_path / "some" / "cache"
    monkeypatch.setenv("LDBFR_CACHE", str(folder))
    for name in ("LDBFR_OFFLINE", "LDBFR_TEST_NET", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


def left_in(cache: Path) -> list[str]:
    """Everything in the cache, hidden or not."""
    return sorted(path.name for path in cache.rglob("*"))


def refused(file: RemoteFile, cache: Path, text: str) -> None:
    """An error that says what is wrong and how to supply the file, and nothing of the file in the cache."""
    with pytest.raises(WeightsError, match=rf"(?s){text}.*supply net\.onnx") as caught:
        find_file(file)
    message = str(caught.value)
    for part in (str(file.url), file.sha256, f"{file.size:,} bytes", str(cache), "$LDBFR_TEST_NET"):
        assert part in message
    assert left_in(cache) == []


def test_downloads_once(server: Server, cache: Path) -> None:
    path = find_file(server.file)
    assert path == cache / "net.onnx"
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o644
    written = path.stat().st_mtime_ns
    assert find_file(server.file) == path
    assert server.requests == ["/net.onnx"]
    assert path.stat().st_mtime_ns == written
    assert left_in(cache) == ["net.onnx"]


def test_redirections_are_followed(server: Server) -> None:
    server.status = 302
    assert find_file(server.file).read_bytes() == CONTENT
    assert server.requests == ["/net.onnx", "/elsewhere"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (CONTENT[:-1], r"gave 76,799 bytes that are not the network of a test"),
        (CONTENT + b"!", r"gave more than 76,800 bytes"),
        (CONTENT * 40, r"gave more than 76,800 bytes"),
        (b"?" + CONTENT[1:], r"gave 76,800 bytes that are not the network of a test"),
        (b"<html>Please log in</html>", r"gave 26 bytes"),
        (b"", r"gave 0 bytes"),
    ],
    ids=["short", "long", "huge", "changed", "page", "empty"],
)
def test_another_file_is_refused(content: bytes, text: str, server: Server, cache: Path) -> None:
    server.content = content
    refused(server.file, cache, text)
    server.content = CONTENT
    assert find_file(server.file).read_bytes() == CONTENT, "the next try succeeds"


@pytest.mark.parametrize("count", [0, 1, 70_000, len(CONTENT) - 1])
def test_a_server_that_closes_early(count: int, server: Server, cache: Path) -> None:
    server.closes_after = count
    refused(server.file, cache, "the network of a test")


@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
def test_a_server_that_says_no(status: int, server: Server, cache: Path) -> None:
    server.status = status
    refused(server.file, cache, rf"the network of a test could not be downloaded \(HTTP Error {status}")


def test_no_server_at_all(server: Server, cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}/net.onnx"
        refused(replace(server.file, url=nowhere), cache, "could not be downloaded .*refused")


@pytest.mark.parametrize(
    "reply",
    [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"],
    ids=["nothing", "no web server", "cut in a chunk"],
)
def test_a_server_that_answers_badly(reply: bytes, server: Server, cache: Path) -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(answer, listener)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/net.onnx"
        refused(replace(server.file, url=url), cache, "the network of a test could not be downloaded")


def test_a_server_that_stops_in_the_middle(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection over which nothing comes any more is given up."""
    monkeypatch.setattr(weights, "DOWNLOAD_TIMEOUT_S", 0.1)
    server.gate = threading.Barrier(2)
    refused(server.file, cache, "could not be downloaded .*timed out")
    server.gate.abort()


@pytest.mark.parametrize("damaged", [b"", CONTENT[:100], b"?" + CONTENT[1:], CONTENT + b"?"])
def test_a_damaged_file_in_the_cache_is_replaced(damaged: bytes, server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "net.onnx").write_bytes(damaged)
    assert find_file(server.file).read_bytes() == CONTENT
    assert left_in(cache) == ["net.onnx"]
    assert len(server.requests) == 1


def test_a_file_that_somebody_put_into_the_cache_is_taken(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "net.onnx").write_bytes(CONTENT)
    assert find_file(server.file) == cache / "net.onnx"
    assert server.requests == []


def test_named_files_win(server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The given path before the environment's before the cache; they are taken as they are."""
    given, named = tmp_path / "given.onnx", tmp_path / "named.onnx"
    given.write_bytes(b"given")
    named.write_bytes(b"named")
    monkeypatch.setenv("LDBFR_TEST_NET", str(named))
    assert find_file(server.file, str(given)) == given
    assert find_file(server.file) == named
    monkeypatch.setenv("LDBFR_TEST_NET", "")
    assert find_file(server.file) == cache / "net.onnx"
    assert len(server.requests) == 1


def test_named_files_that_are_missing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names a file means that one: nothing else is taken in its place."""
    nowhere = tmp_path / "nowhere.onnx"
    with pytest.raises(WeightsError, match=r"the given path .*nowhere\.onnx: no such file; supply net\.onnx"):
        find_file(server.file, nowhere)
    with pytest.raises(WeightsError, match=r"the given path .*: no such file; supply net\.onnx"):
        find_file(server.file, tmp_path)
    monkeypatch.setenv("LDBFR_TEST_NET", str(nowhere))
    with pytest.raises(WeightsError, match=r"\$LDBFR_TEST_NET .*nowhere\.onnx: no such file; supply net\.onnx"):
        find_file(server.file)
    assert server.requests == []


def test_offline(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDBFR_OFFLINE", "1")
    refused(server.file, cache, r"is not on this machine, and \$LDBFR_OFFLINE forbids downloads")
    assert server.requests == []
    assert not cache.exists()
    cache.mkdir(parents=True)
    (cache / "net.onnx").write_bytes(CONTENT)
    assert find_file(server.file) == cache / "net.onnx", "what is there may be used"


def test_two_at_once(server: Server, cache: Path) -> None:
    """Both download, both succeed, and the cache has one whole file."""
    server.gate = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(find_file, [server.file] * 2))
    assert paths == [cache / "net.onnx"] * 2
    assert len(server.requests) == 2
    assert paths[0].read_bytes() == CONTENT
    assert left_in(cache) == ["net.onnx"]


def test_a_failed_download_keeps_what_was_there(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    target.write_bytes(b"before")
    server.status = 404
    with pytest.raises(WeightsError, match="could not be downloaded"):
        download(server.file, target)
    assert target.read_bytes() == b"before"
    assert left_in(tmp_path) == ["net.onnx"]


def test_a_cache_that_cannot_be_written(server: Server, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_bytes(b"a file where the folder should be")
    with pytest.raises(WeightsError, match=r"could not be downloaded .*supply net\.onnx"):
        find_file(server.file)


def test_an_interruption_leaves_nothing(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Ctrl-C while it is read nor one while it is put in place."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ("hashlib.sha256", "os.fsync", "os.replace"):
        with monkeypatch.context() as patched:
            patched.setattr(place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                find_file(server.file)
        assert left_in(cache) == []
    assert find_file(server.file).read_bytes() == CONTENT
