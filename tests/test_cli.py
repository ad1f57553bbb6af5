"""The command line as a user meets it: help, errors in one line, Ctrl-C and its continuation, export."""

import json
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ldbfr.cli import StageChoice, main
from ldbfr.config import load_preset, preset_names
from ldbfr.images import encode_image
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.training.checkpoint import latest_checkpoint, read_state
from ldbfr.training.stages import STAGE_NAMES
from tests import tiny

REPOSITORY = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "ldbfr.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def ldbfr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command's entry point in this process: another Python would spend seconds on imports."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["ldbfr", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return Done(1, out, err + code) if isinstance(code, str) else Done(int(code or 0), out, err)

    return run


def fails(done: Done, *texts: str) -> None:
    """A non-zero exit with the message; what is no error of ldbfr's would have come as an exception."""
    assert done.code not in (0, 130)
    for text in texts:
        assert text in done.out + done.err


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of blob faces."""
    folder = tmp_path_factory.mktemp("faces")
    for number, face in enumerate(tiny.blob_faces(6)):
        (folder / f"face-{number}.png").write_bytes(encode_image(face, "png"))
    return folder


def test_help_names_the_commands_and_their_settings(ldbfr: Command) -> None:
    overview, train = ldbfr("--help"), ldbfr("train", "--help")
    assert overview.code == train.code == 0
    for text in ("train", "export", "presets"):
        assert text in overview.out
    for text in ("--data", "--run", "--preset", "--stage", "--set", *STAGE_NAMES):
        assert text in train.out


def test_the_choices_of_stages_are_the_recipe_s() -> None:
    assert typing.get_args(StageChoice) == ("all", *STAGE_NAMES)


def test_presets_are_listed_and_shown(ldbfr: Command) -> None:
    listed, shown = ldbfr("presets"), ldbfr("presets", "tiny")
    assert listed.out.split() == preset_names()
    assert json.loads(shown.out) == load_preset("tiny").model_dump(mode="json")


def test_an_unknown_preset_is_an_error_in_words(ldbfr: Command) -> None:
    fails(ldbfr("presets", "huge"), "no preset 'huge'", "faces_64")


def test_an_unknown_setting_is_an_error_in_words(ldbfr: Command, faces: Path, tmp_path: Path) -> None:
    done = ldbfr(
        "train", "--preset", "tiny", "--data", faces, "--run", tmp_path / "run", "--set", "training.prior.stepz=3"
    )
    fails(done, "training.prior.stepz", "Extra inputs are not permitted")
    assert not (tmp_path / "run").exists()


def test_an_error_of_ours_is_one_line_without_a_traceback() -> None:
    done = subprocess.run([*COMMAND, "presets", "huge"], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("ldbfr: no preset 'huge'")
    assert len(done.stderr.splitlines()) == 1


def test_missing_data_are_an_error_in_words(ldbfr: Command, tmp_path: Path) -> None:
    done = ldbfr("train", "--preset", "tiny", "--data", tmp_path / "nowhere", "--run", tmp_path / "run")
    fails(done, "nowhere: expected a folder, a .tar or a .zip")
    assert not (tmp_path / "run").exists()


def test_an_unknown_device_is_an_error_in_words(ldbfr: Command, faces: Path, tmp_path: Path) -> None:
    fails(
        ldbfr("train", "--preset", "tiny", "--data", faces, "--run", tmp_path / "run", "--device", "abacus"), "abacus"
    )


def test_exporting_a_run_that_is_none_is_an_error_in_words(ldbfr: Command, tmp_path: Path) -> None:
    fails(ldbfr("export", "--run", tmp_path / "nowhere", "--output", tmp_path / "weights"), "nowhere")
    assert not (tmp_path / "weights").exists()


def train_until(command: list[str], line: str) -> subprocess.Popen[str]:
    """Start a command and read its log until a text comes."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    seen = []
    for text in process.stderr:
        seen.append(text)
        if line in text:
            return process
    raise AssertionError("".join(seen))


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_command_goes_on_to_exported_weights(
    ldbfr: Command, faces: Path, tmp_path: Path
) -> None:
    run, weights = tmp_path / "run", tmp_path / "weights"
    settings = [
        "training.hq_vqgan.steps=40",
        "training.hq_vqgan.checkpoint_every=1000",
        "training.hq_vqgan.log_every=1",
    ]
    command = [*COMMAND, "train", "--preset", "tiny", "--data", str(faces), "--run", str(run), "--threads", "1"]
    command += [part for setting in settings for part in ("--set", setting)]

    process = train_until(command, "hq_vqgan 3/40")
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    assert "hq_vqgan stopped at step" in log
    checkpoint = latest_checkpoint(run / "hq_vqgan")
    assert checkpoint is not None
    stopped = read_state(checkpoint)["step"]
    assert 3 <= stopped < 40

    resumed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stderr
    assert f"hq_vqgan continues at step {stopped} of 40" in resumed.stderr
    for name in STAGE_NAMES:
        checkpoint = latest_checkpoint(run / name)
        assert checkpoint is not None
        assert read_state(checkpoint)["step"] == (40 if name == "hq_vqgan" else 4)

    started = time.time()
    exported = ldbfr("export", "--run", run, "--output", weights)
    assert exported.code == 0, exported.err
    pipeline = LDBFRPipeline.from_pretrained(weights, preset="tiny")
    assert pipeline.weights_digest in exported.out
    assert pipeline(tiny.blob_faces(1)).images.shape == (1, 32, 32, 3)
    assert all(path.stat().st_mtime >= started - 2 for path in weights.rglob("*"))
    fails(ldbfr("export", "--run", run, "--output", weights), "is not empty")
