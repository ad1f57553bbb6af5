"""Distances between two sets of images by their features: Fréchet (FID) and kernel (KID).

The reference is one of three: the originals of the very images ("originals"), another folder of images, or a statistics
file. The number depends on it, on the network, on the resize before the network and on how many images there are, so
the protocol names all of them.

Sources: Heusel et al. 2017, "GANs trained by a two time-scale update rule"; Bińkowski et al. 2018, "Demystifying MMD
GANs".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import InputError
from ldbfr.evaluation.features import FeatureNetwork
from ldbfr.evaluation.frechet import gaussian_distance
from ldbfr.evaluation.moments import Moments
from ldbfr.evaluation.results import Measure
from ldbfr.evaluation.statistics import Statistics
from ldbfr.images import Pixels
from ldbfr.seeds import derive_seed

RESERVOIR = 5_000
"""Feature vectors that a kernel distance keeps of a set: 41 MB for 2,048 numbers."""
SUBSETS, SUBSET_SIZE = 100, 1_000
"""Of KID: torch-fidelity's defaults."""


def vector_of(network: FeatureNetwork, image: Pixels, name: str) -> NDArray[np.float64]:
    """Features of an image.

    Raises:
        InputError: with the image's name, where a number is not finite.
    """
    try:
        vector = network.features(image)
    except InputError as error:
        raise InputError(f"{name or 'an image'}: {error}") from error
    if not np.isfinite(vector).all():
        raise InputError(
            f"{name or 'an image'}: its features by {network.name} hold numbers that are not finite; look at the "
            "image, and at the network's weights"
        )
    return vector


class Gathering(Protocol):
    """What takes feature vectors in: moments, or a sample."""

    def add(self, vector: NDArray[np.float64]) -> None:
        """One vector."""


def gather(
    network: FeatureNetwork,
    own: Gathering,
    originals: Gathering | None,
    image: Pixels,
    original: Pixels | None,
    name: str,
) -> None:
    """Take an image in, and its original where those are the reference.

    Raises:
        InputError: features are not finite.
    """
    own.add(vector_of(network, image, name))
    if originals is not None and original is not None:
        originals.add(vector_of(network, original, f"{name}, the original" if name else ""))


def check_originals(images: int, originals: int, instead: str) -> None:
    """InputError where images lack the originals that they are compared with."""
    if originals < images:
        raise InputError(f"{images - originals:,} of {images:,} images have no original: give {instead}")


class FrechetMetric:
    """|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁C₂)^½) of two sets' features.

    Args:
        network: makes the features.
        name: of the measure.
        label: of the measure.
        reference: statistics; the originals of the images where None.
        force: give the number of fewer images than features too, with a remark: it is biased upwards then, and depends
            on their number.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        name: str = "fid",
        label: str = "FID",
        reference: Statistics | None = None,
        force: bool = False,
    ) -> None:
        self.network, self.reference, self.force = network, reference, force
        self.name, self.label = name, label
        self.own = Moments(network.size)
        self.originals = Moments(network.size)

    @property
    def measure(self) -> Measure:
        """With the protocol: reference, network, resize."""
        which = f"Fréchet distance to {reference_text(self.reference)}; {self.network.about}; covariances over n - 1"
        return Measure(name=self.name, label=self.label, better="lower", protocol=which)

    @property
    def settings(self) -> dict[str, Any]:
        """Whether it is forced, and the digest of the reference's statistics."""
        forced = {"force": True} if self.force else {}
        return forced if self.reference is None else {**forced, "reference": self.reference.digest}

    @property
    def remark(self) -> str:
        """That there are too few images, where the number is forced."""
        few = self._too_few()
        return f"forced: {few}" if few and self.force else ""

    def update(self, image: Pixels, original: Pixels | None, name: str = "") -> None:
        """Take an image in.

        Raises:
            InputError: its features are not finite.
        """
        originals = self.originals if self.reference is None else None
        gather(self.network, self.own, originals, image, original, name)

    def value(self) -> float:
        """The distance.

        Raises:
            InputError: there are no originals, or too few images and no `force`.
        """
        if self.reference is None:
            check_originals(self.own.count, self.originals.count, "a reference folder or a statistics file")
        if (few := self._too_few()) and not (self.force and self.own.count >= 2):
            raise InputError(
                f"{few}: covariances are singular, and the distance is biased and depends on the number of images. "
                "Take more images, or force it: it is marked then"
            )
        if self.reference is None:
            mean, covariance = self.originals.mean, self.originals.covariance()
        else:
            mean, covariance = self.reference.mean, self.reference.covariance
        return gaussian_distance(self.own.mean, self.own.covariance(), mean, covariance)

    def fresh(self) -> FrechetMetric:
        """An empty one; network and reference are shared."""
        return FrechetMetric(self.network, self.name, self.label, self.reference, self.force)

    def _too_few(self) -> str:
        """ "" or how many images there are of how many that are needed."""
        counts = [("images", self.own.count)]
        if self.reference is not None and self.reference.count is not None:
            counts.append(("images of the reference", self.reference.count))
        faults = [f"{count:,} {what}" for what, count in counts if count < self.network.size]
        return f"{' and '.join(faults)}, fewer than the {self.network.size:,} features" if faults else ""


class KernelMetric:
    """KID: the unbiased MMD² of two sets' features under (xᵀy / d + 1)³, mean over subsets.

    Of more than 5,000 images a fair sample is kept, drawn by the seed.

    Args:
        network: makes the features.
        name: of the measure.
        label: of the measure.
        reference: features of another set, with a text that says which; the originals where None.
        seed: of the sample.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        name: str = "kid",
        label: str = "KID",
        reference: tuple[Reservoir, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.network, self.reference, self.seed = network, reference, seed
        self.name, self.label = name, label
        self.own, self.originals = (Reservoir(network.size, seed, what) for what in ("images", "originals"))

    @property
    def measure(self) -> Measure:
        """With the protocol: reference, network, resize, subsets."""
        what = "the originals of the same images" if self.reference is None else self.reference[1]
        return Measure(
            name=self.name,
            label=self.label,
            better="lower",
            protocol=f"unbiased MMD² to {what}, kernel (xᵀy/d + 1)³, mean over {SUBSETS} subsets of {SUBSET_SIZE:,} "
            f"(of all, where there are fewer), at most {RESERVOIR:,} images kept by seed {self.seed}; "
            f"{self.network.about}",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The digest of the reference's sample."""
        return {} if self.reference is None else {"reference": self.reference[0].digest()}

    @property
    def remark(self) -> str:
        """How large the subsets are, where they are smaller than usual."""
        size = self._subset_size()
        return "" if size == SUBSET_SIZE else f"subsets of {size:,} images only"

    def update(self, image: Pixels, original: Pixels | None, name: str = "") -> None:
        """Take an image in.

        Raises:
            InputError: its features are not finite.
        """
        originals = self.originals if self.reference is None else None
        gather(self.network, self.own, originals, image, original, name)

    def value(self) -> float:
        """The distance.

        Raises:
            InputError: there are fewer than two images, or no originals.
        """
        import torch
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

        if self.reference is None:
            check_originals(self.own.count, self.originals.count, "a reference folder")
        if (size := self._subset_size()) < 2:
            raise InputError(f"{size} images: a kernel distance needs at least 2")
        sets = [torch.from_numpy(self.own.values()), torch.from_numpy(self._other().values())]
        found = kid_features_to_metric(
            *sets, kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=self.seed % 2**32, verbose=False
        )
        return float(found[KEY_METRIC_KID_MEAN])

    def fresh(self) -> KernelMetric:
        """An empty one; network and reference are shared."""
        return KernelMetric(self.network, self.name, self.label, self.reference, self.seed)

    def _other(self) -> Reservoir:
        return self.originals if self.reference is None else self.reference[0]

    def _subset_size(self) -> int:
        return min(SUBSET_SIZE, len(self.own), len(self._other()))


class Reservoir:
    """A fair sample of at most 5,000 vectors of all that came, drawn by a seed (Vitter 1985, algorithm R)."""

    def __init__(self, size: int, seed: int, what: str, capacity: int = RESERVOIR) -> None:
        self.size, self.capacity, self.count = size, capacity, 0
        self._rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "reservoir", what)))
        self._kept: list[NDArray[np.float32]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, vector: NDArray[np.float64]) -> None:
        """Take one vector in, or leave it out."""
        self.count += 1
        if len(self._kept) < self.capacity:
            self._kept.append(vector.astype(np.float32))
            return
        place = int(self._rng.integers(self.count))
        if place < self.capacity:
            self._kept[place] = vector.astype(np.float32)

    def values(self) -> NDArray[np.float64]:
        """The sample, (n, size)."""
        return np.stack(self._kept).astype(np.float64)

    def digest(self) -> str:
        """SHA-256 of the sample, in hexadecimal."""
        digest = hashlib.sha256()
        for vector in self._kept:
            digest.update(vector.tobytes())
        return digest.hexdigest()

    @classmethod
    def of(cls, vectors: Iterable[NDArray[np.float64]], size: int, seed: int, what: str) -> Reservoir:
        """A sample of all these."""
        reservoir = cls(size, seed, what)
        for vector in vectors:
            reservoir.add(vector)
        return reservoir


def reference_text(reference: Statistics | None) -> str:
    """What a set is compared with, for a protocol."""
    if reference is None:
        return "the originals of the same images"
    count = "an unknown number of" if reference.count is None else f"{reference.count:,}"
    return f"{count} images of {reference.about}"
