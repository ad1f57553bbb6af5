"""A training run: one folder, up to five stages, each building on the finished ones before it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from diffusers.models.modeling_utils import ModelMixin

from ldbfr.config import Preset
from ldbfr.data.index import FaceImages
from ldbfr.degradations import get_profile
from ldbfr.errors import ConfigError, WeightsError
from ldbfr.models.loading import load_network
from ldbfr.storage import write_bytes
from ldbfr.training.checkpoint import latest_checkpoint, read_state
from ldbfr.training.loop import Trainer
from ldbfr.training.runtime import Runtime
from ldbfr.training.stages import STAGE_NAMES, Stage, make_stage, stage_class
from ldbfr.weights import PRESET_FILE, list_files, manifest_digest, read_manifest, sha256_of

log = logging.getLogger(__name__)


def finished_checkpoint(run: Path, stage: str, preset: Preset) -> Path:
    """The checkpoint of a stage's last step.

    Raises:
        WeightsError: the stage was not trained to its end in this run.
    """
    checkpoint = latest_checkpoint(run / stage)
    target = getattr(preset.training, stage).steps
    done = 0 if checkpoint is None else int(read_state(checkpoint)["step"])
    if checkpoint is None or done < target:
        raise WeightsError(
            f"stage {stage} in {run} has {done} of {target} steps: train it first, with `ldbfr train --stage {stage}`"
        )
    return checkpoint


def load_stage_network(run: Path, stage: str, preset: Preset) -> tuple[ModelMixin, str]:
    """The averaged network of a finished stage and the digest of its files.

    Raises:
        WeightsError: the stage is not finished, or its files are damaged.
    """
    folder = finished_checkpoint(run, stage, preset) / "ema"
    network_class = stage_class(stage).network_class
    files = read_manifest(folder.parent)["files"]
    own = {name: entry for name, entry in files.items() if name.startswith("ema/")}
    return load_network(network_class, folder), manifest_digest({"files": own})


def start_from(stage: Stage, folder: Path) -> str:
    """Give a stage the weights in a folder (`config.json` + safetensors), and return their digest.

    Raises:
        WeightsError: they are missing or of another shape.
    """
    network = load_network(stage.network_class, folder)
    try:
        stage.start_from(network)
    except RuntimeError as error:
        raise WeightsError(f"{folder} does not fit stage {stage.name} of this preset: {error}") from error
    return manifest_digest({"files": {path.name: sha256_of(path) for path in list_files(folder)}})


def remember_preset(run: Path, preset: Preset) -> None:
    """Keep the resolved configuration beside the results."""
    text = json.dumps(preset.model_dump(mode="json"), indent=1)
    write_bytes(str(run / PRESET_FILE), text.encode())


def train_run(
    preset: Preset,
    stages: Sequence[str],
    images: FaceImages,
    preview_images: FaceImages,
    run: Path,
    runtime: Runtime,
    init: Path | None = None,
) -> bool:
    """Train stages one after the other; those that are finished are passed by.

    Args:
        preset: all settings.
        stages: names, in order.
        images: the training set, at the preset's side.
        preview_images: shown in the log's grids.
        run: the run's folder; the same folder continues what is there.
        runtime: where this process runs.
        init: folder of a network to start from, instead of a fresh one; for a single stage.

    Returns:
        True when all are finished; False when the runtime asked to stop before.

    Raises:
        ConfigError: an unknown stage or degradation profile, or `init` for several.
        WeightsError: an upstream stage or `init` is missing, or checkpoints belong to other settings.
    """
    if init is not None and len(stages) != 1:
        raise ConfigError(f"--init {init} is the start of one stage: name it with --stage")
    for name in stages:
        if name not in STAGE_NAMES:
            raise ConfigError(f"no stage {name!r}: give one of {', '.join(STAGE_NAMES)}, or all")
    for name in stages:
        get_profile(getattr(preset.training, name).profile)
    for name in stages:
        needed = stage_class(name).upstream
        loaded = {stage: load_stage_network(run, stage, preset) for stage in needed}
        stage = make_stage(name, preset, {key: network for key, (network, _) in loaded.items()})
        digests = {key: digest for key, (_, digest) in loaded.items()}
        if init is not None:
            digests["init"] = start_from(stage, init)
        trainer = Trainer(stage, images, preview_images, run / name, runtime, digests)
        trainer.resume()  # what does not fit is refused before anything is written
        remember_preset(run, preset)
        checkpoint = trainer.train()
        log.info("%s: %d of %d steps in %s", name, trainer.step, stage.settings.steps, checkpoint)
        if trainer.step < stage.settings.steps:
            return False
    return True
