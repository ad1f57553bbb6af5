"""Train LD-BFR on a Ray cluster; `python jobs/train.py --help` shows how."""

from __future__ import annotations

import _thread
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro

from jobs.connection import connected, num_cores, prepare_environment, start_log
from ldbfr.config import Preset, load_preset
from ldbfr.errors import ConfigError, LDBFRError, StorageError
from ldbfr.lease import Lease, LeaseHeldError
from ldbfr.storage import is_local, local_path

log = logging.getLogger("train")

StageChoice = Literal["all", "hq_vqgan", "latent_vqgan", "dc_vqr", "prior", "enhancer"]

WATCH_SECONDS = 5
EXIT_OK, EXIT_FAILED, EXIT_BAD_REQUEST, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Train:
    """Train LD-BFR with Ray Train: one stage, or all five in order, on any number of workers that come and go.

    The same command goes on where the newest good checkpoint stands, with the same data in the same order on however
    many workers; what is finished is passed by. A worker or machine that is lost costs the steps since the last
    checkpoint. While a run lives, a second one on the same --run is refused.

    Below --run, for every stage: checkpoints/, validation/ (numbers and pictures of every checkpoint), images/ and
    tensorboard/. Exit code 0: all is trained. 1: it broke off. 2: nothing was started.

    For example:

        python jobs/train.py --preset faces_64 --data faces/ --run runs/first

        python jobs/train.py --preset paper_512 --data s3://bucket/ffhq512 --run s3://bucket/runs/paper --dry-run

        ray job submit --working-dir . -- python jobs/train.py --preset paper_512 --data s3://bucket/ffhq512 \\
            --run s3://bucket/runs/paper --workers 4:8 --init latent_vqgan=/weights/vq-f4 --init prior=/weights/ldm-unet
    """

    data: tuple[str, ...]
    """Faces to train on: what jobs/prepare.py made (a folder or s3://…), or local folders, tar and zip files."""
    run: str
    """The run: a folder that every machine sees, or s3://bucket/prefix."""
    preset: str = "paper_512"
    """Name of a preset (see `ldbfr presets`), or a .toml file."""
    stage: StageChoice = "all"
    """Which stage; "all" runs the five in order."""
    workers: str = "1"
    """How many, one a GPU: a number, or MIN:MAX to grow and shrink with the cluster."""
    val_data: tuple[str, ...] = ()
    """Faces to validate on; the prepared data's own when left out, else the training faces."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """Override a setting, e.g. --set training.dc_vqr.steps=500; may be given several times."""
    init: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """STAGE=FOLDER: weights that a stage starts from, on a disk that every machine sees; may be given several times."""
    device: Literal["cpu", "cuda"] | None = None
    """GPUs where the cluster has any."""
    cpus_per_worker: int | None = None
    """CPUs and CPU threads of a worker: by itself the cores divided on CPUs, 4 beside a GPU."""
    validate: bool = True
    """Measure every checkpoint beside the training."""
    validation_cpus: float = 0
    """CPUs reserved for that; 0 reserves none, and takes one thread of a machine that trains."""
    validation_gpus: float = 0
    """GPUs reserved for that, e.g. 0.25, beyond the workers' own; 0 measures on the CPU, slow at 512 px."""
    validation_minutes: float = 30
    """How long the end of a stage waits for its last checkpoint's validation."""
    track: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Where numbers and pictures go besides TensorBoard."""
    cache_gb: float = 50
    """Disk on each machine for data that comes from a bucket, in GB."""
    wait_minutes: int = 30
    """How long to wait for machines when the cluster cannot start the workers, before the run gives up."""
    max_failures: int = 3
    """Losses of a worker in a row, with no new checkpoint between them, before the run gives up."""
    dry_run: bool = False
    """Print the plan (steps, resources, parameters, memory, hours) and start nothing."""
    tflops: float | None = None
    """Sustained TFLOP/s of a worker that the plan's hours assume."""


def main(arguments: list[str] | None = None) -> int:
    """Run the job; its exit code."""
    start_log()
    request = tyro.cli(Train, args=arguments, prog="train.py")
    started = False
    try:
        preset = load_preset(request.preset, request.set)  # a mistyped setting should not wait for torch
        workers = parse_workers(request.workers)
        stages, init = check(request, preset, workers)
        if request.dry_run:
            print(plan(request, preset, stages, workers))
            return EXIT_OK
        started = True
        log.info(
            "training %s of %s on %s by %s worker(s) into %s",
            ", ".join(stages), request.preset, ", ".join(request.data), request.workers, request.run,
        )  # fmt: skip
        run(request, preset, stages, workers, init)
        print(f"{', '.join(stages)}: finished in {request.run}")
    except LeaseHeldError as error:
        print(f"train: another run works on {request.run}: {error}", file=sys.stderr)
        return EXIT_BAD_REQUEST
    except LDBFRError as error:
        print(f"train: {error}", file=sys.stderr)
        return EXIT_FAILED if started else EXIT_BAD_REQUEST
    except KeyboardInterrupt:
        print("train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK


def parse_workers(text: str) -> tuple[int, int]:
    """ "4" -> (4, 4), "2:8" -> (2, 8).

    Raises:
        ConfigError: it is neither, or the least is more than the most.
    """
    low, colon, high = text.partition(":")
    try:
        least, most = int(low), int(high) if colon else int(low)
    except ValueError:
        least = most = 0
    if not 1 <= least <= most:
        raise ConfigError(f"--workers {text}: expected a number from 1 on, or MIN:MAX such as 2:8")
    return least, most


def check(request: Train, preset: Preset, workers: tuple[int, int]) -> tuple[tuple[str, ...], dict[str, Path]]:
    """Refuse what cannot work before anything is started; the stages, and where some of them start from."""
    from ldbfr.training.run import check_request, parse_init
    from ldbfr.training.stages import STAGE_NAMES

    stages = STAGE_NAMES if request.stage == "all" else (request.stage,)
    init = parse_init(request.init)
    check_request(preset, stages, init)
    for name in stages:
        batch = getattr(preset.training, name).batch_size
        if workers[1] > batch:
            raise ConfigError(
                f"--workers {request.workers}: training.{name}.batch_size is {batch}, too few for {workers[1]} "
                f"workers; take at most {batch} workers, or raise the batch size"
            )
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        places = {"run": [request.run], "data": request.data, "val-data": request.val_data, "init": init.values()}
        for option, named in places.items():
            check_absolute(option, [str(place) for place in named])
    least = {"max_failures": 0, "wait_minutes": 1, "cpus_per_worker": 1, "validation_cpus": 0, "validation_gpus": 0}
    for option, number in least.items():
        value = getattr(request, option)
        if value is not None and value < number:
            raise ConfigError(f"--{option.replace('_', '-')} {value}: expected {number} or more")
    return stages, init


def check_absolute(option: str, places: Sequence[str]) -> None:
    """Refuse paths that mean something else on every machine."""
    for place in places:
        if is_local(place) and not local_path(place).is_absolute():
            raise ConfigError(
                f"--{option} {place}: in a submitted job that is below its temporary copy of the code, which goes with "
                f"the job; give an absolute path that every machine sees, or s3://bucket/prefix"
            )


def plan(request: Train, preset: Preset, stages: Sequence[str], workers: tuple[int, int]) -> str:
    """What the run would do, as a table."""
    from ldbfr.data.shards import count_faces
    from ldbfr.training.plan import DEFAULT_TFLOPS, plan_run
    from ldbfr.training.run import done_steps
    from ldbfr.training.stages import STAGE_NAMES

    done = {name: done_steps(request.run, name) for name in STAGE_NAMES}
    tflops = DEFAULT_TFLOPS if request.tflops is None else request.tflops
    return plan_run(preset, stages, workers, count_faces(request.data), done, tflops).describe()


def run(request: Train, preset: Preset, stages: Sequence[str], workers: tuple[int, int], init: dict[str, Path]) -> None:
    """Hold the run's lock, and train what is not finished."""
    from ldbfr.training.run import check_starts, finished

    check_starts(preset, stages, request.run, init)
    holder = f"`{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"
    with Lease.acquire(f"{request.run.rstrip('/')}/_lease", holder) as lease, watched(lease):
        left = []
        for name in stages:
            if finished(request.run, name, preset):
                log.info("%s is finished", name)
            else:
                left.append(name)
        if not left:
            return
        prepare_environment()
        # By itself 2 s. A look costs the controller's node processor time, a lost worker costs a restart anyway.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "5")
        with connected(num_cores()):
            from jobs.train_driver import Limits, find_device, make_work, train_on_ray

            limits = Limits(
                workers,
                request.wait_minutes,
                request.max_failures,
                request.validation_cpus,
                request.validation_gpus,
                request.validation_minutes,
            )
            device = find_device(request.device)
            for name in left:
                work = make_work(
                    preset=preset,
                    stage=name,
                    data=request.data,
                    val_data=request.val_data,
                    run=request.run,
                    init=init.get(name),
                    track=request.track,
                    device=device,
                    cpus=request.cpus_per_worker,
                    cache_bytes=int(request.cache_gb * 1e9),
                    workers=workers,
                )
                train_on_ray(work, limits, request.validate, lease.check)


@contextmanager
def watched(lease: Lease) -> Iterator[None]:
    """Breaks the run off, as Ctrl-C does, when its lock was taken over because this process had been stopped."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            try:
                lease.check()
            except StorageError as error:
                log.error("%s", error)
                _thread.interrupt_main()
                return

    threading.Thread(target=watch, name="lease-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


if __name__ == "__main__":
    sys.exit(main())
