"""The parts of archive restoration around its work: names, settings, places, parts of a plan, commands, progress."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldbfr import storage
from ldbfr.archive.commands import retry_failed, status
from ldbfr.archive.listing import Sources, list_sources, make_plan
from ldbfr.archive.naming import format_of_output, output_key
from ldbfr.archive.parts import Cutter, Parts, plan_folder, read_part
from ldbfr.archive.rows import PlanRow
from ldbfr.archive.run import Run, check_places, lock_uri, read_standing, report
from ldbfr.archive.settings import RestoreSettings, Weights, images_in_a_unit
from ldbfr.config import load_preset
from ldbfr.errors import ConfigError, InputError, LDBFRError, WeightsError
from ldbfr.inputs.keys import is_image
from ldbfr.lease import Lease, LeaseHeldError
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.progress import Progress, Tally, duration
from ldbfr.runner import run_here
from tests import tiny
from tests.archiving import folder, manifest, png, restore_here, run_settings
from tests.bucket import Bucket, Crash
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny pipeline; nobody changes them."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny.new_pipeline().save_pretrained(folder)
    return folder


# ---- names ----

SEGMENTS = st.sampled_from(["a", "b.jpg", "_ldbfr", "_ldbfr_", "_first-stage", "shards", "manifest", "report.html"])
STEMS = st.sampled_from(["a", "A", "a.jpg", "a.png", "a.jpg.png", "a.bmp", "manifest", "report.html", "é", "", "a."])
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
        ("_ldbfr/a.png", "same", "_ldbfr_/a.png"),
        ("manifest/a.png", "same", "manifest_/a.png"),
        ("shards_/a.png", "same", "shards__/a.png"),
        ("x.parquet/000000012", "same", "x.parquet/000000012.png"),
    ],
)
def test_output_keys(key: str, format: Any, expected: str) -> None:
    assert output_key(key, format) == expected


@given(st.sets(KEYS, min_size=2, max_size=40), st.sampled_from(["same", "png", "jpeg", "webp"]))
def test_no_two_inputs_share_an_output(keys: set[str], format: Any) -> None:
    outputs = {output_key(key, format) for key in keys}

    assert len(outputs) == len(keys)
    ours = {"_ldbfr", "_first-stage", "_side-by-side", "manifest", "shards", "report.html"}
    assert not [key for key in outputs if key.split("/")[0] in ours]
    for key in keys:
        suffix = output_key(key, format).rpartition(".")[2].lower().replace("jpg", "jpeg")
        assert suffix == format_of_output(key, format)


def test_images_are_known_by_their_suffix() -> None:
    assert is_image("a/b.PNG")
    assert is_image("b.tiff")
    assert not is_image("png")
    assert not is_image("a.png/notes.txt")
    assert is_image("a/.png"), "as the listing sees it"


# ---- places ----


def test_places_in_buckets() -> None:
    check_places(["s3://b/in/"], "s3://b/in/out")
    check_places(["s3://b/in"], "s3://c/in")
    check_places(["s3://b/in", "s3://b/input"], "s3://b/inp")
    with pytest.raises(ConfigError, match="is the input"):
        check_places(["s3://b/in/"], "s3://b/in")
    with pytest.raises(ConfigError, match="lies inside"):
        check_places(["s3://b/out/in"], "s3://b/out/")
    with pytest.raises(ConfigError, match="name each place once"):
        check_places(["s3://b/in", "s3://b/in/sub"], "s3://b/out")


@pytest.mark.parametrize(
    ("input", "output", "kind", "text"),
    [
        ("in", "in", ConfigError, "is the input"),
        ("in", "in/../in/", ConfigError, "is the input"),
        ("in", ".", ConfigError, "lies inside --output"),
        ("missing", "out", InputError, "there is no such file or folder; check the path"),
        ("notes/a.md", "out", InputError, "expected a folder, an image"),
    ],
)
def test_places_that_cannot_work(tmp_path: Path, input: str, output: str, kind: type[LDBFRError], text: str) -> None:
    folder(tmp_path, {"in/a.png": b"x", "notes/a.md": b"x"})

    with pytest.raises(kind, match=text) as caught:
        check_places([str(tmp_path / input)], str(tmp_path / output))

    assert str(tmp_path) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "notes"], "nothing is left behind"


# ---- parts ----


def rows(*kinds: str) -> list[PlanRow]:
    """Rows to cut: p for planned, s for skipped."""
    return [PlanRow(f"{n}", f"{n}", "file", "u", status=None if k == "p" else "skipped") for n, k in enumerate(kinds)]


@settings(deadline=None)
@given(st.lists(st.sampled_from("ps"), max_size=200), st.integers(1, 7), st.integers(1, 40))
def test_cutting_keeps_every_row_in_order(kinds: list[str], images: int, part_rows: int) -> None:
    bucket = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        bucket.install(patch)
        patch.setattr("ldbfr.archive.parts.ROWS_PER_PART", part_rows)
        parts, infos = Parts("s3://b/plan"), []
        cutter = Cutter(images, parts)
        for row in rows(*kinds):
            cutter.add(row)
            if parts.full:
                infos.append(parts.write())
        cutter.end()
        infos.append(parts.write())
        found = [read_part("s3://b/plan", number) for number in range(len(infos))]

    assert [info for _, info in found] == infos
    assert [row.key for part, _ in found for row in part] == [str(n) for n in range(len(kinds))]
    for part, info in found:
        assert (len(part), sum(row.status == "skipped" for row in part)) == (info.rows, info.skipped)
        units = [[row for row in part if row.unit == number] for number in range(info.units)]
        assert all(0 < len(unit) <= 8 * images for unit in units)
        assert all(sum(row.status is None for row in unit) <= images for unit in units)


def test_large_faces_come_in_smaller_units() -> None:
    assert [images_in_a_unit(side) for side in (32, 64, 128, 256, 512, 1024, 8192)] == [128, 128, 128, 128, 42, 10, 1]


# ---- the plan ----


def sources(*uris: str, output: str = "s3://b/out", unit_images: int = 2) -> Sources:
    return Sources(tuple(uris), output, None, unit_images)


@pytest.mark.parametrize("stop", range(12))
def test_a_listing_that_breaks_off_is_taken_up(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket({f"s3://b/in/{n:03d}.png": b"x" for n in range(50)})
    bucket.install(monkeypatch)
    monkeypatch.setattr("ldbfr.archive.parts.ROWS_PER_PART", 6)
    whole = make_plan(sources("s3://b/in", output="s3://b/whole"), run_here)
    bucket.changes_left = stop
    with pytest.raises(Crash):
        make_plan(sources("s3://b/in"), run_here)
    bucket.changes_left = None
    listed, after = storage.list_objects, []

    def watched(uri: str, start_after: str | None = None) -> Any:
        for found in listed(uri, start_after):
            after.append(found.key)
            yield found

    monkeypatch.setattr(storage, "list_objects", watched)
    parts = make_plan(sources("s3://b/in"), run_here)

    def keys(output: str, count: int) -> list[str]:
        return [row.key for number in range(count) for row in read_part(plan_folder(output), number)[0]]

    assert keys("s3://b/out", len(parts)) == keys("s3://b/whole", len(whole)) == [f"{n:03d}.png" for n in range(50)]
    again = [key for key in after if key.endswith(".png")]
    assert len(again) == 50 - 6 * (stop // 2)


def test_a_place_without_images_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "in", {"a.txt": b"x", "b.csv": b"y"})
    (tmp_path / "empty").mkdir()

    with pytest.raises(InputError, match=r"no images in .*/in: 2 other files"):
        make_plan(sources(str(tmp_path / "in"), output=str(tmp_path / "out")), run_here)
    with pytest.raises(InputError, match="nothing is there; check the place"):
        make_plan(sources(str(tmp_path / "empty"), output=str(tmp_path / "out")), run_here)
    folder(tmp_path / "in", {"c.png": png()})
    assert sum(p.rows for p in make_plan(sources(str(tmp_path / "in"), output=str(tmp_path / "out")), run_here)) == 3


def test_archives_are_listed_anew_after_a_place_without_images(tmp_path: Path) -> None:
    def pack(name: str, files: dict[str, bytes]) -> None:
        with zipfile.ZipFile(tmp_path / "in" / name, "w") as archive:
            for key, data in files.items():
                archive.writestr(key, data)

    (tmp_path / "in").mkdir()
    pack("notes.zip", {"a.txt": b"x"})
    given = sources(str(tmp_path / "in"), output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="no images"):
        make_plan(given, run_here)
    pack("a.zip", {"1.png": png(), "2.png": png()})

    parts = make_plan(given, run_here)
    rows = [row for number in range(len(parts)) for row in read_part(plan_folder(given.output), number)[0]]
    assert [(row.key, row.status) for row in rows] == [
        ("a.zip/1.png", None),
        ("a.zip/2.png", None),
        ("notes.zip/a.txt", "skipped"),
    ]


def test_sources_are_listed_in_the_order_of_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket({f"s3://b/{place}/{n}.png": b"x" for place in ("z/one", "a/two") for n in range(3)})
    bucket.install(monkeypatch)
    given = sources("s3://b/z/one", "s3://b/a/two")
    list_sources(given)

    found, _ = read_part(plan_folder("s3://b/out"), 0)
    assert [row.key for row in found] == [f"{label}/{n}.png" for label in ("one", "two") for n in range(3)]


# ---- settings ----


def test_settings_come_from_the_preset_unless_given() -> None:
    preset = load_preset("tiny")

    resolved = RestoreSettings.resolve(preset, start_step=700, format="jpeg")

    assert (resolved.steps, resolved.start_step, resolved.scheduler) == (4, 700, "dpm_solver")
    assert resolved.digest() != RestoreSettings.resolve(preset).digest()
    assert resolved.digest() == RestoreSettings.resolve(preset, start_step=700, format="jpeg", seed=0).digest()


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


# ---- a run and its standing ----


def begun(tmp_path: Path, weights: Weights, **options: Any) -> Run:
    """A run over three faces, one of them damaged, written down but not done."""
    source = folder(tmp_path / "in", {"a.png": png(0), "b.png": b"", "c.png": png(2)})
    run = Run(str(tmp_path / "out"), run_settings(source, **options))
    run.begin(weights, "python jobs/restore.py --input in")
    return run


def test_a_run_goes_on_only_as_itself(tmp_path: Path, tiny_weights: Path) -> None:
    weights = Weights.find(str(tiny_weights))
    run = begun(tmp_path, weights)
    run.begin(weights, "again")

    other = Run(run.output, run_settings(*run.settings.inputs, seed=3, batch_size=5, weights="1" * 64))
    with pytest.raises(ConfigError) as caught:
        other.begin(weights, "other")
    text = str(caught.value)
    assert "--seed 0 there, 3 now" in text
    assert "--batch-size 3 there, 5 now" in text
    assert "--weights 000000000000… there, 111111111111… now" in text
    assert "--steps" not in text
    assert json.loads((tmp_path / "out" / "_ldbfr" / "run.json").read_text())["command"].endswith("--input in")


def test_a_run_of_an_older_ldbfr_is_refused(tmp_path: Path, tiny_weights: Path) -> None:
    folder(tmp_path / "out", {"_ldbfr/run.json": json.dumps({"settings": {"steps": 8}}).encode()})

    with pytest.raises(ConfigError, match="holds a run of an older ldbfr; name another output"):
        begun(tmp_path, Weights.find(str(tiny_weights)))


def test_the_status_follows_the_run(tmp_path: Path, tiny_weights: Path) -> None:
    run = begun(tmp_path, Weights.find(str(tiny_weights)))
    assert "stopped while its inputs were listed" in status(run.output)
    with pytest.raises(InputError, match="not listed yet"):
        report(run.output)
    with pytest.raises(ConfigError, match="not listed yet"):
        retry_failed(run.output)

    restore_here(run.output, run.settings)
    text = status(run.output)
    assert f"{run.output}: finished" in text
    assert "3 of 3 inputs: 2 restored, 1 failed, 0 skipped" in text
    assert f"ldbfr archive retry-failed {run.output}" in text
    assert "command: python jobs/restore.py --input in" in text
    with Lease.acquire(lock_uri(run.output), "`another`"):
        assert "held by '`another`' on host" in status(run.output)
        with pytest.raises(LeaseHeldError):
            retry_failed(run.output)
    assert read_standing(run.output).finished


def test_failed_inputs_are_asked_for_again(tmp_path: Path, tiny_weights: Path) -> None:
    run = begun(tmp_path, Weights.find(str(tiny_weights)))
    restore_here(run.output, run.settings)
    folder(tmp_path / "in", {"b.png": png(1)})

    assert retry_failed(run.output).startswith(
        "1 failed inputs will be tried again by the same command:\n  python jobs"
    )
    restore_here(run.output, run.settings)

    assert {row.status for row in manifest(run.output).values()} == {"restored"}
    assert retry_failed(run.output) == f"{run.output}: nothing to try again"


def test_the_report_of_a_run(tmp_path: Path, tiny_weights: Path) -> None:
    run = begun(tmp_path, Weights.find(str(tiny_weights)))
    restore_here(run.output, run.settings)

    page = Path(report(run.output)).read_text("utf-8")
    assert "Restoration report" in page
    assert page.count("data:image/jpeg") == 4, "two pairs"
    assert "the file is empty" in page


def test_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no run of jobs/restore\.py; give the folder"):
        status(str(tmp_path))


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


def test_the_first_failures_are_told() -> None:
    tally = Tally(20, restored=3, failed=12, failures=[f"{i}.png: broken" for i in range(10)])

    lines = tally.describe_failures()

    assert lines[0] == "  0.png: broken"
    assert lines[-1] == "  … and 2 more: see the manifest"
    assert len(lines) == 11


def test_names_cannot_speak_to_the_terminal() -> None:
    tally = Tally(1)
    tally.note("a\x1b[31m\u202egpj.exe 写真.png: broken")

    assert tally.failures == ["a\\x1b[31m\\u202egpj.exe 写真.png: broken"]


# ---- the page of measurements ----


def test_the_page_has_the_measured_numbers() -> None:
    from benchmarks.archive import with_tables

    results = json.loads((REPOSITORY / "benchmarks" / "results" / "archive.json").read_text("utf-8"))
    page = (REPOSITORY / "docs" / "scale.md").read_text("utf-8")

    assert with_tables(page, results) == page, "run: python benchmarks/archive.py tables"
