"""The commands of cluster/'s RayJobs, as KubeRay submits them: to a Ray that wants a token, in the image's layout."""

from __future__ import annotations

import os
import secrets
import shutil
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
from tests import tiny
from tests.archiving import manifest
from tests.conftest import REPOSITORY
from tests.manifests import rendered
from tests.test_job_submit import head_command, stop

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS, JOB_SECONDS = 90, 600


@dataclass(frozen=True)
class Head:
    """A running head, and what its containers have in their environment."""

    address: str
    environment: dict[str, str]


def config_map() -> dict[str, str]:
    """The overlay dev's environment."""
    (found,) = [one for one in rendered("kuberay/overlays/dev/setup") if one["kind"] == "ConfigMap"]
    data: dict[str, str] = found["data"]
    return data


def entrypoint(name: str) -> str:
    """The command of a RayJob of the overlay dev."""
    (found,) = [one for one in rendered(f"kuberay/overlays/dev/{name}") if one["kind"] == "RayJob"]
    command: str = found["spec"]["entrypoint"]
    return command


@pytest.fixture(scope="module")
def head(s3_endpoint: str, s3_bucket: str) -> Iterator[Head]:
    """`ray start --head` where the image has jobs/ and serve/, with the ConfigMap and a token in its environment."""
    folder = Path(tempfile.mkdtemp(prefix="ldbfr-", dir="/tmp"))  # Unix sockets: the path must be short
    image = folder / "image"
    for name in ("jobs", "serve"):
        shutil.copytree(REPOSITORY / name, image / name, ignore=shutil.ignore_patterns("__pycache__"))
    dashboard, command = head_command(folder / "ray")
    environment = {
        **os.environ,
        **config_map(),
        "LDBFR_BUCKET": f"s3://{s3_bucket}/dev",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "LDBFR_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(image), str(REPOSITORY)]),  # the image has ldbfr installed
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=image, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        made = Head(f"http://127.0.0.1:{dashboard}", environment)
        deadline = time.monotonic() + START_SECONDS
        while status(made, environment["RAY_AUTH_TOKEN"]) != 200:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield made
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def status(head: Head, token: str | None) -> int:
    """What the job server answers to whoever has this token; 0 while there is none."""
    request = urllib.request.Request(f"{head.address}/api/jobs/")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return 0


def submit(head: Head, name: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """Submit a RayJob's command as KubeRay's submitter does: no working directory, the shell is the head's."""
    command = (
        f"{RAY} job submit --address {head.address} --submission-id {name}-{secrets.token_hex(4)} -- {entrypoint(name)}"
    )
    return subprocess.run(
        ["bash", "-ce", command],
        cwd="/",
        env={**head.environment, **changed},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
    )


def test_nobody_without_the_token_submits_anything(head: Head) -> None:
    assert status(head, None) == 401
    assert status(head, "another") in (401, 403)
    refused = submit(head, "prepare", RAY_AUTH_TOKEN="another")
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()


def test_prepare_train_and_restore_as_their_manifests_say(head: Head) -> None:
    bucket = head.environment["LDBFR_BUCKET"]
    for number, face in enumerate(tiny.blob_faces(24, side=80)):
        storage.write_bytes(f"{bucket}/raw/{number:02}.png", encode_image(face, "png"))
        if number < 2:
            storage.write_bytes(f"{bucket}/scans/{number}.png", encode_image(face, "png"))

    done = submit(head, "prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert storage.exists(f"{bucket}/faces64/dataset.json")

    done = submit(head, "train")
    assert done.returncode == 0, done.stdout + done.stderr
    assert CheckpointStore(f"{bucket}/runs/dev/hq_vqgan").steps()[0] == 20

    done = submit(head, "restore")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row.status for row in manifest(f"{bucket}/restored").values()} == {"restored"}

    again = submit(head, "train")
    assert again.returncode == 0
    assert "hq_vqgan is finished" in again.stdout
