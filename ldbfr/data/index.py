"""Find the images of a data set and hold them, decoded, at the model's side.

A source is a folder (searched at any depth), a tar or a zip file, or a list of these. Images are ordered by name, so
that an index means the same image on every machine.
"""

from __future__ import annotations

import hashlib
import logging
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ldbfr.errors import InputError
from ldbfr.images import IMAGE_SUFFIXES, decode_image, fit_to_side

log = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def iterate_images(source: str | Path) -> Iterator[tuple[str, bytes]]:
    """Every image of a folder, tar or zip, as (name, encoded bytes), ordered by name within each archive.

    A folder's archives are opened too; a name is `relative/path` or `archive.tar/member`.

    Raises:
        InputError: the source does not exist or is neither a folder nor an archive, or an archive is damaged.
    """
    path = Path(source)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            relative = file.relative_to(path).as_posix()
            if file.is_dir():
                continue
            if not file.exists():
                log.warning("left out of the data: %s is a link to nothing", file)
            elif file.suffix.lower() in IMAGE_SUFFIXES:
                yield relative, file.read_bytes()
            elif file.name.lower().endswith((*TAR_SUFFIXES, ".zip")):
                yield from ((f"{relative}/{name}", data) for name, data in iterate_images(file))
    elif path.name.lower().endswith(TAR_SUFFIXES) and path.is_file():
        yield from tar_images(path)
    elif path.suffix.lower() == ".zip" and path.is_file():
        yield from zip_images(path)
    else:
        raise InputError(f"{path}: expected a folder, a .tar or a .zip with images")


def tar_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """The images of a tar file, by name."""
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                if member.isfile() and member.name.lower().endswith(tuple(IMAGE_SUFFIXES)):
                    stream = archive.extractfile(member)
                    assert stream is not None  # a regular file always has one
                    yield member.name, stream.read()
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} is not a readable tar file ({error}); copy it again or leave it out") from error


def zip_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """The images of a zip file, by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.lower().endswith(tuple(IMAGE_SUFFIXES)):
                    yield name, archive.read(name)
    except (zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: an encrypted member
        raise InputError(f"{path} is not a readable zip file ({error}); copy it again or leave it out") from error


class Faces(Protocol):
    """A set of aligned faces at side S, in a fixed order: in memory (`FaceImages`) or in shards (`ShardedFaces`)."""

    @property
    def side(self) -> int:
        """S, in px."""

    @property
    def names(self) -> Sequence[str]:
        """One name for every face."""

    @property
    def digest(self) -> str:
        """SHA-256 of what the set holds, in order: equal data, equal digest."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The faces at these places, (n, S, S, 3) uint8 RGB, an array of the caller's own."""

    def latents(self, vqgan_digest: str) -> Latents | None:
        """z_0 of every face as that latent VQGAN encodes it, where they were prepared; None where they were not."""


class Latents(Protocol):
    """Frozen latents of a set of faces and of their mirror images."""

    def read(self, indices: Sequence[int] | np.ndarray, flips: Sequence[bool] | np.ndarray) -> np.ndarray:
        """z_0 of these faces, mirrored where `flips` says so, (n, c, S/F, S/F) float32."""


class FaceImages:
    """Aligned faces at side S, decoded once and held in memory (S² · 3 bytes each: 104 MB for 8,500 at 64 px).

    Args:
        pixels: (N, S, S, 3) uint8 RGB.
        names: N names.
    """

    def __init__(self, pixels: np.ndarray, names: Sequence[str]) -> None:
        self.pixels = pixels
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def side(self) -> int:
        """S, in px."""
        return int(self.pixels.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names and the pixels."""
        digest = hashlib.sha256("\n".join(self.names).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """A copy of the faces at these places."""
        pixels: np.ndarray = self.pixels[np.asarray(indices, dtype=np.int64)]
        return pixels

    def latents(self, vqgan_digest: str) -> Latents | None:
        """None: nothing was prepared."""
        return None

    @classmethod
    def load(cls, sources: Sequence[str | Path], side: int) -> FaceImages:
        """Read, crop to a square and resize every image of the sources.

        An image that cannot be decoded is left out with a warning that names it and the reason.

        Raises:
            InputError: no usable image in the sources.
        """
        pixels: list[np.ndarray] = []
        names: list[str] = []
        for source in sources:
            for name, data in iterate_images(source):
                try:
                    pixels.append(fit_to_side(decode_image(data, name=name), side))
                except InputError as error:
                    log.warning("left out of the data: %s", error)
                    continue
                names.append(f"{Path(source).name}/{name}")
        if not pixels:
            raise InputError(f"no usable image in {', '.join(map(str, sources))}: expected {', '.join(IMAGE_SUFFIXES)}")
        return cls(np.stack(pixels), names)
