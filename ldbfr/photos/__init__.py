"""Whole photos: find every face, restore it, put it back without a seam.

Parts load on first use: OpenCV and SciPy take a while.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldbfr.photos.finding import FaceFinder, FoundFace, FoundFaces, find_faces
    from ldbfr.photos.photo import Photo, Upscaler, decode_photo
    from ldbfr.photos.restorer import FaceReport, PhotoRestorer, PhotoResult, put_back
    from ldbfr.photos.settings import PhotoSettings

__all__ = [
    "FaceFinder",
    "FaceReport",
    "FoundFace",
    "FoundFaces",
    "Photo",
    "PhotoRestorer",
    "PhotoResult",
    "PhotoSettings",
    "Upscaler",
    "decode_photo",
    "find_faces",
    "put_back",
]

_HOME = {
    "FaceFinder": "ldbfr.photos.finding",
    "FoundFace": "ldbfr.photos.finding",
    "FoundFaces": "ldbfr.photos.finding",
    "find_faces": "ldbfr.photos.finding",
    "Photo": "ldbfr.photos.photo",
    "Upscaler": "ldbfr.photos.photo",
    "decode_photo": "ldbfr.photos.photo",
    "FaceReport": "ldbfr.photos.restorer",
    "PhotoRestorer": "ldbfr.photos.restorer",
    "PhotoResult": "ldbfr.photos.restorer",
    "put_back": "ldbfr.photos.restorer",
    "PhotoSettings": "ldbfr.photos.settings",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
