"""The page of the endpoint as people meet it: by screen reader, on a phone, in the dark, under its content policy."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serve.page import STATIC
from tests.page_server import Opened, opened
from tests.serving import FakeRestorer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest_plugins = ["tests.browser"]

STATES = ("empty", "result", "error", "running")
FILES = sorted(path for path in STATIC.rglob("*") if path.is_file())
PARSE = """async (chunks) => {
  const { events } = await import("/static/sse.js");
  const encoder = new TextEncoder();
  const body = new ReadableStream({ start(stream) {
    for (const chunk of chunks) stream.enqueue(new Uint8Array(chunk));
    stream.close();
  } });
  const found = [];
  for await (const { event, data } of events(body)) found.push([event, data]);
  return found;
}"""


def bring(view: Opened, state: str) -> None:
    """Bring the page into a state."""
    if state == "running":
        view.restorer.seconds = 60
    if state in ("result", "running"):
        view.page.locator(".sample").nth(1).click()
    if state == "result":
        view.restored()
        view.at("samples-wanted").press("ArrowRight")
        view.at("restore").click()
        view.at("show-uncertainty").wait_for()
        view.restored()
    if state == "error":
        view.choose(b"no image", "holidays.txt")
        view.at("problem").wait_for()
    if state == "running":
        view.at("cancel").wait_for()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_axe_finds_nothing_to_mend(page: Page, state: str, scheme: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install 'ldbfr[test]'")
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    with opened(page) as view:
        bring(view, state)
        found = axe.Axe().run(page).response
        assert {one["id"]: [node["html"] for node in one["nodes"]] for one in found["violations"]} == {}
        assert len(found["passes"]) > 15
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(background[4:].split(",")[0]) < 128) == (scheme == "dark")
        assert view.complaints == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 360, 760, 1000, 1600])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    with opened(page) as view:
        for state in STATES[:3]:
            bring(view, state)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, state
            too_small = page.evaluate(
                """Array.from(document.querySelectorAll("button, a[href], input:not(.split), summary"))
                  .map((one) => [one.id || one.className, one.getBoundingClientRect()])
                  .filter(([, box]) => box.width && (box.width < 24 || box.height < 24)).map(([name]) => name)"""
            )
            assert too_small == [], state


@pytest.mark.browser
def test_a_finger_moves_the_slider_and_chooses_faces(browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    try:
        page = context.new_page()
        with opened(page) as view:
            page.locator(".sample").first.tap()
            view.restored()
            stage = view.at("stage").bounding_box()
            assert stage is not None
            assert stage["width"] > 300
            view.at("faces").get_by_role("button").first.tap()
            assert view.at("stale").inner_text() == "Choose at least one face."
            page.touchscreen.tap(stage["x"] + stage["width"] * 0.75, stage["y"] + stage["height"] * 0.6)
            assert view.at("split").input_value() == "75"
            touch = context.new_cdp_session(page)
            finger = {"y": stage["y"] + stage["height"] * 0.6}
            for kind, share in (("Start", 0.7), ("Move", 0.6), ("Move", 0.4), ("Move", 0.3), ("End", None)):
                points = [{"x": stage["x"] + stage["width"] * share, **finger}] if share else []
                touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
            assert view.at("split").input_value() == "30"
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    finally:
        context.close()


@pytest.mark.browser
def test_who_wants_no_motion_gets_none(page: Page) -> None:
    page.emulate_media(reduced_motion="reduce")
    with opened(page, FakeRestorer(seconds=60)) as view:
        bring(view, "running")
        assert page.evaluate("document.getAnimations().length") == 0


@pytest.mark.browser
def test_all_can_be_done_with_the_keyboard(page: Page) -> None:
    with opened(page) as view:
        for _ in range(4):  # the brand, the file, the first sample, the second
            page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        view.restored()
        reached = []
        for _ in range(30):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        expected = ["face", "split", "show-faces", "download", "steps", "fidelity", "strength", "samples-wanted"]
        assert [name for name in expected if name not in reached] == []
        assert {"seed", "another-seed", "button primary"} & set(reached)


# ---- what is served ----


class Tags(HTMLParser):
    """All tags of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_that_its_content_policy_forbids() -> None:
    tags = Tags((STATIC / "index.html").read_text()).tags
    for tag, attributes in tags:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
        for name in ("src", "href"):
            if attributes.get(name, "./") != "./":
                assert str(attributes[name]).startswith("static/")
                assert (STATIC.parent / str(attributes[name])).is_file(), attributes


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix in (".js", ".css", ".html", ".svg")], ids=str)
def test_a_file_names_no_other_host_and_no_missing_file(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"https?:(?!//www\.w3\.org/2000/svg)|[\"'(]//", text) == []
    assert re.findall(r"\b(?:eval|Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write)\b", text) == []
    named = re.findall(r'from "\./([\w./-]+)"', text) + re.findall(r'url\("([\w./-]+)"\)', text)
    assert [name for name in named if not (STATIC / name).is_file()] == []


def test_the_samples_are_small() -> None:
    samples = sorted((STATIC / "samples").iterdir())
    assert [path.name for path in samples] == ["face.jpg", "portrait.jpg", "two-people.jpg"]
    assert sum(path.stat().st_size for path in samples) < 200_000


@pytest.mark.browser
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_the_same_however_the_stream_is_cut(page: Page, size: int) -> None:
    events = [["preview", json.dumps({"name": "Zoë – 写真"})], ["message", "one\ntwo"], ["result", "{}"]]
    text = (
        f": hello\n\nevent: preview\r\ndata: {events[0][1]}\r\n\r\ndata:one\ndata: two\nid: 7\n\n: keep-alive\n\n"
        "event: nothing\n\nevent:result\ndata:{}\n\nevent: unfinished\ndata: {}\n"
    )
    data = text.encode()
    with opened(page):
        chunks = [list(data[start : start + size]) for start in range(0, len(data), size)]
        assert page.evaluate(PARSE, chunks) == events
