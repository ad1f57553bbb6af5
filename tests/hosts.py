"""Several machines in one: network namespaces with their own addresses, and a Ray node in each; or Ray's test cluster.

A namespace has its own addresses, ports and loopback. The cable between them ends in a namespace of its own too, so
nothing of the machine's own network is touched. Making namespaces takes Linux, `ip`, and the right to administer
networks, which root in a virtual machine has and most containers do not give.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from ldbfr import storage
from tests.conftest import REPOSITORY
from tests.s3_server import moto_server

RAY = str(Path(sys.executable).with_name("ray"))
CLONE_NEWNET = 0x40000000
CPUS = 3
"""Of every host: two for a worker of a training or for a model, and one to read and write."""
START_SECONDS = 120
FAST_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
    "grpc_client_keepalive_time_ms": 5000,
    "grpc_client_keepalive_timeout_ms": 5000,
}
"""A host that says nothing counts as lost after some seconds; by itself, Ray asks for objects there for two minutes."""
STORE_BYTES = 80 * 2**20


class Hosts(Protocol):
    """Three machines with a Ray cluster over them, whose first is the head."""

    environment: dict[str, str]
    """For a driver on the head."""

    def on_head(self) -> Any:
        """A context in which this thread, and what it starts, has the head's network."""

    def processes(self, number: int) -> list[psutil.Process]:
        """Everything that runs on a machine."""

    def cut_off(self, number: int) -> None:
        """Let a machine vanish, not the head."""


def why_no_namespaces() -> str:
    """Why network namespaces cannot be made here; "" where they can."""
    if os.environ.get("LDBFR_TEST_NAMESPACES") == "0":
        return "LDBFR_TEST_NAMESPACES=0 forbids it"
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "there is no `ip` on PATH (Debian's package iproute2)"
    name = f"ldbfr-{uuid.uuid4().hex[:6]}"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", "bridge", "type", "bridge")
            ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other")
            with inside(name):
                pass
        finally:
            ip("netns", "delete", name)
    except (subprocess.CalledProcessError, OSError) as error:
        return (getattr(error, "stderr", None) or str(error)).strip()
    return ""


def ip(*arguments: str) -> str:
    """Run `ip`."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread, and what it starts meanwhile, has the network of a namespace; sockets stay where they were opened.

    Raises:
        OSError: it may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(descriptor: int) -> None:
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")

    with ExitStack() as stack:
        ours = stack.enter_context(Path("/proc/thread-self/ns/net").open("rb"))
        theirs = stack.enter_context(Path("/run/netns", namespace).open("rb"))
        enter(theirs.fileno())
        try:
            yield
        finally:
            enter(ours.fileno())


@contextmanager
def known(endpoint: str) -> Iterator[None]:
    """This process, and what it starts, knows the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        storage._s3_client.cache_clear()  # it may have been made for another endpoint
        yield
    storage._s3_client.cache_clear()


# ---- network namespaces ----


@dataclass
class Namespaces:
    """Hosts whose cables can be pulled."""

    names: list[str]
    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def on_head(self) -> Any:
        return inside(self.names[0])

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def processes(self, number: int) -> list[psutil.Process]:
        return [psutil.Process(int(pid)) for pid in ip("netns", "pids", self.names[number]).split()]

    def cut_off(self, number: int) -> None:
        """Nothing on it is killed: it works on, and hears and says nothing any more."""
        ip("-n", self.names[number], "link", "set", "eth0", "down")

    def start_node(self, number: int) -> None:
        """`ray start`, as one types it on that machine."""
        options: dict[str, Any] = {
            "node-ip-address": self.address(number),
            "num-cpus": CPUS,
            "num-gpus": 0,
            "object-store-memory": STORE_BYTES,
            "temp-dir": self.folder / str(number),
        }
        command = [RAY, "start", "--block", *(f"--{name}={value}" for name, value in options.items())]
        if number == 0:
            system = str(FAST_HEALTH).replace("'", '"')
            command += ["--head", "--port=6379", "--include-dashboard=false", f"--system-config={system}"]
        else:
            command += [f"--address={self.address(0)}:6379"]
        environment = {**os.environ, **self.environment, "RAY_TMPDIR": str(self.folder / str(number))}
        del environment["RAY_ADDRESS"]
        with (self.folder / f"{number}.log").open("wb") as log, inside(self.names[number]):
            self.started.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment))

    def wait_for(self, count: int) -> None:
        """Until so many nodes are in the cluster."""
        status = [RAY, "status", f"--address={self.address(0)}:6379"]
        environment = {**os.environ, **self.environment}
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with self.on_head():
                done = subprocess.run(status, capture_output=True, text=True, env=environment, timeout=START_SECONDS)
            if f"/{count * CPUS:.1f} CPU" in done.stdout:
                return
            time.sleep(1)
        logs = "\n".join(path.read_text("utf-8", "replace") for path in sorted(self.folder.glob("*.log")))
        pytest.fail(f"no cluster of {count} after {START_SECONDS} s: {done.stdout}{done.stderr}\n{logs}")


@contextmanager
def namespaces(count: int = 3) -> Iterator[Namespaces]:
    """A cluster over so many namespaces, with an S3 server in the head's."""
    tag = uuid.uuid4().hex[:6]
    switch, names = f"ldbfr-{tag}-switch", [f"ldbfr-{tag}-{number}" for number in range(count)]
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="ldbfr-", dir="/tmp"))  # Unix sockets: the path must be short
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in (switch, *names):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "GLOO_SOCKET_IFNAME": "eth0",  # the machine's name is known, but means the address outside
            "OMP_WAIT_POLICY": "PASSIVE",  # there are more threads than cores
            "RAY_ADDRESS": "10.77.0.1:6379",
        }
        hosts = Namespaces(names, folder, environment)
        for number, name in enumerate(names):
            plug_in(name, hosts.address(number), switch, f"port{number}")
        stack.callback(end_all, hosts)
        with hosts.on_head():
            endpoint = stack.enter_context(moto_server(hosts.address(0)))
        stack.enter_context(known(endpoint))
        for number in range(count):
            hosts.start_node(number)
            hosts.wait_for(number + 1)
        yield hosts


def plug_in(name: str, address: str, switch: str, port: str) -> None:
    """A cable from a namespace to the switch."""
    ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
    ip("-n", name, "link", "set", "lo", "up")
    ip("-n", name, "link", "set", "eth0", "up")
    # Nobody is there; but whoever asks the system which address leads into the world is told this host's.
    ip("-n", name, "route", "add", "default", "via", "10.77.0.254")


def end_all(hosts: Namespaces) -> None:
    """End everything that runs on the hosts: who has a namespace's network was started here."""
    for number in range(len(hosts.names)):
        processes = hosts.processes(number)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=10)
    for node in hosts.started:
        node.wait(timeout=10)


# ---- where there are none ----


@dataclass
class RayNodes:
    """Ray's own test cluster: several nodes that share the machine's address; a lost one is killed."""

    cluster: Any
    environment: dict[str, str]
    nodes: list[Any] = field(default_factory=list)

    @contextmanager
    def on_head(self) -> Iterator[None]:
        yield

    def processes(self, number: int) -> list[psutil.Process]:
        raylets = [info.process.pid for info in self.nodes[number].all_processes["raylet"]]
        return [child for pid in raylets for child in psutil.Process(pid).children(recursive=True)]

    def cut_off(self, number: int) -> None:
        self.cluster.remove_node(self.nodes[number], allow_graceful=False)


@contextmanager
def ray_nodes(count: int = 3) -> Iterator[RayNodes]:
    """A cluster of so many nodes, with an S3 server."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    each = {"num_cpus": CPUS, "object_store_memory": STORE_BYTES}
    with moto_server() as endpoint, known(endpoint):
        head = {**each, "include_dashboard": False, "_system_config": FAST_HEALTH}
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes = [cluster.head_node, *(cluster.add_node(**each) for _ in range(count - 1))]
            yield RayNodes(cluster, {"RAY_ADDRESS": cluster.address}, nodes)
        finally:
            cluster.shutdown()


# ---- drivers on the head ----


@dataclass
class Driver:
    """A job's command on the head, and what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """All of it."""
        return self.log.read_text("utf-8", "replace")

    def finish(self, seconds: float) -> str:
        """Wait for its good end; what it said."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"not finished after {seconds:.0f} s: {self.text()}")
        assert self.process.returncode == 0, self.text()
        return self.text()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()


def start(hosts: Hosts, arguments: Sequence[str], log: Path) -> Driver:
    """Start a job of jobs/ on the head."""
    environment = {**os.environ, **hosts.environment, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "jobs" / arguments[0]), *arguments[1:]]
    with log.open("wb") as output, hosts.on_head():
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    return Driver(process, log)


def until(condition: Callable[[], bool], seconds: float, *drivers: Driver) -> None:
    """Wait, as long as the drivers run."""
    deadline = time.monotonic() + seconds
    while not condition():
        for driver in drivers:
            assert driver.process.poll() is None, f"ended with {driver.process.returncode}: {driver.text()}"
        assert time.monotonic() < deadline, "\n".join(driver.text() for driver in drivers)
        time.sleep(0.2)


def which(hosts: Hosts, numbers: Sequence[int], pattern: str) -> list[int]:
    """The machines on which a process runs whose command line has the pattern."""
    return [number for number in numbers if any(re.search(pattern, name_of(one)) for one in hosts.processes(number))]


def name_of(process: psutil.Process) -> str:
    """A process's command line; "" once it has ended."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
