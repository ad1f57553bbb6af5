"""What a number of images takes, from the files in benchmarks/results alone, as tables for docs/operations.md.

    python benchmarks/sizing.py                                        # writes them between the page's marks
    python benchmarks/sizing.py --core-hour 0.04 --gpu-hour 3 --show   # prints them, with the cost at your prices

A file that another measurement adds later (a GPU's inference in gpu.json, endpoint.json) becomes a row by itself; what
has no file is named below the tables.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro

from benchmarks.pages import between_marks

REPOSITORY = Path(__file__).resolve().parent.parent
COUNTS = (10**6, 10**8, 10**9)


@dataclass(frozen=True)
class Sizing:
    """Write the tables of docs/operations.md, or print them."""

    results: Path = REPOSITORY / "benchmarks" / "results"
    """What the benchmarks wrote."""
    page: Path = REPOSITORY / "docs" / "operations.md"
    """Has a place for the tables."""
    core_hour: float | None = None
    """What a CPU core costs for an hour, for the cost; only with --show."""
    gpu_hour: float | None = None
    """What a GPU costs for an hour, for the cost; only with --show."""
    show: bool = False
    """Print instead of writing."""


@dataclass(frozen=True)
class Rate:
    """A measured throughput.

    Args:
        what: was done.
        per_second: how many of them.
        machine: on which, as benchmarks/machine.py describes it.
        source: file and key.
        unit: what was counted.
    """

    what: str
    per_second: float
    machine: dict[str, Any]
    source: str
    unit: str = "images"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU did it."""
        return "gpu" in self.machine

    @property
    def where(self) -> str:
        """The machine in few words."""
        cores = f"{self.machine['cores']} cores"
        return f"one {self.machine['gpu']}" if self.on_gpu else f"{self.machine['cpu']}, {cores}"

    @property
    def per_hour(self) -> float:
        """How many in an hour of one GPU, or of one core."""
        return 3600 * self.per_second / (1 if self.on_gpu else self.machine["cores"])

    def hours(self, count: int) -> float:
        """Of one GPU, or of one core, for so many."""
        return count / self.per_hour


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of results by its name without the suffix."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


def rates(found: dict[str, dict[str, Any]]) -> Iterator[Rate]:
    """Everything that was measured of restoring, the whole way first."""
    if through := found.get("archive", {}).get("throughput"):
        weights = f"`{through['weights']}`, {through['steps']} steps"
        what = f"`jobs/restore.py`, aligned faces, {weights}: read, restored, written"
        yield Rate(what, through["job after its first units, images/s"], through["machine"], "archive.json")
    if "endpoint at saturation, images/s" in (load_test := found.get("endpoint", {}).get("load", {})):
        what = f"endpoint at saturation, aligned faces, `{load_test['weights']}`, {load_test['steps']} steps"
        yield Rate(what, load_test["endpoint at saturation, images/s"], load_test["machine"], "endpoint.json")
    if photo := found.get("photos"):
        parts = ("decode", "find the faces, one thread", "align, restore and put back", "encode")
        seconds = sum(photo[f"seconds to {part}"] for part in parts)
        what = f"a photo of {photo['megapixels']:.0f} MP with {photo['faces restored']} faces, one after the other"
        yield Rate(what, 1 / seconds, photo["machine"], "photos.json", "photos")
    yield from models_alone(found)


def models_alone(found: dict[str, dict[str, Any]]) -> Iterator[Rate]:
    """The model without reading and writing."""
    if quality := found.get("faces_128-quality"):
        steps = next(name for name in quality["splits"]["mild"] if name.startswith("restored"))
        seconds = statistics.median(split[steps]["seconds_per_image"] for split in quality["splits"].values())
        what = f"the model alone, `faces_128`, {steps.removeprefix('restored, ')}"
        yield Rate(what, 1 / seconds, quality["machine"], "faces_128-quality.json")
    gpu = found.get("gpu", {})
    for name, row in gpu.get("inference", {}).items():
        what = f"the model alone, `{gpu['preset']}`, {name}"
        yield Rate(what, row["images per second"], gpu["machine"], "gpu.json")


def restoring(rows: list[Rate], prices: tuple[float | None, float | None]) -> list[str]:
    """The table of images; its last columns are hours of a core, or of a GPU."""
    head = ["restoring", "measured on", "in an hour of one"]
    head += [f"{power(count)} images" for count in COUNTS]
    lines = [row_of(head), row_of(["---"] * len(head))]
    for rate in rows:
        kind = "GPU" if rate.on_gpu else "core"
        price = prices[1] if rate.on_gpu else prices[0]
        cells = [rate.what, f"{rate.where} (`{rate.source}`)", f"{kind}: {figure(rate.per_hour)} {rate.unit}"]
        for count in COUNTS:
            cost = f", {price * rate.hours(count):,.0f} in money" if price is not None else ""
            cells.append(f"{figure(rate.hours(count))} {kind}-hours{cost}")
        lines.append(row_of(cells))
    return lines


def bookkeeping(scale: dict[str, Any]) -> list[str]:
    """What an archive costs besides its images, in proportion to what was measured."""
    head = ["beside that, in one process, for any weights", f"{scale['rows']:,} inputs, measured"]
    lines = [row_of([*head, *map(power, COUNTS)]), row_of(["---"] * (2 + len(COUNTS)))]
    for key, what in (("planning", "listing into a plan"), ("resuming", "finding out what is left, when taken up")):
        seconds = scale[key]["seconds"]
        times = [span(seconds * count / scale["rows"]) for count in COUNTS]
        lines.append(row_of([what, span(seconds), *times]))
    size = scale["planning"]["bytes a row"]
    sizes = [f"{size * count / 1e6:,.0f} MB" for count in (scale["rows"], *COUNTS)]
    return [*lines, row_of(["the plan on disk (`archive.json`)", *sizes])]


def training(found: dict[str, dict[str, Any]]) -> list[str]:
    """What was measured of training on a GPU."""
    lines = [row_of(["training", "measured on", "a step", "images in a GPU-hour"]), row_of(["---"] * 4)]
    gpu = found.get("gpu", {})
    for stage, row in gpu.get("training", {}).items():
        what, where = f"`{stage}` of `{gpu['preset']}`", f"one {gpu['machine']['gpu']} (`gpu.json`)"
        lines.append(row_of([what, where, f"{row['ms per step']:,.0f} ms", figure(3600 * row["images per second"])]))
    if timed := found.get("timed_training"):
        where = f"one {timed['machine']['gpu']} (`timed_training.json`)"
        for stage, row in timed["stages"].items():
            rate = 3600e3 * row["batch_size"] / row["ms_per_step"]
            lines.append(row_of([f"`{stage}` of `faces_128`", where, f"{row['ms_per_step']:,.0f} ms", figure(rate)]))
    return lines


def missing(found: dict[str, dict[str, Any]]) -> list[str]:
    """What nobody has measured yet."""
    lines = []
    if "inference" not in found.get("gpu", {}):
        lines.append("restoring on a GPU (`python benchmarks/gpu.py --output benchmarks/results/gpu.json`)")
    if "load" not in found.get("endpoint", {}):
        lines.append("the endpoint (`python benchmarks/endpoint.py load --output benchmarks/results/endpoint.json`)")
    return [f"Not measured yet: {'; '.join(lines)}."] if lines else []


def tables(results: Path, prices: tuple[float | None, float | None] = (None, None)) -> str:
    """All of it as Markdown."""
    found = load(results)
    blocks = [
        restoring(list(rates(found)), prices),
        bookkeeping(found["archive"]["scale"]),
        training(found),
        missing(found),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def with_tables(page: str, text: str) -> str:
    """The page with these tables between its marks."""
    return between_marks(page, "benchmarks/sizing.py", text)


def row_of(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def power(count: int) -> str:
    """10⁶ and the like."""
    digits = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    return "10" + str(len(str(count)) - 1).translate(digits)


def figure(value: float) -> str:
    """Three digits that count."""
    digits = max(0, 3 - len(str(int(value))))
    whole = 10 ** max(0, len(str(int(value))) - 3)
    return f"{round(value / whole) * whole:,}" if whole > 1 else f"{value:,.{digits}f}"


def span(seconds: float) -> str:
    """A time."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{figure(seconds / size)} {unit}"
    return f"{figure(seconds)} s"


def main(args: Sizing) -> None:
    """Write, or print."""
    if args.show:
        print(tables(args.results, (args.core_hour, args.gpu_hour)))
        return
    args.page.write_text(with_tables(args.page.read_text("utf-8"), tables(args.results)), "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Sizing, description=__doc__))
