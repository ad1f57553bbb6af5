"""Trackers: what is noted arrives, as the libraries' own readers read it; nothing stops the training or holds it up."""

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldbfr import storage
from ldbfr.errors import ConfigError
from ldbfr.images import decode_image
from ldbfr.training import trackers, tracking_services
from ldbfr.training.progress import StageLog
from ldbfr.training.trackers import Background, PictureFiles, TensorBoardTracker, Tracker, make_trackers
from ldbfr.training.tracking_services import MLflowTracker, WandbTracker, run_id
from tests import tiny

SETTINGS = {"side": 32, "training": {"seed": 0, "prior": {"steps": 4}}}
NOBODY = "http://127.0.0.1:9"
"""Where nothing listens."""


def picture(seed: int = 0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)


def events_of(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return accumulator.Reload()


def scalars_of(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_of(folder).Scalars(name)]


def fetched(uri: str, target: Path) -> Path:
    for entry in storage.list_objects(uri):
        storage.fetch_file(entry.uri, target / entry.key)
    return target


class Memory:
    """A tracker that keeps what it is told, and whose server can be switched off or made to hang."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.down, self.answers = False, threading.Event()
        self.answers.set()

    def _note(self, *call: Any) -> None:
        self.answers.wait()
        if self.down:
            raise ConnectionRefusedError("nobody there")
        self.calls.append(call)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._note("scalars", step, values)

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._note("image", name, step, pixels)

    def flush(self) -> None:
        self._note("flush")

    def close(self) -> None:
        self._note("close")


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --------------------------------------------------------------------------------------------------------- background


def test_a_thread_of_its_own_delivers_everything_in_order() -> None:
    memory = Memory()
    tracker = Background("memory", memory)
    for step in range(100):
        tracker.scalars(step, {"loss": step / 2})
    tracker.image("faces", 100, picture())
    tracker.flush()
    tracker.close()
    tracker.close()
    assert [call[:2] for call in memory.calls[:100]] == [("scalars", step) for step in range(100)]
    assert [call[0] for call in memory.calls[100:]] == ["image", "flush", "close"]
    assert tracker.num_lost == 0


def test_values_are_those_of_the_call_whatever_happens_to_the_dictionary_later() -> None:
    memory = Memory()
    memory.answers.clear()
    tracker, values = Background("memory", memory), {"loss": 1.0}
    tracker.scalars(1, values)
    values["loss"] = 2.0
    memory.answers.set()
    tracker.close()
    assert memory.calls[0] == ("scalars", 1, {"loss": 1.0})


def test_a_server_that_hangs_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    memory.answers.clear()
    tracker = Background("memory", memory, close_seconds=0.2)
    started = time.monotonic()
    for step in range(trackers.MAX_WAITING + 100):
        tracker.scalars(step, {"loss": 0.0})
    assert time.monotonic() - started < 2
    tracker.close()
    assert time.monotonic() - started < 4
    assert "memory lacks some of what was noted" in caplog.text
    assert tracker.num_lost >= 99  # the oldest made room; one may be under way
    memory.answers.set()


def test_an_outage_gives_one_warning_and_what_was_noted_arrives_after_it(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    memory.down = True
    tracker = Background("memory", memory, retry_seconds=0.02)
    with caplog.at_level(logging.INFO):
        for step in range(3):
            tracker.scalars(step, {"loss": 0.0})
        wait_until(lambda: tracker.failing)
        memory.down = False
        tracker.close()
    assert [call[1] for call in memory.calls[:-1]] == [0, 1, 2]
    (warning,) = warnings_in(caplog)
    assert "memory does not take what is noted (ConnectionRefusedError: nobody there)" in warning
    assert "Training goes on" in warning
    assert "memory works again" in caplog.text


def test_a_call_that_never_works_does_not_bar_the_way_for_ever() -> None:
    class Picky(Memory):
        def image(self, name: str, step: int, pixels: np.ndarray) -> None:
            raise ValueError("no pictures here")

    memory = Picky()
    tracker = Background("picky", memory, retry_seconds=0.01)
    tracker.image("faces", 1, picture())
    tracker.scalars(2, {"loss": 0.0})
    wait_until(lambda: bool(memory.calls))
    tracker.close()
    assert memory.calls == [("scalars", 2, {"loss": 0.0}), ("close",)]
    assert tracker.num_lost == 1


def test_a_server_that_stays_down_gives_one_warning_and_no_delay(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    memory.down = True
    tracker = Background("memory", memory)
    for step in range(10):
        tracker.scalars(step, {"loss": 0.0})
    wait_until(lambda: tracker.failing)
    started = time.monotonic()
    tracker.close()
    assert time.monotonic() - started < 2
    assert len(warnings_in(caplog)) == 1
    assert tracker.num_lost == 10


# ------------------------------------------------------------------------------------------------------------ choosing


def test_tensorboard_is_always_there(tmp_path: Path) -> None:
    for names in ([], ["tensorboard"]):
        (tracker,) = make_trackers(names, str(tmp_path), "run", SETTINGS, 0)
        tracker.scalars(1, {"loss": 0.5})
        tracker.close()
    assert scalars_of(tmp_path / "tensorboard", "loss") == [(1, 0.5)]


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tracker 'clearml': give some of tensorboard, mlflow, wandb"):
        make_trackers(["clearml"], str(tmp_path), "run", {}, 0)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ConfigError, match=rf"tracker {name} is not installed .*pip install 'ldbfr\[{name}\]'"):
        make_trackers([name], str(tmp_path), "run", {}, 0)


def test_a_run_s_id_follows_from_the_absolute_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = {run_id("runs/a/prior"), run_id(str(tmp_path / "runs/a/prior")), run_id(f"file://{tmp_path}/runs/a/prior")}
    assert len(ids) == 1
    assert len({*ids, run_id("runs/a/enhancer"), run_id("runs/b/prior"), run_id("s3://b/runs/a/prior")}) == 4
    assert run_id("s3://b/a/prior/") == run_id("s3://b/a/prior")


# --------------------------------------------------------------------------------------------------------- tensorboard


def test_tensorboard_has_the_values_the_picture_and_the_settings(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(str(tmp_path), 0, SETTINGS)
    for step in (1, 2, 3):
        tracker.scalars(step, {"prior/loss": 1 / step, "prior/lr": 0.5})
    tracker.image("prior/faces", 3, picture())
    tracker.close()
    assert scalars_of(tmp_path, "prior/loss") == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]
    (event,) = events_of(tmp_path).Images("prior/faces")
    assert event.step == 3
    shown = decode_image(event.encoded_image_string, name="event")
    assert np.array_equal(shown, picture())
    (text,) = events_of(tmp_path).Tensors("settings/text_summary")
    assert "| training.prior.steps | 4 |" in text.tensor_proto.string_val[0].decode()


def test_a_resumed_run_replaces_what_came_after_the_checkpoint_and_keeps_the_checkpoint_s_own_step(
    tmp_path: Path,
) -> None:
    first = TensorBoardTracker(str(tmp_path), 0)
    for step in (1, 2, 3, 4):
        first.scalars(step, {"loss": float(step)})
    first.close()
    time.sleep(1.1)  # event files are told apart, and ordered, by their second
    second = TensorBoardTracker(str(tmp_path), 2)
    for step in (3, 5):
        second.scalars(step, {"loss": -float(step)})
    second.close()
    assert scalars_of(tmp_path, "loss") == [(1, 1), (2, 2), (3, -3), (5, -5)]


@pytest.mark.s3
def test_a_bucket_gets_the_event_files_at_every_flush_and_old_ones_stay(s3_root: str, tmp_path: Path) -> None:
    first = TensorBoardTracker(f"{s3_root}/prior/tensorboard", 0)
    first.scalars(1, {"loss": 1.0})
    first.flush()
    assert scalars_of(fetched(s3_root, tmp_path / "a") / "prior/tensorboard", "loss") == [(1, 1)]
    first.scalars(2, {"loss": 2.0})
    first.image("faces", 2, picture())
    first.flush()  # and then the machine is lost
    seen = fetched(s3_root, tmp_path / "b") / "prior/tensorboard"
    assert scalars_of(seen, "loss") == [(1, 1), (2, 2)]
    assert len(events_of(seen).Images("faces")) == 1

    time.sleep(1.1)
    second = TensorBoardTracker(f"{s3_root}/prior/tensorboard", 1)
    second.scalars(3, {"loss": 3.0})
    second.close()
    seen = fetched(s3_root, tmp_path / "c") / "prior/tensorboard"
    assert len(list(seen.iterdir())) == 2
    assert scalars_of(seen, "loss") == [(1, 1), (3, 3)]
    first.close()


@pytest.mark.s3
def test_a_long_event_file_is_left_for_a_new_one_in_the_bucket(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "ROTATE_BYTES", 20_000)
    tracker = TensorBoardTracker(f"{s3_root}/tb", 0)
    for step in range(1, 5):
        tracker.scalars(step, {"loss": float(step)})
        tracker.image("faces", step, picture(step, 64))  # some 12 kB
        tracker.flush()
    assert len(list(tracker._folder.iterdir())) == 0  # sent, and gone from here
    tracker.close()
    seen = fetched(s3_root, tmp_path) / "tb"
    assert len(list(seen.iterdir())) == 2
    assert scalars_of(seen, "loss") == [(step, step) for step in range(1, 5)]
    assert len(events_of(seen).Images("faces")) == 4
    assert not tracker._folder.exists()


@pytest.mark.s3
def test_a_bucket_that_refuses_loses_nothing_once_it_is_back(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put = trackers.put_file
    refuse = True

    def put_file(source: Path, uri: str) -> None:
        put(source, "s3://no-such-bucket-of-ours/x" if refuse else uri)

    monkeypatch.setattr(trackers, "put_file", put_file)
    tracker = Background("tensorboard", TensorBoardTracker(f"{s3_root}/tb", 0), retry_seconds=0.05)
    tracker.scalars(1, {"loss": 1.0})
    tracker.flush()
    wait_until(lambda: tracker.failing)
    refuse = False
    tracker.close()
    assert "there is no such bucket" in caplog.text
    assert scalars_of(fetched(f"{s3_root}/tb", tmp_path), "loss") == [(1, 1)]


def test_a_folder_that_cannot_be_written_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "tb"
    blocked.write_text("a file where the folder should be")
    tracker = Background("tensorboard", TensorBoardTracker(str(blocked), 0), retry_seconds=0.05)
    tracker.scalars(1, {"loss": 1.0})
    wait_until(lambda: tracker.failing)
    blocked.unlink()
    tracker.close()
    assert scalars_of(blocked, "loss") == [(1, 1)]
    assert len(warnings_in(caplog)) == 1


# -------------------------------------------------------------------------------------------------------------- mlflow


@pytest.fixture(params=["file", "sqlite"])
def mlflow_client(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    if request.param == "sqlite":
        pytest.importorskip("sqlalchemy", reason="MLflow's database store needs sqlalchemy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"sqlite:///{tmp_path}/store.db" if request.param == "sqlite" else f"file://{tmp_path}/store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return mlflow.MlflowClient()


def mlflow_runs(client: Any, experiment: str = "ldbfr") -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def test_mlflow_has_the_values_the_picture_and_the_settings(mlflow_client: Any, tmp_path: Path) -> None:
    many = {f"key{number}": number for number in range(250)}
    tracker = MLflowTracker(str(tmp_path / "run/prior"), "run prior", {**SETTINGS, "many": many, "text": "x" * 9000})
    tracker.scalars(1, {"prior/loss": 0.5, "prior/lr": 0.25})
    tracker.scalars(2, {"prior/loss": 0.125, "prior/lr": float("nan")})
    tracker.image("prior/faces", 2, picture())
    tracker.flush()
    tracker.close()
    (run,) = mlflow_runs(mlflow_client)
    assert (run.info.run_name, run.info.status) == ("run prior", "FINISHED")
    history = mlflow_client.get_metric_history(run.info.run_id, "prior/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.125)]
    assert run.data.params["training.prior.steps"] == "4"
    assert len(run.data.params) == 3 + 250 + 1
    (image,) = [entry for entry in mlflow_client.list_artifacts(run.info.run_id, "images") if entry.path[-4:] == ".png"]
    with Image.open(mlflow_client.download_artifacts(run.info.run_id, image.path, str(tmp_path))) as shown:
        assert np.array_equal(np.asarray(shown), picture())


def test_mlflow_continues_the_same_run(mlflow_client: Any, tmp_path: Path) -> None:
    for first, settings in ((1, {"seed": 0}), (3, {"seed": 1, "log_every": 5})):
        tracker = MLflowTracker(str(tmp_path / "run/prior"), "run prior", settings)
        tracker.scalars(first, {"loss": float(first)})
        (running,) = mlflow_runs(mlflow_client)
        assert running.info.status == "RUNNING"
        tracker.close()
    other = MLflowTracker(str(tmp_path / "run/enhancer"), "run enhancer", {})
    other.scalars(1, {"loss": 0.0})
    other.close()
    run, second = sorted(mlflow_runs(mlflow_client), key=lambda run: run.info.run_name, reverse=True)
    assert second.info.run_name == "run enhancer"
    history = mlflow_client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 3]
    assert run.data.params == {"seed": "0", "log_every": "5"}  # a parameter cannot change in MLflow


def test_mlflow_goes_where_the_environment_says(
    mlflow_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "faces")
    tracker = MLflowTracker(str(tmp_path), "run", {})
    tracker.scalars(1, {"loss": 0.0})
    assert len(mlflow_runs(mlflow_client, "faces")) == 1


def test_an_mlflow_server_that_refuses_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train_with(make_trackers(["mlflow"], str(tmp_path / "prior"), "run", SETTINGS, 0), tmp_path / "prior", "mlflow")
    (warning,) = warnings_in(caplog)
    assert warning.startswith("mlflow does not take what is noted (MlflowException: ")
    assert "127.0.0.1" in warning


# ----------------------------------------------------------------------------------------------------- weights & biases


@pytest.fixture
def offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield wandb
    wandb.teardown()


def wandb_runs(folder: Path) -> list[list[Any]]:
    """The records of every run that W&B kept in a folder, in order, once its own process has written them."""
    pytest.importorskip("wandb").teardown()
    return [wandb_records(file) for file in sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=os.path.getmtime)]


def wandb_records(file: Path) -> list[Any]:
    """A .wandb file is a LevelDB log of protobuf records: blocks of 32 KiB, chunks (checksum, length, type, data)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last chunk
            records.append(Record.FromString(record))
            record = b""
    return records


def wandb_history(records: list[Any], key: str) -> list[tuple[int, str]]:
    history = []
    for record in records:
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if key in items:
            history.append((int(items["step"]), items[key]))
    return history


def wandb_config(records: list[Any]) -> dict[str, str]:
    return {
        update.key or "/".join(update.nested_key): update.value_json
        for record in records
        for update in (*record.run.config.update, *record.config.update)
    }


def test_wandb_has_the_values_the_picture_and_the_settings(offline_wandb: Any, tmp_path: Path) -> None:
    tracker = WandbTracker(str(tmp_path / "run/prior"), "run prior", SETTINGS)
    tracker.scalars(1, {"prior/loss": 0.5})
    tracker.scalars(2, {"prior/loss": 0.125})
    tracker.image("prior/faces", 2, picture())
    tracker.flush()
    tracker.close()
    (records,) = wandb_runs(tmp_path / "run/prior")
    assert wandb_history(records, "prior/loss") == [(1, "0.5"), (2, "0.125")]
    assert wandb_config(records)["training.prior.steps"] == "4"
    (run,) = [record.run for record in records if record.run.run_id]
    assert (run.run_id, run.display_name, run.project) == (run_id(str(tmp_path / "run/prior")), "run prior", "ldbfr")
    (image,) = (tmp_path / "run/prior").rglob("*.png")
    with Image.open(image) as shown:
        assert np.array_equal(np.asarray(shown), picture())


def test_wandb_continues_the_same_run_from_an_earlier_step(offline_wandb: Any, tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (2, 3, 4)):
        tracker = WandbTracker(str(tmp_path / "prior"), "run prior", SETTINGS)
        for step in steps:
            tracker.scalars(step, {"loss": step / 2})
        tracker.close()
    runs = wandb_runs(tmp_path / "prior")
    assert [[step for step, _ in wandb_history(run, "loss")] for run in runs] == [[1, 2, 3], [2, 3, 4]]
    assert {record.run.run_id for run in runs for record in run if record.run.run_id} == {
        run_id(str(tmp_path / "prior"))
    }


def test_a_wandb_server_that_refuses_leaves_the_run_on_this_machine(
    offline_wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(tracking_services, "START_SECONDS", 1)
    train_with(make_trackers(["wandb"], str(tmp_path / "prior"), "run", SETTINGS, 0), tmp_path / "prior")
    (warning,) = [text for text in warnings_in(caplog) if "Biases" in text]
    assert "connection refused" in warning
    assert "with `wandb sync`" in warning
    kept = [wandb_history(run, "prior/loss") for run in wandb_runs(tmp_path / "prior")]
    assert [(1, "0.5"), (2, "0.5")] in kept
    assert scalars_of(tmp_path / "prior/tensorboard", "prior/loss") == [(1, 0.5), (2, 0.5)]


def test_wandb_s_folder_is_the_named_one_the_stage_s_or_a_temporary_one(
    offline_wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert WandbTracker(str(tmp_path / "prior"), "run", {}).folder() == str(tmp_path / "prior")
    assert Path(WandbTracker("s3://bucket/prior", "run", {}).folder()).is_dir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert WandbTracker("s3://bucket/prior", "run", {}).folder() == str(tmp_path)


# ----------------------------------------------------------------------------------------------------------- stage log


def train_with(given: list[Tracker], folder: Path, failing: str | None = None) -> None:
    """Two steps as the loop logs them; waits for the tracker that is meant to fail."""
    settings = tiny.preset("training.prior.steps=2").training.prior
    with StageLog(str(folder), "prior", settings, 0, given) as stage_log:
        for step in (1, 2):
            stage_log.step(step, {"loss": 0.5}, 0.01)
        for tracker in given:
            if isinstance(tracker, Background) and tracker.name == failing:
                wait_until(lambda tracker=tracker: tracker.failing, 60)


def test_the_log_tells_every_tracker_the_values_and_keeps_the_pictures(tmp_path: Path) -> None:
    memory, settings = Memory(), tiny.preset("training.prior.log_every=2").training.prior
    faces = tiny.lq_batch(2)
    with StageLog(str(tmp_path / "prior"), "prior", settings, 0, [memory]) as stage_log:
        for step in (1, 2, 3, 4):
            stage_log.step(step, {"loss": 1 / step, "learning_rate": 0.1}, 0.5)
        stage_log.images(4, {"HQ": faces, "one step": -faces})
        stage_log.flush()
    assert [call[0] for call in memory.calls] == ["scalars"] * 3 + ["image", "flush", "close"]
    assert [call[1] for call in memory.calls[:3]] == [1, 2, 4]  # the first, every second, the last
    assert memory.calls[1][2]["prior/loss"] == 0.5
    assert set(memory.calls[1][2]) == {
        f"prior/{key}" for key in ("loss", "learning_rate", "images_per_second", "step_seconds")
    }
    _, name, step, sheet = memory.calls[3]
    assert (name, step) == ("prior/faces", 4)
    kept = (tmp_path / "prior/images/step-00000004.png").read_bytes()
    assert np.array_equal(decode_image(kept, name="kept"), sheet)


def test_trackers_are_closed_when_the_training_breaks_off(tmp_path: Path) -> None:
    memory, settings = Memory(), tiny.preset().training.prior
    with pytest.raises(ZeroDivisionError), StageLog(str(tmp_path), "prior", settings, 0, [memory]):
        raise ZeroDivisionError
    assert memory.calls == [("close",)]


def test_log_lines_say_what_is_done_how_fast_and_how_long_unless_quiet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = tiny.preset("training.prior.log_every=1").training.prior
    for quiet in (False, True):
        with caplog.at_level(logging.INFO), StageLog(str(tmp_path), "prior", settings, 0, [], quiet) as stage_log:
            stage_log.step(1, {"loss": 0.25}, 0.5)
        assert ("prior 1/4" in caplog.text) is not quiet
        assert ("left: loss 0.25" in caplog.text) is not quiet
        caplog.clear()


@pytest.mark.s3
def test_pictures_go_to_a_bucket_too(s3_root: str) -> None:
    tracker = PictureFiles(f"{s3_root}/prior/images")
    tracker.image("prior/faces", 7, picture())
    data = storage.read_bytes(f"{s3_root}/prior/images/step-00000007.png")
    assert np.array_equal(decode_image(data, name="kept"), picture())
