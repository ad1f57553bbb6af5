"""Which images, flips, degradations and noise belong to a training step.

A global batch is a function of (seed, step). Workers take slices of it, so that a run that was resumed, or that grew
or shrank, sees exactly the data of an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from ldbfr.data.index import Faces, Latents
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.images import to_float
from ldbfr.seeds import derive_seed


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch.

    `hq`, `lq` (b, 3, S, S) float in [-1, 1], `lq` only where the stage asks for it; `latents` (b, c, S/F, S/F), the
    frozen z_0, only where they are prepared; `indices` (b,) into the data set; `flips` (b,) bool; `places` (b,) in
    the global batch; `seeds` (b,) int64, one for every sample, from which its noise and timestep are drawn.
    """

    hq: Tensor
    lq: Tensor | None
    latents: Tensor | None
    indices: Tensor
    flips: Tensor
    places: Tensor
    seeds: Tensor

    def __len__(self) -> int:
        return len(self.hq)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Batch:
        """The same batch with its images on a device."""

        def moved(images: Tensor) -> Tensor:
            return images.to(device, non_blocking=True, memory_format=memory_format)

        return self.map(moved)

    def split(self, parts: int) -> list[Batch]:
        """Up to `parts` micro-batches in order, sizes at most one apart, none empty."""
        chunks = [chunk for chunk in torch.arange(len(self)).tensor_split(parts) if len(chunk)]
        return [self.take(chunk) for chunk in chunks]

    def take(self, rows: Tensor) -> Batch:
        """Some samples of the batch, by their numbers in it."""
        part = self.map(partial(torch.index_select, dim=0, index=rows.to(self.hq.device)))
        labels = {key: getattr(self, key)[rows] for key in ("indices", "flips", "places", "seeds")}
        return replace(part, **labels)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor of images or latents changed."""
        optional = [None if tensor is None else change(tensor) for tensor in (self.lq, self.latents)]
        return replace(self, hq=change(self.hq), lq=optional[0], latents=optional[1])


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
        latents: the frozen latents of `images`, if there are any.
    """

    images: Faces
    batch_size: int
    seed: int
    stage: str
    flip: bool
    profile: str | None
    latents: Latents | None = None

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The part of the step's global batch that falls to a worker."""
        seed = derive_seed(self.seed, self.stage)
        part = worker_slice(self.batch_size, rank, world_size)
        indices = global_indices(len(self.images), self.batch_size, seed, step)[part]
        positions = range(self.batch_size)[part]
        flips = np.array([self.flip and derive_seed(seed, "flip", step, p) % 2 == 1 for p in positions], dtype=bool)
        hq = self.images.read(indices)
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
            latents=None if self.latents is None else torch.from_numpy(self.latents.read(indices, flips)),
            indices=torch.from_numpy(indices),
            flips=torch.from_numpy(flips),
            places=torch.tensor(positions),
            seeds=torch.tensor([derive_seed(seed, "sample", step, p) for p in positions]),
        )

    def names(self, step: int) -> list[str]:
        """The images of a step's global batch, by name."""
        seed = derive_seed(self.seed, self.stage)
        return [self.images.names[i] for i in global_indices(len(self.images), self.batch_size, seed, step)]
