"""Ablations and the step budget: what is trained and shared, going on, the rule, and the curves."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldbfr.cli import main
from ldbfr.config import load_preset
from ldbfr.evaluation.building import build_testset
from ldbfr.evaluation.engine import score_of
from ldbfr.evaluation.results import Entry, Measure, Results, Row
from ldbfr.images import encode_image
from ldbfr.studies.ablations import members
from ldbfr.studies.charts import Curve, Point, chart
from ldbfr.studies.choice import choose
from ldbfr.studies.variants import FULL, SHARED, VARIANTS, chosen_variants, scaled, variant_preset
from tests import tiny
from tests.evaluating import save_weights

Command = Callable[..., tuple[int | str, str]]
MEASURED = ("--metrics", "psnr", "sharpness", "--batch-size", "4", "--device", "cpu", "--processes", "1")


@pytest.fixture
def ldbfr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process: its exit code or error, and what it printed."""

    def run(*arguments: str | Path) -> tuple[int | str, str]:
        monkeypatch.setattr(sys, "argv", ["ldbfr", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blob faces to train on and to make test sets from."""
    folder = tmp_path_factory.mktemp("faces")
    for number, face in enumerate(tiny.blob_faces(6)):
        (folder / f"{number}.png").write_bytes(encode_image(face, "png"))
    return folder


@pytest.fixture(scope="module")
def test_set(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A test set of six images."""
    place = str(tmp_path_factory.mktemp("testset") / "blobs")
    build_testset(str(faces), place, side=tiny.SIDE, source_framing="tight", framing="tight", processes=1)
    return place


# ---- variants ----


def test_every_variant_differs_from_the_full_model_in_what_it_is_named_after() -> None:
    preset = load_preset("tiny")
    full = variant_preset(preset, FULL).model_dump()
    assert full == preset.model_dump()
    for variant in VARIANTS[1:]:
        other = variant_preset(preset, variant).model_dump()
        differing = {key for key in full if full[key] != other[key]}
        assert differing == {"dcam": {"attention"}, "injections": {"injection"}}[str(variant.comparison)]
        assert other["training"] == full["training"]  # seeds and steps
        assert not set(variant.trains) & set(SHARED)
    halves = [variant_preset(preset, one).attention for one in VARIANTS[:4]]
    assert {(one.spatial, one.channel) for one in halves} == {
        (True, True),
        (False, False),
        (True, False),
        (False, True),
    }
    assert [variant_preset(preset, one).injection.ablation for one in VARIANTS[4:]] == ["A", "B", "C"]


def test_what_is_compared_decides_what_is_trained() -> None:
    assert chosen_variants(["diffusion"]) == [FULL]
    assert [one.name for one in chosen_variants(["injections"])] == [
        "full",
        "injection-A",
        "injection-B",
        "injection-C",
    ]
    names = ["input", "full, first stage", "full", "dcam-none, first stage", "dcam-none", "injection-A"]
    assert members("dcam", names) == ["input", "dcam-none, first stage", "dcam-none", "full, first stage", "full"]
    assert members("injections", names) == ["input", "injection-A", "full"]
    assert members("diffusion", names) == ["input", "full, first stage", "full"]


def test_a_scaled_preset_has_a_share_of_every_step_and_nothing_else() -> None:
    preset = load_preset("faces_64")
    fewer = scaled(preset, 0.1)
    assert [getattr(fewer.training, name).steps for name in FULL.trains] == [100, 100, 200, 150, 280]
    assert fewer.training.hq_vqgan.revive_until == 70
    assert fewer.training.prior.warmup_steps == 10
    assert scaled(preset, 1.0) == preset
    one = fewer.model_dump()
    one["training"] = preset.model_dump()["training"]
    assert one == preset.model_dump()
    assert scaled(preset, 1e-6).training.dc_vqr.steps == 1


# ---- ablations ----


def test_the_ablations_train_share_evaluate_and_go_on(
    ldbfr: Command, faces: Path, test_set: str, tmp_path: Path
) -> None:
    output = tmp_path / "study"
    command = ("ablations", test_set, "--data", faces, "--output", output, "--preset", "tiny", *MEASURED)
    heard = signal.getsignal(signal.SIGINT)
    code, said = ldbfr(*command)
    assert code == 0
    assert signal.getsignal(signal.SIGINT) is heard
    assert said.strip().endswith("report.html")
    results = Results.model_validate_json((output / "results.json").read_text("utf-8"))
    assert len(results.restorers) == 1 + 4 * 2 + 3
    for stage in SHARED:
        assert (output / "runs" / "injection-A" / stage).resolve() == (output / "runs" / "full" / stage).resolve()
    assert (output / "runs" / "injection-B" / "dc_vqr").is_symlink()
    assert not (output / "runs" / "dcam-none" / "dc_vqr").is_symlink()
    digests = {about["weights_digest"] for about in results.restorers.values() if "weights_digest" in about}
    assert len(digests) == 7
    markdown = (output / "report.md").read_text("utf-8")
    for head in ("## Dual cross-attention", "## Diffusion on and off", "## Injections", "pictures/dcam.jpg"):
        assert head in markdown
    assert results.settings["steps"] == dict.fromkeys(FULL.trains, 4)
    before = (output / "results.json").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (output / "weights").rglob("*") if path.is_file()}
    assert ldbfr(*command)[0] == 0
    assert (output / "results.json").read_bytes() == before
    assert times == {path: path.stat().st_mtime_ns for path in times}
    based = ("ablations", test_set, "--data", faces, "--output", tmp_path / "based", "--base", output / "runs" / "full")
    assert ldbfr(*based, "--compare", "diffusion", *MEASURED)[0] == 0
    again = Results.model_validate_json((tmp_path / "based" / "results.json").read_text("utf-8"))
    assert again.scores["full"] == results.scores["full"]  # the same seeds, data and steps
    other = tmp_path / "other"
    shutil.copytree(output / "runs" / "full", other)
    refused = ldbfr(*based[:-1], other, "--compare", "diffusion", *MEASURED)[0]
    assert f"this command takes {other / 'hq_vqgan'}" in str(refused)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scale", "0"], "--scale 0.0: expected above 0"),
        (["--preset", "huge"], "no preset 'huge'"),
        (["--preset", "faces_64"], "has faces of 32 px, the preset trains for 64 px"),
        (["--base", "nowhere"], "nowhere is no training run"),
        (["--base", "nowhere", "--set", "side=64"], "do not go with --base"),
        (["--preset", "tiny", "--init", "dc_vqr=/"], "--init dc_vqr: the variants train these anew"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    ldbfr: Command, faces: Path, test_set: str, tmp_path: Path, options: list[str], said: str
) -> None:
    code, _ = ldbfr("ablations", test_set, "--data", faces, "--output", tmp_path / "out", *options)
    assert said in str(code)
    assert not (tmp_path / "out").exists()


def test_ablations_need_faces_and_a_folder_of_this_machine(ldbfr: Command, faces: Path, test_set: str) -> None:
    assert "--data: nothing given" in str(ldbfr("ablations", test_set, "--output", "out")[0])
    assert "variants share" in str(ldbfr("ablations", test_set, "--data", faces, "--output", "s3://bucket/out")[0])


# ---- step budget ----


def test_the_step_budget_measures_the_grid_and_says_which_default_follows(
    ldbfr: Command, test_set: str, tmp_path: Path
) -> None:
    weights, output = save_weights(tmp_path / "tiny"), tmp_path / "steps"
    grid = ("--steps", "1", "4", "--schedulers", "dpm_solver", "ddpm", "--weights", weights)
    code, said = ldbfr("step-budget", test_set, "--output", output, *grid, *MEASURED)
    assert code == 0
    results = Results.model_validate_json((output / "results.json").read_text("utf-8"))
    cells = {"dpm_solver, 1", "dpm_solver, 4", "ddpm, 1", "ddpm, 4"}
    assert set(results.restorers) == {"input", "first-stage"} | cells
    assert set(results.seconds) == {"first-stage"} | cells
    one, other = (results.scores[f"{name}, 1"]["all"]["psnr"].mean for name in ("dpm_solver", "ddpm"))
    assert one == pytest.approx(other, rel=1e-4)  # with one step all samplers are one formula
    choice = json.loads((output / "choice.json").read_text("utf-8"))
    assert f"{choice['scheduler']}, {choice['steps']}" in cells
    assert choice["reason"] in said
    page, markdown = (output / "report.html").read_text("utf-8"), (output / "report.md").read_text("utf-8")
    assert page.count('<svg class="chart"') == 3  # PSNR, sharpness, time
    for name in ("psnr", "sharpness", "seconds"):
        assert f"curves/{name}.svg" in markdown
        assert (output / "curves" / f"{name}.svg").read_text("utf-8").startswith("<svg xmlns=")
    assert "--steps 0: expected 1" in str(ldbfr("step-budget", test_set, "--output", output, "--steps", "0")[0])


IDENTITY = Measure(name="identity", label="Identity", better="lower", protocol="dlib")
LANDMARKS = Measure(name="landmarks", label="Landmarks", better="lower", protocol="dlib")
SHARPNESS = Measure(name="sharpness", label="Sharpness", better="nearer to 1", protocol="a ratio")
PSNR = Measure(name="psnr", label="PSNR", better="higher", protocol="a formula")


def measured(**values: dict[str, list[float]]) -> tuple[Results, list[Row]]:
    """Results and rows of restorers, from a measure's number on each image; every two images are of a split."""
    rows = [
        Row(name, entry(place), {measure: numbers[place] for measure, numbers in own.items()})
        for name, own in values.items()
        for place in range(len(next(iter(own.values()))))
    ]
    scores = {}
    for name, own in values.items():
        mine = [row for row in rows if row.restorer == name]
        scores[name] = {"all": {measure: score_of(mine, measure, len(mine), 0) for measure in own}}
    results = Results(
        test_set={},
        restorers={name: {} for name in values},
        measures=(IDENTITY, LANDMARKS, SHARPNESS, PSNR),
        scores=scores,
        settings={},
        versions={},
        machine={},
    )
    return results, rows


def entry(place: int) -> Entry:
    """One image of a test set."""
    split = ("mild", "medium", "severe")[place // 2]
    return Entry(name=f"{split}/{place:06d}", split=split, lq="lq.png")


def test_the_fewest_steps_that_miss_the_best_by_no_more_than_the_margins_are_chosen() -> None:
    results, rows = measured(
        one={"identity": [0.50, 0.56], "landmarks": [1.90, 1.90], "psnr": [30, 30]},
        two={"identity": [0.49, 0.545], "landmarks": [1.90, 1.95], "psnr": [20, 20]},
        eight={"identity": [0.47, 0.53], "landmarks": [1.85, 1.85], "psnr": [10, 10]},
    )
    choice = choose(results, rows, {"one": ("ddim", 1), "two": ("ddim", 2), "eight": ("ddim", 8)})
    assert choice is not None
    assert choice.name == "two"  # PSNR is not asked
    passed = {name: [key for key, found in own.items() if found.within] for name, own in choice.differences.items()}
    assert passed == {"one": ["landmarks"], "two": ["identity", "landmarks"], "eight": ["identity", "landmarks"]}
    assert choice.differences["two"]["identity"].mean == pytest.approx(0.0175)
    assert "every measure of those that judge (identity, landmarks)" in choice.reason
    assert "ddim with 2 steps" in choice.reason


def test_differences_are_of_the_same_images_however_much_these_differ_among_themselves() -> None:
    """Intervals of the means overlap widely here, and yet every image says the same."""
    base = [0.1, 0.9, 0.3, 0.7, 0.2, 0.8]
    results, rows = measured(
        one={"identity": [value + 0.03 for value in base]}, two={"identity": [value + 0.01 for value in base]},
        four={"identity": base},
    )  # fmt: skip
    choice = choose(results, rows, {"one": ("ddim", 1), "two": ("ddim", 2), "four": ("ddim", 4)})
    assert choice is not None
    assert results.scores["one"]["all"]["identity"].low < results.scores["four"]["all"]["identity"].mean
    assert choice.name == "two"
    one = choice.differences["one"]["identity"]
    assert (one.low, one.mean, one.high) == pytest.approx((0.03, 0.03, 0.03))
    assert one.sure


def test_too_few_images_to_be_sure_are_named() -> None:
    results, rows = measured(
        one={"identity": [0.5, 0.6, 0.5, 0.6, 0.5, 0.6]}, two={"identity": [0.4, 0.7, 0.4, 0.7, 0.4, 0.6]}
    )
    choice = choose(results, rows, {"one": ("ddim", 1), "two": ("ddim", 2)})
    assert choice is not None
    assert choice.name == "one"
    assert choice.reason.count("within the margin of 0.02, though 6 images cannot make sure of it") == 1


def test_where_no_number_is_as_good_in_everything_the_most_counts_and_it_is_said() -> None:
    results, rows = measured(
        one={"identity": [0.40, 0.41], "landmarks": [3.0, 3.1]}, two={"identity": [0.60, 0.61], "landmarks": [1.0, 1.1]}
    )
    choice = choose(results, rows, {"one": ("ddpm", 1), "two": ("ddpm", 2)})
    assert choice is not None
    assert choice.name == "one"
    assert "1 of 2 measures (none is in more)" in choice.reason
    assert "beyond the margin of 0.1" in choice.reason


def test_more_than_1_is_as_bad_as_less_where_1_is_best() -> None:
    results, rows = measured(
        one={"sharpness": [1.2, 1.2]}, two={"sharpness": [0.9, 1.0]}, four={"sharpness": [1.08, 0.90]}
    )
    choice = choose(results, rows, {"one": ("ddim", 1), "two": ("ddim", 2), "four": ("ddim", 4)})
    assert choice is not None
    found = {name: own["sharpness"] for name, own in choice.differences.items()}
    assert [found[name].mean for name in ("one", "two", "four")] == pytest.approx([0.19, 0.04, 0.0])
    assert choice.name == "two"


def test_of_equal_steps_the_fastest_is_chosen_and_nothing_where_nothing_judges() -> None:
    results, rows = measured(a={"identity": [0.5, 0.6]}, b={"identity": [0.5, 0.6]})
    results = results.model_copy(update={"seconds": {"a": 2.0, "b": 1.0}})
    choice = choose(results, rows, {"a": ("ddim", 4), "b": ("unipc", 4)})
    assert choice is not None
    assert choice.name == "b"
    assert choose(*measured(a={"psnr": [1.0, 2.0]}), {"a": ("ddim", 4)}) is None


means = st.floats(-1e4, 1e4) | st.just(math.inf)
points = st.lists(st.tuples(st.integers(1, 1000), means), min_size=1, max_size=6, unique_by=lambda point: point[0])


@given(st.lists(points, min_size=1, max_size=4), st.booleans())
def test_a_chart_stays_inside_its_frame(drawn: list[list[tuple[int, float]]], alone: bool) -> None:
    curves = [
        Curve(f"<{n}>", tuple(Point(steps, mean, mean - 1, mean + 1) for steps, mean in sorted(own)))
        for n, own in enumerate(drawn)
    ]
    svg = chart("a & b", curves, ("first", 3.0), alone)
    assert "<0>" not in svg
    assert "NaN" not in svg
    for x, y in re.findall(r'cx="([-0-9.]+)" cy="([-0-9.]+)"', svg):
        assert 0 <= float(x) <= 460
        assert 0 <= float(y) <= 280
    finite = sum(math.isfinite(mean) for own in drawn for _, mean in own)
    assert svg.count("<circle") == finite
