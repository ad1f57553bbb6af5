"""Copies on the host of what a checkpoint holds, so that it is written while the training goes on."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """One step's state, apart from the training: networks by folder name, `training.pt`, `state.json`."""

    networks: Mapping[str, ModelMixin]
    training: dict[str, Any]
    state: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Put the files of a checkpoint into a folder."""
        for name, network in self.networks.items():
            network.save_pretrained(folder / name)
        torch.save(self.training, folder / "training.pt")
        (folder / "state.json").write_text(json.dumps(self.state, indent=1), "utf-8")


class HostNetworks:
    """Copies of a network on the host, made once and filled again for every checkpoint."""

    def __init__(self) -> None:
        self.copies: dict[str, ModelMixin] = {}

    @torch.no_grad()
    def fill(self, name: str, network: ModelMixin, averages: Mapping[str, Tensor] | None = None) -> ModelMixin:
        """The copy of that name, brought up to date; with averages, by parameter, in the place of what they average."""
        if name not in self.copies:
            self.copies[name] = copy.deepcopy(network).to("cpu").requires_grad_(False)
        held = self.copies[name]
        held.load_state_dict({**network.state_dict(), **(averages or {})})
        held.register_to_config(**{key: value for key, value in network.config.items() if not key.startswith("_")})
        return held


def on_host(value: Any) -> Any:
    """A copy of nested dictionaries and lists with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(item) for item in value)
    return value
