"""The restoration as a Ray Data flow: plan -> read -> model actors -> write -> rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import ray
import ray.data
import ray.exceptions

from ldbfr import storage
from ldbfr.archive.plan import Plan
from ldbfr.archive.rows import FaceRow, from_table, to_table
from ldbfr.archive.settings import RestoreSettings, Weights
from ldbfr.archive.steps import Reader, Writer, restore_faces
from ldbfr.errors import ConfigError, LDBFRError, WeightsError

REPOSITORY = str(Path(__file__).resolve().parent.parent)
"""What workers import must be this checkout, also where ldbfr is not installed."""
OBJECT_STORE_BYTES = 2**30
"""Enough for the batches under way; the pictures never lie there all at once."""


@dataclass(frozen=True)
class Workers:
    """The model's actors: how many, on what, with how many CPU threads each."""

    count: int
    device: str
    threads: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.count} worker(s) on {self.device}, {self.threads} threads each, batches of {self.batch_size}"


@contextmanager
def cluster(num_workers: int) -> Iterator[bool]:
    """The Ray cluster that RAY_ADDRESS names (`ray job submit` sets it), or one of our own that ends with us.

    Yields whether it is our own.
    """
    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS")
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if address:
        # A submitted job's working directory is on its workers' path already.
        runtime_env = None if submitted else {"env_vars": {"PYTHONPATH": REPOSITORY}}
        ray.init(address, runtime_env=runtime_env, logging_level=logging.WARNING)
    else:
        start_own_cluster(num_workers)
    try:
        yield not address
    finally:
        ray.shutdown()


def start_own_cluster(num_workers: int) -> None:
    """Start Ray on this machine."""
    paths = (REPOSITORY, os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    cores = num_cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ray.init(
        "local",
        # Reading and writing come on top of the model's threads: they wait for the disk, or take turns with them.
        num_cpus=num_workers * max(1, cores // num_workers) + max(1, cores // 2),
        object_store_memory=min(OBJECT_STORE_BYTES, int(0.3 * memory)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def place_workers(count: int, device: str | None, batch_size: int, own: bool) -> Workers:
    """Divide the cluster's CPUs among the workers, leaving one at least for reading and writing.

    Raises:
        ConfigError: the cluster is too small, or has no GPU where one is asked for.
    """
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0)
    if device is None:
        device = "cuda" if gpus else "cpu"
    if device.startswith("cuda") and not gpus:
        raise ConfigError(f"--device {device}: the cluster has no GPU; leave it out to run on CPUs")
    if cpus < count + 1:
        raise ConfigError(f"--workers {count}: they and their readers need {count + 1} CPUs, the cluster has {cpus}")
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    threads = max(1, num_cores() // count) if own else max(1, min((cpus - 1) // count, largest - 1))
    return Workers(count, device, threads, batch_size)


def restored_rows(
    plan: Plan, output: str, weights: Weights, settings: RestoreSettings, workers: Workers
) -> Iterator[FaceRow]:
    """Carry out the plan: one result row per planned input, in the plan's order, as they come.

    The pictures stay with the workers, a few batches at a time; only rows come here.
    """
    quieten()
    gpus = ray.cluster_resources().get("GPU", 0) if workers.device.startswith("cuda") else 0
    results = (
        # Not read_parquet: that passes over folders whose names begin with an underscore.
        ray.data.from_items([{"part": uri} for uri in plan.parts], override_num_blocks=len(plan.parts))
        .map_batches(planned_rows, batch_size=1, batch_format="pyarrow")
        .repartition(target_num_rows_per_block=workers.batch_size)
        .map_batches(
            partial(each_row, step=Reader(settings.side, frozenset(plan.picks))),
            batch_size=workers.batch_size,
            batch_format="pyarrow",
        )
        .map_batches(
            FaceRestorer,
            fn_constructor_args=(weights.reference, weights.digest, settings, workers),
            compute=ray.data.ActorPoolStrategy(size=workers.count),
            num_cpus=workers.threads,
            num_gpus=min(1, gpus / workers.count),
            batch_size=workers.batch_size,
            batch_format="pyarrow",
        )
        .map_batches(
            partial(each_row, step=Writer(output, settings)),
            batch_size=workers.batch_size,
            batch_format="pyarrow",
        )
    )
    with worker_errors():
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from from_table(table)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn an LDBFRError that a worker raised, as when it could not load the weights, into one raised here."""
    try:
        yield
    except ray.exceptions.RayError as error:
        _, raised_on_purpose, text = str(error).rpartition("\nldbfr.errors.")
        if not raised_on_purpose:
            raise
        raise LDBFRError(f"a worker cannot start: {text.partition(': ')[2].strip()}") from error


def planned_rows(table: pa.Table) -> pa.Table:
    """The rows of one part of the plan."""
    (uri,) = table["part"].to_pylist()
    return pa.parquet.read_table(pa.BufferReader(storage.read_bytes(uri)))


def each_row(table: pa.Table, step: Callable[[FaceRow], FaceRow]) -> pa.Table:
    """Apply a step to every row."""
    return to_table([step(row) for row in from_table(table)])


class FaceRestorer:
    """A model actor: loads the weights once, then restores batches.

    Args:
        reference: finds the weights on this node.
        digest: of the weights that the run was planned with.
        settings: of the restoration.
        workers: device and threads.

    Raises:
        WeightsError: this node has other weights.
    """

    def __init__(self, reference: str, digest: str, settings: RestoreSettings, workers: Workers) -> None:
        import torch  # here, because readers and writers, who import this file too, would wait seconds for it

        from ldbfr.pipeline import LDBFRPipeline

        torch.set_num_threads(workers.threads)
        self.settings = settings
        self.pipeline = LDBFRPipeline.from_pretrained(reference, device=workers.device)
        if self.pipeline.weights_digest != digest:
            raise WeightsError(f"{reference} on this node has other weights than the driver's; copy them to every node")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Restore the rows that have been read."""
        return to_table(restore_faces(self.pipeline, from_table(table), self.settings))


def quieten() -> None:
    """Ray Data's own progress bars and chatter off: the job has its own."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that they are off
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)  # prints the trace of what is raised anyway
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
