"""Prepare data for training with Ray Data; `python jobs/prepare.py --help` shows how."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro

from jobs.connection import connected, num_cores, prepare_environment, start_log
from ldbfr.config import check_range
from ldbfr.errors import ConfigError, InputError, LDBFRError
from ldbfr.places import absolute
from ldbfr.preparation.plan import Plan
from ldbfr.preparation.run import REPORT_FILE, Preparation, Summary
from ldbfr.preparation.sheet import SHEET_FILE
from ldbfr.preparation.units import NearDuplicates, PrepareSettings, UnitDone
from ldbfr.progress import Progress, Tally, duration
from ldbfr.storage import join

if TYPE_CHECKING:
    from ldbfr.data.latents import LatentPart
    from ldbfr.preparation.latents import LatentRequest

log = logging.getLogger("prepare")

EXIT_OK, EXIT_INCOMPLETE, EXIT_BAD_REQUEST, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Shards:
    """Turn images into a data set for training: folders at any depth, tar, tar.gz, zip and parquet files, mixed.

    Every image is decoded, cropped to its central square, resized to the side, and put into a shard as PNG. What is
    broken or too small is left out, and the report says why. Archives are read where they are, in pieces; nothing is
    unpacked. A parquet file has a column with the images' bytes, or with their paths or URIs.

    An image's split follows from its name and the seed alone, so it stays when others come or go. The same command
    goes on where it was stopped, and does nothing once it is finished; the result is the same whatever the number of
    workers. Inputs are listed once, at the start.

    Below the output: dataset.json (written last), index/, shards/, report.parquet (a row for every input) and
    contact-sheet.png (some that were kept, some that were not). Exit code 0: all done. 1: it broke off, or an archive
    is damaged. 2: nothing was started, or no image can be used.

    For example:

        python jobs/prepare.py shards --input ffhq/ --output faces512/

        python jobs/prepare.py shards --input ffhq.zip celeba/ s3://bucket/more --output s3://bucket/faces512 \\
            --min-side 400 --near-duplicates drop

        ray job submit --working-dir . -- python jobs/prepare.py shards --input s3://bucket/raw \\
            --output s3://bucket/faces512
    """

    input: tuple[str, ...]
    """Folders, archives and single images, local or s3://…; workers on other machines must see them too."""
    output: str
    """Folder, or s3://bucket/prefix, of the data set."""
    side: int = 512
    """S, side of the faces in px: that of the preset to train."""
    min_side: int | None = None
    """Smallest shorter side of an image, in px; the side when left out, so that nothing is enlarged."""
    val_share: float = 0.01
    """Share of the images that are for validation."""
    near_duplicates: NearDuplicates = "keep"
    """"drop" keeps the first by key of images that look alike. All images are read twice then."""
    column: str | None = None
    """Column of parquet files, where it cannot be guessed."""
    allow_damaged: bool = False
    """Use what can be read of damaged archives, instead of stopping before the work starts."""
    seed: int = 0
    """Of the split, and of what the contact sheet shows."""
    shard_images: int = 256
    """Images of a shard, at most. This many are done again if a worker is lost."""
    workers: int | None = None
    """Processes, one CPU each; as many as there are CPUs when left out."""

    def settings(self) -> PrepareSettings:
        """The settings, checked.

        Raises:
            ConfigError: naming the option, its value and the range.
        """
        check_range("--side", self.side, 8, 8192, "512 is the paper's")
        min_side = self.side if self.min_side is None else self.min_side
        check_range("--min-side", min_side, 1, 100_000, "smaller than --side lets images be enlarged")
        check_range("--shard-images", self.shard_images, 1, 100_000, "256 of 512 px make 90 MB")
        check_range("--seed", self.seed, -(2**63), 2**63 - 1, "0 is the default")
        if not 0 <= self.val_share < 1:
            raise ConfigError(f"--val-share {self.val_share}: expected 0 to below 1; 0.01 is one in a hundred")
        if not self.input:
            raise ConfigError("--input: nothing given, expected folders or archives; name at least one")
        return PrepareSettings(
            inputs=tuple(sorted(absolute(uri) for uri in self.input)),
            side=self.side,
            min_side=min_side,
            val_share=self.val_share,
            near_duplicates=self.near_duplicates,
            seed=self.seed,
            shard_images=self.shard_images,
            column=self.column,
        )


@dataclass(frozen=True)
class Latents:
    """Encode every face of a data set, and its mirror image, with a trained latent VQGAN, for the diffusion stages.

    Training then reads latents instead of encoding faces at every step; it uses them where data and VQGAN are the same.
    The same command goes on where it was stopped, and does nothing once it is finished. Exit codes as of `shards`.

    For example:

        python jobs/prepare.py latents --data faces512/ --vqgan runs/paper

        python jobs/prepare.py latents --data s3://bucket/faces512 --vqgan s3://bucket/runs/paper --precision fp16
    """

    data: str
    """Data set that `shards` made: its --output."""
    vqgan: str
    """The --run of a training whose stage latent_vqgan is finished."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """On disk; fp16 halves the space. Encoding is always in fp32."""
    workers: int | None = None
    """Copies of the VQGAN, one GPU or one CPU each; as many as there are when left out."""
    device: Literal["cpu", "cuda"] | None = None
    """GPUs where the cluster has any, when left out."""


Command = (
    Annotated[Shards, tyro.conf.subcommand("shards", prefix_name=False)]
    | Annotated[Latents, tyro.conf.subcommand("latents", prefix_name=False)]
)


DESCRIPTION = """Prepare data for training: images to shards with an index, and the frozen latents of the shards.

`prepare.py shards --help` and `prepare.py latents --help` say more."""


def main(arguments: list[str] | None = None) -> int:
    """Run the job; its exit code."""
    start_log()
    request: Shards | Latents = tyro.cli(Command, args=arguments, prog="prepare.py", description=DESCRIPTION)
    started = False
    try:
        if isinstance(request, Latents):
            requests = check_latents(request)
            started = True
            return encode(request, requests)
        preparation = Preparation(absolute(request.output), request.settings())
        check_workers(request.workers)
        finished = preparation.begin()
        started = True
        return already(preparation.output, finished) if finished else prepare(request, preparation)
    except LDBFRError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return EXIT_INCOMPLETE if started and not isinstance(error, ConfigError | InputError) else EXIT_BAD_REQUEST
    except KeyboardInterrupt:
        print("prepare: stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED


def check_workers(workers: int | None) -> None:
    """ConfigError unless there can be so many."""
    if workers is not None:
        check_range("--workers", workers, 1, 10_000, "leave it out for all CPUs")


# ---- shards ----


def prepare(request: Shards, preparation: Preparation) -> int:
    """Everything that is left of a preparation."""
    log.info("preparing %s as faces of %d px in %s", ", ".join(request.input), request.side, preparation.output)
    plan = preparation.plan()
    prepare_environment()
    with connected((request.workers or num_cores()) + 1) as own:
        from jobs import flow  # importing Ray takes seconds, which a mistyped option should not cost

        workers = request.workers or (num_cores() if own else flow.num_cpus())
        run = flow.RayRunner(workers)
        if plan.missing:
            log.info("listing %s archives", f"{len(plan.missing):,}")
        preparation.list_archives(plan, run, request.allow_damaged)
        if plan.damaged and not request.allow_damaged:
            preparation.discard(plan)
            return refuse_damaged(plan)
        log.info("%s images in %s units, %d workers", f"{plan.num_inputs:,}", f"{plan.num_units:,}", workers)
        if request.near_duplicates == "drop":
            watch("looked at", preparation.scan(plan, run), plan, preparation, scan=True)
            log.info("looking for near-duplicates")
        watch("done", preparation.write(plan, run), plan, preparation)
    log.info("describing what was written")
    return report(preparation.output, preparation.finish(plan))


def watch(what: str, results: Iterable[UnitDone], plan: Plan, preparation: Preparation, scan: bool = False) -> None:
    """Follow the units of a step, with a line every few seconds."""
    inputs_left = preparation.inputs_left(plan, scan)
    tally = Tally(plan.num_inputs, restored=plan.num_inputs - inputs_left)
    progress = Progress(tally)
    for done in results:
        tally.restored += done.inputs
        progress.update()
    rate = f", {progress.rate():.1f} images/s" if progress.rate() else ""
    seconds = duration(progress.clock() - progress.started)
    log.info("%s images %s in %s%s", f"{inputs_left:,}", what, seconds, rate)


def refuse_damaged(plan: Plan) -> int:
    """Say which archives cannot be listed."""
    lines = [f"prepare: {len(plan.damaged):,} of the archives are damaged:", *plan.damaged]
    lines.append("Replace them or take them out, or use what can be read of them with --allow-damaged")
    print("\n  ".join(lines), file=sys.stderr)
    return EXIT_INCOMPLETE


def report(output: str, summary: Summary) -> int:
    """Say what came of it, and where to look."""
    for split, count in summary.kept.items():
        if not count:
            log.warning("no image is in the split %s; training wants some, so choose another --val-share", split)
    print("\n".join([join(output, REPORT_FILE), join(output, SHEET_FILE), *summary.lines(), f"{output} is finished"]))
    return EXIT_OK


def already(output: str, summary: Summary) -> int:
    """Say that there is nothing to do."""
    print("\n".join([f"{output} is finished; nothing to do", *summary.lines()]))
    return EXIT_OK


# ---- latents ----


def check_latents(request: Latents) -> list[LatentRequest]:
    """What has to be encoded; refuses what cannot work before Ray starts."""
    check_workers(request.workers)
    from ldbfr.preparation.latents import latent_requests  # imports torch, as do the next
    from ldbfr.training.export import read_run_preset
    from ldbfr.training.run import load_stage_network

    preset = read_run_preset(request.vqgan)
    digest = load_stage_network(request.vqgan, "latent_vqgan", preset)[1]
    dtype: Literal["float32", "float16"] = "float32" if request.precision == "fp32" else "float16"
    return latent_requests(absolute(request.data), preset.side, digest, dtype)


def encode(request: Latents, requests: list[LatentRequest]) -> int:
    """Encode what is left of the splits."""
    from ldbfr.preparation.latents import finish_latents

    log.info("encoding the faces of %s with the latent VQGAN of %s", request.data, request.vqgan)
    left = [split for split in requests if not split.is_finished()]
    if not left:
        print(f"the latents of {request.data} are finished; nothing to do")
        return EXIT_OK
    prepare_environment()
    with connected((request.workers or num_cores()) + 1) as own:
        from jobs import prepare_flow

        workers = prepare_flow.place_encoders(request.workers, request.device, own)
        log.info("encoding with %s", workers)
        parts: dict[LatentRequest, list[LatentPart]] = {split: [] for split in left}
        progress = Progress(Tally(sum(split.count for split in left)))
        for split, part in prepare_flow.encode_splits(left, absolute(request.vqgan), workers):
            parts[split].append(part)
            progress.tally.restored += part.count
            progress.update()
    for split in left:
        finish_latents(split, parts[split])
        print(f"{split.split}: {split.count:,} faces, each with its mirror image, in {split.writer().folder}")
    print(f"the latents of {request.data} are finished")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
