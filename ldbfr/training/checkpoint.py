"""Checkpoints: folders, on a disk or in a bucket, that are whole or do not exist.

RUN/<stage>/checkpoints/step-00001000/
    network/         config.json + safetensors, as trained
    ema/             the same network with averaged weights: what later stages and users take
    training.pt      optimisers, EMA step, the stage's extras
    state.json       stage, step, settings
    manifest.json    sizes and SHA-256, written last and deleted first
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from ldbfr import storage
from ldbfr.errors import ConfigError, StorageError, WeightsError
from ldbfr.training.background import BackgroundWriter as BackgroundWriter
from ldbfr.weights import MANIFEST, list_files, sha256_of, write_manifest

log = logging.getLogger(__name__)

_UNFINISHED = ".partial-"
"""How the name of a folder begins that is being written, on a disk."""


class CheckpointGoneError(WeightsError):
    """A checkpoint was deleted before or while it was read."""


class CheckpointStore:
    """A stage's checkpoints, below RUN/<stage>/checkpoints/.

    One process writes at a time; others may read meanwhile. A checkpoint is what has a manifest. It is written last
    and deleted first, so what a writer leaves behind that was stopped at any point is not taken for a checkpoint.

    Args:
        stage_uri: RUN/<stage>, a local path or s3://bucket/key.
        scratch: folder, of this store alone, in which those of a bucket are written and fetched; None for a temporary
            one that goes at `close`.
    """

    def __init__(self, stage_uri: str, scratch: Path | None = None) -> None:
        self.uri = storage.join(stage_uri, "checkpoints")
        self.folder = Path(self.uri) if storage.is_local(self.uri) else None
        self._given_scratch = scratch
        self._own_scratch: Path | None = None
        self._damaged: set[int] = set()
        self._remove_scratch: Callable[[], None] | None = None

    def steps(self) -> list[int]:
        """Steps of every checkpoint that claims to be finished, newest first.

        Raises:
            StorageError: the folder or bucket cannot be listed.
        """
        return [step for step, finished in self._found().items() if finished]

    def uri_of(self, step: int) -> str:
        """Where the checkpoint of a step is."""
        return storage.join(self.uri, _name(step))

    def save(self, step: int, write: Callable[[Path], None]) -> str:
        """Make a checkpoint; it counts as one only when it is whole. One of the same step is replaced.

        Args:
            step: optimiser steps done.
            write: puts the files into the fresh local folder that it is given.

        Returns:
            Its URI.

        Raises:
            StorageError: it cannot be written; the checkpoints before are untouched.
        """
        uri = self.uri_of(step)
        staged = (self._scratch() if self.folder is None else self.folder) / f"{_UNFINISHED}{_name(step)}"
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            write(staged)
            write_manifest(staged, {"kind": "checkpoint"})
            if self.folder is None:
                self._upload(staged, step)
            else:
                _move_into_place(staged, self.folder / _name(step))
        except (OSError, RuntimeError, SafetensorError) as error:  # the latter two: torch, safetensors on a full disk
            raise StorageError(f"checkpoint {uri} cannot be written ({error}); free space or choose --run") from error
        except StorageError as error:
            raise StorageError(
                f"checkpoint {uri} cannot be written ({error}); the ones before are untouched: mend this, and the "
                "same command goes on from the newest of them"
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._damaged.discard(step)
        return uri

    def fetch(self, step: int, parts: tuple[str, ...] = ()) -> Path:
        """A local folder with a checkpoint, each of its files as the manifest says.

        For a checkpoint on a disk, that is where it lies. One of a bucket is fetched; it stays there until another
        step's is fetched with the same parts, or until `close`. Its manifest then lists the fetched files alone.

        Args:
            step: which checkpoint.
            parts: fetch and check only these files and folders, such as "ema"; all if there are none.

        Raises:
            WeightsError: naming the file that is missing, cut short or changed; CheckpointGoneError, a kind of it,
                if the whole checkpoint is not there, or was deleted meanwhile.
            StorageError: the disk or bucket cannot be read.
        """
        uri = self.uri_of(step)
        manifest = self._manifest(uri)
        files = _selected(manifest["files"], parts, uri)
        try:
            return self._check(uri, files) if self.folder else self._download(uri, {**manifest, "files": files}, parts)
        except WeightsError as error:
            if storage.exists(storage.join(uri, MANIFEST)):
                raise
            raise CheckpointGoneError(
                f"{uri} was deleted while it was read ({error}); take a newer one of the same stage"
            ) from error

    def latest(self, parts: tuple[str, ...] = ()) -> tuple[int, Path] | None:
        """The newest checkpoint that is whole and where it is, see `fetch`; None if there is none.

        Damaged and half-written ones are passed over with a warning that names the file.

        Raises:
            StorageError: the disk or bucket cannot be read.
        """
        passed_over: set[int] = set()
        while True:  # once, unless a writer deletes what is being read
            for step, finished in self._found().items():
                if step in passed_over:
                    continue
                try:
                    if finished:
                        return step, self.fetch(step, parts)
                    log.warning("checkpoint passed over: %s has no %s: unfinished", self.uri_of(step), MANIFEST)
                except CheckpointGoneError as error:
                    log.info("looking again: %s", error)
                    break
                except WeightsError as error:
                    log.warning("checkpoint passed over: %s", error)
                    self._damaged.add(step)
                passed_over.add(step)
            else:
                return None

    def prune(self, keep_last: int, best: int | None = None) -> None:
        """Delete all checkpoints but the newest ones and the best, and what was left of unfinished ones before them.

        Those that `latest` found damaged do not count as any of the newest.

        Args:
            keep_last: how many of the newest to keep, at least 1.
            best: step of one to keep whatever its age.

        Raises:
            StorageError: something cannot be deleted.
        """
        if keep_last < 1:
            raise ConfigError(f"{keep_last} checkpoints to keep, expected at least 1")
        found = self._found()
        finished = [step for step, has_manifest in found.items() if has_manifest and step not in self._damaged]
        kept = {*finished[:keep_last], best}
        for step in found:
            if finished and step < finished[0] and step not in kept:
                self._delete(step)
        for leftover in self.folder.glob(f"{_UNFINISHED}*") if self.folder else ():
            step_of = re.fullmatch(rf"{re.escape(_UNFINISHED)}(?:old-)?step-(\d+)", leftover.name)
            if finished and step_of and int(step_of[1]) < finished[0]:
                shutil.rmtree(leftover, ignore_errors=True)

    def close(self) -> None:
        """Remove what was fetched and staged, unless into a scratch folder that was given; the store can be used on."""
        if self._remove_scratch is not None:
            self._remove_scratch()
            atexit.unregister(self._remove_scratch)
        self._own_scratch = self._remove_scratch = None

    # ---- what is there ----

    def _found(self) -> dict[int, bool]:
        """Every step of which there is anything, newest first, and whether it has a manifest."""
        if self.folder is None:
            found: dict[int, bool] = {}
            for entry in storage.list_objects(self.uri):
                name, _, file = entry.key.partition("/")
                if (step := _step(name)) is not None and file:
                    found[step] = found.get(step, False) or file == MANIFEST
        else:
            try:
                steps = {name: step for name in os.listdir(self.folder) if (step := _step(name)) is not None}
                found = {step: (self.folder / name / MANIFEST).is_file() for name, step in steps.items()}
            except FileNotFoundError:
                found = {}
            except OSError as error:
                raise StorageError(f"cannot list {self.folder}: {error.strerror}; check the path") from error
        return dict(sorted(found.items(), reverse=True))

    def _manifest(self, uri: str) -> dict[str, Any]:
        """A checkpoint's manifest, {"files": {name: {"size", "sha256"}}}, well-formed."""
        path = storage.join(uri, MANIFEST)
        try:
            data = storage.read_bytes(path)
        except StorageError as error:
            if storage.exists(path):
                raise
            raise CheckpointGoneError(
                f"there is no checkpoint {uri}: it has no {MANIFEST}, was never finished or has been deleted; take "
                "another one of the same stage"
            ) from error
        try:
            manifest: dict[str, Any] = json.loads(data)
            files = {
                str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
                for name, entry in manifest["files"].items()
            }
            if not files:
                raise ValueError("it lists no files")
            for name in files:
                storage.join(uri, name)  # refuses a name that leads elsewhere
        except (ValueError, KeyError, TypeError, AttributeError, StorageError) as error:
            raise WeightsError(f"{path} is damaged ({error!r}); take an earlier checkpoint, or train again") from error
        return {**manifest, "files": files}

    # ---- on a disk ----

    def _check(self, uri: str, files: dict[str, Any]) -> Path:
        """Compare the files of a local checkpoint with what its manifest says."""
        folder = Path(uri)
        for name, entry in files.items():
            _check_file(folder / name, str(folder / name), entry)
        return folder

    def _delete(self, step: int) -> None:
        uri = self.uri_of(step)
        storage.delete(storage.join(uri, MANIFEST))
        if self.folder is None:
            for entry in storage.list_objects(uri):
                storage.delete(entry.uri)
            return
        try:
            shutil.rmtree(uri)
        except OSError as error:
            raise StorageError(f"cannot delete {uri}: {error}; check who may write there") from error

    # ---- in a bucket ----

    def _scratch(self) -> Path:
        if self._given_scratch is not None:
            return self._given_scratch
        if self._own_scratch is None:
            try:
                self._own_scratch = Path(tempfile.mkdtemp(prefix="ldbfr-checkpoints-"))
            except OSError as error:
                raise StorageError(f"no temporary folder can be made ({error}); point TMPDIR to a disk") from error
            self._remove_scratch = partial(shutil.rmtree, self._own_scratch, ignore_errors=True)
            atexit.register(self._remove_scratch)
        return self._own_scratch

    def _upload(self, staged: Path, step: int) -> None:
        self._delete(step)
        for path in [*list_files(staged), staged / MANIFEST]:
            storage.put_file(path, storage.join(self.uri_of(step), path.relative_to(staged).as_posix()))

    def _download(self, uri: str, manifest: dict[str, Any], parts: tuple[str, ...]) -> Path:
        """Fetch the files that a manifest lists, unless they are here, and check them."""
        sizes = {entry.key: entry.size for entry in storage.list_objects(uri)}
        for name, entry in manifest["files"].items():  # before gigabytes are fetched in vain
            _check_size(sizes.get(name), storage.join(uri, name), entry)
        folder = self._scratch() / ("+".join(parts).replace("/", "_") or "all") / uri.rsplit("/", 1)[-1]
        for other in folder.parent.glob("*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        for name, entry in manifest["files"].items():
            source, file = storage.join(uri, name), folder / name
            if file.is_file() and file.stat().st_size == entry["size"] and sha256_of(file) == entry["sha256"]:
                continue
            try:
                storage.fetch_file(source, file)
            except StorageError:
                if storage.exists(source):
                    raise
                _check_size(None, source, entry)
            _check_file(file, source, entry)
        storage.write_bytes(str(folder / MANIFEST), json.dumps(manifest, indent=1, sort_keys=True).encode())
        return folder


def checkpoint_folders(stage_folder: Path) -> list[Path]:
    """Every local checkpoint of a stage that claims to be finished, newest first."""
    store = CheckpointStore(str(stage_folder))
    return [Path(store.uri_of(step)) for step in store.steps()]


def latest_checkpoint(stage_folder: Path) -> Path | None:
    """The newest local checkpoint that is whole, see `CheckpointStore.latest`."""
    found = CheckpointStore(str(stage_folder)).latest()
    return None if found is None else found[1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return cast(dict[str, Any], json.loads((checkpoint / "state.json").read_text("utf-8")))


def read_training(checkpoint: Path) -> dict[str, Any]:
    """`training.pt` of a checkpoint, on the CPU, loaded without unpickling code."""
    return cast(dict[str, Any], torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(name: str) -> int | None:
    """The step in a folder's name; None for other folders."""
    match = re.fullmatch(r"step-(\d+)", name)
    return int(match[1]) if match and name == _name(int(match[1])) else None


def _selected(files: dict[str, Any], parts: tuple[str, ...], uri: str) -> dict[str, Any]:
    """The files that are one of the parts or below one, all if there are no parts."""
    if not parts:
        return files
    chosen = {name: entry for part in parts for name, entry in files.items() if f"{name}/".startswith(f"{part}/")}
    missing = [part for part in parts if not any(f"{name}/".startswith(f"{part}/") for name in chosen)]
    if missing:
        held = ", ".join(sorted({name.split("/")[0] for name in files}))
        raise WeightsError(f"{uri} has no {' and no '.join(missing)}, it holds {held}; the checkpoint cannot be used")
    return chosen


def _check_size(size: int | None, shown: str, entry: dict[str, Any]) -> None:
    if size is None:
        raise WeightsError(f"{shown} is missing, though {MANIFEST} lists it; the checkpoint cannot be used")
    if size != entry["size"]:
        raise WeightsError(f"{shown} has {size} bytes instead of {entry['size']}; the checkpoint cannot be used")


def _check_file(file: Path, shown: str, entry: dict[str, Any]) -> None:
    """Compare a file with its entry in the manifest; `shown` is what an error calls it."""
    try:
        _check_size(file.stat().st_size, shown, entry)
        digest = sha256_of(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        _check_size(None, shown, entry)
        raise
    except OSError as error:
        if error.errno != errno.EIO:
            raise StorageError(f"cannot read {shown}: {error.strerror}; check who may read it") from error
        raise WeightsError(f"{shown} cannot be read ({error.strerror}): the disk is damaged there") from error
    if digest != entry["sha256"]:
        raise WeightsError(
            f"{shown} was changed: its SHA-256 is not the manifest's {entry['sha256']}; the checkpoint cannot be used"
        )


def _move_into_place(staged: Path, target: Path) -> None:
    """Give a finished folder its name, after all of it has reached the disk."""
    for path in (*staged.rglob("*"), staged):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    aside = target.with_name(f"{_UNFINISHED}old-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    staged.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
