"""Where weights come from, and proof that they are whole.

A folder of weights or a checkpoint holds a `manifest.json` with the size and the SHA-256 of every other file. It is
written last: without a valid manifest the folder does not exist for ldbfr.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ldbfr import storage
from ldbfr.errors import StorageError, WeightsError

MANIFEST = "manifest.json"
PRESET_FILE = "preset.json"
"""The resolved settings beside weights and in the folder of a run."""
PRETRAINED_FOLDER = Path(__file__).parent / "pretrained"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> list[Path]:
    """Every file of a folder but its manifest, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def write_manifest(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Describe every file of a finished folder, and put the description there in one step.

    Args:
        folder: all of whose files are written.
        about: what else the manifest should say.
    """
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in list_files(folder)
    }
    manifest = {**about, "files": files}
    partial = folder / f".{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, after checking every file's size and SHA-256 against it.

    Raises:
        WeightsError: naming the first file that is missing, cut short or changed, or the manifest itself.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise WeightsError(f"no weights in {folder}: the folder does not exist")
    if not path.is_file():
        raise WeightsError(f"{folder} has no {MANIFEST}: it is unfinished or no ldbfr folder; copy or train it again")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        if not files:
            raise ValueError("it lists no files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged ({error!r}); copy the folder again") from error
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise WeightsError(f"{file} is missing, though {MANIFEST} lists it; copy the folder again")
        if file.stat().st_size != size:
            raise WeightsError(f"{file} has {file.stat().st_size} bytes instead of {size}; copy the folder again")
        if sha256_of(file) != digest:
            raise WeightsError(f"{file} was changed: its SHA-256 is not the manifest's {digest}; copy the folder again")
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """One SHA-256 for all files of a manifest: equal files, equal digest."""
    return hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()


def cache_folder() -> Path:
    """Where weights are kept on this machine: $LDBFR_CACHE, or ~/.cache/ldbfr."""
    return Path(os.environ.get("LDBFR_CACHE") or Path.home() / ".cache" / "ldbfr")


def find_weights(name_or_path: str | Path) -> Path:
    """The folder of weights: a path, a name among those that come with ldbfr, or a name in the cache.

    Raises:
        WeightsError: nothing is there; the text lists where it was looked for.
    """
    tried = [Path(name_or_path), PRETRAINED_FOLDER / name_or_path, cache_folder() / name_or_path]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise WeightsError(
        f"no weights {str(name_or_path)!r}: looked in {', '.join(map(str, tried))}. Give the folder that "
        f"`ldbfr export` wrote, or one of: {', '.join(pretrained_names()) or 'none is installed'}"
    )


def pretrained_names() -> list[str]:
    """Names of the weights that come with ldbfr."""
    return sorted(folder.parent.name for folder in PRETRAINED_FOLDER.glob(f"*/{MANIFEST}"))


# ---- single files that others publish ----


@dataclass(frozen=True)
class RemoteFile:
    """A file that is not part of ldbfr, and what it must be.

    Args:
        name: under which the cache has it.
        size: in bytes.
        sha256: in hexadecimal.
        url: where it is published.
        variable: of the environment, that names a file to take instead.
        about: what it is, for people.
    """

    name: str
    size: int
    sha256: str
    url: str
    variable: str
    about: str

    def how_to_supply(self) -> str:
        """What to do where it cannot be downloaded."""
        return (
            f"supply {self.name} ({self.size:,} bytes, SHA-256 {self.sha256}): put it into {cache_folder()}, or "
            f"name it in ${self.variable}. It is published at {self.url}"
        )


DOWNLOAD_TIMEOUT_S = 20.0
"""Without a single byte."""


def find_file(file: RemoteFile, path: str | Path | None = None) -> Path:
    """The file: at a given path, at the environment's, in the cache, or else downloaded into the cache.

    A file that somebody names is taken as it is. What the cache has is checked, and downloaded again if it is not the
    published one. The cache gets a file in one step once it is whole; $LDBFR_OFFLINE forbids downloads.

    Raises:
        WeightsError: it is nowhere, or what was downloaded is another file; the text says how to supply it.
    """
    for given, source in ((path, "the given path"), (os.environ.get(file.variable), f"${file.variable}")):
        if given:
            if not Path(given).is_file():
                raise WeightsError(f"{source} {given}: no such file; {file.how_to_supply()}")
            return Path(given)
    cached = cache_folder() / file.name
    if not (cached.is_file() and cached.stat().st_size == file.size and sha256_of(cached) == file.sha256):
        download(file, cached)
    return cached


def download(file: RemoteFile, target: Path) -> None:
    """Fetch a file, check it, and put it in place in one step; nothing of it stays where that fails.

    Raises:
        WeightsError: as `find_file`.
    """
    if os.environ.get("LDBFR_OFFLINE", "0") not in ("", "0"):
        raise WeightsError(
            f"{file.about} is not on this machine, and $LDBFR_OFFLINE forbids downloads; {file.how_to_supply()}"
        )
    try:
        storage.write_bytes(str(target.absolute()), fetch(file))
    except (OSError, HTTPException, StorageError) as error:  # urllib's own errors are OSErrors
        raise WeightsError(f"{file.about} could not be downloaded ({error}); {file.how_to_supply()}") from error


def fetch(file: RemoteFile) -> bytes:
    """A file from where it is published; no more of it is read than it should have.

    Raises:
        OSError: it cannot be read.
        WeightsError: it is another file.
    """
    request = urllib.request.Request(file.url, headers={"User-Agent": "ldbfr"})
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response:
        data: bytes = response.read(file.size + 1)
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != file.size or digest != file.sha256:
        what = f"more than {file.size:,}" if len(data) > file.size else f"{len(data):,}"
        raise WeightsError(
            f"{file.url} gave {what} bytes that are not {file.about}, or not all of it (SHA-256 {digest}); "
            f"try again, or {file.how_to_supply()}"
        )
    return data
