"""The real job through kills, a lost node, interruptions and a full disk: it ends with the bytes of a quiet run.

Moments are drawn from a seed that a failure prints, with the job's own log.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import restore
from jobs.connection import num_cores
from ldbfr import storage
from ldbfr.archive.plan import WorkItem
from ldbfr.archive.rows import ResultRow
from tests import archiving, tiny
from tests.archiving import LocalExecution, manifest, outputs, png, put_files, tar_file
from tests.conftest import REPOSITORY

SECONDS = 150
"""For one session of the job, on a busy machine."""
LINGER_S = 20
AGENTS = ("RuntimeEnvAgent", "DashboardAgent")
"""Processes of Ray that, when they lose the others, ask for a minute where those are; they hold no work."""
LOOSE, TARS = 110, 20
UNITS = 19
SEED = int(os.environ.get("LDBFR_TEST_SEED", "20"))

OPTIONS = ("--shard-images", "8", "--batch-size", "4", "--steps", "4", "--workers", "1")


def real_job(test: Callable[..., None]) -> Callable[..., None]:
    """A test that runs the job on Ray."""
    return pytest.mark.slow(pytest.mark.ray(pytest.mark.timeout(1200)(test)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return archiving.save_weights(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Loose faces, some that are none, and more archives than are listed without Ray."""
    place = str(tmp_path_factory.mktemp("source") / "in")
    few = [png(number, tiny.SIDE) for number in range(40)]
    put_files(place, {f"{n:03d}.png": few[n % 40] if n % 25 != 9 else b"broken" for n in range(LOOSE)})
    put_files(place, {f"t{n:02d}.tar": tar_file({"a.png": few[n], "b.png": few[n + 20]}) for n in range(TARS)})
    return place


@dataclass
class Job:
    """Sessions of the job on one output.

    Args:
        arguments: of the job.
        output: where its results go.
        log: takes what it says, of all sessions.
        environment: variables besides this process's own.
    """

    arguments: list[str]
    output: Path
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Job:
        """The command, as a shell would start it: in a process group of its own."""
        command = [sys.executable, str(REPOSITORY / "jobs" / "restore.py"), *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self.log.parent
            )
        return self

    def listed(self, quiet: Path) -> Job:
        """Begin with the plan of another output, which is the same for all: listing is no part of the test."""
        shutil.copytree(quiet / "_ldbfr" / "plan", self.output / "_ldbfr" / "plan")
        return self

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def text(self) -> str:
        """What it said, for whoever reads of a failure."""
        return f"seed {SEED}; the job's log:\n{self.log.read_text('utf-8', 'replace')}"

    def finish(self, code: int = 0) -> str:
        """Wait for its end; its log."""
        try:
            self.running.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"not finished after {SECONDS} s; {self.text()}")
        assert self.running.returncode == code, f"exit code {self.running.returncode}, not {code}; {self.text()}"
        return self.text()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait while it runs."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.running.poll() is None, f"ended with {self.running.returncode}; {self.text()}"
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        """All processes that came of it."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.running.pid).children(recursive=True)
        return []

    def models(self) -> list[psutil.Process]:
        """The processes with a model."""
        return [process for process in self.family() if "ModelActor" in name_of(process)]

    def records(self) -> int:
        """Units that are recorded; all of them once the only part is in the manifest."""
        if (self.output / "manifest" / "000000.parquet").exists():
            return UNITS
        folder = self.output / "_ldbfr" / "units" / "000000"
        return sum(1 for path in folder.glob("*.parquet") if ".pictures." not in path.name)

    def kill(self) -> None:
        """kill -9 of the driver; what it started must end by itself."""
        family = {process: name_of(process) for process in self.family()}
        agents = [process for process, name in family.items() if any(agent in name for agent in AGENTS)]
        self.running.kill()
        self.running.wait()
        _, alive = psutil.wait_procs([process for process in family if process not in agents], timeout=LINGER_S)
        for process in (*alive, *agents):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        left = [family[process] for process in alive]
        assert not left, f"still there after {LINGER_S} s: {left}; {self.text()}"


def name_of(process: psutil.Process) -> str:
    """A process's command; "" once it has ended."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture
def job(source: str, weights: str, tmp_path: Path) -> Iterator[Job]:
    job = new_job(source, weights, tmp_path / "out", tmp_path / "log")
    yield job
    if job.process is not None and job.process.poll() is None:
        job.kill()


def new_job(source: str, weights: str, output: Path, log: Path) -> Job:
    return Job(["--input", source, "--output", str(output), "--weights", weights, *OPTIONS], output, log)


@pytest.fixture(scope="module")
def quiet(source: str, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nobody disturbs."""
    path = tmp_path_factory.mktemp("quiet")
    new_job(source, weights, path / "out", path / "log").start().finish()
    return path / "out"


def assert_same(job: Job, quiet: Path) -> None:
    """The same files, byte for byte; the same rows, but for who did them, when and how fast; nothing left over."""
    assert outputs(str(job.output)) == outputs(str(quiet)), job.text()
    mine, expected = manifest(str(job.output)), manifest(str(quiet))
    assert len(mine) == LOOSE + 2 * TARS, job.text()
    assert {key: lasting(row, job.output) for key, row in mine.items()} == {
        key: lasting(row, quiet) for key, row in expected.items()
    }, job.text()
    assert (job.output / "report.html").exists()
    left = [path for path in job.output.rglob("*") if path.name.endswith(".tmp") or "units" in path.parts]
    assert not [path for path in left if path.is_file()], job.text()


def lasting(row: ResultRow, output: Path) -> dict[str, Any]:
    """What of a row does not depend on the session that wrote it."""
    passing = ("seconds_read", "seconds_model", "seconds_write", "worker", "finished")
    return {
        name: value.removeprefix(str(output)) if isinstance(value, str) else value
        for name, value in row._asdict().items()
        if name not in passing
    }


@real_job
def test_killed_models_are_replaced(job: Job, quiet: Path) -> None:
    moments = random.Random(SEED)
    job.listed(quiet).start()
    killed: set[int] = set()
    for number in sorted(moments.sample(range(UNITS - 4), 3)):
        job.until(lambda number=number: job.records() > number and any(m.pid not in killed for m in job.models()))
        time.sleep(moments.random() * 0.3)
        for model in job.models():
            killed.add(model.pid)
            model.kill()
    text = job.finish()

    assert len(killed) >= 2, text
    assert_same(job, quiet)


@real_job
def test_a_killed_driver_loses_nothing(job: Job, quiet: Path) -> None:
    moments = random.Random(SEED + 1)
    listings = job.output / "_ldbfr" / "plan" / "archives"
    middle = moments.randrange(1, UNITS - 4)

    job.start()
    job.until(lambda: len(list(listings.glob("*.json"))) > moments.randrange(TARS // 2))
    job.kill()
    assert not manifest(str(job.output))
    for number in (middle, UNITS - 2):
        job.start()
        job.until(lambda number=number: job.records() >= number)
        job.kill()
    text = job.start().finish()

    assert text.count("which has ended without a word") == 3, text
    assert "of which nothing was heard" not in text, "the lock was waited for"
    assert_same(job, quiet)
    finished = job.log.stat().st_size
    job.start().finish()
    assert "starting Ray" not in job.log.read_bytes()[finished:].decode()


@pytest.mark.long
@real_job
def test_an_interrupted_run_goes_on(job: Job, quiet: Path) -> None:
    moments = random.Random(SEED + 2)
    number = moments.randrange(1, UNITS - 6)
    job.listed(quiet).start()
    job.until(lambda: job.records() >= number)
    family = job.family()
    os.killpg(job.running.pid, signal.SIGINT)  # as Ctrl-C does

    text = job.finish(code=restore.EXIT_INTERRUPTED)
    assert "the same command goes on from here" in text
    assert "Traceback" not in text
    _, alive = psutil.wait_procs(family, timeout=LINGER_S)
    assert not alive, text
    text = job.start().finish()
    assert "of them are done already" in text
    assert "taking over" not in text, "it let go of the lock"
    assert_same(job, quiet)


@pytest.mark.long
@real_job
def test_a_lost_node_is_made_up_for(job: Job, quiet: Path) -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    system = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False, "_system_config": system}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        # As many threads as in the quiet run, for the last bit of a pixel depends on them; one CPU more reads.
        cpus = num_cores() + 1
        nodes = [cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20) for _ in range(2)]
        job.environment["RAY_ADDRESS"] = cluster.address
        job.listed(quiet).start()
        job.until(lambda: job.records() > random.Random(SEED + 3).randrange(UNITS - 8))
        cluster.remove_node(busiest(nodes), allow_graceful=False)
        job.finish()
    finally:
        cluster.shutdown()
    assert_same(job, quiet)


def busiest(nodes: list[Any]) -> Any:
    """The node with a model, or else any: which one has it is Ray's choice."""
    for node in nodes:
        for info in node.all_processes["raylet"]:
            children = psutil.Process(info.process.pid).children(recursive=True)
            if any("ModelActor" in name_of(child) for child in children):
                return node
    return nodes[0]


@pytest.mark.long
@real_job
def test_a_full_disk_is_named_and_the_rest_follows(job: Job, quiet: Path) -> None:
    job.output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(job.output)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this needs a small tmpfs, which this user may not mount")
    try:
        text = job.listed(quiet).start().finish(code=restore.EXIT_INCOMPLETE)
        assert "the disk is full; free some space" in text
        assert "Traceback" not in text
        assert len(outputs(str(job.output))) > 8
        assert not manifest(str(job.output))
        subprocess.run(["mount", "-o", "remount,size=64m", str(job.output)], check=True)
        job.start().finish()
        assert_same(job, quiet)
    finally:
        subprocess.run(["umount", str(job.output)], check=True)


# ---- clocks ----


def test_a_clock_that_jumps_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forward and back by hours, between sessions and within them."""
    moments, true = random.Random(SEED + 4), time.time
    shift = [0.0]
    monkeypatch.setattr(time, "time", lambda: true() + shift[0])
    archiving.without_ray(monkeypatch)
    files = {f"{number:02d}.png": png(number) for number in range(24)}
    source, output = archiving.folder(tmp_path / "in", files), str(tmp_path / "out")
    weights = archiving.save_weights(tmp_path / "weights")
    options = ["--weights", weights, "--steps", "2", "--shard-images", "4", "--batch-size", "3"]
    execute = LocalExecution.__call__

    def interrupted(execution: LocalExecution, items: list[WorkItem]) -> Iterator[Any]:
        for number, result in enumerate(execute(execution, items)):
            shift[0] = moments.choice((-1, 1)) * moments.uniform(1, 30) * 3600
            if number == 2:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(LocalExecution, "__call__", interrupted)
    codes = []
    while not codes or codes[-1]:
        codes.append(restore.main(["--input", source, "--output", output, *options]))
        shift[0] = moments.choice((-1, 1)) * moments.uniform(1, 30) * 3600
        assert len(codes) < 6, f"seed {SEED}: {codes}"

    assert codes == [restore.EXIT_INTERRUPTED] * 2 + [restore.EXIT_OK], f"seed {SEED}"
    assert {row.status for row in manifest(output).values()} == {"restored"}
    assert set(outputs(output)) == set(files)
    assert "24 of 24 images restored, 0 failed" in capsys.readouterr().out
    assert storage.exists(storage.join(output, "report.html"))
