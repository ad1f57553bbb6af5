"""The plan of a training run as text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldbfr.training.plan import RunPlan, StagePlan, WorkerPlan

COLUMNS = 120
GIB = 2**30

ETHERNET = 10e9 / 8
"""Bytes per second of a 10 Gbit/s network."""

GPU_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
"""Memory of common GPUs, in GB as they are sold, which is GiB nearly."""


def gpu_size(total: int) -> int | None:
    """The smallest GPU that holds so many bytes, and 10 % and 1 GiB for what the estimate leaves out."""
    needed = 1.1 * total / GIB + 1
    return next((size for size in GPU_SIZES if size >= needed), None)


def describe(plan: RunPlan, guessed: bool) -> str:
    """The plan as tables and sentences of at most 120 columns; `guessed` says that nobody measured the speed."""
    data = "a data set of unknown size" if plan.data_images is None else f"{plan.data_images:,} images"
    paragraphs = [
        f"Preset {plan.preset} on {data}; {plan.tflops:g} TFLOP/s sustained a worker are assumed",
        table(["stage", *STAGE_HEADER], [[stage.name, *stage_row(stage)] for stage in plan.stages]),
        "What a worker's device holds, GiB\n" + per_workers(plan, MEMORY_HEADER, memory_row),
        "What it takes\n" + per_workers(plan, TIME_HEADER, time_row, totals(plan)),
        "Checkpoints, GiB\n" + table(["stage", *DISK_HEADER], [[s.name, *disk_row(s)] for s in plan.stages]),
        "\n".join(wrapped(f"- {sentence}.") for sentence in (*of_the_run(plan, guessed), *of_the_stages(plan))),
    ]
    return "\n\n".join(paragraphs)


# fmt: off
STAGE_HEADER = (
    "steps", "done", "batch", "accum.", "prec.", "images", "epochs", "trained", "frozen", "discrim.",
)
MEMORY_HEADER = (
    "workers", "images each", "at once", "weights", "gradients", "Adam", "EMA", "activations", "temporary", "total",
    "GPU",
)
TIME_HEADER = (
    "workers", "TFLOP/image", "(forward)", "TFLOP/step", "s/step", "images/s", "exchange GB/s", "hours left",
    "worker-hours",
)
DISK_HEADER = ("one", "kept", "together", "host memory", "builds on")
# fmt: on


def stage_row(stage: StagePlan) -> list[str]:
    """Length and size of a stage."""
    counts = stage.parameters
    return [
        f"{stage.steps:,}",
        "all" if stage.finished else f"{stage.done:,}",
        str(stage.batch_size),
        str(stage.gradient_accumulation),
        stage.precision,
        f"{stage.num_images:,}",
        "?" if stage.epochs is None else f"{stage.epochs:.3g}",
        millions(counts.trainable),
        millions(counts.frozen),
        millions(counts.discriminator) if counts.discriminator else "-",
    ]


def memory_row(stage: StagePlan, workers: WorkerPlan) -> list[str]:
    """A worker's memory."""
    memory, size = workers.memory, gpu_size(workers.memory.total)
    parts = (
        memory.weights, memory.gradients, memory.adam, memory.ema, memory.activations, memory.temporaries, memory.total
    )  # fmt: skip
    return [
        str(workers.num_workers),
        span(workers.least_images, workers.most_images),
        str(workers.micro_batch),
        *map(gib, parts),
        "none" if size is None else f"{size} GB",
    ]


def time_row(stage: StagePlan, workers: WorkerPlan) -> list[str]:
    """A stage's work and time."""
    exchange = workers.exchange_bytes / workers.step_seconds / 1e9
    return [
        str(workers.num_workers),
        significant(stage.flops_per_image / 1e12),
        significant(stage.forward_flops_per_image / 1e12),
        significant(stage.flops_per_image * stage.batch_size / 1e12),
        significant(workers.step_seconds),
        significant(workers.images_per_second),
        significant(exchange) if exchange else "-",
        significant(workers.hours),
        significant(workers.hours * workers.num_workers),
    ]


def totals(plan: RunPlan) -> list[list[str]]:
    """Hours of all stages together, with the fewest and with the most workers."""
    rows = []
    for place in range(len(plan.stages[0].workers)):
        workers = [stage.workers[place] for stage in plan.stages]
        hours = sum(part.hours for part in workers)
        number = workers[0].num_workers
        rows.append(["all", str(number), *[""] * 6, significant(hours), significant(hours * number)])
    return rows


def disk_row(stage: StagePlan) -> list[str]:
    """A stage's checkpoints."""
    one, kept = stage.checkpoint_bytes, stage.kept_checkpoints
    return [gib(one), str(kept), gib(one * kept), gib(one), ", ".join(stage.upstream) or "-"]


def of_the_run(plan: RunPlan, guessed: bool) -> Iterator[str]:
    """What the tables do not say of the whole run, as sentences."""
    sizes = {}
    for place, workers in enumerate(plan.stages[0].workers):
        size = gpu_size(max(stage.workers[place].memory.total for stage in plan.stages))
        number = "1 worker" if workers.num_workers == 1 else f"{workers.num_workers} workers"
        sizes[number] = "larger than any common one" if size is None else f"{size} GB"
    yield (
        f"GPU is the smallest that holds the total, and 10 % and 1 GiB for what the estimate leaves out (context, "
        f"workspaces, fragmentation); for every stage, {', '.join(f'{key}: {size}' for key, size in sizes.items())}. "
        f"More workers, or --set training.STAGE.gradient_accumulation=2, mean fewer images at once"
    )
    yield f"disk or bucket: {gib(plan.disk_bytes)} GiB, with one checkpoint more while it is written"
    if guessed:
        yield (
            f"{plan.tflops:g} TFLOP/s is a guess, a third of an A100's bf16 peak; the fewer images at once, the less "
            f"it is. Measure a few steps and plan again with --tflops"
        )
    yield "images/s is what the loaders of all workers must deliver together"
    most = plan.stages[0].workers[-1].num_workers
    if most > 1:
        yield (
            f"exchange is what a worker sends to sum the gradients, if it is not to wait; joined by 10 Gbit/s, "
            f"{most} workers take {significant(hours_on_a_network(plan, ETHERNET))} hours"
        )
    for file in dict.fromkeys(file for stage in plan.stages for file in stage.files):
        yield f"every worker needs {file}: {', '.join(stage.name for stage in plan.stages if file in stage.files)}"


def hours_on_a_network(plan: RunPlan, speed: float) -> float:
    """Hours of all stages with the most workers, where a step waits for whichever is slower, FLOPs or exchange.

    Args:
        plan: of the run.
        speed: bytes per second that a worker sends.
    """
    hours = 0.0
    for workers in (stage.workers[-1] for stage in plan.stages):
        hours += workers.hours * max(1.0, workers.exchange_bytes / speed / workers.step_seconds)
    return hours


def of_the_stages(plan: RunPlan) -> Iterator[str]:
    """What the tables do not say of single stages, as sentences."""
    for stage in plan.stages:
        if stage.finished:
            yield f"{stage.name} is finished and will be passed by"
            continue
        if stage.done:
            yield f"{stage.name} goes on at step {stage.done:,} of {stage.steps:,}"
        if stage.missing:
            yield f"{stage.name} needs {', '.join(stage.missing)}, to be trained to the end in this run before it"
        yield from (f"{stage.name} {note}" for note in stage.notes)


def per_workers(
    plan: RunPlan,
    header: Sequence[str],
    row: Callable[[StagePlan, WorkerPlan], list[str]],
    more: Sequence[Sequence[str]] = (),
) -> str:
    """A table with a line for every stage and number of workers."""
    rows = [
        [stage.name if place == 0 else "", *row(stage, workers)]
        for stage in plan.stages
        for place, workers in enumerate(stage.workers)
    ]
    return table(["stage", *header], [*rows, *more])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their titles, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in (header, *rows))
    ]
    return "\n".join(line.rstrip() for line in lines)


def wrapped(sentence: str) -> str:
    """A sentence in lines of the terminal's width."""
    return textwrap.fill(sentence, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)


def span(least: int, most: int) -> str:
    """ "3", or "2-3"."""
    return str(most) if least == most else f"{least}-{most}"


def gib(size: int) -> str:
    """Bytes as GiB: 46.1, 5.91, 0.003."""
    value = size / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else significant(value)


def millions(count: int) -> str:
    """72141699 -> "72.14 M"."""
    return f"{count / 1e6:.2f} M"


def significant(value: float) -> str:
    """Three digits that matter: 0.0312, 4.68, 46.1, 12,345."""
    if 0 < value < 1e-3:
        return "<0.001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
