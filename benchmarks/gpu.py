"""What a GPU makes of the model: parity with the CPU, inference and training at paper scale, speed and memory.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json
    python benchmarks/gpu.py --compile                      # torch.compile too, which takes a minute or two

Parity is measured with real weights: the same faces restored on the CPU in float32 and on the GPU in every precision.
Speed and memory at paper scale are those of `paper_512` with untrained networks, whose arithmetic is the same. Times
are medians with the device synchronised; a training step is all of it, from the batch on the GPU to the averages.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import numpy as np
import torch
import tyro

from benchmarks.machine import machine
from benchmarks.memory import random_pipeline
from ldbfr.config import Preset, load_preset
from ldbfr.data.index import FaceImages
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.evaluation.metrics import psnr
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.training.loop import Trainer
from ldbfr.training.plan import plan_stage
from ldbfr.training.runtime import SingleProcess
from ldbfr.training.stages import STAGE_NAMES, make_stage, stage_class
from ldbfr.training.step_cost import example_batch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GPU:
    """Measure a GPU."""

    weights: str = "faces_64"
    """Name or folder of the weights for the parity."""
    data: tuple[Path, ...] = ()
    """Faces for the parity; drawn pictures when left out."""
    preset: str = "paper_512"
    """Shapes of the speed measurements."""
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    """For inference."""
    steps: int = 16
    """Denoising steps of the inference."""
    repeats: int = 3
    """Runs of which the median counts, after one that does not."""
    train_batch_size: int = 8
    """For training, the paper's."""
    compile: bool = False
    """Measure inference under torch.compile, too."""
    device: str = "cuda"
    """"cpu" to try the script."""
    output: Path | None = None
    """JSON file for the results; written after every part."""


def synchronised(device: torch.device) -> float:
    """The time when everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Of several runs after a first one."""
    work()
    times = []
    for _ in range(repeats):
        started = synchronised(device)
        work()
        times.append(synchronised(device) - started)
    return statistics.median(times)


def peak_gib(device: torch.device) -> float | None:
    """The most that was allocated since the last call."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return round(peak, 2)


def parity_faces(args: GPU, side: int, count: int = 16) -> np.ndarray:
    """Degraded faces (count, S, S, 3) uint8."""
    if args.data:
        faces = FaceImages.load(args.data, side).pixels[:count]
    else:
        rng = np.random.default_rng(0)
        faces = np.kron(rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), np.ones((1, side // 8, side // 8, 1)))
    profile = get_profile("medium")
    return np.stack(
        [apply(draw(profile, degradation_generator(0, i)), np.uint8(face)) for i, face in enumerate(faces)]  # type: ignore[arg-type]
    )


def parity(args: GPU, device: torch.device) -> dict[str, dict[str, float]]:
    """How far restorations on the GPU are from the CPU's in float32, by precision, in grey levels and PSNR."""
    pipeline = LDBFRPipeline.from_pretrained(args.weights)
    lq = parity_faces(args, pipeline.side)
    expected = {steps: pipeline(lq, num_inference_steps=steps).images for steps in (0, None)}
    rows: dict[str, dict[str, float]] = {}
    for name, dtype in DTYPES.items():
        there = LDBFRPipeline.from_pretrained(args.weights, device=device, torch_dtype=dtype)
        for steps, images in expected.items():
            found = there(lq, num_inference_steps=steps).images
            error = np.abs(found.astype(np.int16) - images)
            key = f"{name}, {'first stage' if steps == 0 else 'restored'}"
            rows[key] = {
                "mean": round(float(error.mean()), 4),
                "99th percentile": float(np.percentile(error, 99)),
                "largest": int(error.max()),
                "psnr": round(min(99.0, float(np.mean([psnr(a, b) for a, b in zip(found, images, strict=True)]))), 2),
            }
    return rows


def inference(args: GPU, preset: Preset, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds and peak memory per batch, by precision and batch size; parts of one image's time."""
    pipeline = random_pipeline(preset).to(device)
    rng = np.random.default_rng(0)
    for name in ("fp32", "bf16"):
        pipeline = pipeline.to(dtype=DTYPES[name])
        for size in args.batch_sizes:
            lq = rng.integers(0, 256, (size, preset.side, preset.side, 3), dtype=np.uint8)
            yield f"{name}, batch {size}", restoration(pipeline, lq, args, device)
    if args.compile:
        for network in (pipeline.unet, pipeline.dc_vqr, pipeline.latent_vqgan.decoder):
            network.compile()
        size = args.batch_sizes[-1]
        lq = rng.integers(0, 256, (size, preset.side, preset.side, 3), dtype=np.uint8)
        yield f"bf16 compiled, batch {size}", restoration(pipeline, lq, args, device)


def restoration(pipeline: LDBFRPipeline, lq: np.ndarray, args: GPU, device: torch.device) -> dict[str, Any]:
    """One batch restored, and its first stage alone."""
    peak_gib(device)
    whole = median_seconds(lambda: pipeline(lq, num_inference_steps=args.steps), args.repeats, device)
    peak = peak_gib(device)
    first = median_seconds(lambda: pipeline(lq, num_inference_steps=0), args.repeats, device)
    return {
        "seconds per image": round(whole / len(lq), 4),
        "images per second": round(len(lq) / whole, 2),
        "first stage, seconds per image": round(first / len(lq), 4),
        "peak GiB": peak,
    }


def training(args: GPU, preset: Preset, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """A step of every stage: seconds, images/s, TFLOP/s, and peak memory beside the plan's."""
    upstream: dict[str, Any] = {}
    runtime = SingleProcess(str(device))
    grey = FaceImages(np.full((8, preset.side, preset.side, 3), 128, np.uint8), [""] * 8)
    for name in STAGE_NAMES:
        stage = make_stage(name, preset, {key: upstream[key] for key in stage_class(name).upstream})
        upstream[name] = stage.network
        plan = plan_stage(preset, name, (1, 1))
        peak_gib(device)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(stage, grey, grey, scratch, runtime, {})
            trainer.step = trainer.settings.steps - 1  # with the discriminator
            batch = example_batch(stage, args.train_batch_size).to(device, trainer.memory_format)

            def step(trainer: Trainer = trainer, batch: Any = batch) -> None:
                trainer.optimize(batch)
                trainer.ema.step(trainer.groups["generator"])

            seconds = median_seconds(step, max(5, args.repeats), device)
        flops = plan.flops_per_image * args.train_batch_size
        yield (
            name,
            {
                "ms per step": round(seconds * 1e3, 1),
                "images per second": round(args.train_batch_size / seconds, 1),
                "TFLOP/s": round(flops / seconds / 1e12, 1),
                "peak GiB": peak_gib(device),
                "plan GiB": round(plan.workers[0].memory.total / 2**30, 2),
            },
        )
        del trainer, batch, step
        stage.cpu()


def main(args: GPU) -> None:
    """Measure one part after the other; what is done is kept if the time runs out."""
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    small = ("training.hq_vqgan", "training.latent_vqgan", "training.dc_vqr")
    overrides = [f"{stage}.reconstruction.perceptual_backbone=random" for stage in small]
    overrides += [f"training.{name}.batch_size={args.train_batch_size}" for name in STAGE_NAMES]
    preset = load_preset(args.preset, overrides)
    results: dict[str, Any] = {"machine": machine(), "preset": args.preset, "weights": args.weights}

    def keep(part: str, name: str, row: Any) -> None:
        results.setdefault(part, {})[name] = row
        print(f"{part:9} {name:24} {json.dumps(row)}", flush=True)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")

    for name, row in parity(args, device).items():
        keep("parity", name, row)
    with torch.device("cpu"):
        for name, row in training(args, preset, device):
            keep("training", name, row)
    for name, row in inference(args, preset, device):
        keep("inference", name, row)


if __name__ == "__main__":
    main(tyro.cli(GPU, description=__doc__))
