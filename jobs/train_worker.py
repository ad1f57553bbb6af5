"""What a Ray Train worker does: the training loop of `ldbfr`, on a runtime that listens to Ray."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from jobs.metrics import TrainingMetrics
from ldbfr.config import Preset
from ldbfr.data.index import FaceImages, Faces
from ldbfr.data.shards import has_split, open_faces
from ldbfr.training.run import train_stage
from ldbfr.training.runtime import DistributedRuntime, Request
from ldbfr.training.validation import ValidationQueue, validate_checkpoint

log = logging.getLogger(__name__)

PREEMPTION_EVERY = 10
"""Steps between two looks at whether Ray is about to lose a machine; a look is a round trip among all workers."""


class Work(BaseModel):
    """One stage's training, as it travels to the workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Preset
    stage: str
    data: tuple[str, ...]
    val_data: tuple[str, ...]
    run: str
    init: str | None
    track: tuple[str, ...]
    device: str
    threads: int
    cache_bytes: int

    def faces(self) -> Faces:
        """The training set."""
        return open_faces(self.data, self.preset.side, "train", self.cache_bytes)

    def validation_faces(self, training: Faces | None = None) -> Faces:
        """The validation set: the one named, the prepared data's own, or the first of the training set."""
        return find_validation_faces(self.val_data, self.data, self.preset.side, self.cache_bytes, training)


class RayRuntime(DistributedRuntime):
    """A worker of Ray Train.

    Args:
        work: what is trained.
        validator: told of every checkpoint; None where nothing is validated.
    """

    def __init__(self, work: Work, validator: Any | None) -> None:
        super().__init__(work.device if work.device == "cpu" else None)
        self.report_every = getattr(work.preset.training, work.stage).log_every
        self.last_step = getattr(work.preset.training, work.stage).steps
        self.validator = validator
        self.saved_for: set[str] = set()
        self.metrics = TrainingMetrics(work.run, work.stage) if self.rank == 0 else None

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module in DistributedDataParallel, unless there is nobody to share with."""
        return module if self.world_size == 1 else super().wrap(module)

    def request(self, step: int) -> Request:
        """SAVE, once for every machine that Ray says it is about to lose."""
        if step % PREEMPTION_EVERY:
            return Request.NONE
        notice = ray.train.get_preemption_info()
        if notice is None or self.saved_for.issuperset(notice.preempted_node_ids):
            return Request.NONE
        self.saved_for.update(notice.preempted_node_ids)
        log.warning("%d machine(s) will be taken away: saving now", len(self.saved_for))
        return Request.SAVE

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Hand the metrics to Ray, as often as they are logged: a report is a round trip among all workers."""
        if step % self.report_every == 0 or step == self.last_step:
            ray.train.report({"step": step, **metrics})
            if self.metrics is not None:
                self.metrics.report(step, metrics)

    def saved(self, step: int) -> None:
        """Have the checkpoint validated, elsewhere."""
        if self.metrics is not None:
            self.metrics.saved()
        if self.validator is not None:
            self.validator.submit.remote(step)


def train_worker(config: Mapping[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    work: Work = config["work"]
    torch.set_num_threads(work.threads)
    runtime = RayRuntime(work, config["validator"])
    say_to(config["board"], logging.ERROR if runtime.rank else logging.INFO)  # one worker's lines are enough
    log.info("%s runs on %d worker(s), the first on %s", work.stage, runtime.world_size, platform.node())
    images = work.faces()
    preview = work.validation_faces(images)
    init = None if work.init is None else Path(work.init)
    train_stage(work.preset, work.stage, images, preview, work.run, runtime, init, work.track)


def find_validation_faces(
    val_data: tuple[str, ...], data: tuple[str, ...], side: int, cache_bytes: int, training: Faces | None
) -> Faces:
    """See `Work.validation_faces`."""
    if val_data:
        return open_faces(val_data, side, "val", cache_bytes)
    if len(data) == 1 and has_split(data[0], "val"):
        return open_faces(data, side, "val", cache_bytes)
    return training if training is not None else open_faces(data, side, "train", cache_bytes)


@ray.remote(num_cpus=0)
class Board:
    """Where workers write what the driver shows; so that nothing else is between a run's lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []

    def say(self, level: int, line: str) -> None:
        """Add a line."""
        self.lines.append((level, line))

    def take(self) -> list[tuple[int, str]]:
        """The lines since the last time."""
        lines, self.lines = self.lines, []
        return lines


class BoardHandler(logging.Handler):
    """Sends log records to the board."""

    def __init__(self, board: Any) -> None:
        super().__init__()
        self.board = board

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        self.board.say.remote(record.levelno, self.format(record))


def say_to(board: Any, level: int) -> None:
    """Send what ldbfr and the jobs log in this process to the board."""
    for name in ("ldbfr", "jobs"):
        logger = logging.getLogger(name)
        logger.handlers = [BoardHandler(board)]
        logger.setLevel(level)


@ray.remote(num_cpus=0)
class Validator:
    """Measures checkpoints beside the training; it outlives the workers that it hears from.

    Args:
        work: what is trained.
        board: for its lines.
    """

    def __init__(self, work: Work, board: Any) -> None:
        say_to(board, logging.INFO)
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        self.work = work
        # Ray shows all GPUs to whoever has reserved none; those are the workers'.
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self.faces: Faces | None = None
        self.queue = ValidationQueue(self.validate)

    def submit(self, step: int) -> None:
        """A checkpoint is there."""
        self.queue.submit(step)

    def drain(self) -> list[str]:
        """Wait for the last one; what went wrong, as sentences."""
        return [str(error) for error in self.queue.drain()]

    def validate(self, step: int) -> object:
        """Measure a checkpoint."""
        work = self.work
        if self.faces is None:
            faces = work.validation_faces()
            count = min(len(faces), work.preset.training.validation.num_images)
            self.faces = FaceImages(faces.read(range(count)), list(faces.names[:count]))
        return validate_checkpoint(work.preset, work.stage, work.run, step, self.faces, self.device)
