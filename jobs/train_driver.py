"""The driver's side of a training: Ray Train runs, one after the other until a stage is finished."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.train_worker import Board, Validator, Work, train_worker
from ldbfr.config import Preset
from ldbfr.errors import ConfigError, LDBFRError, StorageError
from ldbfr.training.run import done_steps, finished

log = logging.getLogger("train")

PAUSE_SECONDS = 2.0
"""Before another try; a cluster that has just lost a machine needs a moment to notice."""
CPUS_BESIDE_A_GPU = 4
SHOW_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """How many workers at least and at most, how long to wait for them, failures in a row, what the validation gets."""

    workers: tuple[int, int]
    wait_minutes: int
    max_failures: int
    validation_cpus: float
    validation_gpus: float


class StageFailure(Exception):
    """A Ray Train run broke off. `lasting` is the error that trying again would not mend, if it was one."""

    def __init__(self, text: str, lasting: LDBFRError | None) -> None:
        super().__init__(text)
        self.lasting = lasting


def make_work(
    preset: Preset,
    stage: str,
    data: tuple[str, ...],
    val_data: tuple[str, ...],
    run: str,
    init: Path | None,
    track: tuple[str, ...],
    device: str | None,
    cpus: int | None,
    cache_bytes: int,
    workers: tuple[int, int],
) -> Work:
    """What the workers are told, fitted to the cluster.

    Raises:
        ConfigError: GPUs are asked for and the cluster has none.
    """
    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0)
    if device == "cuda" and not gpus:
        raise ConfigError("--device cuda: the cluster has no GPU; leave it out to train on CPUs")
    device = device or ("cuda" if gpus else "cpu")
    if cpus is None:
        all_cpus = int(resources.get("CPU", 1))
        cpus = CPUS_BESIDE_A_GPU if device == "cuda" else max(1, all_cpus // workers[1])
    return Work(
        preset=preset,
        stage=stage,
        data=tuple(absolute(uri) for uri in data),
        val_data=tuple(absolute(uri) for uri in val_data),
        run=absolute(run),
        init=None if init is None else absolute(str(init)),
        track=track,
        device=device,
        threads=cpus,
        cache_bytes=cache_bytes,
    )


def absolute(uri: str) -> str:
    """A URI that means the same in every working directory."""
    return uri if "://" in uri else str(Path(uri).resolve())


def train_on_ray(work: Work, limits: Limits, validate: bool) -> None:
    """Train a stage to its end, through failures of workers and machines.

    Raises:
        LDBFRError: what trying again would not mend, or too many failures in a row.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    with shown(board):
        validator = None
        if validate:
            reserved = {"num_cpus": limits.validation_cpus, "num_gpus": limits.validation_gpus}
            validator = Validator.options(**reserved, max_restarts=-1).remote(work, board)  # type: ignore[attr-defined]
        keep_training(work, limits, board, validator)
        if validator is not None:
            for text in ray.get(validator.drain.remote()):
                log.warning("a validation of %s failed: %s", work.stage, text)
            ray.kill(validator)
    ray.kill(board)


@contextmanager
def shown(board: Any) -> Iterator[None]:
    """Shows the board's lines while the block runs."""
    over = threading.Event()

    def show() -> None:
        last = False
        while not last:
            last = over.wait(SHOW_SECONDS)
            try:
                lines = ray.get(board.take.remote())
            except ray.exceptions.RayError as error:
                log.warning("the workers' lines are not shown any more: %s", first_line(error))
                return
            for level, line in lines:
                log.log(level, "%s", line)

    thread = threading.Thread(target=show, name="board", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def keep_training(work: Work, limits: Limits, board: Any, validator: Any | None) -> None:
    """Ray Train runs, one after the other, until the stage is finished; see `train_on_ray`."""
    target = getattr(work.preset.training, work.stage).steps
    failures = 0
    while not finished(work.run, work.stage, work.preset):
        before = done_steps(work.run, work.stage)
        wanted = f"{limits.workers[0]} to {limits.workers[1]}" if len(set(limits.workers)) > 1 else limits.workers[0]
        each = f"{work.threads} CPU(s){' and a GPU' if work.device == 'cuda' else ''} each"
        log.info("%s: %d of %d steps done; asking for %s worker(s), %s", work.stage, before, target, wanted, each)
        try:
            fit(work, limits, board, validator)
        except StageFailure as failure:
            if failure.lasting is not None:
                raise failure.lasting from failure
            failures = 1 if done_steps(work.run, work.stage) > before else failures + 1
            if failures > limits.max_failures:
                raise StorageError(
                    f"stage {work.stage} broke off {failures} times in a row without a new checkpoint, the last time "
                    f"with: {failure}. Mend that, and give the same command again"
                ) from failure
            log.warning("%s: %s; going on from the last checkpoint", work.stage, failure)
            time.sleep(PAUSE_SECONDS)


def fit(work: Work, limits: Limits, board: Any, validator: Any | None) -> None:
    """One Ray Train run; it starts from the newest checkpoint, whoever wrote it.

    Ray's own retries are off, apart from those after an announced preemption and those for want of machines, of a
    minute each: only we can tell a lost machine from a mistake, and progress from its absence.

    Raises:
        StageFailure: a worker failed or was lost.
    """
    least, most = limits.workers
    resources: dict[str, float] = {"CPU": work.threads}
    if work.device == "cuda":
        resources["GPU"] = 1
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"work": work, "board": board, "validator": validator},
        torch_config=TorchConfig(backend="nccl" if work.device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=most if least == most else limits.workers,
            use_gpu=work.device == "cuda",
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{Path(work.run).name}-{work.stage}-{uuid.uuid4().hex[:8]}",
            storage_path=str(Path(tempfile.gettempdir()) / "ldbfr-ray-train"),  # Ray's notes; checkpoints are ours
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=limits.wait_minutes),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise explain(error) from error


def explain(error: ray.train.TrainingFailedError) -> StageFailure:
    """What a failed run means: an error of ours comes out as it is, the loss of a worker as one sentence."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    ours = [failure for failure in failures.values() if isinstance(failure, LDBFRError)]
    lasting = [failure for failure in ours if not isinstance(failure, StorageError)]
    if lasting:
        return StageFailure(str(lasting[0]), lasting[0])
    if ours:
        return StageFailure(str(ours[0]), None)
    for rank, failure in failures.items():
        if isinstance(failure, ray.exceptions.RayError):
            return StageFailure(f"worker {rank} was lost ({first_line(failure)})", None)
    return StageFailure(first_line(next(iter(failures.values()), error)), None)


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
