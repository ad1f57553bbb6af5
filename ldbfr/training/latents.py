"""The latents of a data set, encoded once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldbfr.data.index import Faces
from ldbfr.images import to_float
from ldbfr.models.vqgan import VQGAN


@torch.no_grad()
def encode_all(
    vqgan: VQGAN, images: Faces, device: torch.device, rows: range, flip: bool = False, batch_size: int = 64
) -> Tensor:
    """z_0 of many images in batches of a fixed size: N rows of the data set -> (N, c, S/F, S/F) float32 on the CPU."""
    latents = []
    for start in range(0, len(rows), batch_size):
        pixels = images.read(rows[start : start + batch_size])
        batch = to_float(pixels[:, :, ::-1].copy() if flip else pixels)
        latents.append(vqgan.to_latents(batch.to(device)).float().cpu())
    return torch.cat(latents)


class LatentsInMemory:
    """Frozen latents of a data set and of its mirror images.

    Args:
        values: (2, N, c, S/F, S/F) float32, as they are and mirrored.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.numpy()

    @classmethod
    def encode(cls, vqgan: VQGAN, images: Faces, device: torch.device) -> LatentsInMemory:
        """Encode a data set."""
        rows = range(len(images))
        return cls(torch.stack([encode_all(vqgan, images, device, rows, flip) for flip in (False, True)]))

    def read(self, indices: Sequence[int] | np.ndarray, flips: Sequence[bool] | np.ndarray) -> np.ndarray:
        """z_0 of these faces, mirrored where `flips` says so, (n, c, S/F, S/F) float32."""
        latents: np.ndarray = self.values[np.asarray(flips, dtype=np.int64), np.asarray(indices, dtype=np.int64)]
        return latents
