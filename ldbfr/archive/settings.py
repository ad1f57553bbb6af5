"""What decides how an image is restored: the weights, and settings resolved against their preset."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Self

from ldbfr.archive.naming import OutputFormat
from ldbfr.config import Preset, SchedulerName, Settings, check_range, parse_preset
from ldbfr.errors import ConfigError, WeightsError
from ldbfr.weights import PRESET_FILE, PRETRAINED_FOLDER, find_weights, manifest_digest, read_manifest


@dataclass(frozen=True)
class Weights:
    """Weights that were found whole.

    `reference` finds them again in another process: a name for those that come with ldbfr, else an absolute path.
    """

    reference: str
    digest: str
    preset: Preset

    @classmethod
    def find(cls, name_or_path: str) -> Self:
        """Look weights up and check every byte, without building the networks.

        Raises:
            WeightsError: missing, cut short or changed.
        """
        folder = find_weights(name_or_path).resolve()
        manifest = read_manifest(folder)
        path = folder / PRESET_FILE
        try:
            preset = parse_preset(json.loads(path.read_text("utf-8")), str(path))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} cannot be read ({error}): give a folder of `ldbfr export`") from error
        packaged = folder.parent == PRETRAINED_FOLDER.resolve()
        return cls(folder.name if packaged else str(folder), manifest_digest(manifest), preset)


class RestoreSettings(Settings):
    """Everything but the weights that an output's bytes depend on."""

    side: int
    """S, side of the faces in px; the preset's."""
    steps: int
    """Denoising steps; 0 is the first stage alone."""
    start_step: int
    scheduler: SchedulerName
    condition_scale: float
    color_correction: bool
    seed: int
    format: OutputFormat
    quality: int
    first_stage: bool
    """Whether the first stage's image is kept too."""

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal settings, equal digest."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @classmethod
    def resolve(
        cls,
        preset: Preset,
        *,
        steps: int | None = None,
        start_step: int | None = None,
        scheduler: SchedulerName | None = None,
        condition_scale: float | None = None,
        color_correction: bool = False,
        seed: int = 0,
        format: OutputFormat = "same",
        quality: int = 95,
        first_stage: bool = False,
    ) -> Self:
        """Take from the preset what is None, and check every value.

        Raises:
            ConfigError: naming the option, its value and the range.
        """
        sampling = preset.sampling
        settings = cls(
            side=preset.side,
            steps=sampling.num_inference_steps if steps is None else steps,
            start_step=sampling.start_step if start_step is None else start_step,
            scheduler=sampling.scheduler if scheduler is None else scheduler,
            condition_scale=sampling.condition_scale if condition_scale is None else condition_scale,
            color_correction=color_correction,
            seed=seed,
            format=format,
            quality=quality,
            first_stage=first_stage,
        )
        limit = preset.diffusion.num_train_timesteps
        check_range("--start-step", settings.start_step, 1, limit, f"{limit} starts from pure noise")
        check_range("--steps", settings.steps, 0, settings.start_step, "0 is the first stage alone")
        check_range("--quality", settings.quality, 1, 100, "95 keeps a face's detail")
        check_range("--seed", settings.seed, -(2**63), 2**63 - 1, "0 is the default")
        if not (math.isfinite(settings.condition_scale) and settings.condition_scale >= 0):
            raise ConfigError(
                f"--condition-scale {settings.condition_scale}: expected 0 or more; 1 is what was trained"
            )
        return settings
