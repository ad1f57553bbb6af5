"""An S3 server for the tests: moto's in a process of its own, or the one that LDBFR_TEST_S3_ENDPOINT names.

conftest.py loads this module as a plugin. A server of your own takes its credentials from the environment as usual.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ldbfr import storage

START_TIMEOUT_S = 60


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The server's URL; AWS_ENDPOINT_URL and credentials are set in this process's environment meanwhile."""
    named = os.environ.get("LDBFR_TEST_S3_ENDPOINT")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        storage._s3_client.cache_clear()  # it may have been made for another endpoint
        if named:
            patch.setenv("AWS_ENDPOINT_URL", named)
            yield named
            return
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with moto_server() as endpoint:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            yield endpoint


@pytest.fixture(scope="session")
def s3_bucket(s3_endpoint: str) -> str:
    """The name of a new bucket, shared by the session's tests."""
    boto3 = pytest.importorskip("boto3")
    bucket = f"ldbfr-test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture
def s3_root(s3_bucket: str) -> str:
    """A URI below which this test's objects are alone."""
    return f"s3://{s3_bucket}/{uuid.uuid4().hex[:12]}"


@contextmanager
def moto_server(address: str = "127.0.0.1") -> Iterator[str]:
    """Run moto's S3 server on a free port of an address of this machine, and yield its URL."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "moto.server", "-H", address, "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for_port(address, port, process)
            yield f"http://{address}:{port}"
        except TimeoutError as error:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} did not start:\n{log.read()}") from error
        finally:
            process.terminate()
            process.wait(timeout=START_TIMEOUT_S)


def wait_for_port(address: str, port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((address, port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")
