"""Settings: frozen pydantic models, TOML presets, command-line overrides.

A preset is one TOML file with every number of a model and of its training. `load_preset` reads one, applies overrides,
and checks that the numbers fit together before anything is built.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from ldbfr.errors import ConfigError

Ablation = Literal["A", "B", "C", "D"]
SchedulerName = Literal["dpm_solver", "ddim", "ddpm", "unipc"]
Precision = Literal["bf16", "fp32"]

Share = Annotated[float, Field(ge=0, lt=1)]

PRESETS_FOLDER = Path(__file__).parent / "presets"

DEFAULT_WEIGHTS = "faces_128"
"""The reference weights, which commands and the endpoint take unless told."""


class Settings(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VQGANSettings(Settings):
    """Shape of a VQGAN; see `ldbfr.models.vqgan.VQGAN`."""

    block_out_channels: tuple[PositiveInt, ...] = Field(min_length=1)
    layers_per_block: PositiveInt
    code_dim: PositiveInt
    num_codes: PositiveInt
    level_attention: bool = False
    mid_attention: bool = True
    norm_num_groups: PositiveInt = 32

    @property
    def downsampling(self) -> int:
        """Image side over latent side."""
        return int(2 ** (len(self.block_out_channels) - 1))


class DualCrossAttentionSettings(Settings):
    """DCAM: which halves are present, and how the spatial half starts.

    `self_logit` sets the initial W_Q = W_K = gain · I: the attention logit of a position's own code, 0 being an
    unrelated one's (our choice). At 16 the fetched codes come through and gradients still flow; at 98 the softmax is
    a hard choice, nothing flows, and DC-VQR hardly learns (docs/training-log.md).
    """

    spatial: bool = True
    channel: bool = True
    self_logit: float = Field(16.0, gt=0)


class UNetSettings(Settings):
    """Shape of the diffusion UNet, level by level, finest first."""

    block_out_channels: tuple[PositiveInt, ...] = Field(min_length=2)
    layers_per_block: PositiveInt
    attention_levels: tuple[bool, ...]
    attention_head_dim: PositiveInt
    norm_num_groups: PositiveInt = 32


class InjectionSettings(Settings):
    """HQI: which injections (figure 9) and where."""

    ablation: Ablation = "D"
    at_full_resolution: bool = False
    kernel_size: Literal[1, 3] = 3
    head_dim: PositiveInt = 32


class DiffusionSettings(Settings):
    """The noise schedule: diffusers' `scaled_linear`, CompVis's "linear"."""

    num_train_timesteps: PositiveInt = 1000
    beta_start: float = Field(0.0015, gt=0, lt=1)
    beta_end: float = Field(0.0195, gt=0, lt=1)


class SamplingSettings(Settings):
    """How images are drawn unless a call says otherwise.

    `start_step` is where the diffusion starts: at `num_train_timesteps` from pure noise, below it from the first
    stage's latents noised to that step. `color_correction` takes low frequencies, thus colours, from the first stage,
    which was trained to get them right on average.
    """

    scheduler: SchedulerName = "dpm_solver"
    num_inference_steps: PositiveInt = 16
    start_step: PositiveInt = 1000
    condition_scale: float = Field(1.0, ge=0)
    color_correction: bool = False


class StageSettings(Settings):
    """What every training stage has: length, batch, optimiser, precision, and how often something is kept.

    The newest `keep_checkpoints` are kept and, with `keep_best`, the one that did best in the validation.
    """

    steps: PositiveInt
    batch_size: PositiveInt = 8
    gradient_accumulation: PositiveInt = 1
    learning_rate: float = Field(gt=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["constant", "cosine"] = "constant"
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    precision: Precision = "bf16"
    flip: bool = True
    profile: str = "train"
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    keep_best: bool = True
    log_every: PositiveInt = 50
    images_every: PositiveInt = 1000


class ReconstructionSettings(Settings):
    """Weights of the terms between an image and its reconstruction.

    `energy` compares how much detail there is in every window of 8 px, wherever in it: unlike the others it does not
    prefer no detail to detail that is a pixel off. `perceptual` needs a backbone: "vgg" is lpips's trained VGG,
    "random" the same network untrained. The discriminator learns from step `discriminator_start` on, and the generator
    hears it `discriminator_warmup` steps later: what a fresh one says is noise, which the adaptive weight would make as
    loud as the reconstruction. `discriminator_rate` is its learning rate over the generator's: at the same rate a
    generator that is trained already outruns it.
    """

    l1: float = Field(1.0, ge=0)
    l2: float = Field(0.0, ge=0)
    gradient: float = Field(0.0, ge=0)
    energy: float = Field(0.0, ge=0)
    perceptual: float = Field(0.0, ge=0)
    perceptual_backbone: Literal["vgg", "random"] = "vgg"
    adversarial: float = Field(0.0, ge=0)
    discriminator_start: int = Field(0, ge=0)
    discriminator_warmup: int = Field(0, ge=0)
    discriminator_rate: float = Field(1.0, gt=0)
    discriminator_channels: PositiveInt = 64
    discriminator_layers: PositiveInt = 3


class VQStageSettings(StageSettings):
    """Settings of `hq_vqgan` and `latent_vqgan`.

    `trains` "decoder" keeps the encoder and the codebook as they are (the paper's fine-tuning of a pretrained LDM).
    Codes that no position chose since the last revival are replaced by encoder outputs: after the first batch, then
    every `revive_every` steps, until `revive_until`.
    """

    reconstruction: ReconstructionSettings = ReconstructionSettings()
    codebook: float = Field(1.0, ge=0)
    commitment: float = Field(0.25, ge=0)
    trains: Literal["all", "decoder"] = "all"
    revive_every: PositiveInt = 100
    revive_until: int = Field(0, ge=0)


class DCVQRStageSettings(StageSettings):
    """Settings of `dc_vqr`: L_feature + λ · L_pixel (equation (4)), and what makes it stable.

    `anchor` pulls `lq_features` to the quantised target features; 0 is the paper's loss, which diverged for us.
    """

    reconstruction: ReconstructionSettings = ReconstructionSettings()
    feature: float = Field(1.0, ge=0)
    pixel: float = Field(1.0, ge=0)
    anchor: float = Field(1.0, ge=0)
    train_codebook: bool = False


class DiffusionStageSettings(StageSettings):
    """Settings of `prior` and `enhancer`.

    Timesteps are drawn as T · u^`timestep_power`, u uniform: 1 is the paper's, 2 spends half of the training on the
    lower quarter, which is what sampling from the first stage's latents visits. `train_unet` trains the UNet along
    with the injections, and `condition_dropout` drops f_HQ that often; `cache_latents` encodes the data set once,
    before the first step.
    """

    timestep_power: float = Field(1.0, ge=1)
    min_snr_gamma: float | None = Field(None, gt=0)
    train_unet: bool = False
    condition_dropout: float = Field(0.0, ge=0, le=1)
    cache_latents: bool = False


class ValidationSettings(Settings):
    """What happens beside the training: every checkpoint, or the newest if they come faster, is measured.

    `num_images` faces of the validation set are measured, the first `num_shown` of them are kept as a grid.
    """

    num_images: PositiveInt = 64
    num_shown: PositiveInt = 8
    batch_size: PositiveInt = 8


class TrainingSettings(Settings):
    """The five stages, in the order in which they are trained.

    `loader_processes` draw and degrade the images of the steps to come, for every worker; with 0 a thread does it. A
    core makes about 700 pairs of 128 px in a second: a fast GPU with a small model wants 8 or more.
    """

    seed: int = 0
    channels_last: bool = True
    loader_processes: int = Field(0, ge=0)
    validation: ValidationSettings = ValidationSettings()
    hq_vqgan: VQStageSettings
    latent_vqgan: VQStageSettings
    dc_vqr: DCVQRStageSettings
    prior: DiffusionStageSettings
    enhancer: DiffusionStageSettings


class Preset(Settings):
    """Every number of a model and of its training.

    `side` is S, the side of aligned faces in px; `template` names their framing: "ffhq" (512 px template of FFHQ and
    CelebA-HQ) or "tight" (faces fill the frame).
    """

    name: str
    side: PositiveInt
    template: Literal["ffhq", "tight"] = "ffhq"
    hq_vqgan: VQGANSettings
    latent_vqgan: VQGANSettings
    attention: DualCrossAttentionSettings = DualCrossAttentionSettings()
    unet: UNetSettings
    injection: InjectionSettings = InjectionSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    sampling: SamplingSettings = SamplingSettings()
    training: TrainingSettings

    @property
    def latent_side(self) -> int:
        """Side of the diffusion's latents, S/F."""
        return self.side // self.latent_vqgan.downsampling

    @property
    def feature_side(self) -> int:
        """Side of f_HQ, S/f."""
        return self.side // self.hq_vqgan.downsampling

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal settings, equal digest."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @model_validator(mode="after")
    def numbers_fit_together(self) -> Self:
        """Refuse a preset whose networks could not be put together, before any is built."""
        for problem in shape_problems(self):
            raise ValueError(problem)
        return self


def shape_problems(preset: Preset) -> Iterable[str]:
    """Every way in which the numbers of a preset contradict one another, as sentences with a remedy."""
    for key in ("hq_vqgan", "latent_vqgan"):
        vqgan: VQGANSettings = getattr(preset, key)
        if preset.side % vqgan.downsampling:
            yield (
                f"side {preset.side} is not a multiple of {key}'s downsampling {vqgan.downsampling} "
                f"(2^(levels - 1), {len(vqgan.block_out_channels)} levels); change side or {key}.block_out_channels"
            )
        yield from group_problems(f"{key}.block_out_channels", vqgan.block_out_channels, vqgan.norm_num_groups)
    unet, levels = preset.unet, len(preset.unet.block_out_channels)
    yield from group_problems("unet.block_out_channels", unet.block_out_channels, unet.norm_num_groups)
    if len(unet.attention_levels) != levels:
        yield f"unet.attention_levels has {len(unet.attention_levels)} entries, but the UNet has {levels} levels"
    if preset.latent_side % 2 ** (levels - 1):
        yield (
            f"latents of side {preset.latent_side} cannot be halved {levels - 1} times: "
            f"take fewer levels in unet.block_out_channels or another side"
        )
    for level, width in enumerate(unet.block_out_channels):
        if level < len(unet.attention_levels) and unet.attention_levels[level] and width % unet.attention_head_dim:
            yield f"unet level {level}: {width} channels are not a multiple of attention_head_dim"
        if level == 0 and not preset.injection.at_full_resolution:
            continue
        if width % preset.injection.head_dim:
            yield f"unet level {level}: {width} channels are not a multiple of injection.head_dim"
        yield from injection_problems(preset, preset.latent_side // 2**level)
    steps, start = preset.diffusion.num_train_timesteps, preset.sampling.start_step
    if start > steps:
        yield f"sampling.start_step {start} must be at most diffusion.num_train_timesteps {steps}"
    if preset.sampling.num_inference_steps > start:
        yield f"sampling.num_inference_steps {preset.sampling.num_inference_steps} must be at most start_step {start}"
    if preset.diffusion.beta_start >= preset.diffusion.beta_end:
        yield f"diffusion.beta_start {preset.diffusion.beta_start} must be below beta_end {preset.diffusion.beta_end}"


def injection_problems(preset: Preset, side: int) -> Iterable[str]:
    """Why f_HQ could not be brought to a UNet level of the given side by pixel-shuffle or -unshuffle."""
    own, channels = preset.feature_side, preset.hq_vqgan.code_dim
    if side and max(own, side) % min(own, side):
        yield f"hq_features of side {own} do not meet a UNet level of side {side}: one must divide the other"
    elif side > own and channels % (side // own) ** 2:
        yield f"hq_vqgan.code_dim {channels} is not a multiple of {(side // own) ** 2}, which pixel-shuffle needs"


def group_problems(key: str, widths: tuple[int, ...], groups: int) -> Iterable[str]:
    """Widths that the group normalisation cannot divide."""
    for width in widths:
        if width % groups:
            yield f"{key}: {width} channels are not a multiple of norm_num_groups {groups}"


def preset_names() -> list[str]:
    """Names of the presets that come with ldbfr."""
    return sorted(path.stem for path in PRESETS_FOLDER.glob("*.toml"))


def load_preset(name_or_path: str, overrides: Iterable[str] = ()) -> Preset:
    """Read a preset by name or from a TOML file, and apply overrides of the form `training.dc_vqr.steps=100`.

    Raises:
        ConfigError: no such preset, an unknown or ill-typed setting, or numbers that do not fit together.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = PRESETS_FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        raise ConfigError(
            f"no preset {name_or_path!r}: give one of {', '.join(preset_names())}, or the path of a .toml file"
        )
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        apply_override(values, override)
    return parse_preset(values, str(path))


def parse_preset(values: dict[str, Any], origin: str) -> Preset:
    """Check a nested dictionary of settings; `origin` names it in errors.

    Raises:
        ConfigError: listing every setting that is wrong.
    """
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc'])) or 'preset'}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"{origin} cannot be used:\n" + "\n".join(lines)) from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one nested value from `key.key=value`; the value is read as TOML, or as a string where it is none.

    Raises:
        ConfigError: the text has no "=", or a key on the way is no table.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must look like training.dc_vqr.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text in ("none", "null") else text
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {table!r} is a single setting, not a table")
    values[last] = value


def check_range(option: str, value: int, low: int, high: int, hint: str) -> None:
    """Raises ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{option} {value}: expected {low:,} to {high:,}; {hint}")
