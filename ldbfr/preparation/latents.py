"""Encode every face of a data set, and its mirror image, with the frozen latent VQGAN: a part of the set at a time.

A part's latents are a function of its faces and the network: batches start where the part does, and always have the
same size. So it does not matter who encodes which part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ldbfr.data.dataset import read_dataset
from ldbfr.data.index import Faces
from ldbfr.data.latents import LatentPart, LatentsInfo, LatentType, LatentWriter, latents_folder
from ldbfr.errors import ConfigError, InputError
from ldbfr.images import to_float

if TYPE_CHECKING:  # those who write shards, and come by here, do without the networks, whose import takes seconds
    from ldbfr.models.vqgan import VQGAN

PART_FACES = 256
"""Faces of a part: 100 MB of float32 latents at 512 px."""
BATCH_SIZE = 16
"""Faces encoded at a time. Fixed, since sums come out differently in the last bit for another."""


@dataclass(frozen=True)
class LatentRequest:
    """The latents of one split.

    Args:
        root_uri: of the data set.
        split: whose faces are encoded.
        vqgan_digest: of the latent VQGAN.
        data_digest: of the split.
        count: N, its faces.
        dtype: of the latents on disk.
    """

    root_uri: str
    split: str
    vqgan_digest: str
    data_digest: str
    count: int
    dtype: LatentType

    def writer(self) -> LatentWriter:
        """Writes the parts."""
        return LatentWriter(self.root_uri, self.split, self.vqgan_digest, self.data_digest, self.dtype)

    @property
    def num_parts(self) -> int:
        """Parts, done or not."""
        return -(-self.count // PART_FACES)

    def places(self, number: int) -> range:
        """The faces of a part."""
        return range(number * PART_FACES, min((number + 1) * PART_FACES, self.count))

    def is_finished(self) -> bool:
        """Whether the latents are there.

        Raises:
            ConfigError: they are, in another precision.
        """
        folder = latents_folder(self.root_uri, self.split, self.vqgan_digest)
        info = LatentsInfo.read(folder)
        if info is None or info.mismatch(self.vqgan_digest, self.data_digest):
            return False
        if info.dtype != self.dtype:
            raise ConfigError(
                f"{folder} holds the latents in {info.dtype}, expected {self.dtype}; delete that folder to have them "
                "written again, or ask for the precision that is there"
            )
        return True


def latent_requests(root_uri: str, side: int, vqgan_digest: str, dtype: LatentType) -> list[LatentRequest]:
    """What has to be encoded of a data set: its splits, but empty ones.

    Args:
        root_uri: of the data set.
        side: S of the VQGAN's preset, in px.
        vqgan_digest: of the latent VQGAN.
        dtype: of the latents on disk.

    Raises:
        InputError: there is no data set, or one of another side.
    """
    dataset = read_dataset(root_uri)
    if dataset.side != side:
        raise InputError(
            f"{root_uri} holds faces at {dataset.side} px, but the VQGAN was trained at {side}; prepare the images at "
            "that side, or give a run of the other"
        )
    return [
        LatentRequest(root_uri, name, vqgan_digest, split.digest, split.count, dtype)
        for name, split in dataset.splits.items()
        if split.count
    ]


@torch.no_grad()
def encode_faces(vqgan: VQGAN, faces: np.ndarray) -> np.ndarray:
    """z_0 of faces and of their mirror images: (n, S, S, 3) uint8 -> (n, 2, c, S/F, S/F) float32, as arrays."""
    device = next(vqgan.parameters()).device
    encoded = []
    for start in range(0, len(faces), BATCH_SIZE):
        batch = faces[start : start + BATCH_SIZE]
        sides = [vqgan.to_latents(to_float(pixels).to(device)) for pixels in (batch, batch[:, :, ::-1])]
        encoded.append(torch.stack(sides, dim=1).float().cpu().numpy())
    return np.concatenate(encoded)


def encode_part(vqgan: VQGAN, faces: Faces, request: LatentRequest, number: int) -> LatentPart:
    """Encode one part and write it; nothing is done where an earlier process finished it.

    Raises:
        StorageError: the shards cannot be read, or the part not written.
        InputError: the latents are not finite.
    """
    writer = request.writer()
    if (known := writer.find_part(number)) is not None:
        return known
    places = request.places(number)
    latents = [
        encode_faces(vqgan, faces.read(range(start, min(start + BATCH_SIZE, places.stop))))
        for start in range(places.start, places.stop, BATCH_SIZE)
    ]
    return writer.write_part(number, places.start, np.concatenate(latents))


def finish_latents(request: LatentRequest, parts: Sequence[LatentPart]) -> None:
    """Describe the parts of a split; from here on the latents exist."""
    request.writer().finish(parts)
