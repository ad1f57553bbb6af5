"""A checkpoint is whole or does not exist: cut, changed, half written or in the way of a full disk."""

import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldbfr.errors import StorageError
from ldbfr.models.vqgan import Codebook, PatchDiscriminator
from ldbfr.training.checkpoint import (
    checkpoint_folders,
    latest_checkpoint,
    prune_checkpoints,
    read_state,
    read_training,
    save_checkpoint,
)
from ldbfr.weights import read_manifest
from tests import tiny


def network(seed: int = 0) -> PatchDiscriminator:
    """The smallest network that is saved in diffusers' layout."""
    with tiny.seeded(seed):
        return PatchDiscriminator(8, 1)


def save(folder: Path, step: int, **training: Any) -> Path:
    """A checkpoint with everything in it that a real one has."""
    parts = iter([("network", network(step)), ("ema", network(step + 100))])
    content = {"ema_step": step, "optimizers": {"generator": {"state": tiny.normal(5, seed=step)}}, **training}
    return save_checkpoint(folder, step, {"stage": "prior"}, content, parts)


FILES = [
    "state.json",
    "training.pt",
    "manifest.json",
    *(
        f"{part}/{file}"
        for part in ("network", "ema")
        for file in ("config.json", "diffusion_pytorch_model.safetensors")
    ),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    save(folder, 2)
    save(folder, 4)
    return folder


@pytest.fixture
def stage(saved: Path, tmp_path: Path) -> Path:
    """A stage's folder with checkpoints of steps 2 and 4, to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "stage"))


def test_a_checkpoint_comes_back_as_it_was_saved(saved: Path) -> None:
    latest = latest_checkpoint(saved)
    assert latest is not None
    assert latest.name == "step-00000004"
    assert read_state(latest) == {"step": 4, "stage": "prior"}
    training = read_training(latest)
    assert training["ema_step"] == 4
    assert torch.equal(training["optimizers"]["generator"]["state"], tiny.normal(5, seed=4))
    for part, seed in (("network", 4), ("ema", 104)):
        loaded = PatchDiscriminator.from_pretrained(latest / part, low_cpu_mem_usage=False)
        assert tiny.differing(tiny.snapshot(network(seed)), tiny.snapshot(loaded)) == []


def test_a_checkpoint_holds_these_files_and_the_manifest_names_all_others(saved: Path) -> None:
    latest = checkpoint_folders(saved)[0]
    held = {path.relative_to(latest).as_posix() for path in latest.rglob("*") if path.is_file()}
    assert held == set(FILES)
    assert set(read_manifest(latest)["files"]) == held - {"manifest.json"}


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_with_a_file_cut_at_any_byte_is_passed_over(
    stage: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    path = stage / "checkpoints" / "step-00000004" / file
    data = path.read_bytes()
    sizes = {0, 1, len(data) // 2, len(data) - 1, *np.random.default_rng(0).integers(1, len(data), 8).tolist()}
    for size in sorted(sizes):
        path.write_bytes(data[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            latest = latest_checkpoint(stage)
        assert latest is not None
        assert latest.name == "step-00000002"
        assert str(path) in caplog.text
    path.write_bytes(data)
    restored = latest_checkpoint(stage)
    assert restored is not None
    assert restored.name == "step-00000004"


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_without_one_of_its_files_is_passed_over(stage: Path, file: str) -> None:
    (stage / "checkpoints" / "step-00000004" / file).unlink()
    latest = latest_checkpoint(stage)
    assert latest is not None
    assert latest.name == "step-00000002"


@pytest.mark.parametrize("file", [file for file in FILES if file != "manifest.json"])
def test_a_checkpoint_with_a_changed_byte_is_passed_over(stage: Path, file: str) -> None:
    path = stage / "checkpoints" / "step-00000004" / file
    tiny.flip_byte(path, path.stat().st_size // 3)
    latest = latest_checkpoint(stage)
    assert latest is not None
    assert latest.name == "step-00000002"


def test_where_all_checkpoints_are_damaged_there_is_none(stage: Path) -> None:
    for folder in checkpoint_folders(stage):
        (folder / "manifest.json").write_bytes(b"")
    assert latest_checkpoint(stage) is None


def test_a_stage_that_was_never_trained_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None


def whole(stage: Path) -> list[str]:
    """Names of the checkpoints, all of them valid, and nothing else beside them."""
    names = [path.name for path in sorted((stage / "checkpoints").iterdir())]
    for name in names:
        read_manifest(stage / "checkpoints" / name)
    return names


def test_an_error_while_saving_leaves_the_earlier_ones_and_no_part(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=r"step-00000006 cannot be written \(.*No space left.*\); free space"):
        save(stage, 6)
    assert whole(stage) == ["step-00000002", "step-00000004"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write files beyond a size, which is how a full disk looks to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 3_000, 40_000], ids=["config.json", "safetensors", "training.pt"])
def test_a_full_disk_leaves_the_earlier_ones_and_no_part(stage: Path, size: int) -> None:
    """The limit falls into the first file, into the network's weights, and into the optimiser's state."""
    weights = stage / "checkpoints" / "step-00000004" / "network" / "diffusion_pytorch_model.safetensors"
    assert 3_000 < weights.stat().st_size < 40_000
    with largest_file(size), pytest.raises(StorageError, match="step-00000006 cannot be written"):
        save(stage, 6, padding=torch.zeros(20_000))
    assert whole(stage) == ["step-00000002", "step-00000004"]
    save(stage, 6, padding=torch.zeros(20_000))
    assert whole(stage) == ["step-00000002", "step-00000004", "step-00000006"]


class Killed(BaseException):
    """Stands for the process's end: nothing catches it."""


def test_a_process_that_dies_while_saving_leaves_no_checkpoint_that_counts(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    for place in ("torch.save", "ldbfr.training.checkpoint.write_manifest", "pathlib.Path.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(place, die)
            with pytest.raises(Killed):
                save(stage, 6)
        latest = latest_checkpoint(stage)
        assert latest is not None
        assert latest.name == "step-00000004"
        assert [folder.name for folder in checkpoint_folders(stage)] == ["step-00000004", "step-00000002"]
    save(stage, 6)  # the next attempt is not disturbed by what was left
    assert whole(stage) == ["step-00000002", "step-00000004", "step-00000006"]


def test_saving_the_same_step_again_replaces_the_checkpoint(stage: Path) -> None:
    save(stage, 4, note="again")
    assert whole(stage) == ["step-00000002", "step-00000004"]
    assert read_training(stage / "checkpoints" / "step-00000004")["note"] == "again"


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(StorageError, match=rf"{tmp_path}/checkpoints/step-00000001 cannot be written"):
        save(tmp_path, 1)


def test_pruning_keeps_the_newest(stage: Path) -> None:
    save(stage, 6)
    prune_checkpoints(stage, 2)
    assert whole(stage) == ["step-00000004", "step-00000006"]


def test_newest_means_the_highest_step_not_the_latest_written(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        save(tmp_path, step)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == [f"step-{step:08d}" for step in (100, 20, 3)]


def test_a_training_file_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"codebook": Codebook(2, 2)}, tmp_path / "training.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        read_training(tmp_path)
