"""Draw the README's picture of the endpoint's page: a sample, restored by the model on this machine.

    python benchmarks/endpoint_picture.py

Needs the face detector's file (see docs/photos.md), Chromium and the extras `serve` and `test`.
"""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from serve.api import make_app
from serve.model import LocalFaceModel
from serve.restoring import PhotoService
from serve.settings import DEFAULT_WEIGHTS, EndpointSettings
from tests.browser import FLAGS
from tests.serving import running

REPOSITORY = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1080, 860
DIVIDER = 79  # per cent of the stage: in the middle of the second face
MOST_BYTES = 400_000
SECONDS = 120


@dataclass(frozen=True)
class Wanted:
    """What is drawn."""

    weights: str = DEFAULT_WEIGHTS
    """Which model."""
    sample: int = 1
    """Which of the page's samples."""
    device: str | None = None
    """Where the model runs; a GPU where there is one."""
    output: Path = REPOSITORY / "docs" / "images" / "endpoint.png"
    """The picture."""


def main(wanted: Wanted) -> None:
    """Start the endpoint, restore a sample in a browser, and keep what it shows."""
    settings = EndpointSettings(weights=wanted.weights)
    model = LocalFaceModel.load(
        wanted.weights,
        device=wanted.device,
        batch_faces=settings.batch_faces,
        batch_wait=settings.batch_wait_seconds,
    )
    with running(make_app(PhotoService(model), settings)) as url:
        shot = screenshot(url, wanted.sample)
    data = compact(shot)
    if len(data) > MOST_BYTES:
        raise SystemExit(f"the picture has {len(data)} bytes, expected {MOST_BYTES} at most; choose a smaller WIDTH")
    wanted.output.write_bytes(data)


def screenshot(url: str, sample: int) -> bytes:
    """The page with the sample's result, as a PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
        try:
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
            page.goto(url)
            page.locator(".sample").nth(sample).click()
            expect(page.locator("#download")).to_be_visible(timeout=SECONDS * 1000)
            expect(page.locator("#face-line")).to_be_visible()
            page.locator("#split").fill(str(DIVIDER))
            page.locator("#photo-name").focus()
            page.mouse.move(0, 0)
            return page.screenshot(animations="disabled")
        finally:
            browser.close()


def compact(png: bytes) -> bytes:
    """The same picture in fewer bytes."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(file, "png", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main(tyro.cli(Wanted, description=__doc__))
