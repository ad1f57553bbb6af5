"""The command line: `ldbfr restore|train|export|convert|presets|archive|doctor`."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldbfr.config import DEFAULT_WEIGHTS, SchedulerName, check_range, load_preset, preset_names
from ldbfr.doctor.command import Doctor
from ldbfr.errors import ConfigError, LDBFRError
from ldbfr.photos.options import PhotoOptions, parse_boxes
from ldbfr.places import absolute

log = logging.getLogger(__name__)

StageChoice = Literal["all", "hq_vqgan", "latent_vqgan", "dc_vqr", "prior", "enhancer"]


@dataclass(frozen=True)
class Restore:
    """Restore photos of this machine: find every face, restore it, and put it back.

    One file for a file, or a folder of results for files and folders. What surrounds the faces stays what it was, bit
    for bit in PNG (a JPEG is encoded again); size, mode, EXIF data, colour profile and transparency are kept. With
    --faces none an image is one aligned face. The same command goes on where it was stopped. Archives and buckets:
    `jobs/restore.py --faces all`. With --server an endpoint does the work, and this machine needs neither weights nor
    GPU; its key, if it asks for one, is taken from the environment variable LDBFR_API_KEY.

        ldbfr restore photo.jpg -o better.jpg
        ldbfr restore album/ scans/ -o restored/ --side-by-side
        ldbfr restore group.png -o group-2x.png --scale 2 --faces largest --samples 4
        ldbfr restore old.jpg -o new.jpg --box 120,80,64,64 --box 300,90,70,70
        ldbfr restore album/ -o restored/ --server https://faces.example.org

    Exit code 0: all are restored. 1: not all, and the text says why. 130: stopped by Ctrl-C.
    """

    input: tyro.conf.Positional[tuple[Path, ...]]
    """Photos, and folders of them of any depth: PNG, JPEG, WebP, BMP, TIFF."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """For a single photo the name of an image, or else a folder."""
    weights: str = DEFAULT_WEIGHTS
    """Name of weights that come with ldbfr, or a folder of `ldbfr export`."""
    photos: Annotated[PhotoOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=PhotoOptions)
    box: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """LEFT,TOP,WIDTH,HEIGHT of a face in px of the upright photo; may be given several times: just these faces."""
    detector: Path | None = None
    """The face detector's file; $LDBFR_FACE_DETECTOR, the cache or a download when left out."""
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
    """Of the noise; a face's noise follows from it and the face alone."""
    samples: int = 1
    """Restorations that are drawn of each face; above 1 they give its uncertainty, and the first is taken."""
    format: Literal["same", "png", "jpeg", "webp"] = "same"
    """Format of the results; "same" is the input's, PNG for BMP and TIFF."""
    quality: int = 95
    """1 to 100, of JPEG and WebP."""
    keep_metadata: bool = True
    """Keep EXIF data (GPS too) and the colour profile of the inputs in the results."""
    side_by_side: bool = False
    """Write a picture of input and result side by side too."""
    details: Path | None = None
    """A file that gets a line of JSON for every photo: each face's place, score, sharpness, identity and more."""
    overwrite: bool = False
    """Replace results that are of other settings or of something else."""
    batch_size: int = 16
    """Faces that are restored at a time, of one photo or several."""
    device: str | None = None
    """"cpu", "cuda" or "mps"; the GPU when there is one."""
    threads: int | None = None
    """CPU threads for torch; all cores when left out."""
    server: str | None = None
    """Address of an endpoint that restores instead of this machine, such as http://127.0.0.1:8000."""
    workers: int | None = None
    """Files at a time, with --server; 4 when left out."""

    def __call__(self) -> int:
        """Restore; exit code 0 if nothing failed."""
        photos = self.photos.settings(parse_boxes(self.box, self.photos.faces))
        if self.server is not None:
            return self.by_server(self.server)
        if self.workers is not None:
            raise ConfigError(
                f"--workers {self.workers} without --server: this machine takes --batch-size faces at a time"
            )

        from ldbfr.archive.files import FileRestorer, details_file, plan_files
        from ldbfr.archive.settings import RestoreSettings, Weights
        from ldbfr.photos.finding import make_detector

        jobs = plan_files(self.input, self.output, self.format, self.side_by_side)
        settings = RestoreSettings.resolve(
            Weights.find(self.weights).preset,
            steps=self.steps,
            start_step=self.start_step,
            scheduler=self.scheduler,
            condition_scale=self.condition_scale,
            color_correction=self.color_correction,
            seed=self.seed,
            format=self.format,
            quality=self.quality,
            keep_metadata=self.keep_metadata,
            num_samples=self.samples,
            photos=photos,
        )
        check_range("--batch-size", self.batch_size, 1, 4096, "16 suits a CPU")
        detector = None if photos is None else make_detector(photos, self.detector)

        log.info("%d images; loading %s", len(jobs), self.weights)

        import torch  # only now, because it takes seconds, which a mistyped option should not cost

        from ldbfr.photos.restorer import PhotoRestorer
        from ldbfr.pipeline import LDBFRPipeline

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        pipeline: LDBFRPipeline = LDBFRPipeline.from_pretrained(self.weights, device=device)
        restorer = None
        if photos is not None:
            options = settings.pipeline_options()
            restorer = PhotoRestorer(pipeline, photos, detector=detector, batch_size=self.batch_size, **options)
        with details_file(self.details) as details:
            work = FileRestorer(pipeline, settings, restorer, self.batch_size, self.overwrite, details)
            tally = work(jobs)
        print("\n".join(work.summary()))
        return 1 if tally.failed else 0

    def by_server(self, server: str) -> int:
        """Restore by an endpoint; exit code 0 if nothing failed.

        Raises:
            ConfigError: an endpoint cannot do what is asked for.
        """
        from ldbfr.archive.files import details_file, plan_files
        from ldbfr.archive.files_served import ServedFiles, check_options
        from ldbfr.client import Options

        usual = {**vars(PhotoOptions()), **{one.name: one.default for one in fields(self)}}
        check_options({**vars(self.photos), **vars(self)}, usual)
        jobs = plan_files(self.input, self.output, self.format, self.side_by_side)
        options: Options = {
            "mode": "aligned" if self.photos.faces == "none" else "photo",
            "steps": self.steps,
            "seed": self.seed,
            "condition_scale": self.condition_scale,
            "samples": self.samples,
            "quality": self.quality,
            "boxes": parse_boxes(self.box, self.photos.faces),
        }
        if self.photos.faces != "none":
            options["strength"] = self.photos.strength
        workers = 4 if self.workers is None else self.workers
        check_range("--workers", workers, 1, 64, "4 is the default")
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # which tells of every request
        with details_file(self.details) as details:
            work = ServedFiles(server, options, self.format == "same", workers, self.overwrite, details)
            tally = work(jobs)
        print("\n".join(work.summary()))
        return 1 if tally.failed else 0


@dataclass(frozen=True)
class Train:
    """Train one stage, or all five in turn, on one machine; `jobs/train.py` does the same on a cluster.

    Running the same command again continues where the newest checkpoint stands; what is finished is passed by.
    Ctrl-C saves a checkpoint and ends; a second Ctrl-C ends at once. Several GPUs of one machine: run it by
    `torchrun --nproc-per-node 4 -m -- ldbfr.cli train …`.

        ldbfr train --preset faces_64 --data faces/ --run runs/first
        ldbfr train --stage dc_vqr --preset faces_64 --data faces/ --run runs/first --set training.dc_vqr.steps=500
    """

    data: tuple[str, ...]
    """Aligned faces: folders, tar or zip files, or one data set of jobs/prepare.py (a folder or s3://…)."""
    run: str
    """The run: a folder or s3://bucket/prefix for checkpoints, logs, pictures."""
    preset: str = "faces_64"
    """Name of a preset (see `ldbfr presets`), or a .toml file."""
    stage: StageChoice = "all"
    """Which stage; "all" runs the five in order."""
    preview_data: tuple[str, ...] = ()
    """Faces shown in the log's picture grids; the training data when left out."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """Override a setting, e.g. --set training.dc_vqr.steps=500; may be given several times."""
    init: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """STAGE=FOLDER: a network that a stage starts from, of `ldbfr convert` or the `ema` folder of a checkpoint."""
    device: str | None = None
    """"cpu", "cuda" or "mps"; the GPU when there is one."""
    threads: int | None = None
    """CPU threads for torch; all cores when left out."""
    track: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Where numbers and pictures go besides TensorBoard."""
    cache_gb: float = 50
    """Disk for data that comes from a bucket, in GB."""

    def __call__(self) -> int:
        """Train; exit code 0 when finished, 130 when stopped before."""
        preset = load_preset(self.preset, self.set)  # a mistyped setting should not wait for torch

        import torch

        from ldbfr.data.shards import open_faces
        from ldbfr.lease import Lease
        from ldbfr.training.run import check_request, check_starts, parse_init, train_run
        from ldbfr.training.runtime import single_or_torchrun
        from ldbfr.training.stages import STAGE_NAMES

        stages = STAGE_NAMES if self.stage == "all" else (self.stage,)
        init = parse_init(self.init)
        check_request(preset, stages, init)
        check_starts(preset, stages, self.run, init)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        cache_bytes = int(self.cache_gb * 1e9)
        images = open_faces(self.data, preset.side, "train", cache_bytes)
        preview = open_faces(self.preview_data, preset.side, "val", cache_bytes) if self.preview_data else images
        log.info("%d images of %d px from %s", len(images), preset.side, ", ".join(self.data))
        runtime = single_or_torchrun(self.device)
        with ExitStack() as stack:
            if runtime.rank == 0:
                holder = f"`ldbfr {' '.join(sys.argv[1:])}`"
                lease = stack.enter_context(Lease.acquire(f"{self.run.rstrip('/')}/_lease", holder))
                runtime.check = lease.check
            finished = train_run(preset, stages, images, preview, self.run, runtime, init, self.track)
        return 0 if finished else 130


@dataclass(frozen=True)
class Export:
    """Put the networks of a finished run together into weights that `LDBFRPipeline.from_pretrained` loads.

    ldbfr export --run runs/first --output weights/first
    """

    run: str
    """Folder of the run or s3://bucket/prefix, see `ldbfr train`."""
    output: Path
    """New folder for the weights."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision on disk."""
    start_step: int | None = None
    """Default start step of the sampling; the preset's when left out."""
    steps: int | None = None
    """Default number of denoising steps; the preset's when left out."""
    color_correction: bool | None = None
    """Whether low frequencies are the first stage's by default; the preset's when left out."""

    def __call__(self) -> int:
        """Write the weights."""
        import torch

        from ldbfr.config import SamplingSettings
        from ldbfr.training.export import export, read_run_preset

        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]
        given = {
            "num_inference_steps": self.steps,
            "start_step": self.start_step,
            "color_correction": self.color_correction,
        }
        own = read_run_preset(self.run).sampling.model_dump()
        own |= {key: value for key, value in given.items() if value is not None}
        sampling = SamplingSettings.model_validate(own)
        pipeline = export(self.run, self.output, dtype, sampling)
        size = sum(path.stat().st_size for path in self.output.rglob("*") if path.is_file())
        print(f"{self.output}: {size / 1e6:.1f} MB, digest {pipeline.weights_digest}")
        return 0


@dataclass(frozen=True)
class Convert:
    """Bring a published network into ldbfr's layout, so that a training stage can start from it.

    Takes latent-diffusion's `vq-f4`, `celebahq-ldm-vq-4` and `ffhq-ldm-vq-4`, taming-transformers' faces VQGAN, and
    folders like CompVis/ldm-celebahq-256 on the hub. Nothing in a checkpoint is run.

        ldbfr convert models/ldm/celeba256/model.ckpt --output weights/ldm
        ldbfr convert logs/faceshq_vqgan/checkpoints/last.ckpt --output weights/ldm
    """

    source: Annotated[Path, tyro.conf.Positional]
    """A .ckpt, .pt, .pth, .bin or .safetensors file, or a folder with vqvae/ and unet/."""
    output: Path
    """Where OUTPUT/<stage> is written: latent_vqgan, prior or hq_vqgan."""
    preset: str = "paper_512"
    """Name of the preset whose shapes the networks have (see `ldbfr presets`), or a .toml file."""
    kind: Literal["vq-f4", "ldm-vq-4", "taming-faces", "diffusers"] | None = None
    """Which publication it is; found out from the source when left out."""
    weights: Literal["ema", "raw"] | None = None
    """Averaged or last weights; the averaged when left out, where there are any."""
    scaling_factor: float | None = None
    """Factor on the latents; the source's when left out, or 1, which is LDM's."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """Override a setting, e.g. --set diffusion.beta_end=0.012; may be given several times."""

    def __call__(self) -> int:
        """Convert, and say how to go on."""
        preset = load_preset(self.preset, self.set)

        from ldbfr.models.convert import convert

        for made in convert(self.source, self.output, preset, self.kind, self.weights, self.scaling_factor):
            print(f"{made.folder}: {made.num_parameters / 1e6:.2f} M parameters ({made.weights} weights)")
            print(f"    to start from it: ldbfr train --init {made.stage}={made.folder}")
        return 0


@dataclass(frozen=True)
class Presets:
    """Print the presets, or every setting of one as JSON."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Which one; the list of names when left out."""

    def __call__(self) -> int:
        """Print."""
        print("\n".join(preset_names()) if self.name is None else load_preset(self.name).model_dump_json(indent=2))
        return 0


@dataclass(frozen=True)
class ArchiveStatus:
    """Tell how far a run of jobs/restore.py is, and who is at work on it."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's --output: a folder or s3://bucket/prefix."""

    def __call__(self) -> int:
        """Print."""
        from ldbfr.archive.commands import status

        print(status(absolute(self.run)))
        return 0


@dataclass(frozen=True)
class ArchiveReport:
    """Write report.html from what a run's manifest has by now."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's --output: a folder or s3://bucket/prefix."""

    def __call__(self) -> int:
        """Write it, and say where."""
        from ldbfr.archive.run import report

        print(report(absolute(self.run)))
        return 0


@dataclass(frozen=True)
class ArchiveRetryFailed:
    """Let the same command try the failed inputs of a run again; what was restored stays as it is.

    Until the command has been given, the manifest keeps the failed rows.
    """

    run: Annotated[str, tyro.conf.Positional]
    """The run's --output: a folder or s3://bucket/prefix."""

    def __call__(self) -> int:
        """Mark them, and say what to do."""
        from ldbfr.archive.commands import retry_failed

        print(retry_failed(absolute(self.run)))
        return 0


@dataclass(frozen=True)
class ArchiveCommands:
    """Look at a run of jobs/restore.py, report on it, or let it try again what failed.

    ldbfr archive status s3://bucket/restored
    """

    command: (
        Annotated[ArchiveStatus, tyro.conf.subcommand("status", prefix_name=False)]
        | Annotated[ArchiveReport, tyro.conf.subcommand("report", prefix_name=False)]
        | Annotated[ArchiveRetryFailed, tyro.conf.subcommand("retry-failed", prefix_name=False)]
    )

    def __call__(self) -> int:
        """Do what was chosen."""
        return self.command()


def main() -> None:
    """Entry point of the `ldbfr` command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    command = tyro.cli(
        Restore
        | Train
        | Export
        | Convert
        | Presets
        | Annotated[ArchiveCommands, tyro.conf.subcommand("archive")]
        | Doctor,
        prog="ldbfr",
        description="Blind face restoration with LD-BFR.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    try:
        sys.exit(command())
    except LDBFRError as error:
        sys.exit(f"ldbfr: {error}")
    except KeyboardInterrupt:
        print("ldbfr: stopped; what is written is whole, the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
