"""Any number of workers is one worker: real processes, real all-reduces (Gloo), every stage."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ldbfr.images import encode_image
from ldbfr.training.checkpoint import checkpoint_folders
from ldbfr.training.run import finished
from ldbfr.training.stages import STAGE_NAMES
from tests import tiny
from tests.conftest import REPOSITORY
from tests.distributed_run import OVERRIDES

WORLD_SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """All stages trained by one, two and three workers; three share a batch of four unevenly."""
    folders = {}
    for size in WORLD_SIZES:
        folders[size] = tmp_path_factory.mktemp(f"workers-{size}")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = [sys.executable, "-m", "tests.distributed_run", str(folders[size])]
        workers = [
            subprocess.Popen(
                [*command, str(rank), str(size), str(port), *STAGE_NAMES],
                cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip
        for worker in workers:
            _, error = worker.communicate(timeout=200)
            assert worker.returncode == 0, error
    return folders


def history(folder: Path, name: str, rank: int = 0) -> list[dict[str, float]]:
    losses: list[dict[str, float]] = json.loads((folder / f"{name}-{rank}.json").read_text())
    return losses


def weights(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("size", WORLD_SIZES[1:])
@pytest.mark.parametrize("name", STAGE_NAMES)
def test_the_losses_of_every_step_are_those_of_one_worker(runs: dict[int, Path], name: str, size: int) -> None:
    alone, together = history(runs[1], name), history(runs[size], name)
    assert len(alone) == len(together) == 4
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("size", WORLD_SIZES[1:])
@pytest.mark.parametrize("name", STAGE_NAMES)
def test_all_workers_end_with_the_same_weights_bit_for_bit(runs: dict[int, Path], name: str, size: int) -> None:
    first = weights(runs[size], name)
    for rank in range(1, size):
        other = weights(runs[size], name, rank)
        assert all(torch.equal(first[key], other[key]) for key in first)
        assert history(runs[size], name, rank) == history(runs[size], name)


@pytest.mark.parametrize("size", WORLD_SIZES[1:])
@pytest.mark.parametrize("name", STAGE_NAMES)
def test_the_final_weights_are_those_of_one_worker(runs: dict[int, Path], name: str, size: int) -> None:
    """To 1e-5, but for the few whose gradient vanishes: there Adam's step is the sign of the rounding."""
    alone, together = weights(runs[1], name), weights(runs[size], name)
    start = tiny.new_stage(name, *OVERRIDES.get(name, ())).network.state_dict()
    apart = torch.cat([(alone[key] - together[key]).flatten() for key in alone])
    moved = torch.cat([(alone[key] - start[key]).flatten() for key in alone])
    assert (apart.abs() > 1e-5).float().mean() < 5e-3
    assert apart.norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_one_worker_alone_writes_the_checkpoints(runs: dict[int, Path], name: str) -> None:
    for folder in runs.values():
        assert [path.name for path in checkpoint_folders(folder / name)] == ["step-00000004", "step-00000002"]


def test_torchrun_trains_all_five_stages_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    for number, face in enumerate(tiny.blob_faces(6)):
        (tmp_path / "faces" / f"{number}.png").write_bytes(encode_image(face, "png"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "--", "ldbfr.cli", "train", "--preset", "tiny", "--device", "cpu", "--threads", "1"]
    places = ["--data", str(tmp_path / "faces"), "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [*torchrun, *train, *places], cwd=REPOSITORY, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(finished(tmp_path / "run", name, tiny.preset()) for name in STAGE_NAMES)
