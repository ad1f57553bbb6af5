"""Bring a face into the frame of a template, and back: similarity fits and resampling that averages over areas.

Coordinates are (x, y) in px with the centre of the first pixel at (0, 0), as in OpenCV. A matrix is 2×3 and maps
column vectors (x, y, 1).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import InputError
from ldbfr.images import Pixels

Matrix = NDArray[np.float64]
Points = NDArray[np.float64]

TEMPLATES: dict[str, tuple[tuple[float, float], ...]] = {
    # FFHQ's frame at 512 px, as GFPGAN and CodeFormer use it.
    "ffhq": (
        (192.98138, 239.94708),
        (318.90277, 240.1936),
        (256.63416, 314.01935),
        (201.26117, 371.41043),
        (313.08905, 371.15118),
    ),
    # The frame of tight crops: medians of the detector's landmarks over 400 such faces, with left and right made even.
    "tight": (
        (153.4, 149.0),
        (350.8, 149.0),
        (252.0, 261.5),
        (170.9, 346.2),
        (333.2, 346.2),
    ),
}
"""Where the eyes, the nose and the corners of the mouth lie in a frame of 512×512 px, by the name in a preset.

The order is that of the picture: the eye on the left first, then the one on the right, likewise the mouth's corners.
"""

MOST_OVERSAMPLING = 16
"""Samples per side of a pixel; a larger reduction begins with an exact one by areas."""

_MARGIN = 4
"""Pixels around what is resampled, for the interpolation's support."""


def template(name: str, side: int) -> Points:
    """The five points of a template in a frame of `side` px, (5, 2)."""
    return (np.array(TEMPLATES[name]) + 0.5) * (side / 512) - 0.5


def fit_similarity(source: Points, target: Points) -> Matrix:
    """The rotation, scale and shift that bring points closest to others in the least squares' sense, 2×3.

    Umeyama 1991, "Least-squares estimation of transformation parameters between two point patterns", without the
    reflection. In complex numbers: target ≈ a · source + b.

    Args:
        source: (N, 2), at least two different points.
        target: (N, 2).

    Raises:
        InputError: all points of the source are one.
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    around = z - z.mean()
    if not np.vdot(around, around).real > 0:
        raise InputError(f"landmarks {source.tolist()}: all are one point, expected five; give the face's box instead")
    a = np.vdot(around, w - w.mean()) / np.vdot(around, around).real
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def inverse(matrix: Matrix) -> Matrix:
    """The map back."""
    linear = np.linalg.inv(matrix[:, :2])
    return np.hstack([linear, -linear @ matrix[:, 2:]])


def scale_of(matrix: Matrix) -> float:
    """Pixels of the target per pixel of the source."""
    return math.sqrt(abs(np.linalg.det(matrix[:, :2])))


def enlarged(matrix: Matrix, source: float = 1, target: float = 1) -> Matrix:
    """The same map between pictures that are enlarged by these factors."""
    linear = matrix[:, :2]
    # x_target' = (x_target + 1/2) t - 1/2 and x_source = (x_source' + 1/2) / s - 1/2
    shift = (linear @ np.full(2, 0.5 / source - 0.5) + matrix[:, 2] + 0.5) * target - 0.5
    return np.hstack([linear * target / source, shift[:, None]])


def transform(matrix: Matrix, points: Points) -> Points:
    """Map points (N, 2)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def shifted(matrix: Matrix, left: float, top: float) -> Matrix:
    """The same map into a target whose origin is moved to (left, top)."""
    return matrix - np.array([[0, 0, left], [0, 0, top]])


class Alignment(NamedTuple):
    """A face in the model's frame, and how it got there."""

    image: Pixels
    """(S, S, 3) sRGB."""
    matrix: Matrix
    """From the photo to the frame."""

    @property
    def photo_px(self) -> float:
        """Pixels of the photo per pixel of the frame: above 1 the photo shows more than the model can."""
        return 1 / scale_of(self.matrix)


def align(photo: Pixels, landmarks: Points, template_name: str, side: int) -> Alignment:
    """Cut a face out of a photo (H, W, 3); what lies beyond its border repeats the border.

    Args:
        photo: sRGB.
        landmarks: (5, 2), in the template's order.
        template_name: of the weights' preset.
        side: S, in px.
    """
    matrix = fit_similarity(landmarks, template(template_name, side))
    return Alignment(warp(photo, matrix, side, side), matrix)


def warp(image: NDArray[Any], matrix: Matrix, width: int, height: int) -> NDArray[Any]:
    """Resample an image by a similarity: bicubic where it grows, the mean over each pixel's area where it shrinks.

    Args:
        image: (H, W) or (H, W, C), uint8 or float32.
        matrix: from the image to the result.
        width: of the result, in px.
        height: of the result, in px.

    Returns:
        (height, width[, C]) of the same type; beyond the image its border is repeated.
    """
    image, matrix = _part_of_interest(image, matrix, width, height)
    shrink = math.ceil(1 / scale_of(matrix) / MOST_OVERSAMPLING)
    if shrink > 1:
        rows, columns = (math.ceil(length / shrink) for length in image.shape[:2])
        padded = np.pad(
            image,
            [(0, rows * shrink - image.shape[0]), (0, columns * shrink - image.shape[1]), *[(0, 0)] * (image.ndim - 2)],
            mode="edge",
        )
        image = cv2.resize(padded, (columns, rows), interpolation=cv2.INTER_AREA)
        matrix = enlarged(matrix, source=1 / shrink)
    samples = max(1, math.ceil(1 / scale_of(matrix) - 1e-6))
    fine = enlarged(matrix, target=samples)
    flags, border = cv2.INTER_CUBIC, cv2.BORDER_REPLICATE
    result = cv2.warpAffine(image, fine, (width * samples, height * samples), flags=flags, borderMode=border)
    if samples > 1:
        result = cv2.resize(result, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(result)


def _part_of_interest(image: NDArray[Any], matrix: Matrix, width: int, height: int) -> tuple[NDArray[Any], Matrix]:
    """The part of an image that a warp looks at (OpenCV takes 32,767 px a side at most), and the map from there."""
    corners = np.array([(-0.5, -0.5), (width - 0.5, -0.5), (-0.5, height - 0.5), (width - 0.5, height - 0.5)])
    seen = transform(inverse(matrix), corners)
    # Where nothing of the image is seen, the nearest pixels are, since the border repeats.
    low = [int(np.clip(np.floor(seen[:, axis].min()) - _MARGIN, 0, image.shape[1 - axis] - 1)) for axis in (0, 1)]
    high = [int(np.clip(np.ceil(seen[:, axis].max()) + _MARGIN, 0, image.shape[1 - axis] - 1)) for axis in (0, 1)]
    part = image[low[1] : high[1] + 1, low[0] : high[0] + 1]
    moved = matrix.copy()
    moved[:, 2] += matrix[:, :2] @ np.array(low)
    return np.ascontiguousarray(part), moved
