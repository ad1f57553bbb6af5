"""Bootstrap intervals of a mean (Efron 1979; the percentile interval of Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import InputError
from ldbfr.seeds import derive_seed

RESAMPLES = 1000
LEVEL = 0.95
_AT_A_TIME = 50  # resamples drawn together: 3,000 images take 1.2 MB, 70,000 take 28 MB

Numbers = NDArray[np.float64]


def bootstrap_means(values: Numbers, resamples: int = RESAMPLES, seed: int = 0) -> Numbers:
    """The means of `resamples` draws with replacement from (n,) numbers: (resamples,) float64.

    The draws follow from the seed and n alone, so that sets of equal size are drawn alike, and differences between
    restorers are those of the same images.
    """
    if not len(values):
        raise InputError("no numbers to draw from: measure at least one image")
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    means = [
        values[rng.integers(0, len(values), (min(_AT_A_TIME, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, _AT_A_TIME)
    ]
    return np.concatenate(means)


def stratified_means(strata: Sequence[Numbers], resamples: int = RESAMPLES, seed: int = 0) -> Numbers:
    """The means over all strata of `resamples` draws, each stratum drawn from by itself: (resamples,) float64.

    Two sets of strata of the same sizes are drawn alike, so that what is drawn of one may be compared with the other's.

    Args:
        strata: (n,) arrays, whose sizes were fixed when the images were chosen, such as a test set's splits: what
            differs between them is no chance. One array is the plain bootstrap.
        resamples: number of draws.
        seed: of the draws.
    """
    count = sum(len(values) for values in strata)
    means = np.zeros(resamples)
    for number, values in enumerate(strata):
        own = seed if len(strata) == 1 else derive_seed(seed, "stratum", number)
        means += bootstrap_means(values, resamples, own) * (len(values) / count)
    return means


def central(draws: Numbers) -> tuple[float, float]:
    """The ends between which 95 % of the draws lie, with as many below as above."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def interval(strata: Sequence[Numbers], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The bootstrap 95 % interval of the mean of all finite numbers; arguments as of `stratified_means`."""
    return central(stratified_means(strata, resamples, seed))
