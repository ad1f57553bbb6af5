"""The endpoint against clients that mean no good, or do badly: keys, limits, bodies, connections, images."""

from __future__ import annotations

import asyncio
import hmac
import io
import json
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from ldbfr.errors import ConfigError, InputError
from serve import bodies
from serve.api import make_app
from serve.bombs import MOST_PARTS, MOST_SCANS, check_header
from serve.keys import EVERYONE, Key, KeyRing, digest_of, load_keys
from serve.keys import main as make_key
from serve.limits import Limits
from serve.problems import Problem
from serve.protocol import Overloaded, Preview
from serve.settings import EndpointSettings
from tests.serving import FakeJobs, FakeRestorer, picture, running
from tests.test_serve_api import check_problem, wait_for

PATIENCE = 20

Start = Callable[..., httpx.Client]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an application; a client of it."""
    with ExitStack() as stack:

        def start(restorer: FakeRestorer | None = None, **settings: Any) -> httpx.Client:
            app = make_app(restorer or FakeRestorer(), EndpointSettings(**settings), FakeJobs(), static=Path("/none"))
            url = stack.enter_context(running(app))
            return stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE))

        yield start


def write_keys(path: Path, *keys: dict[str, Any]) -> Path:
    """A keys file; of each key `key` is the secret, and its name unless it has another."""
    entries = [{"name": key["key"], **key, "sha256": digest_of(key["key"])} for key in keys]
    for entry in entries:
        del entry["key"]
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps({"keys": entries}))
    os.replace(partial, path)
    return path


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """Two clients: alice, and bob, who may start jobs."""
    return write_keys(tmp_path / "keys.json", {"key": "alice"}, {"key": "bob", "jobs": True})


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ----------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "headers", [bearer("alice"), {"Authorization": "bearer bob"}, {"X-API-Key": "alice"}, {"x-api-key": "bob"}]
)
def test_a_key_opens(start: Start, keys_file: Path, headers: dict[str, str]) -> None:
    client = start(keys_file=keys_file)

    assert client.post("/v1/restorations", content=picture(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": ""},
        bearer("mallory"),
        bearer("Alice"),
        bearer("alice bob"),
        bearer("a" * 5000),
        {"X-API-Key": "alicé".encode()},
        {"Authorization": "Basic YWxpY2U6YWxpY2U="},
        {"Authorization": f"Bearer {digest_of('alice')}"},
    ],
)
def test_nothing_opens_without_one(start: Start, keys_file: Path, headers: dict[str, Any]) -> None:
    restorer = FakeRestorer()
    client = start(restorer, keys_file=keys_file)

    for method, path in (
        ("POST", "/v1/restorations"),
        ("POST", "/v1/restorations/stream"),
        ("POST", "/v1/faces"),
        ("GET", "/v1/models"),
        ("GET", "/v1/jobs"),
        ("GET", "/metrics"),
    ):
        answer = client.request(method, path, content=picture() if method == "POST" else None, headers=headers)
        check_problem(answer, "unauthorized", 401)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert "alic" not in answer.text
    assert not restorer.calls


def test_what_is_open_to_all(start: Start, keys_file: Path) -> None:
    client = start(keys_file=keys_file)

    assert [client.get(path).status_code for path in ("/healthz", "/readyz", "/v1/limits", "/openapi.json")] == [
        200
    ] * 4
    assert client.get("/v1/limits").json()["auth"] is True
    described = client.get("/openapi.json").json()["paths"]
    assert "security" in described["/v1/models"]["get"]
    assert "security" not in described["/healthz"]["get"]


def test_keys_are_exchanged_without_a_restart(start: Start, keys_file: Path) -> None:
    client = start(keys_file=keys_file)

    def opens(key: str) -> bool:
        return client.get("/v1/models", headers=bearer(key)).status_code == 200

    assert [opens("alice"), opens("bob"), opens("carol")] == [True, True, False]
    write_keys(keys_file, {"key": "carol", "name": "alice"}, {"key": "bob"})
    assert [opens("alice"), opens("bob"), opens("carol")] == [False, True, True]


@pytest.mark.parametrize("broken", ['{"keys": [', '{"keys": []}', '{"keys": [{"name": "x", "key": "secret"}]}', None])
def test_a_broken_keys_file_keeps_the_old_keys(
    keys_file: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(keys_file)
    if broken is None:
        keys_file.unlink()
    else:
        keys_file.write_text(broken)

    assert ring.find("alice") is not None
    assert ring.find("alice") is not None
    assert caplog.text.count("the keys of before stay") == 1
    assert "secret" not in caplog.text
    write_keys(keys_file, {"key": "carol"})
    assert ring.find("alice") is None
    assert ring.find("carol") is not None


def test_every_digest_is_compared_whatever_is_presented(keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare(one, other)

    ring = KeyRing(keys_file)
    monkeypatch.setattr("serve.keys.hmac.compare_digest", counting)
    for presented in ("alice", "bob", "mallory", ""):
        compared.clear()
        ring.find(presented)
        assert compared == [(digest_of(key), digest_of(presented)) for key in ("alice", "bob")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be used"),
        ('{"keys": []}', "at least 1 item"),
        ('{"keys": [{"name": "a", "sha256": "abc"}]}', "keys.0.sha256"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "rate": 3}]}), "keys.0.rate: Extra inputs"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "rate_per_minute": 0}]}), "keys.0.rate_per_minute"),
        (json.dumps({"keys": [{"name": "a\n", "sha256": "0" * 64}]}), "keys.0.name"),
        (json.dumps({"keys": [{"name": name, "sha256": "0" * 64} for name in "ab"]}), "a sha256 twice (keys a, b)"),
        (json.dumps({"keys": [{"name": "a", "sha256": c * 64} for c in "01"]}), "a name twice (keys a)"),
        (" " * 2**21, "more than 1,048,576 bytes"),
    ],
)
def test_keys_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys.json").write_text(text)

    with pytest.raises(ConfigError) as caught:
        make_app(FakeRestorer(), EndpointSettings(keys_file=tmp_path / "keys.json"))
    assert message in str(caught.value)
    assert "0000" not in str(caught.value)


def test_a_new_key_fits_its_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_key(["dora", "--rate-per-minute", "5", "--concurrency", "2", "--jobs"])
    secret, entry = (line.partition(": ")[2].strip() for line in capsys.readouterr().out.splitlines())
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [json.loads(entry)]}))

    key = KeyRing(tmp_path / "keys.json").find(secret)

    assert key is not None
    assert (key.name, key.rate_per_minute, key.concurrency, key.jobs) == ("dora", 5, 2, True)
    assert secret not in entry
    assert len(secret) > 40
    with pytest.raises(SystemExit):
        make_key(["dora", "--concurrency", "0"])


def test_jobs_are_for_keys_that_may(start: Start, keys_file: Path) -> None:
    client = start(keys_file=keys_file, job_buckets=("s3://archive",))

    problem = check_problem(client.get("/v1/jobs", headers=bearer("alice")), "forbidden", 403)

    assert "'alice' may not use jobs" in problem["detail"]
    assert client.get("/v1/jobs", headers=bearer("bob")).status_code == 200


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("s3://archive/team", True),
        ("s3://archive/team/", True),
        ("s3://archive/team/scans/2024", True),
        ("s3://results", True),
        ("s3://results/anything", True),
        ("s3://archive", False),
        ("s3://archive/teams", False),
        ("s3://archive/team2/scans", False),
        ("s3://archive/other/team", False),
        ("s3://archive/team/../other", False),
        ("s3://archive/team/./x", False),
        ("s3://results2", False),
        ("s3://results.evil", False),
        ("s3://RESULTS", False),
    ],
)
def test_jobs_stay_in_their_places(start: Start, place: str, allowed: bool) -> None:
    client = start(job_buckets=("s3://archive/team", "s3://results/"))

    for wanted in ({"input": place, "output": "s3://results/x"}, {"input": "s3://results/x", "output": place}):
        answer = client.post("/v1/jobs", json=wanted)
        assert (answer.status_code == 202) is allowed
        assert answer.status_code in (202, 403, 422)


def test_a_job_takes_no_list_of_uris_and_without_places_nothing(start: Start) -> None:
    wanted = {"input": "s3://results/uris.TXT/", "output": "s3://results/x"}

    check_problem(start(job_buckets=("s3://results",)).post("/v1/jobs", json=wanted), "forbidden", 403)
    problem = check_problem(start().post("/v1/jobs", json={**wanted, "input": "s3://results/in"}), "forbidden", 403)
    assert "these places only: none" in problem["detail"]


# ------------------------------------------------------------------------------------------------------ rates and room


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def key_of(name: str, **values: Any) -> Key:
    return Key(name=name, sha256=digest_of(name), **values)


def test_a_rate_lets_its_burst_through_and_then_its_share() -> None:
    clock, alice = Clock(), key_of("alice", rate_per_minute=30)
    limits = Limits(100, clock)
    refused: list[Problem] = []

    def admitted() -> bool:
        try:
            with limits.admit(alice):
                return True
        except Problem as problem:
            refused.append(problem)
            return False

    assert [admitted() for _ in range(31)] == [True] * 30 + [False]
    assert (refused[0].slug, refused[0].headers) == ("rate-limited", {"Retry-After": "2"})  # one in two seconds
    clock.now += 1.9
    assert not admitted()
    clock.now += 0.2
    assert [admitted(), admitted()] == [True, False]
    clock.now += 3600
    assert sum(admitted() for _ in range(100)) == 30
    # In the long run it is the rate: ten minutes of trying all the time.
    count = 0
    for _ in range(6000):
        clock.now += 0.1
        count += admitted()
    assert count == pytest.approx(300, abs=1)


def test_keys_do_not_disturb_each_other() -> None:
    limits = Limits(100, Clock())
    alice, bob = (key_of(name, rate_per_minute=1, concurrency=1) for name in ("alice", "bob"))

    with limits.admit(alice), pytest.raises(Problem, match="in progress"), limits.admit(alice):
        pass
    with pytest.raises(Problem, match="1 requests a minute"), limits.admit(alice):
        pass
    with limits.admit(bob):
        pass


def test_what_is_refused_costs_nothing() -> None:
    limits = Limits(1, Clock())
    alice, bob = key_of("alice", rate_per_minute=2), key_of("bob", rate_per_minute=2)

    with limits.admit(bob):
        for _ in range(5):
            with pytest.raises(Overloaded), limits.admit(alice):
                pass
    for _ in range(2):
        with limits.admit(alice):
            pass


def test_everybody_on_this_machine_has_no_limit_of_their_own() -> None:
    clock = Clock()
    limits = Limits(10_000, clock)
    with ExitStack() as stack:
        for _ in range(5000):
            stack.enter_context(limits.admit(EVERYONE))
            clock.now += 1e-6
    assert limits.ongoing == 0


def test_a_keys_rate_over_http(start: Start, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.json", {"key": "alice", "rate_per_minute": 2}, {"key": "bob"})
    client = start(keys_file=keys)

    codes = [client.post("/v1/faces", content=picture(), headers=bearer("alice")).status_code for _ in range(2)]
    answer = client.post("/v1/faces", content=picture(), headers=bearer("alice"))

    assert codes == [200, 200]
    check_problem(answer, "rate-limited", 429)
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert client.post("/v1/faces", content=picture(), headers=bearer("bob")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/restorations", "/v1/restorations/stream"])
def test_a_keys_requests_at_a_time_over_http(start: Start, tmp_path: Path, path: str) -> None:
    keys = write_keys(tmp_path / "keys.json", {"key": "alice", "concurrency": 1})
    restorer = FakeRestorer(seconds=1e3)
    client = start(restorer, keys_file=keys)

    with sending(client, path, picture(), bearer("alice")):
        assert restorer.started.acquire(timeout=PATIENCE)
        answer = client.post(path, content=picture(), headers=bearer("alice"))
        check_problem(answer, "rate-limited", 429)
        assert answer.headers["retry-after"] == "1"
    restorer.seconds = 0  # the first has gone away, and with it its place is free again
    wait_for(lambda: client.post(path, content=picture(), headers=bearer("alice")).status_code == 200)


def test_a_full_service_says_so_at_once(start: Start) -> None:
    restorer = FakeRestorer(seconds=1e3)
    client = start(restorer, max_requests=1)

    with sending(client, "/v1/restorations", picture()):
        assert restorer.started.acquire(timeout=PATIENCE)
        answer = client.post("/v1/restorations", content=picture())
        check_problem(answer, "overloaded", 503)
        assert answer.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200


# -------------------------------------------------------------------------------------------------- clients that leave


def sending(
    client: httpx.Client, path: str, body: bytes, headers: dict[str, str] | None = None, *, length: int | None = None
) -> Any:
    """A raw connection on which a request has been sent; leaving the block closes it."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=PATIENCE)
    head = {"Host": "localhost", "Content-Length": str(len(body) if length is None else length), **(headers or {})}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    connection.sendall("\r\n".join(lines).encode("latin-1") + body)
    return closing(connection)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


@pytest.mark.parametrize("path", ["/v1/restorations", "/v1/restorations/stream", "/v1/faces"])
def test_a_client_that_leaves_stops_its_restoration(start: Start, path: str) -> None:
    restorer = FakeRestorer(seconds=1e3)
    client = start(restorer)

    with sending(client, path, picture()):
        assert restorer.started.acquire(timeout=PATIENCE)
        assert not restorer.cancelled.acquire(timeout=0.1)

    assert restorer.cancelled.acquire(timeout=PATIENCE)
    wait_for(lambda: f'route="{path}",status="499"' in client.get("/metrics").text)


def test_a_client_that_leaves_amid_a_stream_stops_it(start: Start) -> None:
    class Slower(FakeRestorer):
        async def stream(self, data: Any, options: Any, deadline: float) -> Any:
            async for item in FakeRestorer().stream(data, options, deadline):
                yield item
                await self._work(None, 1)

    restorer = Slower(seconds=1e3)
    client = start(restorer)

    with sending(client, "/v1/restorations/stream", picture()) as connection:
        received = b""
        while b"event: preview" not in received:
            received += connection.recv(65536)

    assert restorer.cancelled.acquire(timeout=PATIENCE)
    wait_for(lambda: "ldbfr_requests_in_progress 1.0" in client.get("/metrics").text)


def test_a_client_that_does_not_read_gives_its_place_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.requests.SEND_SECONDS", 0.2)

    class Loud(FakeRestorer):
        async def stream(self, data: Any, options: Any, deadline: float) -> Any:
            self.started.release()
            for step in range(10**6):
                yield Preview(step, 10**6, bytes(2**20))
                await asyncio.sleep(0.01)

    restorer = Loud()
    client = start(restorer, max_requests=1)

    with sending(client, "/v1/restorations/stream", picture()):
        assert restorer.started.acquire(timeout=PATIENCE)
        wait_for(lambda: client.post("/v1/faces", content=picture()).status_code == 200)


def test_a_client_that_leaves_amid_its_upload_bothers_nobody(start: Start) -> None:
    restorer = FakeRestorer()
    client = start(restorer, max_requests=1)

    for path in ("/v1/restorations", "/v1/restorations/stream"):
        with sending(client, path, picture()[:50], length=len(picture())):
            pass
        wait_for(lambda: client.post("/v1/faces", content=picture()).status_code == 200)
    assert [call for call in restorer.calls if call is not None] == []


# --------------------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("form", [False, True])
def test_a_client_that_sends_a_byte_at_a_time_is_told_and_cut_off(start: Start, form: bool) -> None:
    restorer = FakeRestorer()
    client = start(restorer, upload_seconds=0.5, max_requests=1)
    headers = {"Content-Type": "multipart/form-data; boundary=x"} if form else {}
    stop = threading.Event()

    begin = part("image", b"\x89PNG")[:-2] if form else b""
    with sending(client, "/v1/restorations", begin, headers, length=10_000) as connection:

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    connection.sendall(b"-")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            answer = read_all(connection)  # ends, because the server closes
        except ConnectionResetError:
            pytest.fail("the connection was reset before the answer could be read")
        finally:
            stop.set()
            thread.join()

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in head.lower()
    problem = json.loads(body)
    assert problem["type"] == "/problems/timeout"
    assert "not complete after 0.5 s" in problem["detail"]
    assert not restorer.calls
    wait_for(lambda: client.post("/v1/restorations", content=picture()).status_code == 200)  # the only place is free


@pytest.mark.parametrize("with_length", [True, False])
@pytest.mark.parametrize("path", ["/v1/restorations", "/v1/faces"])
def test_an_oversized_body_is_refused(start: Start, path: str, with_length: bool) -> None:
    client = start(max_body_bytes=100_000)
    body = b"\x89PNG" + bytes(300_000)

    answer = client.post(path, content=body if with_length else iter([body[:99_999], body[99_999:]]))

    problem = check_problem(answer, "too-large", 413)
    assert problem["max_body_bytes"] == 100_000


@pytest.mark.parametrize("key", ["alice", "mallory"])
def test_a_client_that_sends_all_before_it_reads_learns_why_it_was_refused(
    start: Start, keys_file: Path, key: str
) -> None:
    """As most do: the answer must outlive the rest of the upload, which nobody wants."""
    client = start(keys_file=keys_file, max_body_bytes=100_000)

    with sending(client, "/v1/restorations", bytes(16_000_000), bearer(key)) as connection:  # raises if it is reset
        answer = read_all(connection)

    assert answer.startswith(b"HTTP/1.1 413" if key == "alice" else b"HTTP/1.1 401")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]


def test_an_oversized_body_is_not_asked_for(start: Start) -> None:
    client = start(max_body_bytes=100_000)

    with sending(client, "/v1/restorations", b"", {"Expect": "100-continue"}, length=10**9) as connection:
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_without_end_is_cut_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "DRAIN_SECONDS", 0.2)
    client = start(max_body_bytes=1000)

    def pour(connection: socket.socket) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            connection.sendall(b"1000\r\n" + bytes(0x1000) + b"\r\n")

    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=PATIENCE)
    with closing(connection):
        connection.sendall(b"POST /v1/faces HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            pour(connection)


def test_a_small_body_that_fits_exactly(start: Start) -> None:
    sent = picture()

    assert start(max_body_bytes=len(sent)).post("/v1/faces", content=sent).status_code == 200
    check_problem(start(max_body_bytes=len(sent) - 1).post("/v1/faces", content=sent), "too-large", 413)


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({"Content-Type": "application/x-www-form-urlencoded"}, "--data-binary"),
        ({"Content-Type": "text/plain"}, "expected image/png"),
        ({"Content-Type": "application/json"}, "multipart/form-data"),
        ({"Content-Type": "\xff;;==", "X": "y"}, "expected image/png"),
        ({"Content-Encoding": "gzip"}, "not encoded"),
    ],
)
def test_media_that_are_not_taken(start: Start, headers: dict[str, str], told: str) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}

    answer = start().post("/v1/restorations", content=picture(), headers=raw)

    assert told in check_problem(answer, "unsupported-media", 415)["detail"]


def part(name: str, data: bytes, more: str = "") -> bytes:
    """A part of a form whose boundary is x."""
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"


IMAGE = part("image", picture(), '; filename="a.png"')
END = b"--x--\r\n"


@pytest.mark.parametrize(
    ("body", "slug"),
    [
        (b"", "bad-request"),
        (b"garbage", "bad-request"),
        (IMAGE, "bad-request"),
        (IMAGE[:60], "bad-request"),
        (part("seed", b"1") + END, "bad-request"),
        (IMAGE + IMAGE + END, "bad-request"),
        (part("seed", b"1" * 2000) + IMAGE + END, "bad-request"),
        (part("boxes", b"1,2,3,4") * 100 + IMAGE + END, "bad-request"),
        (b"--x\r\n" + b"X: y\r\n" * 50 + b"\r\n\r\n" + IMAGE + END, "bad-request"),
        (b"--x\r\nX: " + b"y" * 10_000 + b"\r\n\r\n\r\n" + IMAGE + END, "bad-request"),
        (b"--x\r\nContent-Disposition form-data\r\n\r\n1\r\n" + IMAGE + END, "bad-request"),
        (b"--x\r\n\r\nno name\r\n" + IMAGE + END, "bad-options"),
        (part("seed", b"\xff\xfe") + IMAGE + END, "bad-options"),
        (part("x" * 3000, b"1") + IMAGE + END, "bad-options"),
        (part("image", b"") + END, "bad-image"),
        (part("image", b"no image at all") + END, "bad-image"),
    ],
)
def test_malformed_forms(start: Start, body: bytes, slug: str) -> None:
    restorer = FakeRestorer()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}

    answer = start(restorer).post("/v1/restorations", content=body, headers=headers)

    check_problem(answer, slug, 400 if slug == "bad-request" else 422)
    assert not restorer.calls


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=" + "x" * 300])
def test_forms_without_a_usable_boundary(start: Start, content_type: str) -> None:
    answer = start().post("/v1/restorations", content=IMAGE + END, headers={"Content-Type": content_type})

    check_problem(answer, "bad-request", 400)


def test_a_form_means_the_same_in_any_packets(start: Start) -> None:
    client = start()
    whole = part("seed", b"3") + IMAGE + part("format", b"png") + END + b"an epilogue"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}

    expected = client.post("/v1/restorations?seed=3&format=png", content=picture()).content
    for size in (1, 2, 3, 5, 7, 64, len(whole)):
        packets = iter([whole[start : start + size] for start in range(0, len(whole), size)])
        assert client.post("/v1/restorations", content=packets, headers=headers).content == expected, size


def test_a_form_cut_anywhere_is_never_half_understood(start: Start) -> None:
    restorer = FakeRestorer()
    client = start(restorer)
    whole = part("seed", b"3") + IMAGE + END
    headers = {"Content-Type": "multipart/form-data; boundary=x"}

    for cut in range(0, len(whole) - 4, 23):
        assert client.post("/v1/restorations", content=whole[:cut], headers=headers).status_code in (400, 422)
    assert not restorer.calls
    assert client.post("/v1/restorations", content=whole, headers=headers).headers["x-seed"] == "3"


# --------------------------------------------------------------------------------------------------------------- images


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of that size that has one compressed byte of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def bomb(name: str) -> bytes:
    """A file that is small and would become large, or slow."""
    file = io.BytesIO()
    match name:
        case "png":
            return png(60_000, 60_000)
        case "zlib in a png":
            return png(8, 8, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(80_000_000), 9)))
        case "text in a png":
            return png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000), 9)))
        case "chunks of a png":
            return png(8, 8, chunk(b"abCd", b"") * MOST_PARTS)
        case "jpeg":
            Image.new("L", (1, 1)).save(file, "JPEG")
            data = bytearray(file.getvalue())
            start = data.index(b"\xff\xc0") + 5
            data[start : start + 4] = b"\xff\xff\xff\xff"
            return bytes(data)
        case "segments of a jpeg":
            return b"\xff\xd8" + b"\xff\xe5\x00\x02" * MOST_PARTS
        case "padding of a jpeg":
            return b"\xff\xd8" + b"\xff" * 1_000_000
        case "junk in a jpeg":
            return b"\xff\xd8" + bytes(1_000_000)
        case "scans of a jpeg":
            Image.new("L", (2_000, 2_000)).save(file, "JPEG", progressive=True)
            data = bytearray(file.getvalue())
            start = data.rindex(b"\xff\xda")
            return bytes(data[:start] + data[start:-2] * MOST_SCANS + data[-2:])
        case "webp":
            Image.new("RGB", (8, 8)).save(file, "WEBP")
            return webp_canvas(13_000, file.getvalue()[12:])
        case "larger webp":
            Image.new("RGB", (8, 8)).save(file, "WEBP")
            return webp_canvas(16_383, file.getvalue()[12:])
        case "tiff":
            tags = {256: 30_000, 257: 30_000, 258: 8, 259: 5, 262: 1, 273: 8, 277: 1, 278: 30_000, 279: 1}
            entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
            return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    raise AssertionError(name)


def webp_canvas(side: int, frame: bytes) -> bytes:
    """An animated WebP with a small frame on a large canvas."""

    def riff(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<I", len(data)) + data

    def u24(*values: int) -> bytes:
        return b"".join(value.to_bytes(3, "little") for value in values)

    header = riff(b"VP8X", b"\x02\0\0\0" + u24(side - 1, side - 1))
    frames = riff(b"ANIM", bytes(6)) + riff(b"ANMF", u24(0, 0, 7, 7, 10) + b"\0" + frame)
    return riff(b"RIFF", b"WEBP" + header + frames)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("png", "too-large"),
        ("zlib in a png", "bad-image"),
        ("text in a png", "bad-image"),
        ("chunks of a png", "bad-image"),
        ("jpeg", "too-large"),
        ("segments of a jpeg", "bad-image"),
        ("padding of a jpeg", "bad-image"),
        ("junk in a jpeg", "bad-image"),
        ("scans of a jpeg", "bad-image"),
        ("webp", "too-large"),
        ("larger webp", "bad-image"),
        ("tiff", "too-large"),
    ],
)
def test_image_bombs_never_reach_the_restorer(start: Start, name: str, slug: str) -> None:
    restorer = FakeRestorer()
    client = start(restorer)

    for path in ("/v1/restorations", "/v1/faces"):
        check_problem(client.post(path, content=bomb(name)), slug, 413 if slug == "too-large" else 422)
    assert not restorer.calls


@pytest.mark.parametrize(
    "data", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a", b"PK\x03\x04", b"\x80\x04\x95"]
)
def test_what_is_no_image(start: Start, data: bytes) -> None:
    check_problem(start().post("/v1/restorations", content=data), "bad-image", 422)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_an_image_cut_anywhere_is_an_answer_of_ours(format: Any) -> None:
    whole = picture(format=format)

    check_header(whole, 64 * 48)
    with pytest.raises(Problem, match="64 x 48 pixels, expected at most 3,071"):
        check_header(whole, 64 * 48 - 1)
    for cut in range(len(whole)):
        try:
            check_header(whole[:cut], 10_000)
        except InputError:
            continue


def test_photos_with_much_metadata_pass() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", icc_profile=bytes(500_000), progressive=True)

    check_header(file.getvalue(), 10_000)
    check_header(file.getvalue() + b"\xff\xda film" * 100, 10_000)


# ----------------------------------------------------------------------------------------------- browsers and sockets


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "faces.example.org"}, 200),
        ({"Host": "FACES.Example.org:8000"}, 200),
        ({"Host": "photos.example.org"}, 200),
        ({"Host": "evil.example.org"}, 403),
        ({"Host": "localhost.evil.example.org"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "127.0.0.1@evil.example.org"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_other_sites_cannot_use_a_service_without_keys(start: Start, headers: dict[str, str], status: int) -> None:
    client = start(allowed_hosts=("faces.example.org", "Photos.Example.ORG"))

    assert client.post("/v1/faces", content=picture(), headers=headers).status_code == status


def test_with_keys_any_name_will_do(start: Start, keys_file: Path) -> None:
    headers = {"Host": "faces.example.org", "Sec-Fetch-Site": "cross-site", **bearer("alice")}

    assert start(keys_file=keys_file).post("/v1/faces", content=picture(), headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/v1/limits", "/nowhere", "/openapi.json"])
def test_every_answer_has_the_security_headers(start: Start, path: str) -> None:
    answer = start().get(path)

    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert "access-control-allow-origin" not in answer.headers


def test_a_thousand_idle_connections_are_in_nobodys_way(start: Start) -> None:
    client = start()
    address = (client.base_url.host, client.base_url.port or 80)

    with ExitStack() as stack:
        for number in range(1000):
            connection = stack.enter_context(closing(socket.create_connection(address, timeout=PATIENCE)))
            if number % 2:
                connection.sendall(b"POST /v1/restorations HTTP/1.1\r\nHost: localhost\r\n")  # and no more
        assert client.post("/v1/restorations", content=picture()).status_code == 200


def test_answers_do_not_get_mixed_up(start: Start) -> None:
    """Of many clients at once, each gets the answer to its own request, and no request is left behind."""
    client = start(FakeRestorer(seconds=0.02))

    async def ask() -> list[str]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=PATIENCE) as many:
            answers = await asyncio.gather(
                *(many.post(f"/v1/restorations?seed={seed}", content=picture()) for seed in range(40))
            )
            return [answer.headers["x-seed"] for answer in answers]

    assert asyncio.run(ask()) == [str(seed) for seed in range(40)]
    wait_for(lambda: "ldbfr_requests_in_progress 1.0" in client.get("/metrics").text)


def test_load_keys_tells_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file.*python -m serve.keys NAME"):
        load_keys(tmp_path / "none.json")
