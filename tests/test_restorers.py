"""Restorers by name: what texts mean, what is refused, and that a restorer gives what its parts give."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.evaluation.restorers import (
    FolderRestorer,
    InputItself,
    PipelineRestorer,
    load_pipeline,
    parse_restorer,
    parse_restorers,
)
from ldbfr.images import Pixels, encode_image
from tests import tiny
from tests.evaluating import BlobSet, images_of, save_weights

TEST_SET = BlobSet(4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pipeline's weights."""
    return save_weights(tmp_path_factory.mktemp("weights") / "tiny")


def folder_of(tmp_path: Path, images: dict[str, Pixels]) -> str:
    for name, image in images.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode_image(image, "jpeg" if name.endswith("jpg") else "png"))
    return str(tmp_path)


def parsed(text: str, weights: str = "faces_128") -> PipelineRestorer:
    restorer = parse_restorer(text, weights, "cpu", 7)
    assert isinstance(restorer, PipelineRestorer)
    return restorer


# ---- texts ----


def test_a_text_names_weights_and_how_they_are_drawn_from() -> None:
    own = parsed("faces_128")
    assert own.options == {**own.preset.sampling.model_dump(), "seed": 7}
    other = parsed("faces_128@steps=8,scheduler=ddim,start=300,condition=0.5,color=no,seed=3")
    assert other.name == "faces_128@steps=8,scheduler=ddim,start=300,condition=0.5,color=no,seed=3"
    assert other.options == {
        "num_inference_steps": 8,
        "scheduler": "ddim",
        "start_step": 300,
        "condition_scale": 0.5,
        "color_correction": False,
        "seed": 3,
    }
    assert other.about["weights_digest"] == own.about["weights_digest"]


def test_the_first_stage_is_the_weights_without_a_step() -> None:
    restorer = parsed("first-stage", "faces_64")
    assert restorer.options["num_inference_steps"] == 0
    assert (restorer.name, restorer.weights) == ("first-stage", "faces_64")


def test_a_folder_has_its_name_before_the_equals_sign(weights: str) -> None:
    folder = parse_restorer("CodeFormer=results/code@former/", weights, "cpu", 0)
    assert isinstance(folder, FolderRestorer)
    assert (folder.name, folder.folder) == ("CodeFormer", str(Path("results/code@former").absolute()))
    bucket = parse_restorer("DR2=s3://bucket/dr2/", weights, "cpu", 0)
    assert isinstance(bucket, FolderRestorer)
    assert bucket.folder == "s3://bucket/dr2"
    assert isinstance(parse_restorer("input", weights, "cpu", 0), InputItself)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("faces_128@stepz=8", "no option 'stepz', expected some of steps, start"),
        ("faces_128@steps=many", "steps=many, expected a whole number"),
        ("faces_128@scheduler=euler", "scheduler=euler, expected one of dpm_solver"),
        ("faces_128@color=blue", "color=blue, expected yes or no"),
        ("faces_128@condition=nan", "condition=nan, expected a number"),
        ("faces_128@steps=900", "steps 900, start 450"),
        ("faces_128@start=1001", "start 1001"),
        ("faces_128@", "no option ''"),
        ("first-stage@steps=3", "has no steps"),
        ("=results", "expected NAME=FOLDER"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_text(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_restorer(text, "faces_128", "cpu", 0)
    assert said in str(caught.value)


def test_unknown_weights_and_two_of_a_name_are_refused() -> None:
    with pytest.raises(WeightsError, match="no weights 'faces_1'"):
        parse_restorers(["faces_1"], "faces_128", "cpu", 0)
    with pytest.raises(ConfigError, match="two restorers are called 'Input'"):
        parse_restorers(["input", "Input=results"], "faces_128", "cpu", 0)
    with pytest.raises(ConfigError, match="no restorer"):
        parse_restorers([], "faces_128", "cpu", 0)


# ---- pipelines ----


def test_a_pipeline_restorer_gives_what_the_pipeline_gives(weights: str) -> None:
    lq, _ = images_of(TEST_SET)
    restorer = parsed(f"{weights}@steps=2,seed=5")
    assert (restorer(TEST_SET.entries, list(lq)) == tiny.pipeline()(lq, num_inference_steps=2, seed=5).images).all()
    first = parsed("first-stage", weights)(TEST_SET.entries, list(lq))
    assert (first == tiny.pipeline()(lq, num_inference_steps=0).images).all()


def test_weights_are_loaded_once_and_a_restorer_travels_without_them(weights: str) -> None:
    lq, _ = images_of(TEST_SET)
    one, other = parsed(f"{weights}@steps=1"), parsed(f"{weights}@steps=2")
    load_pipeline.cache_clear()
    one(TEST_SET.entries, list(lq))
    other(TEST_SET.entries, list(lq))
    assert load_pipeline.cache_info().misses == 1
    sent = pickle.dumps(one)
    assert len(sent) < 20_000
    assert (np.array(pickle.loads(sent)(TEST_SET.entries, list(lq))) == one(TEST_SET.entries, list(lq))).all()


def test_other_weights_under_the_same_name_are_refused(weights: str) -> None:
    with pytest.raises(WeightsError, match="other weights here"):
        load_pipeline(weights, "0" * 64, "cpu")


def test_a_test_set_of_another_side_is_refused_with_what_to_do(weights: str) -> None:
    with pytest.raises(ConfigError, match=r"faces of 32 px, the test set's have 64 px.*testset --side 32.*resize=yes"):
        parsed(weights).check(TEST_SET.entries, 64)
    parsed(weights).check(TEST_SET.entries, 32)
    large = BlobSet(1, side=64)
    with pytest.raises(InputError, match=r"mild/000 is 64 × 64 px, .* restores 32 × 32"):
        parsed(weights)(large.entries, list(images_of(large)[0]))


def test_resizing_is_asked_for_and_stated(weights: str) -> None:
    large = BlobSet(2, side=64)
    lq, _ = images_of(large)
    restorer = parsed(f"{weights}@resize=yes")
    restorer.check(large.entries, 64)
    assert [image.shape for image in restorer(large.entries, list(lq))] == [(64, 64, 3)] * 2
    assert restorer.about["resize"] == "to 32 px and back, bicubic"


# ---- folders ----


def test_a_folder_gives_its_images_by_name(tmp_path: Path) -> None:
    lq, originals = images_of(TEST_SET)
    names = [entry.name for entry in TEST_SET.entries]
    folder = folder_of(tmp_path, {f"{name}.png": image for name, image in zip(names, originals, strict=True)})
    restorer = FolderRestorer("GT", folder)
    restorer.check(TEST_SET.entries, 32)
    backwards = restorer(TEST_SET.entries[::-1], list(lq[::-1]))
    assert (np.array(backwards) == originals[::-1]).all()


def test_a_folder_is_named_by_what_it_holds(tmp_path: Path) -> None:
    image = tiny.blob_faces(2)
    one = FolderRestorer("a", folder_of(tmp_path / "a", {"x.png": image[0], "y.png": image[1]}))
    same = FolderRestorer("b", folder_of(tmp_path / "b", {"y.png": image[1], "x.png": image[0]}))
    swapped = FolderRestorer("c", folder_of(tmp_path / "c", {"x.png": image[1], "y.png": image[0]}))
    assert one.about["digest"] == same.about["digest"] != swapped.about["digest"]


def test_a_folder_that_does_not_pair_is_refused(tmp_path: Path) -> None:
    image = tiny.blob_faces(1)[0]
    names = [f"{entry.name}.png" for entry in TEST_SET.entries]
    short = FolderRestorer("M", folder_of(tmp_path / "short", dict.fromkeys(names[1:], image)))
    with pytest.raises(InputError, match=r"no result for 1 of 4 images \(mild/000.png\).*lq/ folder"):
        short.check(TEST_SET.entries, 32)
    long = FolderRestorer("M", folder_of(tmp_path / "long", dict.fromkeys([*names, "mild/9.png"], image)))
    with pytest.raises(InputError, match=r"1 images that are not in the test set \(mild/9\)"):
        long.check(TEST_SET.entries, 32)
    lossy = FolderRestorer("M", folder_of(tmp_path / "lossy", dict.fromkeys([*names, "mild/1.jpg"], image)))
    with pytest.raises(InputError, match=r"not PNG \(mild/1.jpg\): a lossy format"):
        lossy.check(TEST_SET.entries, 32)
    with pytest.raises(InputError, match="no PNG files"):
        FolderRestorer("M", str(tmp_path / "nowhere")).check(TEST_SET.entries, 32)


def test_two_results_of_one_name_are_refused_with_a_list(tmp_path: Path) -> None:
    image = tiny.blob_faces(1)[0]
    names = [f"mild/{number:03d}" for number in range(12)]
    one = FolderRestorer("M", folder_of(tmp_path / "one", dict.fromkeys(["mild/000.PNG", "mild/000.png"], image)))
    with pytest.raises(InputError, match=r"1 names twice.*: mild/000 \(mild/000.PNG and mild/000.png\); remove one of"):
        one.check(TEST_SET.entries, 32)
    files = [name + suffix for name in names for suffix in (".PNG", ".png")]
    many = FolderRestorer("M", folder_of(tmp_path / "many", dict.fromkeys(files, image)))
    with pytest.raises(InputError, match=r"12 names twice.* mild/009 \(mild/009.PNG and mild/009.png\) and 2 more; "):
        many.check(TEST_SET.entries, 32)


def test_a_result_of_another_size_is_refused(tmp_path: Path) -> None:
    entry, lq = TEST_SET.entries[0], images_of(TEST_SET)[0][0]
    restorer = FolderRestorer("M", folder_of(tmp_path, {f"{entry.name}.png": tiny.blob_faces(1, 64)[0]}))
    with pytest.raises(InputError, match=r"is 64 × 64 px, its input 32 × 32"):
        restorer([entry], [lq])
