"""Memory that does not suffice, on a GPU or a CPU."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised this for want of memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back what torch keeps for later."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
