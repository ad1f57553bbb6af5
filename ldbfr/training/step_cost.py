"""What a training step costs, found without training: its FLOPs and the bytes that it holds.

A stage is built, and run forwards and backwards, on torch's meta device: tensors there have shapes and no data, so
that the largest preset costs seconds and no memory. The measuring functions take a stage on a
real device as well, which is how the estimate can be held against the truth.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ldbfr.config import Preset
from ldbfr.data.index import FaceImages
from ldbfr.data.sampler import Batch, BatchSampler
from ldbfr.training.base import Stage
from ldbfr.training.latents import LatentsInMemory
from ldbfr.training.stages import make_stage, stage_class

# fmt: off
IN_BF16 = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul",
    "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "prelu",
    "scaled_dot_product_attention",
}
"""What autocast does in bf16 on CUDA, by function name (ATen's autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP)."""

IN_FP32 = {
    "group_norm", "layer_norm", "rms_norm", "interpolate", "softmax", "log_softmax", "exp", "expm1", "log", "log10",
    "log2", "log1p", "pow", "__pow__", "square", "rsqrt", "reciprocal", "softplus", "sum", "prod", "norm",
    "vector_norm", "cumsum", "cumprod", "logsumexp", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
    "cosine_similarity", "kl_div", "cdist", "binary_cross_entropy_with_logits",
}
"""What autocast does in float32 on CUDA, by function name (same file, AT_FORALL_FP32 and …_SET_OPT_DTYPE)."""
# fmt: on


class LikeOnAGPU(TorchFunctionMode):
    """Lets a stage on the meta device take the way that it takes on a GPU.

    torch has no autocast for meta, so the casts are made here, by CUDA's rules and with autocast's cache of trained
    weights. Attention is the fused kind, where meta would take the one that holds the whole attention matrix. Values,
    of which meta has none, are answered with one.

    Args:
        bf16: whether autocast is on.
    """

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.cache: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Stand in for a call of one of torch's functions."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "item":
            return 1.0
        if name == "bincount":
            return args[0].new_empty(kwargs["minlength"])
        if self.bf16 and name in IN_BF16:
            args, kwargs = tree_map_only(Tensor, self.lower, (args, kwargs))
        elif self.bf16 and name in IN_FP32:
            args, kwargs = tree_map_only(Tensor, raised, (args, kwargs))
        if name == "scaled_dot_product_attention":
            return fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def lower(self, value: Tensor) -> Tensor:
        """The value in bf16; a trained weight is cast once."""
        if value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.bfloat16()
        if id(value) not in self.cache:
            self.cache[id(value)] = value.bfloat16()
        return self.cache[id(value)]


def raised(value: Tensor) -> Tensor:
    """The value in float32 where it is bf16."""
    return value.float() if value.dtype == torch.bfloat16 else value


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Attention that saves its inputs, its result and one number a query, as every fused kernel does."""
    if query.ndim == 3:
        query, key, value = (tokens.unsqueeze(0) for tokens in (query, key, value))
        return fused_attention(query, key, value, attn_mask, dropout_p, is_causal)[0]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attended: Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]
    return attended


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still held; `peak` is the most at once.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {storage_key(tensor) for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a kernel and note what it made."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.note, result)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        """A storage was freed."""
        self.known.discard(key)
        self.now -= size


def storage_key(tensor: Tensor) -> int:
    """What tells a storage from others while it lives; on meta, all addresses are zero."""
    return int(tensor.untyped_storage()._cdata)


def own_tensors(stage: nn.Module) -> list[Tensor]:
    """Parameters, their gradients where there are any, and buffers."""
    gradients = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
    return [*stage.parameters(), *gradients, *stage.buffers()]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one image in a step, all objectives of the stage together; a multiply-add counts 2.

    `total` is of all forward and backward passes, `forward` of one forward pass of every objective.
    """

    total: int
    forward: int


@dataclass(frozen=True)
class StepMemory:
    """What a worker's micro-batch holds, in bytes.

    `saved` is the most that is kept for a backward pass: every storage once, parameters left out. `peak` is the most
    that is held at once beside weights, gradients and optimiser state, and has the former in it.
    """

    saved: int
    peak: int


def meta_stage(preset: Preset, name: str) -> Stage:
    """A stage on the meta device, on upstream networks that are there too; nothing is downloaded.

    Args:
        preset: all settings.
        name: one of `STAGE_NAMES`.
    """
    with torch.device("meta"), LikeOnAGPU(bf16=False):
        needed = {stage: meta_stage(preset, stage).network for stage in stage_class(name).upstream}
        return make_stage(name, without_downloads(preset), needed).to("meta")


def without_downloads(preset: Preset) -> Preset:
    """The preset with an untrained backbone in the perceptual losses: the same network without its file."""
    training = preset.training
    for name in ("hq_vqgan", "latent_vqgan", "dc_vqr"):
        settings = getattr(training, name)
        terms = settings.reconstruction.model_copy(update={"perceptual_backbone": "random"})
        training = training.model_copy(update={name: settings.model_copy(update={"reconstruction": terms})})
    return preset.model_copy(update={"training": training})


def example_batch(stage: Stage, size: int, cached_latents: bool = False) -> Batch:
    """A micro-batch as the loop hands it to the stage, of grey pictures, on the stage's device.

    Args:
        stage: decides the shapes.
        size: images.
        cached_latents: with the frozen latents in it.
    """
    preset = stage.preset
    faces = FaceImages(np.full((1, preset.side, preset.side, 3), 128, np.uint8), ["grey"])
    side = preset.latent_side
    latents = LatentsInMemory(torch.zeros(2, 1, preset.latent_vqgan.code_dim, side, side)) if cached_latents else None
    batch = BatchSampler(faces, size, preset.training.seed, stage.name, False, None, latents).batch(0)
    if stage.uses_lq:
        batch = replace(batch, lq=batch.hq.clone())
    return batch.to(device_of(stage), torch.contiguous_format)


def device_of(stage: nn.Module) -> torch.device:
    """Where a stage's weights are."""
    return next(stage.parameters()).device


def autocast_of(stage: Stage, bf16: bool) -> AbstractContextManager[Any]:
    """The context in which a stage runs on its device."""
    device = device_of(stage).type
    return LikeOnAGPU(bf16) if device == "meta" else torch.autocast(device, torch.bfloat16, enabled=bf16)


def measure_flops(stage: Stage, cached_latents: bool = False) -> StepFlops:
    """Count the FLOPs of one image; gradients are left in the parameters."""
    batch = example_batch(stage, 1, cached_latents)
    with FlopCounterMode(display=False) as counter:
        run_step(stage, batch, bf16=False)
    return StepFlops(counter.get_total_flops(), forward_flops(stage, cached_latents))


@torch.no_grad()
def forward_flops(stage: Stage, cached_latents: bool = False) -> int:
    """FLOPs of one image's forward passes."""
    batch, step = example_batch(stage, 1, cached_latents), last_step(stage)
    with FlopCounterMode(display=False) as counter, autocast_of(stage, bf16=False):
        for name in active_objectives(stage):
            stage(name, batch, step)
    return counter.get_total_flops()


def measure_memory(stage: Stage, micro_batch: int, cached_latents: bool = False) -> StepMemory:
    """Count the bytes that a micro-batch holds; gradients are left in the parameters."""
    batch = example_batch(stage, micro_batch, cached_latents)
    for parameters in stage.trainable().values():
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    saved = SavedBytes(own_tensors(stage))
    with LiveBytes(own_tensors(stage)) as live:
        run_step(stage, batch, stage.settings.precision == "bf16", saved)
    return StepMemory(saved.most, live.peak)


@torch.no_grad()
def measure_preview(stage: Stage, num_faces: int) -> int:
    """The most bytes that are held, beside the weights, while the log's pictures are made."""
    batch = example_batch(stage, num_faces)
    stage.network.eval()
    with LiveBytes(own_tensors(stage)) as live, autocast_of(stage, bf16=False):
        stage.preview(batch)
    return live.peak


def last_step(stage: Stage) -> int:
    """The step in which every objective that is ever trained is active."""
    return stage.settings.steps - 1


def active_objectives(stage: Stage) -> list[str]:
    """The objectives of the last step."""
    return [name for name in stage.trainable() if stage.active(name, last_step(stage))]


def run_step(stage: Stage, batch: Batch, bf16: bool, saved: AbstractContextManager[Any] | None = None) -> None:
    """The forward and backward passes of the last step on a micro-batch, in the loop's order.

    Args:
        stage: gathers gradients.
        batch: on the stage's device.
        bf16: whether autocast is on.
        saved: entered anew around every objective's forward pass.
    """
    groups, step = stage.trainable(), last_step(stage)
    stage.network.train()
    train_only(groups, ["generator"])
    with autocast_of(stage, bf16):
        stage.before_step([batch], step)
    for name in groups:
        if stage.active(name, step):
            train_only(groups, [name])
            with saved or nullcontext(), autocast_of(stage, bf16):
                loss = stage(name, batch, step)["loss"]
            loss.backward()
            del loss
    train_only(groups, groups)


def train_only(groups: dict[str, list[nn.Parameter]], objectives: Iterable[str]) -> None:
    """Let the parameters of these objectives alone take part in a backward pass."""
    for name, parameters in groups.items():
        for parameter in parameters:
            parameter.requires_grad_(name in objectives)


class SavedBytes:
    """Counts the bytes of the storages that autograd keeps for the backward pass, each once.

    It may be entered several times; `most` is the largest count.

    Args:
        left_out: tensors that are not counted.
    """

    def __init__(self, left_out: Iterable[Tensor]) -> None:
        self.left_out = {storage_key(tensor) for tensor in left_out}
        self.most = 0

    def __enter__(self) -> Self:
        self.sizes: dict[int, int] = {}
        self.hooks = saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
        self.most = max(self.most, sum(self.sizes.values()))

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is kept."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key not in self.left_out and key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)
        return tensor
