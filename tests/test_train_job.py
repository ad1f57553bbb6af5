"""`jobs/train.py` on a cluster of several Ray nodes: as one worker, through kills, and refused where it must be."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldbfr.data.index import FaceImages
from ldbfr.images import encode_image
from ldbfr.training.checkpoint import latest_checkpoint, read_state
from ldbfr.training.run import done_steps, train_run
from ldbfr.training.scores import read_validations
from tests import tiny
from tests.conftest import REPOSITORY
from tests.tiny import Worker

pytestmark = pytest.mark.ray

UPSTREAM, STAGE, STEPS = "latent_vqgan", "prior", 60
OVERRIDES = (
    f"training.{STAGE}.steps={STEPS}",
    f"training.{STAGE}.checkpoint_every=10",
    f"training.{STAGE}.log_every=1",
    f"training.{STAGE}.learning_rate=1e-4",
    f"training.{STAGE}.warmup_steps=20",
)
"""A stage without what makes much of a rounding error: discriminator, code lookup (test_distributed.py has those), and
a full first step of Adam, which divides every gradient by itself, so that of one near 0 it shows the rounding."""
SECONDS = 280


@dataclass
class Cluster:
    """A head that trains nothing and nodes with one CPU each."""

    ray: Any
    nodes: list[Any] = field(default_factory=list)

    def add(self) -> Any:
        node = self.ray.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        self.nodes.append(node)
        return node

    def remove(self, node: Any) -> None:
        self.nodes.remove(node)
        self.ray.remove_node(node, allow_graceful=False)

    def workers(self) -> list[psutil.Process]:
        """The processes of Ray Train's workers."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or ()):
                found.append(process)
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    system = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    ray_cluster = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 80 * 2**20,
            "_system_config": system,
            "include_dashboard": False,
        },
    )
    try:
        made = Cluster(ray_cluster)
        for _ in range(2):
            made.add()
        yield made
    finally:
        ray_cluster.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve faces in a tar."""
    path = tmp_path_factory.mktemp("data") / "faces.tar"
    with tarfile.open(path, "w") as archive:
        for number, face in enumerate(tiny.blob_faces(12)):
            content = encode_image(face, "png")
            info = tarfile.TarInfo(f"{number:03d}.png")
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The run of a single process, without Ray."""
    run, faces = tmp_path_factory.mktemp("undisturbed"), FaceImages.load([data], tiny.SIDE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_run(tiny.preset(*OVERRIDES), [UPSTREAM, STAGE], faces, faces, run, Worker())
    finally:
        torch.set_num_threads(threads)
    return run


@pytest.fixture
def run(undisturbed: Path, tmp_path: Path) -> Path:
    """A run in which the upstream stage is finished."""
    shutil.copytree(undisturbed / UPSTREAM, tmp_path / "run" / UPSTREAM)
    return tmp_path / "run"


def command(data: Path | str, run: Path | str, *options: str, stage: str = STAGE) -> list[str]:
    settings = [item for override in OVERRIDES for item in ("--set", override)]
    base = [sys.executable, str(REPOSITORY / "jobs" / "train.py"), "--preset", "tiny", "--stage", stage]
    return [*base, "--data", str(data), "--run", str(run), "--cpus-per-worker", "1", *settings, *options]


def start(cluster: Cluster, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RAY_ADDRESS": cluster.ray.address}
    with log.open("ab") as output:
        return subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen[bytes], log: Path, code: int = 0) -> str:
    try:
        process.wait(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"not finished after {SECONDS} s: {log.read_text()}")
    text = log.read_text()
    assert process.returncode == code, text
    return text


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def losses(run: Path) -> dict[int, float]:
    """The loss of every step, as TensorBoard shows it."""
    events = EventAccumulator(str(run / STAGE / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars(f"{STAGE}/loss")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run / STAGE)
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == STEPS
    return dict(
        tiny.new_stage(STAGE, *OVERRIDES).network_class.from_pretrained(
            checkpoint / "network", low_cpu_mem_usage=False
        ).state_dict()
    )  # fmt: skip


def assert_equal_runs(run: Path, undisturbed: Path) -> None:
    """The same curve, and the same weights to 1e-5, but where a gradient is 0 whatever the data: the bias of an
    attention's keys, which the softmax does not see, follows the rounding."""
    mine, expected = losses(run), losses(undisturbed)
    assert sorted(mine) == list(range(1, STEPS + 1))
    assert mine == pytest.approx(expected, rel=0, abs=1e-5)
    ends, others = weights(run), weights(undisturbed)
    assert ends.keys() == others.keys()
    apart = {key: (ends[key] - others[key]).abs().max().item() for key in ends if not key.endswith("to_k.bias")}
    assert max(apart.values()) < 1e-5, sorted(apart.items(), key=lambda item: -item[1])[:5]


def test_two_workers_on_two_nodes_are_one_process(
    cluster: Cluster, data: Path, run: Path, undisturbed: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    text = finish(start(cluster, command(data, run, "--workers", "2"), log), log)
    assert_equal_runs(run, undisturbed)
    assert STEPS in read_validations(str(run / STAGE)), text
    assert list((run / STAGE / "validation").glob("*.png"))

    before = {path: path.stat().st_mtime_ns for path in (run / STAGE).rglob("*")}
    again = finish(start(cluster, command(data, run, "--workers", "2"), log), log)
    assert "is finished" in again
    assert {path: path.stat().st_mtime_ns for path in (run / STAGE).rglob("*")} == before


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_workers_a_lost_node_and_a_killed_driver_leave_the_run_as_undisturbed(
    cluster: Cluster, data: Path, run: Path, undisturbed: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    elastic = command(data, run, "--workers", "1:2")
    driver = start(cluster, elastic, log)

    wait_until(lambda: done_steps(run, STAGE) >= 10, driver, log)
    victims = cluster.workers()
    assert victims, log.read_text()
    victims[0].send_signal(signal.SIGKILL)

    wait_until(lambda: done_steps(run, STAGE) >= 20, driver, log)
    cluster.remove(cluster.nodes[0])

    wait_until(lambda: done_steps(run, STAGE) >= 30, driver, log)
    driver.kill()
    driver.wait()
    cluster.add()
    assert done_steps(run, STAGE) < STEPS, "it was too fast to be killed"

    text = finish(start(cluster, elastic, log), log)
    assert "going on from the last checkpoint" in text
    assert_equal_runs(run, undisturbed)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_second_run_is_refused_while_the_first_lives(cluster: Cluster, data: Path, run: Path, tmp_path: Path) -> None:
    log, second_log = tmp_path / "log", tmp_path / "second"
    first = start(cluster, command(data, run), log)
    wait_until((run / "_lease").exists, first, log)
    text = finish(start(cluster, command(data, run), second_log), second_log, code=2)
    assert f"process {first.pid}" in text
    assert str(run) in text
    finish(first, log)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_an_announced_preemption_saves_a_checkpoint_at_once(
    cluster: Cluster, data: Path, run: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    options = (
        "--workers",
        "1",
        "--set",
        f"training.{STAGE}.checkpoint_every=100000",
        "--set",
        f"training.{STAGE}.steps=3000",
    )
    driver = start(cluster, command(data, run, *options), log)
    try:
        wait_until(lambda: (run / STAGE / "tensorboard").exists(), driver, log)
        assert done_steps(run, STAGE) == 0
        node = node_of(cluster, cluster.workers()[0])
        drain(cluster, node)
        wait_until(lambda: done_steps(run, STAGE) > 0, driver, log)
        assert done_steps(run, STAGE) < 3000
    finally:
        driver.kill()
        driver.wait()
    cluster.remove(node)
    cluster.add()


def node_of(cluster: Cluster, worker: psutil.Process) -> Any:
    """The node whose raylet started a process."""
    parents = {parent.pid for parent in worker.parents()}
    for node in cluster.nodes:
        if parents & {info.process.pid for info in node.all_processes["raylet"]}:
            return node
    raise AssertionError(f"no node started {worker}")


def drain(cluster: Cluster, node: Any) -> None:
    """Announce that a node will go away in a minute, as a cloud's spot notice does through the autoscaler."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=cluster.ray.address)
    accepted, reason = client.drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "the test takes it away",
        int((time.time() + 60) * 1000),
    )
    assert accepted, reason


def test_the_plan_is_printed_and_nothing_started(data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(data, tmp_path / "run", "--dry-run", stage="all"), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    for name in ("hq_vqgan", "latent_vqgan", "dc_vqr", "prior", "enhancer"):
        assert name in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--workers", "0"], "--workers 0: expected a number from 1 on, or MIN:MAX"),
        (["--workers", "4:2"], "MIN:MAX"),
        (["--workers", "5"], "batch_size is 4, too few for 5 workers"),
        (["--init", "prior"], "expected STAGE=FOLDER"),
        (["--init", "prior=/nowhere"], "no folder on this machine"),
        (["--set", "training.prior.stepz=3"], "stepz"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    data: Path, tmp_path: Path, options: list[str], text: str
) -> None:
    done = subprocess.run(command(data, tmp_path / "run", *options), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert text in done.stderr
    assert not (tmp_path / "run").exists()


def test_data_without_a_usable_image_end_the_run_with_one_sentence(cluster: Cluster, tmp_path: Path) -> None:
    empty, log = tmp_path / "empty", tmp_path / "log"
    empty.mkdir()
    (empty / "broken.png").write_bytes(b"no image")
    text = finish(start(cluster, command(empty, tmp_path / "run", stage=UPSTREAM), log), log, code=1)
    assert f"train: no usable image in {empty}" in text
    assert text.count("Traceback") == 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_damaged_newest_checkpoint_is_passed_over_on_the_cluster_too(
    cluster: Cluster, data: Path, run: Path, undisturbed: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    shutil.copytree(undisturbed / STAGE, run / STAGE)
    newest = run / STAGE / "checkpoints" / f"step-{STEPS:08d}"
    tiny.flip_byte(newest / "ema" / "diffusion_pytorch_model.safetensors", -1)
    text = finish(start(cluster, command(data, run), log), log)
    assert "passed over" in text
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "cpus"),
    [
        ([{"CPU": 2}, {"CPU": 2}], "cpu", 1, 2),  # not 4: no node has them
        ([{"CPU": 2}, {"CPU": 2}], "cpu", 2, 2),
        ([{"CPU": 2}, {"CPU": 2}], "cpu", 3, 1),
        ([{"CPU": 8}, {"CPU": 3}], "cpu", 3, 3),
        ([{}, {"CPU": 1}], "cpu", 4, 1),
        ([], "cpu", 1, 1),
        ([{"CPU": 8, "GPU": 4}], "cuda", 4, 2),
        ([{"CPU": 64, "GPU": 4}, {"CPU": 2}], "cuda", 4, 4),
        ([{"CPU": 1, "GPU": 1}], "cuda", 1, 1),
        ([{"CPU": 4}], "cuda", 1, 4),  # a GPU is yet to come
    ],
)
def test_workers_are_given_no_more_cpus_than_find_room(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], device: str, workers: int, cpus: int
) -> None:
    from jobs import nodes as cluster_nodes
    from jobs import train_driver

    monkeypatch.setattr(cluster_nodes.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    assert train_driver.cpus_for_a_worker(device, workers) == cpus


@pytest.mark.parametrize(("workers", "cpus"), [(1, 3), (2, 2), (4, 1)])
def test_workers_leave_alone_what_is_reserved_for_the_driver(
    monkeypatch: pytest.MonkeyPatch, workers: int, cpus: int
) -> None:
    """Of two machines with three CPUs each, one CPU of the first is the driver's."""
    from jobs import flow, train_driver
    from jobs import nodes as cluster_nodes

    there = [
        {"Alive": True, "NodeID": "a", "Resources": {"CPU": 3.0, "memory": 8.0}},
        {"Alive": True, "NodeID": "b", "Resources": {"CPU": 3.0}},
        {"Alive": False, "NodeID": "c", "Resources": {"CPU": 64.0}},
    ]
    monkeypatch.setattr(cluster_nodes.ray, "nodes", lambda: there)
    assert cluster_nodes.nodes_for_workers() == [{"CPU": 3, "memory": 8}, {"CPU": 3}]
    monkeypatch.setattr(cluster_nodes, "reserved_for_driver", lambda: ("a", {"CPU": 1.0, "memory": 2.0}))
    assert cluster_nodes.nodes_for_workers() == [{"CPU": 2, "memory": 6}, {"CPU": 3}]
    assert train_driver.cpus_for_a_worker("cpu", workers) == cpus
    assert flow.num_cpus() == 5
    assert flow.place_workers(1, "cpu", 16, own=False).threads == 2
