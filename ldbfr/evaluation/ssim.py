"""SSIM in a third of scikit-image's time, with the same numbers: 3,000 pairs of 512 px have to be quick on two cores.

Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", equation (13).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import InputError
from ldbfr.images import Pixels

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
LEVELS = 255.0


def windowed_ssim(image: Pixels, original: Pixels) -> float:
    """Structural similarity of two 8-bit images of one shape, (H, W, 3), sides of at least 11 px; 1 for equal images.

    11×11 Gaussian window of σ 1.5, K₁ 0.01, K₂ 0.03, not the sample covariance; then the mean over red, green and blue
    and over all places where the window fits. In float64; `ldbfr.evaluation.metrics.ssim`, scikit-image's, differs by
    rounding only.

    Raises:
        InputError: the images are too small for the window.
    """
    if min(image.shape[:2]) < WINDOW:
        raise InputError(f"images of shape {image.shape}: SSIM needs sides of at least {WINDOW} px")
    x, y = image.astype(np.float64), original.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    products, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance = smooth(x * y) - products
    variances = smooth(x * x + y * y) - squares
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    similarity = (2 * products + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return float(similarity.mean())


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Gaussian window's mean at every place where it fits: (H, W, 3) -> (H - 10, W - 10, 3)."""
    border = WINDOW // 2
    weights = np.exp(-0.5 * (np.arange(-border, border + 1) / SIGMA) ** 2)
    weights /= weights.sum()
    return np.asarray(cv2.sepFilter2D(values, -1, weights, weights), np.float64)[border:-border, border:-border]
