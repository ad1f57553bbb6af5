"""The paper's ablations: train the variants of a preset with the same seeds, data and steps, and compare them.

Below the output: `runs/VARIANT` (ordinary training runs, whose shared stages are links to the full model's),
`weights/VARIANT` (what `ldbfr evaluate` takes), and the evaluation of all. What is finished is passed by.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldbfr.config import Preset
from ldbfr.data.index import Faces
from ldbfr.errors import ConfigError
from ldbfr.evaluation.engine import Evaluation, Execution
from ldbfr.evaluation.gallery import make_gallery
from ldbfr.evaluation.report import Section, write_reports
from ldbfr.evaluation.restorers import InputItself, PipelineRestorer
from ldbfr.evaluation.results import Restorer, Results
from ldbfr.studies.sections import comparison
from ldbfr.studies.variants import FIRST_STAGE, FULL, SHARED, VARIANTS, Comparison, Variant, variant_preset
from ldbfr.training.export import export
from ldbfr.training.run import NO_INIT, check_request, check_starts, finished, train_run
from ldbfr.weights import MANIFEST

if TYPE_CHECKING:
    from ldbfr.training.runtime import Runtime

log = logging.getLogger(__name__)

TEXTS: Mapping[Comparison, tuple[str, str]] = {
    "dcam": (
        "Dual cross-attention (figure 7)",
        "DC-VQR with both halves of DCAM, the spatial or the channel half alone, or neither: the first stage's images, "
        "and those of the diffusion trained on top.",
    ),
    "diffusion": (
        "Diffusion on and off (figure 8)",
        "The first stage alone (0 steps) and the whole model.",
    ),
    "injections": (
        "Injections (figure 9, pictures as figure 10)",
        "A: concatenation on both paths; B: the encoder's injection on both; C: the decoder's on both; D, the full "
        "model: the encoder's on the way down, the decoder's on the way up.",
    ),
}


@dataclass(frozen=True)
class Training:
    """What all variants have in common.

    Args:
        preset: of the full model.
        images: training faces.
        output: folder of the study, on this machine.
        base: a run whose shared stages are taken instead of trained, if any.
        init: by shared stage, the folder of a network that it starts from.
    """

    preset: Preset
    images: Faces
    output: Path
    base: Path | None = None
    init: Mapping[str, Path] = field(default_factory=lambda: NO_INIT)

    def run(self, variant: Variant) -> Path:
        """Where a variant is trained."""
        return self.output / "runs" / variant.name

    def weights(self, variant: Variant) -> Path:
        """Where its weights are."""
        return self.output / "weights" / variant.name

    def check(self) -> None:
        """Refuse what cannot be trained before anything is.

        Raises:
            ConfigError: a stage cannot start, the base lacks a stage, or `init` would make the comparison unequal.
        """
        stages = FULL.trains
        check_request(self.preset, stages, self.init)
        if unequal := set(self.init) - set(SHARED):
            raise ConfigError(
                f"--init {', '.join(sorted(unequal))}: the variants train these anew, and would start from something "
                f"else than the full model; give it for {', '.join(SHARED)} only"
            )
        if self.base is None:
            check_starts(self.preset, stages, self.run(FULL), self.init)
            return
        for name in SHARED:
            if not finished(self.base, name, self.preset):
                raise ConfigError(
                    f"--base {self.base}: its stage {name} is not finished; train it, or leave --base out"
                )
        if given := set(self.init) & set(SHARED):
            raise ConfigError(f"--init {', '.join(sorted(given))}: these stages are --base's already; give one of both")

    def train(self, variants: Sequence[Variant], runtime: Runtime) -> bool:
        """Train and export the variants; False if the runtime asked to stop before.

        Raises:
            LDBFRError: as `ldbfr.training.run.train_run`.
        """
        for number, variant in enumerate(variants, 1):
            log.info("variant %s, %d of %d", variant.name, number, len(variants))
            self.share(variant)
            init = {stage: folder for stage, folder in self.init.items() if stage in self.own(variant)}
            preset = variant_preset(self.preset, variant)
            if not train_run(preset, self.own(variant), self.images, self.images, self.run(variant), runtime, init):
                return False
            self.export(variant)
        return True

    def own(self, variant: Variant) -> tuple[str, ...]:
        """The stages that are trained for a variant."""
        return tuple(name for name in variant.trains if self.base is None or name not in SHARED)

    def share(self, variant: Variant) -> None:
        """Link the stages that a variant has in common with the full model, or with the base.

        Raises:
            ConfigError: the output has them from elsewhere.
        """
        for name in FULL.trains:
            if name not in self.own(variant):
                source = self.base if self.base is not None and name in SHARED else self.run(FULL)
                place = self.run(variant) / name
                target = (source / name).resolve()
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.is_symlink() and place.resolve() == target:
                    continue
                if place.is_symlink() or place.exists():
                    raise ConfigError(
                        f"{place} is {place.resolve()}, this command takes {target}: give --base as it was (or leave "
                        "it out as it was), or another --output"
                    )
                os.symlink(target, place)

    def export(self, variant: Variant) -> None:
        """Write a variant's weights in full precision, where that has not been done."""
        folder = self.weights(variant)
        if not (folder / MANIFEST).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of an export that was stopped
            export(self.run(variant), folder, torch.float32)


def restorers_of(training: Training, variants: Sequence[Variant], device: str, seed: int) -> list[Restorer]:
    """The input, and every variant; with the first stage where it is the variant's own."""
    restorers: list[Restorer] = [InputItself()]
    for variant in variants:
        weights = str(training.weights(variant))
        if "dc_vqr" in variant.trains:
            name = f"{variant.name}{FIRST_STAGE}"
            restorers.append(PipelineRestorer(name, weights, device, num_inference_steps=0, seed=seed))
        restorers.append(PipelineRestorer(variant.name, weights, device, seed=seed))
    return restorers


def members(which: Comparison, names: Sequence[str]) -> list[str]:
    """The restorers that a comparison puts side by side, in order."""
    full = ["input", f"{FULL.name}{FIRST_STAGE}", FULL.name]
    if which == "diffusion":
        return full
    own = {one.name for one in VARIANTS if one.comparison == which}
    others = [name for name in names if name.removesuffix(FIRST_STAGE) in own]
    return ["input", *others, *(full[1:] if which == "dcam" else full[2:])]


def compare(evaluation: Evaluation, comparisons: Sequence[Comparison], execution: Execution) -> tuple[Results, str]:
    """Evaluate the variants and write the report; the results and the place of report.html."""
    results = evaluation(execution)
    rows = evaluation.all_rows()
    names = list(results.restorers)
    sections: list[Section] = [
        comparison(evaluation, results, rows, which, *TEXTS[which], members(which, names)) for which in comparisons
    ]
    shown = [row for row in rows if row.restorer in members("diffusion", names)]
    gallery = make_gallery(evaluation.test_set, shown, results.measures, evaluation.output, FULL.name)
    page, _ = write_reports(evaluation.output, results, gallery, "Ablations", sections)
    return results, page


def settings_of(training: Training, variants: Sequence[Variant]) -> dict[str, Any]:
    """What the report states of the training."""
    return {
        "preset": training.preset.name,
        "preset_digest": training.preset.digest(),
        "training_seed": training.preset.training.seed,
        "steps": {name: getattr(training.preset.training, name).steps for name in FULL.trains},
        "batch": {name: getattr(training.preset.training, name).batch_size for name in FULL.trains},
        "base": None if training.base is None else str(training.base),
        "init": {stage: str(folder) for stage, folder in training.init.items()},
        "faces": len(training.images),
        "data_digest": training.images.digest,
        "variants": {variant.name: list(variant.overrides) for variant in variants},
    }
