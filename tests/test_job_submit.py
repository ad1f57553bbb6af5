"""`ray job submit --working-dir . -- python jobs/restore.py`, as the README has it, on a cluster with a dashboard."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ldbfr.images import encode_image
from tests import tiny
from tests.conftest import REPOSITORY

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def job_server() -> Iterator[str]:
    """A head node of its own, with the job server; its address. It runs in the foreground and ends with its process."""
    dashboard, folder = free_port(), tempfile.mkdtemp(prefix="ldbfr-", dir="/tmp")
    command = [RAY, "start", "--head", "--block", "--num-cpus=3", "--object-store-memory=200000000"]
    command += [f"--port={free_port()}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--include-dashboard=true"]
    log = Path(folder, "head.log")
    with log.open("w") as output:
        head = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_the_job_runs_from_an_uploaded_checkout(job_server: str, tmp_path: Path) -> None:
    weights, inputs, output = tmp_path / "weights", tmp_path / "in", tmp_path / "out"
    tiny.new_pipeline().save_pretrained(weights)
    inputs.mkdir()
    for number, face in enumerate(tiny.blob_faces(3)):
        (inputs / f"{number}.png").write_bytes(encode_image(face, "png"))
    (inputs / "bad.png").write_bytes(b"no image")
    checkout = tmp_path / "checkout"
    for part in ("ldbfr", "jobs"):
        ignore = shutil.ignore_patterns("__pycache__", "pretrained")
        shutil.copytree(REPOSITORY / part, checkout / part, ignore=ignore)
    command = [RAY, "job", "submit", "--address", job_server, "--working-dir", str(checkout), "--"]
    command += ["python", "jobs/restore.py", "--input", str(inputs), "--output", str(output)]
    command += ["--weights", str(weights), "--steps", "1"]
    done = None
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for _ in range(60):  # until the job server is up
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path)
        if "Failed to connect" not in done.stderr + done.stdout:
            break
    assert done is not None
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    rows = pq.read_table(output / "manifest.parquet").to_pylist()
    assert sorted((row["key"], row["status"]) for row in rows) == [
        ("0.png", "restored"), ("1.png", "restored"), ("2.png", "restored"), ("bad.png", "failed"),
    ]  # fmt: skip
