"""The page for people, at /, and its files at /static."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).parent / "static"


def serve_page(app: FastAPI, folder: Path = STATIC) -> None:
    """Serve a folder's index.html at / and its files below /static/, if the folder is there.

    StaticFiles answers for regular files in the folder alone: no link, and no path that leads out of it.
    """
    index = folder / "index.html"
    if not index.is_file():
        return

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        ask_for_all(request.scope)
        return FileResponse(index, media_type="text/html; charset=utf-8")

    app.mount("/static", PageFiles(directory=folder), name="static")


class PageFiles(StaticFiles):
    """Files of the page, always whole."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, or problem not-found."""
        ask_for_all(scope)
        return await super().get_response(path, scope)


def ask_for_all(scope: Scope) -> None:
    """Forget the Range header, as a server may: Starlette would answer a malformed one in plain text."""
    scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"range"]
