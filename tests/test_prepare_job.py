"""The preparation as a job on a local Ray: the same result on any number of workers and after a kill; the latents."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import prepare
from ldbfr import storage
from ldbfr.data.dataset import read_dataset
from ldbfr.data.latents import CachedLatents, LatentsInfo, latents_folder
from ldbfr.data.shards import ShardedFaces
from ldbfr.errors import InputError
from ldbfr.images import to_float
from ldbfr.models.vqgan import VQGAN
from ldbfr.preparation.latents import PART_FACES, encode_part, latent_requests
from ldbfr.preparation.run import WORK_FOLDER, Preparation
from ldbfr.runner import run_here
from ldbfr.training.run import load_stage_network, remember_preset
from tests import tiny
from tests.conftest import REPOSITORY
from tests.preparing import damage, digests, make_settings, pngs, put, textures, write_tar, write_zip
from tests.preparing import prepare as prepare_here

ray_cluster = pytest.mark.usefixtures("ray_cluster")
START_SECONDS, JOB_SECONDS = 120, 240


def write_inputs(root: object, count: int = 20) -> None:
    """Loose files, archives of every way to be read, and one image that is broken."""
    images = textures(3 * count, side=36)
    put(root, {f"in/{n}.png": data for n, data in enumerate(images[:count])})
    archived = {f"{n}.png": data for n, data in enumerate(images[count : 2 * count])}
    put(root, {"in/x.tar": write_tar(archived), "in/broken.png": b"no image"})
    compressed = {f"{n}.png": data for n, data in enumerate(images[2 * count :])}
    put(root, {"in/y.tgz": write_tar(compressed, "w:gz"), "in/z.zip": write_zip(dict(list(archived.items())[:5]))})


def arguments(root: object, output: object, **options: object) -> list[str]:
    """The job's command line, as in `make_settings`."""
    places = {"input": f"{root}/in", "output": output}
    given = places | {"side": 32, "val_share": 0.3, "shard_images": 4, "workers": 2} | options
    return ["shards"] + [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


# ---- shards ----


@pytest.mark.ray
@ray_cluster
def test_any_number_of_workers_gives_the_same_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_inputs(tmp_path)
    prepare_here(tmp_path / "here", tmp_path / "in")

    assert prepare.main(arguments(tmp_path, tmp_path / "one", workers=1)) == 0
    assert prepare.main(arguments(tmp_path, tmp_path / "three", workers=3)) == 0

    expected = digests(tmp_path / "here")
    assert digests(tmp_path / "one") == digests(tmp_path / "three") == expected
    lines = capsys.readouterr().out.splitlines()
    kept = read_dataset(str(tmp_path / "one")).settings["summary"]["kept"]
    assert lines[:5] == [
        *(f"{tmp_path}/one/{name}" for name in ("report.parquet", "contact-sheet.png")),
        f"66 inputs: 65 kept (train {kept['train']}, val {kept['val']}), 1 rejected, 0 near-duplicates",
        "  1 broken",
        f"{tmp_path}/one is finished",
    ]


@pytest.mark.ray
@ray_cluster
def test_near_duplicates_are_dropped_and_a_finished_run_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    assert prepare.main(arguments(tmp_path, tmp_path / "out", near_duplicates="drop")) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    first = capsys.readouterr().out.splitlines()

    assert prepare.main(arguments(tmp_path, tmp_path / "out", near_duplicates="drop", workers=1)) == 0

    again = capsys.readouterr().out.splitlines()
    assert "1 rejected, 5 near-duplicates" in first[2]  # the zip's members are the tar's
    assert again == [f"{tmp_path}/out is finished; nothing to do", *first[2:4]]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    prepare_here(tmp_path / "here", tmp_path / "in", near_duplicates="drop")
    assert digests(tmp_path / "out") == digests(tmp_path / "here")


@pytest.mark.ray
@ray_cluster
def test_damaged_archives_are_listed_and_stop_the_run_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in", {"good.png": pngs(1)[0], "a.tar": damage("cut between.tar"), "b.zip": b"no zip"})

    assert prepare.main(arguments(tmp_path, tmp_path / "out")) == 1

    lines = capsys.readouterr().err.splitlines()
    lines = lines[lines.index("prepare: 2 of the archives are damaged:") :]
    assert lines[1].startswith(f"  {tmp_path}/in/a.tar is not a readable tar file (ends without its end mark")
    assert lines[2].startswith(f"  {tmp_path}/in/b.zip is not a readable zip file")
    assert lines[3].endswith("use what can be read of them with --allow-damaged")
    assert not storage.exists(str(tmp_path / "out" / "dataset.json"))

    assert prepare.main([*arguments(tmp_path, tmp_path / "out"), "--allow-damaged"]) == 0
    assert "8 inputs: 6 kept" in capsys.readouterr().out


@pytest.mark.ray
@ray_cluster
def test_an_error_of_a_worker_comes_out_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_inputs(tmp_path, count=6)
    put(tmp_path, {"out/shards": b"a file where a folder is needed"})

    assert prepare.main(arguments(tmp_path, tmp_path / "out")) == 1

    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prepare: cannot ")
    assert "a file stands where a folder is needed; move it, or name another place" in error


@pytest.mark.ray
@ray_cluster
def test_no_usable_image_ends_with_2_and_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in", {"a.png": b"text", "small.png": pngs(1, side=20)[0]})

    assert prepare.main(arguments(tmp_path, tmp_path / "out")) == 2

    error = capsys.readouterr().err
    assert "prepare: no usable image among 2: 1 broken, 1 too small" in error
    assert f"{tmp_path}/in/small.png: too small: 20 x 20 px, expected at least 32 px on the shorter side" in error


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """Where a Ray of its own keeps its files: short, since Unix sockets are among them."""
    folder = tempfile.mkdtemp(prefix="ldbfr-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_a_killed_job_goes_on_where_it_was(tmp_path: Path, s3_root: str, ray_folder: str) -> None:
    write_inputs(s3_root, count=60)
    prepare_here(tmp_path / "undisturbed", f"{s3_root}/in")
    command = [sys.executable, "jobs/prepare.py", *arguments(s3_root, f"{s3_root}/out", workers=2)]
    environment = {**os.environ, "RAY_TMPDIR": ray_folder}
    units = storage.join(s3_root, "out", WORK_FOLDER, "units")
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while sum(1 for _ in storage.list_objects(units)) < 5:
            assert job.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
    assert not storage.exists(f"{s3_root}/out/dataset.json")
    done = sum(1 for _ in storage.list_objects(units))

    resumed = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=JOB_SECONDS
    )

    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert done >= 5
    assert digests(f"{s3_root}/out") == digests(tmp_path / "undisturbed")
    assert not list(storage.list_objects(f"{s3_root}/out/{WORK_FOLDER}"))


# ---- what is refused, before Ray starts ----


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"side": 0}, "--side 0: expected 8 to 8,192; 512 is the paper's"),
        ({"side": -5}, "--side -5: expected 8 to 8,192"),
        ({"min_side": 0}, "--min-side 0: expected 1 to 100,000"),
        ({"val_share": 1}, "--val-share 1.0: expected 0 to below 1"),
        ({"shard_images": 0}, "--shard-images 0: expected 1 to 100,000"),
        ({"workers": 0}, "--workers 0: expected 1 to 10,000"),
        ({"input": "missing"}, "/missing: there is no such file or folder; check the path"),
        ({"input": "notes.md"}, "expected a folder, an image, an archive (.tar, .tar.gz, .tgz, .zip, .parquet) or a"),
        ({"input": "empty"}, "nothing is there; check the place"),
        ({"input": "http://x/y"}, "unsupported URI, expected a local path, file:///path or s3://bucket/key"),
        ({"output": "in/out"}, "one is the other or lies in it, so results would be read as input"),
        ({"output": "notes.md/out"}, "a file stands where a folder is needed"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    text: str,
) -> None:
    put(tmp_path, {"in/1.png": pngs(1)[0], "notes.md": b"x"})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "connected", lambda *_: pytest.fail("Ray was started"))

    code = prepare.main(arguments(".", **{"output": "out"} | options))

    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert error.startswith("prepare: ")
    assert text in error


def test_a_bucket_that_refuses_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], s3_root: str
) -> None:
    monkeypatch.setattr(prepare, "connected", lambda *_: pytest.fail("Ray was started"))
    put(tmp_path, {"in/1.png": pngs(1)[0]})

    assert prepare.main(arguments("s3://no-such-bucket-here", tmp_path / "out")) == 1
    assert "there is no such bucket; create it, or check its name" in capsys.readouterr().err
    assert prepare.main(arguments(tmp_path, "s3://no-such-bucket-here/out")) == 2
    assert "there is no such bucket; create it, or check its name" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["shards", "latents", ""])
def test_the_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare.main([part for part in (command, "--help") if part])

    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert caught.value.code == 0
    expected = {
        "shards": "python jobs/prepare.py shards --input ffhq/ --output faces512/",
        "latents": "python jobs/prepare.py latents --data faces512/ --vqgan runs/paper",
        "": "prepare.py shards --help",
    }
    assert expected[command] in text


# ---- latents ----


STEPS = "training.latent_vqgan.steps=1"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose latent VQGAN is trained."""
    folder = tmp_path_factory.mktemp("run")
    tiny.new_trainer(folder, "latent_vqgan", STEPS).train()
    remember_preset(folder, tiny.preset(STEPS))
    return folder


@pytest.fixture(scope="module")
def vqgan(run_folder: Path) -> tuple[VQGAN, str]:
    """Its network, and the digest."""
    network, digest = load_stage_network(run_folder, "latent_vqgan", tiny.preset(STEPS))
    assert isinstance(network, VQGAN)
    return network.eval(), digest


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A data set of more than one part in a split."""
    put(tmp_path / "in", {"x.tar": write_tar({f"{n}.png": face for n, face in enumerate(pngs(300, side=32))})})
    prepare_here(tmp_path / "data", tmp_path / "in", val_share=0.1, shard_images=128)
    return str(tmp_path / "data")


def direct(vqgan: VQGAN, faces: np.ndarray) -> np.ndarray:
    """z_0 of faces (n, S, S, 3), encoded one at a time."""
    with torch.no_grad():
        return np.concatenate([vqgan.to_latents(to_float(face[None])).numpy() for face in faces])


def open_latents(data: str, split: str, digest: str) -> CachedLatents:
    """The latents of a split."""
    return CachedLatents.open(data, split, digest, read_dataset(data).splits[split].digest)


@pytest.mark.ray
@ray_cluster
def test_latents_are_those_of_the_vqgan(
    data: str, run_folder: Path, vqgan: tuple[VQGAN, str], capsys: pytest.CaptureFixture[str]
) -> None:
    network, digest = vqgan
    command = ["latents", "--data", data, "--vqgan", str(run_folder)]

    assert prepare.main([*command, "--workers", "1"]) == 0

    printed = capsys.readouterr().out
    for split in ("train", "val"):
        faces, latents = ShardedFaces.open(data, split), open_latents(data, split, digest)
        some = np.arange(0, len(faces), 7)
        pixels = faces.read(some)
        for flip in (False, True):
            expected = direct(network, pixels[:, :, ::-1] if flip else pixels)
            np.testing.assert_allclose(latents.read(some, np.full(len(some), flip)), expected, atol=1e-4)
        assert f"{split}: {len(faces)} faces, each with its mirror image, in" in printed
    before = {path: path.stat().st_mtime_ns for path in Path(data).rglob("*")}
    assert prepare.main(command) == 0
    assert "are finished; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path(data).rglob("*")} == before

    assert prepare.main([*command, "--precision", "fp16"]) == 2
    assert "holds the latents in float32, expected float16; delete that folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
@ray_cluster
def test_any_number_of_encoders_gives_the_same_latents(data: str, run_folder: Path) -> None:
    def encoded(workers: int) -> dict[str, bytes]:
        command = ["latents", "--data", data, "--vqgan", str(run_folder), "--workers", str(workers)]
        assert prepare.main(command) == 0
        folder = Path(data) / "latents"
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        shutil.rmtree(folder)
        return files

    assert encoded(1) == encoded(3)


def test_parts_that_are_there_are_not_encoded_again(data: str, vqgan: tuple[VQGAN, str], tmp_path: Path) -> None:
    network, digest = vqgan
    train = next(split for split in latent_requests(data, tiny.SIDE, digest, "float16") if split.split == "train")
    faces = ShardedFaces.open(data, "train")
    assert train.num_parts == 2
    first = encode_part(network, faces, train, 0)
    file = Path(latents_folder(data, "train", digest)) / first.file
    before = file.stat().st_mtime_ns

    assert encode_part(network, faces, train, 0) == first
    assert file.stat().st_mtime_ns == before
    train.writer().finish([encode_part(network, faces, train, 1), first])

    last = [PART_FACES, len(faces) - 1]
    stored = open_latents(data, "train", digest).read(last, [True, False])
    pixels = faces.read(last)
    expected = direct(network, np.stack([pixels[0][:, ::-1], pixels[1]]))
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-3)
    info = LatentsInfo.read(latents_folder(data, "train", digest))
    assert info is not None
    assert info.dtype == "float16"


def test_latents_of_another_side_are_refused(data: str) -> None:
    with pytest.raises(InputError, match="holds faces at 32 px, but the VQGAN was trained at 64; prepare the images"):
        latent_requests(data, 64, "0" * 64, "float32")


def test_a_run_without_a_vqgan_is_refused(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["latents", "--data", data, "--vqgan", str(tmp_path)]) == 2
    assert "is no training run" in capsys.readouterr().err

    remember_preset(tmp_path / "run", tiny.preset(STEPS))
    assert prepare.main(["latents", "--data", data, "--vqgan", str(tmp_path / "run")]) == 2
    assert "has 0 of 1 steps: train it first" in capsys.readouterr().err


def test_settings_are_kept_with_the_data(tmp_path: Path) -> None:
    put(tmp_path / "in", {"1.png": pngs(1)[0]})
    settings = make_settings(tmp_path / "in")
    preparation = Preparation(str(tmp_path / "out"), settings)
    preparation.begin()
    plan = preparation.plan()
    preparation.list_archives(plan, run_here, allow_damaged=False)
    list(preparation.write(plan, run_here))
    preparation.finish(plan)

    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert about["settings"]["preparation"] == settings.model_dump(mode="json")
