"""The Fréchet distance against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ldbfr.errors import InputError
from ldbfr.evaluation.frechet import frechet_distance


def whitened(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Vectors of mean 0 and covariance I exactly."""
    values = np.random.default_rng(seed).normal(size=(count, size))
    values -= values.mean(axis=0)
    return values @ np.linalg.inv(np.linalg.cholesky(np.cov(values, rowvar=False))).T


def test_equal_sets_have_no_distance() -> None:
    features = np.random.default_rng(0).normal(size=(50, 7))
    assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-9)


def test_gaussians_that_share_their_axes_have_the_closed_form() -> None:
    # |μ|² + Σ (s - t)² for standard deviations s and t along common axes
    base, shift = whitened(200, 4), np.array([1.0, -2.0, 0.5, 0.0])
    spread, other = np.array([1.0, 2.0, 3.0, 0.5]), np.array([2.0, 2.0, 1.0, 0.1])
    expected = shift @ shift + ((spread - other) ** 2).sum()
    assert frechet_distance(base * spread + shift, whitened(300, 4, seed=1) * other) == pytest.approx(expected)


def test_any_gaussians_agree_with_the_matrix_square_root() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5))
    first, second = (np.cov(values, rowvar=False) for values in (one, two))
    means = one.mean(axis=0) - two.mean(axis=0)
    expected = means @ means + np.trace(first + second - 2 * np.real(sqrtm(first @ second)))
    assert frechet_distance(one, two) == pytest.approx(expected)
    assert frechet_distance(two, one) == pytest.approx(expected)


def test_a_singular_covariance_is_no_obstacle() -> None:
    rng = np.random.default_rng(2)
    flat = rng.normal(size=(10, 40))  # fewer vectors than dimensions
    turned, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    distance = frechet_distance(flat, flat + 3)
    assert distance == pytest.approx(9 * 40)
    assert frechet_distance(flat @ turned, (flat + 3) @ turned) == pytest.approx(distance)


@pytest.mark.parametrize(
    ("features", "text"),
    [
        (np.zeros((1, 3)), "at least 2 vectors"),
        (np.zeros((4, 2)), "of one length"),
        (np.full((4, 3), np.nan), "not finite"),
    ],
)
def test_what_has_no_distance_is_refused(features: np.ndarray, text: str) -> None:
    with pytest.raises(InputError, match=text):
        frechet_distance(features, np.zeros((4, 3)) + np.arange(4)[:, None])
