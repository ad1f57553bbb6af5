"""Restore an archive of aligned faces with Ray Data; `python jobs/restore.py --help` shows how."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro

from jobs.connection import num_cores, prepare_environment, start_log
from ldbfr.archive.ledger import Ledger, UnitDone, do_again, manifest_folder
from ldbfr.archive.listing import Sources, is_planned, make_plan
from ldbfr.archive.naming import OutputFormat, OutputLayout
from ldbfr.archive.plan import Plan
from ldbfr.archive.rounds import Rounds, TooManyFailuresError
from ldbfr.archive.run import Run, check_places, lock_uri, report, write_status
from ldbfr.archive.settings import RestoreSettings, RunSettings, Weights, images_in_a_unit
from ldbfr.config import DEFAULT_WEIGHTS, SchedulerName, check_range
from ldbfr.errors import ConfigError, InputError, LDBFRError, StorageError
from ldbfr.lease import Lease
from ldbfr.photos.options import PhotoOptions
from ldbfr.places import absolute
from ldbfr.progress import Progress, Tally
from ldbfr.runner import Item, Result, run_here

if TYPE_CHECKING:
    from ldbfr.photos.finding import FaceFinder

log = logging.getLogger("restore")

MOST_UNIT_BYTES = 2**28
"""Of the faces of a unit: several units have to fit into Ray's object store."""
ARCHIVES_LISTED_HERE = 16
"""Archives that are not worth the start of Ray."""

EXIT_OK, EXIT_INCOMPLETE, EXIT_BAD_REQUEST, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Restore:
    """Restore every image of an archive: ten files in a folder, or a hundred million in a bucket.

    Inputs may be folders and prefixes of any depth, tar, tar.gz, zip and parquet files, and text files with one URI a
    line; on a disk or s3://, mixed. With --faces all the images (PNG, JPEG, WebP, BMP, TIFF) are photos: their faces
    are found, restored and put back. Without it each image is one aligned face; it is cropped to its central square and
    resized to the model's side. What cannot be restored becomes a row that says why; it never stops the others.

    Below the output: the results in the inputs' folders (or shards/), manifest/ (parquet, one row per input),
    report.html, and _ldbfr/ with the plan and the records. The same command goes on where it was stopped, and reads
    nothing that is done. `ldbfr archive status OUTPUT` tells how far it is. Exit code 0: every input has its row, and
    no more failed than may. 1: the run broke off, or too many failed. 2: nothing was started.

    For example:

        python jobs/restore.py --input faces/ --output restored/

        python jobs/restore.py --input s3://bucket/archive/ --output s3://bucket/restored/ --format jpeg --quality 90

        python jobs/restore.py --input s3://bucket/photos/ --output s3://bucket/better/ --faces all

        python jobs/restore.py --input a.zip more.tar uris.txt --output restored/ --layout tar --workers 1:4

        ray job submit --working-dir . -- python jobs/restore.py --input s3://b/in --output s3://b/out --workers 2:16
    """

    input: tuple[str, ...]
    """Where the images are: folders, archives, tables, lists of URIs; local or s3://."""
    output: str
    """Folder or s3://bucket/prefix for the results; made if needed."""
    weights: str = DEFAULT_WEIGHTS
    """Name of weights that come with ldbfr, or a folder of `ldbfr export`."""
    steps: int | None = None
    """Denoising steps; 0 gives the first stage alone. The weights' own when left out."""
    start_step: int | None = None
    """Where the diffusion starts: 1000 from pure noise, below from the first stage. The weights' own when left out."""
    scheduler: SchedulerName | None = None
    """Sampler; the weights' own when left out."""
    condition_scale: float | None = None
    """Factor on the injections; the weights' own when left out."""
    color_correction: bool | None = None
    """Whether low frequencies, thus colours, are the first stage's; as the weights have it when left out."""
    seed: int = 0
    """Of the noise; an image's noise follows from it and the image alone."""
    samples: int = 1
    """Restorations that are drawn of each face; above 1 they give its uncertainty, and the first is taken."""
    photos: Annotated[PhotoOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=lambda: PhotoOptions("none"))
    detector: str | None = None
    """The face detector's file; $LDBFR_FACE_DETECTOR, the cache or a download when left out."""
    layout: OutputLayout = "files"
    """One file per result in the inputs' folders, or tar or parquet shards of --shard-images results each."""
    format: OutputFormat = "same"
    """Format of the results; "same" is the input's, PNG for BMP and TIFF."""
    quality: int = 95
    """1 to 100, of JPEG and WebP."""
    keep_metadata: bool = True
    """Keep EXIF data (GPS too) and the colour profile of the inputs in the results."""
    first_stage: bool = False
    """Keep the first stage's images too, below _first-stage/."""
    side_by_side: bool = False
    """Keep a picture of input and result side by side too, below _side-by-side/."""
    column: str | None = None
    """Of parquet files: the one with the images' bytes or URIs; found when left out."""
    shard_images: int | None = None
    """Images between two records of what is done, and in a shard; 128, fewer of large faces, 16 photos, when left
    out."""
    on_change: Literal["keep", "restore", "fail"] = "keep"
    """Of a finished input, when the command is given again: "keep" does not read it; "restore" and "fail" read every
    input again, and restore it, or let it fail, if its bytes are others than before."""
    max_failures: float = 0.5
    """The share of the inputs that may fail; above it the job stops, with exit code 1. 1 lets all of them fail."""
    batch_size: int = 16
    """Images that a worker restores at a time; halved by itself where the memory does not suffice."""
    workers: str | None = None
    """Copies of the model: a number, or MIN:MAX to follow the load; they divide the cores. When left out: one for each
    GPU, or on this machine's CPUs one for each core as far as the memory goes, or one on a cluster of CPUs."""
    gpus_per_worker: float | None = None
    """Part of a GPU that a worker takes, e.g. 0.25; all GPUs divided by the workers when left out."""
    device: str | None = None
    """"cpu" or "cuda"; GPUs where the cluster has any."""


def main(arguments: list[str] | None = None) -> int:
    """Run the job; its exit code."""
    start_log()
    request = tyro.cli(Restore, args=arguments, prog="restore.py")
    command = "python jobs/restore.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    started = False
    try:
        workers = check(request)
        weights = Weights.find(request.weights)
        run = Run(absolute(request.output), run_settings(request, weights))
        check_places(run.settings.inputs, run.output)
        finder = face_finder(request, run, weights)
        with Lease.acquire(lock_uri(run.output), f"`{command}`") as lease:
            run.begin(weights, command)
            log.info("restoring %s into %s with %s", ", ".join(run.settings.inputs), run.output, weights.reference)
            started = True
            with ExitStack() as stack:
                return restore(request, run, weights, Cluster(stack, workers), finder, lease.check)
    except LDBFRError as error:
        print(f"restore: {error}", file=sys.stderr)
        return EXIT_INCOMPLETE if started and not isinstance(error, ConfigError | InputError) else EXIT_BAD_REQUEST
    except KeyboardInterrupt:
        print("restore: stopped; what is written is whole, the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED


def check(request: Restore) -> tuple[int, int] | None:
    """Refuse what cannot work before anything is listed or started; the least (0 for all) and the most workers."""
    check_range("--batch-size", request.batch_size, 1, 4096, "16 suits a CPU")
    if not 0 <= request.max_failures <= 1:
        raise ConfigError(f"--max-failures {request.max_failures}: expected a share from 0 to 1; 0.5 is the default")
    if request.device is not None and request.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {request.device}: expected cpu or cuda; Ray decides which GPU")
    if request.gpus_per_worker is not None and not 0 < request.gpus_per_worker <= 1:
        raise ConfigError(
            f"--gpus-per-worker {request.gpus_per_worker}: expected above 0, up to 1; 0.5 puts two on one"
        )
    if not request.input:
        raise ConfigError("--input: nothing given, expected folders, archives or lists; name at least one")
    return parse_workers(request.workers) if request.workers is not None else None


def parse_workers(text: str) -> tuple[int, int]:
    """ "4" -> (0, 4), "1:4" -> (1, 4).

    Raises:
        ConfigError: it is neither.
    """
    least, colon, most = text.partition(":")
    try:
        low, high = (int(least), int(most)) if colon else (0, int(least))
    except ValueError as error:
        raise ConfigError(f"--workers {text}: expected a number or MIN:MAX, such as 4 or 1:4") from error
    check_range("--workers", high, 1, 10_000, "one per GPU, or one in all on CPUs")
    if colon:
        check_range("--workers MIN", low, 1, high, "such as 1:4")
    return low, high


def run_settings(request: Restore, weights: Weights) -> RunSettings:
    """What makes the run itself."""
    restore = RestoreSettings.resolve(
        weights.preset,
        steps=request.steps,
        start_step=request.start_step,
        scheduler=request.scheduler,
        condition_scale=request.condition_scale,
        color_correction=request.color_correction,
        seed=request.seed,
        format=request.format,
        quality=request.quality,
        first_stage=request.first_stage,
        side_by_side=request.side_by_side,
        keep_metadata=request.keep_metadata,
        num_samples=request.samples,
        photos=request.photos.settings(),
    )
    most = max(1, MOST_UNIT_BYTES // (3 * restore.side**2))
    photos = restore.photos is not None
    shard_images = images_in_a_unit(restore.side, photos) if request.shard_images is None else request.shard_images
    check_range("--shard-images", shard_images, 1, min(most, 100_000), "a unit's faces travel together")
    return RunSettings(
        inputs=tuple(sorted({absolute(uri) for uri in request.input})),
        column=request.column,
        weights=weights.digest,
        layout=request.layout,
        shard_images=shard_images,
        batch_size=request.batch_size,
        restore=restore,
    )


@dataclass
class Cluster:
    """Ray, started once there is work for it.

    Args:
        stack: ends it.
        workers: the least, 0 for all of them always, and the most; None to see what there is.
    """

    stack: ExitStack
    workers: tuple[int, int] | None
    own: bool | None = None

    def start(self) -> bool:
        """Whether the cluster is our own."""
        if self.own is None:
            log.info("starting Ray")
            prepare_environment()
            from jobs import restore_flow  # importing Ray takes seconds, which a mistyped option should not cost

            self.own = self.stack.enter_context(restore_flow.cluster(self.workers[1] if self.workers else num_cores()))
        return self.own

    def lister(self, step: Callable[[Item], Iterator[Result]], items: Sequence[Item]) -> Iterator[Result]:
        """Lists archives, as `ldbfr.runner.Runner`."""
        if len(items) <= ARCHIVES_LISTED_HERE:
            yield from run_here(step, items)
            return
        own = self.start()
        from jobs import flow

        log.info("listing %s archives", f"{len(items):,}")
        yield from flow.RayRunner(num_cores() if own else flow.num_cpus())(step, items)


def face_finder(request: Restore, run: Run, weights: Weights) -> FaceFinder | None:
    """Finds the faces of photos, in any process; None where every image is one aligned face.

    Raises:
        WeightsError: the detector's file cannot be found, or dlib is missing where identities are asked for.
    """
    photos = run.settings.restore.photos
    if photos is None:
        return None
    from ldbfr.photos.finding import FaceFinder, make_detector

    return FaceFinder(make_detector(photos, request.detector), photos, weights.preset.template, weights.preset.side)


def restore(
    request: Restore,
    run: Run,
    weights: Weights,
    cluster: Cluster,
    finder: FaceFinder | None,
    check: Callable[[], None],
) -> int:
    """List what is not listed, restore what is left, and report."""
    settings = run.settings
    if not is_planned(run.output):
        log.info("listing the inputs")
    sources = Sources(settings.inputs, run.output, settings.column, settings.shard_images)
    try:
        plan = Plan(tuple(make_plan(sources, cluster.lister)))
    except InputError:
        run.forget()  # a mistyped place should not spoil the output
        raise
    if request.on_change != "keep":
        count = do_again(run.output, request.on_change)
        log.info("%s inputs will be read again", f"{count:,}" if count else "the rest of the finished")
    ledger = Ledger.read(run.output, plan, check)
    failed = sum(part.failed for part in plan.parts)
    skipped = sum(part.skipped for part in plan.parts)
    log.info("%s inputs planned%s", f"{plan.num_rows:,}", listed_otherwise(failed, skipped))
    if ledger.done.total:
        log.info("%s of them are done already", f"{ledger.done.total:,}")
    tally = Tally(plan.num_rows)
    follow(tally, ledger)
    progress = Progress(tally, tell=lambda line: write_status(run.output, line))
    rounds = Rounds(ledger, lambda _: iter(()), request.max_failures)
    if ledger.left():
        work_off(request, run, weights, cluster, finder, rounds, progress)
    return finish(run, ledger, rounds, progress)


def listed_otherwise(failed: int, skipped: int) -> str:
    """What the listing alone settled, for the log."""
    parts = [f"{skipped:,} of them no images"] if skipped else []
    parts += [f"{failed:,} that cannot be read"] if failed else []
    return f" ({', '.join(parts)})" if parts else ""


def follow(tally: Tally, ledger: Ledger) -> None:
    """Bring a tally up to the ledger."""
    tally.restored, tally.failed, tally.skipped = ledger.done


def work_off(
    request: Restore,
    run: Run,
    weights: Weights,
    cluster: Cluster,
    finder: FaceFinder | None,
    rounds: Rounds,
    progress: Progress,
) -> None:
    """Restore what is left."""
    own = cluster.start()
    from jobs import flow, restore_flow
    from jobs.metrics import RunMetrics

    settings = run.settings
    suitable = restore_flow.suitable_workers(request.device, own, weights, rounds.ledger.plan)
    least, most = cluster.workers or (0, suitable)
    workers = flow.place_workers(most, request.device, settings.batch_size, own, least, request.gpus_per_worker)
    log.info("loading %s (%d px) into %s", request.weights, settings.restore.side, workers)
    metrics = RunMetrics(run.output, progress)

    def after(unit: UnitDone) -> None:
        follow(progress.tally, rounds.ledger)
        for row in unit.rows:
            if row.status == "failed":
                progress.tally.note(f"{row.input}: {row.reason}")
        metrics.update(rounds.ledger.done)
        progress.update()

    rounds.execute = restore_flow.RayExecution(run.output, settings, weights.reference, workers, finder)
    rounds.progress = after
    try:
        rounds()
    except TooManyFailuresError:
        print("\n".join([*progress.tally.describe_failures(), report(run.output)]), file=sys.stderr)
        raise


def finish(run: Run, ledger: Ledger, rounds: Rounds, progress: Progress) -> int:
    """Say what came of it, and where to look.

    Raises:
        StorageError: inputs are unaccounted for.
        TooManyFailuresError: more failed than may.
    """
    done, planned = ledger.done, ledger.plan.num_rows
    if done.total != planned:
        raise StorageError(
            f"{planned:,} inputs were planned, but {done.total:,} have a row in {manifest_folder(run.output)}; run the "
            "same command again"
        )
    places = [manifest_folder(run.output)]
    try:
        places.append(report(run.output))
    except StorageError as error:
        log.warning("no report: %s", error)
    follow(progress.tally, ledger)
    write_status(run.output, progress.line())
    print("\n".join([*progress.tally.describe_failures(), *places, progress.summary()]))
    rounds.judge(at_the_end=True)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
