"""What the page's tests share: the page of a real server in a browser, with an eye on what it says and asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.api import make_app
from serve.settings import EndpointSettings
from tests.serving import FakeRestorer, picture, running

if TYPE_CHECKING:
    from playwright.sync_api import FilePayload, Locator, Page

PATIENCE = 30_000  # ms: for what takes milliseconds, unless the machine is busy with something else
WIDE, HIGH = 64, 48
"""Of the photo that is sent: it has the faces that the fake restorer finds in every photo."""


@dataclass
class Opened:
    """The page, the restorer behind it, and all that it complained about or asked other hosts for."""

    page: Page
    url: str
    restorer: FakeRestorer
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Note complaints and requests from now on."""
        loud = ("error", "warning")
        note = self.complaints.append
        self.page.on("console", lambda said: note(said.text) if said.type in loud else None)
        self.page.on("pageerror", lambda error: note(str(error)))
        near = (self.url, "data:", f"blob:{self.url}")
        self.page.on("request", lambda asked: None if asked.url.startswith(near) else self.foreign.append(asked.url))

    def at(self, id: str) -> Locator:
        """An element by its id."""
        return self.page.locator(f"#{id}")

    def choose(self, data: bytes | None = None, name: str = "grandma.png", type: str = "image/png") -> None:
        """Choose a file."""
        payload: FilePayload = {"name": name, "mimeType": type, "buffer": picture(WIDE, HIGH) if data is None else data}
        self.page.set_input_files("#file", files=[payload])

    def restored(self) -> None:
        """Wait for a result."""
        from playwright.sync_api import expect

        expect(self.at("state")).to_have_text(re.compile("^Restored in"), timeout=PATIENCE)

    def shows(self, width: int) -> None:
        """Wait until the picture on the restored side is so many px wide."""
        from playwright.sync_api import expect

        expect(self.at("after")).to_have_js_property("naturalWidth", width, timeout=PATIENCE)

    def sent(self) -> list[dict[str, Any]]:
        """The options of all restorations, without what is None or the default."""
        return [call.model_dump(exclude_defaults=True) for call in list(self.restorer.calls) if call is not None]

    def problem(self) -> str:
        """What the problem says, once there is one."""
        self.at("problem").wait_for()
        return self.at("problem").inner_text()


@contextmanager
def opened(page: Page, restorer: FakeRestorer | None = None, **settings: Any) -> Iterator[Opened]:
    """The page at / of an endpoint with these settings."""
    restorer = restorer or FakeRestorer()
    with running(make_app(restorer, EndpointSettings(**settings))) as url:
        view = Opened(page, url, restorer)
        view.watch()
        page.goto(url)
        page.locator("#accepted", has_text="up to").wait_for()
        try:
            yield view
        finally:
            page.goto("about:blank")  # so that the server need not wait for what the page still reads


def keys_file(folder: Path, key: str) -> Path:
    """A file with one API key."""
    path = folder / "keys.json"
    digest = hashlib.sha256(key.encode()).hexdigest()
    path.write_text(json.dumps({"keys": [{"name": "test", "sha256": digest}]}))
    return path
