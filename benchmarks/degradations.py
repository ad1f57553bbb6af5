"""How many images per second one core degrades (equation (7)): `python benchmarks/degradations.py`.

Prints a table and one line of JSON. "cpu" counts only this process's own time, so it holds on a machine that is busy.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from ldbfr.degradations import PROFILES, DegradationProfile, Image, apply, degradation_generator, draw


def main() -> None:
    options = parse_arguments()
    cv2.setNumThreads(1)
    results: list[dict[str, str | int | float]] = []
    print(f"{'profile':<8} {'side':>5} {'images/s (cpu)':>15} {'images/s (wall)':>16}")
    for name in options.profiles:
        for side in options.sides:
            cpu, wall = images_per_second(PROFILES[name], side, options.count)
            print(f"{name:<8} {side:>5} {cpu:>15.1f} {wall:>16.1f}", flush=True)
            results.append({"profile": name, "side": side, "cpu": round(cpu, 1), "wall": round(wall, 1)})
    print(json.dumps({"benchmark": "degradations", "machine": machine(), "count": options.count, "results": results}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=list(PROFILES), help="default: all")
    parser.add_argument("--sides", nargs="+", type=positive, default=[512, 128], help="in pixels; default: 512 128")
    parser.add_argument("--count", type=positive, default=100, help="draws per row; default: 100")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def images_per_second(profile: DegradationProfile, side: int, count: int) -> tuple[float, float]:
    """Images per second of CPU time and of wall time over `count` draws, after one that warms up."""
    image = smooth_noise(side)
    generator = degradation_generator(0, "benchmark", side)
    degradations = [draw(profile, generator) for _ in range(count)]
    apply(degradations[0], image)
    cpu, wall = time.process_time(), time.perf_counter()
    for degradation in degradations:
        apply(degradation, image)
    return count / (time.process_time() - cpu), count / (time.perf_counter() - wall)


def smooth_noise(side: int) -> Image:
    """Something to degrade that JPEG finds neither empty nor impossible: noise with the detail of a photo."""
    noise = np.random.default_rng(0).random((side, side, 3), dtype=np.float32)
    values = np.asarray(cv2.GaussianBlur(noise, (0, 0), 2.0))
    return np.asarray(np.rint(255 * (values - values.min()) / np.ptp(values)), np.uint8)


def machine() -> dict[str, str | int | None]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads_used": cv2.getNumThreads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
