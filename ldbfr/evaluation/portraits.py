"""What dlib sees in a face: its embedding and its landmarks; and the tone of the skin between those."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import InputError
from ldbfr.evaluation.framing import Framing, tight_crop
from ldbfr.evaluation.metrics import IDENTITY_SIDE, IdentityModel
from ldbfr.evaluation.reading import pixels_digest
from ldbfr.images import Pixels
from ldbfr.weights import sha256_of

REMEMBERED = 4_096
"""Portraits that a process keeps, 2 kB each: an original is compared with the images of several restorers."""
DLIB_FILES = ("shape_predictor_68_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat")

_IDENTITY = IdentityModel()


class Portrait(NamedTuple):
    """An embedding (128,) and landmarks (68, 2), in px of the 128 px version of the face's tight frame."""

    embedding: NDArray[np.float64]
    landmarks: NDArray[np.float64]


_remembered: OrderedDict[tuple[str, Framing], Portrait] = OrderedDict()


def portray(image: Pixels, framing: Framing = "tight") -> Portrait:
    """An aligned face as dlib sees it: (S, S, 3) uint8.

    Args:
        image: the face.
        framing: that it is in; of "ffhq" the tight frame is cut out first, because the landmarks are fitted to the
            whole frame as the face's box.

    Raises:
        WeightsError: the extra `identity` is not installed.
        InputError: dlib gives numbers that are not finite, or the image is no square.
    """
    key = (pixels_digest(image), framing)
    if key in _remembered:
        _remembered.move_to_end(key)
        return _remembered[key]
    face = tight_crop(image) if framing == "ffhq" else image
    shape = _IDENTITY.landmarks(face)
    landmarks = np.array([(point.x, point.y) for point in shape.parts()], np.float64)
    portrait = Portrait(_IDENTITY.embed(face, shape), landmarks)
    if not (np.isfinite(portrait.embedding).all() and np.isfinite(portrait.landmarks).all()):
        raise InputError("dlib's embedding of it holds numbers that are not finite")
    _remembered[key] = portrait
    if len(_remembered) > REMEMBERED:
        _remembered.popitem(last=False)
    return portrait


def identity_distance(one: Portrait, other: Portrait) -> float:
    """Euclidean distance of two embeddings; below 0.6 dlib calls it the same person."""
    return float(np.linalg.norm(one.embedding - other.embedding))


def landmark_distance(one: Portrait, other: Portrait) -> float:
    """Mean distance of the 68 landmarks, in px of 128 px faces."""
    return float(np.linalg.norm(one.landmarks - other.landmarks, axis=1).mean())


@lru_cache(maxsize=1)
def dlib_digest() -> str:
    """SHA-256 of dlib's two networks' digests, in hexadecimal.

    Raises:
        WeightsError: the extra `identity` is not installed.
    """
    IdentityModel.check_installed()
    spec = find_spec("face_recognition_models")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "models"
    return hashlib.sha256("\n".join(sha256_of(folder / name) for name in DLIB_FILES).encode()).hexdigest()


def dlib_version() -> str:
    """dlib's version: its wheel's, or its own where it was built from source."""
    try:
        return version("dlib-bin")
    except PackageNotFoundError:
        import dlib

        return str(dlib.__version__)


def tone_angle(image: Pixels, seen: Portrait) -> float:
    """The individual typology angle arctan((L* - 50) / b*) of a tight face's cheeks, in degrees; higher is lighter.

    Of a photo it is as much the light as the skin: good for groups, not for a person. Del Bino and Bernerd 2013.
    """
    from skimage.color import rgb2lab

    points = seen.landmarks * len(image) / IDENTITY_SIDE
    patches = []
    for side, nose, mouth in ((2, 31, 48), (14, 35, 54)):  # jaw, nostril and corner of the mouth, left and right
        x, y = points[[side, nose, mouth]].mean(axis=0).astype(int)
        radius = max(1, len(image) // 32)
        patches.append(image[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1].reshape(-1, 3))
    lightness, _, yellow = np.median(rgb2lab(np.concatenate(patches)), axis=0)
    return float(np.degrees(np.arctan2(lightness - 50, max(yellow, 1e-3))))
