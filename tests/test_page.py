"""The page of the endpoint in a browser: from a photo to its download, over a real server."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from ldbfr.images import Pixels, decode_image
from tests.page_server import HIGH, WIDE, Opened, opened
from tests.serving import FACE, LEFT_ALONE, FakeRestorer, picture

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytest_plugins = ["tests.browser"]
pytestmark = pytest.mark.browser

DROP = """([bytes, name, kind]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
    : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}"""
LISTEN = """() => {
  window.said = [];
  const region = document.querySelector("[role=status]");
  new MutationObserver(() => said.push(region.textContent)).observe(region, { childList: true });
}"""


def labels(parent: Locator) -> list[str | None]:
    return [button.get_attribute("aria-label") for button in parent.locator("button").all()]


def pressed(buttons: Locator) -> list[bool]:
    return [button.get_attribute("aria-pressed") == "true" for button in buttons.all()]


def screenshot(where: Locator) -> Pixels:
    return np.array(Image.open(io.BytesIO(where.screenshot())).convert("RGB"))


# ---- from a photo to a result ----


def test_a_photo_goes_up_and_its_steps_come_in_order(page: Page) -> None:
    with opened(page, FakeRestorer(seconds=1.5)) as view:
        page.evaluate(LISTEN)
        view.choose()
        view.at("film").locator("button").first.wait_for()
        assert labels(view.at("film"))[0] == "First stage"
        assert not view.at("download").is_visible()
        assert view.at("progress").is_visible()
        assert view.at("cancel").is_visible()
        assert page.locator("#after").evaluate("image => image.complete && image.naturalWidth") == 16  # a preview
        view.restored()
        assert labels(view.at("film")) == ["First stage", *(f"Step {n} of 4" for n in range(1, 5)), "Result"]
        view.shows(64)
        assert view.at("photo-name").inner_text() == "grandma.png"
        assert view.at("photo-size").inner_text() == f"{WIDE} × {HIGH} px"
        assert re.fullmatch(r"Restored in [\d.]+ s, 1 of 2 faces", view.at("state").inner_text())
        said = page.evaluate("said")
        assert [said[0], said[1]] == ["Restoring", "First stage"]
        assert said[-1].startswith("Restored in")
        assert view.sent() == [{}]
        assert (view.complaints, view.foreign) == ([], [])


@pytest.mark.parametrize(("number", "mode"), [(0, "photo"), (1, "photo"), (2, "aligned")])
def test_a_sample_is_restored_in_its_own_mode(page: Page, number: int, mode: str) -> None:
    with opened(page) as view:
        page.locator(".sample").nth(number).click()
        view.restored()
        assert view.sent() == [{} if mode == "photo" else {"mode": "aligned"}]
        assert page.locator(f"[name=mode][value={mode}]").is_checked()
        assert view.at("faces").is_visible() == (mode == "photo")
        assert (view.complaints, view.foreign) == ([], [])


def test_a_samples_mode_is_not_that_of_the_next_photo(page: Page) -> None:
    with opened(page) as view:
        page.locator(".sample").nth(2).click()
        view.restored()
        view.choose()
        page.get_by_role("heading", name="grandma.png").wait_for()
        view.restored()
        assert view.sent() == [{"mode": "aligned"}, {}]
        page.get_by_label("Aligned face", exact=True).check()
        view.choose(name="mine.png")
        page.get_by_role("heading", name="mine.png").wait_for()
        view.restored()
        assert view.sent()[-1] == {"mode": "aligned"}


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_photo_can_be_dropped_or_pasted(page: Page, kind: str) -> None:
    with opened(page) as view:
        given = [list(picture(WIDE, HIGH)), "scan.png"]
        if kind == "drop":
            page.evaluate(DROP, [*given, "dragover"])
            assert view.at("dropping").is_visible()
        page.evaluate(DROP, [*given, kind])
        view.restored()
        assert view.at("photo-name").inner_text() == "scan.png"
        assert not view.at("dropping").is_visible()


def test_the_download_is_the_servers_file_under_the_inputs_name(page: Page) -> None:
    with opened(page) as view:
        view.choose(name="old.family.png")
        view.restored()
        with page.expect_download() as download:
            view.at("download").click()
        assert download.value.suggested_filename == "old.family-restored.png"
        got = decode_image(download.value.path().read_bytes(), name="download")
        assert np.array_equal(got, 255 - decode_image(picture(WIDE, HIGH), name="sent"))


def test_a_turned_photo_is_shown_upright(page: Page) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (80, 40)).save(file, "jpeg", exif=exif)
    with opened(page) as view:
        view.choose(file.getvalue(), "turned.jpg", "image/jpeg")
        view.restored()
        assert view.at("photo-size").inner_text() == "40 × 80 px"


def test_another_photo_ends_what_goes_on(page: Page) -> None:
    restorer = FakeRestorer(seconds=60)
    with opened(page, restorer) as view:
        view.choose()
        view.at("film").wait_for(state="hidden")
        for _ in ("the faces", "the restoration"):
            assert restorer.started.acquire(timeout=20)
        restorer.seconds = 0
        view.choose(name="second.png")
        page.get_by_role("heading", name="second.png").wait_for()
        view.restored()
        assert restorer.cancelled.acquire(timeout=5)
        assert view.at("photo-name").inner_text() == "second.png"
        assert labels(view.at("film"))[-1] == "Result"
        assert view.complaints == []


def test_a_restoration_is_cancelled_on_the_server_too(page: Page) -> None:
    restorer = FakeRestorer(seconds=40, steps=400)
    with opened(page, restorer) as view:
        view.choose()
        view.at("film").locator("button").nth(1).wait_for()
        view.at("cancel").click()
        assert restorer.cancelled.acquire(timeout=5)
        assert view.at("state").inner_text() == "Cancelled"
        assert not view.at("cancel").is_visible()
        assert view.at("restore").evaluate("button => button === document.activeElement")
        restorer.seconds, restorer.steps = 0, 2
        page.keyboard.press("Enter")
        view.restored()
        assert labels(view.at("film")) == ["First stage", "Step 1 of 2", "Step 2 of 2", "Result"]
        assert view.complaints == []


# ---- before and after ----


@pytest.fixture
def compared(page: Page) -> Any:
    """A result, the boxes hidden."""
    with opened(page) as view:
        view.choose()
        view.restored()
        view.shows(64)
        view.at("show-faces").click()
        yield view


def move(view: Opened, *shares: float) -> None:
    """Drag on the stage between shares of its width."""
    box = view.at("stage").bounding_box()
    assert box is not None
    view.at("stage").scroll_into_view_if_needed()
    height = box["y"] + box["height"] * 0.4
    view.page.mouse.move(box["x"] + box["width"] * shares[0], height)
    view.page.mouse.down()
    for share in shares[1:]:
        view.page.mouse.move(box["x"] + box["width"] * share, height, steps=4)
    view.page.mouse.up()


def test_the_slider_follows_the_mouse_and_the_keys(compared: Opened) -> None:
    split = compared.at("split")
    assert split.input_value() == "50"
    move(compared, 0.5, 0.25)
    assert split.input_value() == "25"
    assert split.get_attribute("aria-valuetext") == "25 % before, 75 % after"
    move(compared, 0.8)  # a click
    assert split.input_value() == "80"
    compared.page.keyboard.press("ArrowLeft")
    assert split.input_value() == "79"
    compared.page.keyboard.press("Home")
    assert split.input_value() == "0"
    compared.page.keyboard.press("End")
    assert split.get_attribute("aria-valuetext") == "100 % before, 0 % after"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_input_is_left_of_the_divider_and_the_result_right_of_it(compared: Opened, share: float) -> None:
    move(compared, share)
    shown = screenshot(compared.at("stage")).astype(float)
    wide = shown.shape[1]
    sent = decode_image(picture(WIDE, HIGH), name="sent")
    expected = np.array(Image.fromarray(sent).resize((wide, len(shown)), Image.Resampling.BILINEAR)).astype(float)
    rows, middle = slice(len(shown) // 10, len(shown) // 2), round(wide * share)
    left, right = slice(4, middle - 30), slice(middle + 30, wide - 4)
    assert np.abs(shown[rows, left] - expected[rows, left]).mean() < 5
    assert np.abs(shown[rows, right] - (255 - expected[rows, right])).mean() < 5


def test_a_step_of_the_strip_goes_on_the_stage(compared: Opened) -> None:
    frames = compared.at("film").locator("button")
    assert pressed(frames) == [False] * 5 + [True]
    frames.nth(2).focus()
    compared.page.keyboard.press("Enter")
    compared.shows(16)
    assert compared.at("after").get_attribute("alt") == "Step 2 of 4 of grandma.png"
    assert pressed(frames) == [False, False, True, False, False, False]


def test_samples_show_where_the_result_is_uncertain(page: Page) -> None:
    with opened(page) as view:
        page.locator(".sample").nth(2).click()
        view.restored()
        view.at("samples-wanted").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        view.at("restore").click()
        view.at("show-uncertainty").wait_for()
        view.restored()
        assert view.sent()[-1] == {"mode": "aligned", "samples": 3}
        assert labels(view.at("film"))[-3:] == ["Result", "Sample 2", "Sample 3"]
        assert not view.at("uncertainty").is_visible()
        assert not view.at("legend").is_visible()
        view.at("show-uncertainty").click()
        assert view.at("uncertainty").is_visible()
        assert view.at("legend").is_visible()
        drawn = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
        alphas = np.array(view.at("uncertainty").evaluate(f"canvas => Array.from(({drawn})(canvas))"))[3::4]
        assert alphas.max() == 255
        view.at("film").locator("button").last.click()
        assert view.at("download").get_attribute("download") == "face-sample-3-restored.jpg"
        assert view.complaints == []


# ---- faces and settings ----


def test_every_found_face_has_a_box_where_it_is(page: Page) -> None:
    with opened(page) as view:
        view.choose()
        view.restored()
        boxes = view.at("faces").get_by_role("button")
        assert labels(view.at("faces")) == [
            "Face 1 of 2, 20 px",
            "Face 2 of 2, 6 px; smaller than 16 px: it has 6",
        ]
        assert pressed(boxes) == [True, False]
        stage = view.at("stage").bounding_box()
        assert stage is not None
        for number, face in enumerate((FACE, LEFT_ALONE)):
            box = boxes.nth(number).bounding_box()
            assert box is not None
            place = [(box["x"] - stage["x"]), (box["y"] - stage["y"]), box["width"], box["height"]]
            assert [value * WIDE / stage["width"] for value in place] == pytest.approx(face["box"], abs=0.1)
        assert view.at("face-count").inner_text() == "1 of 2 faces chosen"


def test_a_click_or_a_key_decides_which_faces_are_restored(page: Page) -> None:
    with opened(page) as view:
        view.choose()
        view.restored()
        boxes = view.at("faces").get_by_role("button")
        boxes.nth(1).click()
        assert view.at("stale").inner_text() == "Changed since this result."
        boxes.nth(0).focus()
        page.keyboard.press("Space")
        assert pressed(boxes) == [False, True]
        view.at("restore").click()
        view.restored()
        assert view.sent()[-1] == {"boxes": (tuple(LEFT_ALONE["box"]),)}
        boxes.nth(1).click()
        assert view.at("restore").is_disabled()
        assert view.at("stale").inner_text() == "Choose at least one face."
        view.at("all-faces").click()
        view.at("restore").click()
        view.restored()
        assert view.sent()[-1] == {"boxes": (tuple(FACE["box"]), tuple(LEFT_ALONE["box"]))}
        assert len(view.sent()) == 3
        assert sum(call is None for call in view.restorer.calls) == 1 + 3 * 4  # faces are looked for once


def test_a_drag_that_begins_on_a_box_moves_the_slider_alone(page: Page) -> None:
    with opened(page) as view:
        view.choose()
        view.restored()
        move(view, 0.25, 0.6)
        assert view.at("split").input_value() == "60"
        assert pressed(view.at("faces").get_by_role("button")) == [True, False]


def test_settings_are_sent_and_what_is_left_alone_is_not(page: Page) -> None:
    with opened(page) as view:
        page.locator("#steps-value", has_text="4").wait_for(state="attached")  # the model's own
        view.choose()
        view.restored()
        for id, keys in {"steps": ["Home"], "fidelity": ["ArrowRight"], "strength": ["ArrowLeft"]}.items():
            view.at(id).focus()
            for key in keys:
                page.keyboard.press(key)
        assert view.at("steps-value").inner_text() == "none, the first stage alone"
        view.at("another-seed").click()
        seed = int(view.at("seed").input_value())
        view.at("seed").press("Enter")  # submits the form
        view.restored()
        assert view.sent()[-1] == {"steps": 0, "condition_scale": 1.1, "strength": 0.95, "seed": seed}
        assert seed > 0
        view.at("seed").fill("-1")
        view.at("restore").click()
        assert len(view.sent()) == 2


def test_a_photo_without_faces_can_be_one_aligned_face(page: Page) -> None:
    with opened(page, FakeRestorer(faces=[])) as view:
        view.choose()
        view.restored()
        assert "No face was found." in view.at("face-line").inner_text()
        view.at("as-aligned").click()
        view.restored()
        assert view.sent()[-1] == {"mode": "aligned"}
        assert not view.at("face-line").is_visible()
