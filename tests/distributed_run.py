"""A worker of `test_distributed.py`: trains stages through torch.distributed and notes what came of it.

Run as `python -m tests.distributed_run FOLDER RANK WORLD_SIZE PORT STAGE…`.
"""

import json
import os
import sys
from pathlib import Path

import torch

from ldbfr.training.runtime import DistributedRuntime
from tests import tiny

OVERRIDES = {
    # Everything that looks at the whole batch at once, from the first step on.
    "hq_vqgan": ("training.hq_vqgan.reconstruction.discriminator_start=1", "training.hq_vqgan.revive_every=1"),
    "dc_vqr": ("training.dc_vqr.gradient_accumulation=2",),
}


class NotingRuntime(DistributedRuntime):
    """Keeps the losses of every step."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.history: list[dict[str, float]] = []

    def report(self, step: int, metrics: dict[str, float]) -> None:
        self.history.append(metrics)


def main(folder: Path, stages: list[str]) -> None:
    torch.set_num_threads(1)
    for name in stages:
        runtime = NotingRuntime()
        trainer = tiny.new_trainer(folder, name, *OVERRIDES.get(name, ()), runtime=runtime)
        trainer.train()
        weights = {key: value.clone() for key, value in trainer.stage.network.state_dict().items()}
        torch.save(weights, folder / f"{name}-{runtime.rank}.pt")
        (folder / f"{name}-{runtime.rank}.json").write_text(json.dumps(runtime.history))


if __name__ == "__main__":
    _, place, rank, world_size, port, *names = sys.argv
    os.environ.update(RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    main(Path(place), names)
