"""CompVis's checkpoints as our networks: the VQGANs of taming-transformers and latent-diffusion, and the UNet.

The functions are the same, to rounding: both sides normalise in 32 groups (epsilon 1e-6 in the VQGANs, 1e-5 in the
UNet), pad the VQGAN's strided convolutions at the right and the bottom and the UNet's all around, embed t as [cos, sin]
of t · 10000^(-i/n), and attend with one head in the VQGANs, with heads of 32 channels in the UNet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from ldbfr.config import Preset, VQGANSettings
from ldbfr.errors import ConfigError, WeightsError
from ldbfr.models import convert_keys as keys
from ldbfr.models.convert_keys import KeyMap, Network, Tensors
from ldbfr.models.dqe import make_unet
from ldbfr.models.vqgan import VQGAN

CheckpointKind = Literal["vq-f4", "ldm-vq-4", "taming-faces"]
Weights = Literal["ema", "raw"]

SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    "lvlb_weights",
)
"""latent-diffusion's buffers of the noise schedule, all of which follow from the betas."""

NOT_NETWORK: dict[str, str] = {
    r"(first_stage_model\.)?loss\..+": "the VQGAN's training loss: LPIPS and the discriminator",
    r"(first_stage_model\.)?model_ema\.loss.+": "the average of the discriminator",
    r"(first_stage_model\.)?model_ema\.(decay|num_updates)": "bookkeeping of the moving average",
    "|".join(SCHEDULE): "the noise schedule, which is the preset's; `check_schedule` compares its betas",
    r"logvar": "learned weights of the diffusion's loss, one a timestep",
    r"scale_factor": "the latents' scaling factor, which goes into our configuration",
}
"""Keys of a state dict that are no part of a network, and what they are. The optimiser's state and the rest of
Lightning's bookkeeping stand beside the state dict and are not looked at."""

TRANSFORMER = {r"(transformer|cond_stage_model)\..+": "taming-transformers' second stage"}
"""Further ones, where the VQGAN comes inside that second stage."""

GROUPS = 32
"""Groups of every normalisation, and channels of an attention head of the UNet, in CompVis's networks."""

PREFIXES = ("", "first_stage_model.")
"""Where a VQGAN stands: alone, or as the first stage of a diffusion model or a transformer."""

CODES = "quantize.embedding.weight"


def detect_kind(tensors: Mapping[str, Tensor], preset: Preset, source: Path) -> CheckpointKind:
    """Which publication a state dict is, by its keys and the shape of its codebook.

    Raises:
        WeightsError: none of those known, or the preset's VQGANs do not tell two of them apart.
    """
    if any(key.startswith("model.diffusion_model.") for key in tensors):
        return "ldm-vq-4"
    codebooks = [tensors[f"{prefix}{CODES}"] for prefix in PREFIXES if f"{prefix}{CODES}" in tensors]
    if not codebooks:
        raise WeightsError(
            f"{source} is no VQGAN and no latent diffusion model of CompVis: expected {CODES} or "
            f"model.diffusion_model.… among its keys, it has {', '.join(list(tensors)[:5])} …"
        )
    kinds: dict[CheckpointKind, VQGANSettings] = {"vq-f4": preset.latent_vqgan, "taming-faces": preset.hq_vqgan}
    found = [kind for kind, ours in kinds.items() if tuple(codebooks[0].shape) == (ours.num_codes, ours.code_dim)]
    if len(found) != 1:
        wanted = ", ".join(f"{kind} {(ours.num_codes, ours.code_dim)}" for kind, ours in kinds.items())
        raise WeightsError(
            f"{source} has a codebook of shape {keys.describe(codebooks[0])}, preset {preset.name} expects {wanted}: "
            + ("name the kind" if found else "choose the preset with its shape")
        )
    return found[0]


def read_checkpoint(
    tensors: Tensors,
    source: Path,
    preset: Preset,
    kind: CheckpointKind,
    weights: Weights | None,
    scaling_factor: float | None,
) -> list[Network]:
    """The networks of a checkpoint.

    Args:
        tensors: its state dict.
        source: where it comes from.
        preset: whose shapes the networks must have.
        kind: which publication it is.
        weights: the averaged or the last weights; the averaged when None, where there are any.
        scaling_factor: of the latents; the checkpoint's when None, or 1.

    Raises:
        WeightsError: it does not fit the preset.
        ConfigError: a scaling factor for a network that has none.
    """
    if kind == "taming-faces":
        if scaling_factor is not None:
            raise ConfigError(f"{kind} has no latents for a diffusion: leave the scaling factor {scaling_factor} out")
        vqgan, taken = read_vqgan(tensors, preset.hq_vqgan, weights, 1.0, f"{source} as hq_vqgan")
        return [Network("hq_vqgan", vqgan, taken, source)]
    if scaling_factor is None:
        scaling_factor = float(tensors["scale_factor"]) if "scale_factor" in tensors else 1.0
    what = f"{source} as latent_vqgan"
    if kind == "vq-f4":
        vqgan, taken = read_vqgan(tensors, preset.latent_vqgan, weights, scaling_factor, what)
        return [Network("latent_vqgan", vqgan, taken, source)]
    check_schedule(tensors, preset, source)
    first_stage = {key: tensors[key] for key in tensors if key.startswith(PREFIXES[1])}
    diffusion = {key: tensors[key] for key in tensors if key not in first_stage}
    unet, taken = read_unet(diffusion, preset, weights, f"{source} as prior")
    # The diffusion was trained in the latents of the first stage's own weights, never in those of an average.
    vqgan, own = read_vqgan(first_stage, preset.latent_vqgan, "raw", scaling_factor, what)
    return [Network("latent_vqgan", vqgan, own, source), Network("prior", unet, taken, source)]


def read_vqgan(
    tensors: Tensors, settings: VQGANSettings, weights: Weights | None, scaling_factor: float, what: str
) -> tuple[VQGAN, Weights]:
    """A VQGAN, alone or as the first stage of another network, as ours; and which weights it holds."""
    check_thirty_two("norm_num_groups", settings.norm_num_groups, what)
    with torch.device("meta"):
        vqgan = VQGAN(**settings.model_dump(), scaling_factor=scaling_factor)
    prefix = PREFIXES[1] if f"{PREFIXES[1]}{CODES}" in tensors else PREFIXES[0]
    rest = without({**NOT_NETWORK, **TRANSFORMER} if prefix else NOT_NETWORK, tensors)
    origins = keys.compvis_vqgan(vqgan.state_dict(), len(settings.block_out_channels))
    raw = {key: f"{prefix}{key}" for key in keys.keys_of(origins)}
    averaged = {key: f"{prefix}model_ema.{keys.averaged_name(key)}" for key in raw}
    return vqgan, fill_averaged(vqgan, origins, rest, raw, averaged, weights, what)


def read_unet(tensors: Tensors, preset: Preset, weights: Weights | None, what: str) -> tuple[UNet2DModel, Weights]:
    """latent-diffusion's UNet as ours, and which weights it holds."""
    settings = preset.unet
    check_thirty_two("norm_num_groups", settings.norm_num_groups, what)
    check_thirty_two("attention_head_dim", settings.attention_head_dim, what)
    with torch.device("meta"):
        unet = make_unet(settings, preset.latent_vqgan.code_dim, preset.latent_side)
    origins = keys.compvis_unet(
        unet.state_dict(), settings.layers_per_block, settings.attention_levels, settings.attention_head_dim
    )
    raw = {key: f"model.diffusion_model.{key}" for key in keys.keys_of(origins)}
    averaged = {key: f"model_ema.{keys.averaged_name(f'diffusion_model.{key}')}" for key in raw}
    return unet, fill_averaged(unet, origins, without(NOT_NETWORK, tensors), raw, averaged, weights, what)


def fill_averaged(
    network: ModelMixin,
    origins: KeyMap,
    tensors: Tensors,
    raw: Mapping[str, str],
    averaged: Mapping[str, str],
    weights: Weights | None,
    what: str,
) -> Weights:
    """Fill a network from the averaged or the last weights and say which; the set not taken must be complete too.

    Args:
        network: on the meta device.
        origins: the map.
        tensors: the source, without what is no part of the network.
        raw, averaged: what the map's keys are called in the two sets.
        weights: which to take; the averaged when None, where there are any.
        what: names source and network in errors.
    """
    average = {key: tensor for key, tensor in tensors.items() if "model_ema." in key}
    last = {key: tensor for key, tensor in tensors.items() if key not in average}
    taken: Weights = weights or ("ema" if average else "raw")
    if not (average if taken == "ema" else last):
        there = "the raw weights" if last else "averaged weights (model_ema.…)"
        raise WeightsError(f"{what}: no {taken} weights are in it, only {there}; leave the choice of weights out")
    shapes, states = keys.shapes_of(network), {}
    if average:
        states["ema"] = keys.take_all(keys.with_keys(origins, averaged), shapes, average, what)
    if last:
        states["raw"] = keys.take_all(keys.with_keys(origins, raw), shapes, last, what)
    keys.fill(network, states[taken], what)
    return taken


def without(patterns: Mapping[str, str], tensors: Tensors) -> Tensors:
    """The tensors whose keys match none of the patterns, see `NOT_NETWORK`."""
    pattern = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return {key: tensor for key, tensor in tensors.items() if not pattern.fullmatch(key)}


def check_thirty_two(name: str, value: int, what: str) -> None:
    """Refuse a preset in which the same weights would be another function: these numbers do not show in the keys."""
    if value != GROUPS:
        raise WeightsError(
            f"{what}: the preset's {name} is {value}, expected CompVis's {GROUPS}; choose the preset with its shape"
        )


def check_schedule(tensors: Tensors, preset: Preset, source: Path) -> None:
    """Refuse a diffusion model that was trained with another noise schedule than the preset's (`scaled_linear`)."""
    betas, ours = tensors.get("betas"), preset.diffusion
    if betas is None:
        return
    ends = (ours.beta_start**0.5, ours.beta_end**0.5)
    expected = torch.linspace(*ends, ours.num_train_timesteps, dtype=torch.float64).square()
    if betas.shape != expected.shape or not torch.allclose(betas.double(), expected, rtol=1e-4, atol=0):
        raise WeightsError(
            f"{source} was trained with {betas.numel()} betas from {betas.min():.6g} to {betas.max():.6g}, preset "
            f"{preset.name} has {len(expected)} from {ours.beta_start:.6g} to {ours.beta_end:.6g}: set "
            "diffusion.num_train_timesteps, diffusion.beta_start and diffusion.beta_end to the source's"
        )
