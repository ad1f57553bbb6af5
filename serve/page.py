"""The page for people, at /, and its files at /static."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

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
        return FileResponse(index, media_type="text/html; charset=utf-8")

    app.mount("/static", StaticFiles(directory=folder), name="static")
