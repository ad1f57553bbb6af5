"""The engine of an evaluation: its laws, going on, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldbfr import storage
from ldbfr.errors import ConfigError, InputError
from ldbfr.evaluation.bootstrap import bootstrap_means, interval
from ldbfr.evaluation.building import build_testset
from ldbfr.evaluation.engine import Evaluation, Execution, Metrics, on_this_machine, score_of, strata_of
from ldbfr.evaluation.machine import kind_of_machine
from ldbfr.evaluation.metrics import psnr, sharpness
from ldbfr.evaluation.restorers import FolderRestorer, InputItself, PipelineRestorer, load_pipeline
from ldbfr.evaluation.results import Entry, Restorer, Results, Row, TestSet
from ldbfr.evaluation.testsets import open_testset
from ldbfr.evaluation.work import Batch, Places, RestoreStep, batches_of, digest_of, slug, splits_of
from ldbfr.images import encode_image
from ldbfr.runner import run_here
from tests import tiny
from tests.evaluating import BlobSet, Brightness, Psnr, Sharpness, degrade, images_of, metrics, save_weights

TEST_SET = BlobSet(6)
LABELS = ("test_set", "restorers", "measures", "missing", "scores", "settings", "versions")
"""What two evaluations of the same have in common: all but the time."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pipeline's weights."""
    return save_weights(tmp_path_factory.mktemp("weights") / "tiny")


def evaluation(output: Path, *restorers: Restorer, test_set: TestSet = TEST_SET, **options: object) -> Evaluation:
    given = {"metrics": metrics(), "batch_size": 2, **options}
    return Evaluation(test_set, restorers or (InputItself(),), output=str(output), **given)  # type: ignore[arg-type]


def rows_of(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "rows.jsonl").read_text("utf-8").splitlines()]


# ---- laws ----


def test_the_input_itself_has_the_inputs_own_figures(tmp_path: Path) -> None:
    results = evaluation(tmp_path)(on_this_machine())
    lq, originals = images_of(TEST_SET)
    own = np.array([psnr(*pair) for pair in zip(lq, originals, strict=True)])
    sharp = np.array([sharpness(image) for image in lq])
    scores = results.scores["input"]
    assert list(scores) == ["all", "mild", "severe"]
    for split, which in (("all", slice(None)), ("mild", slice(0, 3)), ("severe", slice(3, None))):
        assert scores[split]["psnr"].mean == pytest.approx(own[which].mean(), rel=1e-12)
        assert scores[split]["sharpness"].mean == pytest.approx(sharp[which].mean(), rel=1e-12)
        difference = abs(np.mean([a.mean() - b.mean() for a, b in zip(lq[which], originals[which], strict=True)]))
        assert scores[split]["brightness"].mean == pytest.approx(difference, rel=1e-9)
        assert scores[split]["psnr"].num_images == len(own[which])
    assert [row["psnr"] for row in rows_of(tmp_path)] == list(own)
    assert results.seconds == {}


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    results = evaluation(tmp_path, settings={"command": "ldbfr evaluate"})(on_this_machine())
    assert Results.model_validate_json((tmp_path / "results.json").read_text("utf-8")) == results


def test_a_folder_of_a_pipelines_own_results_has_the_pipelines_rows(tmp_path: Path, weights: str) -> None:
    pipeline = PipelineRestorer("ours", weights)
    evaluation(tmp_path / "one", pipeline)(on_this_machine())
    folder = FolderRestorer("theirs", str(tmp_path / "one" / "images" / "ours"))
    evaluation(tmp_path / "two", folder)(on_this_machine())
    named = [{**row, "restorer": "theirs"} for row in rows_of(tmp_path / "one")]
    assert rows_of(tmp_path / "two") == named
    restored = load_pipeline(weights, pipeline.digest, "cpu")(images_of(TEST_SET)[0]).images
    for entry, image in zip(TEST_SET.entries, restored, strict=True):
        found = Places(str(tmp_path / "one"), "ours").read_image(entry.name).astype(int)
        assert np.abs(found - image).max() <= 1  # other batches: a network's last bit


def test_processes_measure_what_one_measures(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "one")(on_this_machine(1))
    two = evaluation(tmp_path / "two")(on_this_machine(2))
    assert one.scores == two.scores
    assert (tmp_path / "one" / "rows.jsonl").read_bytes() == (tmp_path / "two" / "rows.jsonl").read_bytes()


# ---- going on ----


class StoppedError(Exception):
    """Someone pulled the plug."""


def stopping(after: int, what: str) -> Execution:
    """Works here, and stops after so many batches of a kind of work."""
    here = on_this_machine()
    left = [after]

    def restoring(step: RestoreStep, batches: Sequence[Batch]) -> Iterator[int]:
        for number in run_here(step, batches):
            yield number
            left[0] -= 1
            if not left[0]:
                raise StoppedError

    def measuring(step: object, batches: Sequence[Batch]) -> Iterator[int]:
        for number in run_here(step, batches):  # type: ignore[arg-type]
            yield number
            left[0] -= 1
            if not left[0]:
                raise StoppedError

    if what == "restoring":
        return Execution(restoring, here.measuring, here.sets)
    return Execution(here.restoring, measuring, here.sets)


@pytest.mark.parametrize("what", ["restoring", "measuring"])
def test_a_stopped_evaluation_goes_on_to_the_same_results(tmp_path: Path, weights: str, what: str) -> None:
    restorers = (InputItself(), PipelineRestorer("ours", weights))
    whole = evaluation(tmp_path / "whole", *restorers)(on_this_machine())
    stopped = evaluation(tmp_path / "stopped", *restorers)
    for _ in range(4):
        with pytest.raises(StoppedError):
            stopped(stopping(1, what))
    results = stopped(on_this_machine())
    for label in LABELS:
        assert getattr(results, label) == getattr(whole, label), label
    assert (tmp_path / "stopped" / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    metric = Psnr()
    own = Metrics((metric,))
    evaluation(tmp_path, metrics=own)(on_this_machine())
    assert metric.calls == 6

    def none(step: object, items: Sequence[object]) -> Iterator[int]:
        assert not items
        yield from ()

    again = evaluation(tmp_path, metrics=own)(Execution(none, none, run_here))
    assert metric.calls == 6
    assert again == Results.model_validate_json((tmp_path / "results.json").read_text("utf-8"))


def test_a_restorer_and_a_metric_can_be_added_later(tmp_path: Path, weights: str) -> None:
    evaluation(tmp_path, metrics=Metrics((Psnr(),)))(on_this_machine())
    results = evaluation(tmp_path, InputItself(), PipelineRestorer("ours", weights))(on_this_machine())
    assert set(results.scores) == {"input", "ours"}
    assert set(results.scores["input"]["all"]) == {"psnr", "sharpness", "brightness"}
    assert set(results.seconds) == {"ours"}


def test_results_of_other_settings_are_refused(tmp_path: Path, weights: str) -> None:
    evaluation(tmp_path, PipelineRestorer("ours", weights))(on_this_machine())
    with pytest.raises(
        ConfigError, match=r"of ours with another restorer \(seed 0 there, 1 here\): name another --output"
    ):
        evaluation(tmp_path, PipelineRestorer("ours", weights, seed=1))(on_this_machine())
    with pytest.raises(ConfigError, match=r"another batch_size \(2 there, 3 here\)"):
        evaluation(tmp_path, PipelineRestorer("ours", weights), batch_size=3)(on_this_machine())
    other = BlobSet(6, about={"digest": "another"})
    text = (
        r"another test_set \(its images have the same names, but the files are others: digest of blobs there, another"
    )
    with pytest.raises(ConfigError, match=text):
        evaluation(tmp_path, PipelineRestorer("ours", weights), test_set=other)(on_this_machine())
    with pytest.raises(ConfigError, match=r"ours with other images \(by their names or splits, or by --limit\): name"):
        evaluation(tmp_path, PipelineRestorer("ours", weights), limit=2)(on_this_machine())


def pairs_at(folder: Path, seed: int = 0) -> tuple[str, str]:
    """A folder of four low-quality images and one of their originals; the seed changes what they hold, no name."""
    for number, face in enumerate(tiny.blob_faces(4 + seed)[seed:]):
        for part, image in (("lq", degrade(face, 2)), ("hq", face)):
            storage.write_bytes(str(folder / part / f"{number}.png"), encode_image(image, "png"))
    return str(folder / "lq"), str(folder / "hq")


def opened(folders: tuple[str, str], originals: bool) -> TestSet:
    return open_testset(*folders) if originals else open_testset(folders[0])


@pytest.mark.parametrize("originals", [True, False])
def test_results_of_other_files_of_the_same_names_are_refused(tmp_path: Path, originals: bool) -> None:
    options: dict[str, Any] = {"metrics": Metrics((Sharpness(),))}
    folders = pairs_at(tmp_path / "one")
    first = evaluation(tmp_path / "out", test_set=opened(folders, originals), **options)(on_this_machine())
    moved = pairs_at(tmp_path / "moved")
    again = evaluation(tmp_path / "out", test_set=opened(moved, originals), **options)(on_this_machine())
    assert again.scores == first.scores  # the files decide, not their place
    rows = (tmp_path / "out" / "rows.jsonl").read_bytes()
    refused = "input with another test_set .its images have the same names, but the files are others: digest"
    other = opened(pairs_at(tmp_path / "two", seed=1), originals)
    with pytest.raises(ConfigError, match=refused):
        evaluation(tmp_path / "out", test_set=other, **options)(on_this_machine())
    Path(folders[originals], "3.png").write_bytes(Path(folders[originals], "2.png").read_bytes())  # in its place
    with pytest.raises(ConfigError, match=refused):
        evaluation(tmp_path / "out", test_set=opened(folders, originals), **options)(on_this_machine())
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == rows


@pytest.mark.parametrize("originals", [True, False])
def test_an_output_that_recorded_only_the_names_of_a_folder_is_refused(tmp_path: Path, originals: bool) -> None:
    test_set = opened(pairs_at(tmp_path), originals)
    own = evaluation(tmp_path / "out", test_set=test_set, metrics=Metrics((Sharpness(),)))
    own(on_this_machine())
    record = tmp_path / "out" / "work" / "input" / "about.json"
    about = json.loads(record.read_text("utf-8"))
    record.write_text(
        json.dumps({**about, "test_set": about["images"]}), "utf-8"
    )  # as it was until folders had digests
    with pytest.raises(ConfigError, match="an earlier version of ldbfr recorded only the images' names"):
        own(on_this_machine())


def test_an_evaluation_of_a_built_set_goes_on_by_the_set_s_own_digest(tmp_path: Path) -> None:
    pairs_at(tmp_path)
    built = build_testset(str(tmp_path / "hq"), str(tmp_path / "set"), side=tiny.SIDE, processes=1)
    test_set = open_testset(str(tmp_path / "set"))
    own = evaluation(tmp_path / "out", test_set=test_set)
    own(on_this_machine())
    names = digest_of([[entry.name, entry.split] for entry in test_set.entries])
    about = {"restorer": InputItself().about, "test_set": built.digest, "images": names, "batch_size": 2}
    record = tmp_path / "out" / "work" / "input" / "about.json"
    assert json.loads(record.read_text("utf-8")) == about  # an output with this record is gone on with
    own(on_this_machine())


# ---- what cannot be measured ----


def test_what_is_missing_is_listed_with_its_reason_and_has_no_number(tmp_path: Path) -> None:
    results = evaluation(tmp_path, metrics=metrics(least=4))(on_this_machine())
    reasons = {(one.name, one.reason) for one in results.missing}
    assert ("fid", "its network is not on this machine") in reasons
    assert ("brightness", "mild, severe: 3 images, expected at least 4") in reasons
    assert "brightness" in results.scores["input"]["all"]
    assert "brightness" not in results.scores["input"]["mild"]
    assert "fid" not in json.dumps([measure.name for measure in results.measures])


def test_without_originals_only_what_needs_none_is_measured(tmp_path: Path) -> None:
    own = Metrics(metrics().pair)
    results = evaluation(tmp_path, test_set=BlobSet(4, originals=False), metrics=own)(on_this_machine())
    assert set(results.scores["input"]["all"]) == {"sharpness"}
    assert [(one.name, one.reason) for one in results.missing] == [
        ("psnr", "the test set has no originals to measure against")
    ]
    assert [measure.name for measure in results.measures] == ["sharpness"]


def test_an_evaluation_that_would_measure_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing can be measured: fid: its network is not on this machine"):
        evaluation(tmp_path, metrics=Metrics((), (), metrics().missing))(on_this_machine())
    with pytest.raises(ConfigError, match="nothing can be measured: blobs has no originals; name metrics"):
        evaluation(tmp_path, test_set=BlobSet(2, originals=False), metrics=Metrics((Psnr(),)))(on_this_machine())


def test_equal_images_are_infinitely_near_and_say_so(tmp_path: Path) -> None:
    entries = [Entry(name=str(number), split="all", lq="") for number in range(2)]
    rows = [Row("x", entry, {"psnr": value}) for entry, value in zip(entries, (20.0, math.inf), strict=True)]
    score = score_of(rows, "psnr", 2, 0)
    assert (score.mean, score.low, score.remark) == (math.inf, None, "1 images equal their originals")
    assert type(score).model_validate_json(score.model_dump_json()) == score


def test_an_image_of_another_shape_and_an_empty_set_are_refused(tmp_path: Path) -> None:
    class Shrinking(InputItself):
        def __call__(self, entries: object, lq: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
            return [image[:16] for image in lq]

    with pytest.raises(InputError, match=r"mild/000 came out as \(16, 32, 3\)"):
        evaluation(tmp_path, Shrinking())(on_this_machine())
    with pytest.raises(InputError, match="has no images"):
        evaluation(tmp_path, test_set=BlobSet(0))(on_this_machine())
    with pytest.raises(ConfigError, match="batch size 0"):
        evaluation(tmp_path, batch_size=0)(on_this_machine())


def test_a_limit_takes_the_first_of_every_split(tmp_path: Path) -> None:
    evaluation(tmp_path, limit=2)(on_this_machine())
    assert [row["name"] for row in rows_of(tmp_path)] == ["mild/000", "mild/001", "severe/000", "severe/001"]


def test_batches_and_splits_keep_the_order() -> None:
    batches = batches_of(TEST_SET.entries, 4)
    assert [len(batch.entries) for batch in batches] == [4, 2]
    assert [entry for batch in batches for entry in batch.entries] == list(TEST_SET.entries)
    severe_first = [*TEST_SET.entries[::-1], TEST_SET.entries[0].model_copy(update={"split": "attic"})]
    assert splits_of(severe_first) == ["all", "mild", "severe", "attic"]


def test_folders_of_restorers_are_plain_names_and_never_shared() -> None:
    names = ["faces_128", "faces_128@steps=8", "runs/a", "runs_a", "../up", "a b", "a/b", ""]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all("/" not in one and not one.startswith(".") for one in slugs)
    assert slugs[1] == "faces_128@steps=8"


# ---- intervals ----


def test_an_interval_of_many_numbers_is_the_normal_one(rng: np.random.Generator) -> None:
    values = rng.exponential(2.0, 20_000)
    low, high = interval([values])
    half = 1.959964 * values.std(ddof=1) / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    means = bootstrap_means(values, 4000)
    assert means.std() == pytest.approx(values.std() / math.sqrt(len(values)), rel=0.05)
    assert means.mean() == pytest.approx(values.mean(), abs=0.1 * half)


def test_intervals_follow_from_the_seed_and_move_with_the_numbers(rng: np.random.Generator) -> None:
    values = rng.normal(size=200)
    assert interval([values]) == interval([values]) != interval([values], seed=1)
    low, high = interval([values])
    assert interval([3 * values + 1]) == pytest.approx((3 * low + 1, 3 * high + 1))
    assert interval([np.full(9, 4.0)]) == (4.0, 4.0)
    with pytest.raises(InputError, match="no numbers"):
        interval([np.array([])])


def test_brightness_of_the_tests_has_the_protocol_s_shape() -> None:
    metric = Brightness(total=3.0, count=1)
    assert metric.fresh().count == 0
    assert metric.value() == 3.0


def test_what_differs_between_splits_is_no_chance(rng: np.random.Generator) -> None:
    """Against the closed form: the variance of a stratified mean has the strata's own variances alone."""
    strata = [rng.normal(mean, 1, count) for mean, count in ((0, 300), (50, 200), (-90, 500))]
    low, high = interval(strata)
    expected = 1.959964 * math.sqrt(sum(len(one) * one.var() for one in strata)) / 1000
    middle = np.concatenate(strata).mean()
    assert low == pytest.approx(middle - expected, abs=0.2 * expected)
    assert high == pytest.approx(middle + expected, abs=0.2 * expected)


def test_a_face_in_every_split_is_drawn_with_all_its_images() -> None:
    def rows(names: Sequence[tuple[str, str, float]]) -> list[Row]:
        return [
            Row("x", Entry(name=f"{split}/{face}", split=split, lq=""), {"psnr": value}) for split, face, value in names
        ]

    every = rows([("mild", "a", 4.0), ("mild", "b", 2.0), ("severe", "a", 0.0), ("severe", "b", 4.0)])
    assert [one.tolist() for one in strata_of(every, "psnr")] == [[2.0, 3.0]]
    thirds = rows([("mild", "a", 4.0), ("mild", "b", 2.0), ("severe", "c", 0.0)])
    assert [one.tolist() for one in strata_of(thirds, "psnr")] == [[4.0, 2.0], [0.0]]
    assert [one.tolist() for one in strata_of(every[:2], "psnr")] == [[4.0, 2.0]]


def test_a_report_says_on_what_machines_images_were_made(tmp_path: Path) -> None:
    class Timed(InputItself):
        is_timed = True
        prepared = 0

        def prepare(self) -> None:
            type(self).prepared += 1

    results = evaluation(tmp_path, Timed())(on_this_machine())
    assert results.restorers["input"]["made_on"] == [kind_of_machine()]
    assert Timed.prepared > 0
    assert "made_on" not in evaluation(tmp_path / "other")(on_this_machine()).restorers["input"]
