"""Fixtures that every part of the suite shares.

The environment is set before anything imports ray or diffusers, because both read it at import time.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.update(
    RAY_AUTH_MODE="disabled",  # otherwise a local cluster writes a token into the home folder
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_worker_niceness="0",  # by itself 15: on a busy machine the tests would starve
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    # The same rounding on every x86 processor: where a gradient vanishes, Adam's step is the sign of the rounding.
    ONEDNN_MAX_CPU_ISA="AVX2",
    ATEN_CPU_CAPABILITY="avx2",
    MKL_CBWR="AVX2",
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background job; what is started inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent

pytest_plugins = ["tests.s3_server"]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator that depends on the test's name alone, so tests do not disturb each other's draws."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of faces, photos and weights beside the checkout; the test is skipped where there is none."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"this test needs the shared data folder, which is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray node for the whole session, with four logical CPUs whatever the machine has."""
    ray = pytest.importorskip("ray")
    # Ray keeps Unix sockets in here, and a socket's path may have about 100 characters.
    folder = tempfile.mkdtemp(prefix="ldbfr-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
        log_to_driver=False,
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
