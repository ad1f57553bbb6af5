"""Codebook health: how many codes are in use, and new life for those that are not.

Without revival a codebook collapses to a handful of codes within the first hundred steps (docs/training-log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ldbfr.models.vqgan import Codebook
from ldbfr.seeds import generator

Sum = Callable[[Tensor], Tensor]
"""The sum of a tensor over the workers; a single worker's is the tensor itself."""


class CodebookHealth(nn.Module):
    """Counts how often each code is chosen, and replaces the codes that nobody chose.

    Args:
        num_codes: K.
    """

    counts: Tensor
    """Choices of every code since the last revival by all workers, (K,) float64."""
    pending: Tensor
    """Choices by this worker that `settle` has not added yet, (K,) float64."""

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.float64))
        self.register_buffer("pending", torch.zeros(num_codes, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def observe(self, code_indices: Tensor) -> None:
        """Note the choices of a part of a batch, (B, h, w)."""
        self.pending += torch.bincount(code_indices.flatten(), minlength=len(self.pending)).to(self.pending)

    @torch.no_grad()
    def settle(self, sum_over_workers: Sum) -> None:
        """Add what all workers have observed; every worker calls it at the same step."""
        self.counts += sum_over_workers(self.pending)
        self.pending.zero_()

    def perplexity(self) -> Tensor:
        """exp of the entropy of the choices: K when all codes are chosen equally often, 1 when one is."""
        share = self.counts / self.counts.sum().clamp(min=1)
        return torch.exp(-(share * share.clamp(min=1e-12).log()).sum())

    def dead(self) -> Tensor:
        """Which codes nobody chose, (K,) bool."""
        return self.counts == 0

    @torch.no_grad()
    def revive(self, codebook: Codebook, features: Tensor) -> int:
        """Move every dead code onto a feature, and start counting anew.

        Args:
            codebook: changed in place.
            features: one for every dead code, (number of dead codes, C), see `draw_features`.

        Returns:
            How many codes were moved.
        """
        dead = self.dead().nonzero().flatten()
        codebook.embedding.weight[dead] = features.to(codebook.embedding.weight)
        self.counts.zero_()
        return len(dead)


@torch.no_grad()
def draw_features(
    parts: Iterable[tuple[Tensor, Tensor]], num: int, batch_size: int, seed: int, sum_over_workers: Sum
) -> Tensor:
    """Features drawn from the global batch, the same however it was divided.

    Args:
        parts: this worker's (encoder outputs (B, C, h, w), their places in the global batch (B,)).
        num: how many.
        batch_size: of the global batch.
        seed: of the draw.
        sum_over_workers: every drawn feature lies with one worker, the others add zeros.

    Returns:
        (num, C) float32.
    """
    parts = list(parts)
    channels, height, width = parts[0][0].shape[1:]
    cells = height * width
    drawn = torch.randint(batch_size * cells, (num,), generator=generator(seed, "revive"))
    features = torch.zeros(num, channels, device=parts[0][0].device)
    for outputs, places in parts:
        flat = outputs.float().permute(0, 2, 3, 1).flatten(1, 2)  # (B, h·w, C)
        for image, place in enumerate(places.tolist()):
            wanted = (drawn // cells == place).nonzero().flatten()
            features[wanted] = flat[image, (drawn[wanted] % cells).to(flat.device)]
    return sum_over_workers(features)
