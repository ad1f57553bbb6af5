"""The preparation of data as Ray Data flows: independent items -> workers -> small results, as they come."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.data.context import DataContext

from jobs.connection import num_cores
from jobs.flow import Workers, place_workers, quieten
from ldbfr.data.index import Faces
from ldbfr.data.latents import LatentPart
from ldbfr.data.shards import ShardedFaces
from ldbfr.errors import LDBFRError, WeightsError
from ldbfr.preparation.latents import BATCH_SIZE, LatentRequest, encode_part
from ldbfr.preparation.run import Item, Result

if TYPE_CHECKING:  # workers that write shards import this file too, and do without the networks
    from ldbfr.models.vqgan import VQGAN

MOST_BLOCKS = 10_000


def num_cpus() -> int:
    """Of the whole cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


@dataclass(frozen=True)
class RayRunner:
    """Carries out a step of a preparation on the cluster, as `ldbfr.preparation.run.Runner`.

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
        yield from flow(items, partial(each_item, step=step), compute=compute, num_cpus=1)


def flow(items: Sequence[Any], work: Any, **how: Any) -> Iterator[Any]:
    """Send items through Ray Data, one at a time to a worker, and unpack what it gives; an error is raised here."""
    if not items:
        return
    with small_blocks():
        packed = [{"value": pickle.dumps(item)} for item in items]
        results = ray.data.from_items(packed, override_num_blocks=min(len(items), MOST_BLOCKS)).map_batches(
            work, batch_size=1, batch_format="pyarrow", **how
        )
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            for value in cast(pa.Table, table)["value"].to_pylist():
                result = pickle.loads(value)
                if isinstance(result, LDBFRError):
                    raise result
                yield result


@contextmanager
def small_blocks() -> Iterator[None]:
    """Results come here one by one, not once 128 MB of them are together: they are a few hundred bytes each."""
    quieten()
    context = DataContext.get_current()
    before = context.target_max_block_size, context.execution_options.preserve_order
    context.target_max_block_size, context.execution_options.preserve_order = 1, False
    try:
        yield
    finally:
        context.target_max_block_size, context.execution_options.preserve_order = before


def each_item(table: pa.Table, step: Callable[[Any], Iterator[Any]]) -> Iterator[pa.Table]:
    """What a step gives for the items of a batch; an LDBFRError travels as a result, since Ray would wrap it."""
    for value in table["value"].to_pylist():
        try:
            for result in step(pickle.loads(value)):
                yield pa.table({"value": [pickle.dumps(result)]})
        except LDBFRError as error:
            yield pa.table({"value": [pickle.dumps(error)]})


# ---- latents ----


def place_encoders(count: int | None, device: str | None, own: bool) -> Workers:
    """One encoder on every GPU, or on every CPU with one thread: with more, the last bit would depend on how many."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if count is None:
        count = gpus if gpus and device != "cpu" else num_cores() if own else max(1, num_cpus() - 1)
    workers = place_workers(count, device, BATCH_SIZE, own)
    return Workers(count, workers.device, 1, BATCH_SIZE)


def encode_splits(
    requests: Sequence[LatentRequest], run: str, workers: Workers
) -> Iterator[tuple[LatentRequest, LatentPart]]:
    """Encode the parts of splits that are not there, in any order, and give all of them.

    Args:
        requests: which splits.
        run: of the training with the VQGAN.
        workers: see `place_encoders`.

    Raises:
        LDBFRError: what a worker raised.
    """
    gpus = ray.cluster_resources().get("GPU", 0) if workers.device.startswith("cuda") else 0
    items = [(request, number) for request in requests for number in range(request.num_parts)]
    yield from flow(
        items,
        Encoder,
        fn_constructor_args=(run, workers),
        compute=ActorPoolStrategy(size=min(workers.count, len(items))),
        num_cpus=1,
        num_gpus=min(1, gpus / workers.count),
    )


class Encoder:
    """An actor that encodes parts; it loads the network with the first one.

    Args:
        run: of the training with the VQGAN.
        workers: device and threads.
    """

    def __init__(self, run: str, workers: Workers) -> None:
        self.run, self.workers = run, workers
        self.loaded: tuple[VQGAN, str] | None = None
        self.faces: dict[str, Faces] = {}

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """The parts of a batch."""
        yield from each_item(table, self.encode)

    def encode(self, item: tuple[LatentRequest, int]) -> Iterator[tuple[LatentRequest, LatentPart]]:
        """One part.

        Raises:
            WeightsError: this node has another VQGAN than the driver's.
            LDBFRError: the data cannot be read, or the part not written.
        """
        request, number = item
        if self.loaded is None:
            self.loaded = self.load()
        vqgan, digest = self.loaded
        if digest != request.vqgan_digest:
            raise WeightsError(f"{self.run} on this node has another VQGAN than the driver's; copy it to every node")
        if request.split not in self.faces:
            self.faces[request.split] = ShardedFaces.open(request.root_uri, request.split)
        yield request, encode_part(vqgan, self.faces[request.split], request, number)

    def load(self) -> tuple[VQGAN, str]:
        """The VQGAN and its digest."""
        import torch

        from ldbfr.training.export import read_run_preset
        from ldbfr.training.run import load_stage_network

        torch.set_num_threads(self.workers.threads)
        network, digest = load_stage_network(self.run, "latent_vqgan", read_run_preset(self.run))
        return cast("VQGAN", network.eval().to(self.workers.device)), digest
