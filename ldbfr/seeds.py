"""Seeds derived from what is drawn and where, so that no draw depends on the order or the place of the work."""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a seed alone needs no torch, whose import takes seconds
    import torch
    from torch import Tensor


def derive_seed(*what: int | str | bytes) -> int:
    """A 63-bit seed that is a function of its arguments alone, the same on every machine and Python version."""
    digest = hashlib.blake2b(digest_size=8)
    for part in what:
        if not isinstance(part, str | bytes):
            part = operator.index(part)  # numpy's integers are the same numbers
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{type(part).__name__}:{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*what: int | str | bytes) -> torch.Generator:
    """A CPU generator seeded with `derive_seed(*what)`; CPU, so that every device sees the same draws."""
    import torch

    return torch.Generator().manual_seed(derive_seed(*what))


def normal_per_sample(seeds: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """Standard normal noise (len(seeds), *shape) on the CPU; a sample's noise depends on its own seed alone."""
    import torch

    return torch.stack([torch.randn(shape, generator=generator(int(seed), what)) for seed in seeds])


def uniform_per_sample(seeds: Tensor, what: str) -> Tensor:
    """One uniform number in [0, 1) for every seed, (len(seeds),) float64."""
    import torch

    return torch.stack([torch.rand((), generator=generator(int(seed), what), dtype=torch.float64) for seed in seeds])
