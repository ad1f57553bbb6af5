"""What the tests of the core share: the tiny preset, its networks at random, blob faces, a pipeline, a runtime.

Everything is real, only small. Networks are cached by seed and overrides: a test that changes one takes a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ldbfr.config import Preset, load_preset
from ldbfr.data.index import FaceImages
from ldbfr.images import to_float
from ldbfr.models.dc_vqr import DCVQRModel
from ldbfr.models.dqe import DQEUNet2DModel, make_unet
from ldbfr.models.hq_injection import Injection
from ldbfr.models.vqgan import VQGAN
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.training.loop import Trainer
from ldbfr.training.runtime import Request, Runtime
from ldbfr.training.stages import Stage, make_stage

SIDE = 32
"""Side of the tiny preset's faces."""


@lru_cache
def preset(*overrides: str) -> Preset:
    """The preset `tiny`, with overrides as on the command line."""
    return load_preset("tiny", overrides)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Makes what torch draws inside a function of the seed, and leaves the generator outside alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blob_faces(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """Smooth pictures that resemble faces: a skin-coloured ellipse with eyes and a mouth, (N, S, S, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5

    def blob(cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
        weight = np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)
        return np.asarray(weight)[..., None]

    faces = []
    for _ in range(count):
        dx, dy = rng.uniform(-0.08, 0.08, 2)
        image = np.ones((side, side, 3)) * rng.uniform(0, 255, 3)
        for colour, shape in (
            (np.array([220, 170, 140]) * rng.uniform(0.5, 1.1), (dx, dy, 0.3, 0.4)),
            (np.array([30, 20, 20]), (dx - 0.13, dy - 0.1, 0.06, 0.05)),
            (np.array([30, 20, 20]), (dx + 0.13, dy - 0.1, 0.06, 0.05)),
            (np.array([170, 40, 50]), (dx, dy + 0.18, rng.uniform(0.08, 0.16), 0.05)),
        ):
            weight = blob(*shape)
            image = image * (1 - weight) + colour * weight
        faces.append(image)
    return np.clip(np.rint(faces), 0, 255).astype(np.uint8)


def face_images(count: int = 8, side: int = SIDE, seed: int = 0) -> FaceImages:
    """Blob faces as a data set."""
    return FaceImages(blob_faces(count, side, seed), [f"face-{number:03d}.png" for number in range(count)])


def lq_batch(count: int = 2, seed: int = 0) -> Tensor:
    """Blob faces as (B, 3, S, S) in [-1, 1]."""
    return to_float(blob_faces(count, seed=seed))


def networks(*overrides: str, seed: int = 0) -> dict[str, Any]:
    """Fresh networks of a tiny model, by stage name; the injections still at zero."""
    return copy.deepcopy(_networks(seed, *overrides))


@lru_cache
def _networks(seed: int, *overrides: str) -> dict[str, ModelMixin]:
    settings = preset(*overrides)
    with seeded(seed):
        hq_vqgan, latent_vqgan = (VQGAN.from_settings(shape) for shape in (settings.hq_vqgan, settings.latent_vqgan))
        spread_codes(hq_vqgan, latent_vqgan)
        dc_vqr = DCVQRModel.from_vqgan(hq_vqgan, settings.attention)
        prior = make_unet(settings.unet, settings.latent_vqgan.code_dim, settings.latent_side)
        enhancer = DQEUNet2DModel.from_unet(
            prior, settings.injection, settings.hq_vqgan.code_dim, settings.feature_side
        )
    return {
        "hq_vqgan": hq_vqgan,
        "latent_vqgan": latent_vqgan,
        "dc_vqr": dc_vqr,
        "prior": prior,
        "enhancer": enhancer,
    }


@torch.no_grad()
def spread_codes(*vqgans: VQGAN) -> None:
    """Codes like features, as after training: a fresh codebook sits within 1/K of zero."""
    for vqgan in vqgans:
        vqgan.quantize.embedding.weight.normal_(0, 0.5)


@torch.no_grad()
def wake_injections(dqe: DQEUNet2DModel, seed: int = 1, scale: float = 0.3) -> DQEUNet2DModel:
    """Move the projections of all injections away from zero, as training does."""
    for number, injection in enumerate(injections(dqe)):
        weight = injection.projection.weight
        weight.copy_(scale * normal(*weight.shape, seed=seed + number))
    return dqe


def injections(dqe: DQEUNet2DModel) -> list[Injection]:
    """The injections that are there, down path first."""
    return [module for module in (*dqe.down_injections, *dqe.up_injections) if isinstance(module, Injection)]


def new_pipeline(*overrides: str, seed: int = 0) -> LDBFRPipeline:
    """A pipeline of random networks whose injections matter."""
    parts = networks(*overrides, seed=seed)
    pipeline = LDBFRPipeline(
        parts["dc_vqr"], parts["latent_vqgan"], wake_injections(parts["enhancer"]), preset(*overrides)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@lru_cache
def pipeline() -> LDBFRPipeline:
    """The pipeline that tests share; nobody changes it."""
    return new_pipeline()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of the entries that are not bit for bit the same."""
    assert before.keys() == after.keys()
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


def flip_byte(file: Path, position: int) -> None:
    """Invert one byte of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= 0xFF
    file.write_bytes(bytes(data))


def new_stage(name: str, *overrides: str, noise_seed: int | None = None) -> Any:
    """A training stage on random networks of the stages before it; with a noise seed, its network is scrambled."""
    stage = make_stage(name, preset(*overrides), networks(*overrides))
    if noise_seed is not None:
        with torch.no_grad():
            for number, value in enumerate(stage.network.state_dict().values()):
                value.add_(normal(*value.shape, seed=noise_seed + number))
    return stage


def new_trainer(
    folder: Path,
    name: str,
    *overrides: str,
    runtime: Runtime | None = None,
    images: FaceImages | None = None,
    noise_seed: int | None = None,
    stage: Stage | None = None,
) -> Trainer:
    """A trainer of one stage on blob faces; see `new_stage`."""
    faces = images or face_images()
    return Trainer(
        stage or new_stage(name, *overrides, noise_seed=noise_seed),
        faces,
        faces,
        folder / name,
        runtime or Worker(),
        {},
    )


class Worker:
    """A runtime (`ldbfr.training.runtime.Runtime`) for tests: one worker of several, which stops after some steps."""

    def __init__(
        self, rank: int = 0, world_size: int = 1, stop_after: int | None = None, save_after: int | None = None
    ) -> None:
        self.rank, self.world_size, self.stop_after, self.save_after = rank, world_size, stop_after, save_after
        self.device = torch.device("cpu")
        self.reports: list[dict[str, float]] = []
        self.checkpoints: list[int] = []
        self.closed = False

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def sum(self, values: Tensor) -> Tensor:
        return values

    def report(self, step: int, metrics: dict[str, float]) -> None:
        self.reports.append(metrics)

    def request(self, step: int) -> Request:
        if self.stop_after is not None and len(self.reports) >= self.stop_after:
            return Request.STOP
        return Request.SAVE if self.save_after == len(self.reports) else Request.NONE

    def saved(self, step: int) -> None:
        self.checkpoints.append(step)

    def close(self) -> None:
        self.closed = True
