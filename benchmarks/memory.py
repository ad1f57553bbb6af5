"""Peak memory and time of one restoration at paper scale, with random weights, on this machine's CPU.

    python benchmarks/memory.py --preset paper_512 --steps 2

Peak memory is the process's maximum resident set; the code lookup is measured in chunks and whole.
"""

from __future__ import annotations

import json
import platform
import resource
import time
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


def peak_mib() -> float:
    """Maximum resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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

    before = peak_mib()
    pipeline.latent_vqgan.quantize.nearest(features)
    results["lookup in chunks, MiB"] = round(peak_mib() - before)

    before = peak_mib()
    lq = np.random.default_rng(0).integers(0, 256, (1, preset.side, preset.side, 3), dtype=np.uint8)
    started = time.perf_counter()
    pipeline(lq, num_inference_steps=args.steps)
    results["restoration beyond the weights, MiB"] = round(peak_mib() - before)
    results["restoration, seconds"] = round(time.perf_counter() - started, 1)
    results["steps"] = args.steps

    before = peak_mib()
    vqgan.LOOKUP_ELEMENTS = 1 << 62
    pipeline.latent_vqgan.quantize.nearest(features)
    results["whole lookup on top of that peak, MiB"] = round(peak_mib() - before)
    results["process peak, MiB"] = round(peak_mib())

    print(json.dumps(results, indent=1))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Memory, description=__doc__))
