"""Checkpoints: folders that are whole or do not exist.

RUN/<stage>/checkpoints/step-00001000/
    network/         config.json + safetensors, as trained
    ema/             the same network with averaged weights: what later stages and users take
    training.pt      optimisers, EMA step, the stage's extras
    state.json       stage, step, settings
    manifest.json    sizes and SHA-256, written last
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError

from ldbfr.errors import StorageError, WeightsError
from ldbfr.weights import read_manifest, write_manifest

log = logging.getLogger(__name__)


def checkpoint_folders(stage_folder: Path) -> list[Path]:
    """Every checkpoint of a stage that claims to be finished, newest first."""
    return sorted((stage_folder / "checkpoints").glob("step-[0-9]*"), reverse=True)


def save_checkpoint(
    stage_folder: Path,
    step: int,
    state: dict[str, Any],
    training: dict[str, Any],
    networks: Iterator[tuple[str, ModelMixin]],
) -> Path:
    """Write a checkpoint beside the others; it takes its name only when it is whole.

    Args:
        stage_folder: RUN/<stage>.
        step: optimiser steps done.
        state: what `state.json` says.
        training: what `training.pt` holds, tensors and plain values only.
        networks: (folder name, network), each saved before the next is asked for.

    Raises:
        StorageError: the folder cannot be written; no partial checkpoint is left behind.
    """
    target = stage_folder / "checkpoints" / f"step-{step:08d}"
    partial = target.with_name(f".partial-{target.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, network in networks:
            network.save_pretrained(partial / name)
        torch.save(training, partial / "training.pt")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), "utf-8")
        write_manifest(partial, {"kind": "checkpoint"})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two: torch and safetensors on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"checkpoint {target} cannot be written ({error}); free space or choose --run") from error
    return target


def prune_checkpoints(stage_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in checkpoint_folders(stage_folder)[keep:]:
        shutil.rmtree(folder)


def latest_checkpoint(stage_folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says; damaged ones are passed over with a warning."""
    for folder in checkpoint_folders(stage_folder):
        try:
            read_manifest(folder)
        except WeightsError as error:
            log.warning("checkpoint passed over: %s", error)
            continue
        return folder
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return cast(dict[str, Any], json.loads((checkpoint / "state.json").read_text("utf-8")))


def read_training(checkpoint: Path) -> dict[str, Any]:
    """`training.pt` of a checkpoint, on the CPU, loaded without unpickling code."""
    return cast(dict[str, Any], torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True))
