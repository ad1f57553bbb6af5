"""The command line: `ldbfr train`, `ldbfr export`, `ldbfr convert`, `ldbfr presets`, `ldbfr archive`."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldbfr.config import load_preset, preset_names
from ldbfr.errors import LDBFRError
from ldbfr.places import absolute

log = logging.getLogger(__name__)

StageChoice = Literal["all", "hq_vqgan", "latent_vqgan", "dc_vqr", "prior", "enhancer"]


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

    def __call__(self) -> int:
        """Write the weights."""
        import torch

        from ldbfr.config import SamplingSettings
        from ldbfr.training.export import export, read_run_preset

        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]
        own = read_run_preset(self.run).sampling
        sampling = SamplingSettings(
            scheduler=own.scheduler,
            num_inference_steps=own.num_inference_steps if self.steps is None else self.steps,
            start_step=own.start_step if self.start_step is None else self.start_step,
            condition_scale=own.condition_scale,
        )
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
        Train | Export | Convert | Presets | Annotated[ArchiveCommands, tyro.conf.subcommand("archive")],
        prog="ldbfr",
        description="Blind face restoration with LD-BFR.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    try:
        sys.exit(command())
    except LDBFRError as error:
        sys.exit(f"ldbfr: {error}")


if __name__ == "__main__":
    main()
