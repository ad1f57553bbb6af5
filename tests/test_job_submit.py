"""`ray job submit --working-dir . -- python jobs/…`, as the README has it, on a Ray head of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ldbfr import storage
from ldbfr.images import encode_image
from ldbfr.training.checkpoint import CheckpointStore
from ldbfr.training.scores import read_validations
from tests import tiny
from tests.archiving import manifest, outputs, png, put_files
from tests.conftest import REPOSITORY

RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS, JOB_SECONDS = 90, 180

MARK = """

_describe_fit = describe_fit


def describe_fit(pixels, side):
    return f"by the submitted copy, {_describe_fit(pixels, side)}"
"""


@dataclass(frozen=True)
class Head:
    """A running Ray head: where jobs are submitted, and its files."""

    address: str
    folder: Path


@pytest.fixture(scope="module")
def head(s3_endpoint: str) -> Iterator[Head]:
    """A head node in a process group of its own, which ends with the module; it knows the S3 server."""
    folder = Path(tempfile.mkdtemp(prefix="ldbfr-", dir="/tmp"))  # Unix sockets: the path must be short
    dashboard, agent, client = free_ports(3)
    address = f"http://127.0.0.1:{dashboard}"
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
        "temp-dir": folder,
    }
    command = [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    # The job says "python": on a cluster that is the one that runs Ray.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(address, process, log)
        yield Head(address, folder)
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until jobs are accepted."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/api/jobs/", timeout=10):
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
    shutil.copy(REPOSITORY / ".gitignore", folder)
    with (folder / "ldbfr" / "archive" / "steps.py").open("a") as file:
        file.write(MARK)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "large.bin").write_bytes(bytes(2**20))
    return folder


def submit(head: Head, checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Submit a job from a checkout, and wait for its end."""
    command = [RAY, "job", "submit", "--address", head.address, "--working-dir", ".", "--", "python", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=JOB_SECONDS)


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
    assert "3 of 4 images restored, 1 failed" in done.stdout
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


@pytest.mark.ray
@pytest.mark.s3
def test_submitted_jobs_prepare_data_and_train_on_them_from_bucket_to_bucket(
    head: Head, checkout: Path, s3_root: str
) -> None:
    for number, face in enumerate(tiny.blob_faces(9, side=40)):
        storage.write_bytes(f"{s3_root}/in/{number}.png", encode_image(face, "png"))
    data, run = f"{s3_root}/data", f"{s3_root}/run"
    prepare = ["jobs/prepare.py", "shards", "--input", f"{s3_root}/in", "--output", data]
    prepared = submit(head, checkout, *prepare, "--side", "32", "--val-share", "0.3")
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr

    train = ["jobs/train.py", "--preset", "tiny", "--stage", "hq_vqgan", "--workers", "2", "--cpus-per-worker", "1"]
    trained = submit(head, checkout, *train, "--data", data, "--run", run)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "hq_vqgan runs on 2 worker(s)" in trained.stdout
    assert "hq_vqgan 4/4" in trained.stdout
    assert "validation of hq_vqgan at step 4" in trained.stdout
    assert CheckpointStore(f"{run}/hq_vqgan").steps() == [4, 2]
    assert list(read_validations(f"{run}/hq_vqgan"))[-1] == 4

    refused = submit(head, checkout, *train, "--data", data, "--run", "runs/first")
    assert refused.returncode != 0
    assert "--run runs/first: in a submitted job" in refused.stdout
