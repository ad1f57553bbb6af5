"""Faces at side S as PNG files in uncompressed tar shards, each read by the byte range that the index gives.

Any order costs the same, from a disk or from a bucket. What the other files of a data set hold is in
`ldbfr.data.dataset` and `ldbfr.data.latents`. The PNG files come from `ldbfr.images.encode_image`: at its level 4 a
512 px face takes 344 kB and 27 ms, at level 6 it takes 4 % less in 49 ms, at level 1 4 % more in 15 ms; it is decoded
in 7 ms in each case.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

import numpy as np

from ldbfr import storage
from ldbfr.data.dataset import (
    Dataset,
    IndexRow,
    ShardIndex,
    is_dataset,
    read_dataset,
    read_index,
    write_dataset,
    write_index,
)
from ldbfr.data.index import FaceImages, Faces, Latents, iterate_images
from ldbfr.data.latents import CachedLatents, LatentPart, LatentWriter
from ldbfr.data.ranges import THREADS, Piece, RangeCache, checked_places, in_parallel, read_piece
from ldbfr.errors import InputError, StorageError
from ldbfr.images import decode_image

__all__ = [
    "ShardWriter",
    "ShardedFaces",
    "open_faces",
    "has_split",
    "count_faces",
    # of the modules that this one stands on
    "Dataset",
    "IndexRow",
    "is_dataset",
    "read_dataset",
    "write_dataset",
    "write_index",
    "CachedLatents",
    "LatentPart",
    "LatentWriter",
    "RangeCache",
]

DEFAULT_CACHE_BYTES = 32 * 2**30
"""Room for FFHQ at 512 px, on the disk of every machine that trains from a bucket."""
KEEP_FREE_BYTES = 8 * 2**30
"""What the cache leaves free for checkpoints."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class ShardWriter:
    """Collects faces into one shard; the same faces in the same order give the same bytes.

    Used in a `with` block; without `close`, nothing is written. Waiting faces are in a temporary file ($TMPDIR).

    Args:
        root_uri: of the data set.
        number: of the shard, 0 to 999,999.
    """

    def __init__(self, root_uri: str, number: int) -> None:
        if not 0 <= number <= 999_999:
            raise InputError(f"shard number {number}: expected 0 to 999999; put more faces into a shard")
        self.name = f"shard-{number:06d}.tar"
        self.uri = storage.join(root_uri, "shards", self.name)
        self.rows: list[IndexRow] = []
        self._keys: set[str] = set()
        with self._errors():
            self._file = tempfile.NamedTemporaryFile(prefix="ldbfr-", suffix=".tar")  # noqa: SIM115 (__exit__ closes it)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk, which has been reported
            self._file.close()

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.rows[-1].offset + self.rows[-1].size if self.rows else 0

    def add(self, key: str, png: bytes) -> None:
        """Append a face.

        Raises:
            InputError: the key is not usable or already there, or the bytes are no PNG.
            StorageError: the temporary file cannot be written.
        """
        _check_key(key)
        if key in self._keys:
            raise InputError(f"the key {key!r} is already in {self.name}; give every face its own")
        if not png.startswith(_PNG_SIGNATURE):
            raise InputError(f"{key}: not a PNG file (it starts with {png[:8]!r}); encode the face with encode_image")
        member = tarfile.TarInfo(f"{key}.png")  # its time, owner and mode are the same everywhere
        member.size = len(png)
        header = member.tobuf(tarfile.PAX_FORMAT)
        with self._errors():
            offset = self._file.tell() + len(header)
            self._file.write(header + png + bytes(-len(png) % tarfile.BLOCKSIZE))
        self._keys.add(key)
        self.rows.append(IndexRow(key, self.name, offset, len(png), hashlib.sha256(png).hexdigest()))

    def close(self) -> list[IndexRow]:
        """Put the shard into its place in one step; where each face is. No shard comes of no faces."""
        if self.rows:
            with self._errors():
                self._file.write(bytes(2 * tarfile.BLOCKSIZE))
                self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
                self._file.flush()
            storage.put_file(Path(self._file.name), self.uri)
        return self.rows

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot collect {self.uri} in {tempfile.gettempdir()}: {error.strerror or error}; free some space, or "
                "point TMPDIR at another disk"
            ) from error


def _check_key(key: str) -> None:
    """InputError for a key that is no safe path, or that a reader of tar shards would cut at a dot."""
    parts = key.split("/")
    unsafe = any(part in ("", ".", "..") for part in parts) or not key.isprintable() or "\\" in key
    if unsafe or "." in parts[-1]:
        raise InputError(
            f"key {key!r}: expected a relative path in printable characters, no dot in its last part (webdataset "
            "ends a name there); rename the face"
        )


class Names(Sequence[str]):
    """The keys of a data set, held by Arrow."""

    def __init__(self, keys: Any) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return str(self._keys[place].as_py())


class ShardedFaces:
    """The faces of a prepared data set, as `ldbfr.data.index.Faces`: an index in memory, pixels read when asked for.

    May be used from several threads, and pickled: the index goes along, about 60 bytes a face besides its key.
    """

    def __init__(
        self, root_uri: str, split: str, dataset: Dataset, index: ShardIndex, cache: RangeCache | None, threads: int
    ) -> None:
        self.root_uri, self.split, self.index = root_uri, split, index
        self.cache, self.threads = cache, threads
        self._side, self._digest = dataset.side, dataset.splits[split].digest

    @classmethod
    def open(
        cls, root_uri: str, split: str = "train", cache: RangeCache | None = None, threads: int = THREADS
    ) -> ShardedFaces:
        """Read the index of a split and check it against dataset.json.

        Args:
            root_uri: of the data set.
            split: "train" or "val".
            cache: for a data set in a bucket; one on a disk is read directly.
            threads: that read and decode.

        Raises:
            InputError: no such data set or split, an empty one, or a damaged index.
            StorageError: the place cannot be read.
        """
        dataset = read_dataset(root_uri)
        if split not in dataset.splits:
            found = ", ".join(dataset.splits) or "none"
            raise InputError(f"{root_uri} has no split {split!r}, it has {found}; prepare the data again with that one")
        index = read_index(root_uri, split)
        expected = dataset.splits[split]
        if len(index) != expected.count or index.digest(dataset.side) != expected.digest:
            raise InputError(
                f"the index of {split} at {root_uri} ({len(index):,} faces) is not the one that dataset.json describes "
                f"({expected.count:,} faces, digest {expected.digest[:16]}): it was changed, or is of another "
                "preparation; prepare the data again with jobs/prepare.py"
            )
        if not len(index):
            raise InputError(f"the split {split!r} of {root_uri} holds no face; prepare more images, or another share")
        return cls(root_uri, split, dataset, index, None if storage.is_local(root_uri) else cache, threads)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def side(self) -> int:
        """S, in px."""
        return self._side

    @property
    def names(self) -> Names:
        """The keys."""
        return Names(self.index.keys)

    @property
    def digest(self) -> str:
        """SHA-256 over the side and every key and SHA-256 of the index."""
        return self._digest

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The faces at these places, (n, S, S, 3) uint8 RGB, several read and decoded at once.

        Raises:
            IndexError: there is no such place.
            StorageError: a shard is gone, cut short or holds other bytes.
            InputError: a face is not S x S.
        """
        places, inverse = np.unique(checked_places(indices, len(self)), return_inverse=True)
        faces = np.empty((len(places), self.side, self.side, 3), np.uint8)

        def fill(number: int) -> None:
            faces[number] = self._face(int(places[number]))

        in_parallel(fill, len(places), self.threads)
        return faces[inverse]

    def _face(self, place: int) -> np.ndarray:
        index = self.index
        uri = storage.join(self.root_uri, "shards", index.shards[index.shard_numbers[place]])
        name = f"face {self.names[place]!r}"
        offset, size = int(index.offsets[place]), int(index.sizes[place])
        pixels = decode_image(
            read_piece(Piece(uri, offset, size, index.sha256[place].tobytes(), name), self.cache), name=f"{uri}: {name}"
        )
        if pixels.shape != (self.side, self.side, 3):
            raise InputError(
                f"{uri}: {name} has {pixels.shape[1]} x {pixels.shape[0]} px, expected {self.side} x {self.side} by "
                "dataset.json; prepare the data again with jobs/prepare.py"
            )
        return pixels

    def latents(self, vqgan_digest: str) -> Latents | None:
        """z_0 of every face by that latent VQGAN, where prepared; None, with a warning, if they are of other data."""
        return CachedLatents.find(self.root_uri, self.split, vqgan_digest, self.digest, self.cache, self.threads)


def open_faces(
    sources: Sequence[str], side: int, split: str = "train", cache_bytes: int = DEFAULT_CACHE_BYTES
) -> Faces:
    """The faces to train on: a prepared data set (local or s3://), or folders and archives that fit into memory.

    Args:
        sources: one prepared data set, or any number of local folders, .tar and .zip files.
        side: S, in px; folders and archives are cropped and resized to it.
        split: of a prepared data set; folders and archives have none, and all of them is taken.
        cache_bytes: of local disk for a data set in a bucket, 0 for none.

    Raises:
        InputError: a data set of another side, several of them, or a bucket without one.
        StorageError: a source cannot be read.
    """
    root = _prepared(sources)
    if root is None:
        return FaceImages.load([storage.local_path(source) for source in sources], side)
    dataset = read_dataset(root)
    if dataset.side != side:
        raise InputError(
            f"{root} holds faces at {dataset.side} px, expected {side}; take a preset of that side, or prepare the "
            f"images again with jobs/prepare.py at {side} px"
        )
    cache = None
    if cache_bytes > 0 and split in dataset.splits and not storage.is_local(root):
        cache = RangeCache.of_data(dataset.splits[split].digest, cache_bytes, KEEP_FREE_BYTES)
    return ShardedFaces.open(root, split, cache)


def has_split(source: str, split: str) -> bool:
    """Whether a source is a prepared data set with faces in that split."""
    return is_dataset(source) and split in (splits := read_dataset(source).splits) and splits[split].count > 0


def count_faces(sources: Sequence[str], split: str = "train") -> int:
    """How many faces `open_faces` would give; images of folders and archives are counted without decoding them."""
    root = _prepared(sources)
    if root is None:
        return sum(1 for source in sources for _ in iterate_images(storage.local_path(source)))
    return read_dataset(root).splits[split].count if has_split(root, split) else 0


def _prepared(sources: Sequence[str]) -> str | None:
    """The prepared data set that the sources are, None for local folders and archives; InputError for a mixture."""
    if not sources:
        raise InputError("no data: name a prepared data set, or folders, .tar or .zip files with images")
    for source in sources:
        if is_dataset(source):
            if len(sources) > 1:
                raise InputError(
                    f"{source} is a prepared data set, expected no other source beside it, found {len(sources)}; "
                    "prepare all of the images into one data set with jobs/prepare.py"
                )
            return source
        if not storage.is_local(source):
            raise InputError(
                f"{source} is no prepared data set: there is no dataset.json; images in a bucket are prepared first, "
                "with jobs/prepare.py"
            )
        if any((storage.local_path(source) / "shards").glob("shard-*.tar")):
            raise InputError(f"{source} is an unfinished data set; run the same jobs/prepare.py command to finish it")
    return None
