"""What a detector gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldbfr.images import Pixels


@dataclass(frozen=True)
class Face:
    """A face in a photo, in px of the upright photo."""

    box: tuple[float, float, float, float]
    """Left, top, width, height; may reach over the photo's border."""
    landmarks: tuple[tuple[float, float], ...]
    """Five (x, y): the eyes, the nose, the corners of the mouth; of each pair first the one on the left of an upright
    face's picture."""
    score: float = 1.0
    """Of the detector, 0 to 1."""
    turned: int = 0
    """Degrees clockwise by which the photo was turned to find it."""

    @property
    def points(self) -> NDArray[np.float64]:
        """The landmarks, (5, 2)."""
        return np.array(self.landmarks)

    @property
    def size(self) -> float:
        """Geometric mean of the box's sides, in px."""
        return math.sqrt(max(0.0, self.box[2] * self.box[3]))

    @property
    def centre(self) -> tuple[float, float]:
        """Of the box."""
        left, top, width, height = self.box
        return left + width / 2, top + height / 2


def common_area(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two boxes (left, top, width, height)."""
    area = 1.0
    for axis in (0, 1):
        end = min(one[axis] + one[axis + 2], other[axis] + other[axis + 2])
        area *= max(0.0, end - max(one[axis], other[axis]))
    return area


FaceDetector = Callable[[Pixels], list[Face]]
"""Finds the faces of an upright sRGB photo (H, W, 3); any order."""
