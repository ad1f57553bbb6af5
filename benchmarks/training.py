"""What training on Ray costs, as ratios of runs made one after the other on the same machine.

    python benchmarks/training.py --data faces.tar --output benchmarks/results/training.json

Compares the bare loop with Ray Train on one worker, checkpoints every 20 steps with none, one worker with two, and the
loader alone with what the steps consume. Every rate is that of real commands: the time between two steps as TensorBoard
has it, after the warm-up; each pair is run several times in turn, and the median counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.machine import machine
from ldbfr.config import load_preset
from ldbfr.data.sampler import BatchSampler
from ldbfr.data.shards import open_faces

REPOSITORY = Path(__file__).resolve().parent.parent
WARM_UP = 20
LOG_EVERY = 10
CHECKPOINT_EVERY = 20


@dataclass(frozen=True)
class Training:
    """Measure training on this machine."""

    data: tuple[str, ...]
    """Faces, as for `ldbfr train`."""
    preset: str = "faces_64"
    """Which model."""
    stage: str = "hq_vqgan"
    """Which stage; one without upstream networks."""
    steps: int = 110
    """Of every run; the first 20 do not count."""
    repeats: int = 3
    """Runs of each kind."""
    output: Path | None = None
    """JSON file for the results."""


class Runs:
    """Makes runs and remembers their rates."""

    def __init__(self, options: Training, folder: Path) -> None:
        self.options, self.folder, self.count = options, folder, 0
        self.cores = len(os.sched_getaffinity(0))

    def bare(self, threads: int, checkpoint_every: int = 10**6) -> Path:
        """`ldbfr train`."""
        return self.run([sys.executable, "-m", "ldbfr.cli", "train", "--threads", str(threads)], checkpoint_every)

    def ray(self, workers: int, threads: int) -> Path:
        """`jobs/train.py`, on a Ray of its own."""
        job = [sys.executable, "jobs/train.py", "--workers", str(workers), "--cpus-per-worker", str(threads)]
        return self.run([*job, "--no-validate"], 10**6)

    def run(self, command: list[str], checkpoint_every: int) -> Path:
        """Run a command on a folder of its own, and give that."""
        self.count += 1
        run, stage = self.folder / str(self.count), self.options.stage
        settings = {"steps": self.options.steps, "checkpoint_every": checkpoint_every, "log_every": LOG_EVERY}
        settings |= {"images_every": 10**6, "revive_until": 0}
        command += ["--preset", self.options.preset, "--stage", stage, "--run", str(run), "--data", *self.options.data]
        for key, value in settings.items():
            command += ["--set", f"training.{stage}.{key}={value}"]
        environment = {**os.environ, "RAY_worker_niceness": "0"}  # as the bare loop: by itself Ray's workers yield
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
        return run

    def scalars(self, run: Path, name: str) -> list[tuple[int, float, float]]:
        """(step, time of day, value) of everything logged under a name."""
        stage = self.options.stage
        events = EventAccumulator(str(run / stage / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        if f"{stage}/{name}" not in events.Tags()["scalars"]:
            return []
        return [(event.step, event.wall_time, event.value) for event in events.Scalars(f"{stage}/{name}")]

    def rate(self, run: Path) -> float:
        """Steps per second between the warm-up and the last checkpoint's step."""
        logged = [(step, at) for step, at, _ in self.scalars(run, "loss") if step >= WARM_UP]
        (first, start), (last, end) = logged[0], logged[-1]
        return (last - first) / (end - start)


def main(options: Training) -> None:
    """Measure, print, and keep."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(options, Path(folder))
        results = {
            "bare loop and Ray Train, one worker": one_worker(runs),
            "checkpoints": checkpoints(runs),
            "one and two workers": scaling(runs),
            "loader": loader(options, runs),
        }
    about = {"preset": options.preset, "stage": options.stage, "steps": options.steps, "repeats": options.repeats}
    text = json.dumps({"benchmark": "training", "machine": machine(), **about, "results": results}, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


def one_worker(runs: Runs) -> dict[str, float]:
    """Steps per second of the bare loop and of Ray Train."""
    bare, ray = [], []
    for _ in range(runs.options.repeats):
        bare.append(runs.rate(runs.bare(runs.cores)))
        ray.append(runs.rate(runs.ray(1, runs.cores)))
    return compared({"bare, steps/s": bare, "Ray Train, steps/s": ray}, "Ray Train / bare")


def checkpoints(runs: Runs) -> dict[str, float]:
    """What checkpoints cost: the time that the loop waits, and the whole slowdown with one every 20 steps.

    The slowdown holds what writing and hashing take from the same cores; a machine with a core to spare has none.
    """
    without, with_them, blocked = [], [], []
    for _ in range(runs.options.repeats):
        without.append(runs.rate(runs.bare(runs.cores)))
        run = runs.bare(runs.cores, checkpoint_every=CHECKPOINT_EVERY)
        with_them.append(runs.rate(run))
        noted = runs.scalars(run, "checkpoint_seconds")
        waits = [seconds for step, _, seconds in noted if step < runs.options.steps]  # the last one ends the run
        blocked.append(statistics.mean(waits) * with_them[-1] / 100)
    rates = {"none, steps/s": without, f"every {CHECKPOINT_EVERY} steps, steps/s": with_them}
    share = round(statistics.median(blocked), 4)
    return compared(rates, "with / without") | {"share of the time that the loop waits, at one per 100 steps": share}


def scaling(runs: Runs) -> dict[str, float]:
    """Steps per second of one and of two workers, one thread each, on the same global batch."""
    one, two = [], []
    for _ in range(runs.options.repeats):
        one.append(runs.rate(runs.ray(1, 1)))
        two.append(runs.rate(runs.ray(2, 1)))
    return compared({"one worker, steps/s": one, "two workers, steps/s": two}, "two / one")


def loader(options: Training, runs: Runs) -> dict[str, float]:
    """Images per second that one loading thread makes, of the stages with degradations, and that the steps consume."""
    preset = load_preset(options.preset)
    faces = open_faces(options.data, preset.side)
    rates = {}
    for name in ("hq_vqgan", "dc_vqr"):
        settings = getattr(preset.training, name)
        profile = settings.profile if name == "dc_vqr" else None
        sampler = BatchSampler(faces, settings.batch_size, 0, name, settings.flip, profile)
        sampler.batch(0)
        started, steps = time.perf_counter(), 20
        for step in range(1, steps + 1):
            sampler.batch(step)
        rates[f"loader, {name}, images/s"] = round(steps * settings.batch_size / (time.perf_counter() - started), 1)
    batch = getattr(preset.training, options.stage).batch_size
    consumed = runs.rate(runs.bare(runs.cores)) * batch
    return rates | {f"steps of {options.stage} consume, images/s": round(consumed, 1)}


def compared(rates: dict[str, list[float]], ratio: str) -> dict[str, float]:
    """The medians of two kinds of run, and the second's over the first's."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    first, second = medians.values()
    return {name: round(value, 3) for name, value in medians.items()} | {ratio: round(second / first, 3)}


if __name__ == "__main__":
    main(tyro.cli(Training))
