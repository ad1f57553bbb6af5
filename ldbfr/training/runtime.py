"""What a training process must know about the machines around it: one process, torchrun and Ray Train differ here."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn

from ldbfr.errors import ConfigError


class Runtime(Protocol):
    """The loop's view of where it runs."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the workers."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the workers of a small vector."""

    def report(self, metrics: dict[str, float]) -> None:
        """Hand the metrics of a step on."""

    def should_stop(self) -> bool:
        """Whether to save and leave after this step: Ctrl-C, or a machine about to be taken away."""


class SingleProcess:
    """One process on the CPU or one GPU. The first Ctrl-C asks for a checkpoint and an end, the second ends at once."""

    rank = 0
    world_size = 1

    def __init__(self, device: str | None = None) -> None:
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise ConfigError(f"no device {device!r}: give cpu, cuda, cuda:1, … or mps ({error})") from error
        self._stop = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def mean(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def report(self, metrics: dict[str, float]) -> None:
        """Nobody to tell."""

    def should_stop(self) -> bool:
        """Whether Ctrl-C or a termination signal came."""
        return self._stop
