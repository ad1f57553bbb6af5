"""What the jobs share of Ray Data: where the model's actors go, and items that flow through steps to small results."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.data.context import DataContext

from jobs.connection import num_cores
from jobs.nodes import nodes_for_workers
from ldbfr.errors import ConfigError, LDBFRError
from ldbfr.runner import Item, Result

MOST_BLOCKS = 10_000


@dataclass(frozen=True)
class Workers:
    """The model's actors: how many at least and at most, on what, with how many CPU threads and what of a GPU each."""

    count: int
    device: str
    threads: int
    batch_size: int
    least: int = 0
    gpus: float = 0.0

    def __str__(self) -> str:
        count = f"{self.least} to {self.count}" if self.least else str(self.count)
        what = f"{self.gpus:g} of a GPU" if 0 < self.gpus < 1 else self.device
        return f"{count} worker(s) on {what}, {self.threads} threads each, batches of {self.batch_size}"

    def pool(self, most: int | None = None) -> ActorPoolStrategy:
        """The pool of actors; not more than there is work for."""
        count = min(self.count, most) if most else self.count
        if self.least and self.least < count:
            return ActorPoolStrategy(min_size=self.least, max_size=count)
        return ActorPoolStrategy(size=count)


def place_workers(
    count: int, device: str | None, batch_size: int, own: bool, least: int = 0, gpus: float | None = None
) -> Workers:
    """Divide the cluster's CPUs among the workers, leaving one at least for reading and writing.

    On GPUs a worker takes one CPU alone, and the rest reads and writes.

    Raises:
        ConfigError: the cluster is too small, or has no GPU where one is asked for.
    """
    nodes = nodes_for_workers()
    cpus, there = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    if device is None:
        device = "cuda" if there else "cpu"
    on_gpus = device.startswith("cuda")
    if on_gpus and not there:
        raise ConfigError(f"--device {device}: the cluster has no GPU; leave it out to run on CPUs")
    if cpus < (least or count) + 1:
        needed = (least or count) + 1
        raise ConfigError(f"--workers {count}: they and their readers need {needed} CPUs, the cluster has {cpus}")
    largest = max(int(node.get("CPU", 0)) for node in nodes)
    threads = max(1, num_cores() // count) if own else max(1, min((cpus - 1) // count, largest - 1))
    share = gpu_share(count, there, gpus) if on_gpus else 0.0
    return Workers(count, device, 1 if on_gpus else threads, batch_size, least, share)


def gpu_share(count: int, there: int, asked: float | None) -> float:
    """What of a GPU each worker takes: all of one, or an equal part where there are more workers than GPUs.

    Raises:
        ConfigError: that many do not fit.
    """
    share = 1 / max(1, math.ceil(count / there)) if asked is None else asked
    if there * int(1 / share) < count:
        raise ConfigError(
            f"--gpus-per-worker {share:g}: {count} workers do not fit on {there} GPUs; ask for fewer workers, or for "
            "smaller shares"
        )
    return share


def num_cpus() -> int:
    """Of the whole cluster, less those of the driver."""
    return max(1, int(sum(node.get("CPU", 0) for node in nodes_for_workers())))


def quieten() -> None:
    """Ray Data's own progress bars and chatter off: the job has its own."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that they are off
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)  # prints the trace of what is raised anyway
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # they print a page where a worker takes more than it claimed


# ---- items through steps ----


@dataclass(frozen=True)
class Stage:
    """A step of a flow, and how Ray Data runs it.

    Args:
        work: a function of a table with a column `value`, or the class of an actor that is called so.
        how: options of `map_batches`.
    """

    work: Any
    how: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RayRunner:
    """Carries out a step on the cluster, as `ldbfr.runner.Runner`.

    Args:
        workers: items done at a time, one CPU each.
    """

    workers: int

    def __call__(self, step: Callable[[Item], Iterator[Result]], items: Sequence[Item]) -> Iterator[Result]:
        """The results, in any order.

        Raises:
            LDBFRError: what a worker raised; the rest is called off.
        """
        compute = TaskPoolStrategy(min(self.workers, len(items), MOST_BLOCKS) or 1)
        yield from flow(items, Stage(partial(each_item, step=step), {"compute": compute, "num_cpus": 1}))


def flow(items: Sequence[Any], *stages: Stage) -> Iterator[Any]:
    """Send items through the stages, one at a time to a worker, and unpack what comes out; an error is raised here.

    Raises:
        LDBFRError: what a worker raised on purpose.
    """
    if not items:
        return
    with small_blocks(), worker_errors():
        rows = [{"value": pickle.dumps(item)} for item in items]
        results: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=min(len(items), MOST_BLOCKS))
        for stage in stages:
            results = results.map_batches(stage.work, batch_size=1, batch_format="pyarrow", **stage.how)
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            for value in cast(pa.Table, table)["value"].to_pylist():
                result = pickle.loads(value)
                if isinstance(result, LDBFRError):
                    raise result
                yield result


@contextmanager
def small_blocks() -> Iterator[None]:
    """What a worker gives goes on at once, each value a block, not once 128 MB of them are together."""
    quieten()
    context = DataContext.get_current()
    before = context.target_max_block_size, context.execution_options.preserve_order
    context.target_max_block_size, context.execution_options.preserve_order = 1, False
    try:
        yield
    finally:
        context.target_max_block_size, context.execution_options.preserve_order = before


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


def each_item(table: pa.Table, step: Callable[[Any], Iterator[Any]]) -> Iterator[pa.Table]:
    """What a step gives for the items of a batch; an LDBFRError travels as a result, since Ray would wrap it."""
    for value in table["value"].to_pylist():
        item = pickle.loads(value)
        if isinstance(item, LDBFRError):
            yield packed(item)
            continue
        try:
            for result in step(item):
                yield packed(result)
        except LDBFRError as error:
            yield packed(error)


def packed(value: Any) -> pa.Table:
    """A value as a table of one row."""
    # A large binary: a unit of many faces may pass 2 GB, which is where Arrow's plain one ends.
    return pa.table({"value": pa.array([pickle.dumps(value, protocol=5)], type=pa.large_binary())})
