"""Codebook health: how many codes are in use, and new life for those that are not.

Without revival a codebook collapses to a handful of codes within the first hundred steps (docs/training-log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldbfr.models.vqgan import Codebook
from ldbfr.seeds import generator


class CodebookHealth(nn.Module):
    """Counts how often each code is chosen, and replaces the codes that nobody chose.

    Args:
        num_codes: K.
    """

    counts: Tensor
    """Choices of every code since the last revival, (K,) float64."""

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, code_indices: Tensor) -> None:
        """Add the choices of a batch, (B, h, w)."""
        self.counts += torch.bincount(code_indices.flatten(), minlength=len(self.counts)).to(self.counts)

    def perplexity(self) -> Tensor:
        """exp of the entropy of the choices: K when all codes are chosen equally often, 1 when one is."""
        share = self.counts / self.counts.sum().clamp(min=1)
        return torch.exp(-(share * share.clamp(min=1e-12).log()).sum())

    def dead(self) -> Tensor:
        """Which codes nobody chose, (K,) bool."""
        return self.counts == 0

    @torch.no_grad()
    def revive(self, codebook: Codebook, features: Tensor, seed: int) -> int:
        """Move every dead code onto a feature drawn from the batch, and start counting anew.

        Args:
            codebook: changed in place.
            features: encoder outputs before quantisation, (B, C, h, w).
            seed: of the draw.

        Returns:
            How many codes were moved.
        """
        dead = self.dead().nonzero().flatten()
        flat = features.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # (B·h·w, C)
        chosen = torch.randint(len(flat), (len(dead),), generator=generator(seed, "revive")).to(flat.device)
        codebook.embedding.weight[dead] = flat[chosen].to(codebook.embedding.weight)
        self.counts.zero_()
        return len(dead)
