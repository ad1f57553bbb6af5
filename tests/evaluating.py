"""What the tests of evaluations share: a small test set in memory, and a pipeline's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldbfr.evaluation.engine import Metrics
from ldbfr.evaluation.metrics import psnr, sharpness
from ldbfr.evaluation.results import Entry, Measure, Missing
from ldbfr.images import Pixels, resize
from tests import tiny


def degrade(image: Pixels, factor: int) -> Pixels:
    """Half or a quarter of the resolution is lost."""
    side = len(image)
    return resize(resize(image, side // factor, side // factor), side, side)


@dataclass(frozen=True)
class BlobSet:
    """Blob faces, half of them mildly and half severely degraded; `originals` says whether they have a ground truth."""

    count: int = 6
    side: int = tiny.SIDE
    originals: bool = True
    name: str = "blobs"
    about: dict[str, Any] = field(default_factory=lambda: {"digest": "of blobs"})

    @property
    def entries(self) -> Sequence[Entry]:
        names = [f"{split}/{n:03d}" for split in ("mild", "severe") for n in range((self.count + 1) // 2)]
        return [
            Entry(name=one, split=one.partition("/")[0], lq=f"lq/{one}", hq=f"hq/{one}" if self.originals else None)
            for one in names[: self.count]
        ]

    def read(self, entry: Entry) -> tuple[Pixels, Pixels | None]:
        split, _, number = entry.name.partition("/")
        original = tiny.blob_faces(self.count, self.side)[int(number)]
        return degrade(original, 2 if split == "mild" else 4), original if self.originals else None


class Psnr:
    """The formula of `ldbfr.evaluation.metrics` as a metric; counts its calls."""

    needs_original = True
    measure = Measure(name="psnr", label="PSNR", unit="dB", better="higher", protocol="a formula")

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        assert original is not None
        self.calls += 1
        return psnr(image, original)


class Sharpness:
    """A metric that needs no original."""

    needs_original = False
    measure = Measure(name="sharpness", label="Sharpness", better="higher", protocol="the mean absolute Laplacian")

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        return sharpness(image)


@dataclass
class Brightness:
    """A set metric: the distance of the mean grey levels of images and originals."""

    measure = Measure(name="brightness", label="Brightness", better="lower", protocol="difference of the means")
    remark = ""
    total: float = 0.0
    count: int = 0
    least: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    def update(self, image: Pixels, original: Pixels | None, name: str = "") -> None:
        assert original is not None
        self.total += float(image.mean() - original.mean())
        self.count += 1

    def value(self) -> float:
        from ldbfr.errors import InputError

        if self.count < self.least:
            raise InputError(f"{self.count} images, expected at least {self.least}")
        return abs(self.total / self.count)

    def fresh(self) -> Brightness:
        return Brightness(least=self.least, settings=self.settings)


def metrics(least: int = 1) -> Metrics:
    """Two of pairs, one of sets, one that cannot be had."""
    missing = (Missing(name="fid", reason="its network is not on this machine"),)
    return Metrics((Psnr(), Sharpness()), (Brightness(least=least),), missing)


def save_weights(folder: Path) -> str:
    """The tiny pipeline's weights, in a new folder."""
    tiny.new_pipeline().save_pretrained(folder)
    return str(folder)


def images_of(test_set: BlobSet) -> tuple[np.ndarray, np.ndarray]:
    """All inputs and originals of a set that has them."""
    pairs = [test_set.read(entry) for entry in test_set.entries]
    originals = [original for _, original in pairs if original is not None]
    return np.stack([lq for lq, _ in pairs]), np.stack(originals)
