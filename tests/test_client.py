"""The client against servers that are full, go away, or answer nonsense: sync and async alike."""

from __future__ import annotations

import asyncio
import base64
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldbfr.client import (
    AsyncClient,
    Client,
    ImageRefusedError,
    OptionsRefusedError,
    Preview,
    Restoration,
    Retries,
    ServerError,
    UnreachableError,
)
from ldbfr.client.calls import Options
from ldbfr.client.events import Event, EventParser, EventTooLongError
from ldbfr.client.retries import seconds_of_retry_after
from ldbfr.errors import ConfigError, InputError, LDBFRError
from tests.scripted import (
    PNG,
    Events,
    as_json,
    drop,
    half,
    preview_of,
    problem,
    problem_of,
    raw,
    restored,
    restored_of,
    serving,
)

KEY = "ldbfr_a-secret-of-mine"


@dataclass
class Clock:
    """Time that passes while somebody sleeps, and only then."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


class Blocking:
    """The asynchronous client, waited for: it has the synchronous one's methods."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.client = AsyncClient(*arguments, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            answer = method(*arguments, **options)
            return self.each(answer) if isinstance(answer, AsyncIterator) else self.runner.run(answer)

        return call

    def each(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(items, None)

        while (item := self.runner.run(following())) is not None:
            yield item

    def __repr__(self) -> str:
        return repr(self.client)

    def finish(self) -> None:
        self.runner.run(self.client.close())
        self.runner.close()


New = Callable[..., Any]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sync", "async"])
def new(request: pytest.FixtureRequest, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[New]:
    """Makes clients on the clock; each draw is 0.5."""
    monkeypatch.delenv("LDBFR_API_KEY", raising=False)
    made: list[Any] = []

    def make(url: str, key: str | None = None, **options: Any) -> Any:
        own = {name: options.pop(name) for name in ("max_retries", "first", "longest", "draw") if name in options}
        options["retries"] = Retries(clock=clock, **{"draw": lambda: 0.5} | own)
        if request.param == "sync":
            made.append(Client(url, key, sleep=clock.sleep, **options))
        else:
            made.append(Blocking(url, key, sleep=clock.sleep_async, **options))
        return made[-1]

    yield make
    for client in made:
        client.close() if isinstance(client, Client) else client.finish()


# ---- what is asked, and what comes back ----


def test_a_restoration_and_what_was_asked_for_it(new: New, tmp_path: Path) -> None:
    (tmp_path / "face.png").write_bytes(PNG)
    more = {"samples": [base64.b64encode(PNG).decode()] * 2, "uncertainty": base64.b64encode(PNG).decode(), "new": 1}
    with serving(restored(seed=7, **more)) as server:
        options = {"steps": 4, "boxes": [(1, 2.5, 30, 40), (5, 6, 7, 8)], "format": None}
        found = new(server.url + "/").restore(tmp_path / "face.png", seed=7, samples=2, **options)

    assert (found.image, found.format, found.seed, found.request_id) == (PNG, "png", 7, "r7")
    assert (found.samples, found.uncertainty) == ((PNG, PNG), PNG)
    assert found.faces == ({"box": [1, 2, 3, 4], "score": 0.9},)
    assert found.timings == {"model": 0.5}
    found.save(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == PNG
    (asked,) = server.asked
    assert (asked.method, asked.path, asked.body) == ("POST", "/v1/restorations", PNG)
    assert asked.headers["content-type"] == "image/png"
    assert asked.headers["accept"] == "application/json"
    assert asked.query == {"seed": ["7"], "steps": ["4"], "boxes": ["1,2.5,30,40", "5,6,7,8"], "samples": ["2"]}


def test_the_seed_is_always_said(new: New) -> None:
    with serving(restored()) as server:
        new(server.url).restore(PNG)
    assert server.asked[0].query == {"seed": ["0"]}


def test_a_stream_gives_the_previews_in_order_and_then_the_result(new: New) -> None:
    events = [*(("preview", preview_of(step)) for step in range(3)), ("other", {}), ("result", restored_of())]
    with serving(Events(events)) as server:
        items = list(new(server.url).stream(PNG, steps=2))

    assert [item.step for item in items[:-1]] == [0, 1, 2]
    assert all(isinstance(item, Preview) for item in items[:-1])
    assert isinstance(items[-1], Restoration)
    assert items[-1].request_id == "r9"
    assert server.asked[0].path == "/v1/restorations/stream"


def test_faces_models_and_limits(new: New) -> None:
    model = {"name": "tiny", "side": 32, "template": "ffhq", "weights_digest": "d", "defaults": {"steps": 8}}
    limits = {"max_body_bytes": 9, "max_pixels": 8, "deadline_seconds": 7.5, "max_samples": 6, "auth": True}
    found = {"width": 3, "height": 4, "faces": [{"box": [1, 2, 3, 4], "score": 0.5, "reason": None}]}
    with serving(as_json(found), as_json({"models": [model]}), as_json(limits)) as server:
        client = new(server.url)
        assert client.faces(PNG).faces[0]["score"] == 0.5
        assert client.models()[0].defaults == {"steps": 8}
        assert client.limits().deadline_seconds == 7.5
    assert [(one.method, one.path) for one in server.asked] == [
        ("POST", "/v1/faces"),
        ("GET", "/v1/models"),
        ("GET", "/v1/limits"),
    ]


def job(status: str) -> dict[str, object]:
    return {"id": "a/b", "status": status, "input": "s3://b/in", "output": "s3://b/out", "message": ""}


def test_a_batch_is_begun_followed_and_stopped(new: New, clock: Clock) -> None:
    script = [as_json(job("pending"), 202), *(as_json(job(status)) for status in ("running", "running", "succeeded"))]
    with serving(*script, as_json({"jobs": [job("succeeded")]}), raw(204, b""), as_json(job("cancelled"))) as server:
        client = new(server.url)
        assert client.submit_job("s3://b/in", "s3://b/out", faces="none").status == "pending"
        assert client.wait_job("a/b", every=3).status == "succeeded"
        assert [one.id for one in client.jobs()] == ["a/b"]
        assert client.cancel_job("a/b").is_finished
    assert clock.slept == [3, 3]
    assert server.asked[0].body == b'{"input": "s3://b/in", "output": "s3://b/out", "faces": "none"}'
    assert server.asked[1].path == "/v1/jobs/a%2Fb"
    assert [one.method for one in server.asked[-2:]] == ["DELETE", "GET"]


def test_a_batch_that_does_not_end_in_time(new: New, clock: Clock) -> None:
    with serving(as_json(job("running"))) as server, pytest.raises(ServerError, match="job a/b is running after 10 s"):
        new(server.url).wait_job("a/b", every=4, timeout=10)
    assert clock.slept == [4, 4]


# ---- retries ----


@pytest.mark.parametrize(
    "failing", [problem(429, "rate-limited"), problem(503, "overloaded"), raw(502, b""), drop, half]
)
def test_what_passes_is_tried_again_with_the_same_request(new: New, clock: Clock, failing: Any) -> None:
    with serving(failing, failing, restored()) as server:
        assert new(server.url, first=2).restore(PNG, steps=1).image == PNG

    assert clock.slept == [1, 2], "half of 2 and of 4"
    assert len({(one.path, str(one.query), one.body) for one in server.asked}) == 1
    assert len(server.asked) == 3


def test_no_more_retries_than_allowed_then_the_last_error(new: New, clock: Clock) -> None:
    with (
        serving(drop, problem(503, "not-ready", "loading the weights", retry_after="4")) as server,
        pytest.raises(ServerError, match=r"503: loading the weights .*\(tried 4 times\)") as caught,
    ):
        new(server.url, max_retries=3, draw=lambda: 0.0).restore(PNG)

    assert len(server.asked) == 4
    assert clock.slept == [0, 4, 4]
    error = caught.value
    assert (error.status, error.title, error.detail) == (503, "not-ready", "loading the weights")
    assert (error.problem, error.request_id, error.retry_after, error.attempts) == ("not-ready", "r1", 4, 4)


def test_retry_after_takes_the_place_of_the_drawn_time(new: New, clock: Clock) -> None:
    with serving(problem(503, "overloaded", retry_after="7"), problem(429, "x", retry_after="0"), restored()) as server:
        new(server.url, first=100, longest=100).restore(PNG)
    assert clock.slept == [pytest.approx(7 * 1.05), 0]


def test_no_waiting_beyond_the_deadline(new: New, clock: Clock) -> None:
    with serving(problem(503, "overloaded", retry_after="3600")) as server, pytest.raises(ServerError, match="503"):
        new(server.url, timeout=60).restore(PNG)
    assert clock.slept == []
    assert len(server.asked) == 1


def test_the_deadline_counts_over_all_tries(new: New, clock: Clock) -> None:
    with serving(problem(503, "overloaded", retry_after="20")) as server, pytest.raises(ServerError, match="503"):
        new(server.url, timeout=50, draw=lambda: 0.0, max_retries=99).restore(PNG)
    assert clock.slept == [20, 20]
    assert clock.now < 50


@pytest.mark.parametrize(
    ("status", "slug", "kind"),
    [
        (422, "bad-image", ImageRefusedError),
        (413, "too-large", ImageRefusedError),
        (415, "unsupported-media", ImageRefusedError),
        (422, "bad-options", OptionsRefusedError),
        (401, "unauthorized", ServerError),
        (403, "forbidden", ServerError),
        (404, "not-found", ServerError),
        (408, "timeout", ServerError),
        (500, "internal", ServerError),
        (504, "deadline", ServerError),
    ],
)
def test_other_refusals_come_at_once_by_their_kind(
    new: New, clock: Clock, status: int, slug: str, kind: type[ServerError]
) -> None:
    with (
        serving(problem(status, slug, "because", errors=[{"field": "steps", "message": "above 50"}])) as server,
        pytest.raises(ServerError, match=f"answers {status}: because; steps: above 50 .request r1") as caught,
    ):
        new(server.url).restore(PNG)

    assert type(caught.value) is kind
    assert isinstance(caught.value, InputError) == (kind is ImageRefusedError)
    assert isinstance(caught.value, ConfigError) == (kind is OptionsRefusedError)
    assert (caught.value.status, caught.value.problem) == (status, slug)
    assert len(server.asked) == 1
    assert clock.slept == []


def test_a_batch_is_never_begun_twice(new: New) -> None:
    with (
        serving(problem(503, "overloaded"), drop) as server,
        pytest.raises(UnreachableError, match="broke the connection off"),
    ):
        new(server.url).submit_job("s3://b/in", "s3://b/out")
    assert len(server.asked) == 2, "after the 503, in which nothing was begun; not after the drop"


def test_nobody_listens(new: New, clock: Clock) -> None:
    with serving(drop) as server:
        url = server.url
    with pytest.raises(UnreachableError, match=r"127.0.0.1:\d+ cannot be reached .*tried 3 times") as caught:
        new(url, max_retries=2).restore(PNG)
    assert caught.value.status is None
    assert len(clock.slept) == 2


def test_a_server_that_gives_no_answer(new: New) -> None:
    started = time.monotonic()
    with serving(lambda handler: time.sleep(10)) as server, pytest.raises(UnreachableError, match="no answer in time"):
        new(server.url, timeout=0.3, max_retries=0).restore(PNG)
    assert time.monotonic() - started < 5


def test_a_server_that_trickles_is_left_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    def trickle(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    with serving(trickle) as server, Client(server.url, timeout=0.4) as client:
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"did not finish its answer within 0\.4 s"):
            client.restore(PNG)
    assert time.monotonic() - started < 5


@given(
    retry=st.integers(0, 2000),
    first=st.floats(0, 10),
    more=st.floats(0, 100),
    draw=st.floats(0, 1),
    after=st.none() | st.floats(0, 1e6),
)
def test_the_law_of_waiting(retry: int, first: float, more: float, draw: float, after: float | None) -> None:
    seconds = Retries(first=first, longest=first + more, draw=lambda: draw).wait(retry, after)
    if after is None:
        assert 0 <= seconds <= min(first + more, first * 2.0 ** min(retry, 60))
    else:
        assert after <= seconds <= 1.1000001 * after


def test_what_retry_after_says() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    date = format_datetime(now + timedelta(seconds=90), usegmt=True)
    texts = ["5", "0.5", "-3", date, "soon", "nan", None]
    found = [seconds_of_retry_after(text, now.timestamp()) for text in texts]
    assert found == [5, 0.5, 0, 90, None, None, None]


# ---- streams that break ----


def test_a_stream_that_breaks_off_is_begun_anew_and_shows_nothing_twice(new: New) -> None:
    first = Events([("preview", preview_of(0)), ("preview", preview_of(1))], breaks_off=True)
    second = Events([("preview", preview_of(step)) for step in (0, 1, 2)])
    third = Events([*(("preview", preview_of(step)) for step in (0, 1, 2)), ("result", restored_of())])
    with serving(first, second, third) as server:
        items = list(new(server.url).stream(PNG))

    assert [getattr(item, "step", "result") for item in items] == [0, 1, 2, "result"]
    assert len(server.asked) == 3


def test_a_server_that_always_dies_in_the_stream(new: New) -> None:
    with serving(Events([("preview", preview_of(0))], breaks_off=True)) as server:
        items = iter(new(server.url, max_retries=2).stream(PNG))
        assert next(items).step == 0
        with pytest.raises(UnreachableError, match=r"broke the connection off .*tried 3 times"):
            next(items)
    assert len(server.asked) == 3


def test_an_error_in_a_stream_is_as_one_in_an_answer(new: New) -> None:
    busy = Events([("error", problem_of(503, "overloaded"))])
    late = Events([("preview", preview_of(0)), ("error", problem_of(504, "deadline", "out of time"))])
    with (
        serving(problem(429, "rate-limited"), busy, late) as server,
        pytest.raises(ServerError, match="504: out of time") as caught,
    ):
        list(new(server.url).stream(PNG))
    assert len(server.asked) == 3
    assert caught.value.problem == "deadline"


def test_a_stream_that_is_not_read_to_its_end_is_closed() -> None:
    with (
        serving(Events([("preview", preview_of(0)), ("result", restored_of())])) as server,
        Client(server.url) as client,
    ):
        items = client.stream(PNG)
        next(items)
        items.close()  # type: ignore[attr-defined]
        assert isinstance(list(client.stream(PNG))[-1], Restoration)


@given(st.data())
def test_events_are_the_same_however_they_are_cut(data: st.DataObject) -> None:
    text = 'event: a\r\ndata: {"é": 1}\r\n\r\n: nothing\r\rdata:x\rdata: y\nid: 4\n\nevent: lost\n\nretry: 3\n\ndata: z'
    body = "\ufeff".encode() + text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=20)))
    parser = EventParser()
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    found = [event for piece in pieces for event in parser.feed(piece)]
    assert found == [Event("a", '{"é": 1}'), Event("message", "x\ny")], "what has no end does not count"


def test_an_event_without_end_is_refused_but_signs_of_life_are_not() -> None:
    parser = EventParser(most=100)
    assert list(parser.feed(b": keep-alive\n" * 100)) == []
    with pytest.raises(EventTooLongError):
        list(parser.feed(b"data: " + b"x" * 200))


# ---- nonsense ----


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (raw(200, b"<html>hello</html>", Content_Type="text/html"), "Invalid JSON"),
        (raw(200, b""), "Invalid JSON"),
        (as_json([]), "should be an object"),
        (as_json({"image": "x"}), "image: "),
        (restored(image="&&&"), "image: "),
        (restored(media_type="text/html"), "media_type: "),
        (restored(media_type="image/jpeg"), "the image is no image/jpeg"),
        (restored(samples=[3]), "samples.0: "),
        (restored(width=-1), "width: "),
    ],
)
def test_an_answer_that_is_no_restoration(new: New, clock: Clock, answer: Any, text: str) -> None:
    with serving(answer), serving(answer) as server, pytest.raises(ServerError, match="something else") as caught:
        new(server.url).restore(PNG)
    assert text in str(caught.value)
    assert "endpoint of ldbfr" in str(caught.value)
    assert clock.slept == []


@pytest.mark.parametrize(
    "answer",
    [
        Events([("result", {"image": 1})]),
        Events([("preview", [])]),
        Events([("error", "no")]),
        Events([], headers={"Content-Type": "text/html"}),
        restored(),
    ],
)
def test_a_stream_that_is_none(new: New, answer: Any) -> None:
    with serving(answer) as server, pytest.raises(ServerError, match="something else") as caught:
        list(new(server.url, max_retries=0).stream(PNG))
    assert not isinstance(caught.value, UnreachableError)


def test_an_error_page_of_something_else_is_safe_to_print(new: New) -> None:
    page = "\x1b[2J" + "x" * 5000
    with (
        serving(as_json({"detail": page, "title": 3, "type": None, "errors": {}}, 418)) as server,
        pytest.raises(ServerError, match="answers 418") as caught,
    ):
        new(server.url).restore(PNG)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_an_answer_without_end_is_left(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    with serving(raw(200, bytes(10_000))) as server:
        client = new(server.url)
        inner = client if isinstance(client, Client) else client.client
        inner._talk = replace(inner._talk, most_answer=5000)
        with pytest.raises(ServerError, match="more than 5,000 bytes"):
            client.restore(PNG)


# ---- the key ----


def test_the_key_goes_to_the_server_and_nowhere_else(
    new: New, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("LDBFR_API_KEY", KEY + "\n")
    with serving(restored()) as other:
        with serving(raw(307, b"", Location=f"{other.url}/v1/restorations")) as server:
            client = new(server.url)
            with pytest.raises(ServerError, match=f"points to {other.url}/v1/restorations; no redirect") as caught:
                client.restore(PNG)
        assert other.asked == []
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(client) + repr(vars(client)) + str(caught.value) + repr(vars(caught.value)) + caplog.text


def test_an_argument_goes_before_the_environment(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDBFR_API_KEY", "another")
    with serving(restored()) as server:
        new(server.url, KEY).restore(PNG)
        new(server.url, "").restore(PNG)
    assert [one.headers.get("authorization") for one in server.asked] == [f"Bearer {KEY}", None]


def test_a_key_in_plain_text_is_warned_of(new: New, caplog: pytest.LogCaptureFixture) -> None:
    new("http://127.0.0.1:1", KEY)
    new("https://example.org", KEY)
    new("http://example.org")
    assert caplog.text == ""
    new("http://example.org", KEY)
    assert "goes there unencrypted" in caplog.text
    assert KEY not in caplog.text


# ---- what cannot be ----


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://host", "http://", "http://host?x=1", "http://host#x", "http://host:port", "", "s3://a"],
)
def test_an_address_that_is_none(new: New, url: str) -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:8000"):
        new(url)


def test_secrets_in_what_is_refused_are_not_repeated(new: New) -> None:
    with pytest.raises(ConfigError, match="no user or password") as caught:
        new("http://me:hunter2@host")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match="characters that no key has") as caught:
        new("http://host", "se cret")
    assert "cret" not in str(caught.value).replace("secrets", "")


def test_options_and_images_that_cannot_be(new: New, tmp_path: Path) -> None:
    client = new("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="option 'step': expected some of mode, steps"):
        client.restore(PNG, step=3)
    with pytest.raises(InputError, match=r"nowhere.png: No such file"):
        client.restore(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"nowhere.png: No such file"):
        client.stream(str(tmp_path / "nowhere.png"))
    for id in ("", "..", "."):
        with pytest.raises(ConfigError, match="job"):
            client.job(id)


@pytest.mark.parametrize("options", [{"max_retries": -1}, {"first": 9, "longest": 3}, {"timeout": 0}])
def test_times_that_cannot_be(new: New, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        new("http://127.0.0.1:1", **options)


def test_a_closed_client_says_so(new: New) -> None:
    client = new("http://127.0.0.1:1")
    client.close()
    with pytest.raises(ServerError, match="closed"):
        client.restore(PNG)


def test_the_options_are_those_of_the_endpoint() -> None:
    from serve.protocol import RestorationOptions

    assert list(Options.__annotations__) == list(RestorationOptions.model_fields)


def test_without_httpx2_the_extra_is_named_and_nothing_heavy_is_loaded() -> None:
    source = """
import sys
sys.modules["httpx2"] = None
import ldbfr.client
print([name for name in ("torch", "cv2", "ray") if name in sys.modules])
try:
    ldbfr.client.Client("http://127.0.0.1:1")
except ldbfr.errors.ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[0] == "[]"
    assert "pip install 'ldbfr[client]'" in done.stdout


def test_every_error_is_one_of_ldbfr() -> None:
    assert all(issubclass(kind, LDBFRError) for kind in (ServerError, ImageRefusedError, UnreachableError))
