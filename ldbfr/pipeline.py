"""LDBFRPipeline: aligned low-quality faces in, restored faces out (LD-BFR, figure 2).

from ldbfr import LDBFRPipeline

pipeline = LDBFRPipeline.from_pretrained("faces_128")
restored = pipeline(lq).images          # lq: (B, S, S, 3) uint8
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ldbfr.config import Preset, SchedulerName, parse_preset
from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.images import to_float, to_uint8
from ldbfr.models.dc_vqr import DCVQRModel
from ldbfr.models.dqe import DQEUNet2DModel
from ldbfr.models.loading import load_network
from ldbfr.models.vqgan import VQGAN
from ldbfr.schedules import Scheduler, make_sampler, noise_schedule
from ldbfr.seeds import generator
from ldbfr.weights import PRESET_FILE, find_weights, manifest_digest, read_manifest, write_manifest

OutputType = Literal["np", "pt", "pil"]
LQImages = np.ndarray | Tensor | Sequence[Image.Image]
StepCallback = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class LDBFROutput:
    """What a restoration gives, each in the asked output type.

    `images` (B images): the restored faces, the first sample of each.
    `samples` (N lists of B images): all samples; None when one was asked for.
    `uncertainty` (B, S, S) float32 in [0, 1]: standard deviation over the samples, mean of the channels, as a share of
    the full range; None when one sample was asked for.
    `first_stage` (B images): DC-VQR's own images; None unless asked for.
    """

    images: Any
    samples: list[Any] | None = None
    uncertainty: np.ndarray | None = None
    first_stage: Any = None


class LDBFRPipeline(DiffusionPipeline):
    """DC-VQR, the conditioned UNet and the latent VQGAN put together.

    Args:
        dc_vqr: first stage.
        latent_vqgan: latents to images and back.
        unet: conditioned UNet.
        preset: the settings that the networks were made from.
        weights_digest: names the weights in provenance records; empty for networks never saved.
    """

    def __init__(
        self,
        dc_vqr: DCVQRModel,
        latent_vqgan: VQGAN,
        unet: DQEUNet2DModel,
        preset: Preset | None = None,
        weights_digest: str = "",
    ) -> None:
        super().__init__()
        if preset is None:
            raise ConfigError("LDBFRPipeline needs its preset: use from_pretrained, or pass preset=load_preset(...)")
        self.register_modules(dc_vqr=dc_vqr, latent_vqgan=latent_vqgan, unet=unet)
        self.preset = preset
        self.weights_digest = weights_digest
        for network in (dc_vqr, latent_vqgan, unet):
            network.requires_grad_(False).eval()

    @property
    def side(self) -> int:
        """S, the side of the faces that go in and come out, in px."""
        return self.preset.side

    @torch.no_grad()
    def __call__(
        self,
        images: LQImages,
        *,
        num_inference_steps: int | None = None,
        scheduler: SchedulerName | Scheduler | None = None,
        start_step: int | None = None,
        condition_scale: float | None = None,
        seed: int = 0,
        num_samples: int = 1,
        color_correction: bool | None = None,
        return_first_stage: bool = False,
        output_type: OutputType = "np",
        callback_on_step_end: StepCallback | None = None,
    ) -> LDBFROutput:
        """Restore a batch of aligned faces.

        The noise of an image follows from `seed` and that image alone, so that its result does not depend on the rest
        of the batch. What is left at None is the preset's.

        Args:
            images: (B, S, S, 3) uint8, or (B, 3, S, S) float in [-1, 1], or PIL images of S×S px.
            num_inference_steps: denoising steps; 0 leaves the diffusion out and gives the first stage's own images.
            scheduler: the sampler, by name or as a diffusers scheduler.
            start_step: where the diffusion starts; at 1,000 from pure noise, below from the first stage's latents.
            condition_scale: factor on the injections; 0 gives a face that has nothing to do with the input.
            seed: of the noise.
            num_samples: how many restorations to draw of each face, for `samples` and `uncertainty`.
            color_correction: take the low frequencies, thus colours, from the first stage.
            return_first_stage: give the first stage's images too.
            output_type: "np" (B, S, S, 3) uint8, "pt" (B, 3, S, S) float in [-1, 1], "pil" a list.
            callback_on_step_end: called as (step, timestep, latents (B, c, s, s)) after every denoising step.

        Raises:
            InputError: the images have another shape or type.
            ConfigError: a setting is out of range.
        """
        sampling = self.preset.sampling
        steps = sampling.num_inference_steps if num_inference_steps is None else num_inference_steps
        start = sampling.start_step if start_step is None else start_step
        scale = sampling.condition_scale if condition_scale is None else condition_scale
        self.check_settings(steps, start, scale, num_samples)
        if output_type not in get_args(OutputType):
            raise ConfigError(f"output_type {output_type!r} must be one of {', '.join(get_args(OutputType))}")
        lq = self.to_batch(images)
        digests = [image_digest(image) for image in lq]
        lq = lq.to(device=self.device, dtype=self.dtype)
        hq_features = self.dc_vqr(lq).hq_features
        first_stage = self.dc_vqr.decode(hq_features).clamp(-1, 1)
        if steps == 0:
            samples = [first_stage]
        else:
            initial = self.latent_vqgan.to_latents(first_stage) if start < self.num_train_timesteps else None
            sampler = Sampler(self, steps, start, scale, scheduler or sampling.scheduler, callback_on_step_end)
            samples = []
            for index in range(num_samples):
                keys = [(seed, digest, index) for digest in digests]
                latents = sampler.sample(hq_features, initial, keys)
                samples.append(self.latent_vqgan.from_latents(latents).clamp(-1, 1))
        if sampling.color_correction if color_correction is None else color_correction:
            samples = [match_color(sample, first_stage) for sample in samples]
        many = len(samples) > 1
        return LDBFROutput(
            images=convert(samples[0], output_type),
            samples=[convert(sample, output_type) for sample in samples] if many else None,
            uncertainty=uncertainty(samples) if many else None,
            first_stage=convert(first_stage, output_type) if return_first_stage else None,
        )

    @property
    def num_train_timesteps(self) -> int:
        """How many steps the noise schedule has."""
        return self.preset.diffusion.num_train_timesteps

    def check_settings(self, steps: int, start: int, scale: float, num_samples: int) -> None:
        """Refuse settings out of range.

        Raises:
            ConfigError: naming the value and the range.
        """
        limit = self.num_train_timesteps
        if not 1 <= start <= limit:
            raise ConfigError(f"start_step {start} must be between 1 and {limit} ({limit}: from pure noise)")
        if not 0 <= steps <= start:
            raise ConfigError(
                f"num_inference_steps {steps} must be between 0 (first stage alone) and start_step {start}"
            )
        if not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"condition_scale {scale} must be a number of at least 0")
        if num_samples < 1:
            raise ConfigError(f"num_samples {num_samples} must be at least 1")
        if num_samples > 1 and steps == 0:
            raise ConfigError(f"num_samples {num_samples}: the first stage alone (0 steps) has only one; ask for 1")

    def to_batch(self, images: LQImages) -> Tensor:
        """Check the images: -> (B, 3, S, S) float32 in [-1, 1] on the CPU.

        Raises:
            InputError: naming the shape that was given and the one expected.
        """
        if isinstance(images, Tensor):
            batch = tensor_batch(images)
        elif isinstance(images, np.ndarray):
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
                raise InputError(
                    f"images have shape {images.shape} and type {images.dtype}: expected a batch "
                    f"(B, {self.side}, {self.side}, 3) of uint8"
                )
            batch = to_float(images)
        else:
            batch = pil_batch(images)
        if batch.ndim != 4 or tuple(batch.shape[1:]) != (3, self.side, self.side) or not len(batch):
            raise InputError(
                f"images of shape {tuple(batch.shape)}: preset {self.preset.name} takes at least one aligned face of "
                f"{self.side}×{self.side} px, (B, 3, {self.side}, {self.side}); resize them first"
            )
        return batch

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
        preset: str | None = None,
    ) -> Self:
        """Load weights after checking every byte against their manifest.

        Args:
            name_or_path: a folder that `save_pretrained` wrote, or the name of weights that come with ldbfr.
            device: where to.
            torch_dtype: precision of the networks.
            preset: the preset that the caller expects, if any.

        Raises:
            WeightsError: missing, cut short, changed, or of another preset.
        """
        folder = find_weights(name_or_path)
        manifest = read_manifest(folder)
        try:
            own = parse_preset(json.loads((folder / PRESET_FILE).read_text("utf-8")), str(folder / PRESET_FILE))
        except (OSError, ValueError) as error:
            text = f"{folder / PRESET_FILE} cannot be read ({error}): expected a folder that `ldbfr export` wrote"
            raise WeightsError(text) from error
        if preset is not None and own.name != preset:
            raise WeightsError(f"{folder} are weights of preset {own.name}, not of {preset}; give the right folder")
        networks = {
            name: load_network(network_class, folder / name, torch_dtype) for name, network_class in COMPONENTS.items()
        }
        check_shapes(own, networks, folder)
        pipeline = cls(**cast(Any, networks), preset=own, weights_digest=manifest_digest(manifest))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the networks (safetensors), the preset and the manifest; existing weights are not overwritten.

        Args:
            save_directory: a new or empty folder.
            kwargs: diffusers' own, e.g. max_shard_size.

        Raises:
            WeightsError: the folder holds something already.
        """
        folder = Path(save_directory)
        if folder.exists() and any(folder.iterdir()):
            raise WeightsError(f"{folder} is not empty: choose another folder, or empty it first")
        super().save_pretrained(folder, **kwargs)
        (folder / PRESET_FILE).write_text(self.preset.model_dump_json(indent=1), "utf-8")
        manifest = write_manifest(folder, {"kind": "weights", "preset": self.preset.name})
        self.weights_digest = manifest_digest(manifest)


COMPONENTS: dict[str, type[ModelMixin]] = {"dc_vqr": DCVQRModel, "latent_vqgan": VQGAN, "unet": DQEUNet2DModel}
"""The networks of the pipeline, by folder name."""


class Sampler:
    """Denoises latents with a diffusers scheduler (DDPM: LD-BFR equation (1)).

    Args:
        pipeline: whose UNet denoises.
        num_steps: denoising steps.
        start_step: the first of them, see `LDBFRPipeline.__call__`.
        condition_scale: factor on the injections.
        scheduler: by name or as an object.
        callback: called after every step.
    """

    def __init__(
        self,
        pipeline: LDBFRPipeline,
        num_steps: int,
        start_step: int,
        condition_scale: float,
        scheduler: SchedulerName | Scheduler,
        callback: StepCallback | None,
    ) -> None:
        self.pipeline, self.callback, self.condition_scale = pipeline, callback, condition_scale
        settings = pipeline.preset.diffusion
        self.scheduler: Any = make_sampler(scheduler, settings)
        self.forward_process = noise_schedule(settings)
        self.num_steps = num_steps
        self.total_steps = math.ceil(num_steps * settings.num_train_timesteps / start_step)
        self.takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters

    def sample(self, hq_features: Tensor, initial: Tensor | None, keys: Sequence[tuple[int, bytes, int]]) -> Tensor:
        """Draw z_0 given f_HQ.

        Args:
            hq_features: (B, C, S/f, S/f).
            initial: the first stage's latents (B, c, S/F, S/F), or None to start from pure noise.
            keys: what the noise of each image follows from: (seed, digest, sample).

        Returns:
            z_0, (B, c, S/F, S/F).
        """
        preset, device, dtype = self.pipeline.preset, hq_features.device, hq_features.dtype
        shape = (preset.latent_vqgan.code_dim, preset.latent_side, preset.latent_side)
        noise = torch.stack([torch.randn(shape, generator=generator(*key, "start")) for key in keys])
        self.scheduler.set_timesteps(self.total_steps)
        timesteps = self.scheduler.timesteps[-self.num_steps :]
        if self.num_steps < len(self.scheduler.timesteps) and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(len(self.scheduler.timesteps) - self.num_steps)
        latents = noise
        if initial is not None:
            first = timesteps[:1].long().expand(len(noise))
            latents = self.forward_process.add_noise(initial.float().cpu(), noise, first)
        latents = latents.to(device)
        extra = {"generator": [generator(*key, "steps") for key in keys]} if self.takes_generator else {}
        for number, timestep in enumerate(timesteps):
            batch_timesteps = timestep.long().expand(len(latents)).to(device)
            prediction = self.pipeline.unet(latents.to(dtype), batch_timesteps, hq_features, self.condition_scale)
            latents = self.scheduler.step(prediction.float(), timestep, latents, **extra).prev_sample
            if self.callback is not None:
                self.callback(number, int(timestep), latents)
        return latents.to(dtype)


def tensor_batch(images: Tensor) -> Tensor:
    """Check a tensor's type and range: -> float32 on the CPU.

    Raises:
        InputError: it holds no floats in [-1, 1].
    """
    if not images.is_floating_point():
        raise InputError(f"images are a tensor of {images.dtype}: expected floats in [-1, 1], or an array of uint8")
    batch = images.detach().float().cpu()
    if batch.isnan().any():
        raise InputError("images hold NaN: expected floats in [-1, 1]")
    if batch.numel() and batch.abs().max() > 1.001:
        raise InputError(
            f"images go from {batch.min():.3g} to {batch.max():.3g}: expected floats in [-1, 1]; "
            "divide grey levels by 127.5 and subtract 1"
        )
    return batch


def pil_batch(images: Sequence[Image.Image]) -> Tensor:
    """A list of PIL images of one size: -> (B, 3, H, W) float32 in [-1, 1].

    Raises:
        InputError: no list, none in it, something else in it, or several sizes.
    """
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise InputError(f"images are a {type(images).__name__}: expected an array, a tensor or a list of PIL images")
    other = {type(image).__name__ for image in images if not isinstance(image, Image.Image)}
    if other or not images:
        raise InputError(f"images are a list of {', '.join(other) or 'none'}: expected at least one PIL image")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise InputError(f"images have the sizes {sizes}: expected one size; resize them first")
    return to_float(np.stack([np.asarray(image.convert("RGB")) for image in images]))


def image_digest(image: Tensor) -> bytes:
    """SHA-256 of an image's 8-bit pixels: (3, S, S) float in [-1, 1] -> 32 bytes."""
    return hashlib.sha256(to_uint8(image.clamp(-1, 1)).tobytes()).digest()


def match_color(images: Tensor, reference: Tensor) -> Tensor:
    """Low frequencies (Gaussian, σ = S/16) of the reference, high ones of the images: two (B, 3, S, S)."""
    sigma = images.shape[-1] / 16
    size = 2 * math.ceil(2 * sigma) + 1
    return (images + gaussian_blur(reference - images, [size, size], [sigma, sigma])).clamp(-1, 1)


def uncertainty(samples: Sequence[Tensor]) -> np.ndarray:
    """Standard deviation over samples, mean of the channels: N × (B, 3, S, S) in [-1, 1] -> (B, S, S) in [0, 1]."""
    spread: np.ndarray = torch.stack([sample.float() for sample in samples]).std(dim=0).mean(dim=1).div(2).cpu().numpy()
    return spread


def convert(images: Tensor, output_type: OutputType) -> Any:
    """(B, 3, S, S) in [-1, 1] to the output type."""
    if output_type == "pt":
        return images.float()
    pixels = to_uint8(images.float().cpu())
    return pixels if output_type == "np" else [Image.fromarray(image) for image in pixels]


def check_shapes(preset: Preset, networks: dict[str, ModelMixin], folder: Path) -> None:
    """Refuse networks whose shapes are not those of the preset beside them.

    Raises:
        WeightsError: naming the network and the setting.
    """
    unet = networks["unet"].config
    wanted: dict[str, dict[str, Any]] = {
        "dc_vqr": preset.hq_vqgan.model_dump(),
        "latent_vqgan": preset.latent_vqgan.model_dump(),
        "unet": {
            **preset.injection.model_dump(),
            "condition_channels": preset.hq_vqgan.code_dim,
            "condition_side": preset.feature_side,
        },
    }
    held = {name: dict(networks[name].config) for name in wanted}
    held["unet"] |= {f"unet {key}": value for key, value in unet["unet_config"].items()}
    wanted["unet"] |= {
        "unet sample_size": preset.latent_side,
        "unet in_channels": preset.latent_vqgan.code_dim,
        "unet block_out_channels": preset.unet.block_out_channels,
        "unet layers_per_block": preset.unet.layers_per_block,
    }
    for name, settings in wanted.items():
        for key, value in settings.items():
            found = held[name].get(key)
            found = tuple(found) if isinstance(found, list) else found
            if found != value:
                raise WeightsError(
                    f"{folder / name} has {key} {found}, but its preset says {value}: files are mixed up"
                )
