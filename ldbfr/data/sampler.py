"""Which images, flips, degradations and noise belong to a training step.

A global batch is a function of (seed, step). Workers take slices of it, so that a run that was resumed, or that grew
or shrank, sees exactly the data of an undisturbed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ldbfr.data.index import FaceImages
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.images import to_float
from ldbfr.seeds import derive_seed


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch.

    `hq`, `lq` (b, 3, S, S) float in [-1, 1], `lq` only where the stage asks for it; `indices` (b,) into the data set;
    `flips` (b,) bool; `seeds` (b,) int64, one for every sample, from which its noise and timestep are drawn.
    """

    hq: Tensor
    lq: Tensor | None
    indices: Tensor
    flips: Tensor
    seeds: Tensor

    def __len__(self) -> int:
        return len(self.hq)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Batch:
        """The same batch with its images on a device."""
        hq = self.hq.to(device, non_blocking=True, memory_format=memory_format)
        lq = None if self.lq is None else self.lq.to(device, non_blocking=True, memory_format=memory_format)
        return Batch(hq, lq, self.indices, self.flips, self.seeds)

    def split(self, parts: int) -> list[Batch]:
        """Up to `parts` micro-batches in order, sizes at most one apart, none empty."""
        chunks = [chunk for chunk in torch.arange(len(self)).tensor_split(parts) if len(chunk)]
        return [
            Batch(
                self.hq[chunk],
                None if self.lq is None else self.lq[chunk],
                self.indices[chunk],
                self.flips[chunk],
                self.seeds[chunk],
            )
            for chunk in chunks
        ]


@lru_cache(maxsize=4)
def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of the data set in an epoch, (num_images,) int64."""
    rng = np.random.Generator(np.random.Philox(derive_seed(seed, "epoch", epoch)))
    return rng.permutation(num_images)


def global_indices(num_images: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the global batch of a step, (batch_size,) int64; every image once before any comes again."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, num_images)
    return np.array([epoch_order(num_images, seed, int(e))[p] for e, p in zip(epochs, places, strict=True)])


def worker_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Which positions of the global batch a worker takes; sizes differ by at most one."""
    return slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


@dataclass(frozen=True)
class BatchSampler:
    """Makes the batches of a stage.

    Args:
        images: the data set.
        batch_size: of the global batch.
        seed: of the run; `stage` makes every stage's draws its own.
        stage: its name.
        flip: mirror every second image on average.
        profile: degradation profile that `lq` is drawn from; None leaves `lq` out.
    """

    images: FaceImages
    batch_size: int
    seed: int
    stage: str
    flip: bool
    profile: str | None

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The part of the step's global batch that falls to a worker."""
        seed = derive_seed(self.seed, self.stage)
        part = worker_slice(self.batch_size, rank, world_size)
        indices = global_indices(len(self.images), self.batch_size, seed, step)[part]
        positions = range(self.batch_size)[part]
        flips = np.array([self.flip and derive_seed(seed, "flip", step, p) % 2 == 1 for p in positions], dtype=bool)
        hq = self.images.pixels[indices].copy()
        hq[flips] = hq[flips, :, ::-1]
        lq = None
        if self.profile is not None:
            profile = get_profile(self.profile)
            lq = np.stack(
                [
                    apply(draw(profile, degradation_generator(seed, "degradation", step, p)), image)
                    for p, image in zip(positions, hq, strict=True)
                ]
            )
        return Batch(
            hq=to_float(hq),
            lq=None if lq is None else to_float(lq),
            indices=torch.from_numpy(indices),
            flips=torch.from_numpy(flips),
            seeds=torch.tensor([derive_seed(seed, "sample", step, p) for p in positions]),
        )
