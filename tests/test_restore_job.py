"""The main job on a local Ray: one manifest row per input, the pipeline's own results, refusals before Ray starts."""

from __future__ import annotations

import re
import shutil
import time
import urllib.request
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import restore
from ldbfr.archive.settings import Weights
from ldbfr.archive.steps import UnitRestorer
from ldbfr.errors import ConfigError, LDBFRError
from ldbfr.images import decode_image, encode_image
from ldbfr.pipeline import LDBFRPipeline
from tests import tiny
from tests.archiving import LocalExecution, input_files, png, put_files, restore_here, run_settings

ray_cluster = pytest.mark.usefixtures("ray_cluster")

BAD = {
    "blocked.png": "this is a folder, expected a file",
    "empty.png": "the file is empty (0 bytes)",
    "huge.png": "30000 x 30000 pixels",
    "nested/text.png": "not a supported image",
    "truncated.jpg": "damaged or truncated",
}
"""Inputs that must fail, and what the reason says."""

GOOD = {
    **{key: key for key in input_files() if key not in BAD and key.endswith((".png", ".jpg", ".webp"))},
    "nested/scan.bmp": "nested/scan.bmp.png",
    "nested/scan.tif": "nested/scan.tif.png",
}
"""Inputs that must be restored, and where to."""


@dataclass(frozen=True)
class Run:
    """A finished job and where it worked."""

    input: Path
    output: Path
    weights: Path
    printed: str

    @property
    def command(self) -> list[str]:
        """Its options."""
        arguments = ["--input", str(self.input), "--output", str(self.output), "--weights", str(self.weights)]
        return [*arguments, "--first-stage", "--batch-size", "4", "--shard-images", "8", "--seed", "7"]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The manifest, by key."""
        rows = pq.read_table(self.output / "manifest").to_pylist()
        assert len({row["key"] for row in rows}) == len(rows)
        return {row["key"]: row for row in rows}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny pipeline; nobody changes them."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny.new_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(weights: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Run:
    """The job, run once over all kinds of files."""
    folder = tmp_path_factory.mktemp("run #1 50%")
    for name, data in input_files().items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "out" / "blocked.png").mkdir(parents=True)
    printed = StringIO()
    with redirect_stdout(printed):
        assert restore.main(Run(folder / "in", folder / "out", weights, "").command) == 0
    return Run(folder / "in", folder / "out", weights, printed.getvalue())


# ---- what a run leaves ----


@pytest.mark.ray
def test_every_input_has_exactly_one_row(finished: Run) -> None:
    rows = finished.rows

    assert list(rows) == sorted(input_files(), key=lambda key: [part.encode() for part in key.split("/")])
    assert {key for key, row in rows.items() if row["status"] == "restored"} == set(GOOD)
    assert {key for key, row in rows.items() if row["status"] == "failed"} == set(BAD)
    assert {key for key, row in rows.items() if row["status"] == "skipped"} == {"notes.txt"}
    for key, text in BAD.items():
        assert text in rows[key]["reason"], key


@pytest.mark.ray
def test_nothing_but_whole_results_is_left(finished: Run) -> None:
    files = {path.relative_to(finished.output).as_posix() for path in finished.output.rglob("*") if path.is_file()}

    first_stages = {f"_first-stage/{name}" for name in [*GOOD.values(), "blocked.png"]}
    work = {name for name in files if name.startswith("_ldbfr/")}
    assert files - work == {*GOOD.values(), *first_stages, "manifest/000000.parquet", "report.html"}
    assert not [name for name in work if "/units/" in name], "records go once the manifest has their rows"
    assert "_ldbfr/plan/index.parquet" in work
    for name in GOOD.values():
        data = (finished.output / name).read_bytes()
        assert decode_image(data, name=name).shape == (tiny.SIDE, tiny.SIDE, 3)


@pytest.mark.ray
def test_results_are_those_of_one_process(finished: Run, tmp_path: Path) -> None:
    weights = Weights.find(str(finished.weights))
    options = {"weights": weights.digest, "shard_images": 8, "batch_size": 4, "steps": None}
    settings = run_settings(str(finished.input), first_stage=True, seed=7, **options)
    restorer = UnitRestorer(LDBFRPipeline.from_pretrained(finished.weights), settings.restore, 4)
    ledger = restore_here(str(tmp_path), settings, LocalExecution(str(tmp_path), settings, restore=restorer))

    assert ledger.done.restored == len(GOOD) + 1, "nothing is in the way of blocked.png here"
    for name in GOOD.values():
        if name.endswith(".png"):
            one, other = (decode_image((f / name).read_bytes(), name=name) for f in (finished.output, tmp_path))
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 1, name


@pytest.mark.ray
def test_the_summary_lists_failures_and_places(finished: Run) -> None:
    lines = finished.printed.splitlines()

    assert lines[-1].startswith("12 of 18 images restored, 5 failed, 1 skipped, in ")
    text = "the file is empty (0 bytes), expected an image; copy it again from its source"
    assert f"  {finished.input}/empty.png: {text}" in lines
    assert lines[-3:-1] == [str(finished.output / "manifest"), str(finished.output / "report.html")]


@pytest.mark.ray
def test_the_manifest_is_a_data_set(finished: Run) -> None:
    import duckdb
    import pandas as pd
    import ray.data

    frame = pd.read_parquet(finished.output / "manifest")
    assert frame.groupby("status").size().to_dict() == {"restored": 12, "failed": 5, "skipped": 1}
    assert set(frame.loc[frame.status == "restored", "seed"]) == {7}
    assert ray.data.read_parquet(str(finished.output / "manifest")).count() == 18
    counts = duckdb.sql(f"select status, count(*) from '{finished.output}/manifest/*.parquet' group by status")
    assert dict(counts.fetchall()) == {"restored": 12, "failed": 5, "skipped": 1}


@pytest.mark.ray
def test_the_same_command_has_nothing_left_to_do(
    finished: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "work_off", lambda *_: pytest.fail("there is work"))
    before = {path: path.stat().st_mtime_ns for path in finished.output.rglob("*.png")}

    assert restore.main(finished.command) == 0

    assert "12 of 18 images restored, 5 failed, 1 skipped" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.output.rglob("*.png")} == before


@pytest.mark.ray
def test_other_settings_are_refused_with_the_difference(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert restore.main([*finished.command, "--steps", "1"]) == 2

    assert "was begun with other settings (--steps 4 there, 1 now)" in capsys.readouterr().err


@pytest.mark.ray
def test_results_do_not_depend_on_the_number_of_workers(finished: Run, tmp_path: Path) -> None:
    arguments = ["--input", str(finished.input), "--output", str(tmp_path), "--weights", str(finished.weights)]

    assert restore.main([*arguments, "--batch-size", "3", "--workers", "1:2", "--seed", "7", "--format", "png"]) == 0

    rows = pq.read_table(tmp_path / "manifest").to_pylist()
    assert [row["key"] for row in rows] == list(finished.rows)
    for key, name in GOOD.items():
        if key.endswith(".png"):
            one, other = (
                decode_image((folder / name).read_bytes(), name=name) for folder in (finished.output, tmp_path)
            )
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 1, key
    assert (tmp_path / "a.jpg.png").is_file()
    assert (tmp_path / "a.png").is_file()


@pytest.mark.ray
@ray_cluster
def test_too_many_failures_are_an_exit_code(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_files(str(tmp_path / "in"), {"a.png": png(), "b.png": b"", "c.png": b""})
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--weights", str(weights)]

    assert restore.main(arguments) == 1
    assert "2 of 3 inputs failed, 66.7%: expected at most --max-failures 0.5" in capsys.readouterr().err
    assert restore.main([*arguments, "--max-failures", "0.7"]) == 0


@pytest.mark.ray
def test_progress_is_scraped_with_rays_metrics(finished: Run) -> None:
    import ray

    deadline, text = time.monotonic() + 40, ""
    while time.monotonic() < deadline and "ldbfr_archive_images_total" not in text:
        port = ray.nodes()[0]["MetricsExportPort"]
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        time.sleep(0.5)

    found = [line for line in text.splitlines() if line.startswith("ray_ldbfr_archive_images_total{")]
    mine = [line for line in found if f'output="{finished.output}"' in line]
    counts = {match[1]: float(match[2]) for line in mine if (match := re.search(r'status="(\w+)".*} (\S+)$', line))}
    assert counts == {"restored": 12, "failed": 5, "skipped": 1}


@pytest.mark.ray
@ray_cluster
def test_a_worker_with_other_weights_ends_the_run(weights: Path, tmp_path: Path) -> None:
    from jobs import flow, restore_flow

    put_files(str(tmp_path / "in"), {"a.png": png()})
    settings = run_settings(str(tmp_path / "in"))
    workers = flow.Workers(1, "cpu", 1, 4)
    execution = restore_flow.RayExecution(str(tmp_path / "out"), settings, str(weights), workers)

    with pytest.raises(LDBFRError, match=r"a worker cannot start: .* on this node has other weights"):
        restore_here(str(tmp_path / "out"), settings, execution)


# ---- what is refused, before Ray starts ----


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode_image(tiny.blob_faces(1)[0], "png"))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"input": "missing"}, "there is no such file or folder; check the path"),
        ({"input": "none"}, "no images in"),
        ({"output": "in"}, "is the input: results would overwrite it; name another folder"),
        ({"output": "in/a.png/out"}, "a file stands where a folder is needed"),
        ({"weights": "faces_65"}, "no weights 'faces_65': looked in"),
        ({"steps": "2000"}, "--steps 2000: expected 0 to 500"),
        ({"start-step": "0"}, "--start-step 0: expected 1 to 1,000"),
        ({"condition-scale": "-1"}, "--condition-scale -1.0: expected 0 or more"),
        ({"quality": "101"}, "--quality 101: expected 1 to 100"),
        ({"batch-size": "0"}, "--batch-size 0: expected 1 to 4,096"),
        ({"workers": "0"}, "--workers 0: expected 1 to 10,000"),
        ({"workers": "two"}, "--workers two: expected a number or MIN:MAX, such as 4 or 1:4"),
        ({"workers": "3:2"}, "--workers MIN 3: expected 1 to 2"),
        ({"max-failures": "1.5"}, "--max-failures 1.5: expected a share from 0 to 1"),
        ({"gpus-per-worker": "0"}, "--gpus-per-worker 0.0: expected above 0, up to 1"),
        ({"shard-images": "0"}, "--shard-images 0: expected 1 to 87,381"),
        ({"device": "gpu"}, "--device gpu: expected cpu or cuda"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(
    inputs: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, str],
    text: str,
) -> None:
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(restore.Cluster, "start", lambda _: pytest.fail("Ray was started"))
    given = {"input": "in", "output": "out", "weights": str(weights)} | options

    code = restore.main([part for name, value in given.items() for part in (f"--{name}", value)])

    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert error.startswith("restore: ")
    assert text in error


def test_cut_weights_are_refused_before_ray_starts(
    inputs: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(restore.Cluster, "start", lambda _: pytest.fail("Ray was started"))
    shutil.copytree(weights, inputs / "weights")
    cut = inputs / "weights" / "unet" / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])

    code = restore.main(
        ["--input", str(inputs / "in"), "--output", str(inputs / "out"), "--weights", str(inputs / "weights")]
    )

    assert code == 2
    assert f"{cut} has" in capsys.readouterr().err
    assert not (inputs / "out").exists()


def test_a_mistyped_place_does_not_spoil_the_output(
    inputs: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(restore.Cluster, "start", lambda _: pytest.fail("Ray was started"))
    rest = ["--output", str(inputs / "out"), "--weights", str(weights)]
    assert restore.main(["--input", str(inputs / "none"), *rest]) == 2
    monkeypatch.setattr(restore, "work_off", lambda *_: None)

    assert restore.main(["--input", str(inputs / "in"), *rest]) == 1, "it goes on, as far as this test lets it"
    assert "1 inputs were planned, but 0 have a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "there", "share"), [(1, 1, 1.0), (2, 2, 1.0), (2, 4, 1.0), (3, 2, 0.5), (4, 1, 0.25), (5, 2, 1 / 3)]
)
def test_workers_share_the_gpus(count: int, there: int, share: float) -> None:
    from jobs.flow import gpu_share

    assert gpu_share(count, there, None) == share
    with pytest.raises(ConfigError, match="workers do not fit on"):
        gpu_share(there * 2 + 1, there, 0.5)


@pytest.mark.parametrize("arguments", [["--input", "in"], ["--scheduler", "euler"], ["--frmat", "png"]])
def test_a_mistyped_option_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        restore.main(arguments)

    assert caught.value.code == 2
    assert arguments[0].lstrip("-") in capsys.readouterr().err or arguments[0] == "--input"


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        restore.main(["--help"])

    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "python jobs/restore.py --input faces/ --output restored/" in " ".join(text.split())
    assert "ray job submit --working-dir ." in text
