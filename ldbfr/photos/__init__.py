"""Whole photos: find every face, restore it, put it back without a seam."""

from ldbfr.photos.finding import FoundFace, FoundFaces, find_faces
from ldbfr.photos.photo import Photo, Upscaler, decode_photo
from ldbfr.photos.restorer import FaceReport, PhotoRestorer, PhotoResult, put_back
from ldbfr.photos.settings import PhotoSettings

__all__ = [
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
