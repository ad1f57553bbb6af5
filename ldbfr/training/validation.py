"""Validation beside the training: a checkpoint's averaged network, measured on faces it was not trained on.

It runs in a process of its own and reads checkpoints from where the training puts them, so no step waits for it. Every
checkpoint is measured on the same faces with the same degradations, timesteps and noise, whatever the batch size.

RUN/<stage>/validation/
    step-00001000.json   metrics, what is missing and why, digest of the network, seconds
    step-00001000.png    the first of the faces
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ldbfr.config import Preset, ValidationSettings
from ldbfr.data.index import Faces
from ldbfr.data.sampler import Batch, BatchSampler
from ldbfr.errors import ConfigError, InputError, StorageError, WeightsError
from ldbfr.evaluation.metrics import IdentityModel, psnr, ssim
from ldbfr.images import Pixels, encode_image, to_uint8
from ldbfr.models.loading import load_network
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.seeds import normal_per_sample
from ldbfr.sheets import contact_sheet
from ldbfr.storage import join, write_bytes
from ldbfr.training.base import Stage
from ldbfr.training.checkpoint import CheckpointStore
from ldbfr.training.codebook import CodebookHealth
from ldbfr.training.run import load_stage_network, network_digest
from ldbfr.training.scores import best_step as best_step
from ldbfr.training.scores import read_validations as read_validations
from ldbfr.training.scores import result_uri
from ldbfr.training.stages import DCVQRStage, EnhancerStage, PriorStage, VQGANStage, make_stage, stage_class
from ldbfr.training.trackers import TensorBoardTracker

log = logging.getLogger(__name__)

BEFORE_ANY_STEP = -1
"""A step at which no discriminator is active yet: a checkpoint's averaged network comes without one."""

LOW_TIMESTEP = 0.1
"""Share of the noise schedule from which the prior denoises in one step: t = 100 of 1,000."""

REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Measured:
    """What a validation found.

    `metrics`: means over the faces, by name, all finite. `missing`: why a metric is not among them, by name.
    `columns`: pictures of the first faces by title, each (n, S, S, 3) uint8.
    """

    metrics: dict[str, float]
    missing: dict[str, str]
    columns: dict[str, Pixels]


@dataclass(frozen=True)
class Produced:
    """What a stage makes of a batch: `images` (B, 3, S, S), which are measured, all `columns` to look at, and the
    code indices (B, h, w) where the stage chooses codes.
    """

    images: Tensor
    columns: dict[str, Tensor]
    code_indices: Tensor | None = None


Producer = Callable[[Batch], Produced]


def make_producer(stage: Stage) -> Producer:
    """How a stage makes the images that it is measured by.

    The VQGANs' are reconstructions, DC-VQR's the first stage's images, the prior's those of one denoising step from
    t = `LOW_TIMESTEP` · T, and the enhancer's full restorations with the preset's sampling.
    """
    match stage:
        case VQGANStage():
            return lambda batch: reconstructed(stage, batch)
        case DCVQRStage():
            return lambda batch: first_stage(stage, batch)
        case PriorStage():
            return lambda batch: denoised(stage, batch)
        case EnhancerStage():
            pipeline = LDBFRPipeline(stage.dc_vqr, stage.latent_vqgan, stage.dqe, preset=stage.preset)
            return lambda batch: restored(pipeline, batch)
    raise ConfigError(f"no validation of stage {stage.name!r}: give make_producer in {__name__} a case for it")


def reconstructed(stage: VQGANStage, batch: Batch) -> Produced:
    """A VQGAN's reconstructions."""
    images, _, code_indices = stage.vqgan(batch.hq)
    return Produced(images, {"HQ": batch.hq, "reconstruction": images}, code_indices)


def first_stage(stage: DCVQRStage, batch: Batch) -> Produced:
    """DC-VQR's own images."""
    assert batch.lq is not None
    output = stage.model(batch.lq)
    images = stage.model.decode(output.hq_features)
    return Produced(images, {"LQ": batch.lq, "first stage": images, "HQ": batch.hq}, output.code_indices)


def denoised(stage: PriorStage, batch: Batch) -> Produced:
    """What the prior's one step makes of slightly noisy latents."""
    latents = stage.latents(batch)
    timestep = round(LOW_TIMESTEP * stage.preset.diffusion.num_train_timesteps)
    timesteps = torch.full((len(latents),), timestep, device=latents.device)
    noise = normal_per_sample(batch.seeds, tuple(latents.shape[1:]), "noise").to(latents)
    noisy = stage.schedule.add_noise(latents, noise, timesteps)
    images = stage.denoised(noisy, timesteps, stage.unet(noisy, timesteps).sample)
    return Produced(images, {"HQ": batch.hq, "noisy": stage.latent_vqgan.from_latents(noisy), "one step": images})


def restored(pipeline: LDBFRPipeline, batch: Batch) -> Produced:
    """Restorations, as users get them."""
    assert batch.lq is not None
    seed = pipeline.preset.training.seed
    output = pipeline(batch.lq, seed=seed, output_type="pt", return_first_stage=True)
    columns = {"LQ": batch.lq, "first stage": output.first_stage, "restored": output.images, "HQ": batch.hq}
    return Produced(output.images, columns)


@dataclass
class Means:
    """Means over faces, summed part by part."""

    totals: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    identity: IdentityModel = field(default_factory=IdentityModel)

    def add(self, name: str, mean: float, share: float) -> None:
        """Add a part's mean, of so large a share of the faces."""
        self.totals[name] = self.totals.get(name, 0.0) + mean * share

    def compare(self, images: Pixels, originals: Pixels, share: float) -> None:
        """Add the distances of a part's images from their originals, two (B, S, S, 3)."""
        for name, distance in (("psnr", psnr), ("ssim", ssim), ("identity", self.identity.distance)):
            if name not in self.missing:
                try:
                    values = [distance(image, original) for image, original in zip(images, originals, strict=True)]
                except (ConfigError, WeightsError) as error:  # its library is not installed
                    self.missing[name] = str(error)
                else:
                    self.add(name, float(np.mean(values)), share)

    def finite(self) -> dict[str, float]:
        """Every mean that is a finite number; the others become missing."""
        for name, value in self.totals.items():
            if not math.isfinite(value):
                self.missing[name] = f"it is {value}"
        return {name: value for name, value in self.totals.items() if name not in self.missing}


def fixed_batches(stage: Stage, faces: Faces, settings: ValidationSettings) -> Iterator[Batch]:
    """The same faces, degradations and noise every time, in parts of at most the batch size.

    Raises:
        InputError: there is no face.
    """
    if not len(faces):
        raise InputError("the validation set is empty: give one with at least one face")
    profile = stage.settings.profile if stage.uses_lq else None
    count = min(settings.num_images, len(faces))
    sampler = BatchSampler(faces, count, stage.preset.training.seed, "validation", False, profile)
    num_parts = math.ceil(count / settings.batch_size)
    for part in range(num_parts):
        yield sampler.batch(0, part, num_parts)


@contextmanager
def undisturbed(stage: Stage) -> Iterator[None]:
    """Evaluation mode without gradients; modes, flags and counts are as before afterwards."""
    modes = [(module, module.training) for module in stage.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in stage.parameters()]
    buffers = [(buffer, buffer.clone()) for module in stage.extras().values() for buffer in module.buffers()]
    stage.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        stage.before_step([], BEFORE_ANY_STEP)  # forgets what it kept of the batches
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for buffer, value in buffers:
            buffer.copy_(value)


def measure(stage: Stage, faces: Faces, settings: ValidationSettings, device: torch.device) -> Measured:
    """Measure a stage on the validation set, in float32.

    `metrics` holds the losses that the stage logs, without a discriminator's; "psnr" (dB), "ssim" and "identity" of
    the images that it makes, see `make_producer`; and "codebook_perplexity" where it chooses codes.

    Args:
        stage: whose network holds the averaged weights; left as it was, but on the device.
        faces: the validation set.
        settings: how many faces, how many are shown, how many at a time.
        device: where to.

    Raises:
        InputError: no face, or an image with NaN.
    """
    stage.to(device)
    means, shown, started, reported = Means(), dict[str, list[Pixels]](), time.monotonic(), time.monotonic()
    count, done = min(settings.num_images, len(faces)), 0
    health: CodebookHealth | None = None
    with undisturbed(stage):
        produce = make_producer(stage)
        for batch in fixed_batches(stage, faces, settings):
            batch = batch.to(device, torch.contiguous_format)
            share = len(batch) / count
            for name, value in stage("generator", batch, BEFORE_ANY_STEP).items():
                means.add(name, value.item(), share)
            produced = produce(batch)
            means.compare(to_uint8(produced.images), to_uint8(batch.hq), share)
            if produced.code_indices is not None:
                health = health or CodebookHealth(stage.network.config["num_codes"])
                health.observe(produced.code_indices.cpu())
            for title, images in produced.columns.items():
                shown.setdefault(title, []).append(to_uint8(images[: max(0, settings.num_shown - done)]))
            done += len(batch)
            if done < count and time.monotonic() > reported + REPORT_SECONDS:
                reported = time.monotonic()
                left = (reported - started) / done * (count - done)
                log.info("validation of %s: %d of %d faces, %.0f s left", stage.name, done, count, left)
    if health is not None:
        health.settle(lambda values: values)
        means.add("codebook_perplexity", health.perplexity().item(), 1)
    return Measured(means.finite(), means.missing, {title: np.concatenate(parts) for title, parts in shown.items()})


def load_averaged(preset: Preset, stage_name: str, run_uri: str, step: int) -> tuple[Stage, str] | None:
    """A stage with a checkpoint's averaged network, and the digest of its files; None if that was deleted meanwhile.

    Raises:
        WeightsError: the checkpoint is damaged, or a stage that it builds on is not finished.
    """
    store = CheckpointStore(join(run_uri, stage_name))
    try:
        folder = store.fetch(step, parts=("ema",))
        network: ModelMixin = load_network(stage_class(stage_name).network_class, folder / "ema")
        digest = network_digest(run_uri, stage_name, step)
    except (WeightsError, StorageError, OSError):
        if step in store.steps():
            raise
        return None
    finally:
        store.close()
    upstream = {name: load_stage_network(run_uri, name, preset)[0] for name in stage_class(stage_name).upstream}
    stage = make_stage(stage_name, preset, upstream)
    stage.start_from(network)
    return stage, digest


def validate_checkpoint(
    preset: Preset, stage_name: str, run_uri: str, step: int, faces: Faces, device: torch.device
) -> dict[str, float] | None:
    """Measure a checkpoint and keep the result, as files and in TensorBoard's run `validation` of the stage.

    Args:
        preset: all settings, the run's.
        stage_name: whose checkpoint.
        run_uri: the run, local or in a bucket; stages before this one are finished.
        step: of the checkpoint.
        faces: the validation set.
        device: where to.

    Returns:
        The metrics; None for a checkpoint that was deleted meanwhile, as old ones are.

    Raises:
        WeightsError: the checkpoint is damaged, or a stage that it builds on is not finished.
        InputError: see `measure`.
        StorageError: the run cannot be read or written.
    """
    started = time.monotonic()
    loaded = load_averaged(preset, stage_name, run_uri, step)
    if loaded is None:
        log.info("no validation of %s at step %d: its checkpoint is gone, newer ones are there", stage_name, step)
        return None
    stage, digest = loaded
    measured = measure(stage, faces, preset.training.validation, device)
    seconds = time.monotonic() - started
    keep(measured, stage_name, join(run_uri, stage_name), step, {"network": digest, "seconds": round(seconds, 3)})
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in measured.metrics.items())
    log.info("validation of %s at step %d in %.0f s: %s", stage_name, step, seconds, numbers)
    for name, reason in measured.missing.items():
        log.info("validation of %s has no %s: %s", stage_name, name, reason)
    return measured.metrics


def keep(measured: Measured, stage_name: str, stage_uri: str, step: int, about: dict[str, object]) -> None:
    """Write what was found; the JSON file comes last."""
    rows = [list(row) for row in zip(*measured.columns.values(), strict=True)]
    sheet = contact_sheet(rows, list(measured.columns), cell=min(256, max(128, rows[0][0].shape[0])))
    write_bytes(result_uri(stage_uri, step, "png"), encode_image(sheet, "png"))
    tracker = TensorBoardTracker(join(stage_uri, "tensorboard", "validation"), step - 1)
    tracker.scalars(step, {f"{stage_name}/{name}": value for name, value in measured.metrics.items()})
    tracker.image(f"{stage_name}/faces", step, sheet)
    tracker.close()
    result = {"step": step, "metrics": measured.metrics, "missing": measured.missing, **about}
    write_bytes(result_uri(stage_uri, step, "json"), json.dumps(result, indent=1, allow_nan=False).encode())


class ValidationQueue:
    """Validates the newest step that was submitted, one at a time, in a thread; steps that it overtakes are left out.

    Args:
        validate: called with a step; whatever it raises is logged and kept.
    """

    def __init__(self, validate: Callable[[int], object]) -> None:
        self.validate = validate
        self._lock = threading.Lock()
        self._waiting: int | None = None
        self._thread: threading.Thread | None = None
        self._errors: list[Exception] = []

    def submit(self, step: int) -> None:
        """Ask for a validation; returns at once."""
        with self._lock:
            if self._waiting is not None:
                left_out, step = sorted((self._waiting, step))
                log.info("no validation at step %d: step %d is newer", left_out, step)
            self._waiting = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="validation", daemon=True)
                self._thread.start()

    def drain(self) -> list[Exception]:
        """Wait until the last submitted step is done; the errors since the last call, each with a note of its step."""
        while (thread := self._thread) is not None:
            thread.join()
        with self._lock:
            errors, self._errors = self._errors, []
        return errors

    def _work(self) -> None:
        while True:
            with self._lock:
                step, self._waiting = self._waiting, None
                if step is None:
                    self._thread = None
                    return
            try:
                self.validate(step)
            except Exception as error:  # noqa: BLE001  # the training goes on without this validation
                error.add_note(f"in the validation at step {step}")
                log.error("the validation at step %d failed: %s", step, error)
                with self._lock:
                    self._errors.append(error)
