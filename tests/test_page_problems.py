"""The page of the endpoint when something is wrong: what it says, what it sends, and how one goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ldbfr.errors import InputError, LDBFRError
from serve.protocol import DeadlineExceeded, Overloaded
from tests.page_server import HIGH, WIDE, keys_file, opened
from tests.serving import FakeRestorer, picture

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytest_plugins = ["tests.browser"]
pytestmark = pytest.mark.browser

KEY = "a-key-of-the-tests-0123456789"
NOT_AN_IMAGE = b"What I did on my holidays"
STREAM = "**/v1/restorations/stream*"


@pytest.mark.parametrize(
    ("data", "limits", "expected"),
    [
        (NOT_AN_IMAGE, {}, ("This is not an image", "holidays.png is no PNG, JPEG or WebP file")),
        (picture()[:20], {}, ("This image cannot be used", "holidays.png is damaged")),
        (
            picture(200, 200),
            {"max_pixels": 30_000},
            ("too large", "has 200 × 200 px; this server takes up to 30000 px"),
        ),
        (picture(200, 200), {"max_body_bytes": 500}, ("too large", "this server takes up to 1 kB")),
    ],
)
def test_what_the_server_would_refuse_is_not_sent(
    page: Page, data: bytes, limits: dict[str, int], expected: tuple[str, str]
) -> None:
    with opened(page, **limits) as view:
        view.choose(data, "holidays.png")
        said = view.problem()
        assert all(part in said for part in expected), said
        assert view.at("start").is_visible()
        with page.expect_file_chooser():
            page.get_by_role("alert").get_by_role("button", name="Choose another photo").click()
        assert (view.restorer.calls, view.complaints) == ([], [])
        view.choose(picture(40, 40))
        assert not view.at("problem").is_visible() or limits


def test_a_bad_file_leaves_the_result_before_it_alone(page: Page) -> None:
    with opened(page) as view:
        view.choose()
        view.restored()
        view.choose(NOT_AN_IMAGE, "holidays.txt", "text/plain")
        assert "holidays.txt" in view.problem()
        assert view.at("photo-name").inner_text() == "grandma.png"
        assert view.at("download").is_visible()


def test_a_bad_file_does_not_stop_what_goes_on(page: Page) -> None:
    with opened(page, FakeRestorer(seconds=3)) as view:
        view.choose()
        view.at("film").locator("button").first.wait_for()
        view.choose(NOT_AN_IMAGE, "holidays.txt", "text/plain")
        assert "holidays.txt" in view.problem()
        view.restored()
        assert len(view.sent()) == 1


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DeadlineExceeded("too late"), ("This took too long", "The server stops after 60 s", "Try again")),
        (InputError("grandma.png: 1 x 1 px is no photo"), ("This image cannot be used", "1 x 1 px", "Choose another")),
        (RuntimeError("a secret"), ("Something went wrong", "please try again", "Request ")),
        (LDBFRError("a secret"), ("Something went wrong", "please try again", "Request ")),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_the_server_is_told(page: Page, error: Exception, after: int, expected: tuple[str, ...]) -> None:
    with opened(page, FakeRestorer(error=error, error_after=after)) as view:
        view.choose()
        said = view.problem()
        assert all(part in said for part in expected), said
        assert "secret" not in said
        assert view.at("state").inner_text() == "Not restored"
        assert not view.at("cancel").is_visible()
        view.restorer.error = None
        view.at("restore").click()
        view.restored()
        assert not view.at("problem").is_visible()


def test_options_that_cannot_be_used_are_named(page: Page) -> None:
    with opened(page, max_steps=5) as view:
        view.choose()
        view.restored()
        view.at("steps").evaluate("slider => { slider.max = 50; }")
        view.at("steps").press("End")
        view.at("restore").click()
        said = view.problem()
        assert "These settings cannot be used" in said
        assert "steps: " in said


def test_a_key_is_asked_for_before_anything_is_sent(page: Page, tmp_path: Path) -> None:
    with opened(page, keys_file=keys_file(tmp_path, KEY)) as view:
        assert view.at("key-form").is_visible()
        view.choose()
        assert "This server needs an API key" in view.problem()
        assert view.at("key").evaluate("field => field === document.activeElement")
        assert not view.at("progress").is_visible()
        assert (view.restorer.calls, view.complaints) == ([], [])
        page.keyboard.type("not this one")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("The server does not know this API key").wait_for()
        assert view.sent() == []
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        view.restored()
        assert not view.at("problem").is_visible()
        assert view.at("key-known").is_visible()
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [[KEY], [], ""]
        assert "fake_64" in view.at("model").inner_text()
        page.reload()
        view.choose()
        view.restored()
        page.get_by_role("button", name="Forget it").click()
        assert page.evaluate("sessionStorage.length") == 0
        assert view.at("key-form").is_visible()


def test_where_no_keys_are_needed_none_is_asked_for(page: Page) -> None:
    with opened(page) as view:
        assert not view.at("key-form").is_visible()
        assert not view.at("key-known").is_visible()


@pytest.mark.parametrize("how", ["by itself", "at once"])
def test_a_busy_server_is_asked_again(page: Page, how: str) -> None:
    seconds = 2 if how == "by itself" else 60
    with opened(page, FakeRestorer(error=Overloaded("all replicas are busy", seconds))) as view:
        started = time.monotonic()
        view.choose()
        page.get_by_text(f"The server is busy. Trying again in {seconds} s.", exact=True).wait_for()
        view.restorer.error = None
        if how == "by itself":
            page.get_by_text("The server is busy. Trying again in 1 s.", exact=True).wait_for()
        else:
            view.at("try-now").click()
        view.restored()
        assert (time.monotonic() - started >= 2) == (how == "by itself")
        assert not view.at("problem").is_visible()
        assert not view.at("try-now").is_visible()
        assert len(view.sent()) == 1


def test_waiting_for_a_busy_server_can_be_given_up(page: Page) -> None:
    with opened(page, FakeRestorer(error=Overloaded("all replicas are busy", 60))) as view:
        view.choose()
        view.at("try-now").wait_for()
        view.at("cancel").click()
        assert view.at("state").inner_text() == "Cancelled"
        assert not view.at("try-now").is_visible()
        assert view.at("restore").is_enabled()


def test_who_would_have_to_wait_for_long_is_told_so(page: Page) -> None:
    with opened(page, FakeRestorer(error=Overloaded("all replicas are busy", 600))) as view:
        view.choose()
        assert "Try again in 10 minutes." in view.problem()


@pytest.mark.parametrize(
    ("status", "retry_after", "said"), [(429, "1", "Too many requests"), (503, None, "The server is busy")]
)
def test_a_proxys_refusals_are_understood(page: Page, status: int, retry_after: str | None, said: str) -> None:
    with opened(page) as view:
        refused: list[str] = []

        def refuse(route: Route) -> None:
            refused.append(route.request.url)
            headers = {"Retry-After": retry_after} if retry_after else {}
            route.fulfill(status=status, headers=headers, content_type="text/html", body="<h1>nginx</h1>")

        page.route(STREAM, refuse, times=1)
        view.choose()
        page.get_by_text(f"{said}. Trying again in 1 s.", exact=True).wait_for()
        view.restored()
        assert len(refused) == len(view.sent()) == 1


def test_without_a_network_one_can_try_again(page: Page) -> None:
    with opened(page) as view:
        page.context.set_offline(True)
        view.choose()
        assert "The server cannot be reached" in view.problem()
        page.context.set_offline(False)
        page.get_by_role("alert").get_by_role("button", name="Try again").click()
        view.restored()
        assert view.at("faces").get_by_role("button").count() == 2


def test_faces_come_with_the_result_where_the_search_for_them_failed(page: Page) -> None:
    with opened(page) as view:
        page.route("**/v1/faces", lambda route: route.abort())
        view.choose()
        view.restored()
        assert view.at("faces").get_by_role("button").count() == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b": keep-alive\n\n",
        b"event: result\ndata: " + json.dumps({"image": "abc"}).encode(),
        b'event: preview\ndata: {"step": 0, \n\n',
    ],
)
def test_a_stream_that_stops_early_is_no_result(page: Page, body: bytes) -> None:
    with opened(page) as view:
        page.route(STREAM, lambda route: route.fulfill(content_type="text/event-stream", body=body), times=1)
        view.choose()
        assert "The connection was cut" in view.problem()
        page.get_by_role("alert").get_by_role("button", name="Try again").click()
        view.restored()


def test_a_name_with_markup_is_text(page: Page) -> None:
    with opened(page) as view:
        name = "<img src=x onerror=alert(1)>.png"
        view.choose(picture(WIDE, HIGH), name)
        view.restored()
        assert view.at("photo-name").inner_text() == name
        view.choose(NOT_AN_IMAGE, name)
        assert name in view.problem()
        assert (view.complaints, view.foreign) == ([], [])
