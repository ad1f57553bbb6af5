"""Train a preset's five stages in a given time, for somebody who has a GPU for so long and no longer.

    python benchmarks/timed_training.py --data train-*.tar --run runs/reference --minutes 9.5 --output timed.json

Every stage has a share of the time. Its speed is measured on a few steps first, the number of its steps follows (and
with it the end of the codebook's revival and the start of the discriminator, which are parts of it), and then it is
trained as `ldbfr train` would. The last stage takes what is left. The run's folder is an ordinary one: its
`preset.json` has the steps that were taken, and `ldbfr export` makes weights of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import torch
import tyro

from benchmarks.machine import machine
from ldbfr.config import Preset, load_preset, parse_preset
from ldbfr.data.index import FaceImages, Faces
from ldbfr.training.latents import LatentsInMemory
from ldbfr.training.loop import Trainer
from ldbfr.training.run import load_stage_network, train_stage
from ldbfr.training.runtime import SingleProcess
from ldbfr.training.stages import STAGE_NAMES, DiffusionStage, make_stage, stage_class

SHARES = {"hq_vqgan": 0.15, "latent_vqgan": 0.15, "dc_vqr": 0.24, "prior": 0.14, "enhancer": 0.32}
WARM_UP, MEASURED = 6, 14
RESERVE_S = 12.0


@dataclass(frozen=True)
class TimedTraining:
    """Train all stages within a time."""

    data: tuple[Path, ...]
    """Aligned faces: folders, tar or zip files."""
    run: Path
    """The run's folder."""
    minutes: float
    """From the start of this command to the end of the last stage."""
    preset: str = "faces_128"
    """Name of a preset, or a .toml file."""
    set: tuple[str, ...] = ()
    """Overrides, as for `ldbfr train`."""
    output: Path | None = None
    """JSON file for what was measured."""
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    """Each stage's share of the time; the last takes what is left."""


def with_steps(preset: Preset, name: str, steps: int) -> Preset:
    """The preset with a stage's length, and with what happens at a part of it, changed."""
    values = preset.model_dump(mode="json")
    stage: dict[str, Any] = values["training"][name]
    old = stage["steps"]
    stage["steps"] = steps
    if stage.get("revive_until"):
        stage["revive_until"] = stage["revive_until"] * steps // old
    terms = stage.get("reconstruction", {})
    if terms.get("discriminator_start"):
        terms["discriminator_start"] = terms["discriminator_start"] * steps // old
    return parse_preset(values, f"{preset.name} with {steps} steps of {name}")


def seconds_per_step(preset: Preset, name: str, faces: Faces, run: Path, runtime: SingleProcess) -> float:
    """Seconds that a step takes on average, with its discriminator in the share of the steps that it is trained in."""
    upstream = {key: load_stage_network(run, key, preset)[0] for key in stage_class(name).upstream}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(make_stage(name, preset, upstream), faces, faces, Path(scratch) / name, runtime, {})
        terms = getattr(trainer.settings, "reconstruction", None)
        start = terms.discriminator_start if terms is not None and terms.adversarial else None
        times = [timed(trainer, 0)]
        if start is None:
            return times[0]
        times.append(timed(trainer, start))
    share = start / trainer.settings.steps
    return share * times[0] + (1 - share) * times[1]


def timed(trainer: Trainer, step: int) -> float:
    """Seconds per step from a step on, after a warm-up."""
    trainer.step = step
    started = 0.0
    batches = trainer.batches()
    for number, batch in enumerate(islice(batches, WARM_UP + MEASURED)):
        if number == WARM_UP:
            started = time.perf_counter()
        trainer.optimize(batch)
        trainer.stage.after_step(1)
    seconds = (time.perf_counter() - started) / MEASURED
    batches.close()
    return seconds


def share_latents() -> None:
    """Let the two diffusion stages encode the data set once between them."""
    cache: dict[str, LatentsInMemory] = {}

    def prepare(stage: DiffusionStage, images: Faces, device: torch.device, upstream: Any) -> LatentsInMemory:
        if "latents" not in cache:
            cache["latents"] = LatentsInMemory.encode(stage.latent_vqgan, images, device)
        return cache["latents"]

    DiffusionStage.prepare = prepare  # type: ignore[method-assign]


def main(args: TimedTraining) -> None:
    """Train and tell."""
    began = time.perf_counter()
    preset = load_preset(args.preset, args.set)
    faces = FaceImages.load(args.data, preset.side)
    runtime = SingleProcess()
    share_latents()
    print(f"{len(faces)} faces on {runtime.device} after {time.perf_counter() - began:.1f} s", flush=True)
    results: dict[str, Any] = {"machine": machine(), "minutes": args.minutes, "stages": {}}
    for name in STAGE_NAMES:
        started = time.perf_counter()
        left = args.minutes * 60 - (started - began)
        seconds = left - RESERVE_S if name == STAGE_NAMES[-1] else args.shares[name] * args.minutes * 60
        each = seconds_per_step(preset, name, faces, args.run, runtime)
        seconds -= time.perf_counter() - started
        preset = with_steps(preset, name, max(20, int(seconds / each)))
        print(f"{name}: {each * 1e3:.1f} ms per step, {getattr(preset.training, name).steps} steps", flush=True)
        train_stage(preset, name, faces, faces, args.run, runtime)
        steps = getattr(preset.training, name).steps
        results["stages"][name] = {
            "steps": steps,
            "batch_size": getattr(preset.training, name).batch_size,
            "ms_per_step": round(each * 1e3, 2),
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(f"{name}: {time.perf_counter() - started:.1f} s, {json.dumps(results['stages'][name])}", flush=True)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(TimedTraining, description=__doc__))
