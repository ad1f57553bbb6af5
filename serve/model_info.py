"""What there is to say about weights, for clients."""

from __future__ import annotations

import re
from pathlib import Path

from ldbfr.config import Preset
from ldbfr.weights import find_weights
from serve.protocol import ModelInfo


def describe(preset: Preset, weights_digest: str, weights: str) -> ModelInfo:
    """What there is to say about weights that were found under a name or in a folder."""
    folder = find_weights(weights).resolve()
    sampling = preset.sampling
    return ModelInfo(
        name=folder.name,
        side=preset.side,
        template=preset.template,
        weights_digest=weights_digest,
        defaults={
            "steps": sampling.num_inference_steps,
            "condition_scale": sampling.condition_scale,
            "start_step": sampling.start_step,
            "scheduler": sampling.scheduler,
            "color_correction": sampling.color_correction,
        },
        license=license_of(folder),
    )


def license_of(folder: Path) -> str:
    """The first words below the heading "Licence" of the README beside weights; empty if there are none."""
    try:
        text = (folder / "README.md").read_text("utf-8")
    except OSError:
        return ""
    found = re.search(r"^#+ *licen[cs]e *\n+(?:\*\*([^*]+)\*\*|([^\n]+))", text, re.IGNORECASE | re.MULTILINE)
    return (found[1] or found[2]).strip().rstrip(".") if found else ""
