"""The Fréchet distance between two sets of features, each taken for a Gaussian.

Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule" (https://arxiv.org/abs/1706.08500), equation
(6); Dowson and Landau 1982.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import InputError

Features = NDArray[np.float64]


def frechet_distance(features: Features, reference: Features) -> float:
    """|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁C₂)^½) of two sets of features (n, d) and (m, d); covariances over n - 1.

    The root's trace is taken from the eigenvalues of C₁^½ C₂ C₁^½, which is symmetric, so that nothing complex comes
    up where a covariance is singular.

    Raises:
        InputError: other shapes, fewer than two rows, or numbers that are not finite.
    """
    for name, values in (("features", features), ("reference", reference)):
        if values.ndim != 2 or len(values) < 2 or values.shape[1] != reference.shape[-1]:
            raise InputError(f"{name} of shape {values.shape}: expected two sets of at least 2 vectors of one length")
        if not np.isfinite(values).all():
            raise InputError(f"{name} hold numbers that are not finite: leave those images out, and say so")
    means = [values.mean(axis=0) for values in (features, reference)]
    covariances = [np.atleast_2d(np.cov(values, rowvar=False)) for values in (features, reference)]
    return gaussian_distance(means[0], covariances[0], means[1], covariances[1])


def gaussian_distance(mean: Features, covariance: Features, other_mean: Features, other_covariance: Features) -> float:
    """|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁C₂)^½) of two Gaussians: means (d,), covariances (d, d)."""
    shift = mean - other_mean
    root = square_root(covariance)
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other_covariance @ root), 0, None)).sum()
    distance = float(shift @ shift + np.trace(covariance) + np.trace(other_covariance) - 2 * shared)
    return max(distance, 0.0)  # rounding may lead below


def square_root(matrix: Features) -> Features:
    """The symmetric square root of a symmetric matrix without negative eigenvalues (those of rounding are cut)."""
    values, vectors = np.linalg.eigh(matrix)
    root: Features = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
