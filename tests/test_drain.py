"""What a worker's pod does when it is taken away, on a local cluster of several nodes."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.ray
SECONDS = 60

LISTENER = """
import sys, time
import ray

ray.init(sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1)
class Worker:
    def ready(self):
        pass

worker = Worker.remote()
ray.get(worker.ready.remote())
print("placed", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    head = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def node(cluster: Any) -> Iterator[Any]:
    added = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes()
    yield added
    if added in cluster.worker_nodes:
        cluster.remove_node(added)


def drain(cluster: Any, seconds: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "cluster" / "drain.py"), "--seconds", str(seconds)]
    return subprocess.Popen([*command, "--address", cluster.address], stderr=subprocess.PIPE, text=True)


def alive(cluster: Any, node: Any) -> bool:
    from ray._raylet import GcsClient

    found = GcsClient(address=cluster.address).get_all_node_info()
    return any(key.hex() == node.node_id and info.state == 0 for key, info in found.items())


def test_an_idle_node_leaves_at_once(cluster: Any, node: Any) -> None:
    started = time.monotonic()
    hook = drain(cluster, 50)
    _, text = hook.communicate(timeout=SECONDS)
    assert hook.returncode == 0, text
    assert f"node {node.node_id} is leaving" in text
    assert "idle" in text
    assert time.monotonic() - started < 40
    deadline = time.monotonic() + SECONDS
    while alive(cluster, node):
        assert time.monotonic() < deadline
        time.sleep(0.2)

    again = drain(cluster, 50)
    _, text = again.communicate(timeout=SECONDS)
    assert "nothing to drain" in text
    assert again.returncode == 0


@contextmanager
def busy(cluster: Any) -> Iterator[subprocess.Popen[str]]:
    """A driver with an actor that holds the node's one CPU."""
    command = [sys.executable, "-c", LISTENER, cluster.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "placed\n"
            yield driver
        finally:
            driver.kill()


def test_a_busy_node_is_waited_for_until_its_work_has_gone(cluster: Any, node: Any) -> None:
    with busy(cluster):
        hook = drain(cluster, 50)
        with pytest.raises(subprocess.TimeoutExpired):
            hook.wait(timeout=12)
    _, text = hook.communicate(timeout=SECONDS)
    assert hook.returncode == 0, text
    assert "the node is idle" in text


def test_it_does_not_wait_longer_than_it_is_told(cluster: Any, node: Any) -> None:
    with busy(cluster):
        started = time.monotonic()
        hook = drain(cluster, 5)
        _, text = hook.communicate(timeout=SECONDS)
    assert hook.returncode == 0, text
    assert "still works after 5 s" in text
    assert 5 <= time.monotonic() - started < 40


# ---- the clouds' notices, from a server that answers as theirs do ----


class Cloud(BaseHTTPRequestHandler):
    """The metadata servers of AWS (IMDSv2) and GCP; they announce the end after the third look."""

    def do_PUT(self) -> None:
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, "a-token")

    def do_GET(self) -> None:
        server: Any = self.server
        server.looks += 1
        over = server.looks > 3
        if self.path == "/latest/meta-data/spot/instance-action":
            assert self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self.answer(200 if over else 404, '{"action": "terminate"}' if over else "")
        else:
            assert self.path == "/computeMetadata/v1/instance/preempted"
            assert self.headers["Metadata-Flavor"] == "Google"
            self.answer(200, "TRUE" if over else "FALSE")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_notice_of_the_cloud_drains_the_node(cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "cluster"))
    preempted = importlib.import_module("preempted")
    server = HTTPServer(("127.0.0.1", 0), Cloud)
    server.looks = 0  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    drained: list[list[str]] = []
    monkeypatch.setattr(preempted.drain, "main", lambda arguments: drained.append(arguments) or 0)
    monkeypatch.setattr(preempted, "LOOK_SECONDS", 0.01)
    monkeypatch.setenv("LDBFR_METADATA_SERVER", f"http://127.0.0.1:{server.server_port}")
    try:
        assert preempted.main([cloud]) == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert server.looks == 4  # type: ignore[attr-defined]
    assert drained == [["--seconds", str(preempted.NOTICE_SECONDS[cloud])]]
    assert not preempted.aws_notice(f"http://127.0.0.1:{server.server_port}"), "no server is no notice"
