"""The training loop: optimisers, precision, accumulation, EMA, logging, checkpoints, resume.

All randomness of a step follows from (seed, stage, step) and a checkpoint holds all state, so a resumed run continues
bit for bit on the CPU, and on another number of workers to rounding.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldbfr.config import StageSettings
from ldbfr.data.index import Faces
from ldbfr.data.loader import load_batches
from ldbfr.data.sampler import Batch, BatchSampler
from ldbfr.errors import ConfigError, LDBFRError
from ldbfr.models.loading import load_network
from ldbfr.storage import join, write_bytes
from ldbfr.training.base import Losses, Stage
from ldbfr.training.checkpoint import BackgroundWriter, CheckpointStore, read_state, read_training
from ldbfr.training.progress import StageLog
from ldbfr.training.runtime import Request, Runtime
from ldbfr.training.scores import best_step
from ldbfr.training.snapshot import HostNetworks, Snapshot, on_host
from ldbfr.training.trackers import Tracker

log = logging.getLogger(__name__)


class TrainingError(LDBFRError):
    """Training cannot go on: a loss that is no number."""


def learning_rate(settings: StageSettings, step: int) -> float:
    """Linear warm-up, then constant or cosine decay to a hundredth, as a function of the step alone."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.decay == "cosine":
        share = min(1.0, step / settings.steps)
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2
    return rate


def emulates_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by way of float32, which is slower than float32 itself.

    Of CPUs alone: `ldbfr doctor` tells of GPUs.
    """
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Objective(nn.Module):
    """One objective of a stage as a module of its own, so that its gradients are averaged apart from the others'."""

    def __init__(self, stage: Stage, name: str) -> None:
        super().__init__()
        self.stage, self.name = stage, name

    def forward(self, part: Batch, step: int) -> Losses:
        """The losses on a part of the batch."""
        losses: Losses = self.stage(self.name, part, step)
        return losses


class Trainer:
    """Trains one stage.

    Args:
        stage: networks and losses.
        images: the training set.
        preview_images: images shown in the log's grids.
        stage_uri: RUN/<stage>, a folder or s3://…
        runtime: where this process runs.
        upstream: digests of the networks that the stage builds on and of the data, kept in the checkpoints.
        trackers: where numbers and pictures go; the first worker's alone are used.

    Raises:
        ConfigError: more workers than images in a batch.
    """

    def __init__(
        self,
        stage: Stage,
        images: Faces,
        preview_images: Faces,
        stage_uri: str | Path,
        runtime: Runtime,
        upstream: dict[str, str],
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.stage, self.images, self.stage_uri, self.runtime = stage, images, str(stage_uri), runtime
        self.settings = stage.settings
        if runtime.world_size > self.settings.batch_size:
            raise ConfigError(
                f"training.{stage.name}.batch_size {self.settings.batch_size} is less than one image for each of the "
                f"{runtime.world_size} workers: raise it, or take fewer workers"
            )
        training = stage.preset.training
        self.memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        stage.to(runtime.device).to(memory_format=self.memory_format)
        stage.sum_over_workers = runtime.sum
        self.groups = stage.trainable()
        self.modules = dict(self.wrapped())
        self.optimizers = {name: self.make_optimizer(parameters) for name, parameters in self.groups.items()}
        self.ema = EMAModel(self.groups["generator"], decay=self.settings.ema_decay, use_ema_warmup=True, foreach=True)
        profile = self.settings.profile if stage.uses_lq else None
        self.sampler = BatchSampler(
            images, self.settings.batch_size, training.seed, stage.name, self.settings.flip, profile, noise=stage.noise
        )
        shown = min(8, len(preview_images))
        preview = BatchSampler(preview_images, shown, training.seed, "preview", False, profile)
        self.preview_batch = preview.batch(0).to(runtime.device, self.memory_format)
        self.upstream, self.trackers = upstream, trackers
        self.store, self.writer, self.host = CheckpointStore(self.stage_uri), BackgroundWriter(), HostNetworks()
        self.step = 0
        self.resumed = False

    def wrapped(self) -> Iterator[tuple[str, nn.Module]]:
        """Every objective as the runtime wraps it, looking at its own parameters alone."""
        for name in self.groups:
            self.require_grad([name])
            yield name, self.runtime.wrap(Objective(self.stage, name))
        self.require_grad(self.groups)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW; with no weight decay, the paper's Adam."""
        settings = self.settings
        return torch.optim.AdamW(
            parameters, settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, foreach=True
        )

    def train(self) -> int:
        """Resume where the newest valid checkpoint stands, and train to the target step.

        Returns:
            The step of the newest checkpoint: the target, or an earlier one when the runtime asked to stop.

        Raises:
            TrainingError: a loss is not finite; the text names step and batch. The last checkpoint is untouched.
            StorageError: a checkpoint cannot be written, or data cannot be read. The last checkpoint is untouched.
            WeightsError: the run's checkpoints belong to other settings.
        """
        if not self.resumed:
            self.resume()
        with ExitStack() as stack:
            stack.callback(self.store.close)
            if self.step >= self.settings.steps:
                return self.step
            self.warn_of_emulation()
            latents = self.stage.prepare(self.images, self.runtime.device, self.upstream)
            self.sampler = replace(self.sampler, latents=latents)
            stage_log = None
            if self.runtime.rank == 0:
                stage_log = stack.enter_context(
                    StageLog(self.stage_uri, self.stage.name, self.settings, self.step, self.trackers)
                )
            stack.enter_context(self.writer)  # what is being written comes to its end, whatever happens
            for batch in self.batches():
                if self.train_step(batch, stage_log) == Request.STOP:
                    log.warning("%s stopped at step %d of %d", self.stage.name, self.step, self.settings.steps)
                    break
        self.runtime.sum(torch.zeros(()))  # the others, too, go on only when the last checkpoint is in its place
        self.runtime.close()
        return self.step

    def train_step(self, batch: Batch, stage_log: StageLog | None) -> Request:
        """One step on the global batch, and what is due after it."""
        started = time.perf_counter()
        self.writer.poll()
        self.set_learning_rate()
        losses = self.optimize(batch)
        losses |= self.stage.after_step(self.step)
        self.ema.step(self.groups["generator"])
        losses["learning_rate"] = learning_rate(self.settings, self.step)
        self.step += 1
        if stage_log is not None:
            stage_log.step(self.step, losses, time.perf_counter() - started)
            if self.due(self.settings.images_every):
                stage_log.images(self.step, self.preview())
        self.runtime.report(self.step, losses)
        request = self.heard()
        if request != Request.NONE or self.due(self.settings.checkpoint_every):
            started = time.perf_counter()
            self.save()
            if stage_log is not None:
                stage_log.checkpoint(self.step, time.perf_counter() - started)
        if request != Request.NONE:
            self.writer.wait()  # there may be no next step
        return request

    def heard(self) -> Request:
        """The greatest request that any worker hears, the same on all of them."""
        own = self.runtime.request(self.step)
        flags = self.runtime.sum(torch.tensor([own >= Request.SAVE, own >= Request.STOP], dtype=torch.int32))
        return Request(int((flags > 0).sum()))

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the last step always counts."""
        return self.step % every == 0 or self.step == self.settings.steps

    def batches(self) -> Iterator[Batch]:
        """This worker's batches from the current step on, each made while the one before is trained on."""
        runtime, device = self.runtime, self.runtime.device
        steps, processes = range(self.step, self.settings.steps), self.stage.preset.training.loader_processes
        pin = device.type == "cuda"
        for batch in load_batches(self.sampler, steps, runtime.rank, runtime.world_size, processes, pin):
            yield batch.to(device, self.memory_format)

    def optimize(self, batch: Batch) -> dict[str, float]:
        """One optimiser step of every active objective on the global batch; returns the losses."""
        self.stage.network.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        active = [name for name in self.groups if self.stage.active(name, self.step)]
        parts = batch.split(self.settings.gradient_accumulation)
        self.require_grad(["generator"])
        with self.autocast():
            self.stage.before_step(parts, self.step)
        for part in parts:
            share = len(part) / self.settings.batch_size
            for name in active:
                for key, value in self.backward(name, part, share, last=part is parts[-1]).items():
                    label = key if name == "generator" else f"{name}_{key}"
                    totals[label] = totals.get(label, 0) + value * share
        self.require_grad(self.groups)
        norms = {
            "gradient_norm" if name == "generator" else f"{name}_gradient_norm": nn.utils.clip_grad_norm_(
                self.groups[name], self.settings.clip_norm
            )
            for name in active
        }
        values = torch.cat([self.runtime.sum(stacked(totals)), stacked(norms)]).tolist()  # the step's one wait
        losses = dict(zip([*totals, *norms], values, strict=True))
        self.check_finite(losses)
        for name in active:
            self.optimizers[name].step()
        return losses

    def backward(self, objective: str, part: Batch, share: float, last: bool) -> Losses:
        """Add an objective's gradient on a part of the global batch, weighted by the part's share of it."""
        self.require_grad([objective])
        module = self.modules[objective]
        waits = (
            nullcontext() if last else getattr(module, "no_sync", nullcontext)()
        )  # averaged once, with the last part
        with waits:
            with self.autocast():
                losses: Losses = module(part, self.step)
            (losses["loss"] * (share * self.runtime.world_size)).backward()
        return {name: value.detach() for name, value in losses.items()}

    def autocast(self) -> torch.autocast:
        """The stage's precision."""
        return torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def warn_of_emulation(self) -> None:
        """Say so where the stage's precision makes it slow."""
        if self.runtime.rank == 0 and self.settings.precision == "bf16" and emulates_bf16(self.runtime.device):
            log.warning(
                "%s: precision is bf16, which this processor can only imitate, twenty times slower and more; start "
                "with --set training.%s.precision=fp32",
                self.stage.name,
                self.stage.name,
            )

    def require_grad(self, objectives: Iterable[str]) -> None:
        """Let the parameters of these objectives alone take part in a backward pass."""
        for name, parameters in self.groups.items():
            for parameter in parameters:
                parameter.requires_grad_(name in objectives)

    def check_finite(self, losses: dict[str, float]) -> None:
        """Stop before a loss that is no number reaches the weights, and keep what is needed to look into it."""
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        if not wrong:
            return
        names = self.sampler.names(self.step)
        record = join(self.stage_uri, f"bad-step-{self.step:08d}.json")
        if self.runtime.rank == 0:
            values = {name: str(value) for name, value in losses.items()}
            about = {"step": self.step, "seed": self.stage.preset.training.seed, "losses": values, "images": names}
            write_bytes(record, json.dumps(about, indent=1).encode())
        raise TrainingError(
            f"stage {self.stage.name}, step {self.step}: {', '.join(wrong)} is not finite, on the batch of "
            f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''} (all in {record}). The last checkpoint in "
            f"{self.stage_uri} is good: the same command goes on from it and replays this step with the same batch; "
            f"to get past it, lower training.{self.stage.name}.learning_rate in another --run, or leave the images out"
        )

    def set_learning_rate(self) -> None:
        """Give every optimiser the step's learning rate."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.stage.rate(name) * learning_rate(self.settings, self.step)

    @contextmanager
    def averaged(self) -> Iterator[ModelMixin]:
        """The network with its averaged weights, put back afterwards."""
        parameters = self.groups["generator"]
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield self.stage.network
        finally:
            self.ema.restore(parameters)

    @torch.no_grad()
    def preview(self) -> dict[str, torch.Tensor]:
        """Pictures of the averaged network on fixed images."""
        with self.averaged() as network:
            network.eval()
            # One by one: eight at once may not fit beside everything else.
            pictures = [self.stage.preview(face) for face in self.preview_batch.split(len(self.preview_batch))]
        return {name: torch.cat([each[name].float().cpu() for each in pictures]) for name in pictures[0]}

    def save(self) -> None:
        """Begin to write a checkpoint of the current step; the training goes on meanwhile."""
        if self.runtime.rank != 0:
            return
        self.writer.wait()  # it reads the copies that are made anew now
        if self.step == self.settings.steps:
            with self.averaged() as network, torch.no_grad():
                network.eval()
                self.stage.finish(self.images, self.runtime.device)
        self.writer.submit(partial(self.write, self.step, self.snapshot()))

    def snapshot(self) -> Snapshot:
        """A copy of all state."""
        network = self.stage.network
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        parameters = zip(self.groups["generator"], self.ema.shadow_params, strict=True)
        averages = {names[id(parameter)]: average for parameter, average in parameters}
        networks = {
            "network": self.host.fill("network", network),
            "ema": self.host.fill("ema", network, averages),
        }
        training = {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "ema_step": self.ema.optimization_step,
            "extras": {name: module.state_dict() for name, module in self.stage.extras().items()},
        }
        settings = self.stage.fixed_settings(self.stage.preset)
        state = {"step": self.step, "stage": self.stage.name, "settings": settings, "upstream": self.upstream}
        return Snapshot(networks, on_host(training), state)

    def write(self, step: int, snapshot: Snapshot) -> None:
        """Put a checkpoint in its place, tell, and remove those that need not be kept."""
        self.store.save(step, snapshot.write)
        self.runtime.saved(step)
        best = best_step(self.stage_uri, self.stage.score, self.store.steps()) if self.settings.keep_best else None
        self.store.prune(self.settings.keep_checkpoints, best)

    def resume(self) -> None:
        """Load the newest valid checkpoint, if there is one; every worker loads the one that the first has found.

        Raises:
            WeightsError: it was made with other settings, which are listed.
        """
        self.resumed = True
        found = self.store.latest() if self.runtime.rank == 0 else None
        step = int(self.runtime.sum(torch.tensor(0 if found is None else found[0])))
        if step == 0:
            return
        checkpoint = self.store.fetch(step) if found is None else found[1]
        state = read_state(checkpoint)
        self.stage.check_same_run(self.stage.preset, self.upstream, state, checkpoint)
        training = read_training(checkpoint)
        network = type(self.stage.network)
        self.stage.start_from(load_network(network, checkpoint / "network"))
        averaged = dict(load_network(network, checkpoint / "ema").named_parameters())
        names = {id(p): name for name, p in self.stage.network.named_parameters()}
        for shadow, parameter in zip(self.ema.shadow_params, self.groups["generator"], strict=True):
            shadow.data.copy_(averaged[names[id(parameter)]])
        self.ema.optimization_step = training["ema_step"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(training["optimizers"][name])
        for name, module in self.stage.extras().items():
            module.load_state_dict(training["extras"][name])
        self.step = int(state["step"])
        self.store.close()  # one fetched from a bucket need not lie on the disk until the end
        log.info("%s continues at step %d of %d", self.stage.name, self.step, self.settings.steps)


def stacked(values: dict[str, Tensor]) -> Tensor:
    """Scalars as one vector, float64."""
    return torch.stack([value.detach().double() for value in values.values()])
