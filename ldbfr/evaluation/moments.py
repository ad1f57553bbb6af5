"""Count, mean and covariance of feature vectors, gathered as they come: memory does not grow with their number.

Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import InputError

Features = NDArray[np.float64]

BLOCK = 64
"""Vectors that are taken in together: a product of matrices instead of many of vectors."""


class Moments:
    """Of vectors of `size` numbers, in float64: 8 · size² bytes, 34 MB for 2,048.

    `add` takes vectors in, `merge` what another has gathered; in whatever parts, the result is that of the whole.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._count = 0
        self._mean = np.zeros(size)
        self._scatter: Features | None = None  # made on first use: a set of metrics may never need it
        self._waiting: list[Features] = []

    @property
    def count(self) -> int:
        """Vectors taken in."""
        return self._count + len(self._waiting)

    @property
    def mean(self) -> Features:
        """μ, (size,)."""
        self._settle()
        return self._mean

    def covariance(self) -> Features:
        """C over n - 1, (size, size).

        Raises:
            InputError: fewer than two vectors.
        """
        self._settle()
        if self._scatter is None or self._count < 2:
            raise InputError(f"{self.count} feature vectors: a covariance needs at least 2")
        return self._scatter / (self._count - 1)

    def add(self, vector: Features) -> None:
        """Take one vector (size,) in.

        Raises:
            InputError: another length, or numbers that are not finite.
        """
        if vector.shape != (self.size,):
            raise InputError(f"features of shape {vector.shape}, expected ({self.size},)")
        if not np.isfinite(vector).all():
            raise InputError("its features hold numbers that are not finite")
        self._waiting.append(vector.astype(np.float64))
        if len(self._waiting) == BLOCK:
            self._settle()

    def merge(self, other: Moments) -> None:
        """Take all in that another has; it stays as it is.

        Raises:
            InputError: it is of vectors of another length.
        """
        if other.size != self.size:
            raise InputError(f"moments of vectors of {other.size} and of {self.size} numbers: expected one length")
        self._settle()
        other._settle()
        if other._scatter is not None:
            self._combine(other._count, other._mean, other._scatter)

    def _settle(self) -> None:
        if self._waiting:
            block = np.stack(self._waiting)
            self._waiting = []
            mean = block.mean(axis=0)
            around = block - mean
            self._combine(len(block), mean, around.T @ around)

    def _combine(self, count: int, mean: Features, scatter: Features) -> None:
        """The scatter Σ (x - μ)(x - μ)ᵀ of a union: both scatters and that of the two means about the common one."""
        if self._scatter is None:
            self._scatter = np.zeros((self.size, self.size))
        total = self._count + count
        shift = mean - self._mean
        self._scatter += scatter
        if self._count:
            self._scatter += np.outer(shift * (self._count * count / total), shift)
        self._mean = self._mean + shift * (count / total)
        self._count = total
