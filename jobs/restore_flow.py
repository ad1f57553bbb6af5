"""The restoration as a Ray Data flow: units of a plan -> read -> model actors -> write -> what was done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import ray

from jobs.connection import connected, num_cores
from jobs.flow import Stage, Workers, each_item, flow
from ldbfr.archive.ledger import UnitDone
from ldbfr.archive.outputs import UnitWriter
from ldbfr.archive.plan import Plan, WorkItem
from ldbfr.archive.settings import RunSettings, Weights
from ldbfr.archive.steps import UnitFailed, UnitReader, UnitRestorer, UnitWork
from ldbfr.errors import WeightsError

if TYPE_CHECKING:  # readers and writers import this file too, and do without the networks
    from ldbfr.photos.finding import FaceFinder
    from ldbfr.pipeline import LDBFRPipeline


WORKER_BYTES = 3 * 2**29
"""Of a model's process, beyond its weights."""
PHOTO_BYTES = 3 * 2**29
"""Of a process that finds the faces of photos, or puts them back."""


@contextmanager
def cluster(num_workers: int) -> Iterator[bool]:
    """The Ray cluster, see `connected`; one of our own has room for the workers and for reading and writing.

    Reading and writing come on top of the model's threads: they wait for the disk, or take turns with them.
    """
    cores = num_cores()
    with connected(num_workers * max(1, cores // num_workers) + max(1, cores // 2)) as own:
        yield own


def suitable_workers(device: str | None, own: bool, weights: Weights, plan: Plan) -> int:
    """How many workers, unless told: one for each GPU, or each core of this machine; not more than there are units.

    On CPUs workers of one thread do more together than one of many threads, and their results do not depend on how
    many cores there are. It follows from the whole plan, so that it is the same when a run is taken up.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus and device != "cpu":
        return gpus
    if not own:
        return 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    each = WORKER_BYTES + 4 * weights.size
    units = sum(part.units for part in plan.parts)
    return max(1, min(num_cores(), int(0.8 * memory / each), units))


@dataclass(frozen=True)
class RayExecution:
    """Does work items on the cluster, as `ldbfr.archive.rounds.Execution`.

    Args:
        output: URI of the run.
        settings: of the run.
        weights: finds the weights on any node.
        workers: the model's actors.
        finder: finds the faces of whole photos; None where every image is one aligned face.
    """

    output: str
    settings: RunSettings
    weights: str
    workers: Workers
    finder: FaceFinder | None = None

    def __call__(self, items: Sequence[WorkItem]) -> Iterator[UnitDone | UnitFailed]:
        """What became of every unit, in any order.

        Raises:
            LDBFRError: a worker cannot start.
        """
        side = self.settings.restore.side
        reader = UnitReader(self.output, side, self.settings.column, finder=self.finder)
        workers = self.workers
        yield from flow(
            items,
            Stage(partial(each_item, step=reader), {"num_cpus": 1, "memory": reading_memory(self.settings)}),
            Stage(
                ModelActor,
                {
                    "fn_constructor_args": (self.weights, self.settings, workers),
                    "compute": workers.pool(sum(len(item.units) for item in items)),
                    "num_cpus": workers.threads,
                    "num_gpus": workers.gpus,
                },
            ),
            Stage(
                partial(each_item, step=WriteStep(UnitWriter(self.output, self.settings))),
                {"num_cpus": 1, **({"memory": photo_bytes(self.finder.settings.scale)} if self.finder else {})},
            ),
        )


def reading_memory(settings: RunSettings) -> int:
    """Bytes that a reader claims: its process, its faces, and room to decode.

    It also keeps Ray from joining the reading with the actors' work, where one would wait for the other.
    """
    if settings.restore.photos is not None:
        return PHOTO_BYTES
    return 2**29 + 2 * 3 * settings.restore.side**2 * settings.shard_images


def photo_bytes(scale: int) -> int:
    """Bytes that a process claims that puts faces back into photos enlarged by a factor."""
    return PHOTO_BYTES * scale


@dataclass(frozen=True)
class WriteStep:
    """The writer as a step; what failed before passes through."""

    writer: UnitWriter

    def __call__(self, work: UnitWork | UnitFailed) -> Iterator[UnitDone | UnitFailed]:
        """What became of the unit."""
        yield work if isinstance(work, UnitFailed) else self.writer(work)


class ModelActor:
    """A model actor: loads the weights once, then restores units.

    Args:
        weights: finds the weights on this node.
        settings: of the run, which has their digest.
        workers: device and threads.

    Raises:
        WeightsError: this node has other weights.
    """

    def __init__(self, weights: str, settings: RunSettings, workers: Workers) -> None:
        import torch  # here, because readers and writers, who import this file too, would wait seconds for it

        from ldbfr.pipeline import LDBFRPipeline

        torch.set_num_threads(workers.threads)
        pipeline: LDBFRPipeline = LDBFRPipeline.from_pretrained(weights, device=workers.device)
        if pipeline.weights_digest != settings.weights:
            raise WeightsError(f"{weights} on this node has other weights than the driver's; copy them to every node")
        self.restorer = UnitRestorer(pipeline, settings.restore, workers.batch_size)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Restore a unit that has been read."""
        yield from each_item(table, self.restore)

    def restore(self, work: UnitWork | UnitFailed) -> Iterator[UnitWork | UnitFailed]:
        """Units pass as they are where reading failed."""
        yield work if isinstance(work, UnitFailed) else self.restorer(work)
