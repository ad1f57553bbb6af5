"""What restoring an archive costs, as ratios of runs made one after the other on the same machine.

    python benchmarks/archive.py throughput --data faces.tar --output benchmarks/results/archive.json
    python benchmarks/archive.py memory --data faces.tar --output benchmarks/results/archive.json
    python benchmarks/archive.py scale --output benchmarks/results/archive.json

    python benchmarks/archive.py tables --results benchmarks/results/archive.json   # into docs/scale.md

`throughput` compares the whole job with the bare pipeline in a loop over faces that lie in memory, with the same batch
and threads. `memory` compares the peak of all processes of a small and of a ten times larger archive. `scale` lists ten
million inputs, and takes up a run of which nearly all is done. Every figure comes from real commands or, for `scale`,
the job's own functions in a process of their own; the file of results keeps what the other commands wrote.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import psutil
import pyarrow.parquet as pq
import tyro

from benchmarks.machine import machine
from ldbfr.archive.ledger import Ledger, UnitDone, manifest_folder, write_manifest_part, write_record
from ldbfr.archive.listing import Sources, make_plan, work_uri
from ldbfr.archive.parts import PartInfo, part_uri, plan_folder
from ldbfr.archive.plan import Plan, UnitId
from ldbfr.archive.rows import ResultRow
from ldbfr.data.index import iterate_images
from ldbfr.runner import run_here
from ldbfr.tables import read_rows

REPOSITORY = Path(__file__).resolve().parent.parent
UNFINISHED_PARTS = 3
PART_BYTES = 500
"""What the driver holds of a part of the plan, and of the manifest: two small tuples and their places in a table."""


@dataclass(frozen=True)
class Throughput:
    """The job against the bare pipeline."""

    data: tuple[Path, ...]
    """Faces: folders, tar or zip files; taken several times if there are fewer than --images."""
    images: int = 2000
    """Of the archive."""
    bare_images: int = 512
    """That the bare loop restores before the job, and again after it."""
    weights: str = "faces_64"
    """Which model."""
    batch_size: int = 16
    """Of both."""
    steps: int = 8
    """Denoising steps, the same for all: with fewer the model's part of the time is smaller."""
    output: Path | None = None
    """JSON file for the results."""

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        with scratch() as folder:
            write_images(self.data, self.images, folder / "in")
            before = self.bare()
            started = time.perf_counter()
            run_job(folder / "in", folder / "out", self.options())
            seconds = time.perf_counter() - started
            after = self.bare()
            loop = (before.rate + after.rate) / 2
            script = self.images / ((before.start_up + after.start_up) / 2 + self.images / loop)
            whole, steady = self.images / seconds, steady_rate(folder / "out")
        return {
            "images": self.images,
            "weights": self.weights,
            "batch size": self.batch_size,
            "steps": self.steps,
            "bare loop, images/s": [round(before.rate, 2), round(after.rate, 2)],
            "start-up of the bare loop's script, s": [round(before.start_up, 1), round(after.start_up, 1)],
            "bare script from its command to its end, images/s": round(script, 2),
            "job from its command to its end, images/s": round(whole, 2),
            "job after its first units, images/s": round(steady, 2),
            "job / script, both from command to end": round(whole / script, 3),
            "job from command to end / bare loop": round(whole / loop, 3),
            "job after its first units / bare loop": round(steady / loop, 3),
        }

    def options(self) -> list[str]:
        """Of the job."""
        return ["--weights", self.weights, "--batch-size", str(self.batch_size), "--steps", str(self.steps)]

    def bare(self) -> BareRun:
        """The bare loop in a process of its own."""
        bare = Bare(self.data, self.bare_images, self.weights, self.batch_size, self.steps)
        started = time.perf_counter()
        figures = measured_apart("bare", bare)
        seconds = time.perf_counter() - started
        return BareRun(float(figures["images/s"]), seconds - figures["seconds of the loop"])


class BareRun(NamedTuple):
    """What the bare loop took."""

    rate: float
    """Images/s of the loop alone."""
    start_up: float
    """Seconds of its script before and after the loop: imports, weights, reading the faces, a first batch."""


@dataclass(frozen=True)
class Bare:
    """The pipeline alone, in a loop over faces in memory."""

    data: tuple[Path, ...]
    images: int
    weights: str
    batch_size: int
    steps: int

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        import numpy as np
        import torch

        from ldbfr.images import decode_image, fit_to_side
        from ldbfr.pipeline import LDBFRPipeline

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        pipeline = LDBFRPipeline.from_pretrained(self.weights)
        faces = np.stack(
            [fit_to_side(decode_image(data, name=name), pipeline.side) for name, data in some(self.data, self.images)]
        )
        options: dict[str, Any] = {"num_inference_steps": self.steps, "return_first_stage": True}
        pipeline(faces[: self.batch_size], **options)
        started = time.perf_counter()
        for start in range(0, len(faces), self.batch_size):
            pipeline(faces[start : start + self.batch_size], **options)
        seconds = time.perf_counter() - started
        return {"images/s": len(faces) / seconds, "seconds of the loop": seconds}


@dataclass(frozen=True)
class Memory:
    """The peak of a small archive and of a large one."""

    data: tuple[Path, ...]
    """Faces, taken several times."""
    images: tuple[int, int] = (1_000, 10_000)
    """Of the two archives."""
    weights: str = "faces_64"
    """Which model."""
    output: Path | None = None
    """JSON file for the results."""

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        peaks, rates = [], []
        for count in self.images:
            with scratch() as folder:
                write_images(self.data, count, folder / "in")
                started = time.perf_counter()
                peaks.append(run_job(folder / "in", folder / "out", ["--weights", self.weights, "--steps", "1"]))
                rates.append(count / (time.perf_counter() - started))
        driver = [peak["driver"] for peak in peaks]
        return {
            "images": list(self.images),
            "peak of all processes (PSS), MiB": [round(peak["all"]) for peak in peaks],
            "growth": round(peaks[1]["all"] / peaks[0]["all"] - 1, 3),
            "peak of the driver, MiB": [round(peak) for peak in driver],
            "images/s, one denoising step": [round(rate, 1) for rate in rates],
        }


@dataclass(frozen=True)
class Scale:
    """Plan and take up a run of very many inputs."""

    rows: int = 10_000_000
    """Inputs, in a list of URIs; none of them is read."""
    output: Path | None = None
    """JSON file for the results."""

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        with scratch() as folder:
            listing = folder / "archive.txt"
            with listing.open("w") as file:
                file.writelines(f"s3://archive/{n // 1000:06d}/photograph-{n:09d}.jpg\n" for n in range(self.rows))
            run = str(folder / "run")
            planned = measured_apart("planning", Planning(str(listing), run))
            written = size_below(Path(plan_folder(run)))
            pretend(run)
            resumed = measured_apart("resuming", Resuming(run))
        return {
            "rows": self.rows,
            "planning": planned | {"rows/s": round(self.rows / planned["seconds"]), "bytes a row": written / self.rows},
            "resuming": resumed,
        }


@dataclass(frozen=True)
class Planning:
    """Write the plan of a list."""

    listing: str
    run: str

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        started, before = time.perf_counter(), own_peak()
        parts = make_plan(Sources((self.listing,), self.run, None, 128), run_here)
        seconds = time.perf_counter() - started
        return {"seconds": round(seconds, 2), "parts": len(parts), **memory_figures(before)}


@dataclass(frozen=True)
class Resuming:
    """Find out what is left of a run."""

    run: str

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        started, before = time.perf_counter(), own_peak()
        plan = Plan(tuple(make_plan(Sources((), self.run, None, 128), run_here)))
        ledger = Ledger.read(self.run, plan)
        left = sum(len(item.units) for item in plan.items(ledger.left()))
        seconds = time.perf_counter() - started
        done = f"{ledger.done.total:,} of {plan.num_rows:,}"
        return {"seconds": round(seconds, 2), "done": done, "units left": left, **memory_figures(before)}


def pretend(run: str) -> None:
    """Write the manifest of all parts but the last few, and some records of these: rows like real ones."""
    infos = read_rows(work_uri(run, "index.parquet"), PartInfo)
    known: dict[int, bytes] = {}
    for number, info in enumerate(infos[:-UNFINISHED_PARTS]):
        if info.rows not in known:
            write_manifest_part(run, number, [pretended(place) for place in range(info.rows)])
            known[info.rows] = Path(part_uri(manifest_folder(run), number)).read_bytes()
        Path(part_uri(manifest_folder(run), number)).write_bytes(known[info.rows])
    table = pq.read_table(part_uri(plan_folder(run), len(infos) - UNFINISHED_PARTS), columns=["unit"])
    for unit in range(20):
        rows = [pretended(n) for n in range(table["unit"].to_pylist().count(unit))]
        write_record(run, UnitDone(UnitId(len(infos) - UNFINISHED_PARTS, unit), rows))


def pretended(place: int) -> ResultRow:
    """A row as a restored image has it."""
    key = f"archive/scans/{place // 1000:06d}/photograph-{place:09d}.jpg"
    return ResultRow(
        input=f"s3://{key}", key=key, status="restored", size=40_000 + place, digest=f"{place:064x}", width=512,
        height=512, faces=1, output=f"s3://restored/{key}", seed=0, weights="0" * 64, settings="1" * 64,
        sharpness_input=3.0 + place % 97, sharpness=7.0 + place % 89, seconds_read=0.01, seconds_model=0.05,
        seconds_write=0.01, worker=f"node-{place % 8}:4711", finished=1.7e9 + place,
    )  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """Write the results down in docs/scale.md."""

    results: Path = REPOSITORY / "benchmarks" / "results" / "archive.json"
    """What the other commands wrote."""
    page: Path = REPOSITORY / "docs" / "scale.md"
    """The page, which has a place for them."""

    def __call__(self) -> None:
        """Replace what stands between the marks."""
        text = self.page.read_text("utf-8")
        self.page.write_text(with_tables(text, json.loads(self.results.read_text("utf-8"))), "utf-8")


MARKS = ("<!-- written by benchmarks/archive.py tables -->\n", "<!-- to here -->\n")


def with_tables(page: str, results: dict[str, Any]) -> str:
    """The page with the tables of these results between its marks."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return "".join([before, MARKS[0], tables(results), MARKS[1], after])


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    through, memory, scale = (results[name] for name in ("throughput", "memory", "scale"))
    small, large = memory["images"]
    before, after = through["bare loop, images/s"]
    lines = [
        f"| {through['images']:,} images, {through['weights']}, {through['steps']} steps, "
        f"batch {through['batch size']} | images/s | |",
        "|---|---|---|",
        f"| the pipeline in a bare loop, before and after | {before} and {after} | |",
        f"| a script with that loop, from its command to its end "
        f"| {through['bare script from its command to its end, images/s']} | |",
        f"| the job, from its command to its end | {through['job from its command to its end, images/s']} "
        f"| {through['job / script, both from command to end']:.1%} of the script, "
        f"{through['job from command to end / bare loop']:.1%} of the loop alone |",
        f"| the job after its workers' first units of 128 | {through['job after its first units, images/s']} "
        f"| {through['job after its first units / bare loop']:.1%} of the loop |",
        "",
        "| memory | " + " | ".join(f"{count:,} images" for count in (small, large)) + " | growth |",
        "|---|---|---|---|",
        "| peak of all processes | "
        + " | ".join(f"{peak:,} MiB" for peak in memory["peak of all processes (PSS), MiB"])
        + f" | {memory['growth']:+.1%} |",
        "| of it the driver | " + " | ".join(f"{peak:,} MiB" for peak in memory["peak of the driver, MiB"]) + " | |",
        "",
        f"| inputs | {scale['rows']:,}, measured | 1,000,000,000, computed |",
        "|---|---|---|",
    ]
    times = 1e9 / scale["rows"]
    more = PART_BYTES * scale["planning"]["parts"] * (times - 1) / 2**20
    for name, title in (("planning", "listing into a plan"), ("resuming", "finding out what is left")):
        figures = scale[name]
        held = figures["peak, MiB"] - figures["of it imports, MiB"]
        minutes = figures["seconds"] * times / 60
        lines += [
            f"| {title}: time | {figures['seconds']:,.1f} s | {minutes:,.0f} min |",
            f"| memory beyond the program's own {figures['of it imports, MiB']:,} MiB | {held:,} MiB | "
            f"{held + more:,.0f} MiB: the table of parts grows |",
        ]
    parts, size = scale["planning"]["parts"], scale["planning"]["bytes a row"]
    lines.append(f"| parts of plan and manifest | {parts:,} | {parts * times:,.0f} |")
    lines.append(f"| size of the plan | {size * scale['rows'] / 1e6:,.0f} MB | {size:.1f} GB |")
    machines = {f"{r['machine']['cpu']}, {r['machine']['cores']} cores" for r in (through, memory, scale)}
    return "\n".join([*lines, "", f"Measured on: {'; '.join(sorted(machines))}.", ""])


# ---- measuring ----


def own_peak() -> float:
    """The most that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_figures(before: float) -> dict[str, Any]:
    """The peak of this process, and how much of it came since then."""
    return {"peak, MiB": round(own_peak()), "of it imports, MiB": round(before)}


def measured_apart(name: str, what: Any) -> dict[str, Any]:
    """The figures of a measurement that is made in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from pathlib import PosixPath"
    code += f"; from benchmarks.archive import *; print(json.dumps({what!r}()))"
    print(f"{name}…", file=sys.stderr)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_job(source: Path, output: Path, options: list[str]) -> dict[str, float]:
    """Run jobs/restore.py to its end: the peaks of its memory in MiB, of the driver and of all its processes."""
    command = [sys.executable, str(REPOSITORY / "jobs" / "restore.py"), "--input", str(source), "--output", str(output)]
    process = subprocess.Popen([*command, *options])
    peaks = {"driver": 0.0, "all": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            for name, held in held_memory(process.pid).items():
                peaks[name] = max(peaks[name], held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return peaks


def held_memory(pid: int) -> dict[str, float]:
    """Proportional set size of a process and of it with all that it started, in MiB: shared pages count once."""
    held = {"driver": 0.0, "all": 0.0}
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return held
    for process in processes:
        try:
            pss = process.memory_full_info().pss / 2**20
        except psutil.Error:
            continue
        held["all"] += pss
        held["driver"] += pss if process.pid == pid else 0.0
    return held


def steady_rate(output: Path) -> float:
    """Images/s from the end of every worker's first unit to that of the last, by the manifest."""
    table = pq.read_table(output / "manifest", columns=["finished", "worker"]).to_pylist()
    times = sorted(row["finished"] for row in table)
    first = 128 * len({row["worker"] for row in table})
    return (len(times) - first) / (times[-1] - times[first - 1])


# ---- inputs ----


def some(data: tuple[Path, ...], count: int) -> Iterator[tuple[str, bytes]]:
    """That many faces, the same ones again where there are fewer."""
    faces = [face for source in data for face in iterate_images(source)]
    return islice(cycle(faces), count)


def write_images(data: tuple[Path, ...], count: int, folder: Path) -> None:
    """An archive of loose files, a thousand in a folder."""
    for number, (_, content) in enumerate(some(data, count)):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def size_below(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="ldbfr-") as folder:
        yield Path(folder)


def main(chosen: Throughput | Memory | Scale | Tables) -> None:
    """Measure, print, and write beside what is there."""
    if isinstance(chosen, Tables):
        return chosen()
    name = type(chosen).__name__.lower()
    results = {"command": " ".join(["python", "benchmarks/archive.py", *sys.argv[1:]]), "machine": machine()}
    results |= chosen()
    print(json.dumps(results, indent=1))
    if chosen.output is not None:
        there = json.loads(chosen.output.read_text("utf-8")) if chosen.output.exists() else {}
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(there | {name: results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    Commands = (
        Annotated[Throughput, tyro.conf.subcommand("throughput", prefix_name=False)]
        | Annotated[Memory, tyro.conf.subcommand("memory", prefix_name=False)]
        | Annotated[Scale, tyro.conf.subcommand("scale", prefix_name=False)]
        | Annotated[Tables, tyro.conf.subcommand("tables", prefix_name=False)]
    )
    main(tyro.cli(Commands, description=__doc__))
