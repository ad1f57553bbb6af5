"""How a job gets its Ray cluster: the one that it was submitted to, or one of its own on this machine."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = str(Path(__file__).resolve().parent.parent)
"""What workers import must be this checkout, also where ldbfr is not installed."""
OBJECT_STORE_BYTES = 2**30
"""Enough for the batches under way; the pictures never lie there all at once."""


def start_log() -> None:
    """A line for what the job does, with the time; without those in which boto tells where it found its credentials."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("botocore").setLevel(logging.WARNING)


def prepare_environment() -> None:
    """What Ray reads at its import: no remarks; for our own cluster, no usage report and nothing in the home folder."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own remarks about how Ray Data and Train use it
    if "RAY_ADDRESS" in os.environ:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's announced default; it warns without
    if "RAY_AUTH_MODE" not in os.environ:  # Ray's default keeps its token in the home folder
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


@contextmanager
def connected(num_cpus: int) -> Iterator[bool]:
    """The Ray cluster that RAY_ADDRESS names (`ray job submit` sets it), or one of our own that ends with us.

    Yields whether it is our own.

    Args:
        num_cpus: logical CPUs of a cluster of our own.
    """
    import ray  # takes seconds, which a mistyped option should not cost

    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS")
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if address:
        # A submitted job's working directory is on its workers' path already.
        runtime_env = None if submitted else {"env_vars": {"PYTHONPATH": REPOSITORY}}
        ray.init(address, runtime_env=runtime_env, logging_level=logging.WARNING, log_to_driver=False)
    else:
        paths = (REPOSITORY, os.environ.get("PYTHONPATH", ""))
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        ray.init(
            "local",
            num_cpus=num_cpus,
            object_store_memory=min(OBJECT_STORE_BYTES, int(0.3 * memory)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield not address
    finally:
        ray.shutdown()


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
