"""Training on storage that fails: data and run in a bucket behind a faulty proxy, shards that vanish, a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldbfr import storage
from ldbfr.data.latents import LatentWriter
from ldbfr.data.shards import open_faces
from ldbfr.errors import LDBFRError, StorageError, WeightsError
from ldbfr.models.loading import load_network
from ldbfr.training.checkpoint import CheckpointStore, latest_checkpoint, read_state
from ldbfr.training.latents import LatentsInMemory
from ldbfr.training.run import done_steps, finished, load_stage_network, train_run
from ldbfr.training.scores import read_validations
from ldbfr.training.validation import validate_checkpoint
from tests import tiny
from tests.faulty_proxy import FaultyProxy
from tests.prepared import write_set
from tests.tiny import SIDE, Worker

pytest_plugins = ["tests.faulty_proxy"]

STAGES = ["latent_vqgan", "prior"]


def weights(run: str, stage: str) -> dict[str, torch.Tensor]:
    store = CheckpointStore(storage.join(run, stage))
    try:
        found = store.latest()
        assert found is not None
        assert found[0] == 4
        network = load_network(tiny.new_stage(stage).network_class, found[1] / "network")
        return tiny.snapshot(network)
    finally:
        store.close()


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    """A run on local shards."""
    write_set(str(tmp_path / "data"), {"train": 9, "val": 3}, SIDE)
    faces = open_faces([str(tmp_path / "data")], SIDE)
    assert train_run(tiny.preset(), STAGES, faces, faces, tmp_path / "local", Worker())
    return tmp_path / "local"


@pytest.mark.s3
def test_a_run_in_a_bucket_behind_a_faulty_network_ends_as_on_a_disk(
    faulty_s3: FaultyProxy, s3_root: str, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path / "cache"))
    write_set(f"{s3_root}/data", {"train": 9, "val": 3}, SIDE)
    faces = open_faces([f"{s3_root}/data"], SIDE)
    faults = [
        faulty_s3.fail(times=3, method="PUT", path="checkpoints"),
        faulty_s3.cut_upload(1000, times=2, path="safetensors"),
        faulty_s3.lose_answers(times=2, method="PUT", path="manifest.json"),
        faulty_s3.cut_download(500, times=2, path="shards/"),
        faulty_s3.fail(times=2, method="GET", path="shards/", status=503),
    ]
    run = f"{s3_root}/run"
    assert not train_run(tiny.preset(), STAGES, faces, faces, run, Worker(stop_after=2))
    faults.append(faulty_s3.cut_download(1000, times=2, path="safetensors"))
    assert train_run(tiny.preset(), STAGES, faces, faces, run, Worker())
    assert [fault.hits for fault in faults] == [fault.times for fault in faults]
    for stage in STAGES:
        assert tiny.differing(weights(str(undisturbed), stage), weights(run, stage)) == []
        assert finished(run, stage, tiny.preset())


@pytest.mark.s3
def test_a_checkpoint_in_a_bucket_is_validated_and_the_log_is_there(
    s3_root: str,
) -> None:
    faces, run = tiny.face_images(), f"{s3_root}/run"
    assert train_run(tiny.preset(), ["latent_vqgan"], faces, faces, run, Worker())
    metrics = validate_checkpoint(tiny.preset(), "latent_vqgan", run, 4, faces, torch.device("cpu"))
    assert metrics is not None
    assert read_validations(f"{run}/latent_vqgan") == {4: metrics}
    keys = [item.key for item in storage.list_objects(f"{run}/latent_vqgan")]
    parts = ("validation/step-00000004.png", "images/step-00000004.png", "tensorboard/events", "tensorboard/validation")
    for part in parts:
        assert any(key.startswith(part) for key in keys), (part, keys)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("status", "text"), [(403, "access denied"), (507, "cannot be written"), (500, "cannot be written")]
)
def test_a_bucket_that_takes_no_checkpoint_ends_the_training_with_the_one_before(
    faulty_s3: FaultyProxy, s3_root: str, status: int, text: str
) -> None:
    faces, run = tiny.face_images(), f"{s3_root}/run"
    assert not train_run(tiny.preset(), ["latent_vqgan"], faces, faces, run, Worker(stop_after=2))
    faulty_s3.fail(method="PUT", path="step-00000004", status=status)
    with pytest.raises(StorageError, match=text):
        train_run(tiny.preset(), ["latent_vqgan"], faces, faces, run, Worker())
    faulty_s3.clear()
    assert done_steps(run, "latent_vqgan") == 2
    assert train_run(tiny.preset(), ["latent_vqgan"], faces, faces, run, Worker())


@pytest.mark.s3
def test_a_bucket_without_credentials_or_that_refuses_is_said_at_once(
    faulty_s3: FaultyProxy, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces = tiny.face_images()
    faulty_s3.refuse()
    with pytest.raises(StorageError, match="cannot be reached"):
        train_run(tiny.preset(), ["latent_vqgan"], faces, faces, f"{s3_root}/run", Worker())
    faulty_s3.clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    storage._s3_client.cache_clear()
    try:
        with pytest.raises(StorageError, match="no credentials"):
            train_run(tiny.preset(), ["latent_vqgan"], faces, faces, f"{s3_root}/run", Worker())
    finally:
        storage._s3_client.cache_clear()


def test_shards_that_vanish_end_the_training_with_the_last_checkpoint_good(tmp_path: Path) -> None:
    write_set(str(tmp_path / "data"), {"train": 9}, SIDE)
    faces = open_faces([str(tmp_path / "data")], SIDE)
    preset = tiny.preset("training.latent_vqgan.steps=6")

    class TakesShards(Worker):
        def saved(self, step: int) -> None:
            super().saved(step)
            for shard in (tmp_path / "data" / "shards").iterdir():
                shard.rename(tmp_path / shard.name)

    with pytest.raises(LDBFRError, match=r"shard-0.*"):
        train_run(preset, ["latent_vqgan"], faces, faces, tmp_path / "run", TakesShards())
    checkpoint = latest_checkpoint(tmp_path / "run" / "latent_vqgan")
    assert checkpoint is not None
    for shard in tmp_path.glob("shard-*.tar"):
        shard.rename(tmp_path / "data" / "shards" / shard.name)
    assert train_run(preset, ["latent_vqgan"], faces, faces, tmp_path / "run", Worker())


def test_a_full_disk_while_saving_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = tiny.face_images()
    assert not train_run(tiny.preset(), ["latent_vqgan"], faces, faces, tmp_path, Worker(stop_after=2))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(StorageError, match=r"step-00000004 cannot be written .*No space left.*free space"):
            train_run(tiny.preset(), ["latent_vqgan"], faces, faces, tmp_path, Worker())
    assert done_steps(tmp_path, "latent_vqgan") == 2
    assert [path.name for path in (tmp_path / "latent_vqgan" / "checkpoints").iterdir()] == ["step-00000002"]
    assert train_run(tiny.preset(), ["latent_vqgan"], faces, faces, tmp_path, Worker())


def test_a_preemption_notice_saves_a_checkpoint_and_training_goes_on(tmp_path: Path) -> None:
    faces, worker = tiny.face_images(), Worker(save_after=1)
    assert train_run(tiny.preset(), ["latent_vqgan"], faces, faces, tmp_path, worker)
    assert worker.checkpoints == [1, 2, 4]
    assert worker.closed


def test_prepared_latents_are_used_when_they_are_of_the_very_network(tmp_path: Path) -> None:
    """The losses with prepared latents are those with latents encoded on the way."""
    root = str(tmp_path / "data")
    write_set(root, {"train": 9}, SIDE)
    faces = open_faces([root], SIDE)
    preset = tiny.preset("training.prior.cache_latents=false")
    first = Worker()
    assert train_run(preset, STAGES, faces, faces, tmp_path / "run", Worker())
    network: Any
    network, digest = load_stage_network(tmp_path / "run", "latent_vqgan", preset)
    values = LatentsInMemory.encode(network, faces, torch.device("cpu")).values  # (2, N, c, h, w)
    writer = LatentWriter(root, "train", digest, faces.digest)
    writer.finish([writer.write_part(0, 0, np.ascontiguousarray(values.swapaxes(0, 1)))])
    prepared = open_faces([root], SIDE)
    assert prepared.latents(digest) is not None
    assert prepared.latents("0" * 64) is None

    for name, data, worker in (("without", faces, first), ("with", prepared, Worker())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latent_vqgan").symlink_to(tmp_path / "run" / "latent_vqgan")
        assert train_run(preset, ["prior"], data, data, tmp_path / name, worker)
        if name == "with":
            assert [report["loss"] for report in worker.reports] == pytest.approx(
                [report["loss"] for report in first.reports], rel=1e-4
            )


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    faces = tiny.face_images()
    train_run(tiny.preset(), ["latent_vqgan"], faces, faces, tmp_path, Worker(stop_after=2))
    other = tiny.face_images(seed=5)
    with pytest.raises(WeightsError, match=r"upstream data: .* there, .* now"):
        train_run(tiny.preset(), ["latent_vqgan"], other, other, tmp_path, Worker())


def test_the_writer_s_copies_do_not_grow_with_the_number_of_checkpoints(tmp_path: Path) -> None:
    trainer = tiny.new_trainer(tmp_path, "prior", "training.prior.steps=12", "training.prior.checkpoint_every=1")
    trainer.train()
    assert set(trainer.host.copies) == {"network", "ema"}
    assert read_state(Path(trainer.store.uri_of(12)))["step"] == 12
