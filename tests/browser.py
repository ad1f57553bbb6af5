"""A page in Chromium: Debian's, or the one that LDBFR_TEST_CHROMIUM names; nothing is downloaded.

Test modules load this one with `pytest_plugins`; their tests that use it carry the marker `browser`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; the test is skipped where there is none."""
    named = os.environ.get("LDBFR_TEST_CHROMIUM")
    if named and not Path(named).is_file():
        pytest.fail(f"LDBFR_TEST_CHROMIUM is {named}, expected the path of a Chromium; there is no such file")
    found = named or shutil.which("chromium")
    if not found:
        pytest.skip("this test needs Chromium: install the package chromium, or set LDBFR_TEST_CHROMIUM to its path")
    return found


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """A headless browser with a profile of its own, which goes with it.

    It ends with the module: while Playwright runs, no other test could run an event loop in this thread.
    """
    api = pytest.importorskip("playwright.sync_api", reason="this test needs playwright: pip install 'ldbfr[test]'")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page that shares nothing with those of other tests."""
    context = browser.new_context()
    context.set_default_timeout(30_000)
    try:
        yield context.new_page()
    finally:
        context.close()
