"""What decides how an image is restored: the weights, and settings resolved against their preset."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Self

from ldbfr import __version__
from ldbfr.archive.naming import OutputFormat, OutputLayout
from ldbfr.config import Preset, SchedulerName, Settings, check_range, parse_preset
from ldbfr.errors import ConfigError, WeightsError
from ldbfr.photos.settings import PhotoSettings
from ldbfr.weights import PRESET_FILE, PRETRAINED_FOLDER, find_weights, manifest_digest, read_manifest


@dataclass(frozen=True)
class Weights:
    """Weights that were found whole.

    `reference` finds them again in another process: a name for those that come with ldbfr, else an absolute path.
    """

    reference: str
    digest: str
    preset: Preset
    size: int = 0
    """Bytes of all files."""

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
        size = sum(int(entry["size"]) for entry in manifest["files"].values())
        return cls(folder.name if packaged else str(folder), manifest_digest(manifest), preset, size)


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
    side_by_side: bool = False
    """Whether a picture of input and result side by side is kept too."""
    keep_metadata: bool = True
    """Whether the results carry the inputs' EXIF data and colour profile."""
    num_samples: int = 1
    """Restorations that are drawn of each face; above 1 they give its uncertainty."""
    photos: PhotoSettings | None = None
    """How faces are found and put back; None where every image is one aligned face."""

    def provenance(self, weights: str, input_sha256: str) -> dict[str, str | int]:
        """What a result's file says of where it comes from.

        Args:
            weights: their digest.
            input_sha256: of the input's bytes, in hexadecimal.
        """
        return {
            "software": f"ldbfr {__version__}",
            "weights": weights,
            "settings": self.digest(),
            "seed": self.seed,
            "input_sha256": input_sha256,
        }

    def pipeline_options(self) -> dict[str, Any]:
        """Of `LDBFRPipeline.__call__`."""
        return {
            "num_inference_steps": self.steps,
            "start_step": self.start_step,
            "scheduler": self.scheduler,
            "condition_scale": self.condition_scale,
            "color_correction": self.color_correction,
            "seed": self.seed,
            "num_samples": self.num_samples,
        }

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
        color_correction: bool | None = None,
        seed: int = 0,
        format: OutputFormat = "same",
        quality: int = 95,
        first_stage: bool = False,
        side_by_side: bool = False,
        keep_metadata: bool = True,
        num_samples: int = 1,
        photos: PhotoSettings | None = None,
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
            color_correction=sampling.color_correction if color_correction is None else color_correction,
            seed=seed,
            format=format,
            quality=quality,
            first_stage=first_stage,
            side_by_side=side_by_side,
            keep_metadata=keep_metadata,
            num_samples=num_samples,
            photos=photos,
        )
        limit = preset.diffusion.num_train_timesteps
        check_range("--start-step", settings.start_step, 1, limit, f"{limit} starts from pure noise")
        check_range("--steps", settings.steps, 0, settings.start_step, "0 is the first stage alone")
        check_range("--quality", settings.quality, 1, 100, "95 keeps a face's detail")
        check_range("--samples", num_samples, 1, 64 if settings.steps else 1, "the first stage alone has only one")
        check_range("--seed", settings.seed, -(2**63), 2**63 - 1, "0 is the default")
        if not (math.isfinite(settings.condition_scale) and settings.condition_scale >= 0):
            raise ConfigError(
                f"--condition-scale {settings.condition_scale}: expected 0 or more; 1 is what was trained"
            )
        return settings


class RunSettings(Settings):
    """What makes a run itself: the same command goes on with it, another one is refused."""

    inputs: tuple[str, ...]
    """Absolute places, sorted."""
    column: str | None
    """Of parquet files; None finds it."""
    weights: str
    """Digest of the weights."""
    layout: OutputLayout
    shard_images: int
    """Most images of a unit: what is recorded at a time, and lies in a shard together."""
    batch_size: int
    """Of the model. Another one may change the last bit of a result."""
    restore: RestoreSettings

    def values(self) -> dict[str, object]:
        """All settings side by side, for people and for comparison."""
        values = self.model_dump(mode="json")
        restore = values.pop("restore")
        photos = restore.pop("photos") or {"faces": "none"}
        return {**values, **restore, **photos}


PHOTOS_IN_A_UNIT = 16
"""Whose files travel together."""
IMAGES_IN_A_UNIT = 128
UNIT_BYTES = 2**25
"""Of the faces of a unit, which travel together: 42 faces of 512 px."""


def images_in_a_unit(side: int, photos: bool = False) -> int:
    """How many images are done between two records, unless told otherwise: fewer of large ones, which take longer."""
    if photos:
        return PHOTOS_IN_A_UNIT
    return max(1, min(IMAGES_IN_A_UNIT, UNIT_BYTES // (3 * side * side)))
