"""The restoration as a Ray Data flow: plan -> read -> model actors -> write -> rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet
import ray
import ray.data
import ray.exceptions

from jobs.connection import connected, num_cores
from ldbfr import storage
from ldbfr.archive.plan import Plan
from ldbfr.archive.rows import FaceRow, from_table, to_table
from ldbfr.archive.settings import RestoreSettings, Weights
from ldbfr.archive.steps import Reader, Writer, restore_faces
from ldbfr.errors import ConfigError, LDBFRError, WeightsError


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
    """The Ray cluster, see `connected`; one of our own has room for the workers and for reading and writing.

    Reading and writing come on top of the model's threads: they wait for the disk, or take turns with them.
    """
    cores = num_cores()
    with connected(num_workers * max(1, cores // num_workers) + max(1, cores // 2)) as own:
        yield own


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
