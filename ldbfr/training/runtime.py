"""What a training process must know about the machines around it: one process, torchrun and Ray Train differ here."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldbfr.errors import ConfigError


class Request(IntEnum):
    """What the surroundings ask of the loop after a step; the greatest one that any worker hears counts."""

    NONE = 0
    SAVE = 1
    """A machine is about to be taken away: save a checkpoint now, and go on."""
    STOP = 2
    """Save a checkpoint and leave: Ctrl-C, or a termination signal."""


class Runtime(Protocol):
    """The loop's view of where it runs."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with the gradients of its parameters that require one averaged over the workers."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the workers, the same on each; every worker must call it."""

    def request(self, step: int) -> Request:
        """What this worker hears after a step; every worker calls it."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Hand the metrics of a finished step on; every worker calls it."""

    def saved(self, step: int) -> None:
        """A checkpoint is whole and in its place. Called on the first worker, from the thread that wrote it."""

    def close(self) -> None:
        """The training of a stage is over: wait for what `saved` started."""


class SingleProcess:
    """One process on the CPU or one GPU. The first Ctrl-C asks for a checkpoint and an end, the second ends at once."""

    rank = 0
    world_size = 1

    def __init__(self, device: str | None = None) -> None:
        self.device = find_device(device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes stay the same: the fastest kernels are worth looking for
        self.signals = Signals()
        self.check: Callable[[], None] = lambda: None
        """Called after every step; raises when the run must not go on, as when its lock was lost."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def request(self, step: int) -> Request:
        """STOP after Ctrl-C or a termination signal."""
        self.check()
        return Request.STOP if self.signals.stop else Request.NONE

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Nobody to tell."""

    def saved(self, step: int) -> None:
        """Nobody to tell."""

    def close(self) -> None:
        """Nothing to wait for."""


class DistributedRuntime(SingleProcess):
    """One worker of several, through torch.distributed: NCCL between GPUs, Gloo between CPUs.

    The process group is the one that is there (Ray Train makes it), or is made from torchrun's environment.
    """

    def __init__(self, device: str | None = None) -> None:
        if device == "cuda" or (device is None and torch.cuda.is_available()):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        super().__init__(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module in DistributedDataParallel. Its buffers are the stage's own affair."""
        devices = [self.device.index] if self.device.type == "cuda" else None
        # torch renamed the argument in 2.13
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **options)

    def sum(self, values: Tensor) -> Tensor:
        """An all-reduce."""
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)


def single_or_torchrun(device: str | None) -> SingleProcess:
    """The runtime of this process: one of torchrun's workers, or alone."""
    return DistributedRuntime(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SingleProcess(device)


def find_device(device: str | None) -> torch.device:
    """A device by name; the GPU where there is one.

    Raises:
        ConfigError: torch knows no such device.
    """
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"no device {device!r}: give cpu, cuda, cuda:1, … or mps ({error})") from error


class Signals:
    """Hears Ctrl-C and termination; outside of the main thread, where Python hears none, it stays silent."""

    def __init__(self) -> None:
        self.stop = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.hear)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; the second has its usual effect."""
        self.stop = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
