"""What a prepared data set says of itself: `dataset.json`, and for every split an index of its faces.

dataset.json                written last: side, count and digest of every split, settings of the preparation
index/<split>.parquet       key, shard, offset and size in bytes of the PNG within the shard, its SHA-256
shards/shard-000000.tar     see `ldbfr.data.shards`
latents/                    see `ldbfr.data.latents`
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ldbfr import storage
from ldbfr.errors import InputError, StorageError
from ldbfr.tables import arrow, schema_of

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
DATASET_FILE = "dataset.json"
SHARD_NAME = re.compile(r"shard-\d{6}\.tar")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST_ROWS = 65_536


class IndexRow(NamedTuple):
    """Where a face is."""

    key: str
    """Unique in the data set; the shard's member is `<key>.png`."""
    shard: str
    """Such as "shard-000000.tar"."""
    offset: int
    """First byte of the PNG within the shard."""
    size: int
    """Bytes of the PNG."""
    sha256: str
    """Of the PNG, in hexadecimal."""


@dataclass(frozen=True)
class ShardIndex:
    """The index of a split as arrays, about 60 bytes a face besides its key."""

    keys: pyarrow.StringArray
    shards: tuple[str, ...]
    shard_numbers: np.ndarray
    """(N,) int32, places in `shards`."""
    offsets: np.ndarray
    """(N,) int64."""
    sizes: np.ndarray
    """(N,) int64."""
    sha256: np.ndarray
    """(N, 32) uint8."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def from_table(cls, table: pyarrow.Table) -> ShardIndex:
        """From the columns of IndexRow; ValueError for values that no index has."""
        pa = arrow()
        table = table.select(IndexRow._fields).cast(_schema()).combine_chunks()
        if any(column.null_count for column in table.columns):
            raise ValueError("a value is missing")
        keys, shards, offsets, sizes, digests = (pa.concat_arrays(column.chunks) for column in table.columns)
        places = shards.dictionary_encode()
        names = tuple(places.dictionary.to_pylist())
        digests = digests.to_pylist()
        if wrong := [name for name in names if not SHARD_NAME.fullmatch(name)]:
            raise ValueError(f"{wrong[0]!r} names no shard")
        if wrong := [digest for digest in digests if not _SHA256.fullmatch(digest)]:
            raise ValueError(f"{wrong[0]!r} is no SHA-256")
        index = cls(
            keys,
            names,
            places.indices.to_numpy().astype(np.int32),
            offsets.to_numpy(),
            sizes.to_numpy(),
            np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32),
        )
        if len(index) and (index.offsets.min() < 0 or index.sizes.min() < 1):
            raise ValueError("an offset is negative, or a size not positive")
        return index

    def digest(self, side: int) -> str:
        """SHA-256 over the side and, in order, every key and SHA-256."""
        digest = hashlib.sha256(f"{side}\n".encode())
        for start in range(0, len(self), _DIGEST_ROWS):
            keys = self.keys[start : start + _DIGEST_ROWS].to_pylist()
            hashes = self.sha256[start : start + _DIGEST_ROWS]
            lines = (f"{key}\n{value.tobytes().hex()}\n" for key, value in zip(keys, hashes, strict=True))
            digest.update("".join(lines).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """A split of a data set, as dataset.json describes it."""

    count: int
    digest: str
    """See `ShardIndex.digest`."""


@dataclass(frozen=True)
class Dataset:
    """What dataset.json says."""

    side: int
    """S, in px."""
    splits: dict[str, Split]
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the preparation."""


def is_dataset(uri: str) -> bool:
    """Whether a folder or a place in a bucket holds a prepared data set."""
    return storage.exists(storage.join(uri, DATASET_FILE))


def read_dataset(root_uri: str) -> Dataset:
    """The description of a data set.

    Raises:
        InputError: there is no data set, an unfinished one, or one of another format.
    """
    uri = storage.join(root_uri, DATASET_FILE)
    if not storage.exists(uri):
        raise InputError(
            f"no data set at {root_uri}: there is no {DATASET_FILE}, which is written last; check the place, or "
            "prepare the data (again) with jobs/prepare.py"
        )
    try:
        values = json.loads(storage.read_bytes(uri))
        if (found := values["format"]) != FORMAT:
            raise InputError(f"{uri} is of format {found!r}, expected {FORMAT}; use the version of ldbfr that wrote it")
        splits = {str(name): Split(int(s["count"]), str(s["digest"])) for name, s in values["splits"].items()}
        return Dataset(int(values["side"]), splits, dict(values["settings"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{uri} is damaged ({error!r}); prepare the data again with jobs/prepare.py") from error


def write_dataset(root_uri: str, side: int, splits: Iterable[str], settings: Mapping[str, Any]) -> Dataset:
    """Check that the indexes of the splits fit together and the shards are there, then write dataset.json.

    Args:
        root_uri: of the data set.
        side: S, in px.
        splits: whose indexes are written.
        settings: what else is to be kept, in JSON's types.

    Raises:
        InputError: a key comes twice, or a shard is missing or ends before a face that is said to be in it.
    """
    sizes = {info.key: info.size for info in storage.list_objects(storage.join(root_uri, "shards"))}
    split_of: dict[str, str] = {}
    found: dict[str, Split] = {}
    for split in splits:
        index = read_index(root_uri, split)
        for key in index.keys.to_pylist():
            if key in split_of:
                raise InputError(f"the key {key!r} is in {split_of[key]} and again in {split}; give every face its own")
            split_of[key] = split
        ends = np.zeros(len(index.shards), np.int64)
        np.maximum.at(ends, index.shard_numbers, index.offsets + index.sizes)
        for shard, end in zip(index.shards, ends.tolist(), strict=True):
            if sizes.get(shard, 0) < end:
                raise InputError(
                    f"{storage.join(root_uri, 'shards', shard)} has {sizes.get(shard, 0):,} bytes, expected at least "
                    f"{end:,} by the index of {split}; write the shard again"
                )
        found[split] = Split(len(index), index.digest(side))
    dataset = Dataset(side, found, dict(settings))
    text = json.dumps({"format": FORMAT, **asdict(dataset)}, indent=1, sort_keys=True)
    storage.write_bytes(storage.join(root_uri, DATASET_FILE), text.encode())
    return dataset


def write_index(root_uri: str, split: str, rows: Iterable[IndexRow]) -> None:
    """Write the index of a split; the order of the rows becomes the order of the faces."""
    pa = arrow()
    columns = list(zip(*rows, strict=True)) or [()] * len(IndexRow._fields)
    table = pa.table([list(column) for column in columns], schema=_schema())
    output = BytesIO()
    pa.parquet.write_table(table, output, compression="zstd")
    storage.write_bytes(_index_uri(root_uri, split), output.getvalue())


def read_index(root_uri: str, split: str) -> ShardIndex:
    """The index of a split.

    Raises:
        StorageError: it cannot be read.
        InputError: it is damaged.
    """
    pa = arrow()
    uri = _index_uri(root_uri, split)
    try:
        data = storage.read_bytes(uri)
    except StorageError as error:
        raise StorageError(f"the index of {split} cannot be read: {error}, or prepare the data again") from error
    try:
        return ShardIndex.from_table(pa.parquet.read_table(pa.BufferReader(data)))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{uri} is damaged ({error}), expected {', '.join(IndexRow._fields)}; prepare the data again"
        ) from error


def _schema() -> pyarrow.Schema:
    return schema_of(IndexRow)


def _index_uri(root_uri: str, split: str) -> str:
    if not _SPLIT_NAME.fullmatch(split):
        raise InputError(f"split {split!r}: expected letters, digits, - and _, such as train or val")
    return storage.join(root_uri, "index", f"{split}.parquet")
