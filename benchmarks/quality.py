"""Quality of weights on a validation set: PSNR, identity distance and sharpness per split, stage by stage.

    python benchmarks/quality.py --weights faces_64 --data val-00000.tar --splits severe

LQ inputs are equation (7) draws by seed; identity is dlib's, on 128 px versions of the faces (extra `identity`).
Sharpness is the mean absolute Laplacian as a share of the original's. Intervals are bootstrap 95 % of the mean.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import tyro

from ldbfr.data.index import FaceImages
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.evaluation.metrics import IdentityModel, psnr, sharpness
from ldbfr.images import Pixels
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
    output: Path | None = None
    """JSON file for the results."""


IDENTITY = IdentityModel()


def measure(task: tuple[Pixels, Pixels, np.ndarray | None]) -> tuple[float, float, float]:
    """PSNR, sharpness share and identity distance of (image, original, the original's embedding)."""
    image, original, embedding = task
    distance = float("nan") if embedding is None else float(np.linalg.norm(IDENTITY.embed(image) - embedding))
    return psnr(image, original), sharpness(image) / sharpness(original), distance


def summary(values: np.ndarray) -> dict[str, list[float]]:
    """Mean and bootstrap 95 % interval of each column."""
    rng = np.random.default_rng(0)
    means = np.stack([values[rng.integers(0, len(values), len(values))].mean(axis=0) for _ in range(500)])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    names = ("psnr", "sharpness", "identity")
    return {name: [round(float(v), 4) for v in (values[:, i].mean(), low[i], high[i])] for i, name in enumerate(names)}


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
        name = f"restored, {steps} steps from {start}" if steps else "first stage"
        yield name, np.concatenate(images), (time.perf_counter() - started) / len(lq)


def main(args: Quality) -> None:
    """Print a table and write the JSON."""
    pipeline = LDBFRPipeline.from_pretrained(args.weights)
    faces = FaceImages.load(args.data, pipeline.side).pixels[: args.limit]
    results: dict[str, object] = {
        "weights": pipeline.weights_digest,
        "faces": len(faces),
        "seed": args.seed,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    with ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn")) as pool:
        embeddings = list(pool.map(IDENTITY.embed, faces, chunksize=8)) if args.identity else [None] * len(faces)
        for split in args.splits:
            profile = get_profile(split)
            lq = np.stack(
                [apply(draw(profile, degradation_generator(args.seed, split, i)), face) for i, face in enumerate(faces)]
            )
            rows = [("input", lq, 0.0), *restorations(args, pipeline, lq)]
            for name, images, seconds in rows:
                tasks = zip(images, faces, embeddings, strict=True)
                row = summary(np.array(list(pool.map(measure, tasks, chunksize=8))))
                results[f"{split}: {name}"] = {**row, "seconds_per_image": round(seconds, 4)}
                shown = "  ".join(
                    f"{key} {mean:7.3f} [{low:.3f}, {high:.3f}]" for key, (mean, low, high) in row.items()
                )
                print(f"{split:7} {name:32} {shown}  {seconds * 1000:7.1f} ms", flush=True)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Quality, description=__doc__))
