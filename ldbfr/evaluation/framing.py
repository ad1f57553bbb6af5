"""Two frames for a face: FFHQ's, which CelebA-HQ shares, and the tight one of some weights and of dlib's networks."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from ldbfr.errors import InputError
from ldbfr.faces import TEMPLATES, fit_similarity
from ldbfr.faces.alignment import scale_of
from ldbfr.images import Pixels

Framing = Literal["ffhq", "tight"]
"""What part of a head an image shows; the names are those of `ldbfr.faces.TEMPLATES`."""


@lru_cache(maxsize=1)
def tight_part() -> tuple[float, float, float]:
    """Left, top and side of the tight frame within FFHQ's, as shares of its side: about 0.17, 0.28, 0.66.

    From the two templates' landmarks, by the similarity that fits them best (its rotation, 0.3°, is left out).
    """
    wide, tight = (np.array(TEMPLATES[name]) + 0.5 for name in ("ffhq", "tight"))
    side = 512 / scale_of(fit_similarity(wide, tight))
    left, top = wide.mean(axis=0) - tight.mean(axis=0) * side / 512
    return float(left) / 512, float(top) / 512, side / 512


def tight_crop(face: Pixels) -> Pixels:
    """The tight frame of a face in FFHQ's, to whole pixels and without resampling: (S, S, 3) -> (0.66 S, 0.66 S, 3).

    Raises:
        InputError: the image is not a square.
    """
    height, width = face.shape[:2]
    if height != width:
        raise InputError(f"a face of {width} × {height} px: a frame is a square; align it first")
    left, top, side = tight_part()
    x, y, length = round(left * width), round(top * width), max(1, round(side * width))
    return np.ascontiguousarray(face[y : y + length, x : x + length])
