"""`ldbfr train`: one stage, or all five in turn, on one machine."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ldbfr.config import load_preset

log = logging.getLogger(__name__)

StageChoice = Literal["all", "hq_vqgan", "latent_vqgan", "dc_vqr", "prior", "enhancer"]


@dataclass(frozen=True)
class Train:
    """Train one stage, or all five in turn, on one machine; `jobs/train.py` does the same on a cluster.

    Running the same command again continues where the newest checkpoint stands; what is finished is passed by.
    Ctrl-C saves a checkpoint and ends; a second Ctrl-C ends at once. Several GPUs of one machine: run it by
    `torchrun --nproc-per-node 4 -m -- ldbfr.cli train …`.

        ldbfr train --preset faces_64 --data faces/ --run runs/first
        ldbfr train --stage dc_vqr --preset faces_64 --data faces/ --run runs/first --set training.dc_vqr.steps=500
    """

    data: tuple[str, ...]
    """Aligned faces: folders, tar or zip files, or one data set of jobs/prepare.py (a folder or s3://…)."""
    run: str
    """The run: a folder or s3://bucket/prefix for checkpoints, logs, pictures."""
    preset: str = "faces_64"
    """Name of a preset (see `ldbfr presets`), or a .toml file."""
    stage: StageChoice = "all"
    """Which stage; "all" runs the five in order."""
    preview_data: tuple[str, ...] = ()
    """Faces shown in the log's picture grids; the training data when left out."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """Override a setting, e.g. --set training.dc_vqr.steps=500; may be given several times."""
    init: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """STAGE=FOLDER: a network that a stage starts from, of `ldbfr convert` or the `ema` folder of a checkpoint."""
    device: str | None = None
    """"cpu", "cuda" or "mps"; the GPU when there is one."""
    threads: int | None = None
    """CPU threads for torch; all cores when left out."""
    track: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Where numbers and pictures go besides TensorBoard."""
    cache_gb: float = 50
    """Disk for data that comes from a bucket, in GB."""

    def __call__(self) -> int:
        """Train; exit code 0 when finished, 130 when stopped before."""
        preset = load_preset(self.preset, self.set)  # a mistyped setting should not wait for torch

        import torch

        from ldbfr.data.shards import open_faces
        from ldbfr.lease import Lease
        from ldbfr.training.run import check_request, check_starts, parse_init, train_run
        from ldbfr.training.runtime import single_or_torchrun
        from ldbfr.training.stages import STAGE_NAMES

        stages = STAGE_NAMES if self.stage == "all" else (self.stage,)
        init = parse_init(self.init)
        check_request(preset, stages, init)
        check_starts(preset, stages, self.run, init)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        cache_bytes = int(self.cache_gb * 1e9)
        images = open_faces(self.data, preset.side, "train", cache_bytes)
        preview = open_faces(self.preview_data, preset.side, "val", cache_bytes) if self.preview_data else images
        log.info("%d images of %d px from %s", len(images), preset.side, ", ".join(self.data))
        runtime = single_or_torchrun(self.device)
        with ExitStack() as stack:
            if runtime.rank == 0:
                holder = f"`ldbfr {' '.join(sys.argv[1:])}`"
                lease = stack.enter_context(Lease.acquire(f"{self.run.rstrip('/')}/_lease", holder))
                runtime.check = lease.check
            finished = train_run(preset, stages, images, preview, self.run, runtime, init, self.track)
        return 0 if finished else 130
