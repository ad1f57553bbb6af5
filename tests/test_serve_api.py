"""The endpoint's HTTP contract, over a restorer without a model, on a real port."""

from __future__ import annotations

import base64
import http.server
import io
import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from ldbfr.errors import ConfigError, InputError, StorageError
from ldbfr.images import decode_image
from serve import calls, events
from serve.api import make_app, wants_json
from serve.observability import JsonFormatter, log_as_json
from serve.protocol import DeadlineExceeded, Overloaded, Preview
from serve.settings import EndpointSettings
from tests.serving import DIGEST, FACE, FakeJobs, FakeRestorer, picture, running

PATIENCE = 20  # seconds that anything here may take on a busy machine

Start = Callable[..., httpx.Client]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an application; a client of it."""
    with ExitStack() as stack:

        def start(restorer: FakeRestorer | None = None, jobs: FakeJobs | None = None, **settings: Any) -> httpx.Client:
            static = settings.pop("static", Path("/nonexistent"))
            app = make_app(restorer or FakeRestorer(), EndpointSettings(**settings), jobs, static=static)
            url = stack.enter_context(running(app))
            return stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE))

        yield start


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A client of an application that answers at once."""
    settings = EndpointSettings(job_buckets=("s3://archive/team", "s3://results"), max_samples=4, max_steps=20)
    app = make_app(FakeRestorer(), settings, FakeJobs(), static=Path("/nonexistent"))
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


def check_problem(answer: httpx.Response, slug: str, status: int) -> dict[str, Any]:
    """Every problem has the members of RFC 9457, and says the same as the status line and the request's id."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    problem: dict[str, Any] = answer.json()
    assert problem["type"] == f"/problems/{slug}"
    assert problem["status"] == status
    assert problem["instance"] == answer.url.path
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["title"]
    assert problem["detail"]
    return problem


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    found = []
    for block in text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


# --------------------------------------------------------------------------------------------------------- restorations


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_an_image_comes_back_in_its_own_format(client: httpx.Client, format: Any) -> None:
    sent = picture(format=format)

    answer = client.post("/v1/restorations", content=sent, headers={"Content-Type": f"image/{format}"})

    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"image/{format}"
    got, expected = decode_image(answer.content, name="got"), 255 - decode_image(sent, name="sent")
    np.testing.assert_allclose(got.astype(int), expected.astype(int), atol=0 if format == "png" else 24)
    assert answer.headers["x-seed"] == "0"
    assert answer.headers["x-weights-digest"] == DIGEST
    assert answer.headers["x-faces"] == "2"
    stages = [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")]
    assert stages == ["decode", "detect", "queue", "model", "paste", "encode"]
    assert answer.headers["cache-control"] == "no-store"


def test_a_form_and_a_raw_body_mean_the_same(client: httpx.Client) -> None:
    options = {"mode": "aligned", "seed": "7", "format": "webp", "quality": "80"}

    raw = client.post("/v1/restorations", params=options, content=picture())
    form = client.post("/v1/restorations", data=options, files={"image": picture()})

    assert raw.status_code == form.status_code == 200
    assert raw.content == form.content
    assert form.headers["x-seed"] == "7"
    assert form.headers["x-faces"] == "0"


def test_every_option_reaches_the_restorer(start: Start) -> None:
    restorer = FakeRestorer()
    options = {
        "mode": "photo",
        "steps": "3",
        "seed": str(2**53 - 1),
        "condition_scale": "0.5",
        "strength": "0.25",
        "samples": "2",
        "format": "jpeg",
        "quality": "70",
        "boxes": ["1,2,3,4", "5.5,6,7,8"],
    }

    start(restorer).post("/v1/restorations", data=options, files={"image": picture()}).raise_for_status()

    (given,) = restorer.calls
    assert given is not None
    assert given.model_dump(exclude={"boxes"}) == {
        "mode": "photo",
        "steps": 3,
        "seed": 2**53 - 1,
        "condition_scale": 0.5,
        "strength": 0.25,
        "samples": 2,
        "format": "jpeg",
        "quality": 70,
    }
    assert given.boxes == ((1, 2, 3, 4), (5.5, 6, 7, 8))


def test_json_has_every_sample_and_the_uncertainty(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/restorations?samples=3&seed=5", content=picture(), headers={"Accept": "application/json"}
    ).json()

    assert base64.b64decode(answer["image"]).startswith(b"\x89PNG")
    assert len(answer["samples"]) == 3
    assert base64.b64decode(answer["uncertainty"]).startswith(b"\x89PNG")
    assert (answer["media_type"], answer["width"], answer["height"]) == ("image/png", 64, 48)
    assert (answer["seed"], answer["weights_digest"]) == (5, DIGEST)
    assert [face["reason"] for face in answer["faces"]] == [None, "smaller than 16 px: it has 6"]
    assert set(answer["timings"]) == {"decode", "detect", "queue", "model", "paste", "encode"}


def test_several_samples_without_json_give_the_first_image(client: httpx.Client) -> None:
    answer = client.post("/v1/restorations?samples=3", content=picture())

    assert answer.headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("accept", "json_wanted"),
    [
        ("*/*", False),
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("image/png, application/json;q=0.5", False),
        ("image/png;q=0.2, application/json", True),
        ("application/json;q=0", False),
        ("application/json;q=nonsense", False),
        ("text/html, */*;q=0.8", False),
        ("", False),
        (";;,,;q", False),
    ],
)
def test_who_wants_json(accept: str, json_wanted: bool) -> None:
    assert wants_json(accept) is json_wanted


def test_faces_are_found_without_restoring_any(client: httpx.Client) -> None:
    answer = client.post("/v1/faces", content=picture()).json()

    assert (answer["width"], answer["height"]) == (64, 48)
    assert answer["faces"][0]["box"] == FACE["box"]
    assert answer["faces"][1]["reason"].startswith("smaller than")


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("query", "field", "message"),
    [
        ("steps=51", "steps", "less than or equal to 50"),
        ("steps=21", "steps", "at most 20, which this service allows"),
        ("samples=5", "samples", "at most 4, which this service allows"),
        ("step=3", "step", "there is no such option; there are mode, steps, seed"),
        ("seed=1&seed=2", "seed", "given more than once"),
        ("boxes=1,2,3", "boxes", "expected left,top,width,height"),
        ("boxes=1,2,nan,4", "boxes", "expected left,top,width,height"),
        ("boxes=1,2,0,4", "boxes", "expected left,top,width,height"),
        ("condition_scale=nan", "condition_scale", "less than or equal to 4"),
        ("format=gif", "format", "'png', 'jpeg' or 'webp'"),
        ("&".join(["boxes=1,2,3,4"] * 65), "boxes", "at most 64"),
    ],
)
def test_bad_options_are_named(client: httpx.Client, query: str, field: str, message: str) -> None:
    problem = check_problem(client.post(f"/v1/restorations?{query}", content=picture()), "bad-options", 422)

    assert [error["field"] for error in problem["errors"]] == [field]
    assert message in problem["errors"][0]["message"]


def test_all_bad_options_are_told_at_once(client: httpx.Client) -> None:
    form = {"x": "1", "steps": "many", "quality": "0"}

    answer = client.post("/v1/restorations", data=form, files={"image": picture()})

    assert {error["field"] for error in check_problem(answer, "bad-options", 422)["errors"]} == set(form)


@pytest.mark.parametrize(
    ("error", "slug", "status"),
    [
        (InputError("the image has no end"), "bad-image", 422),
        (ConfigError("boxes need mode photo"), "bad-options", 422),
        (Overloaded("the queue is full", 2.5), "overloaded", 503),
        (DeadlineExceeded("too late"), "deadline", 504),
        (StorageError("/secret/place is gone"), "internal", 500),
        (RuntimeError("secret"), "internal", 500),
    ],
)
@pytest.mark.parametrize("path", ["/v1/restorations", "/v1/restorations/stream"])
def test_what_the_restorer_raises(start: Start, path: str, error: Exception, slug: str, status: int) -> None:
    answer = start(FakeRestorer(error=error)).post(path, content=picture())

    problem = check_problem(answer, slug, status)
    if slug == "internal":
        assert "secret" not in answer.text
    else:
        assert str(error) in problem["detail"]
    assert answer.headers.get("retry-after") == ("3" if slug == "overloaded" else None)


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), StorageError("out of luck")])
@pytest.mark.parametrize(
    ("path", "after"), [("restorations", 0), ("restorations/stream", 0), ("restorations/stream", 2)]
)
def test_a_failure_that_nobody_foresaw_is_in_the_log_with_its_request(
    start: Start, path: str, after: int, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    answer = start(FakeRestorer(error=error, error_after=after)).post(f"/v1/{path}", content=picture())

    wait_for(lambda: "request failed" in caplog.text)
    (record,) = [record for record in caplog.records if record.message == "request failed"]
    assert record.request_id == answer.headers["x-request-id"]  # type: ignore[attr-defined]
    assert "out of luck" in JsonFormatter().format(record)


def test_no_such_path_and_no_such_method(client: httpx.Client) -> None:
    assert "/openapi.json" in check_problem(client.get("/v2"), "not-found", 404)["detail"]
    answer = client.put("/v1/jobs")
    check_problem(answer, "method-not-allowed", 405)
    assert answer.headers["allow"] == "GET, POST"


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("path", ["/v1/restorations", "/v1/restorations/stream", "/v1/faces"])
def test_the_deadline_holds_even_if_the_restorer_does_not_look(start: Start, path: str, stubborn: bool) -> None:
    restorer = FakeRestorer(seconds=1e3, stubborn=stubborn)
    client = start(restorer, deadline_seconds=0.3)

    answer = client.post(path, content=picture())

    check_problem(answer, "deadline", 504)
    assert restorer.cancelled.acquire(timeout=PATIENCE)
    restorer.release.set()


def test_a_call_that_does_not_stop_is_complained_about(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calls, "STOP_SECONDS", 0.05)
    restorer = FakeRestorer(seconds=1e3, stubborn=True)

    start(restorer, deadline_seconds=0.2).post("/v1/restorations", content=picture())

    wait_for(lambda: "has not stopped" in caplog.text)
    restorer.release.set()


# -------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_has_every_step_in_order_and_then_the_result(client: httpx.Client) -> None:
    answer = client.post("/v1/restorations/stream?steps=3&seed=9", content=picture())

    assert answer.headers["content-type"].startswith("text/event-stream")
    *previews, (last, result) = events_of(answer.text)
    assert [(name, data["step"], data["steps"]) for name, data in previews] == [("preview", k, 3) for k in range(4)]
    assert all(base64.b64decode(data["image"]).startswith(b"\xff\xd8") for _, data in previews)
    assert (last, result["seed"], result["media_type"]) == ("result", 9, "image/png")
    alone = client.post("/v1/restorations?steps=3&seed=9", content=picture())
    assert base64.b64decode(result["image"]) == alone.content


@pytest.mark.parametrize(("error", "slug"), [(Overloaded("full"), "overloaded"), (RuntimeError("secret"), "internal")])
def test_an_error_after_previews_is_the_last_event(start: Start, error: Exception, slug: str) -> None:
    answer = start(FakeRestorer(error=error, error_after=2)).post("/v1/restorations/stream", content=picture())

    assert answer.status_code == 200
    *previews, (name, problem) = events_of(answer.text)
    assert [data["step"] for _, data in previews] == [0, 1]
    assert (name, problem["type"]) == ("error", f"/problems/{slug}")
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["instance"] == "/v1/restorations/stream"
    assert "secret" not in answer.text


def test_the_deadline_ends_a_stream(start: Start) -> None:
    class Slower(FakeRestorer):
        async def stream(self, data: Any, options: Any, deadline: float) -> Any:
            async for item in FakeRestorer().stream(data, options, deadline):
                yield item
                await self._work(None, 1)

    restorer = Slower(seconds=1e3)
    answer = start(restorer, deadline_seconds=2).post("/v1/restorations/stream", content=picture())

    assert [name for name, _ in events_of(answer.text)] == ["preview", "error"]
    assert events_of(answer.text)[-1][1]["type"] == "/problems/deadline"
    assert restorer.cancelled.acquire(timeout=PATIENCE)


def test_silence_is_filled_with_comments(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_SECONDS", 0.05)
    monkeypatch.setattr("serve.api.KEEP_ALIVE_SECONDS", 0.05)

    answer = start(FakeRestorer(seconds=1.5, steps=2)).post("/v1/restorations/stream", content=picture())

    assert answer.text.startswith(": keep-alive\n\n")
    assert answer.text.count(": keep-alive") > 3
    assert [name for name, _ in events_of(answer.text)] == ["preview"] * 3 + ["result"]


def test_a_stream_that_ends_without_a_result_is_an_error(start: Start) -> None:
    class Short(FakeRestorer):
        async def stream(self, data: Any, options: Any, deadline: float) -> Any:
            yield Preview(0, 1, picture(8, 8, "jpeg"))

    answer = start(Short()).post("/v1/restorations/stream", content=picture())

    assert [name for name, _ in events_of(answer.text)] == ["preview", "error"]


# ------------------------------------------------------------------------------------------------------- the service


def test_paths_are_taken_as_they_are(client: httpx.Client) -> None:
    for path in ("/v1/jobs/", "/v1/", "/static", "//v1/jobs", "/v1/r%C3%A9storations", "/v1/%00"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found"), path
        assert answer.json()["instance"].isascii()


def test_it_is_not_ready_when_the_restorer_does_not_say(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FakeRestorer):
        async def ready(self) -> bool:
            await self._work(None, 1)
            return True

    monkeypatch.setattr("serve.api.READY_SECONDS", 0.1)
    restorer = Silent(seconds=1e3, stubborn=True)

    check_problem(start(restorer).get("/readyz"), "not-ready", 503)
    restorer.release.set()


def test_what_the_service_says_of_itself(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    (model,) = client.get("/v1/models").json()["models"]
    assert (model["name"], model["side"], model["weights_digest"]) == ("fake_64", 64, DIGEST)
    limits = client.get("/v1/limits").json()
    assert limits["max_body_bytes"] == 20 * 2**20
    assert (limits["max_samples"], limits["max_steps"], limits["auth"], limits["jobs"]) == (4, 20, False, True)


def test_it_is_not_ready_before_the_model_is(start: Start) -> None:
    client = start(FakeRestorer(is_ready=False))

    answer = client.get("/readyz")

    check_problem(answer, "not-ready", 503)
    assert answer.headers["retry-after"] == "1"
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123.X_9", True), ("a" * 128, True), ("a" * 129, False), ("-a", False), ("a b", False), ('a"b{}', False)],
)
def test_request_ids(client: httpx.Client, given: str, kept: bool) -> None:
    answered = client.get("/nowhere", headers={"X-Request-Id": given}).headers["x-request-id"]

    assert (answered == given) is kept
    assert answered


def test_metrics_count_what_happened(start: Start) -> None:
    client = start(FakeRestorer())
    client.post("/v1/restorations", content=picture())
    client.post("/v1/restorations/stream", content=picture())
    client.post("/v1/restorations?steps=1000", content=picture())
    client.request("PROPFIND", "/healthz")
    client.get("/any/path?of=a client")

    lines = client.get("/metrics").text.splitlines()

    assert 'ldbfr_requests_total{method="POST",route="/v1/restorations",status="200"} 1.0' in lines
    assert 'ldbfr_requests_total{method="POST",route="/v1/restorations",status="422"} 1.0' in lines
    assert 'ldbfr_requests_total{method="other",route="/healthz",status="405"} 1.0' in lines
    assert 'ldbfr_requests_total{method="GET",route="none",status="404"} 1.0' in lines
    assert 'ldbfr_problems_total{problem="bad-options"} 1.0' in lines
    assert 'ldbfr_stage_seconds_count{stage="model"} 2.0' in lines
    assert "ldbfr_faces_total 4.0" in lines
    assert "ldbfr_requests_in_progress 1.0" in lines  # this one


def test_log_lines_are_json_without_images_or_queries(start: Start, log_text: io.StringIO) -> None:
    log_as_json(stream=log_text)
    client = start(FakeRestorer())

    client.post("/v1/restorations?seed=4321&note=private", content=picture(), headers={"X-Request-Id": "mine"})
    wait_for(lambda: "mine" in log_text.getvalue())

    (line,) = [json.loads(line) for line in log_text.getvalue().splitlines() if "mine" in line]
    assert (line["message"], line["request_id"], line["route"]) == ("request", "mine", "/v1/restorations")
    assert (line["status"], line["problem"], line["bytes_in"]) == (422, "bad-options", len(picture()))
    assert "private" not in log_text.getvalue()


@pytest.fixture
def log_text() -> Iterator[io.StringIO]:
    """A place for a log; afterwards the loggers are again what they were."""
    loggers = [logging.getLogger(name) for name in ("serve", "ldbfr")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    try:
        yield io.StringIO()
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def test_spans_carry_the_route_and_continue_the_clients_trace() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from serve.observability import Metrics
    from serve.requests import Requests

    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    inner = make_app(FakeRestorer(), EndpointSettings(), static=Path("/nonexistent"))
    traced = Requests(inner, Metrics(), provider.get_tracer("test"))
    trace = "0af7651916cd43dd8448eb211c80319c"
    with running(traced) as url:
        httpx.get(f"{url}/healthz", headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}, timeout=PATIENCE)
        wait_for(exporter.get_finished_spans)

    (span,) = exporter.get_finished_spans()
    assert span.name == "GET /healthz"
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == trace
    assert (span.attributes or {})["http.response.status_code"] == 200


def test_traces_are_sent_to_a_collector(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    received = queue.Queue[tuple[str, bytes]]()

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        start(otlp=True).post("/v1/restorations", content=picture())
        path, body = received.get(timeout=PATIENCE)
        collector.shutdown()

    assert path == "/v1/traces"
    assert b"POST /v1/restorations" in body
    assert b"ldbfr.model_seconds" in body


# ----------------------------------------------------------------------------------------------------------------- jobs


def test_a_jobs_life(client: httpx.Client) -> None:
    wanted = {"input": "s3://archive/team/scans", "output": "s3://results/2024", "faces": "largest"}

    started = client.post("/v1/jobs", json=wanted)

    assert started.status_code == 202
    job = started.json()
    assert started.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["status"] == "pending"
    assert client.get(f"/v1/jobs/{job['id']}").json() == job
    assert client.get("/v1/jobs").json()["jobs"][0] == job
    assert client.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"


def test_jobs_that_are_not_there(client: httpx.Client, start: Start) -> None:
    check_problem(client.get("/v1/jobs/restore-x"), "not-found", 404)
    check_problem(client.delete("/v1/jobs/restore-x"), "not-found", 404)
    check_problem(start().get("/v1/jobs"), "not-found", 404)


@pytest.mark.parametrize(
    ("body", "slug", "status"),
    [
        (b"{", "bad-request", 400),
        (b"[" * 20_000, "bad-request", 400),
        (b"\xff\xfe", "bad-request", 400),
        (b"[]", "bad-options", 422),
        (b'{"input": "s3://archive/team", "output": "s3://results", "steps": 3}', "bad-options", 422),
        (b'{"input": "/etc", "output": "s3://results"}', "bad-options", 422),
        (b'{"input": "file:///etc", "output": "s3://results"}', "bad-options", 422),
        (b'{"input": "s3://archive//team", "output": "s3://results"}', "bad-options", 422),
        (b" " * 70_000, "too-large", 413),
    ],
)
def test_job_requests_that_cannot_be_read(client: httpx.Client, body: bytes, slug: str, status: int) -> None:
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})

    check_problem(answer, slug, status)


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_and_its_files_and_nothing_beside_them(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "static"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html><title>faces</title>")
    (folder / "app.js").write_text("export {};")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    client = start(static=folder)

    page, script = client.get("/"), client.get("/static/app.js")

    assert page.status_code == script.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "javascript" in script.headers["content-type"]
    for answer in (page, script):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    for path in ("/static/../secret.txt", "/static/%2e%2e/secret.txt", "/static/..%2fsecret.txt", "/static/link.txt"):
        check_problem_status(client.get(path), 404)
    check_problem_status(client.get("/static/%00"), 404)
    for path, expected in (("/", page), ("/static/app.js", script)):
        assert client.get(path, headers={"Range": "bytes=x-"}).content == expected.content
    assert client.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code in (200, 304)


def check_problem_status(answer: httpx.Response, status: int) -> None:
    """It is a problem of this status, and tells nothing secret."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert "secret\n" not in answer.text


def test_no_page_where_none_is_wanted(start: Start) -> None:
    check_problem(start(page=False).get("/"), "not-found", 404)


# ----------------------------------------------------------------------------------------------------- the description


def test_the_description_names_every_route_and_its_problems(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()

    restorations = described["paths"]["/v1/restorations"]["post"]
    assert {parameter["name"] for parameter in restorations["parameters"]} == {
        "mode",
        "steps",
        "seed",
        "condition_scale",
        "strength",
        "samples",
        "boxes",
        "format",
        "quality",
    }
    assert set(restorations["responses"]) >= {
        "200",
        "400",
        "401",
        "408",
        "413",
        "415",
        "422",
        "429",
        "500",
        "503",
        "504",
    }
    assert set(restorations["requestBody"]["content"]) >= {"image/png", "multipart/form-data"}
    for responses in (route["responses"] for path in described["paths"].values() for route in path.values()):
        for status, response in responses.items():
            if status >= "400":
                assert set(response["content"]) == {"application/problem+json"}


def test_schemathesis_finds_nothing(client: httpx.Client, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    command = Path(sys.executable).with_name("schemathesis")
    options = ["--max-examples=10", "--seed=6", "--generation-database=none", "--no-color"]
    # No schema can say that an image must decode: what is valid by the schema may be refused. And DELETE cancels a job,
    # which can be looked at afterwards.
    options.append("--exclude-checks=positive_data_acceptance,use_after_free")

    done = subprocess.run(
        [command, "run", f"{client.base_url}/openapi.json", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "Tested: 12" in done.stdout


def wait_for(condition: Callable[[], object]) -> None:
    """Until something is true."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it has not become true"
        time.sleep(0.02)
