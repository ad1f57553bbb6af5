"""The plan of a training run: what it will take, worked out before anything is started.

Memory and FLOPs come from running every stage on the meta device (`step_cost.py`); time follows from an assumed speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from ldbfr.config import DCVQRStageSettings, DiffusionStageSettings, Preset, StageSettings, VQStageSettings
from ldbfr.data.sampler import worker_slice
from ldbfr.errors import ConfigError
from ldbfr.training.base import Stage
from ldbfr.training.losses import VGG16_FILE
from ldbfr.training.plan_table import describe
from ldbfr.training.stages import STAGE_NAMES
from ldbfr.training.step_cost import (
    StepFlops,
    StepMemory,
    forward_flops,
    measure_flops,
    measure_memory,
    measure_preview,
    meta_stage,
)

DEFAULT_TFLOPS = 100.0
"""Sustained TFLOP/s that are assumed of a worker: one data-centre GPU in bf16, about a third of an A100's peak of 312
and a tenth of an H100's of 989. A guess to be replaced by a measurement."""

PREVIEW_FACES = 1
"""Faces that the loop draws at a time, whatever the batch."""


class Figures(BaseModel):
    """A frozen group of results."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ParameterCounts(Figures):
    """Parameters that a worker holds; `network` is what the stage produces, trained or not."""

    trainable: int
    frozen: int
    discriminator: int
    network: int


class Memory(Figures):
    """What a worker's device holds at most, in bytes.

    `activations` are what autograd keeps for the backward pass of a micro-batch, `temporaries` what is held beside
    them at the worst moment: results of kernels, gradients of activations, or the log's pictures. Left out are the
    device's own context (0.5 GiB), cuDNN's workspaces, copies that change the memory layout, and fragmentation.
    DDP adds nothing: with `gradient_as_bucket_view`, its buckets are the gradients.
    """

    weights: int
    gradients: int
    adam: int
    ema: int
    activations: int
    temporaries: int
    total: int


class WorkerPlan(Figures):
    """A stage on a number of workers.

    `least_images` and `most_images` are the workers' parts of a global batch (they differ where it does not divide),
    `micro_batch` is what the largest part is trained in. `images_per_second` is what the loaders of all workers must
    deliver together. `exchange_bytes` is what a worker sends in a step to sum the gradients (ring all-reduce).
    `hours` are for the steps that are left.
    """

    num_workers: int
    least_images: int
    most_images: int
    micro_batch: int
    memory: Memory
    exchange_bytes: int
    step_seconds: float
    images_per_second: float
    hours: float


class StagePlan(Figures):
    """What a stage takes; `workers` is the fewest and, where that is another number, the most.

    FLOPs are of one image and count 2 for a multiply-add. `checkpoint_bytes` are also what the first worker's host
    holds while one is written; `kept_checkpoints` are the newest and the best. `missing` are stages that it builds on
    and that are neither finished nor planned before it; `files` are what every worker must have besides the data.
    """

    name: str
    steps: int
    done: int
    batch_size: int
    gradient_accumulation: int
    precision: str
    parameters: ParameterCounts
    flops_per_image: int
    forward_flops_per_image: int
    num_images: int
    epochs: float | None
    checkpoint_bytes: int
    kept_checkpoints: int
    upstream: tuple[str, ...]
    missing: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]
    workers: tuple[WorkerPlan, ...]

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.done >= self.steps


class RunPlan(Figures):
    """The plan of several stages in order. `disk_bytes` has room for one more checkpoint, while it is written."""

    preset: str
    tflops: float
    data_images: int | None
    stages: tuple[StagePlan, ...]
    disk_bytes: int

    def describe(self) -> str:
        """Tables for a terminal of 120 columns."""
        return describe(self, guessed=self.tflops == DEFAULT_TFLOPS)


def plan_run(
    preset: Preset,
    stages: Sequence[str],
    workers: tuple[int, int],
    num_images: int | None = None,
    done: Mapping[str, int] | None = None,
    tflops: float = DEFAULT_TFLOPS,
    cached_latents: bool = False,
) -> RunPlan:
    """Plan a run without starting anything; nothing is downloaded, and no network takes memory.

    Args:
        preset: all settings.
        stages: names, in order.
        workers: the fewest and the most.
        num_images: size of the training set, where it is known.
        done: steps that are done, by stage.
        tflops: sustained TFLOP/s of a worker.
        cached_latents: whether the frozen latents are prepared with the data.

    Raises:
        ConfigError: an unknown stage, no stage, numbers of workers that cannot be, or a speed that is not positive.
    """
    if not stages:
        raise ConfigError(f"no stage to plan: give one of {', '.join(STAGE_NAMES)}, or all")
    done = done or {}
    plans: list[StagePlan] = []
    for name in stages:
        plan = plan_stage(
            preset, name, workers, num_images, done=done.get(name, 0), tflops=tflops, cached_latents=cached_latents
        )
        ready = {earlier.name for earlier in plans} | {key for key in done if is_finished(preset, key, done[key])}
        plans.append(plan.model_copy(update={"missing": tuple(key for key in plan.upstream if key not in ready)}))
    kept = sum(plan.checkpoint_bytes * plan.kept_checkpoints for plan in plans)
    return RunPlan(
        preset=preset.name,
        tflops=tflops,
        data_images=num_images,
        stages=tuple(plans),
        disk_bytes=kept + max(plan.checkpoint_bytes for plan in plans),
    )


def plan_stage(
    preset: Preset,
    name: str,
    workers: tuple[int, int],
    num_images: int | None = None,
    done: int = 0,
    tflops: float = DEFAULT_TFLOPS,
    cached_latents: bool = False,
) -> StagePlan:
    """Plan one stage; its `missing` are all stages that it builds on. See `plan_run`.

    Raises:
        ConfigError: as `plan_run`.
    """
    check_stage(name)
    settings: StageSettings = getattr(preset.training, name)
    check_numbers(name, settings, workers, num_images, tflops)
    stage = meta_stage(preset, name)
    cached = isinstance(settings, DiffusionStageSettings) and (settings.cache_latents or cached_latents)
    flops = measure_flops(stage, cached)
    held, preview = held_bytes(stage), measure_preview(stage, PREVIEW_FACES)
    memory = {size: measure_memory(stage, size, cached) for size in {micro_batch(settings, n) for n in workers}}
    plans = [
        plan_workers(settings, number, memory, held, preview, done, flops.total / tflops / 1e12)
        for number in sorted(set(workers))
    ]
    images = settings.steps * settings.batch_size
    return StagePlan(
        name=name,
        steps=settings.steps,
        done=done,
        batch_size=settings.batch_size,
        gradient_accumulation=settings.gradient_accumulation,
        precision=settings.precision,
        parameters=count_parameters(stage),
        flops_per_image=flops.total,
        forward_flops_per_image=flops.forward,
        num_images=images,
        epochs=None if num_images is None else images / num_images,
        checkpoint_bytes=checkpoint_bytes(stage),
        kept_checkpoints=settings.keep_checkpoints + settings.keep_best,
        upstream=stage.upstream,
        missing=stage.upstream,
        files=files_of(settings),
        notes=tuple(notes_on(stage, flops, cached)),
        workers=tuple(plans),
    )


def plan_workers(
    settings: StageSettings,
    num_workers: int,
    memory: Mapping[int, StepMemory],
    held: dict[str, int],
    preview: int,
    done: int,
    image_seconds: float,
) -> WorkerPlan:
    """A stage on a number of workers; `memory` is by micro-batch, `held` from `held_bytes`."""
    shares, size = images_per_worker(settings.batch_size, num_workers), micro_batch(settings, num_workers)
    update = held["gradients"]  # the optimiser's step works on a copy of that size, when the activations are gone
    saved = memory[size].saved
    parts = held | {"activations": saved, "temporaries": max(memory[size].peak, preview, update, saved) - saved}
    step_seconds = max(shares) * image_seconds  # the others wait for the worker with the largest part
    return WorkerPlan(
        num_workers=num_workers,
        least_images=min(shares),
        most_images=max(shares),
        micro_batch=size,
        memory=Memory(**parts, total=sum(parts.values())),
        exchange_bytes=2 * held["gradients"] * (num_workers - 1) // num_workers,
        step_seconds=step_seconds,
        images_per_second=settings.batch_size / step_seconds,
        hours=max(0, settings.steps - done) * step_seconds / 3600,
    )


def images_per_worker(batch_size: int, num_workers: int) -> list[int]:
    """How many images of a global batch every worker takes."""
    return [len(range(batch_size)[worker_slice(batch_size, rank, num_workers)]) for rank in range(num_workers)]


def micro_batch(settings: StageSettings, num_workers: int) -> int:
    """The most images that go through the networks at once."""
    return math.ceil(max(images_per_worker(settings.batch_size, num_workers)) / settings.gradient_accumulation)


def count_parameters(stage: Stage) -> ParameterCounts:
    """Parameters by what becomes of them."""
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in stage.trainable().items()}
    trainable = counts.pop("generator")
    discriminator = sum(counts.values())
    everything = sum(parameter.numel() for parameter in stage.parameters())
    return ParameterCounts(
        trainable=trainable,
        frozen=everything - trainable - discriminator,
        discriminator=discriminator,
        network=sum(parameter.numel() for parameter in stage.network.parameters()),
    )


def held_bytes(stage: Stage) -> dict[str, int]:
    """Bytes that a worker holds all the time: gradients and moments for whatever learns, averages for the network."""
    groups = {name: sum(p.nbytes for p in parameters) for name, parameters in stage.trainable().items()}
    return {
        "weights": sum(tensor.nbytes for tensor in (*stage.parameters(), *stage.buffers())),
        "gradients": sum(groups.values()),
        "adam": 2 * sum(groups.values()),
        "ema": groups["generator"],
    }


def checkpoint_bytes(stage: Stage) -> int:
    """Tensors of a checkpoint: the network, its average, Adam's two moments, the stage's extras."""
    modules = (stage.network, stage.network, *stage.extras().values())
    state = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    return state + held_bytes(stage)["adam"]


def files_of(settings: StageSettings) -> tuple[str, ...]:
    """The perceptual loss's backbone, where a stage has one."""
    if isinstance(settings, VQStageSettings | DCVQRStageSettings):
        terms = settings.reconstruction
        if terms.perceptual and terms.perceptual_backbone == "vgg":
            return (VGG16_FILE,)
    return ()


def notes_on(stage: Stage, flops: StepFlops, cached: bool) -> Iterator[str]:
    """What else somebody who starts the stage should know."""
    settings: Any = stage.settings
    if isinstance(settings, VQStageSettings) and settings.trains == "decoder":
        yield f"trains the decoder alone, so it must start from trained weights: --init {stage.name}=FOLDER"
    if "discriminator" in stage.trainable() and settings.reconstruction.discriminator_start > 1:
        start = settings.reconstruction.discriminator_start
        yield f"takes less before step {start:,}, where the discriminator starts"
    if isinstance(settings, DiffusionStageSettings) and not cached:
        share = (flops.forward - forward_flops(stage, cached_latents=True)) / flops.total
        yield f"takes {share:.0%} fewer FLOPs with latents that are prepared along with the data"


def is_finished(preset: Preset, name: str, done: int) -> bool:
    """Whether a stage has all its steps."""
    check_stage(name)
    return done >= int(getattr(preset.training, name).steps)


def check_stage(name: str) -> None:
    """Refuse an unknown stage."""
    if name not in STAGE_NAMES:
        raise ConfigError(f"no stage {name!r}: give one of {', '.join(STAGE_NAMES)}, or all")


def check_numbers(
    name: str, settings: StageSettings, workers: tuple[int, int], num_images: int | None, tflops: float
) -> None:
    """Refuse numbers that no run could have."""
    fewest, most = workers
    if not 1 <= fewest <= most:
        raise ConfigError(f"{fewest} to {most} workers: expected at least 1, and no more at least than at most")
    if most > settings.batch_size:
        raise ConfigError(
            f"training.{name}.batch_size {settings.batch_size} is less than one image for each of the {most} workers: "
            f"raise it, or take fewer workers"
        )
    if num_images is not None and num_images < 1:
        raise ConfigError(f"a data set of {num_images} images: expected at least one")
    if not (tflops > 0 and math.isfinite(tflops)):
        raise ConfigError(f"{tflops} TFLOP/s of a worker: expected a number above 0, such as {DEFAULT_TFLOPS:g}")
