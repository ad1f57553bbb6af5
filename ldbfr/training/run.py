"""A training run: one folder or bucket prefix, up to five stages, each building on the finished ones before it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers.models.modeling_utils import ModelMixin

from ldbfr.config import Preset
from ldbfr.data.index import Faces
from ldbfr.degradations import get_profile
from ldbfr.errors import ConfigError, WeightsError
from ldbfr.models.loading import load_network
from ldbfr.storage import join, read_bytes, write_bytes
from ldbfr.training.base import Stage, flatten
from ldbfr.training.checkpoint import CheckpointStore, read_state
from ldbfr.training.loop import Trainer
from ldbfr.training.runtime import Runtime
from ldbfr.training.stages import STAGE_NAMES, make_stage, stage_class
from ldbfr.training.trackers import make_trackers
from ldbfr.weights import MANIFEST, PRESET_FILE, list_files, manifest_digest, read_manifest, sha256_of

log = logging.getLogger(__name__)

NO_INIT: Mapping[str, Path] = {}


def done_steps(run: str | Path, stage: str) -> int:
    """Steps of the newest checkpoint that claims to be finished; 0 where there is none."""
    return max(CheckpointStore(join(str(run), stage)).steps(), default=0)


def finished(run: str | Path, stage: str, preset: Preset) -> bool:
    """Whether a stage has a good checkpoint of its last step, in what later stages and users take of it.

    Raises:
        WeightsError: it was trained with other settings or on other networks, which are listed.
    """
    done = done_steps(run, stage)
    if done < int(getattr(preset.training, stage).steps):
        return False
    store = CheckpointStore(join(str(run), stage))
    try:
        folder = store.fetch(done, parts=("ema", "state.json"))
    except WeightsError as error:
        log.warning("checkpoint passed over: %s", error)
        return False
    else:
        upstream = {name: network_digest(run, name) for name in stage_class(stage).upstream if done_steps(run, name)}
        stage_class(stage).check_same_run(preset, upstream, read_state(folder), join(str(run), stage))
        return True
    finally:
        store.close()


def load_stage_network(run: str | Path, stage: str, preset: Preset) -> tuple[ModelMixin, str]:
    """The averaged network of a finished stage and the digest of its files.

    Raises:
        WeightsError: the stage is not finished, or its files are damaged.
    """
    target, done = getattr(preset.training, stage).steps, done_steps(run, stage)
    if done < target:
        raise WeightsError(
            f"stage {stage} in {run} has {done} of {target} steps: train it first, with `ldbfr train --stage {stage}`"
        )
    store = CheckpointStore(join(str(run), stage))
    try:
        folder = store.fetch(done, parts=("ema",))
        network = load_network(stage_class(stage).network_class, folder / "ema")
    finally:
        store.close()
    return network, network_digest(run, stage)


def network_digest(run: str | Path, stage: str, step: int | None = None) -> str:
    """The digest of the averaged network in a stage's checkpoint, the newest by itself, from the manifest."""
    store = CheckpointStore(join(str(run), stage))
    manifest = json.loads(read_bytes(join(store.uri_of(step or done_steps(run, stage)), MANIFEST)))
    return manifest_digest({"files": {name: e for name, e in manifest["files"].items() if name.startswith("ema/")}})


def start_from(stage: Stage, folder: Path) -> str:
    """Give a stage the weights in a folder (`config.json` + safetensors), and return their digest.

    Raises:
        WeightsError: they are missing, damaged, of another shape or of another stage.
    """
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if manifest.get("stage", stage.name) != stage.name:
            raise WeightsError(f"{folder} holds weights for stage {manifest['stage']}, not for {stage.name}")
        files = manifest["files"]
    else:
        files = {path.name: sha256_of(path) for path in list_files(folder)}
    network = load_network(stage.network_class, folder)
    try:
        stage.start_from(network)
    except RuntimeError as error:
        raise WeightsError(f"{folder} does not fit stage {stage.name} of this preset: {error}") from error
    return manifest_digest({"files": files})


def remember_preset(run: str | Path, preset: Preset) -> None:
    """Keep the resolved configuration beside the results."""
    text = json.dumps(preset.model_dump(mode="json"), indent=1)
    write_bytes(join(str(run), PRESET_FILE), text.encode())


def parse_init(texts: Sequence[str]) -> dict[str, Path]:
    """ "prior=/weights/ldm-unet" -> {"prior": Path(...)}.

    Raises:
        ConfigError: a text is not of that form, or names no folder.
    """
    init: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise ConfigError(f"--init {text}: expected STAGE=FOLDER, such as prior=/weights/ldm-unet")
        if not Path(folder).is_dir():
            raise ConfigError(f"--init {text}: {folder} is no folder on this machine")
        init[name] = Path(folder)
    return init


def check_request(preset: Preset, stages: Sequence[str], init: Mapping[str, Path]) -> None:
    """Refuse what cannot be trained before anything is loaded.

    Raises:
        ConfigError: an unknown stage or degradation profile, or `init` for a stage that is not trained.
    """
    for name in (*stages, *init):
        if name not in STAGE_NAMES:
            raise ConfigError(f"no stage {name!r}: give one of {', '.join(STAGE_NAMES)}, or all")
    for name in init:
        if name not in stages:
            raise ConfigError(f"--init {name}={init[name]}: stage {name} is not trained by this command")
    for name in stages:
        get_profile(getattr(preset.training, name).profile)


def check_starts(preset: Preset, stages: Sequence[str], run: str | Path, init: Mapping[str, Path]) -> None:
    """Refuse to train a decoder alone on an encoder and a codebook that nothing was trained of.

    Raises:
        ConfigError: naming the stage.
    """
    for name in stages:
        if getattr(getattr(preset.training, name), "trains", "all") == "all" or name in init or done_steps(run, name):
            continue
        raise ConfigError(
            f"training.{name}.trains is decoder, which keeps the encoder and the codebook as they are: give those to "
            f"start from with --init {name}=FOLDER (see `ldbfr convert`), or set training.{name}.trains=all"
        )


def train_run(
    preset: Preset,
    stages: Sequence[str],
    images: Faces,
    preview_images: Faces,
    run: str | Path,
    runtime: Runtime,
    init: Mapping[str, Path] = NO_INIT,
    track: Sequence[str] = (),
) -> bool:
    """Train stages one after the other; those that are finished are passed by.

    Args:
        preset: all settings.
        stages: names, in order.
        images: the training set, at the preset's side.
        preview_images: shown in the log's grids.
        run: the run's folder or s3:// prefix; the same one continues what is there.
        runtime: where this process runs.
        init: by stage, the folder of a network to start from instead of a fresh one.
        track: trackers besides TensorBoard, see `make_trackers`.

    Returns:
        True when all are finished; False when the runtime asked to stop before.

    Raises:
        ConfigError: see `check_request` and `check_starts`.
        WeightsError: an upstream stage or `init` is missing, or checkpoints belong to other settings.
    """
    check_request(preset, stages, init)
    check_starts(preset, stages, run, init)
    for name in stages:
        if not train_stage(preset, name, images, preview_images, run, runtime, init.get(name), track):
            return False
    return True


def train_stage(
    preset: Preset,
    name: str,
    images: Faces,
    preview_images: Faces,
    run: str | Path,
    runtime: Runtime,
    init: Path | None = None,
    track: Sequence[str] = (),
) -> bool:
    """Train one stage to its end, see `train_run`."""
    run = str(run)
    loaded = {stage: load_stage_network(run, stage, preset) for stage in stage_class(name).upstream}
    stage = make_stage(name, preset, {key: network for key, (network, _) in loaded.items()})
    digests = {key: digest for key, (_, digest) in loaded.items()} | {"data": images.digest}
    if init is not None:
        digests["init"] = start_from(stage, init)
    trainer = Trainer(stage, images, preview_images, join(run, name), runtime, digests)
    trainer.resume()  # what does not fit is refused before anything is written
    if runtime.rank == 0 and trainer.step < stage.settings.steps:
        remember_preset(run, preset)
        settings = flatten(preset.model_dump(mode="json"))
        trainer.trackers = make_trackers(track, join(run, name), f"{Path(run).name} {name}", settings, trainer.step)
    step = trainer.train()
    log.info("%s: %d of %d steps in %s", name, step, stage.settings.steps, join(run, name))
    return step >= stage.settings.steps
