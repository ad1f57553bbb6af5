"""`ldbfr restore` and `jobs/restore.py --faces all` as users give them, on real photos with the real detector."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ldbfr import storage
from ldbfr.cli import main
from ldbfr.evaluation.measuring import num_cores
from ldbfr.faces import DETECTOR_FILE
from ldbfr.images import decode_image
from tests import tiny
from tests.archiving import manifest, outputs
from tests.conftest import REPOSITORY

PHOTOS = {"00.jpg": 4, "01.jpg": 4, "03.jpg": 1}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny.new_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def photos(shared_data: Path, tmp_path: Path) -> Path:
    """Some real photos."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in PHOTOS:
        (folder / name).write_bytes((shared_data / "real-lq" / "photos" / name).read_bytes())
    return folder


@pytest.fixture
def command(
    weights: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`ldbfr restore` with the tiny weights, in this process."""
    monkeypatch.setenv("LDBFR_FACE_DETECTOR", str(shared_data / "weights" / DETECTOR_FILE.name))

    def run(*arguments: str | Path) -> Done:
        own = ["ldbfr", "restore", *map(str, arguments), "--weights", str(weights), "--steps", "2", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", own)
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return Done(1, out, err + code) if isinstance(code, str) else Done(int(code or 0), out, err)

    return run


def test_one_photo(command: Command, photos: Path, tmp_path: Path) -> None:
    done = command(photos / "01.jpg", "-o", tmp_path / "better.png", "--sharp-faces", "restore")

    assert done.code == 0, done.err
    assert "1 of 1 images restored, 0 failed" in done.out
    before = decode_image((photos / "01.jpg").read_bytes(), name="before")
    after = decode_image((tmp_path / "better.png").read_bytes(), name="after")
    changed = (before != after).any(axis=2)
    assert before.shape == after.shape
    assert 0.02 < changed.mean() < 0.6
    assert not changed[:5].any()


def test_a_folder_and_what_is_told_of_it(command: Command, photos: Path, tmp_path: Path) -> None:
    (photos / "sub").mkdir()
    (photos / "sub" / "broken.jpg").write_bytes(b"nothing")
    options = ("--sharp-faces", "restore", "--side-by-side", "--details", tmp_path / "faces.jsonl", "--samples", "2")

    done = command(photos, "-o", tmp_path / "out", *options)

    assert done.code == 1
    assert "3 of 4 images restored, 1 failed" in done.out
    assert "sub/broken.jpg: not a supported image" in done.out
    lines = [json.loads(line) for line in (tmp_path / "faces.jsonl").read_text().splitlines()]
    found = {Path(line["input"]).name: line["faces"] for line in lines if line["status"] == "restored"}
    assert {name: len(faces) for name, faces in found.items()} == PHOTOS
    assert all(face["uncertainty"] > 0 for faces in found.values() for face in faces)
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.jpg")}
    assert files == {*PHOTOS, *(f"_side-by-side/{name}" for name in PHOTOS)}
    (photos / "sub" / "broken.jpg").unlink()
    again = command(photos, "-o", tmp_path / "out", "--sharp-faces", "restore", "--samples", "2")
    assert "0 of 3 images restored, 0 failed, 3 skipped" in again.out


def test_a_sharp_face_is_left_alone_and_that_is_said(command: Command, photos: Path, tmp_path: Path) -> None:
    done = command(photos / "03.jpg", "-o", tmp_path / "same.jpg")

    assert done.code == 0
    assert "03.jpg: 1 face left alone (sharper than the model's" in done.out
    assert (tmp_path / "same.jpg").read_bytes() == (photos / "03.jpg").read_bytes()


def test_a_box_and_a_scale(command: Command, photos: Path, tmp_path: Path) -> None:
    done = command(photos / "01.jpg", "-o", tmp_path / "out.png", "--box", "96,109,47,63", "--scale", "2")

    assert done.code == 0, done.err
    assert "3 faces left alone (not among the given boxes)" in done.out
    before = decode_image((photos / "01.jpg").read_bytes(), name="before")
    after = decode_image((tmp_path / "out.png").read_bytes(), name="after")
    assert after.shape == (2 * before.shape[0], 2 * before.shape[1], 3)


def test_a_photo_turned_upside_down_has_the_same_faces(command: Command, photos: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.open(photos / "00.jpg").transpose(Image.Transpose.ROTATE_180).save(photos / "turned.png")
    done = command(photos / "turned.png", "-o", tmp_path / "out.png", "--details", tmp_path / "d.jsonl")

    assert done.code == 0
    faces = json.loads((tmp_path / "d.jsonl").read_text())["faces"]
    assert [face["turned"] for face in faces] == [180] * 4


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--strength", "1.5"), ("--strength 1.5", "less than or equal to 1")),
        (("--box", "1,2,3"), ("--box 1,2,3", "LEFT,TOP,WIDTH,HEIGHT")),
        (("--box", "1,2,30,30", "--faces", "none"), ("--box with --faces none",)),
        (("--min-face", "90", "--max-face", "20"), ("max_face 20 is below min_face 90",)),
        (("--detector", "nowhere.onnx"), ("nowhere.onnx", DETECTOR_FILE.name, DETECTOR_FILE.sha256)),
        (("--samples", "0"), ("--samples 0",)),
        (("--format", "webp"), ("--format webp", "is named as jpeg")),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    command: Command, photos: Path, tmp_path: Path, options: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    done = command(photos / "01.jpg", "-o", tmp_path / "out.jpg", *options)

    assert done.code == 1
    assert all(text in done.err for text in texts), done.err
    assert not (tmp_path / "out.jpg").exists()


@pytest.mark.ray
@pytest.mark.s3
def test_the_archive_job_restores_photos_in_a_bucket(
    command: Command, weights: Path, photos: Path, tmp_path: Path, s3_root: str
) -> None:
    """From bucket to bucket, with the same bytes as the command on a disk."""
    for name in PHOTOS:
        storage.write_bytes(storage.join(s3_root, "in", name), (photos / name).read_bytes())
    source, output = storage.join(s3_root, "in"), storage.join(s3_root, "out")
    job = [sys.executable, REPOSITORY / "jobs" / "restore.py", "--input", source, "--output", output, "--faces", "all"]
    own = ["--sharp-faces", "restore", "--weights", weights, "--steps", "2", "--device", "cpu", "--workers", "1"]

    subprocess.run([*job, *own], check=True, timeout=240)

    rows = manifest(output)
    assert {key: len(json.loads(str(row.face_details))) for key, row in rows.items()} == PHOTOS
    written = outputs(output)
    threads = torch.get_num_threads()
    try:  # the job's one worker has every core; with other threads some pixels are rounded otherwise
        own = ["--sharp-faces", "restore", "--threads", str(num_cores())]
        assert command(photos, "-o", tmp_path / "out", *own).code == 0
    finally:
        torch.set_num_threads(threads)
    for name in PHOTOS:
        here = decode_image((tmp_path / "out" / name).read_bytes(), name=name)
        assert np.array_equal(here, decode_image(written[name], name=name)), name


def test_the_page_has_the_measured_numbers() -> None:
    from benchmarks.photos import with_table

    page = (REPOSITORY / "docs" / "photos.md").read_text("utf-8")
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "photos.json").read_text("utf-8"))
    assert with_table(page, results) == page, "run: python benchmarks/photos.py --data … --output …"
