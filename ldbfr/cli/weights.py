"""`ldbfr export`, `ldbfr convert`, `ldbfr presets`: weights and their settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldbfr.config import load_preset, preset_names


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
