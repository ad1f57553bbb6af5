"""The main job on a local Ray: one manifest row per input, the pipeline's own results, refusals before Ray starts."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from jobs import restore
from ldbfr.archive.plan import make_plan
from ldbfr.archive.settings import RestoreSettings, Weights
from ldbfr.errors import LDBFRError
from ldbfr.images import decode_image, encode_image, fit_to_side
from ldbfr.pipeline import LDBFRPipeline
from tests import tiny

ray_cluster = pytest.mark.usefixtures("ray_cluster")

GOOD = {
    "a.jpg": "a.jpg",
    "a.png": "a.png",
    "alpha.png": "alpha.png",
    "b.webp": "b.webp",
    "cmyk.jpg": "cmyk.jpg",
    "contact-sheet.png": "contact-sheet.png.png",
    "deep.png": "deep.png",
    "nested/déjà vu/100% #1?.png": "nested/déjà vu/100% #1?.png",
    "nested/scan.bmp": "nested/scan.bmp.png",
    "nested/scan.tif": "nested/scan.tif.png",
    "palette.png": "palette.png",
    "rotated.jpg": "rotated.jpg",
    "写真/顔.png": "写真/顔.png",
}
"""Inputs that must be restored, and where to."""

BAD = {
    "blocked.png": "this is a folder, expected a file",
    "empty.png": "the file is empty (0 bytes)",
    "huge.png": "30000 x 30000 pixels",
    "nested/text.png": "not a supported image",
    "truncated.jpg": "damaged or truncated",
}
"""Inputs that must fail, and what the reason says."""


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """A picture as a file."""
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def huge_header() -> bytes:
    """A PNG of a few bytes that claims 30,000 x 30,000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    lines = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(lines)


def input_files() -> dict[str, bytes]:
    """Every kind of file that the job may meet."""
    faces = [Image.fromarray(face) for face in tiny.blob_faces(len(GOOD), side=48)]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    whole = saved(faces[0], "JPEG")
    return {
        "a.jpg": saved(faces[0], "JPEG"),
        "a.png": saved(faces[1], "PNG"),
        "alpha.png": saved(
            Image.merge("RGBA", (*faces[2].split(), Image.linear_gradient("L").resize((48, 48)))), "PNG"
        ),
        "b.webp": saved(faces[3], "WEBP"),
        "cmyk.jpg": saved(faces[4].convert("CMYK"), "JPEG"),
        "contact-sheet.png": saved(faces[5], "PNG"),
        "deep.png": saved(Image.fromarray(np.asarray(faces[6])[..., 0].astype(np.uint16) * 257), "PNG"),
        "nested/déjà vu/100% #1?.png": saved(faces[7], "PNG"),
        "nested/scan.bmp": saved(faces[8], "BMP"),
        "nested/scan.tif": saved(faces[9], "TIFF"),
        "palette.png": saved(faces[10].quantize(32), "PNG"),
        "rotated.jpg": saved(faces[11].resize((48, 32)), "JPEG", exif=exif),
        "写真/顔.png": saved(faces[12].resize((tiny.SIDE, tiny.SIDE)), "PNG"),
        "blocked.png": saved(faces[0], "PNG"),
        "empty.png": b"",
        "huge.png": huge_header(),
        "nested/text.png": b"not a picture at all",
        "truncated.jpg": whole[: len(whole) // 2],
        "notes.txt": b"skip me",
    }


@dataclass(frozen=True)
class Run:
    """A finished job and where it worked."""

    input: Path
    output: Path
    weights: Path
    printed: str

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The manifest, by key."""
        rows = pq.read_table(self.output / "manifest.parquet").to_pylist()
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
        arguments = ["--input", str(folder / "in"), "--output", str(folder / "out"), "--weights", str(weights)]
        assert restore.main([*arguments, "--first-stage", "--batch-size", "4", "--seed", "7"]) == 0
    return Run(folder / "in", folder / "out", weights, printed.getvalue())


# ---- what a run leaves ----


@pytest.mark.ray
def test_every_input_has_exactly_one_row(finished: Run) -> None:
    rows = finished.rows

    assert list(rows) == sorted([*GOOD, *BAD], key=lambda key: [part.encode() for part in key.split("/")])
    assert {key for key, row in rows.items() if row["status"] == "restored"} == set(GOOD)
    assert {key for key, row in rows.items() if row["status"] == "failed"} == set(BAD)


@pytest.mark.ray
def test_a_failed_row_says_why(finished: Run) -> None:
    for key, text in BAD.items():
        row = finished.rows[key]
        assert text in row["reason"], key
        assert key.rpartition("/")[2] in row["reason"]
        assert row["output"] is None


@pytest.mark.ray
def test_a_restored_row_says_what_was_done(finished: Run) -> None:
    weights = Weights.find(str(finished.weights))
    settings = RestoreSettings.resolve(weights.preset, first_stage=True, seed=7)
    for key, name in GOOD.items():
        row = finished.rows[key]
        assert row["output"] == str(finished.output / name)
        assert row["first_stage"] == str(finished.output / "_first-stage" / name)
        assert (row["seed"], row["weights"], row["settings"]) == (7, weights.digest, settings.digest())
        assert row["size"] == (finished.input / key).stat().st_size
        assert min(row["seconds_read"], row["seconds_model"], row["seconds_write"]) > 0
    rotated = finished.rows["rotated.jpg"]
    assert (rotated["width"], rotated["height"]) == (32, 48)
    assert rotated["note"] == "cropped to its central 32 px square"
    assert finished.rows["写真/顔.png"]["note"] is None


@pytest.mark.ray
def test_nothing_but_whole_results_is_left(finished: Run) -> None:
    files = {path.relative_to(finished.output).as_posix() for path in finished.output.rglob("*") if path.is_file()}

    first_stages = {f"_first-stage/{name}" for name in [*GOOD.values(), "blocked.png"]}
    work = {"_ldbfr/plan/000000.parquet", "_ldbfr/run.json"}
    assert files == {*GOOD.values(), *first_stages, *work, "manifest.parquet", "contact-sheet.png"}
    for name in GOOD.values():
        data = (finished.output / name).read_bytes()
        assert decode_image(data, name=name).shape == (tiny.SIDE, tiny.SIDE, 3)


@pytest.mark.ray
def test_results_are_what_the_pipeline_gives(finished: Run) -> None:
    pipeline = LDBFRPipeline.from_pretrained(finished.weights)
    for key, name in GOOD.items():
        if not name.endswith(".png"):
            continue
        face = fit_to_side(decode_image((finished.input / key).read_bytes(), name=key), tiny.SIDE)
        direct = pipeline(face[None], seed=7, return_first_stage=True)
        for folder, expected in (
            (finished.output, direct.images),
            (finished.output / "_first-stage", direct.first_stage),
        ):
            written = decode_image((folder / name).read_bytes(), name=name)
            assert np.abs(written.astype(int) - expected[0]).max() <= 1, key


@pytest.mark.ray
def test_the_sheet_shows_three_columns(finished: Run) -> None:
    sheet = decode_image((finished.output / "contact-sheet.png").read_bytes(), name="sheet")

    assert sheet.shape[0] > 8 * 192  # two blocks of at most eight rows
    assert sheet.shape[1] > 6 * 192


@pytest.mark.ray
def test_the_summary_lists_failures_and_places(finished: Run) -> None:
    lines = finished.printed.splitlines()

    assert lines[0].startswith("13 of 18 images restored, 5 failed, in ")
    assert "  empty.png: the file is empty (0 bytes), expected an image; copy it again from its source" in lines
    assert lines[-2:] == [str(finished.output / "manifest.parquet"), str(finished.output / "contact-sheet.png")]


@pytest.mark.ray
def test_the_run_is_written_down(finished: Run) -> None:
    about = json.loads((finished.output / "_ldbfr" / "run.json").read_text())

    assert (about["planned"], about["skipped"], about["settings"]["seed"]) == (18, 1, 7)


@pytest.mark.ray
def test_results_do_not_depend_on_batch_or_workers(finished: Run, tmp_path: Path) -> None:
    arguments = ["--input", str(finished.input), "--output", str(tmp_path), "--weights", str(finished.weights)]

    assert restore.main([*arguments, "--batch-size", "3", "--workers", "2", "--seed", "7", "--format", "png"]) == 0

    rows = pq.read_table(tmp_path / "manifest.parquet").to_pylist()
    assert [row["key"] for row in rows] == list(finished.rows)
    assert not [row["key"] for row in rows if row["status"] == "failed" and row["key"] not in BAD]
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
def test_a_worker_with_other_weights_ends_the_run(weights: Path, tmp_path: Path) -> None:
    from jobs import flow

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode_image(tiny.blob_faces(1)[0], "png"))
    planned = Weights.find(str(weights))
    settings = RestoreSettings.resolve(planned.preset)
    plan = make_plan(str(tmp_path / "in"), str(tmp_path / "out"), format="same", seed=0)

    with pytest.raises(LDBFRError, match=r"a worker cannot start: .* on this node has other weights"):
        list(
            flow.restored_rows(
                plan, str(tmp_path / "out"), replace(planned, digest="0"), settings, flow.Workers(1, "cpu", 1, 4)
            )
        )


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
        ({"input": "missing"}, "there is no such folder; check the path"),
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
    monkeypatch.setattr(restore, "run", lambda *_: pytest.fail("the run was started"))
    given = {"input": "in", "output": "out", "weights": str(weights)} | options

    code = restore.main([part for name, value in given.items() for part in (f"--{name}", value)])

    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert error.startswith("restore: ")
    assert text in error


def test_cut_weights_are_refused_before_ray_starts(
    inputs: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(restore, "run", lambda *_: pytest.fail("the run was started"))
    shutil.copytree(weights, inputs / "weights")
    cut = inputs / "weights" / "unet" / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])

    code = restore.main(
        ["--input", str(inputs / "in"), "--output", str(inputs / "out"), "--weights", str(inputs / "weights")]
    )

    assert code == 2
    assert f"{cut} has" in capsys.readouterr().err
    assert not (inputs / "out").exists()


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
