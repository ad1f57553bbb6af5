"""What a worker's pod does when it is taken away, on a local cluster of several nodes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
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


def test_a_busy_node_is_waited_for_until_its_work_has_gone(cluster: Any, node: Any) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", LISTENER, cluster.address], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "placed\n"
        hook = drain(cluster, 50)
        with pytest.raises(subprocess.TimeoutExpired):
            hook.wait(timeout=12)
    finally:
        driver.kill()
        driver.wait()
    _, text = hook.communicate(timeout=SECONDS)
    assert hook.returncode == 0, text
    assert "the node is idle" in text


def test_it_does_not_wait_longer_than_it_is_told(cluster: Any, node: Any) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", LISTENER, cluster.address], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "placed\n"
        started = time.monotonic()
        hook = drain(cluster, 5)
        _, text = hook.communicate(timeout=SECONDS)
        assert hook.returncode == 0, text
        assert "still works after 5 s" in text
        assert 5 <= time.monotonic() - started < 40
    finally:
        driver.kill()
        driver.wait()
