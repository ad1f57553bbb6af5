"""Which tensor of a published network becomes which parameter of ours: complete key maps, and their accounting.

A map goes from our parameters to the source's keys, so that no parameter of ours can be forgotten; `take_all` then
refuses a source in which a key is missing, left over or of another shape, and `fill` one that holds no numbers.

Sources (names and shapes): CompVis/taming-transformers and CompVis/latent-diffusion, `diffusionmodules/model.py` and
`diffusionmodules/openaimodel.py`; huggingface/diffusers, `VQModel` and `UNet2DModel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ldbfr.errors import WeightsError

LISTED = 20
"""How many keys of one kind an error names before it only counts."""

Tensors = dict[str, Tensor]


class Network(NamedTuple):
    """A published network as ours: the stage that it is for, its weights and what they are, and where they came from.

    `weights`: "ema", "raw", or "published" where the source holds one set and does not say which.
    `file`: the file that held the weights.
    """

    stage: str
    network: ModelMixin
    weights: str
    file: Path


@dataclass(frozen=True)
class Origin:
    """Where a parameter of ours comes from.

    Args:
        key: the source's name.
        kernel_axes: how many axes of size 1 a weight has there after its own two, any of these: a convolution over
            positions there is a linear layer here, (C, C, 1, 1) or (C, C, 1) -> (C, C).
        part: 0, 1 or 2 where the source holds queries, keys and values in one tensor of 3 C rows, head by head: the
            rows are (head, part, channel of the head), so a part is not one slice of them.
        head_dim: channels of a head there.
    """

    key: str
    kernel_axes: tuple[int, ...] = (0,)
    part: int | None = None
    head_dim: int = 0


KeyMap = dict[str, Origin]
"""Our parameters' names -> where they come from."""

_VQGAN_NAMES = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
_RESIDUAL_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def compvis_vqgan(names: Iterable[str], num_levels: int) -> KeyMap:
    """The map from CompVis's VQGANs (taming-transformers, latent-diffusion) to a `VQGAN`.

    CompVis counts the decoder's levels from the finest, diffusers from the coarsest.

    Args:
        names: of the parameters of our network.
        num_levels: of the encoder.
    """
    origins = {}
    for name in names:
        key = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{num_levels - 1 - int(found[1])}.", name)
        for pattern, replacement in _VQGAN_NAMES:
            key = re.sub(pattern, replacement, key)
        origins[name] = Origin(key, (2,) if is_projection(name) else (0,))
    return origins


def compvis_unet(names: Iterable[str], layers: int, attention_levels: tuple[bool, ...], head_dim: int) -> KeyMap:
    """The map from latent-diffusion's `UNetModel` to a `UNet2DModel`.

    Args:
        names: of the parameters of our network.
        layers: residual blocks of a level in the down path; one more in the up path.
        attention_levels: which levels have attention, finest first.
        head_dim: channels of an attention head.
    """
    return {name: _unet_origin(name, layers, attention_levels[::-1], head_dim) for name in names}


def _unet_origin(name: str, layers: int, upward_attention: tuple[bool, ...], head_dim: int) -> Origin:
    stem, _, kind = name.rpartition(".")  # kind: weight or bias
    if stem in _UNET_ENDS:
        return Origin(f"{_UNET_ENDS[stem]}.{kind}")
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", stem)
    assert found is not None, name
    path, level, group, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if path is None:  # residual block, attention, residual block
        block = f"middle_block.{1 if group == 'attentions' else 2 * number}"
    elif group == "downsamplers":
        return Origin(f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{kind}")
    elif group == "upsamplers":  # the last in its block, after the attention where there is one
        return Origin(f"output_blocks.{(level + 1) * (layers + 1) - 1}.{1 + upward_attention[level]}.conv.{kind}")
    else:
        # Block 0 of the down path is the first convolution; a level is `layers` blocks and its downsampler.
        # A level of the up path is `layers` + 1 blocks.
        index = level * (layers + 1) + number + (1 if path == "down" else 0)
        block = f"{'input' if path == 'down' else 'output'}_blocks.{index}.{1 if group == 'attentions' else 0}"
    if group == "resnets":
        return Origin(f"{block}.{_RESIDUAL_NAMES[rest]}.{kind}")
    if rest == "group_norm":
        return Origin(f"{block}.norm.{kind}")
    if rest == "to_out.0":
        return Origin(f"{block}.proj_out.{kind}", (1,) if kind == "weight" else (0,))
    part = ("to_q", "to_k", "to_v").index(rest)
    return Origin(f"{block}.qkv.{kind}", (1,) if kind == "weight" else (0,), part, head_dim)


def diffusers_network(names: Iterable[str]) -> KeyMap:
    """The map from a network in diffusers' layout, whose names are ours (see `current_names`).

    Its attention's projections were convolutions once.
    """
    return {name: Origin(name, (0, 2) if is_projection(name) else (0,)) for name in names}


def is_projection(name: str) -> bool:
    """Whether a parameter of ours is the weight of an attention's linear layer."""
    return re.search(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", name) is not None


def current_names(tensors: Mapping[str, Tensor], what: str) -> Tensors:
    """A diffusers state with the attention's names of today: query -> to_q, …, proj_attn -> to_out.0.

    Args:
        tensors: the state.
        what: names it in errors.

    Raises:
        WeightsError: a parameter is there under its old and its new name.
    """
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        name = re.sub(
            r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
            lambda found: f"{found[1]}{_OLD_ATTENTION_NAMES[found[2]]}.",
            key,
        )
        if name in renamed or (name != key and name in tensors):
            raise WeightsError(f"{what}: {name} is there twice, under its old name and its new; remove one of the two")
        renamed[name] = tensor
    return renamed


def averaged_name(name: str) -> str:
    """The name that latent-diffusion's moving average gives a parameter: without dots, which buffers may not have."""
    return name.replace(".", "")


def keys_of(origins: KeyMap) -> list[str]:
    """The source's keys that a map uses, each once, in order."""
    return list(dict.fromkeys(origin.key for origin in origins.values()))


def with_keys(origins: KeyMap, names: Mapping[str, str]) -> KeyMap:
    """The same map for a source in which every key has another name."""
    return {name: replace(origin, key=names[origin.key]) for name, origin in origins.items()}


def take_all(origins: KeyMap, shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], what: str) -> Tensors:
    """Every parameter of our network from the tensors of a source, in float32.

    Args:
        origins: the map.
        shapes: of our parameters.
        tensors: the source; what is no part of the network is taken out already.
        what: names the source and the network in errors.

    Returns:
        The state of our network; nothing of the source is left over.

    Raises:
        WeightsError: listing the keys that are missing, unknown or of another shape.
    """
    used = set(keys_of(origins))
    problems = [
        *_listed("missing", (key for key in used if key not in tensors)),
        *_listed("unknown", (key for key in tensors if key not in used)),
    ]
    state, wrong = {}, set()
    for name, origin in origins.items():
        if origin.key in tensors:
            tensor, expected = tensors[origin.key], shapes[name]
            taken = take(origin, tensor, expected)
            if taken is None:
                fitting = " or ".join(map(str, source_shapes(origin, expected)))
                wrong.add(f"{origin.key}: {describe(tensor)}, expected {fitting}")
            else:
                state[name] = taken
    problems += _listed("of another shape or type", wrong)
    if problems:
        raise WeightsError(f"{what}: the keys do not fit.\n" + "\n".join(problems))
    return state


def take(origin: Origin, tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """One parameter of ours, of the given shape and in float32, or None where the source's tensor does not fit."""
    expected = source_shapes(origin, shape)
    if not tensor.is_floating_point() or tuple(tensor.shape) not in expected:
        return None
    tensor = tensor.detach().reshape(tensor.shape[: len(shape)])
    if origin.part is not None:
        tensor = tensor.unflatten(0, (-1, 3, origin.head_dim))[:, origin.part].flatten(0, 1)
    return tensor.to(torch.float32)


def source_shapes(origin: Origin, shape: torch.Size) -> list[tuple[int, ...]]:
    """The shapes that the source's tensor may have for a parameter of ours."""
    rows = shape[0] * (1 if origin.part is None else 3)
    return [(rows, *shape[1:], *(1,) * axes) for axes in origin.kernel_axes]


def fill(network: ModelMixin, state: Tensors, what: str) -> None:
    """Give a network on the meta device its weights.

    Raises:
        WeightsError: a weight is not finite.
    """
    broken = [name for name, value in state.items() if not value.is_meta and not torch.isfinite(value).all()]
    if broken:
        raise WeightsError(
            f"{what}: {len(broken)} parameters have NaN or infinite weights, the first is {broken[0]}; "
            "the file is damaged or its training diverged: download it again, or take another"
        )
    network.load_state_dict({name: value.contiguous() for name, value in state.items()}, assign=True)


def shapes_of(network: ModelMixin) -> dict[str, torch.Size]:
    """The shape of every parameter of a network."""
    return {name: value.shape for name, value in network.state_dict().items()}


def describe(tensor: Tensor) -> str:
    """Shape of a tensor, and its type where that is none for weights."""
    text = str(tuple(tensor.shape))
    return text if tensor.is_floating_point() else f"{text} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(title: str, keys: Iterable[str]) -> list[str]:
    found = sorted(keys)
    if not found:
        return []
    rest = [f"    … and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return [f"  {title} ({len(found)}):", *(f"    {key}" for key in found[:LISTED]), *rest]
