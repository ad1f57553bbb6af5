"""Faces in photos: find them, choose among them, and bring them into the frame that the model was trained on."""

from ldbfr.faces.alignment import TEMPLATES, Alignment, align, fit_similarity, template, warp
from ldbfr.faces.detection import DETECTOR_FILE, Face, FaceDetector, YuNet
from ldbfr.faces.selection import Choice, Selection, WhichFaces, select

__all__ = [
    "DETECTOR_FILE",
    "TEMPLATES",
    "Alignment",
    "Choice",
    "Face",
    "FaceDetector",
    "Selection",
    "WhichFaces",
    "YuNet",
    "align",
    "fit_similarity",
    "select",
    "template",
    "warp",
]
