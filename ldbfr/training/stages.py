"""THE RECIPE: the five training stages of LD-BFR, in order (LD-BFR, section 3).

| stage | trains | frozen | objective |
|---|---|---|---|
| `hq_vqgan` | HQ VQGAN, discriminator | – | L1 + perceptual + codebook + adaptive hinge GAN |
| `latent_vqgan` | decoder (all of it from scratch) | encoder, codebook | the same |
| `dc_vqr` | LQ encoder, DCAM | HQ VQGAN | equations (2) to (4) |
| `prior` | UNet | latent VQGAN | equation (5) |
| `enhancer` | injections | UNet, DC-VQR, latent VQGAN | equation (6) |

A stage holds only mathematics: networks, losses, a preview. The loop (`loop.py`) owns optimisers, precision, EMA,
logging and checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from ldbfr.config import DiffusionStageSettings, Preset, VQStageSettings
from ldbfr.data.index import Faces, Latents
from ldbfr.data.sampler import Batch, NoiseDraw
from ldbfr.models.dc_vqr import DCVQRModel
from ldbfr.models.dqe import DQEUNet2DModel, make_unet
from ldbfr.models.vqgan import VQGAN, PatchDiscriminator
from ldbfr.schedules import noise_schedule
from ldbfr.seeds import derive_seed, uniform_per_sample
from ldbfr.training.base import Losses, Stage, freeze
from ldbfr.training.codebook import CodebookHealth, draw_features
from ldbfr.training.latents import LatentsInMemory, encode_all
from ldbfr.training.losses import (
    ReconstructionLoss,
    adaptive_weight,
    hinge_discriminator_loss,
    last_layer_gradients,
    min_snr_weight,
)


class VQGANStage(Stage):
    """Train a VQGAN: reconstruction + codebook + adaptive hinge GAN (Taming Transformers, equations (4) to (7))."""

    network_class = VQGAN

    def __init__(self, preset: Preset, upstream: Mapping[str, ModelMixin]) -> None:
        super().__init__(preset)
        settings = self.settings
        self.vqgan = VQGAN.from_settings(getattr(preset, self.name))
        if settings.trains == "decoder":
            for part in (self.vqgan.encoder, self.vqgan.quant_conv, self.vqgan.quantize):
                freeze(part)
        terms = settings.reconstruction
        self.reconstruction = ReconstructionLoss(terms)
        self.discriminator = (
            PatchDiscriminator(terms.discriminator_channels, terms.discriminator_layers) if terms.adversarial else None
        )
        self.health = CodebookHealth(self.vqgan.config["num_codes"])
        self._pair: tuple[Tensor, Tensor] | None = None
        self._features: list[tuple[Tensor, Tensor]] = []
        self._adaptive_weight: Tensor | None = None

    @property
    def settings(self) -> VQStageSettings:
        """The stage's own settings."""
        return cast(VQStageSettings, super().settings)

    @property
    def network(self) -> ModelMixin:
        """The VQGAN."""
        return self.vqgan

    def start_from(self, network: ModelMixin) -> None:
        """Take over a VQGAN and its scaling factor."""
        super().start_from(network)
        self.vqgan.register_to_config(scaling_factor=network.config["scaling_factor"])

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """The VQGAN's parameters, and the discriminator's."""
        groups = super().trainable()
        if self.discriminator is not None:
            groups["discriminator"] = list(self.discriminator.parameters())
        return groups

    def extras(self) -> dict[str, nn.Module]:
        """The discriminator and the codebook's counts."""
        extras: dict[str, nn.Module] = {"health": self.health}
        return extras if self.discriminator is None else extras | {"discriminator": self.discriminator}

    def rate(self, objective: str) -> float:
        """The discriminator may learn faster than the generator (two time-scale update rule, Heusel et al. 2017)."""
        return self.settings.reconstruction.discriminator_rate if objective == "discriminator" else 1.0

    def active(self, objective: str, step: int) -> bool:
        """The discriminator starts when the reconstruction is worth judging."""
        return objective == "generator" or step >= self.settings.reconstruction.discriminator_start

    def hears_discriminator(self, step: int) -> bool:
        """Whether the generator's loss has the adversarial term: the discriminator has learnt for a while."""
        terms = self.settings.reconstruction
        return step >= terms.discriminator_start + terms.discriminator_warmup

    def forward(self, objective: str, batch: Batch, step: int) -> Losses:
        """Losses of the generator, or of the discriminator on the generator's latest reconstruction."""
        if objective == "discriminator":
            assert self.discriminator is not None and self._pair is not None
            real, fake = self._pair
            return {"loss": hinge_discriminator_loss(self.discriminator(real), self.discriminator(fake))}
        images, features, code_indices = self.vqgan(batch.hq)
        self.health.observe(code_indices)
        self._features.append((features.detach(), batch.places))
        self._pair = (batch.hq, images.detach())
        reconstruction = self.reconstruction(images, batch.hq)
        codebook, commitment = self.vqgan.quantize.losses(features.float(), code_indices)
        loss = reconstruction
        if self.settings.trains == "all":
            loss = loss + self.settings.codebook * codebook + self.settings.commitment * commitment
        losses = {"reconstruction": reconstruction, "codebook": codebook}
        if self.discriminator is not None and self.hears_discriminator(step):
            adversarial = -self.discriminator(images).mean()
            weight = torch.tensor(self.settings.reconstruction.adversarial)
            if torch.is_grad_enabled():
                adaptive = self._adaptive_weight
                if adaptive is None:
                    adaptive = self.adaptive_weight([self.gradients(reconstruction, adversarial, len(batch))])
                weight = weight * adaptive
            loss = loss + weight * adversarial
            losses["adversarial"] = adversarial
        return {"loss": loss} | losses

    def before_step(self, parts: Sequence[Batch], step: int) -> None:
        """The adaptive weight of the global batch; with accumulation, at the price of one more forward pass."""
        self._features.clear()
        self._adaptive_weight = None
        if self.settings.gradient_accumulation == 1 or self.discriminator is None:
            return
        if self.hears_discriminator(step):
            gradients = []
            for part in parts:
                images = self.vqgan(part.hq)[0]
                losses = self.reconstruction(images, part.hq), -self.discriminator(images).mean()
                gradients.append(self.gradients(*losses, len(part)))
            self._adaptive_weight = self.adaptive_weight(gradients)

    def gradients(self, reconstruction: Tensor, adversarial: Tensor, num_images: int) -> Tensor:
        """What a part of the global batch adds to the two gradients at the last layer."""
        share = num_images / self.settings.batch_size
        return share * last_layer_gradients(reconstruction, adversarial, self.vqgan.last_layer)

    def adaptive_weight(self, gradients: Sequence[Tensor]) -> Tensor:
        """The weight of the adversarial term for the global batch, from this worker's parts of the gradients."""
        return adaptive_weight(self.sum_over_workers(torch.stack(list(gradients)).sum(dim=0)))

    def after_step(self, step: int) -> dict[str, float]:
        """Log codebook health and revive dead codes."""
        health, settings = self.health, self.settings
        health.settle(self.sum_over_workers)
        num_dead = int(health.dead().sum())
        report = {"codebook_perplexity": health.perplexity().item(), "dead_codes": float(num_dead)}
        if settings.trains == "all" and step < settings.revive_until and step % settings.revive_every == 0:
            seed = self.preset.training.seed + step
            features = draw_features(self._features, num_dead, settings.batch_size, seed, self.sum_over_workers)
            report["revived_codes"] = health.revive(self.vqgan.quantize, features)
        return report

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Originals and reconstructions."""
        return {"HQ": batch.hq, "reconstruction": self.vqgan(batch.hq)[0]}


class HQVQGANStage(VQGANStage):
    """Stage 1: the HQ VQGAN, whose codes are what a good face is made of."""

    name = "hq_vqgan"
    sections = ("side", "hq_vqgan")


class LatentVQGANStage(VQGANStage):
    """Stage 2: the latent VQGAN, in whose latents the diffusion runs."""

    name = "latent_vqgan"
    sections = ("side", "latent_vqgan")

    def finish(self, images: Faces, device: torch.device) -> None:
        """Measure the scaling factor, 1 / standard deviation of the latents, on the first 2,048 images."""
        if self.settings.trains == "all":
            latents = encode_all(self.vqgan, images, device, range(min(2048, len(images))))
            scale = self.vqgan.config["scaling_factor"] / latents.std().item()
            self.vqgan.register_to_config(scaling_factor=scale)


class DCVQRStage(Stage):
    """Stage 3: LQ encoder and DCAM, with L_feature + λ L_pixel (equations (2) to (4))."""

    name = "dc_vqr"
    sections = ("side", "hq_vqgan", "attention")
    network_class = DCVQRModel
    upstream = ("hq_vqgan",)
    uses_lq = True

    def __init__(self, preset: Preset, upstream: Mapping[str, ModelMixin]) -> None:
        super().__init__(preset)
        self.hq_vqgan = cast(VQGAN, freeze(upstream["hq_vqgan"]))
        self.model = DCVQRModel.from_vqgan(self.hq_vqgan, preset.attention)
        for part in (self.model.post_quant_conv, self.model.decoder):
            freeze(part)
        self.model.quantize.requires_grad_(preset.training.dc_vqr.train_codebook)
        self.reconstruction = ReconstructionLoss(preset.training.dc_vqr.reconstruction)

    @property
    def network(self) -> ModelMixin:
        """DC-VQR."""
        return self.model

    def forward(self, objective: str, batch: Batch, step: int) -> Losses:
        """L_feature = |f_HQ - f̂_HQ|², L_pixel, and the anchor |f_LQ - codes of f̂_HQ|²."""
        assert batch.lq is not None
        settings = self.preset.training.dc_vqr
        with torch.no_grad():
            target_features = self.hq_vqgan.encode(batch.hq)
            target_codes = self.hq_vqgan.quantize(target_features).quantized.float()
        output = self.model(batch.lq)
        feature = F.mse_loss(output.hq_features.float(), target_features.float())
        anchor = F.mse_loss(output.lq_features.float(), target_codes)
        pixel = self.reconstruction(self.model.decode(output.hq_features), batch.hq)
        loss = settings.feature * feature + settings.pixel * pixel + settings.anchor * anchor
        if settings.train_codebook:
            codebook, _ = self.model.quantize.losses(output.lq_features.float(), output.code_indices)
            loss = loss + codebook
        return {"loss": loss, "feature": feature, "pixel": pixel, "anchor": anchor}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Inputs, first-stage images, originals."""
        assert batch.lq is not None
        return {"LQ": batch.lq, "first stage": self.model.decode(self.model(batch.lq).hq_features), "HQ": batch.hq}


class DiffusionStage(Stage):
    """What the two diffusion stages share: latents, noise, timesteps, and the noise error."""

    score = ("noise_error", "min")
    noise: NoiseDraw

    def __init__(self, preset: Preset, latent_vqgan: ModelMixin) -> None:
        super().__init__(preset)
        self.latent_vqgan = cast(VQGAN, freeze(latent_vqgan))
        self.schedule: DDPMScheduler = noise_schedule(preset.diffusion)
        side = preset.latent_side
        shape = (preset.latent_vqgan.code_dim, side, side)
        self.noise = NoiseDraw(shape, preset.diffusion.num_train_timesteps, self.settings.timestep_power)

    @property
    def settings(self) -> DiffusionStageSettings:
        """The stage's own settings."""
        return cast(DiffusionStageSettings, super().settings)

    def prepare(self, images: Faces, device: torch.device, upstream: Mapping[str, str]) -> Latents | None:
        """The latents that were prepared with the data; without, they are encoded now if the settings ask for it."""
        prepared = images.latents(upstream.get("latent_vqgan", ""))
        if prepared is None and self.settings.cache_latents:
            return LatentsInMemory.encode(self.latent_vqgan, images, device)
        return prepared

    def latents(self, batch: Batch) -> Tensor:
        """z_0 of a batch, (B, c, S/F, S/F)."""
        if batch.latents is not None:
            return batch.latents
        with torch.no_grad():
            return self.latent_vqgan.to_latents(batch.hq).float()

    def noisy(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """z_t, t and ε of a batch, each drawn from the samples' own seeds (equation (5))."""
        latents = self.latents(batch)
        timesteps, noise = batch.timesteps, batch.noise
        if timesteps is None or noise is None:
            timesteps, noise = self.noise(batch.seeds)
        timesteps, noise = timesteps.to(latents.device), noise.to(latents)
        return self.schedule.add_noise(latents, noise, timesteps), timesteps, noise

    def noise_error(self, prediction: Tensor, noise: Tensor, timesteps: Tensor) -> Losses:
        """Mean of |ε - prediction|², weighted by min-SNR where the settings ask for it."""
        errors = (prediction.float() - noise).square().mean(dim=(1, 2, 3))  # (B,)
        losses = {"noise_error": errors.mean()}
        if self.settings.min_snr_gamma is not None:
            alphas = self.schedule.alphas_cumprod.to(errors.device)
            errors = errors * min_snr_weight(alphas, timesteps, self.settings.min_snr_gamma)
        return {"loss": errors.mean()} | losses

    def denoised(self, noisy_latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """The image of the z_0 that a noise prediction implies."""
        alphas = self.schedule.alphas_cumprod.to(noisy_latents.device)[timesteps].view(-1, 1, 1, 1)
        latents = (noisy_latents - (1 - alphas).sqrt() * prediction.float()) / alphas.sqrt()
        return self.latent_vqgan.from_latents(latents)


class PriorStage(DiffusionStage):
    """Stage 4: the unconditional UNet, E|ε - ε_θ(z_t, t)|² (equation (5))."""

    name = "prior"
    sections = ("side", "latent_vqgan", "unet", "diffusion")
    network_class = UNet2DModel
    upstream = ("latent_vqgan",)

    def __init__(self, preset: Preset, upstream: Mapping[str, ModelMixin]) -> None:
        super().__init__(preset, upstream["latent_vqgan"])
        self.unet = make_unet(preset.unet, self.latent_vqgan.config["code_dim"], preset.latent_side)

    @property
    def network(self) -> ModelMixin:
        """The UNet."""
        return self.unet

    def forward(self, objective: str, batch: Batch, step: int) -> Losses:
        """The noise error."""
        noisy_latents, timesteps, noise = self.noisy(batch)
        return self.noise_error(self.unet(noisy_latents, timesteps).sample, noise, timesteps)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Originals, noisy latents decoded, and what one denoising step makes of them."""
        noisy_latents, timesteps, _ = self.noisy(batch)
        prediction = self.unet(noisy_latents, timesteps).sample
        return {
            "HQ": batch.hq,
            "noisy": self.latent_vqgan.from_latents(noisy_latents),
            "one step": self.denoised(noisy_latents, timesteps, prediction),
        }


class EnhancerStage(DiffusionStage):
    """Stage 5: the injections, E|ε - ε_θ(z_t, t, f_HQ)|² (equation (6)), with the rest frozen."""

    name = "enhancer"
    sections = ("side", "hq_vqgan", "latent_vqgan", "attention", "unet", "injection", "diffusion")
    network_class = DQEUNet2DModel
    upstream = ("latent_vqgan", "dc_vqr", "prior")
    uses_lq = True

    def __init__(self, preset: Preset, upstream: Mapping[str, ModelMixin]) -> None:
        super().__init__(preset, upstream["latent_vqgan"])
        self.dc_vqr = cast(DCVQRModel, freeze(upstream["dc_vqr"]))
        prior = cast(UNet2DModel, upstream["prior"])
        channels = self.dc_vqr.config["code_dim"]
        self.dqe = DQEUNet2DModel.from_unet(prior, preset.injection, channels, preset.feature_side)
        if not self.settings.train_unet:
            freeze(self.dqe.unet)

    @property
    def network(self) -> ModelMixin:
        """The conditioned UNet."""
        return self.dqe

    def hq_features(self, batch: Batch) -> Tensor:
        """f_HQ of a batch; zero for samples whose condition is dropped."""
        assert batch.lq is not None
        with torch.no_grad():
            features: Tensor = self.dc_vqr(batch.lq).hq_features
        if self.settings.condition_dropout:
            kept = uniform_per_sample(batch.seeds, "dropout") >= self.settings.condition_dropout
            features = features * kept.to(features).view(-1, 1, 1, 1)
        return features

    def forward(self, objective: str, batch: Batch, step: int) -> Losses:
        """The noise error given f_HQ."""
        noisy_latents, timesteps, noise = self.noisy(batch)
        prediction = self.dqe(noisy_latents, timesteps, self.hq_features(batch))
        return self.noise_error(prediction, noise, timesteps)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Inputs, first stage, one denoising step from z_t, originals."""
        assert batch.lq is not None
        noisy_latents, timesteps, _ = self.noisy(batch)
        features = self.dc_vqr(batch.lq).hq_features
        prediction = self.dqe(noisy_latents, timesteps, features)
        return {
            "LQ": batch.lq,
            "first stage": self.dc_vqr.decode(features),
            "one step": self.denoised(noisy_latents, timesteps, prediction),
            "HQ": batch.hq,
        }


STAGES: tuple[type[Stage], ...] = (HQVQGANStage, LatentVQGANStage, DCVQRStage, PriorStage, EnhancerStage)
"""The stages in the order in which they are trained."""

STAGE_NAMES = tuple(stage.name for stage in STAGES)


def stage_class(name: str) -> type[Stage]:
    """A stage's class by its name, one of `STAGE_NAMES`."""
    return dict(zip(STAGE_NAMES, STAGES, strict=True))[name]


def make_stage(name: str, preset: Preset, upstream: Mapping[str, ModelMixin]) -> Stage:
    """A stage by name, with the networks of the stages that it builds on.

    Its fresh weights follow from the preset's seed and the stage's name; torch's own generator is left as it was.

    Args:
        name: one of `STAGE_NAMES`.
        preset: all settings.
        upstream: networks by stage name; those in the stage's `upstream` must be there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(preset.training.seed, "weights", name))
        return cast(Any, stage_class(name))(preset, upstream)
