"""The paper's ablations as variants of one preset: what each changes, what it trains anew, and what it shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ldbfr.config import Preset, apply_override, parse_preset

Comparison = Literal["dcam", "diffusion", "injections"]

SHARED = ("hq_vqgan", "latent_vqgan", "prior")
"""Stages that no variant changes: trained once, before everything else."""


@dataclass(frozen=True)
class Variant:
    """One row of an ablation.

    `overrides` change the preset, `trains` are the stages that are its own; all others are the full model's.
    """

    name: str
    comparison: Comparison | None
    overrides: tuple[str, ...]
    trains: tuple[str, ...]


FULL = Variant("full", None, (), (*SHARED, "dc_vqr", "enhancer"))
VARIANTS = (
    FULL,
    Variant("dcam-none", "dcam", ("attention.spatial=false", "attention.channel=false"), ("dc_vqr", "enhancer")),
    Variant("dcam-spatial", "dcam", ("attention.channel=false",), ("dc_vqr", "enhancer")),
    Variant("dcam-channel", "dcam", ("attention.spatial=false",), ("dc_vqr", "enhancer")),
    Variant("injection-A", "injections", ("injection.ablation=A",), ("enhancer",)),
    Variant("injection-B", "injections", ("injection.ablation=B",), ("enhancer",)),
    Variant("injection-C", "injections", ("injection.ablation=C",), ("enhancer",)),
)
"""The full model first: what others share is its."""

FIRST_STAGE = ", first stage"
"""Behind a variant's name: its images without the diffusion."""


def chosen_variants(comparisons: Sequence[Comparison]) -> list[Variant]:
    """The full model, and what it is compared with."""
    return [one for one in VARIANTS if one.comparison is None or one.comparison in comparisons]


def variant_preset(preset: Preset, variant: Variant) -> Preset:
    """The preset with what the variant changes; seeds, data and steps stay."""
    values: dict[str, Any] = preset.model_dump(mode="json")
    for override in variant.overrides:
        apply_override(values, override)
    return parse_preset(values, f"variant {variant.name}")


def scaled(preset: Preset, share: float) -> Preset:
    """The preset with a share of every stage's steps, and of what happens at a step: warm-up, revivals, discriminator.

    Args:
        preset: of a full training.
        share: above 0; 0.1 takes a tenth of the steps.
    """
    values: dict[str, Any] = preset.model_dump(mode="json")
    for stage in (*SHARED, "dc_vqr", "enhancer"):
        settings = values["training"][stage]
        for key in ("steps", "checkpoint_every", "images_every", "log_every", "revive_every"):
            if key in settings:
                settings[key] = max(1, round(settings[key] * share))
        for key in ("warmup_steps", "revive_until"):
            if key in settings:
                settings[key] = round(settings[key] * share)
        for key in ("discriminator_start", "discriminator_warmup"):
            if key in settings.get("reconstruction", {}):
                settings["reconstruction"][key] = round(settings["reconstruction"][key] * share)
    return parse_preset(values, f"{preset.name} scaled by {share:g}")
