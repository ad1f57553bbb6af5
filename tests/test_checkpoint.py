"""A checkpoint is whole or does not exist: cut, changed, half written, half uploaded, or in the way of a full disk."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldbfr import storage
from ldbfr.errors import ConfigError, StorageError, WeightsError
from ldbfr.models.vqgan import Codebook, PatchDiscriminator
from ldbfr.training import checkpoint as checkpoint_module
from ldbfr.training.checkpoint import CheckpointGoneError, CheckpointStore, read_state, read_training
from ldbfr.weights import read_manifest
from tests import tiny
from tests.faulty_proxy import FaultyProxy
from tests.prepared import largest_file

pytest_plugins = ["tests.faulty_proxy"]


def network(seed: int = 0) -> PatchDiscriminator:
    """The smallest network that is saved in diffusers' layout."""
    with tiny.seeded(seed):
        return PatchDiscriminator(8, 1)


def writer(step: int, **training: Any) -> Callable[[Path], None]:
    """Writes everything that a real checkpoint has."""
    content = {"ema_step": step, "optimizers": {"generator": {"state": tiny.normal(5, seed=step)}}, **training}

    def write(folder: Path) -> None:
        network(step).save_pretrained(folder / "network")
        network(step + 100).save_pretrained(folder / "ema")
        torch.save(content, folder / "training.pt")
        (folder / "state.json").write_text(json.dumps({"step": step, "stage": "prior"}))

    return write


def small(step: int) -> Callable[[Path], None]:
    """Writes a few bytes, where the content does not matter."""

    def write(folder: Path) -> None:
        (folder / "ema").mkdir()
        (folder / "ema" / "weights").write_bytes(bytes([step]) * 1000)
        (folder / "state.json").write_text(json.dumps({"step": step}))

    return write


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


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def stage_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """RUN/<stage>, where nothing is yet."""
    return str(request.getfixturevalue("s3_root") if request.param == "s3" else tmp_path / "run" / "prior")


@pytest.fixture
def store(stage_uri: str) -> Iterator[CheckpointStore]:
    with closing(CheckpointStore(stage_uri)) as store:
        yield store


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    for step in (2, 4):
        CheckpointStore(str(folder)).save(step, writer(step))
    return folder


@pytest.fixture
def stage(saved: Path, tmp_path: Path) -> CheckpointStore:
    """A stage with real checkpoints of steps 2 and 4 on a disk, to spoil."""
    return CheckpointStore(str(shutil.copytree(saved, tmp_path / "stage")))


def objects(uri: str) -> dict[str, bytes]:
    return {entry.key: storage.read_bytes(entry.uri) for entry in storage.list_objects(uri)}


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def newest(store: CheckpointStore) -> int | None:
    found = store.latest()
    return None if found is None else found[0]


def whole(store: CheckpointStore) -> list[str]:
    """Names of the local checkpoints, all of them valid, and nothing else beside them."""
    assert store.folder
    names = [path.name for path in sorted(store.folder.iterdir())]
    for name in names:
        read_manifest(store.folder / name)
    return names


# ---------------------------------------------------------------------------------------------------------- round trip


def test_a_checkpoint_comes_back_as_it_was_saved(store: CheckpointStore) -> None:
    uri = store.save(4, writer(4))
    assert uri == storage.join(store.uri, "step-00000004")
    found = store.latest()
    assert found is not None
    step, latest = found
    assert (step, latest.name) == (4, "step-00000004")
    assert read_state(latest) == {"step": 4, "stage": "prior"}
    training = read_training(latest)
    assert training["ema_step"] == 4
    assert torch.equal(training["optimizers"]["generator"]["state"], tiny.normal(5, seed=4))
    for part, seed in (("network", 4), ("ema", 104)):
        loaded = PatchDiscriminator.from_pretrained(latest / part, low_cpu_mem_usage=False)
        assert tiny.differing(tiny.snapshot(network(seed)), tiny.snapshot(loaded)) == []


def test_its_files_are_these_and_the_manifest_names_all_others(store: CheckpointStore) -> None:
    store.save(4, writer(4))
    uri = store.uri_of(4)
    assert set(objects(store.uri)) == {f"step-00000004/{file}" for file in FILES}
    assert set(json.loads(objects(uri)["manifest.json"])["files"]) == set(FILES) - {"manifest.json"}


@pytest.mark.s3
def test_a_disk_and_a_bucket_hold_the_same_bytes(tmp_path: Path, s3_root: str) -> None:
    local = CheckpointStore(str(tmp_path))
    local.save(7, writer(7))
    with closing(CheckpointStore(s3_root)) as remote:

        def copy(folder: Path) -> None:
            shutil.copytree(local.fetch(7), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))

        remote.save(7, copy)
        assert objects(remote.uri) == objects(local.uri)
        fetched = held(remote.fetch(7))
        assert {name: data for name, data in fetched.items() if name != "manifest.json"} == {
            name: data for name, data in held(local.fetch(7)).items() if name != "manifest.json"
        }
        assert read_manifest(remote.fetch(7))["files"] == read_manifest(local.fetch(7))["files"]


def test_steps_come_newest_first_by_number(store: CheckpointStore) -> None:
    assert store.steps() == []
    for step in (100, 20, 123_456_789, 3):
        store.save(step, small(step % 256))
    storage.write_bytes(storage.join(store.uri, "notes.txt"), b"")
    storage.write_bytes(storage.join(store.uri, "step-5/manifest.json"), b"")  # no name of ours
    assert store.steps() == [123_456_789, 100, 20, 3]


def test_saving_the_same_step_again_replaces_all_of_it(store: CheckpointStore) -> None:
    store.save(4, writer(4))
    store.save(4, small(9))
    assert set(objects(store.uri_of(4))) == {"ema/weights", "state.json", "manifest.json"}
    assert store.fetch(4).joinpath("ema/weights").read_bytes() == bytes([9]) * 1000


def test_a_stage_that_was_never_trained_has_none(store: CheckpointStore) -> None:
    assert store.latest() is None
    store.prune(1)
    with pytest.raises(WeightsError, match=r"there is no checkpoint .*step-00000008: it has no manifest\.json"):
        store.fetch(8)


def test_the_newest_that_is_whole_is_found_again_by_another_process(stage_uri: str) -> None:
    for step in (1, 2):
        with closing(CheckpointStore(stage_uri)) as store:
            assert newest(store) == (step - 1 or None)
            store.save(step, small(step))


# --------------------------------------------------------------------------------------------------- damage on a disk


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_with_a_file_cut_at_any_byte_is_passed_over(
    stage: CheckpointStore, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    path = Path(stage.uri_of(4)) / file
    data = path.read_bytes()
    sizes = {0, 1, len(data) // 2, len(data) - 1, *np.random.default_rng(0).integers(1, len(data), 8).tolist()}
    for size in sorted(sizes):
        path.write_bytes(data[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert newest(stage) == 2
        assert str(path) in caplog.text
    path.write_bytes(data)
    assert newest(stage) == 4


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_without_one_of_its_files_is_passed_over(
    stage: CheckpointStore, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    (Path(stage.uri_of(4)) / file).unlink()
    with caplog.at_level(logging.WARNING):
        assert newest(stage) == 2
    assert "step-00000004" in caplog.text
    assert file in caplog.text


@pytest.mark.parametrize("file", [file for file in FILES if file != "manifest.json"])
def test_a_checkpoint_with_a_changed_byte_is_passed_over(stage: CheckpointStore, file: str) -> None:
    path = Path(stage.uri_of(4)) / file
    tiny.flip_byte(path, path.stat().st_size // 3)
    with pytest.raises(WeightsError, match=rf"{path} was changed: its SHA-256 is not the manifest's"):
        stage.fetch(4)
    assert newest(stage) == 2


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"files": {}},
        {"files": []},
        {"files": {"state.json": {"size": "many", "sha256": ""}}},
        {"files": {"../../secret": {"size": 1, "sha256": ""}}},
        {"files": {"/etc/passwd": {"size": 1, "sha256": ""}}},
        [],
    ],
)
def test_a_manifest_that_is_none_is_named(stage: CheckpointStore, manifest: object) -> None:
    path = Path(stage.uri_of(4)) / "manifest.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=rf"{path} is damaged \(.*\); take an earlier checkpoint, or train again"):
        stage.fetch(4)
    assert newest(stage) == 2


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.EIO, WeightsError, r"training\.pt cannot be read .*the disk is damaged there"),
        (errno.EACCES, StorageError, r"cannot read .*training\.pt: Permission denied"),
    ],
)
def test_a_disk_that_is_damaged_spoils_one_checkpoint_and_a_lack_of_rights_all(
    stage: CheckpointStore, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception], text: str
) -> None:
    original = checkpoint_module.sha256_of

    def fail(path: Path) -> str:
        if path == Path(stage.uri_of(4)) / "training.pt":
            raise OSError(code, os.strerror(code))
        return original(path)

    monkeypatch.setattr(checkpoint_module, "sha256_of", fail)
    with pytest.raises(kind, match=text):
        stage.fetch(4)
    if kind is WeightsError:
        assert newest(stage) == 2
    else:
        with pytest.raises(kind, match=text):  # not: begin again at step 2
            stage.latest()


def test_where_all_checkpoints_are_damaged_there_is_none(stage: CheckpointStore) -> None:
    for step in (2, 4):
        (Path(stage.uri_of(step)) / "manifest.json").write_bytes(b"")
    assert stage.latest() is None


def test_a_training_file_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"codebook": Codebook(2, 2)}, tmp_path / "training.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        read_training(tmp_path)


# -------------------------------------------------------------------------------------- parts, and readers of old ones


def test_only_the_parts_asked_for_are_checked(stage: CheckpointStore) -> None:
    weights = Path(stage.uri_of(4)) / "network" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"")
    assert stage.fetch(4, ("ema",)) == Path(stage.uri_of(4))
    assert stage.fetch(4, ("ema", "state.json")) == Path(stage.uri_of(4))
    with pytest.raises(WeightsError, match=re.escape(str(weights))):
        stage.fetch(4, ("ema", "network"))
    assert (stage.latest(("ema",)) or (0,))[0] == 4
    assert newest(stage) == 2


def test_a_part_that_is_not_there_is_named(store: CheckpointStore) -> None:
    store.save(1, writer(1))
    for part in ("emma", "em", "ema/", "state"):
        with pytest.raises(WeightsError, match=rf"has no {part}, it holds ema, network, state\.json, training\.pt"):
            store.fetch(1, ("ema", part))


@pytest.mark.s3
def test_fetching_a_part_transfers_nothing_else(faulty_s3: FaultyProxy, s3_root: str, tmp_path: Path) -> None:
    with closing(CheckpointStore(s3_root, tmp_path / "scratch")) as store:
        store.save(3, writer(3))
        faulty_s3.requests.clear()
        folder = store.fetch(3, ("ema",))
        files = {"ema/config.json", "ema/diffusion_pytorch_model.safetensors"}
        read = {path.partition("step-00000003/")[2] for _, path in faulty_s3.requests if "list-type" not in path}
        assert read == files | {"manifest.json"}
        assert set(held(folder)) == files | {"manifest.json"}
        assert set(read_manifest(folder)["files"]) == files  # of what is here
        faulty_s3.requests.clear()
        assert store.fetch(3, ("ema",)) == folder
        assert not any("ema" in path for _, path in faulty_s3.requests)  # not fetched again
        tiny.flip_byte(folder / "ema" / "config.json", 3)
        assert store.fetch(3, ("ema",)) == folder
        read_manifest(folder)  # mended


@pytest.mark.s3
def test_what_was_fetched_goes_with_the_next_step_or_at_the_end(s3_root: str) -> None:
    store = CheckpointStore(s3_root)
    for step in (1, 2):
        store.save(step, small(step))
    one = store.fetch(1)
    part = store.fetch(1, ("ema",))
    two = store.fetch(2)
    assert not one.exists()
    assert part.exists()
    scratch = two.parent.parent
    store.close()
    assert not scratch.exists()
    again = store.fetch(2)  # it can be used on
    assert again.exists()
    store.close()
    assert not again.exists()


@pytest.mark.s3
def test_a_scratch_folder_that_was_given_stays(s3_root: str, tmp_path: Path) -> None:
    store = CheckpointStore(s3_root, tmp_path / "deep" / "scratch")
    store.save(1, small(1))
    assert held(tmp_path) == {}  # what was uploaded is not kept twice
    folder = store.fetch(1)
    store.close()
    assert folder.is_relative_to(tmp_path / "deep" / "scratch")
    assert CheckpointStore(s3_root, tmp_path / "deep" / "scratch").fetch(1) == folder


def test_a_reader_from_whom_checkpoints_are_taken_away_finds_the_newer_ones(
    store: CheckpointStore, stage_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While step 2 is read, a writer adds 3 and deletes what is older."""
    for step in (1, 2):
        store.save(step, small(step))
    with closing(CheckpointStore(stage_uri)) as reader:
        original, turns = checkpoint_module._check_file, iter([True])

        def check(*given: Any) -> None:
            if next(turns, False):
                store.save(3, small(3))
                store.prune(1)
            original(*given)

        monkeypatch.setattr(checkpoint_module, "_check_file", check)
        assert newest(reader) == 3


def test_a_checkpoint_that_vanishes_while_it_is_read_is_said_to_have(
    store: CheckpointStore, stage_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        store.save(step, small(step))
    with closing(CheckpointStore(stage_uri)) as reader:
        original = CheckpointStore._manifest

        def manifest(self: CheckpointStore, uri: str) -> dict[str, Any]:
            found = original(self, uri)
            store.prune(1)
            return found

        monkeypatch.setattr(CheckpointStore, "_manifest", manifest)
        with pytest.raises(
            CheckpointGoneError, match=r"step-00000001 was deleted while it was read .*take a newer one"
        ):
            reader.fetch(1)
        with pytest.raises(CheckpointGoneError, match=r"there is no checkpoint .*step-00000001"):
            reader.fetch(1)


# ------------------------------------------------------------------------------------------------------------- pruning


def test_pruning_keeps_the_newest_and_the_best(store: CheckpointStore) -> None:
    for step in range(1, 7):
        store.save(step, small(step))
    store.prune(2, best=3)
    assert store.steps() == [6, 5, 3]
    store.prune(2, best=6)
    assert store.steps() == [6, 5]
    store.prune(1, best=77)  # of which there is none
    assert store.steps() == [6]
    assert {key.split("/")[0] for key in objects(store.uri)} == {"step-00000006"}
    with pytest.raises(ConfigError, match="0 checkpoints to keep, expected at least 1"):
        store.prune(0)


def test_pruning_clears_what_was_left_of_older_ones_only(store: CheckpointStore) -> None:
    for step in (2, 4):
        store.save(step, small(step))
    for step in (1, 3, 5):
        storage.write_bytes(storage.join(store.uri_of(step), "ema/weights"), b"half")
    storage.write_bytes(storage.join(store.uri, "notes.txt"), b"mine")
    store.prune(2)
    assert {key.split("/")[0] for key in objects(store.uri)} == {
        *("notes.txt", "step-00000002", "step-00000004", "step-00000005")
    }
    if store.folder:
        assert not (store.folder / "step-00000003").exists()


def test_the_manifest_goes_first(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning that is stopped at any point leaves no checkpoint that is half there."""
    for step in (1, 2):
        store.save(step, small(step))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        original, turns = storage.delete, iter([True])
        patch.setattr(storage, "delete", lambda uri: original(uri) if next(turns, False) else stop())
        with pytest.raises(KeyboardInterrupt):
            store.prune(1)
    assert store.steps() == [2]
    assert any(key.startswith("step-00000001") for key in objects(store.uri))
    store.prune(1)
    assert not any(key.startswith("step-00000001") for key in objects(store.uri))


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(store: CheckpointStore) -> None:
    """Step 4 is damaged, so the run went on from 2; then 3 is the newest that is any good."""
    for step in (2, 4):
        store.save(step, small(step))
    storage.write_bytes(storage.join(store.uri_of(4), "ema/weights"), b"cut")
    assert newest(store) == 2
    store.save(3, small(3))
    store.prune(1)
    assert newest(store) == 3
    store.save(4, small(4))
    store.prune(1)
    assert newest(store) == 4
    assert store.steps() == [4]


# ----------------------------------------------------------------------------------------- saving that comes to grief


def test_an_error_while_saving_leaves_the_earlier_ones_and_no_part(
    stage: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=r"step-00000006 cannot be written \(.*No space left.*\); free space"):
        stage.save(6, writer(6))
    assert whole(stage) == ["step-00000002", "step-00000004"]


def test_an_error_of_another_kind_comes_out_as_it_is(store: CheckpointStore) -> None:
    def wrong(folder: Path) -> None:
        (folder / "half").write_bytes(b"")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.save(1, wrong)
    assert list(storage.list_objects(store.uri)) == []


@pytest.mark.parametrize("size", [100, 3_000, 40_000], ids=["config.json", "safetensors", "training.pt"])
def test_a_full_disk_leaves_the_earlier_ones_and_no_part(stage: CheckpointStore, size: int) -> None:
    """The limit falls into the first file, into the network's weights, and into the optimiser's state."""
    weights = Path(stage.uri_of(4)) / "network" / "diffusion_pytorch_model.safetensors"
    assert 3_000 < weights.stat().st_size < 40_000
    write = writer(6, padding=torch.zeros(20_000))
    with largest_file(size), pytest.raises(StorageError, match="step-00000006 cannot be written"):
        stage.save(6, write)
    assert whole(stage) == ["step-00000002", "step-00000004"]
    stage.save(6, write)
    assert whole(stage) == ["step-00000002", "step-00000004", "step-00000006"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; the test is skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_the_newest_that_fitted(tiny_disk: Path) -> None:
    store = CheckpointStore(str(tiny_disk))

    def fill() -> None:
        for step in range(1, 50):
            store.save(step, writer(step))

    with pytest.raises(StorageError, match=r"cannot be written \(.*\); free space or choose --run"):
        fill()
    last = newest(store)
    assert last is not None
    assert whole(store) == [f"step-{number:08d}" for number in range(1, last + 1)]
    store.prune(1)
    store.save(last + 1, writer(last + 1))
    assert newest(store) == last + 1


@pytest.mark.s3
def test_a_scratch_disk_that_is_full_is_named(tiny_disk: Path, s3_root: str) -> None:
    with closing(CheckpointStore(s3_root)) as store:
        store.save(1, writer(1, padding=torch.zeros(100_000)))
    cramped = CheckpointStore(s3_root, tiny_disk)
    with pytest.raises(
        StorageError, match=rf"cannot write {tiny_disk}/all/step-00000001/training\.pt: the disk is full"
    ):
        cramped.fetch(1)
    with pytest.raises(StorageError, match=r"step-00000002 cannot be written .*free space"):
        cramped.save(2, writer(2, padding=torch.zeros(100_000)))
    assert cramped.steps() == [1]


KILLED = """
import sys, time
from pathlib import Path
from ldbfr import storage
from ldbfr.training import checkpoint

stage, place = sys.argv[1:]

def stop(*_, **__):
    print("here", flush=True)
    time.sleep(600)

def write(folder):
    (folder / "one").write_bytes(b"1" * 1000)

store = checkpoint.CheckpointStore(stage)
store.save(2, write)
if place == "move":
    Path.rename = stop
else:
    put = storage.put_file
    storage.put_file = lambda source, uri: stop() if uri.endswith("manifest.json") else put(source, uri)
store.save(4, write)
"""


@pytest.mark.parametrize(("place", "where"), [("move", "local"), ("upload", "s3")])
def test_a_process_that_is_killed_while_saving_leaves_no_checkpoint_that_counts(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, where: str
) -> None:
    stage_uri = str(request.getfixturevalue("s3_root") if where == "s3" else tmp_path / "stage")
    command = [sys.executable, "-c", KILLED, stage_uri, place]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)
    with closing(CheckpointStore(stage_uri)) as store:
        with caplog.at_level(logging.WARNING):
            assert newest(store) == 2
        if place == "upload":  # its files are there
            assert "step-00000004 has no manifest.json: unfinished" in caplog.text
        store.save(4, small(4))  # the next attempt is not disturbed by what was left
        store.save(6, small(6))
        store.prune(2)
        assert store.steps() == [6, 4]
        assert {key.split("/")[0] for key in objects(store.uri)} == {"step-00000004", "step-00000006"}
        if store.folder:
            assert whole(store) == ["step-00000004", "step-00000006"]


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    store = CheckpointStore(str(tmp_path))
    with pytest.raises(StorageError, match=rf"{tmp_path}/checkpoints/step-00000001 cannot be written"):
        store.save(1, small(1))
    with pytest.raises(StorageError, match=rf"cannot list {tmp_path}/checkpoints: Not a directory"):
        store.steps()


# ---------------------------------------------------------------------------------------------------- S3 that stumbles


@pytest.fixture
def remote(faulty_s3: FaultyProxy, s3_root: str) -> Iterator[CheckpointStore]:
    """A store in a bucket, behind the proxy, with a real checkpoint of step 2."""
    with closing(CheckpointStore(s3_root)) as store:
        store.save(2, writer(2))
        yield store


@pytest.mark.s3
def test_server_errors_and_cut_connections_are_survived(faulty_s3: FaultyProxy, remote: CheckpointStore) -> None:
    faults = [
        faulty_s3.fail(2, method="PUT", path="training.pt"),
        faulty_s3.cut_upload(500, times=2, path="network/"),
        faulty_s3.lose_answers(1, method="PUT", path="manifest.json"),
        faulty_s3.fail(1, method="GET", path="manifest.json", status=503),
        faulty_s3.cut_download(500, times=2, path="ema/"),
    ]
    remote.save(4, writer(4))
    found = remote.latest()
    assert found is not None
    assert found[0] == 4
    assert [fault.hits for fault in faults] == [fault.times for fault in faults]
    assert read_training(found[1])["ema_step"] == 4
    PatchDiscriminator.from_pretrained(found[1] / "network", low_cpu_mem_usage=False)


@pytest.mark.s3
@pytest.mark.parametrize("file", ["network/config.json", "training.pt", "manifest.json"])
@pytest.mark.parametrize("action", ["fail", "refuse", "cut_upload"])
def test_an_upload_that_fails_for_good_is_an_error_and_no_checkpoint(
    faulty_s3: FaultyProxy, remote: CheckpointStore, file: str, action: str
) -> None:
    given: dict[str, Any] = {"after": 50} if action == "cut_upload" else {}
    getattr(faulty_s3, action)(**given, method="PUT", path=f"step-00000004/{file}")
    with pytest.raises(StorageError) as failed:
        remote.save(4, writer(4))
    assert re.search(
        rf"checkpoint s3:.*step-00000004 cannot be written \(cannot write s3:.*/{file}: ", str(failed.value)
    )
    assert "the ones before are untouched" in str(failed.value)
    assert newest(remote) == 2
    faulty_s3.clear()
    remote.save(4, writer(4))
    assert newest(remote) == 4


@pytest.mark.s3
def test_an_upload_over_a_checkpoint_that_fails_leaves_none_of_that_step(
    faulty_s3: FaultyProxy, remote: CheckpointStore
) -> None:
    """A stale manifest beside new files would be a lie."""
    remote.save(4, writer(4))
    faulty_s3.fail(method="PUT", path="step-00000004/training.pt")
    with pytest.raises(StorageError):
        remote.save(4, writer(5))
    assert remote.steps() == [2]
    assert newest(remote) == 2


@pytest.mark.s3
def test_a_full_bucket_is_an_error_that_says_what_to_do(faulty_s3: FaultyProxy, remote: CheckpointStore) -> None:
    faulty_s3.fail(method="PUT", status=507)
    with pytest.raises(StorageError, match=r"507.*mend this, and the same command goes on from the newest of them"):
        remote.save(4, writer(4))


@pytest.mark.s3
def test_a_server_that_answers_nothing_is_an_error(faulty_s3: FaultyProxy, remote: CheckpointStore) -> None:
    faulty_s3.hang()
    with storage.impatient(0.3):
        with pytest.raises(StorageError, match="cannot be reached"):
            remote.save(4, writer(4))
        with pytest.raises(StorageError, match="cannot be reached"):
            remote.latest()  # and not: there is none


@pytest.mark.s3
def test_a_download_that_breaks_off_for_good_is_no_damage(faulty_s3: FaultyProxy, remote: CheckpointStore) -> None:
    """To go on from an older checkpoint, or from none, because the network is bad would lose work."""
    for fault in (
        lambda: faulty_s3.cut_download(100, path="training.pt"),
        lambda: faulty_s3.fail(method="GET", path="training.pt"),
        lambda: faulty_s3.fail(method="GET", path="training.pt", status=403),
        lambda: faulty_s3.fail(method="GET", path="list-type", status=403),
    ):
        fault()
        with pytest.raises(StorageError, match="s3://"):
            remote.latest()
        faulty_s3.clear()
    assert newest(remote) == 2


@pytest.mark.s3
@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no manifest", "cut manifest"])
def test_a_damaged_one_in_a_bucket_is_passed_over(
    remote: CheckpointStore, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    remote.save(4, writer(4))
    name = "manifest.json" if "manifest" in damage else "ema/diffusion_pytorch_model.safetensors"
    uri = storage.join(remote.uri_of(4), name)
    data = storage.read_bytes(uri)
    if damage in ("missing", "no manifest"):
        storage.delete(uri)
    else:
        storage.write_bytes(uri, data[:-1] + (b"?" if damage == "changed" else b""))
    with caplog.at_level(logging.WARNING):
        assert newest(remote) == 2
    assert remote.uri_of(4) in caplog.text
    assert name in caplog.text


@pytest.mark.s3
def test_a_file_that_was_cut_short_is_noticed_before_anything_is_fetched(
    faulty_s3: FaultyProxy, remote: CheckpointStore
) -> None:
    storage.write_bytes(storage.join(remote.uri_of(2), "training.pt"), b"cut")
    faulty_s3.requests.clear()
    with pytest.raises(WeightsError, match=r"s3:.*training\.pt has 3 bytes instead of \d+"):
        remote.fetch(2)
    assert not any("network" in path or "ema" in path for _, path in faulty_s3.requests)
