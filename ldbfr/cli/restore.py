"""`ldbfr restore`: photos of this machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldbfr.config import DEFAULT_WEIGHTS, SchedulerName, check_range
from ldbfr.errors import ConfigError
from ldbfr.photos.options import PhotoOptions, parse_boxes

log = logging.getLogger(__name__)


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
