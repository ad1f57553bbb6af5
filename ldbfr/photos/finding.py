"""The first step on a photo, which needs no networks but the detector: find faces, choose, cut them out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ldbfr.evaluation.metrics import IdentityModel
from ldbfr.faces.alignment import Alignment, align, inverse, warp
from ldbfr.faces.detection import YuNet
from ldbfr.faces.face import Face, FaceDetector
from ldbfr.faces.selection import select
from ldbfr.images import Pixels
from ldbfr.photos.paste import LUMA, Colors, RestoredFace, area_of, noise_level, patch_around
from ldbfr.photos.photo import Photo
from ldbfr.photos.settings import PhotoSettings

MODEL_FITS = 1.15
"""Pixels of the photo per pixel of the model's frame up to which the model can show all of a face."""
SHARPER = 1.3
"""Grey levels of detail, beyond noise, that the model's frame cannot hold, above which a face is sharper than it."""
LOOKED_AT = 1_024
"""Side in px of the part of a large face that is looked at for this."""


@dataclass(frozen=True)
class FoundFace:
    """A face of a photo, and what is to become of it.

    Args:
        face: where it is.
        reason: why it stays as it is; None where it is restored.
        alignment: the face in the model's frame; None where it is not restored.
    """

    face: Face
    reason: str | None = None
    alignment: Alignment | None = None

    @cached_property
    def digest(self) -> str:
        """Of what the model sees; empty where it sees nothing."""
        return hashlib.sha256(self.alignment.image.tobytes()).hexdigest() if self.alignment else ""


@dataclass(frozen=True)
class FoundFaces:
    """The faces of a photo, largest first.

    Args:
        faces: all that were found.
        colors: what of the model's colours the photo takes.
    """

    faces: tuple[FoundFace, ...]
    colors: Colors = "fine"

    def chosen(self) -> list[Pixels]:
        """What the model is to restore, (S, S, 3) each, in order."""
        return [found.alignment.image for found in self.faces if found.alignment is not None]


@dataclass(frozen=True)
class FaceFinder:
    """`find_faces` with everything but the photo settled; it can be sent to another process."""

    detector: FaceDetector
    settings: PhotoSettings
    template: str
    side: int

    def __call__(self, photo: Photo) -> FoundFaces:
        """The faces of a photo."""
        return find_faces(photo, self.detector, self.settings, self.template, self.side)


def make_detector(settings: PhotoSettings, model: str | Path | None = None) -> YuNet:
    """The detector that settings ask for, once all that they need is known to be there.

    Args:
        settings: of the restoration.
        model: the detector's file, see `YuNet`.

    Raises:
        WeightsError: the file cannot be found, or dlib is missing where identities are asked for.
    """
    if settings.min_identity is not None:
        IdentityModel.check_installed()
    return YuNet(model, min_score=settings.min_score, min_size=settings.min_face)


def find_faces(photo: Photo, detector: FaceDetector, settings: PhotoSettings, template: str, side: int) -> FoundFaces:
    """Find the faces of a photo and cut those that are wanted out.

    Args:
        photo: upright.
        detector: see `ldbfr.faces.YuNet`.
        settings: which faces are wanted.
        template: of the weights' preset, see `ldbfr.faces.TEMPLATES`.
        side: S, of the model.

    Raises:
        InputError: the photo would be too large once it is enlarged.
    """
    photo.check_scale(settings.scale)
    choices = select(detector(photo.shown), settings.selection, photo.width, photo.height)
    found = [
        FoundFace(face, reason) if reason else cut_out(photo, face, settings, template, side)
        for face, reason in choices
    ]
    colors: Colors = "fine"
    if photo.is_of_one_tone():
        colors = "none" if settings.grey == "keep" else "all"
    return FoundFaces(tuple(found), colors)


def cut_out(photo: Photo, face: Face, settings: PhotoSettings, template: str, side: int) -> FoundFace:
    """One wanted face in the model's frame, unless it is sharper than the model could make it."""
    alignment = align(photo.shown, face.points, template, side)
    if settings.sharp_faces == "leave" and alignment.photo_px > MODEL_FITS:
        lost = detail_beyond(photo.shown, face, alignment)
        if lost > SHARPER:
            size = round(side * alignment.photo_px)
            return FoundFace(
                face,
                f"sharper than the model's {side} px: the photo shows it in {size} px, with detail that would be lost",
            )
    return FoundFace(face, None, alignment)


def detail_beyond(photo: Pixels, face: Face, alignment: Alignment) -> float:
    """Root mean square of what a face loses in the model's frame, in grey levels; noise is taken off."""
    side = len(alignment.image)
    here = RestoredFace(alignment.image, alignment.image, alignment.matrix, face.points)
    area = patch_around(area_of(here, photo, 1), LOOKED_AT)
    if area.is_empty:
        return 0.0
    matrix = inverse(alignment.matrix)
    matrix[:, 2] -= (area.left, area.top)
    luma = np.asarray(area.of(photo), np.float32) @ LUMA
    through = warp(alignment.image.astype(np.float32) @ LUMA, matrix, area.width, area.height)
    inside = warp(np.pad(np.ones((side - 2, side - 2), np.float32), 1), matrix, area.width, area.height) > 0.5
    lost = float(((luma - through)[inside] ** 2).mean()) if inside.any() else 0.0
    return float(np.sqrt(max(0.0, lost - noise_level(luma) ** 2)))
