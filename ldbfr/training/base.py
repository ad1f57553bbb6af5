"""What a training stage is to the loop (`loop.py`); the stages themselves are in `stages.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ldbfr.config import Preset, StageSettings
from ldbfr.data.index import Faces, Latents
from ldbfr.data.sampler import Batch, NoiseDraw
from ldbfr.errors import WeightsError
from ldbfr.training.codebook import Sum

CADENCE = ("checkpoint_every", "keep_checkpoints", "keep_best", "log_every", "images_every")
"""Settings that may differ between a run and its continuation."""

Losses = dict[str, Tensor]
Networks = dict[str, ModelMixin]


class Stage(nn.Module):
    """What a stage is to the loop.

    `forward(objective, batch, step)` gives the losses of one objective; the entry "loss" is minimised, the others are
    logged. Everything in it is a mean over the batch, so that parts of a batch can be weighted by their sizes.
    `sections` are the parts of the preset, besides its own training settings, that decide what it learns.
    `noise` draws what the stage wants drawn along with its images, which takes it off the training's own time.
    `score` is the metric of the validation by which checkpoints are compared, and whether more is better.
    """

    name: ClassVar[str]
    sections: ClassVar[tuple[str, ...]]
    network_class: ClassVar[type[ModelMixin]]
    score: ClassVar[tuple[str, Literal["max", "min"]]] = ("psnr", "max")
    upstream: ClassVar[tuple[str, ...]] = ()
    uses_lq: ClassVar[bool] = False
    noise: NoiseDraw | None = None

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        self.sum_over_workers: Sum = lambda values: values
        """What must be known of the whole global batch goes through here, on every worker at the same step."""

    @property
    def settings(self) -> StageSettings:
        """The stage's own settings."""
        return cast(StageSettings, getattr(self.preset.training, self.name))

    @classmethod
    def fixed_settings(cls, preset: Preset) -> dict[str, Any]:
        """Every setting that a continued run must share with its beginning, by dotted name."""
        values = preset.model_dump(mode="json")
        own = flatten({section: values[section] for section in cls.sections})
        training = {"seed": values["training"]["seed"], cls.name: values["training"][cls.name]}
        settings = own | flatten({"training": training})
        return {key: value for key, value in settings.items() if key.rpartition(".")[2] not in CADENCE}

    @classmethod
    def check_same_run(
        cls, preset: Preset, upstream: Mapping[str, str], state: Mapping[str, Any], checkpoint: str | Path
    ) -> None:
        """Refuse a checkpoint of another stage, of other settings, or on other networks and data.

        Args:
            preset, upstream: of now.
            state: the checkpoint's `state.json`.
            checkpoint: its name in the error.

        Raises:
            WeightsError: listing what differs.
        """
        if state["stage"] != cls.name:
            raise WeightsError(f"{checkpoint} is of stage {state['stage']!r}, not {cls.name!r}: choose another --run")
        differing = [
            f"{key}: {state['settings'].get(key)!r} there, {value!r} now"
            for key, value in cls.fixed_settings(preset).items()
            if state["settings"].get(key) != value
        ]
        differing += [
            f"upstream {name}: {state['upstream'].get(name)} there, {digest} now"
            for name, digest in upstream.items()
            if state["upstream"].get(name) != digest
        ]
        if differing:
            raise WeightsError(
                f"{checkpoint} was trained with other settings ({'; '.join(differing)}); "
                f"give them again, or choose another --run"
            )

    @property
    def network(self) -> ModelMixin:
        """The network that the stage produces, saved as `networks/<stage>`."""
        raise NotImplementedError

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of every objective, each with an optimiser of its own; the first is the network's."""
        return {"generator": [p for p in self.network.parameters() if p.requires_grad]}

    def start_from(self, network: ModelMixin) -> None:
        """Take over the weights of a network of the same shape, instead of a fresh start."""
        self.network.load_state_dict(network.state_dict())

    def extras(self) -> dict[str, nn.Module]:
        """Modules beside the network whose state a resumed run needs."""
        return {}

    def rate(self, objective: str) -> float:
        """An objective's learning rate, as a multiple of the stage's."""
        return 1.0

    def active(self, objective: str, step: int) -> bool:
        """Whether an objective is trained at a step."""
        return True

    def forward(self, objective: str, batch: Batch, step: int) -> Losses:
        """The losses of an objective."""
        raise NotImplementedError

    def prepare(self, images: Faces, device: torch.device, upstream: Mapping[str, str]) -> Latents | None:
        """Work on the whole data set before the first step; gives the frozen latents of a stage that trains on them.

        `upstream` are the digests of the networks that the stage builds on.
        """
        return None

    def before_step(self, parts: Sequence[Batch], step: int) -> None:
        """Work on all of a worker's batch, in the parts in which its gradient is accumulated."""

    def after_step(self, step: int) -> dict[str, float]:
        """Work after the optimisers' step; returns what to log."""
        return {}

    def finish(self, images: Faces, device: torch.device) -> None:
        """Work on the whole data set after the last step."""

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures to look at, by title, each (B, 3, S, S)."""
        raise NotImplementedError


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted name: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def freeze(network: nn.Module) -> nn.Module:
    """The network with no gradients and in evaluation mode."""
    return network.requires_grad_(False).eval()
