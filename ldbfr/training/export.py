"""From a finished run to weights that users load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch

from ldbfr.config import Preset, SamplingSettings, parse_preset
from ldbfr.errors import WeightsError
from ldbfr.models.dc_vqr import DCVQRModel
from ldbfr.models.dqe import DQEUNet2DModel
from ldbfr.models.vqgan import VQGAN
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.storage import exists, join, read_bytes
from ldbfr.training.run import load_stage_network
from ldbfr.weights import PRESET_FILE

SHARD_SIZE = "15MB"
"""Largest file of exported weights, so that they fit where single files are limited."""


def read_run_preset(run: str | Path) -> Preset:
    """The resolved settings that a run was trained with.

    Raises:
        WeightsError: the folder is no run.
    """
    uri = join(str(run), PRESET_FILE)
    if not exists(uri):
        raise WeightsError(f"{run} is no training run: it has no {PRESET_FILE}; give the --run folder of `ldbfr train`")
    return parse_preset(json.loads(read_bytes(uri)), uri)


def assemble(run: str | Path, sampling: SamplingSettings | None = None) -> LDBFRPipeline:
    """The pipeline of a run whose `latent_vqgan`, `dc_vqr` and `enhancer` are finished, in float32.

    Args:
        run: the run's folder or s3:// prefix.
        sampling: default settings of the sampling, if other than the preset's.

    Raises:
        WeightsError: a stage is not finished.
    """
    preset = read_run_preset(run)
    networks = {stage: load_stage_network(run, stage, preset)[0] for stage in ("latent_vqgan", "dc_vqr", "enhancer")}
    if sampling is not None:
        preset = preset.model_copy(update={"sampling": sampling})
    return LDBFRPipeline(
        cast(DCVQRModel, networks["dc_vqr"]),
        cast(VQGAN, networks["latent_vqgan"]),
        cast(DQEUNet2DModel, networks["enhancer"]),
        preset=preset,
    )


def export(
    run: str | Path, folder: Path, dtype: torch.dtype, sampling: SamplingSettings | None = None
) -> LDBFRPipeline:
    """Write the weights of a finished run, see `assemble`.

    Args:
        run: the run's folder or s3:// prefix.
        folder: a new or empty folder.
        dtype: precision on disk.
        sampling: default settings of the sampling, if other than the preset's.
    """
    pipeline = assemble(run, sampling).to(dtype)
    pipeline.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    return pipeline
