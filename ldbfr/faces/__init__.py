"""Faces in photos: find them, choose among them, and bring them into the frame that the model was trained on.

Parts load on first use: OpenCV and SciPy take a while.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldbfr.faces.alignment import TEMPLATES, Alignment, align, fit_similarity, template, warp
    from ldbfr.faces.detection import DETECTOR_FILE, YuNet
    from ldbfr.faces.face import Face, FaceDetector
    from ldbfr.faces.selection import Choice, Selection, WhichFaces, select

__all__ = [
    "Alignment",
    "Choice",
    "DETECTOR_FILE",
    "Face",
    "FaceDetector",
    "Selection",
    "TEMPLATES",
    "WhichFaces",
    "YuNet",
    "align",
    "fit_similarity",
    "select",
    "template",
    "warp",
]

_HOME = {
    "TEMPLATES": "ldbfr.faces.alignment",
    "Alignment": "ldbfr.faces.alignment",
    "align": "ldbfr.faces.alignment",
    "fit_similarity": "ldbfr.faces.alignment",
    "template": "ldbfr.faces.alignment",
    "warp": "ldbfr.faces.alignment",
    "DETECTOR_FILE": "ldbfr.faces.detection",
    "YuNet": "ldbfr.faces.detection",
    "Face": "ldbfr.faces.face",
    "FaceDetector": "ldbfr.faces.face",
    "Choice": "ldbfr.faces.selection",
    "Selection": "ldbfr.faces.selection",
    "WhichFaces": "ldbfr.faces.selection",
    "select": "ldbfr.faces.selection",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
