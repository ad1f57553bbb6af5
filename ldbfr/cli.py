"""The command line: `ldbfr train`, `ldbfr export`, `ldbfr presets`."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldbfr.config import load_preset, preset_names
from ldbfr.errors import LDBFRError

log = logging.getLogger(__name__)

StageChoice = Literal["all", "hq_vqgan", "latent_vqgan", "dc_vqr", "prior", "enhancer"]


@dataclass(frozen=True)
class Train:
    """Train one stage, or all five in turn, on one machine.

    Running the same command again continues where the newest checkpoint stands; what is finished is passed by.
    Ctrl-C saves a checkpoint and ends; a second Ctrl-C ends at once.

        ldbfr train --preset faces_64 --data faces/ --run runs/first
        ldbfr train --stage dc_vqr --preset faces_64 --data faces/ --run runs/first --set training.dc_vqr.steps=500
    """

    data: tuple[Path, ...]
    """Folders, tar or zip files with aligned faces."""
    run: Path
    """Folder of the run: checkpoints, logs, pictures."""
    preset: str = "faces_64"
    """Name of a preset (see `ldbfr presets`), or a .toml file."""
    stage: StageChoice = "all"
    """Which stage; "all" runs the five in order."""
    preview_data: tuple[Path, ...] = ()
    """Faces shown in the log's picture grids; the training data when left out."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """Override a setting, e.g. --set training.dc_vqr.steps=500; may be given several times."""
    init: Path | None = None
    """Folder of a network that the stage starts from, e.g. the `ema` folder of another run's checkpoint."""
    device: str | None = None
    """"cpu", "cuda" or "mps"; the GPU when there is one."""
    threads: int | None = None
    """CPU threads for torch; all cores when left out."""

    def __call__(self) -> int:
        """Train; exit code 0 when finished, 130 when stopped before."""
        preset = load_preset(self.preset, self.set)  # a mistyped setting should not wait for torch

        import torch

        from ldbfr.data.index import FaceImages
        from ldbfr.training.run import train_run
        from ldbfr.training.runtime import SingleProcess
        from ldbfr.training.stages import STAGE_NAMES

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        images = FaceImages.load(self.data, preset.side)
        preview = FaceImages.load(self.preview_data, preset.side) if self.preview_data else images
        log.info("%d images of %d px from %s", len(images), preset.side, ", ".join(map(str, self.data)))
        stages = STAGE_NAMES if self.stage == "all" else (self.stage,)
        finished = train_run(preset, stages, images, preview, self.run, SingleProcess(self.device), self.init)
        return 0 if finished else 130


@dataclass(frozen=True)
class Export:
    """Put the networks of a finished run together into weights that `LDBFRPipeline.from_pretrained` loads.

    ldbfr export --run runs/first --output weights/first
    """

    run: Path
    """Folder of the run, see `ldbfr train`."""
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
class Presets:
    """Print the presets, or every setting of one as JSON."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Which one; the list of names when left out."""

    def __call__(self) -> int:
        """Print."""
        print("\n".join(preset_names()) if self.name is None else load_preset(self.name).model_dump_json(indent=2))
        return 0


def main() -> None:
    """Entry point of the `ldbfr` command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    command = tyro.cli(Train | Export | Presets, prog="ldbfr", description="Blind face restoration with LD-BFR.")
    try:
        sys.exit(command())
    except LDBFRError as error:
        sys.exit(f"ldbfr: {error}")


if __name__ == "__main__":
    main()
