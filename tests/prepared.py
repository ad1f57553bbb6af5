"""A prepared data set of blob faces for tests, in a folder or in a bucket."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from ldbfr.data.dataset import Dataset, IndexRow, write_dataset, write_index
from ldbfr.data.shards import ShardWriter
from ldbfr.images import encode_image
from tests.tiny import SIDE, blob_faces

KEYS = ("plain", "with space", "grün/日本語", "deep/folder.v2/face", "x" * 150, "quote'\"<>", "+plus&=%", "eighth")
"""Names that are awkward in a tar, in a URI, or in both."""


def write_shards(root: str, pixels: np.ndarray, keys: tuple[str, ...], per_shard: int = 3) -> list[IndexRow]:
    """Faces in shards; the rows of their index."""
    rows = []
    for number, start in enumerate(range(0, len(keys), per_shard)):
        with ShardWriter(root, number) as shard:
            for key, face in zip(keys[start : start + per_shard], pixels[start : start + per_shard], strict=True):
                shard.add(key, encode_image(face, "png"))
            rows += shard.close()
    return rows


def write_set(root: str, splits: Mapping[str, int] | None = None, side: int = SIDE) -> tuple[np.ndarray, Dataset]:
    """Write a whole data set of eight faces, the splits one after the other; its pixels and its description."""
    pixels = blob_faces(len(KEYS), side)
    rows = write_shards(root, pixels, KEYS)
    start = 0
    splits = splits or {"train": len(KEYS)}
    for split, count in splits.items():
        write_index(root, split, rows[start : start + count])
        start += count
    return pixels, write_dataset(root, side, splits, {"source": "blobs"})


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write files beyond a size, which is how a full disk looks to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
