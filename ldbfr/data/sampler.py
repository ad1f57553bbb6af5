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
from ldbfr.seeds import derive_seed, normal_per_sample, uniform_per_sample


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch.

    `hq`, `lq` (b, 3, S, S) float in [-1, 1], `lq` only where the stage asks for it; `latents` (b, c, S/F, S/F), the
    frozen z_0, only where they are prepared; `indices` (b,) into the data set; `flips` (b,) bool; `places` (b,) in
    the global batch; `seeds` (b,) int64, one for every sample, from which its noise and timestep are drawn; `noise`
    (b, c, S/F, S/F) and `timesteps` (b,) int64, only where the sampler has drawn them already.
    """

    hq: Tensor
    lq: Tensor | None
    latents: Tensor | None
    indices: Tensor
    flips: Tensor
    places: Tensor
    seeds: Tensor
    noise: Tensor | None = None
    timesteps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hq)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Batch:
        """The same batch with its images on a device."""

        def moved(images: Tensor) -> Tensor:
            return images.to(device, non_blocking=True, memory_format=memory_format)

        return self.map(moved)

    def pin_memory(self) -> Batch:
        """The same batch with its images in page-locked memory (torch's loader calls it)."""
        return self.map(Tensor.pin_memory)

    def split(self, parts: int) -> list[Batch]:
        """Up to `parts` micro-batches in order, sizes at most one apart, none empty."""
        chunks = [chunk for chunk in torch.arange(len(self)).tensor_split(parts) if len(chunk)]
        return [self.take(chunk) for chunk in chunks]

    def take(self, rows: Tensor) -> Batch:
        """Some samples of the batch, by their numbers in it."""
        part = self.map(partial(torch.index_select, dim=0, index=rows.to(self.hq.device)))
        labels = {key: getattr(self, key)[rows] for key in ("indices", "flips", "places", "seeds")}
        if self.timesteps is not None:
            labels["timesteps"] = self.timesteps[rows]
        return replace(part, **labels)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor of images, latents or noise changed."""
        lq, latents, noise = (
            None if tensor is None else change(tensor) for tensor in (self.lq, self.latents, self.noise)
        )
        return replace(self, hq=change(self.hq), lq=lq, latents=latents, noise=noise)


@dataclass(frozen=True)
class NoiseDraw:
    """How the diffusion stages draw t and ε (equation (5)): t = T · u^power, u uniform, and standard normal noise.

    Args:
        shape: of one sample's latents, (c, S/F, S/F).
        num_timesteps: T.
        power: 1 is the paper's; above it, low timesteps come more often.
    """

    shape: tuple[int, int, int]
    num_timesteps: int
    power: float

    def __call__(self, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """t (b,) int64 and ε (b, c, S/F, S/F) of samples with these seeds (b,); each depends on its own seed alone."""
        share = uniform_per_sample(seeds, "timestep") ** self.power
        return (share * self.num_timesteps).long(), normal_per_sample(seeds, self.shape, "noise")


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
        noise: draws t and ε along with the images, if the stage wants them.
    """

    images: Faces
    batch_size: int
    seed: int
    stage: str
    flip: bool
    profile: str | None
    latents: Latents | None = None
    noise: NoiseDraw | None = None

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
        seeds = torch.tensor([derive_seed(seed, "sample", step, p) for p in positions])
        timesteps, noise = (None, None) if self.noise is None else self.noise(seeds)
        return Batch(
            hq=to_float(hq),
            lq=None if lq is None else to_float(lq),
            latents=None if self.latents is None else torch.from_numpy(self.latents.read(indices, flips)),
            indices=torch.from_numpy(indices),
            flips=torch.from_numpy(flips),
            places=torch.tensor(positions),
            seeds=seeds,
            noise=noise,
            timesteps=timesteps,
        )

    def names(self, step: int) -> list[str]:
        """The images of a step's global batch, by name."""
        seed = derive_seed(self.seed, self.stage)
        return [self.images.names[i] for i in global_indices(len(self.images), self.batch_size, seed, step)]
