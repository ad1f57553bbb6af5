"""Speed and memory of measuring: 3,000 pairs of 512 px by PSNR, SSIM and identity, in two processes.

    python benchmarks/evaluation.py --output benchmarks/results/evaluation-speed.json
    python benchmarks/evaluation.py --quick

Pairs are drawn by seed: pictures with the structure of faces, degraded by equation (7), written as a test set and read
from it as an evaluation reads it, so decoding and checking digests count. The pairs of the small and the large count
are measured in processes of their own, whose peaks of resident memory (all children too) are compared. The test set is
made of so many different faces and then gone through again and again; portraits are not remembered meanwhile. CPU
seconds are of all processes: on a machine that does other things too, they say more than seconds.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import cv2
import numpy as np
import tyro

from benchmarks.machine import machine
from ldbfr.evaluation.building import build_testset
from ldbfr.evaluation.measuring import Pair, measure
from ldbfr.evaluation.metric_choice import MetricOptions, make_metrics
from ldbfr.evaluation.testsets import BuiltTestSet
from ldbfr.images import Pixels, encode_image

METRICS = ("psnr", "ssim", "identity")
LIMIT_SECONDS = 600
MOST_GROWTH = 1.1
"""Peak memory of ten times as many pairs, as a share: what is left is the allocator's."""


@dataclass(frozen=True)
class Speed:
    """Measure measuring."""

    count: int = 3_000
    """Pairs."""
    small: int = 300
    """Pairs whose peak memory is compared with it."""
    different: int = 300
    """Different faces among them; each pair has noise of its own."""
    side: int = 512
    """Of the faces, in px."""
    processes: int = 2
    """That measure."""
    quick: bool = False
    """60 and 20 pairs of 12 faces: whether it works at all."""
    output: Path | None = None
    """JSON file for the results."""
    measure_from: Path | None = None
    """Internal: measure pairs of this test set and print the result."""


def portrait(seed: int, side: int) -> Pixels:
    """A picture with the structure of a face and with detail at every scale, (S, S, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    image = sum(
        cv2.resize(rng.normal(0, 60 / n, (n, n, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
        for n in (4, 8, 32, 128)
    )
    for colour, (cx, cy, sx, sy) in (
        ((215, 165, 135), (0, 0, 0.3, 0.4)),
        ((40, 30, 30), (-0.12, -0.05, 0.05, 0.03)),
        ((40, 30, 30), (0.12, -0.05, 0.05, 0.03)),
        ((170, 60, 70), (0, 0.2, 0.1, 0.03)),
    ):
        weight = np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)[..., None]
        image = image * (1 - 0.8 * weight) + np.array(colour) * weight
    return np.clip(image, 0, 255).astype(np.uint8)


def pairs(testset: BuiltTestSet, count: int) -> Iterator[Pair]:
    """The set's pairs again and again, each time with other noise: an image that is new has to be looked at anew."""
    for number in range(count):
        entry = testset.entries[number % len(testset.entries)]
        lq, hq = testset.read(entry)
        lq = lq ^ np.uint8(number // len(testset.entries))  # the last bits
        assert hq is not None
        hq = hq ^ np.uint8(number // len(testset.entries))
        yield f"{number}", lq, hq


class Peak:
    """The most resident memory of this process and its children at once, in MiB, looked at ten times a second."""

    def __init__(self) -> None:
        self.mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        own = psutil.Process()
        while not self._stop.wait(0.1):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.mib = max(self.mib, total / 2**20)

    def stop(self) -> float:
        """The peak."""
        self._stop.set()
        self._thread.join()
        return round(self.mib, 1)


def measure_pairs(args: Speed) -> dict[str, float]:
    """Seconds, peak memory and means of a number of pairs."""
    testset = BuiltTestSet(str(args.measure_from))
    metrics, _, missing = make_metrics(METRICS, MetricOptions(framing="ffhq"))
    if missing:
        sys.exit("; ".join(f"{one.name}: {one.reason}" for one in missing))
    peak, started = Peak(), time.perf_counter()
    sums = dict.fromkeys(METRICS, 0.0)
    for _, numbers in islice(measure(metrics, pairs(testset, args.count), args.processes), args.count):
        for name, value in numbers.items():
            sums[name] += value
    seconds = time.perf_counter() - started
    cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    means = {f"mean {name}": round(total / args.count, 4) for name, total in sums.items()}
    return {
        "pairs": args.count,
        "seconds": round(seconds, 1),
        "CPU seconds": round(cpu, 1),
        "peak MiB": peak.stop(),
        **means,
    }


def run(args: Speed, testset: Path, count: int) -> dict[str, float]:
    """`measure_pairs` in a new process."""
    command = [sys.executable, __file__, "--measure-from", str(testset), "--count", str(count)]
    command += ["--processes", str(args.processes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(args: Speed) -> int:
    """Print and write the figures; exit code 1 where a bar is missed."""
    if args.measure_from is not None:
        print(json.dumps(measure_pairs(args)))
        return 0
    count, small, different = (60, 20, 12) if args.quick else (args.count, args.small, args.different)
    with tempfile.TemporaryDirectory() as folder:
        faces = Path(folder) / "faces"
        faces.mkdir()
        for number in range(different):
            (faces / f"{number:06d}.png").write_bytes(encode_image(portrait(number, args.side), "png"))
        started = time.perf_counter()
        built = build_testset(str(faces), f"{folder}/set", side=args.side, processes=args.processes)
        building = time.perf_counter() - started
        of_small, of_all = (run(args, Path(folder) / "set", number) for number in (small, count))
    growth = of_all["peak MiB"] / of_small["peak MiB"]
    results = {
        "what": f"{', '.join(METRICS)} of {count:,} pairs of {args.side} px in {args.processes} processes",
        "command": "python benchmarks/evaluation.py" + (" --quick" if args.quick else ""),
        "machine": machine(),
        "building a test set, faces a second": round(different / building, 2),
        "test set's digest": built.digest,
        "few": of_small,
        "all": of_all,
        "milliseconds a pair": round(1000 * of_all["seconds"] / count, 1),
        "CPU milliseconds a pair": round(1000 * of_all["CPU seconds"] / count, 1),
        "peak memory of all, as a share of few": round(growth, 3),
        "bars": {
            f"under {LIMIT_SECONDS} s": of_all["seconds"] < LIMIT_SECONDS,
            f"memory at most {MOST_GROWTH} times": growth <= MOST_GROWTH,
        },
    }
    print(json.dumps(results, indent=1))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return 0 if all(results["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Speed, description=__doc__)))
