"""The evaluation as a Ray job: the same results as on one machine, from a disk and from a bucket."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from jobs.evaluate import EXIT_FAILED, EXIT_OK
from jobs.evaluate import main as job
from ldbfr.cli import main as command
from ldbfr.evaluation.building import build_testset
from ldbfr.evaluation.engine import RESULTS_FILE, ROWS_FILE
from ldbfr.images import encode_image
from ldbfr.storage import exists, read_bytes
from tests import tiny
from tests.conftest import REPOSITORY
from tests.evaluating import save_weights

COMMON = ["--metrics", "psnr", "ssim", "sharpness", "--batch-size", "4", "--device", "cpu"]
SAME = ("test_set", "restorers", "measures", "missing", "scores")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pipeline's weights."""
    return save_weights(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Blob faces to make test sets from."""
    folder = tmp_path_factory.mktemp("faces")
    for number, face in enumerate(tiny.blob_faces(5)):
        (folder / f"{number}.png").write_bytes(encode_image(face, "png"))
    return str(folder)


@pytest.fixture(scope="module")
def test_set(faces: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A test set of 15 images."""
    place = str(tmp_path_factory.mktemp("testset") / "blobs")
    build_testset(faces, place, side=tiny.SIDE, every=True, source_framing="tight", framing="tight", processes=1)
    return place


@pytest.mark.ray
def test_a_cluster_gives_what_one_machine_gives_to_the_last_digit(
    ray_cluster: None, test_set: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*COMMON, "--weights", weights]
    workers = "3"  # of one thread each, on the four CPUs of the cluster
    assert job([test_set, "--output", str(tmp_path / "ray"), *options, "--workers", workers]) == EXIT_OK
    own = ["ldbfr", "evaluate", test_set, "--output", str(tmp_path / "one"), *options, "--threads", "1"]
    monkeypatch.setattr(sys, "argv", own)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            command()
    finally:
        torch.set_num_threads(threads)
    assert ended.value.code == 0
    ray, one = (json.loads((tmp_path / name / RESULTS_FILE).read_text("utf-8")) for name in ("ray", "one"))
    for part in SAME:
        assert ray[part] == one[part], part
    assert set(ray["scores"]) == {"input", "first-stage", weights}
    assert (tmp_path / "ray" / ROWS_FILE).read_bytes() == (tmp_path / "one" / ROWS_FILE).read_bytes()
    assert (tmp_path / "ray" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_set_and_results_may_be_in_a_bucket(
    s3_root: str, faces: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, output = f"{s3_root}/blobs", f"{s3_root}/evaluations/first"
    build_testset(faces, place, side=tiny.SIDE, limit=3, source_framing="tight", framing="tight", processes=1)
    given = [place, "--output", output, *COMMON, "--weights", weights]
    command_line = [sys.executable, "jobs/evaluate.py", *given, "--restorers", "input", "first-stage"]
    folder = tempfile.mkdtemp(prefix="ldbfr-", dir="/tmp")  # short, since Unix sockets are among Ray's files
    try:
        environment = {**os.environ, "RAY_TMPDIR": folder}
        done = subprocess.run(
            command_line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    assert done.stdout.strip().endswith(f"{output}/report.html")
    results = json.loads(read_bytes(f"{output}/{RESULTS_FILE}"))
    assert set(results["scores"]) == {"input", "first-stage"}
    assert exists(f"{output}/report.md")
    again = ["ldbfr", "evaluate", place, "--output", f"{s3_root}/again", *COMMON, "--weights", weights]
    monkeypatch.setattr(sys, "argv", [*again, "--restorers", f"folder={output}/images/first-stage"])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 0
    found = json.loads(read_bytes(f"{s3_root}/again/{RESULTS_FILE}"))
    assert found["scores"]["folder"] == results["scores"]["first-stage"]


@pytest.mark.ray
def test_an_error_of_a_worker_is_said_in_words(
    ray_cluster: None, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(encode_image(tiny.blob_faces(1)[0], "png"))
    (tmp_path / "set" / "b.png").write_bytes(encode_image(tiny.blob_faces(1, 48)[0], "png"))
    given = [str(tmp_path / "set"), "--output", str(tmp_path / "out"), "--metrics", "blur", "--weights", weights]
    assert job([*given, "--device", "cpu", "--restorers", weights]) == EXIT_FAILED
    assert capsys.readouterr().err.startswith(f"evaluate: b is 48 × 48 px, {weights} restores 32 × 32: give")


def test_what_cannot_work_is_refused_before_ray_starts(
    test_set: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [test_set, "--output", str(tmp_path / "out"), "--weights", weights]
    for options, said in (
        (["--device", "tpu"], "--device tpu: expected cpu or cuda"),
        (["--workers", "0"], "--workers 0: expected 1"),
        (["--gpus-per-worker", "2"], "--gpus-per-worker 2"),
        (["--limit", "0"], "--limit 0"),
        (["--restorers", "faces_129"], "no weights 'faces_129'"),
        (["--metrics", "beauty"], "no metric 'beauty'"),
        (["--restorers", "faces_64"], "faces_64 restores faces of 64 px, the test set's have 32 px"),
        (["--restorers", f"other={test_set}/hq"], "no result for 15 of 15 images"),
    ):
        assert job([*given, *options]) == EXIT_FAILED
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_in_one_line_before_anything_is_written(
    test_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, said in (
        ([], "first-stage restores faces of 128 px, the test set's have 32 px: make one with `ldbfr"),
        (["--restorers", "input", "--processes", "0"], "--processes 0: expected 1"),
        (["--restorers", "input", "--batch-size", "0"], "--batch-size 0: expected 1"),
        (["--restorers", "input", "--kind", "lfw"], "LFW-Test"),
    ):
        arguments = ["ldbfr", "evaluate", test_set, "--output", str(tmp_path / "out"), "--metrics", "psnr", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            command()
        assert str(ended.value.code).startswith("ldbfr: ")
        assert said in str(ended.value.code)
    assert not (tmp_path / "out").exists()
