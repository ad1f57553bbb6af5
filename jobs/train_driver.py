"""The driver's side of a training: Ray Train runs, one after the other until a stage is finished."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
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

from jobs.nodes import nodes_for_workers
from jobs.train_worker import Board, Validator, Work, train_worker
from ldbfr.config import Preset
from ldbfr.errors import LDBFRError, StorageError
from ldbfr.places import absolute
from ldbfr.training.checkpoint import CheckpointGoneError
from ldbfr.training.run import done_steps, finished

log = logging.getLogger("train")

PAUSE_SECONDS = 2.0
"""Before another try; a cluster that has just lost a machine needs a moment to notice."""
CPUS_BESIDE_A_GPU = 4
SHOW_SECONDS = 0.5
RESIZE_SECONDS = 300.0
"""Between two looks at whether a run could grow: growing costs the steps since the last checkpoint."""
REMIND_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """How many workers at least and at most, how long to wait for them, failures in a row, what the validation gets."""

    workers: tuple[int, int]
    wait_minutes: int
    max_failures: int
    validation_cpus: float
    validation_gpus: float
    validation_minutes: float


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
    device: str,
    cpus: int | None,
    cache_bytes: int,
    workers: tuple[int, int],
) -> Work:
    """What the workers are told, fitted to the cluster."""
    if cpus is None:
        cpus = cpus_for_a_worker(device, workers[1])
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


def find_device(device: str | None) -> str:
    """Where a run trains, all of its stages: "cuda" if asked for, or if the cluster has a GPU now."""
    gpus = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and not gpus:
        log.warning("--device cuda: the cluster has no GPU yet; waiting for one")
    return device or ("cuda" if gpus else "cpu")


def cpus_for_a_worker(device: str, num_workers: int) -> int:
    """So many that all workers find room: the CPUs shared among the workers, or a node's among its GPUs."""
    nodes = nodes_for_workers()
    if device == "cuda":
        shares = [int(node.get("CPU", 0) / node["GPU"]) for node in nodes if node.get("GPU")]
        return max(1, min([CPUS_BESIDE_A_GPU, *shares]))
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    for each in range(max([1, *cpus]), 1, -1):
        if sum(number // each for number in cpus) >= num_workers:
            return each
    return 1


def train_on_ray(work: Work, limits: Limits, validate: bool, check: Callable[[], None]) -> None:
    """Train a stage to its end, through failures of workers and machines.

    `check` raises when the run's lock was lost.

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
        keep_training(work, limits, board, validator, check)
        if validator is not None:
            finish_validation(work, validator, 60 * limits.validation_minutes)
    ray.kill(board)


def finish_validation(work: Work, validator: Any, seconds: float) -> None:
    """Wait for the last checkpoint to be measured; what goes wrong there does not stop the next stage."""
    try:
        for text in ray.get(validator.drain.remote(), timeout=seconds):
            log.warning("a validation of %s failed: %s", work.stage, text)
    except ray.exceptions.GetTimeoutError:
        log.warning("the last checkpoint of %s is not validated: it takes over %.0f minutes", work.stage, seconds / 60)
    except ray.exceptions.RayError as error:
        log.warning("the last checkpoint of %s is not validated: %s", work.stage, first_line(error))
    ray.kill(validator)


@contextmanager
def shown(board: Any) -> Iterator[None]:
    """Shows the board's lines while the block runs."""
    over = threading.Event()

    def show() -> None:
        last, heard = False, time.monotonic()
        while not last:
            last = over.wait(SHOW_SECONDS)
            if time.monotonic() - heard > REMIND_SECONDS:
                heard = time.monotonic()
                log.info("nothing from the workers for %.0f s; the cluster has %s", REMIND_SECONDS, resources())
            try:
                lines = ray.get(board.take.remote())
            except ray.exceptions.RayError as error:
                log.warning("the workers' lines are not shown any more: %s", first_line(error))
                return
            for level, line in lines:
                heard = time.monotonic()
                log.log(level, "%s", line)

    thread = threading.Thread(target=show, name="board", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def keep_training(work: Work, limits: Limits, board: Any, validator: Any | None, check: Callable[[], None]) -> None:
    """Ray Train runs, one after the other, until the stage is finished; see `train_on_ray`."""
    target = getattr(work.preset.training, work.stage).steps
    failures = 0
    while not finished(work.run, work.stage, work.preset):
        check()
        before = done_steps(work.run, work.stage)
        wanted = f"{limits.workers[0]} to {limits.workers[1]}" if len(set(limits.workers)) > 1 else limits.workers[0]
        each = f"{work.threads} CPU(s){' and a GPU' if work.device == 'cuda' else ''} each"
        log.info("%s: %d of %d steps done; asking for %s worker(s), %s", work.stage, before, target, wanted, each)
        try:
            fit(work, limits, board, validator)
            if done_steps(work.run, work.stage) <= before:
                raise StageFailure(
                    f"the workers have finished, but nothing new is in {work.run} as seen from here", None
                )
        except StageFailure as failure:
            if failure.lasting is not None:
                raise failure.lasting from failure
            failures = 1 if done_steps(work.run, work.stage) > before else failures + 1
            if failures > limits.max_failures:
                raise StorageError(
                    f"stage {work.stage} broke off {failures} times in a row without a new checkpoint, the last time "
                    f"with: {failure}. Mend that (a --run on disk must be one that every machine sees), and give the "
                    "same command again"
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
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{Path(work.run).name}-{work.stage}-{uuid.uuid4().hex[:8]}",
            storage_path=str(
                Path(tempfile.gettempdir()) / f"ldbfr-ray-train-{os.getuid()}"
            ),  # Ray's notes; checkpoints are ours
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=limits.wait_minutes),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise explain(error, limits) from error
    except SystemExit as error:  # how Ray Train ends on Ctrl-C
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, handler)  # Ray Train puts its own in the place


def explain(error: ray.train.TrainingFailedError, limits: Limits) -> StageFailure:
    """What a failed run means: an error of ours comes out as it is, the loss of a worker as one sentence."""
    start = getattr(error, "controller_failure", None)
    if start is not None:
        text = f"the cluster did not start the workers within {limits.wait_minutes} minute(s): {first_line(start)}"
        return StageFailure(text, StorageError(f"{text}. It has {resources()}; take fewer or smaller --workers"))
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    ours = [failure for failure in failures.values() if isinstance(failure, LDBFRError)]
    # A bucket may come back, and a checkpoint may have been removed under the reader's hands.
    lasting = [failure for failure in ours if not isinstance(failure, StorageError | CheckpointGoneError)]
    if lasting:
        return StageFailure(str(lasting[0]), lasting[0])
    if ours:
        return StageFailure(str(ours[0]), None)
    for rank, failure in failures.items():
        if isinstance(failure, ray.exceptions.RayError):
            return StageFailure(f"worker {rank} was lost ({first_line(failure)})", None)
    return StageFailure(first_line(next(iter(failures.values()), error)), None)


def resources() -> str:
    """What the cluster has."""
    found = ray.cluster_resources()
    return f"{found.get('CPU', 0):g} CPU(s) and {found.get('GPU', 0):g} GPU(s) on {len(ray.nodes())} machine(s)"


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
