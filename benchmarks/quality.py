"""Quality of weights on a validation set: PSNR, identity, landmarks, sharpness per split, stage by stage.

    python benchmarks/quality.py --weights faces_64 --data val-00000.tar --splits severe
    python benchmarks/quality.py --weights faces_128 --data val-00000.tar --check --output faces_128-quality.json

LQ inputs are equation (7) draws by seed. Identity is the distance of dlib's embeddings, landmarks the mean distance of
its 68 points in px, both on 128 px versions of the faces (extra `identity`); "frechet" is the Fréchet distance of the
embeddings of all images to those of the originals. Sharpness is the mean absolute Laplacian as a share of the
original's. Intervals are bootstrap 95 % of the mean. Groups by skin tone go by the colour of the cheeks. `--check`
holds the figures against the bars of the reference weights, and the exit code is 1 where one is missed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import numpy as np
import torch
import tyro

from benchmarks.machine import machine
from ldbfr.data.index import FaceImages
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.evaluation.frechet import frechet_distance
from ldbfr.evaluation.metrics import psnr, sharpness
from ldbfr.evaluation.portraits import Portrait, identity_distance, landmark_distance, portray, tone_angle
from ldbfr.images import Pixels
from ldbfr.pages import counted
from ldbfr.pipeline import LDBFRPipeline


@dataclass(frozen=True)
class Quality:
    """Measure weights on validation faces."""

    data: tuple[Path, ...]
    """Folders, tar or zip files with original faces."""
    weights: str = "faces_64"
    """Name or folder of the weights."""
    splits: tuple[str, ...] = ("mild", "medium", "severe")
    """Degradation profiles."""
    limit: int = 400
    """How many faces."""
    start_steps: tuple[int, ...] = ()
    """Start steps to compare; the weights' default when left out."""
    steps: tuple[int, ...] = ()
    """Numbers of denoising steps to compare; the weights' default when left out."""
    batch_size: int = 32
    """Faces restored at once."""
    seed: int = 0
    """Of the draws and of the noise."""
    identity: bool = True
    """Measure identity distances (most of the time goes there)."""
    check: bool = False
    """Hold the figures against the bars of the reference weights."""
    device: str = "cpu"
    """Where the model runs."""
    output: Path | None = None
    """JSON file for the results."""


def measure(task: tuple[Pixels, Pixels, Portrait | None]) -> tuple[list[float], np.ndarray | None]:
    """The figures of (image, original, how dlib sees the original) in the order of NAMES, and the embedding."""
    image, original, seen = task
    figures = [psnr(image, original), sharpness(image) / sharpness(original)]
    if seen is None:
        return figures, None
    own = portray(image)
    figures += [identity_distance(own, seen), landmark_distance(own, seen)]
    return figures, own.embedding


NAMES = ("psnr", "sharpness", "identity", "landmarks")
TONES = (("light", 28.0, 90.0), ("tan", 10.0, 28.0), ("dark", -90.0, 10.0))
"""Groups by the individual typology angle in degrees: bounds of Del Bino and Bernerd 2013, six classes in three."""


def by_tone(figures: np.ndarray, angles: np.ndarray) -> dict[str, dict[str, Any]]:
    """The summary of each group that has at least 20 faces, and how many it has."""
    groups = {name: (angles >= low) & (angles < high) for name, low, high in TONES}
    return {
        name: {"faces": int(chosen.sum()), **summary(figures[chosen])}
        for name, chosen in groups.items()
        if chosen.sum() >= 20
    }


def summary(values: np.ndarray) -> dict[str, list[float]]:
    """Mean and bootstrap 95 % interval of each column."""
    rng = np.random.default_rng(0)
    means = np.stack([values[rng.integers(0, len(values), len(values))].mean(axis=0) for _ in range(500)])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {
        name: [round(float(v), 4) for v in (values[:, i].mean(), low[i], high[i])]
        for i, name in enumerate(NAMES[: values.shape[1]])
    }


Figure = Callable[[str, str, str], float]
"""(split, row, name) -> mean; the rows are "input", "first stage" and "restored"."""


class Bar(NamedTuple):
    """What the reference weights must reach, on the validation faces."""

    text: str
    wanted: str
    measured: Callable[[Figure], float]
    holds: Callable[[float], bool]


def gain(split: str) -> Callable[[Figure], float]:
    """PSNR over the input's, in dB."""
    return lambda at: at(split, "restored", "psnr") - at(split, "input", "psnr")


def of_restored(split: str, name: str) -> Callable[[Figure], float]:
    """A figure of the restored images."""
    return lambda at: at(split, "restored", name)


def added(split: str, name: str) -> Callable[[Figure], float]:
    """What the diffusion adds to the first stage's figure."""
    return lambda at: at(split, "restored", name) - at(split, "first stage", name)


def bars() -> Iterator[Bar]:
    """The bars, split by split."""
    for split, least, most in (("severe", 1.5, 0.58), ("medium", 0.7, 0.47)):
        yield Bar(f"{split}: PSNR over the input's, dB", f">= {least}", gain(split), lambda x, least=least: x >= least)
        yield Bar(
            f"{split}: identity distance", f"<= {most}", of_restored(split, "identity"), lambda x, most=most: x <= most
        )
        yield Bar(f"{split}: sharpness", "0.6 to 1.3", of_restored(split, "sharpness"), lambda x: 0.6 <= x <= 1.3)
    yield Bar(
        "severe: landmark error, share of the input's",
        "<= 0.667",
        lambda at: at("severe", "restored", "landmarks") / at("severe", "input", "landmarks"),
        lambda x: x <= 2 / 3,
    )
    yield Bar("mild: PSNR, dB", ">= 25.5", of_restored("mild", "psnr"), lambda x: x >= 25.5)
    yield Bar("mild: identity distance", "<= 0.36", of_restored("mild", "identity"), lambda x: x <= 0.36)
    for split in ("mild", "medium", "severe"):
        yield Bar(f"{split}: sharpness added by the diffusion", "> 0", added(split, "sharpness"), lambda x: x > 0)
        yield Bar(f"{split}: Fréchet distance added", "< 0", added(split, "frechet"), lambda x: x < 0)
        yield Bar(f"{split}: identity distance added", "<= 0.03", added(split, "identity"), lambda x: x <= 0.03)


def check(results: dict[str, Any]) -> bool:
    """Print every bar with what was measured, and keep it in the results; whether all hold."""
    keys = {
        row: key for key in results["splits"]["severe"] for row in ("input", "first stage", "restored") if row in key
    }

    def at(split: str, row: str, name: str) -> float:
        value = results["splits"][split][keys[row]][name]
        return float(value[0] if isinstance(value, list) else value)

    table = {}
    for bar in bars():
        measured = bar.measured(at)
        table[bar.text] = {"wanted": bar.wanted, "measured": round(measured, 4), "holds": bool(bar.holds(measured))}
        print(f"{'holds ' if table[bar.text]['holds'] else 'MISSED'}  {bar.text}: {measured:.3f} ({bar.wanted})")
    results["bars"] = table
    return all(row["holds"] for row in table.values())


def restorations(args: Quality, pipeline: LDBFRPipeline, lq: np.ndarray) -> Iterator[tuple[str, np.ndarray, float]]:
    """Every setting to compare, as (name, images, seconds per image)."""
    sampling = pipeline.preset.sampling
    settings = [(0, 1000)]
    settings += [
        (steps, start)
        for steps in args.steps or (sampling.num_inference_steps,)
        for start in args.start_steps or (sampling.start_step,)
    ]
    for steps, start in settings:
        started = time.perf_counter()
        parts = [lq[i : i + args.batch_size] for i in range(0, len(lq), args.batch_size)]
        images = [pipeline(part, num_inference_steps=steps, start_step=start, seed=args.seed).images for part in parts]
        name = f"restored, {counted(steps, 'step')} from {start}" if steps else "first stage"
        yield name, np.concatenate(images), (time.perf_counter() - started) / len(lq)


def main(args: Quality) -> int:
    """Print a table and write the JSON; the exit code."""
    pipeline = LDBFRPipeline.from_pretrained(args.weights, device=args.device)
    faces = FaceImages.load(args.data, pipeline.side).pixels[: args.limit]
    splits: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {
        "weights": pipeline.weights_digest,
        "faces": len(faces),
        "seed": args.seed,
        "machine": machine(),
        "splits": splits,
    }
    with ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn")) as pool:
        seen = list(pool.map(portray, faces, chunksize=8)) if args.identity else [None] * len(faces)
        tones = np.array([tone_angle(face, one) for face, one in zip(faces, seen, strict=True) if one])
        for split in args.splits:
            splits[split] = {}
            profile = get_profile(split)
            lq = np.stack(
                [apply(draw(profile, degradation_generator(args.seed, split, i)), face) for i, face in enumerate(faces)]
            )
            rows = [("input", lq, 0.0), *restorations(args, pipeline, lq)]
            for name, images, seconds in rows:
                figures, embeddings = zip(
                    *pool.map(measure, zip(images, faces, seen, strict=True), chunksize=8), strict=True
                )
                row = summary(np.array(figures))
                splits[split][name] = {**row, "seconds_per_image": round(seconds, 4)}
                shown = "  ".join(
                    f"{key} {mean:7.3f} [{low:.3f}, {high:.3f}]" for key, (mean, low, high) in row.items()
                )
                if args.identity:
                    frechet = frechet_distance(np.stack(embeddings), np.stack([one.embedding for one in seen if one]))
                    splits[split][name]["frechet"] = round(frechet, 5)
                    splits[split][name]["by_skin_tone"] = by_tone(np.array(figures), tones)
                    shown += f"  frechet {frechet:.4f}"
                print(f"{split:7} {name:26} {shown}  {seconds * 1000:7.1f} ms", flush=True)
    code = 0 if not args.check or check(results) else 1
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Quality, description=__doc__)))
