"""Peak memory and time of one restoration at paper scale, with random weights, on this machine's CPU.

    python benchmarks/memory.py --preset paper_512 --steps 2

Peaks are resident memory beyond what was held before (Linux); the code lookup is measured in chunks and whole.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from ldbfr.config import Preset, load_preset
from ldbfr.models import vqgan
from ldbfr.models.dc_vqr import DCVQRModel
from ldbfr.models.dqe import DQEUNet2DModel, make_unet
from ldbfr.pipeline import LDBFRPipeline


@dataclass(frozen=True)
class Memory:
    """Measure peak memory."""

    preset: str = "paper_512"
    """Which shapes."""
    steps: int = 2
    """Denoising steps; time grows with them, memory does not."""
    output: Path | None = None
    """JSON file for the results."""


def memory_mib(field: str) -> float:
    """A field of this process's status, in MiB: VmRSS is what it holds now, VmHWM the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


@contextmanager
def measured(results: dict[str, object], name: str) -> Iterator[None]:
    """Note the peak of a block beyond what was held before it, in MiB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = memory_mib("VmRSS")
    yield
    results[f"{name}, MiB"] = round(memory_mib("VmHWM") - before)


def random_pipeline(preset: Preset) -> LDBFRPipeline:
    """The preset's networks, untrained."""
    dc_vqr = DCVQRModel.from_vqgan(vqgan.VQGAN.from_settings(preset.hq_vqgan), preset.attention)
    latent_vqgan = vqgan.VQGAN.from_settings(preset.latent_vqgan)
    prior = make_unet(preset.unet, preset.latent_vqgan.code_dim, preset.latent_side)
    unet = DQEUNet2DModel.from_unet(prior, preset.injection, preset.hq_vqgan.code_dim, preset.feature_side)
    return LDBFRPipeline(dc_vqr, latent_vqgan, unet, preset=preset)


def main(args: Memory) -> None:
    """Print and write the figures."""
    preset = load_preset(args.preset)
    pipeline = random_pipeline(preset)
    side = preset.latent_side
    features = torch.randn(1, preset.latent_vqgan.code_dim, side, side)
    results: dict[str, object] = {"preset": preset.name, "machine": f"{platform.machine()}, torch {torch.__version__}"}

    results["weights in float32, MiB"] = round(memory_mib("VmRSS"))
    with measured(results, "latent code lookup in chunks"):
        pipeline.latent_vqgan.quantize.nearest(features)
    lq = np.random.default_rng(0).integers(0, 256, (1, preset.side, preset.side, 3), dtype=np.uint8)
    started = time.perf_counter()
    with measured(results, "restoration of one image beyond the weights"):
        pipeline(lq, num_inference_steps=args.steps)
    results["steps"], results["seconds"] = args.steps, round(time.perf_counter() - started, 1)
    vqgan.LOOKUP_ELEMENTS = 1 << 62
    with measured(results, "latent code lookup whole"):
        pipeline.latent_vqgan.quantize.nearest(features)

    print(json.dumps(results, indent=1))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Memory, description=__doc__))
