"""The reference weights: what their folder holds, what their card claims, and that they restore a face."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.demo import PORTRAITS
from ldbfr.config import DEFAULT_WEIGHTS, load_preset
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.evaluation.metrics import IdentityModel, sharpness
from ldbfr.images import Pixels
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.weights import find_weights, manifest_digest, read_manifest

STARTER = "faces_64"
FOLDER = find_weights(DEFAULT_WEIGHTS)
MEASURED = Path(__file__).parent.parent / "benchmarks" / "results"


def measured(weights: str) -> dict[str, Any]:
    """What benchmarks/quality.py found."""
    found: dict[str, Any] = json.loads((MEASURED / f"{weights}-quality.json").read_text("utf-8"))
    return found


RESULTS = measured(DEFAULT_WEIGHTS)


def test_they_fit_where_files_are_limited() -> None:
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 60e6
    assert max(sizes) < 16e6


def test_they_are_of_the_preset_of_their_name() -> None:
    preset = json.loads((FOLDER / "preset.json").read_text("utf-8"))
    assert preset == load_preset(DEFAULT_WEIGHTS).model_dump(mode="json")


@pytest.mark.parametrize("weights", [DEFAULT_WEIGHTS, STARTER])
def test_what_was_measured_is_these_weights(weights: str) -> None:
    found = measured(weights)
    assert found["weights"] == manifest_digest(read_manifest(find_weights(weights)))
    assert found["faces"] == 400


@pytest.mark.parametrize("weights", [DEFAULT_WEIGHTS, STARTER])
def test_the_default_steps_are_those_that_the_step_budget_chose(weights: str) -> None:
    chosen = json.loads((MEASURED / f"step-budget-{weights}.json").read_text("utf-8"))["settings"]["choice"]
    for sampling in (
        load_preset(weights).sampling,
        LDBFRPipeline.from_pretrained(weights).preset.sampling,
    ):
        assert (sampling.scheduler, sampling.num_inference_steps) == (chosen["scheduler"], chosen["steps"])


def test_the_starters_card_says_what_was_measured() -> None:
    card = (find_weights(STARTER) / "README.md").read_text("utf-8")
    for split, rows in measured(STARTER)["splits"].items():
        for name, row in rows.items():
            figures = (("psnr", 2), ("identity", 3), ("sharpness", 2))
            cells = ["{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*row[key], d=places) for key, places in figures]
            assert " | ".join([f"| {split}", name, *cells]) + " |" in card


def test_the_card_says_what_was_measured() -> None:
    card = (FOLDER / "README.md").read_text("utf-8")
    digits = {"psnr": 2, "identity": 3, "landmarks": 2, "sharpness": 2}
    for split, rows in RESULTS["splits"].items():
        for name, row in rows.items():
            cells = [
                "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*row[figure], d=places) for figure, places in digits.items()
            ]
            assert " | ".join([f"| {split}", name, *cells, f"{row['frechet']:.3f} |"]) in card
    for text, bar in RESULTS["bars"].items():
        verdict = "yes" if bar["holds"] else "**no**"
        assert f"| {text} | {bar['wanted']} | {bar['measured']:.3f} | {verdict} |" in card


@pytest.mark.parametrize("split", ["medium", "severe"])
def test_faces_that_they_never_saw_come_out_closer_to_themselves_and_sharp(split: str) -> None:
    """On average over four draws of each portrait: a single one may lose, by its colours above all."""
    pipeline = LDBFRPipeline.from_pretrained(DEFAULT_WEIGHTS)
    identity = IdentityModel()
    portraits = [portrait.face(pipeline.preset.template, pipeline.side) for portrait in PORTRAITS]
    faces = [portrait for portrait in portraits for _ in range(4)]
    recipes = [draw(get_profile(split), degradation_generator(0, split, number)) for number in range(len(faces))]
    lq = [apply(recipe, face) for recipe, face in zip(recipes, faces, strict=True)]
    output = pipeline(np.stack(lq), return_first_stage=True)

    def drift(images: Sequence[Pixels]) -> float:
        return float(np.mean([identity.distance(*pair) for pair in zip(images, faces, strict=True)]))

    assert drift(output.images) < drift(lq)
    assert drift(output.images) < drift(output.first_stage) + 0.03
    sharp = [np.mean([sharpness(image) for image in images]) for images in (output.images, output.first_stage)]
    assert sharp[0] > 1.3 * sharp[1]


def test_the_readmes_python_runs_and_its_comments_are_true() -> None:
    """As it stands there, with a face of the size that it names."""
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", readme, re.S) if "from_pretrained" in text]
    said = {name: tuple(map(int, numbers)) for name, *numbers in re.findall(r"(\w+): \(B, (\d+), (\d+)", block)}
    side = load_preset(DEFAULT_WEIGHTS).side
    assert said == {"lq": (side, side), "uncertainty": (side, side)}
    face = np.full((1, *said["lq"], 3), 128, np.uint8)
    names: dict[str, Any] = {"lq": face}
    exec(block.replace("num_samples=4", "num_samples=2, num_inference_steps=1"), names)
    assert names["result"].uncertainty.shape == (1, *said["uncertainty"])
