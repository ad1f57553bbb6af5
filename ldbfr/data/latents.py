"""z_0 of every face and of its mirror image, encoded once by a frozen latent VQGAN and kept beside the shards.

    latents/<first 16 hex of the VQGAN's digest>/<split>/
      latents.json              written last: digests of VQGAN and data, dtype, shape of a latent, parts
      digests.npy               (N, 2, 32) uint8: SHA-256 of the bytes of every latent, by which a read is checked
      part-000000.npy           (n, 2, c, h, w): [unflipped, mirrored] for a run of rows of the index
      part-000000.json          that the part is finished, for whoever writes the rest of them

A latent takes c · h · w · 4 bytes: 197 kB at 512 px with f = 4, which makes 28 GB for the 70,000 faces of FFHQ.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from ldbfr import storage
from ldbfr.data.dataset import read_dataset
from ldbfr.data.ranges import THREADS, Piece, RangeCache, checked_places, in_parallel, read_piece
from ldbfr.errors import InputError, StorageError

log = logging.getLogger(__name__)

LatentType = Literal["float32", "float16"]

LATENTS_FILE = "latents.json"
DIGESTS_FILE = "digests.npy"
FORMAT = 1


@dataclass(frozen=True)
class LatentPart:
    """A file with the latents of the rows `start` to `start + count` of the index."""

    file: str
    start: int
    count: int
    sha256: str
    """Of the whole file."""
    header_bytes: int
    """Before the first latent."""
    shape: tuple[int, int, int]
    """(c, h, w) of a latent."""
    digests: str
    """SHA-256 of each latent in hexadecimal, unflipped and mirrored in turn: 128 characters a face."""


@dataclass(frozen=True)
class LatentsInfo:
    """What latents.json says."""

    vqgan_digest: str
    data_digest: str
    dtype: LatentType
    shape: tuple[int, int, int]
    """(c, h, w) of a latent."""
    digests_sha256: str
    """Of digests.npy."""
    files: tuple[str, ...]
    starts: tuple[int, ...]
    """First face of every file."""
    count: int
    """N, faces in all."""
    header_bytes: tuple[int, ...]

    @classmethod
    def read(cls, folder: str) -> LatentsInfo | None:
        """The description of the latents in a folder; None where there are none, InputError where it is damaged."""
        uri = storage.join(folder, LATENTS_FILE)
        if not storage.exists(uri):
            return None
        try:
            values = json.loads(storage.read_bytes(uri))
            if values["format"] != FORMAT or values["dtype"] not in get_args(LatentType):
                raise ValueError(f"format {values['format']!r}, dtype {values['dtype']!r}")
            channels, height, width = map(int, values["shape"])
            parts = values["parts"]
            return cls(
                str(values["vqgan_digest"]),
                str(values["data_digest"]),
                values["dtype"],
                (channels, height, width),
                str(values["digests_sha256"]),
                tuple(str(part["file"]) for part in parts),
                tuple(int(part["start"]) for part in parts),
                int(parts[-1]["start"]) + int(parts[-1]["count"]),
                tuple(int(part["header_bytes"]) for part in parts),
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{uri} is damaged ({error!r}); delete it and prepare the latents again") from error

    def mismatch(self, vqgan_digest: str, data_digest: str) -> str:
        """Why these latents are not of that VQGAN and those data; empty if they are."""
        for what, found, expected in (
            ("a VQGAN", self.vqgan_digest, vqgan_digest),
            ("data", self.data_digest, data_digest),
        ):
            if found != expected:
                return f"they are of {what} with digest {_short(found)}, expected {_short(expected)}"
        return ""


def _short(digest: str) -> str:
    return f"{digest[:16]}…{digest[-4:]}"


def latents_folder(root_uri: str, split: str, vqgan_digest: str) -> str:
    """Where the latents of a split by a VQGAN are."""
    return storage.join(root_uri, "latents", vqgan_digest[:16], split)


class LatentWriter:
    """Writes the latents of a split, a part at a time, in any order and from any number of processes.

    Args:
        root_uri: of the data set.
        split: whose faces are encoded.
        vqgan_digest: of the latent VQGAN, in hexadecimal.
        data_digest: of the split.
        dtype: "float16" halves the space; a value is then off by up to 0.05 %.
    """

    def __init__(
        self, root_uri: str, split: str, vqgan_digest: str, data_digest: str, dtype: LatentType = "float32"
    ) -> None:
        if len(vqgan_digest) < 16:
            raise InputError(f"VQGAN digest {vqgan_digest!r}: expected a SHA-256 in hexadecimal")
        self.root_uri, self.split, self.dtype = root_uri, split, dtype
        self.vqgan_digest, self.data_digest = vqgan_digest, data_digest
        self.folder = latents_folder(root_uri, split, vqgan_digest)

    def write_part(self, number: int, start: int, latents: np.ndarray) -> LatentPart:
        """Write the latents (n, 2, c, h, w), [unflipped, mirrored], of the faces from `start` on as one file.

        It is held twice in memory: 256 faces at 512 px make 200 MB.

        Raises:
            InputError: another shape, or values that are not finite in the dtype.
            StorageError: the file cannot be written.
        """
        if latents.ndim != 5 or latents.shape[1] != 2 or not len(latents):
            raise InputError(f"latents are {latents.shape}, expected (n, 2, c, h, w), unflipped and mirrored")
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused
            values = np.ascontiguousarray(latents, dtype=np.dtype(self.dtype).newbyteorder("<"))
        if not np.isfinite(values).all():
            raise InputError(
                f"latents of the faces from {start} on are not all finite in {self.dtype}; look for NaN in the VQGAN's "
                "weights, or write float32"
            )
        output = BytesIO()
        np.save(output, values)
        data = output.getvalue()
        digests = "".join(hashlib.sha256(latent).hexdigest() for face in values for latent in face)
        name, shape = f"part-{number:06d}.npy", (values.shape[2], values.shape[3], values.shape[4])
        header = len(data) - values.nbytes
        part = LatentPart(name, start, len(values), hashlib.sha256(data).hexdigest(), header, shape, digests)
        storage.delete(self._record_uri(number))  # the old one would vouch for the new file
        storage.write_bytes(storage.join(self.folder, name), data)
        record = {**asdict(part), **self._origin()}
        storage.write_bytes(self._record_uri(number), json.dumps(record, sort_keys=True).encode())
        return part

    def find_part(self, number: int) -> LatentPart | None:
        """A part that an earlier process finished, of the same data, VQGAN and dtype; None where there is none."""
        uri = self._record_uri(number)
        if not storage.exists(uri) or not storage.exists(storage.join(self.folder, f"part-{number:06d}.npy")):
            return None
        try:
            record = json.loads(storage.read_bytes(uri))
            if any(record.pop(name) != value for name, value in self._origin().items()):
                return None
            part = LatentPart(**record)
            return replace(part, shape=(part.shape[0], part.shape[1], part.shape[2]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{uri} is damaged ({error!r}); delete it to have the part written again") from error

    def finish(self, parts: Iterable[LatentPart]) -> None:
        """Describe the parts; from here on the latents exist.

        Raises:
            InputError: the parts do not cover the split, each face once, or the data set has changed meanwhile.
            StorageError: a part is not there.
        """
        parts = sorted(parts, key=lambda part: part.start)
        split = read_dataset(self.root_uri).splits.get(self.split)
        if split is None or split.digest != self.data_digest:
            raise InputError(f"the split {self.split!r} of {self.root_uri} was prepared anew; encode it again")
        _check_cover(parts, split.count, self.folder)
        there = {info.key for info in storage.list_objects(self.folder)}
        if missing := [part.file for part in parts if part.file not in there]:
            raise StorageError(f"{storage.join(self.folder, missing[0])} is gone; encode the part again")
        output = BytesIO()
        np.save(output, np.frombuffer(bytes.fromhex("".join(p.digests for p in parts)), np.uint8).reshape(-1, 2, 32))
        storage.write_bytes(storage.join(self.folder, DIGESTS_FILE), output.getvalue())
        about = {
            "format": FORMAT,
            **self._origin(),
            "shape": parts[0].shape,
            "digests_sha256": hashlib.sha256(output.getvalue()).hexdigest(),
            "parts": [
                {name: value for name, value in asdict(part).items() if name not in ("shape", "digests")}
                for part in parts
            ],
        }
        storage.write_bytes(storage.join(self.folder, LATENTS_FILE), json.dumps(about, indent=1).encode())

    def _origin(self) -> dict[str, str]:
        return {"vqgan_digest": self.vqgan_digest, "data_digest": self.data_digest, "dtype": self.dtype}

    def _record_uri(self, number: int) -> str:
        return storage.join(self.folder, f"part-{number:06d}.json")


def _check_cover(parts: Sequence[LatentPart], count: int, folder: str) -> None:
    """InputError unless the parts, in order, hold each of `count` faces once, in one shape."""
    edges = [0, *(part.start + part.count for part in parts)]
    for part, expected in zip(parts, edges, strict=False):
        if part.start != expected:
            raise InputError(f"{part.file} in {folder} starts at face {part.start}, expected {expected}; encode again")
    if edges[-1] != count or not parts:
        raise InputError(f"the parts in {folder} hold {edges[-1]} faces, expected {count}; encode the rest")
    for one, other in pairwise(parts):
        if one.shape != other.shape:
            raise InputError(f"{other.file} in {folder} has latents of {other.shape}, expected {one.shape}")


class CachedLatents:
    """The latents of a split, as `ldbfr.data.index.Latents`; pickled with 64 bytes a face. See `open`."""

    def __init__(
        self, folder: str, info: LatentsInfo, digests: np.ndarray, cache: RangeCache | None, threads: int
    ) -> None:
        self.folder, self.info, self.digests = folder, info, digests
        self.cache, self.threads = cache, threads

    @classmethod
    def open(
        cls,
        root_uri: str,
        split: str,
        vqgan_digest: str,
        data_digest: str,
        cache: RangeCache | None = None,
        threads: int = THREADS,
    ) -> CachedLatents:
        """The latents that this VQGAN made of these data.

        Args:
            root_uri: of the data set.
            split: whose latents.
            vqgan_digest: of the latent VQGAN, in hexadecimal.
            data_digest: of the split.
            cache: for a data set in a bucket; one on a disk is read directly.
            threads: that read.

        Raises:
            InputError: there are none, they were made by another VQGAN or of other data, or their index is damaged.
            StorageError: the place cannot be read.
        """
        folder = latents_folder(root_uri, split, vqgan_digest)
        info = LatentsInfo.read(folder)
        if info is None:
            raise InputError(f"no latents in {folder}: there is no {LATENTS_FILE}; prepare them with jobs/prepare.py")
        if reason := info.mismatch(vqgan_digest, data_digest):
            raise InputError(f"the latents in {folder} do not fit: {reason}; prepare them again with jobs/prepare.py")
        digests = _read_digests(storage.join(folder, DIGESTS_FILE), info)
        return cls(folder, info, digests, None if storage.is_local(root_uri) else cache, threads)

    @classmethod
    def find(
        cls,
        root_uri: str,
        split: str,
        vqgan_digest: str,
        data_digest: str,
        cache: RangeCache | None = None,
        threads: int = THREADS,
    ) -> CachedLatents | None:
        """As `open`, but None where there are no latents, and with a warning where they do not fit."""
        folder = latents_folder(root_uri, split, vqgan_digest)
        info = LatentsInfo.read(folder)
        if info is None:
            return None
        if reason := info.mismatch(vqgan_digest, data_digest):
            log.warning(
                "the latents in %s are not used: %s. Faces are encoded while training, which is slower; prepare the "
                "latents again with jobs/prepare.py",
                folder,
                reason,
            )
            return None
        return cls.open(root_uri, split, vqgan_digest, data_digest, cache, threads)

    def __len__(self) -> int:
        return self.info.count

    def read(self, indices: Sequence[int] | np.ndarray, flips: Sequence[bool] | np.ndarray) -> np.ndarray:
        """z_0 of these faces, mirrored where `flips` says so, (n, c, S/F, S/F) float32; one byte range each.

        Raises:
            IndexError: there is no such face.
            StorageError: a part is gone, cut short or holds other bytes.
        """
        places = checked_places(indices, len(self))
        mirrored = np.asarray(flips, dtype=bool).reshape(-1)
        if len(mirrored) != len(places):
            raise ValueError(f"{len(mirrored)} flips for {len(places)} indices, expected one each")
        latents = np.empty((len(places), *self.info.shape), np.float32)

        def fill(number: int) -> None:
            latents[number] = self._latent(int(places[number]), bool(mirrored[number]))

        in_parallel(fill, len(places), self.threads)
        return latents

    def _latent(self, place: int, mirrored: bool) -> np.ndarray:
        info = self.info
        part = bisect_right(info.starts, place) - 1
        kind = np.dtype(info.dtype).newbyteorder("<")
        size = math.prod(info.shape) * kind.itemsize
        offset = info.header_bytes[part] + (2 * (place - info.starts[part]) + mirrored) * size
        name = f"latent of face {place}{' mirrored' if mirrored else ''}"
        uri = storage.join(self.folder, info.files[part])
        data = read_piece(Piece(uri, offset, size, self.digests[place, int(mirrored)].tobytes(), name), self.cache)
        return np.frombuffer(data, kind).reshape(info.shape)


def _read_digests(uri: str, info: LatentsInfo) -> np.ndarray:
    """SHA-256 of every latent, (N, 2, 32) uint8."""
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() == info.digests_sha256:
        digests: np.ndarray = np.load(BytesIO(data), allow_pickle=False)
        if digests.shape == (info.count, 2, 32):
            return digests
    raise InputError(f"{uri} is not the one that {LATENTS_FILE} describes; prepare the latents again")
