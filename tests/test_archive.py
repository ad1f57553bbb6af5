"""The parts of archive restoration that need no Ray: names, plan, steps, manifest, contact sheet, progress."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldbfr.archive import plan as planning
from ldbfr.archive.manifest import ManifestWriter
from ldbfr.archive.naming import format_of_output, is_image, output_key
from ldbfr.archive.plan import check_places, make_plan
from ldbfr.archive.rows import FaceRow, from_table, schema, to_table
from ldbfr.archive.settings import RestoreSettings, Weights
from ldbfr.archive.sheet import ContactSheet
from ldbfr.archive.steps import Reader, Writer, describe_fit, restore_faces, thumbnail
from ldbfr.config import load_preset
from ldbfr.errors import ConfigError, InputError, LDBFRError, StorageError, WeightsError
from ldbfr.images import ImageLimits, decode_image, encode_image, fit_to_side
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.progress import Progress, Tally, duration
from tests import tiny

SIDE = tiny.SIDE


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny pipeline; nobody changes them."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny.new_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny_weights: Path) -> LDBFRPipeline:
    return LDBFRPipeline.from_pretrained(tiny_weights)


@pytest.fixture
def settings() -> RestoreSettings:
    return RestoreSettings.resolve(load_preset("tiny"))


def face(rng: np.random.Generator, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def read_rows(rng: np.random.Generator, count: int) -> list[FaceRow]:
    return [
        FaceRow(i, f"{i}.png", f"/in/{i}.png", 1, f"{i}.png", "read", pixels=face(rng).tobytes()) for i in range(count)
    ]


# ---- names ----

SEGMENTS = st.sampled_from(["a", "b.jpg", "_ldbfr", "_ldbfr_", "_first-stage", "contact-sheet.png", "manifest.parquet"])
STEMS = st.sampled_from(["a", "A", "a.jpg", "a.png", "a.jpg.png", "a.bmp", "contact-sheet", "contact-sheet.png", "é"])
SUFFIXES = st.sampled_from([".png", ".PNG", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".png.png", ".jpg.png"])
KEYS = st.builds(
    lambda folders, stem, suffix: "/".join([*folders, stem + suffix]), st.lists(SEGMENTS, max_size=2), STEMS, SUFFIXES
)


@pytest.mark.parametrize(
    ("key", "format", "expected"),
    [
        ("a.png", "same", "a.png"),
        ("x/y/A.JPG", "same", "x/y/A.JPG"),
        ("a.bmp", "same", "a.bmp.png"),
        ("a.tiff", "same", "a.tiff.png"),
        ("a.jpg.png", "same", "a.jpg.png"),
        ("a.png", "png", "a.png"),
        ("a.jpg", "png", "a.jpg.png"),
        ("a.jpg.png", "png", "a.jpg.png.png"),
        ("a.jpeg", "jpeg", "a.jpeg"),
        ("a.webp", "jpeg", "a.webp.jpg"),
        ("a.png", "webp", "a.png.webp"),
        ("contact-sheet.png", "same", "contact-sheet.png.png"),
        ("_ldbfr/a.png", "same", "_ldbfr_/a.png"),
        ("manifest.parquet/a.png", "same", "manifest.parquet_/a.png"),
    ],
)
def test_output_keys(key: str, format: Any, expected: str) -> None:
    assert output_key(key, format) == expected


@given(st.sets(KEYS, min_size=2, max_size=40), st.sampled_from(["same", "png", "jpeg", "webp"]))
def test_no_two_inputs_share_an_output(keys: set[str], format: Any) -> None:
    outputs = {output_key(key, format) for key in keys}

    assert len(outputs) == len(keys)
    assert not outputs & {"contact-sheet.png", "manifest.parquet"}
    assert not [key for key in outputs if key.split("/")[0] in ("_ldbfr", "_first-stage", "manifest.parquet/")]
    for key in keys:
        suffix = output_key(key, format).rpartition(".")[2].lower().replace("jpg", "jpeg")
        assert suffix == format_of_output(key, format)


def test_images_are_known_by_their_suffix() -> None:
    assert is_image("a/b.PNG")
    assert is_image("b.tiff")
    assert not is_image("png")
    assert not is_image("a.png/notes.txt")
    assert not is_image(".png")


# ---- rows ----


def test_rows_survive_a_table(rng: np.random.Generator) -> None:
    rows = [*read_rows(rng, 2), FaceRow(7, "ü.png", "/in/ü.png", 3, "ü.png").failed("why", digest="d", width=3)]

    assert from_table(to_table(rows)) == rows
    assert to_table([]).schema == schema()


def test_a_failed_row_loses_its_pictures(rng: np.random.Generator) -> None:
    (row,) = read_rows(rng, 1)

    assert row.failed("why").pixels is None
    assert (row.failed("why").status, row.failed("why").reason) == ("failed", "why")


# ---- plan ----


def plan_rows(output: Path) -> list[FaceRow]:
    parts = sorted((output / "_ldbfr" / "plan").iterdir())
    return [row for part in parts for row in from_table(pq.read_table(part))]


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_plan_lists_every_image_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "ROWS_PER_PART", 3)
    names = ["b.png", "a/ü.jpg", "a/deep/er.webp", "c.TIFF", "d.bmp", "e.jpeg", "f.tif"]
    make_files(tmp_path / "in", *names, "notes.txt", "a/list.csv")

    plan = make_plan(str(tmp_path / "in"), str(tmp_path / "out"), format="same", seed=0)

    rows = plan_rows(tmp_path / "out")
    assert [row.key for row in rows] == sorted(names)
    assert [row.index for row in rows] == list(range(7))
    assert {row.status for row in rows} == {"planned"}
    assert (plan.num_images, plan.num_skipped, len(plan.parts)) == (7, 2, 3)
    assert sorted(plan.picks) == list(range(7))


def test_picks_depend_on_keys_and_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SHEET_CANDIDATES", 4)
    make_files(tmp_path / "in", *(f"{i:02d}.png" for i in range(30)))

    def picked(seed: int) -> list[str]:
        plan = make_plan(str(tmp_path / "in"), str(tmp_path / "out"), format="same", seed=seed)
        rows = plan_rows(tmp_path / "out")
        return [rows[index].key for index in plan.picks]

    first = picked(0)
    make_files(tmp_path / "in", *(f"0/{i}.gif.png" for i in range(3)))

    assert len(first) == 4
    assert [key for key in picked(0) if key in first] == [key for key in first if key in picked(0)]
    assert picked(1) != picked(0)


def test_a_second_plan_replaces_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "ROWS_PER_PART", 1)
    make_files(tmp_path / "in", "a.png", "b.png", "c.png")
    make_plan(str(tmp_path / "in"), str(tmp_path / "out"), format="same", seed=0)
    (tmp_path / "in" / "b.png").unlink()

    make_plan(str(tmp_path / "in"), str(tmp_path / "out"), format="same", seed=0)

    assert [row.key for row in plan_rows(tmp_path / "out")] == ["a.png", "c.png"]


def test_an_output_below_the_input_is_not_planned(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png", "out/old.png", "outside/b.png")

    plan = make_plan(str(tmp_path), str(tmp_path / "out"), format="same", seed=0)

    assert [row.key for row in plan_rows(tmp_path / "out")] == ["a.png", "outside/b.png"]
    assert plan.num_skipped == 0


@pytest.mark.skipif(os.name != "posix", reason="needs file names of any bytes")
def test_a_name_that_is_no_text_fails_in_the_plan(tmp_path: Path) -> None:
    make_files(tmp_path / "in", "a.png")
    try:
        (tmp_path / "in" / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes no such name")

    make_plan(str(tmp_path / "in"), str(tmp_path / "out"), format="same", seed=0)

    good, bad = plan_rows(tmp_path / "out")
    assert good.status == "planned"
    assert (bad.status, bad.key) == ("failed", r"\udcff.png")
    assert "rename the file" in str(bad.reason)


@pytest.mark.parametrize(
    ("input", "output", "kind", "text"),
    [
        ("in", "in", ConfigError, "is the input"),
        ("in", "in/../in/", ConfigError, "is the input"),
        ("in", ".", ConfigError, "lies inside --output"),
        ("missing", "out", InputError, "there is no such folder"),
        ("empty", "out", InputError, "no images in"),
        ("notes", "out", InputError, re.escape("(1 files that are no images)")),
        ("in", "in/a.png", StorageError, "a file stands where a folder is needed"),
    ],
)
def test_places_that_cannot_work(tmp_path: Path, input: str, output: str, kind: type[LDBFRError], text: str) -> None:
    make_files(tmp_path, "in/a.png", "notes/a.txt")
    (tmp_path / "empty").mkdir()

    with pytest.raises(kind, match=text) as caught:
        make_plan(str(tmp_path / input), str(tmp_path / output), format="same", seed=0)

    assert str(tmp_path) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in", "notes"], "nothing is left behind"


def test_places_in_buckets() -> None:
    assert check_places("s3://b/in/", "s3://b/in/out") == "out/"
    assert check_places("s3://b/in", "s3://c/in") is None
    assert check_places("s3://b/in", "s3://b/input") is None
    with pytest.raises(ConfigError, match="is the input"):
        check_places("s3://b/in/", "s3://b/in")
    with pytest.raises(ConfigError, match="lies inside"):
        check_places("s3://b/out/in", "s3://b/out/")


# ---- settings ----


def test_settings_come_from_the_preset_unless_given() -> None:
    preset = load_preset("tiny")

    settings = RestoreSettings.resolve(preset, start_step=700, format="jpeg")

    assert (settings.steps, settings.start_step, settings.scheduler) == (4, 700, "dpm_solver")
    assert settings.digest() != RestoreSettings.resolve(preset).digest()
    assert settings.digest() == RestoreSettings.resolve(preset, start_step=700, format="jpeg", seed=0).digest()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": -1}, "--steps -1: expected 0 to 500"),
        ({"steps": 501}, "--steps 501: expected 0 to 500"),
        ({"start_step": 0}, "--start-step 0: expected 1 to 1,000"),
        ({"start_step": 1001}, "--start-step 1001: expected 1 to 1,000"),
        ({"quality": 0}, "--quality 0: expected 1 to 100"),
        ({"condition_scale": -0.5}, "--condition-scale -0.5: expected 0 or more"),
        ({"condition_scale": float("nan")}, "--condition-scale nan: expected 0 or more"),
        ({"seed": 2**63}, "--seed 9223372036854775808: expected"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        RestoreSettings.resolve(load_preset("tiny"), **options)


def test_weights_are_found_without_building_the_networks(tiny_weights: Path) -> None:
    weights = Weights.find(str(tiny_weights))

    assert weights.digest == LDBFRPipeline.from_pretrained(tiny_weights).weights_digest
    assert (weights.preset.name, weights.reference) == ("tiny", str(tiny_weights.resolve()))


def test_weights_that_are_missing() -> None:
    with pytest.raises(WeightsError, match="no weights 'nowhere'"):
        Weights.find("nowhere")


# ---- read ----


def stored(folder: Path, name: str, data: bytes) -> FaceRow:
    (folder / name).write_bytes(data)
    return FaceRow(0, name, str(folder / name), len(data), name)


def test_reading_crops_and_resizes(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = face(rng, 40, 100)
    row = stored(tmp_path, "a.png", encode_image(pixels, "png"))

    read = Reader(SIDE, frozenset({0}))(row)

    assert read.status == "read"
    assert read.pixels == fit_to_side(pixels, SIDE).tobytes()
    assert (read.width, read.height, len(read.digest or "")) == (100, 40, 64)
    assert read.note == "cropped to its central 40 px square, resized from 40 to 32 px"
    assert decode_image(read.sheet_input or b"", name="").shape == (40, 40, 3)
    assert Reader(SIDE)(row).sheet_input is None


def test_a_face_of_the_right_size_is_left_alone(rng: np.random.Generator) -> None:
    assert describe_fit(face(rng), SIDE) is None


def test_what_cannot_be_read_fails_with_the_reason(tmp_path: Path, rng: np.random.Generator) -> None:
    good = encode_image(face(rng), "png")
    reader = Reader(SIDE, limits=ImageLimits(max_bytes=len(good), max_pixels=SIDE * SIDE))

    large = reader(stored(tmp_path, "large.png", good + b"x"))
    wide = reader(stored(tmp_path, "wide.png", encode_image(np.zeros((SIDE, SIDE + 1, 3), np.uint8), "png")))
    gone = reader(replace(stored(tmp_path, "gone.png", good), input=str(tmp_path / "nowhere.png")))

    assert [row.status for row in (large, wide, gone)] == ["failed"] * 3
    assert "expected at most" in str(large.reason)
    assert large.digest is None
    assert "33 x 32 pixels" in str(wide.reason)
    assert wide.digest is not None
    assert "there is no such file" in str(gone.reason)
    assert reader(large) == large, "a failed row passes through"


# ---- model ----


def test_results_are_the_pipelines(
    pipeline: LDBFRPipeline, settings: RestoreSettings, rng: np.random.Generator
) -> None:
    rows = read_rows(rng, 3)
    rows.insert(1, FaceRow(9, "bad.png", "bad.png", 0, "bad.png").failed("bad"))
    rows[2] = replace(rows[2], sheet_input=b"picked")

    done = restore_faces(pipeline, rows, settings)

    assert [row.status for row in done] == ["modelled", "failed", "modelled", "modelled"]
    assert [row.first_stage_pixels is not None for row in done] == [False, False, True, False]
    faces = np.stack([np.frombuffer(row.pixels or b"", np.uint8).reshape(SIDE, SIDE, 3) for row in rows if row.pixels])
    expected = pipeline(faces).images
    assert [row.pixels for row in done if row.pixels] == [image.tobytes() for image in expected]


def test_only_the_culprit_of_a_batch_fails(
    settings: RestoreSettings, rng: np.random.Generator, tiny_weights: Path
) -> None:
    class OutOfMemory(LDBFRPipeline):
        """Fails as a GPU does, on any batch with a black picture."""

        def __call__(self, images: Any, **options: Any) -> Any:
            if any(not image.any() for image in images):
                raise RuntimeError("CUDA out of memory")
            return super().__call__(images, **options)

    rows = read_rows(rng, 4)
    rows[2] = replace(rows[2], pixels=bytes(SIDE * SIDE * 3))

    done = restore_faces(OutOfMemory.from_pretrained(tiny_weights), rows, settings)

    assert [row.status for row in done] == ["modelled", "modelled", "failed", "modelled"]
    assert done[2].reason == "2.png: the model failed (CUDA out of memory); try it alone on another --device"


def test_a_mistake_in_the_code_is_no_bad_image(
    pipeline: LDBFRPipeline, settings: RestoreSettings, rng: np.random.Generator
) -> None:
    with pytest.raises(ValueError, match="reshape"):
        restore_faces(pipeline, [replace(row, pixels=b"short") for row in read_rows(rng, 1)], settings)


# ---- write ----


@pytest.mark.parametrize("format", ["same", "png", "jpeg", "webp"])
def test_results_are_written_whole(
    tmp_path: Path, settings: RestoreSettings, rng: np.random.Generator, format: Any
) -> None:
    settings = settings.model_copy(update={"format": format, "first_stage": True})
    pixels = face(rng)
    row = FaceRow(0, "x/a.jpg", "in", 1, output_key("x/a.jpg", format), "modelled", sheet_input=b"picked")
    row = replace(row, pixels=pixels.tobytes(), first_stage_pixels=pixels.tobytes())

    done = Writer(str(tmp_path), settings)(row)

    path = tmp_path / output_key("x/a.jpg", format)
    assert (done.status, done.output) == ("restored", str(path))
    assert path.read_bytes() == encode_image(pixels, format_of_output("x/a.jpg", format), quality=95)
    assert done.first_stage == str(tmp_path / "_first-stage" / output_key("x/a.jpg", format))
    assert (done.pixels, done.first_stage_pixels) == (None, None)
    assert done.sheet_restored == thumbnail(pixels)


def test_an_output_in_the_way_fails_the_row(
    tmp_path: Path, settings: RestoreSettings, rng: np.random.Generator
) -> None:
    (tmp_path / "a.png").mkdir()
    row = FaceRow(0, "a.png", "in", 1, "a.png", "modelled", pixels=face(rng).tobytes())

    done = Writer(str(tmp_path), settings)(row)

    assert done.status == "failed"
    assert "this is a folder, expected a file" in str(done.reason)
    assert list(tmp_path.rglob("*")) == [tmp_path / "a.png"], "nothing partial is left"


# ---- manifest ----


def result(index: int, status: str = "restored") -> FaceRow:
    row = FaceRow(index, f"{index}.png", f"/in/{index}.png", 5, f"{index}.png")
    return row.failed(f"{index}.png: broken") if status == "failed" else replace(row, status="restored")


def test_a_manifest_has_one_row_per_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldbfr.archive.manifest.ROWS_PER_PART", 2)
    manifest = ManifestWriter(str(tmp_path), 5, {"seed": 3, "weights": "w", "settings": "s"})
    for index in (0, 1, 1, 2, 0, 3, 4):
        manifest.add(result(index, "failed" if index == 3 else "restored"))

    uri = manifest.finish()

    table = pq.read_table(uri)
    assert table["key"].to_pylist() == [f"{i}.png" for i in range(5)]
    assert table["status"].to_pylist().count("failed") == 1
    assert set(table["seed"].to_pylist()) == {3}
    assert not set(table.column_names) & {"pixels", "sheet_input", "index"}
    assert (manifest.tally.restored, manifest.tally.failed) == (4, 1)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["manifest.parquet"]


def test_an_incomplete_manifest_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "manifest.parquet").write_bytes(b"old")
    manifest = ManifestWriter(str(tmp_path), 2, {})
    manifest.add(result(0))

    with pytest.raises(StorageError, match="1 of 2 planned inputs have no result"):
        manifest.finish()

    assert (tmp_path / "manifest.parquet").read_bytes() == b"old"


def test_the_first_failures_are_told() -> None:
    tally = Tally(20, restored=3, failed=12, failures=[f"{i}.png: broken" for i in range(10)])

    lines = tally.describe_failures()

    assert lines[0] == "  0.png: broken"
    assert lines[-1] == "  … and 2 more: see the manifest"
    assert len(lines) == 11


# ---- contact sheet ----


def test_the_sheet_shows_the_best_picks_that_were_restored(tmp_path: Path, rng: np.random.Generator) -> None:
    picture = thumbnail(face(rng))
    sheet = ContactSheet(list(range(40, 0, -1)))
    for index in range(45):
        pictures = dict.fromkeys(("sheet_input", "sheet_first_stage", "sheet_restored"), picture)
        sheet.add(replace(result(index, "failed" if index == 40 else "restored"), **pictures))

    assert [row.index for _, row in sorted(sheet.rows.items())] == list(range(39, 23, -1))
    uri = sheet.write(str(tmp_path))
    shape = decode_image(Path(str(uri)).read_bytes(), name="sheet").shape
    assert 8 * 192 < shape[0] < 9 * 210
    assert 6 * 192 < shape[1] < 9 * 210


def test_no_sheet_where_nothing_was_restored(tmp_path: Path) -> None:
    assert ContactSheet([0]).write(str(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []


# ---- progress ----


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_tells_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    clock, tally = Clock(), Tally(100)
    progress = Progress(tally, every=5.0, clock=clock)
    with caplog.at_level(logging.INFO, logger="ldbfr.progress"):
        clock.now, tally.restored = 10.0, 10
        progress.update()
        clock.now, tally.restored, tally.failed = 12.0, 12, 1
        progress.update()
        clock.now, tally.restored, tally.failed = 20.0, 28, 2
        progress.update()

    assert [record.getMessage() for record in caplog.records] == [
        "10/100 images",
        "30/100 images, 2 failed, 2.0 images/s, 35 s left",
    ]
    assert progress.summary() == "28 of 100 images restored, 2 failed, in 20 s (2.0 images/s after start-up)"


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (200, "3 min 20 s"), (18720, "5 h 12 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
