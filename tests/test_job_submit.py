"""`ray job submit --working-dir . -- python jobs/…`, as docs/operations.md has it, on a Ray head that wants a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ldbfr import storage
from ldbfr.images import encode_image
from ldbfr.training.checkpoint import CheckpointStore
from ldbfr.training.scores import read_validations
from tests import tiny
from tests.archiving import manifest, outputs, png, put_files
from tests.conftest import REPOSITORY

RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS, JOB_SECONDS = 90, 240

MARK = """

_describe_fit = describe_fit


def describe_fit(pixels, side):
    return f"by the submitted copy, {_describe_fit(pixels, side)}"
"""


METADATA = {"owner": "the tests"}
RESERVED = ("--entrypoint-num-cpus", "1", "--entrypoint-memory", str(2**29))
"""What docs/operations.md reserves for a driver."""


@dataclass(frozen=True)
class Head:
    """A running Ray head: where jobs are submitted, its files, and what its users have in their environment."""

    address: str
    folder: Path
    environment: dict[str, str]

    def ask(self, path: str, token: str | None = None) -> Any:
        """What its HTTP interface answers."""
        given = self.environment.get("RAY_AUTH_TOKEN", "") if token is None else token
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {given}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def head(s3_endpoint: str) -> Iterator[Head]:
    """A head node that wants a token and knows the S3 server; it ends with the module."""
    with running_head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}) as made:
        yield made


@contextmanager
def running_head(more: Mapping[str, str]) -> Iterator[Head]:
    """A head node in a process group of its own, with more in its environment."""
    folder = Path(tempfile.mkdtemp(prefix="ldbfr-", dir="/tmp"))  # Unix sockets: the path must be short
    dashboard, command = head_command(folder)
    # The job says "python": on a cluster that is the one that runs Ray.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    made = Head(f"http://127.0.0.1:{dashboard}", folder, {"PATH": path, **more})
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **made.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(made, process, log)
        yield made
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def head_command(temp_dir: Path) -> tuple[int, list[str]]:
    """`ray start` for a head of three CPUs on ports that are free: its dashboard's port, and the words.

    Args:
        temp_dir: for Ray's files; its path must be short, as Unix sockets lie there.
    """
    dashboard, agent, client = free_ports(3)
    options = {
        "port": 0,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "node-ip-address": "127.0.0.1",
        "num-cpus": 3,
        "num-gpus": 0,
        "object-store-memory": 200 * 2**20,
        "temp-dir": temp_dir,
    }
    return dashboard, [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def wait_until_ready(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until jobs are accepted."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            head.ask("/api/jobs/")
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    pytest.fail(f"no Ray head after {START_SECONDS} s: {log.read_text()}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the head, politely first, and with it whatever is left of its process group."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a job needs, marked so that it can be told from an installed ldbfr, with an environment in it."""
    folder = tmp_path / "checkout"
    for name in ("jobs", "ldbfr"):
        ignore = shutil.ignore_patterns("__pycache__", "pretrained")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(REPOSITORY / name, folder)
    with (folder / "ldbfr" / "archive" / "steps.py").open("a") as file:
        file.write(MARK)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "large.bin").write_bytes(bytes(2**20))
    (folder / "tests").mkdir()
    (folder / "tests" / "large.bin").write_bytes(bytes(2**20))
    return folder


def submit(
    head: Head, checkout: Path, *arguments: str, options: Sequence[str] = RESERVED, environment: Any = None
) -> subprocess.CompletedProcess[str]:
    """Submit a job from a checkout, and wait for its end."""
    command = [RAY, "job", "submit", "--address", head.address, "--working-dir", ".", *options]
    command += ["--metadata-json", json.dumps(METADATA), "--", "python", *arguments]
    env = {**os.environ, **(head.environment if environment is None else environment)}
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=JOB_SECONDS, env=env)


def lines_of(done: subprocess.CompletedProcess[str], kind: str) -> list[str]:
    """What the job itself wrote: from its first line on, to the last before `ray job submit` speaks again."""
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if kind in line)
    return [line for line in lines[first:] if line.strip() and "Job 'raysubmit" not in line and "---" not in line]


def assert_readable(lines: list[str], first: str, last: str) -> None:
    """A log begins with what is to be done and ends with what came of it, without bars, traces or others' remarks."""
    assert first in lines[0], lines
    assert last in lines[-1], lines
    text = "\n".join(lines)
    assert not set("\r\x1b") & set(text), text
    for remark in ("Traceback", "credentials", "it/s", "%|"):
        assert remark not in text, text


@pytest.mark.ray
@pytest.mark.s3
def test_an_archive_goes_from_bucket_to_bucket_by_an_uploaded_checkout(
    head: Head, checkout: Path, tmp_path: Path, s3_root: str
) -> None:
    tiny.new_pipeline().save_pretrained(tmp_path / "weights")
    put_files(f"{s3_root}/in", {f"{number}.png": png(number, 40) for number in range(3)} | {"bad.png": b"no image"})
    arguments = ["--input", f"{s3_root}/in", "--output", f"{s3_root}/out"]
    arguments += ["--weights", str(tmp_path / "weights"), "--steps", "1"]

    done = submit(head, checkout, "jobs/restore.py", *arguments)

    assert done.returncode == 0, done.stdout + done.stderr
    assert_readable(lines_of(done, "restoring"), f"restoring {s3_root}/in into", "3 of 4 images restored, 1 failed")
    assert "1 worker(s) on cpu, 1 threads each" in done.stdout, "of 3 CPUs the driver has one, and the reader"
    assert METADATA in [job["metadata"] for job in head.ask("/api/jobs/")]
    rows = manifest(f"{s3_root}/out")
    assert {row.key: row.status for row in rows.values()} == {
        "0.png": "restored",
        "1.png": "restored",
        "2.png": "restored",
        "bad.png": "failed",
    }
    assert {row.note for row in rows.values() if row.note} == {"by the submitted copy, resized from 40 to 32 px"}
    assert set(outputs(f"{s3_root}/out")) == {"0.png", "1.png", "2.png"}
    assert storage.exists(f"{s3_root}/out/report.html")
    (uploaded,) = head.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/jobs/restore.py")
    assert not (uploaded.parent.parent / ".venv").exists()
    assert not (uploaded.parent.parent / "tests" / "large.bin").exists()


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(600)  # it waits for two jobs
def test_submitted_jobs_prepare_data_and_train_on_them_from_bucket_to_bucket(
    head: Head, checkout: Path, s3_root: str
) -> None:
    for number, face in enumerate(tiny.blob_faces(9, side=40)):
        storage.write_bytes(f"{s3_root}/in/{number}.png", encode_image(face, "png"))
    data, run = f"{s3_root}/data", f"{s3_root}/run"
    prepare = ["jobs/prepare.py", "shards", "--input", f"{s3_root}/in", "--output", data]
    prepared = submit(head, checkout, *prepare, "--side", "32", "--val-share", "0.3")
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    assert_readable(lines_of(prepared, "preparing"), f"preparing {s3_root}/in", f"{data} is finished")

    train = ["jobs/train.py", "--preset", "tiny", "--stage", "hq_vqgan", "--workers", "2", "--cpus-per-worker", "1"]
    trained = submit(head, checkout, *train, "--data", data, "--run", run)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert_readable(lines_of(trained, "training"), "training hq_vqgan of tiny", f"hq_vqgan: finished in {run}")
    assert "hq_vqgan runs on 2 worker(s)" in trained.stdout
    assert "hq_vqgan 4/4" in trained.stdout
    assert "validation of hq_vqgan at step 4" in trained.stdout
    assert CheckpointStore(f"{run}/hq_vqgan").steps() == [4, 2]
    assert list(read_validations(f"{run}/hq_vqgan"))[-1] == 4

    refused = submit(head, checkout, *train, "--data", data, "--run", "runs/first")
    assert refused.returncode != 0
    assert "--run runs/first: in a submitted job" in refused.stdout


@pytest.mark.ray
def test_the_cluster_looks_at_itself_and_lets_nobody_in_without_the_token(head: Head, checkout: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
        head.ask("/api/jobs/", token="not-it")
    stranger = {**head.environment, "RAY_AUTH_TOKEN": "0" * 64}
    refused = submit(head, checkout, "jobs/doctor.py", environment=stranger)
    assert refused.returncode != 0
    assert "authentication" in refused.stdout + refused.stderr

    tiny.new_pipeline().save_pretrained(head.folder / "weights")
    command = ["jobs/doctor.py", "--weights", str(head.folder / "weights"), "--storage", str(head.folder)]
    done = submit(head, checkout, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_readable(lines_of(done, "look at themselves"), "1 node(s) look at themselves", " checks: ")
    assert "ok       versions" in done.stdout


ASK_AS_THE_ENDPOINT = """
import asyncio, sys
from serve.jobs import RayJobs
from serve.protocol import Overloaded
try:
    print([one.id for one in asyncio.run(RayJobs(sys.argv[1]).list())])
except Overloaded as refused:
    print(refused)
"""


@pytest.mark.ray
@pytest.mark.parametrize(("token", "answer"), [(None, "[]"), ("0" * 64, "the cluster's job server does not answer")])
def test_the_endpoint_asks_with_the_clusters_token(head: Head, token: str | None, answer: str) -> None:
    environment = {**os.environ, **head.environment} | ({"RAY_AUTH_TOKEN": token} if token else {})
    command = [sys.executable, "-c", ASK_AS_THE_ENDPOINT, head.address]
    asked = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr
    assert answer in asked.stdout
    assert ("Unauthenticated" in asked.stderr or "nvalid" in asked.stderr) == (token is not None), asked.stderr


def test_what_a_checkout_uploads_is_small_and_has_the_weights(tmp_path: Path) -> None:
    """By Ray's own function, on this checkout."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    constants = pytest.importorskip("ray._private.ray_constants")
    target, excludes = tmp_path / "package.zip", constants.get_runtime_env_default_excludes()
    packaging.create_package(str(REPOSITORY), target, include_gitignore=True, excludes=excludes)
    names = set(zipfile.ZipFile(target).namelist())
    assert target.stat().st_size < packaging.GCS_STORAGE_MAX_SIZE / 4
    assert {"jobs/train.py", "ldbfr/pretrained/faces_128/manifest.json", "serve/app.py", "pyproject.toml"} <= names
    tops = {name.partition("/")[0] for name in names if not name.endswith("/")}
    assert not tops & {".git", ".venv", ".ci", "tests", "benchmarks", "docs", "cluster", "runs", "demo-output"}
