"""Restore a folder of aligned faces with Ray Data; `python jobs/restore.py --help` shows how."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro

from jobs.connection import prepare_environment
from ldbfr import __version__, storage
from ldbfr.archive.manifest import ManifestWriter
from ldbfr.archive.naming import WORK_FOLDER, OutputFormat
from ldbfr.archive.plan import Plan, make_plan
from ldbfr.archive.settings import RestoreSettings, Weights
from ldbfr.archive.sheet import ContactSheet
from ldbfr.config import SchedulerName, check_range
from ldbfr.errors import ConfigError, LDBFRError, StorageError
from ldbfr.progress import Progress

log = logging.getLogger("restore")

EXIT_OK, EXIT_INCOMPLETE, EXIT_BAD_REQUEST, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Restore:
    """Restore every image of a folder: PNG, JPEG, WebP, BMP and TIFF files at any depth, each one aligned face.

    A picture is cropped to its central square and resized to the model's side; results keep the inputs' folders and
    names. What cannot be read becomes a row of the manifest that says why; it never stops the others.

    Below the output: the restored images, manifest.parquet (one row per input), contact-sheet.png, and _ldbfr/ with the
    plan and the settings. Exit code 0: every input has its row. 1: the run broke off. 2: nothing was started.

    For example:

        python jobs/restore.py --input faces/ --output restored/

        python jobs/restore.py --input faces/ --output restored/ --format jpeg --quality 90 --workers 2

        python jobs/restore.py --input faces/ --output restored/ --start-step 600 --steps 12 --first-stage

        ray job submit --working-dir . -- python jobs/restore.py --input /data/faces --output /data/restored
    """

    input: str
    """Folder with aligned faces, or one file."""
    output: str
    """Folder for the results; made if needed. It may hold an earlier run's: what is done again is replaced."""
    weights: str = "faces_64"
    """Name of weights that come with ldbfr, or a folder of `ldbfr export`."""
    steps: int | None = None
    """Denoising steps; 0 gives the first stage alone. The weights' own when left out."""
    start_step: int | None = None
    """Where the diffusion starts: 1000 from pure noise, below from the first stage. The weights' own when left out."""
    scheduler: SchedulerName | None = None
    """Sampler; the weights' own when left out."""
    condition_scale: float | None = None
    """Factor on the injections; the weights' own when left out."""
    color_correction: bool = False
    """Take low frequencies, thus colours, from the first stage."""
    seed: int = 0
    """Of the noise; an image's noise follows from it and the image alone."""
    format: OutputFormat = "same"
    """Format of the results; "same" is the input's, PNG for BMP and TIFF."""
    quality: int = 95
    """1 to 100, of JPEG and WebP."""
    first_stage: bool = False
    """Keep the first stage's images too, below _first-stage/."""
    batch_size: int = 16
    """Images that a worker restores at a time."""
    workers: int = 1
    """Copies of the model; on CPUs they divide the cores."""
    device: str | None = None
    """"cpu" or "cuda"; GPUs where the cluster has any."""


def main(arguments: list[str] | None = None) -> int:
    """Run the job; its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    request = tyro.cli(Restore, args=arguments, prog="restore.py")
    started = False
    try:
        weights, settings = check(request)
        plan = make_run_plan(request, weights, settings)
        started = True
        return run(request, plan, weights, settings)
    except LDBFRError as error:
        print(f"restore: {error}", file=sys.stderr)
        return EXIT_INCOMPLETE if started else EXIT_BAD_REQUEST
    except KeyboardInterrupt:
        print("restore: stopped; what is written is whole, run the same command to start again", file=sys.stderr)
        return EXIT_INTERRUPTED


def check(request: Restore) -> tuple[Weights, RestoreSettings]:
    """Refuse what cannot work before anything is listed or started."""
    check_range("--batch-size", request.batch_size, 1, 4096, "16 suits a CPU")
    check_range("--workers", request.workers, 1, 10_000, "one per GPU, or one in all on CPUs")
    if request.device is not None and request.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {request.device}: expected cpu or cuda; Ray decides which GPU")
    weights = Weights.find(request.weights)
    settings = RestoreSettings.resolve(
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
    )
    return weights, settings


def make_run_plan(request: Restore, weights: Weights, settings: RestoreSettings) -> Plan:
    """List the input, and write down what the run was asked to do."""
    plan = make_plan(request.input, request.output, format=settings.format, seed=settings.seed)
    about = {
        "software": f"ldbfr {__version__}",
        "input": request.input,
        "weights": weights.digest,
        "preset": weights.preset.name,
        "settings": settings.model_dump(mode="json"),
        "settings_digest": settings.digest(),
        "planned": plan.num_images,
        "skipped": plan.num_skipped,
    }
    text = json.dumps(about, indent=1, ensure_ascii=True)
    storage.write_bytes(storage.join(request.output, WORK_FOLDER, "run.json"), text.encode())
    skipped = f"; skipped: {plan.num_skipped:,} files that are not images" if plan.num_skipped else ""
    log.info("%s images planned from %s%s", f"{plan.num_images:,}", request.input, skipped)
    return plan


def run(request: Restore, plan: Plan, weights: Weights, settings: RestoreSettings) -> int:
    """Restore what is planned, and report."""
    log.info("starting Ray")
    prepare_environment()
    from jobs import flow  # importing Ray takes seconds, which a mistyped option should not cost

    about = {"seed": settings.seed, "weights": weights.digest, "settings": settings.digest()}
    manifest = ManifestWriter(request.output, plan.num_images, about)
    sheet = ContactSheet(plan.picks)
    progress = Progress(manifest.tally)
    with flow.cluster(request.workers) as own:
        workers = flow.place_workers(request.workers, request.device, request.batch_size, own)
        log.info("loading %s (%d px) into %s", request.weights, settings.side, workers)
        for row in flow.restored_rows(plan, request.output, weights, settings, workers):
            manifest.add(row)
            sheet.add(row)
            progress.update()
    places = [manifest.finish()]
    try:
        places += [uri for uri in [sheet.write(request.output)] if uri]
    except StorageError as error:
        log.warning("no contact sheet: %s", error)
    print("\n".join([progress.summary(), *manifest.tally.describe_failures(), *places]))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
