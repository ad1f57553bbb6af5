"""Folders in diffusers' layout (`CompVis/ldm-celebahq-256`) as our networks: `vqvae/` and `unet/`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel

from ldbfr.config import Preset, VQGANSettings
from ldbfr.errors import WeightsError
from ldbfr.models import convert_keys as keys
from ldbfr.models.convert_keys import Network
from ldbfr.models.convert_sources import read_tensors
from ldbfr.models.dqe import make_unet
from ldbfr.models.vqgan import VQGAN

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""What a network's weights are called, the preferred first."""

DEFAULT_SCALING = 0.18215
"""The scaling_factor that diffusers writes for a `VQModel` that never had one."""


def read_folder(source: Path, preset: Preset, scaling_factor: float | None) -> list[Network]:
    """The latent VQGAN in `vqvae/` and the prior in `unet/`, or the one of them that is there.

    Args:
        source: the folder.
        preset: whose shapes the networks must have.
        scaling_factor: of the latents; the folder's when None, or 1, LDM's, where it gives none.

    Raises:
        WeightsError: neither is there, or one does not fit the preset.
    """
    networks = []
    if (source / "vqvae").is_dir():
        networks.append(read_folder_vqgan(source / "vqvae", preset.latent_vqgan, scaling_factor))
    if (source / "unet").is_dir():
        networks.append(read_folder_unet(source / "unet", preset))
    if not networks:
        raise WeightsError(f"{source} is no diffusers folder: expected vqvae/ or unet/ in it, each with a config.json")
    return networks


def read_folder_vqgan(folder: Path, settings: VQGANSettings, scaling_factor: float | None) -> Network:
    """diffusers' `VQModel` as our latent VQGAN."""
    config = read_config(folder)
    if scaling_factor is None:
        scaling_factor = float(config.get("scaling_factor", 1.0))
        if scaling_factor == DEFAULT_SCALING:
            raise WeightsError(
                f"{folder / 'config.json'} says scaling_factor {DEFAULT_SCALING}, which diffusers also writes for "
                "networks that never had one; LDM's is 1: give the scaling factor, 1.0 or another"
            )
    finer = len(settings.block_out_channels) - 1
    attention = "Attn" if settings.level_attention else ""
    expected = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": settings.block_out_channels,
        "down_block_types": ("DownEncoderBlock2D",) * finer + (f"{attention}DownEncoderBlock2D",),
        "up_block_types": (f"{attention}UpDecoderBlock2D",) + ("UpDecoderBlock2D",) * finer,
        "layers_per_block": settings.layers_per_block,
        "latent_channels": settings.code_dim,
        "num_vq_embeddings": settings.num_codes,
        "norm_num_groups": settings.norm_num_groups,
        "mid_block_add_attention": settings.mid_attention,
        "act_fn": "silu",
        "norm_type": "group",
    }
    compare_configs(folder, VQModel, config, expected)
    with torch.device("meta"):
        vqgan = VQGAN(**settings.model_dump(), scaling_factor=scaling_factor)
    return fill_from_folder("latent_vqgan", vqgan, folder)


def read_folder_unet(folder: Path, preset: Preset) -> Network:
    """diffusers' `UNet2DModel` as our prior; only the size of the latents that it was made for may differ."""
    with torch.device("meta"):
        unet = make_unet(preset.unet, preset.latent_vqgan.code_dim, preset.latent_side)
    expected = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    del expected["sample_size"]
    compare_configs(folder, UNet2DModel, read_config(folder), expected)
    return fill_from_folder("prior", unet, folder)


def compare_configs(
    folder: Path, network_class: type[ModelMixin], config: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Refuse a configuration that makes another function of the weights; what it leaves out is diffusers' default."""
    parameters = inspect.signature(network_class.__init__).parameters
    given = {name: config.get(name, parameters[name].default) for name in expected}
    differing = [
        f"  {name} is {given[name]!r}, expected {value!r}"
        for name, value in expected.items()
        if plain(given[name]) != plain(value)
    ]
    if differing:
        lines = "\n".join(differing)
        raise WeightsError(
            f"{folder / 'config.json'} describes another network than the preset; choose the preset with its shape:\n"
            f"{lines}"
        )


def plain(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def fill_from_folder(stage: str, network: ModelMixin, folder: Path) -> Network:
    """Fill a network on the meta device with the weights in its folder."""
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} has no weights: expected {' or '.join(WEIGHT_FILES)}; download the folder again")
    what = f"{file} as {stage}"
    tensors = keys.current_names(read_tensors(file), what)
    shapes = keys.shapes_of(network)
    keys.fill(network, keys.take_all(keys.diffusers_network(shapes), shapes, tensors, what), what)
    return Network(stage, network, "published", file)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a network.

    Raises:
        WeightsError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); download the folder again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object but {type(values).__name__}; download the folder again")
    return values
