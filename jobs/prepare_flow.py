"""The encoding of prepared data as a Ray Data flow: parts of a split -> encoders -> what they wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import pyarrow as pa
import ray

from jobs.connection import num_cores
from jobs.flow import Stage, Workers, each_item, flow, num_cpus, place_workers
from ldbfr.data.index import Faces
from ldbfr.data.latents import LatentPart
from ldbfr.data.shards import ShardedFaces
from ldbfr.errors import WeightsError
from ldbfr.preparation.latents import BATCH_SIZE, LatentRequest, encode_part

if TYPE_CHECKING:  # workers that write shards import this file too, and do without the networks
    from ldbfr.models.vqgan import VQGAN


def place_encoders(count: int | None, device: str | None, own: bool) -> Workers:
    """One encoder on every GPU, or on every CPU with one thread: with more, the last bit would depend on how many."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if count is None:
        count = gpus if gpus and device != "cpu" else num_cores() if own else max(1, num_cpus() - 1)
    workers = place_workers(count, device, BATCH_SIZE, own)
    return Workers(count, workers.device, 1, BATCH_SIZE, gpus=workers.gpus)


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
    items = [(request, number) for request in requests for number in range(request.num_parts)]
    how = {
        "fn_constructor_args": (run, workers),
        "compute": workers.pool(len(items)),
        "num_cpus": 1,
        "num_gpus": workers.gpus,
    }
    yield from flow(items, Stage(Encoder, how))


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
