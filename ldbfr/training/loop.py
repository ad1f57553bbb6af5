"""The training loop: optimisers, precision, accumulation, EMA, logging, checkpoints, resume.

All randomness of a step follows from (seed, stage, step) and a checkpoint holds all state, so a resumed run continues
bit for bit on the CPU.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn

from ldbfr.config import StageSettings
from ldbfr.data.index import FaceImages
from ldbfr.data.sampler import Batch, BatchSampler
from ldbfr.errors import ConfigError, LDBFRError, WeightsError
from ldbfr.models.loading import load_network
from ldbfr.training.checkpoint import (
    latest_checkpoint,
    prune_checkpoints,
    read_state,
    read_training,
    save_checkpoint,
)
from ldbfr.training.progress import StageLog
from ldbfr.training.runtime import Runtime
from ldbfr.training.stages import Losses, Stage

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


class Trainer:
    """Trains one stage.

    Args:
        stage: networks and losses.
        images: the training set.
        preview_images: images shown in the log's grids.
        folder: RUN/<stage>.
        runtime: where this process runs.
        upstream: digests of the networks that the stage builds on, kept in the checkpoints.

    Raises:
        ConfigError: more workers than images in a batch.
    """

    def __init__(
        self,
        stage: Stage,
        images: FaceImages,
        preview_images: FaceImages,
        folder: Path,
        runtime: Runtime,
        upstream: dict[str, str],
    ) -> None:
        self.stage, self.images, self.folder, self.runtime = stage, images, folder, runtime
        self.settings = stage.settings
        if runtime.world_size > self.settings.batch_size:
            raise ConfigError(
                f"training.{stage.name}.batch_size {self.settings.batch_size} is less than one image for each of the "
                f"{runtime.world_size} workers: raise it, or take fewer workers"
            )
        training = stage.preset.training
        self.memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        stage.to(runtime.device).to(memory_format=self.memory_format)
        self.module = runtime.wrap(stage)
        self.groups = stage.trainable()
        self.optimizers = {name: self.make_optimizer(parameters) for name, parameters in self.groups.items()}
        self.ema = EMAModel(self.groups["generator"], decay=self.settings.ema_decay, use_ema_warmup=True, foreach=True)
        profile = self.settings.profile if stage.uses_lq else None
        self.sampler = BatchSampler(
            images, self.settings.batch_size, training.seed, stage.name, self.settings.flip, profile
        )
        shown = min(8, len(preview_images))
        preview = BatchSampler(preview_images, shown, training.seed, "preview", False, profile)
        self.preview_batch = preview.batch(0).to(runtime.device, self.memory_format)
        self.upstream = upstream
        self.step = 0
        self.resumed_from: Path | None = None

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW; with no weight decay, the paper's Adam."""
        settings = self.settings
        return torch.optim.AdamW(
            parameters, settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, foreach=True
        )

    def train(self) -> Path:
        """Resume where the newest valid checkpoint stands, and train to the target step.

        Returns:
            The newest checkpoint: of the target step, or of an earlier one when the runtime asked to stop.

        Raises:
            TrainingError: a loss is not finite; the text names step and batch. The last checkpoint is untouched.
            WeightsError: the run's checkpoints belong to other settings.
        """
        checkpoint = self.resumed_from or self.resume()
        if checkpoint is not None and self.step >= self.settings.steps:
            return checkpoint
        self.stage.prepare(self.images, self.runtime.device)
        first = self.step
        with StageLog(self.folder, self.stage.name, self.settings, first) as stage_log:
            for batch in self.batches():
                started = time.perf_counter()
                self.set_learning_rate()
                losses = self.optimize(batch)
                losses |= self.stage.after_step(self.step)
                self.ema.step(self.groups["generator"])
                self.step += 1
                losses["learning_rate"] = learning_rate(self.settings, self.step - 1)
                stage_log.step(self.step, losses, time.perf_counter() - started)
                self.runtime.report(losses)
                if self.due(self.settings.images_every):
                    stage_log.images(self.step, self.preview())
                stopping = self.runtime.should_stop()
                if stopping or self.due(self.settings.checkpoint_every):
                    checkpoint = self.save()
                if stopping:
                    log.warning("%s stopped at step %d of %d", self.stage.name, self.step, self.settings.steps)
                    break
        assert checkpoint is not None  # at least one step was made, and the last one saves
        return checkpoint

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the last step always counts."""
        return self.step % every == 0 or self.step == self.settings.steps

    def batches(self) -> Iterator[Batch]:
        """This worker's batches from the current step on, each made while the one before is trained on."""
        rank, size = self.runtime.rank, self.runtime.world_size
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead = pool.submit(self.sampler.batch, self.step, rank, size)
            for step in range(self.step, self.settings.steps):
                batch = ahead.result()
                if step + 1 < self.settings.steps:
                    ahead = pool.submit(self.sampler.batch, step + 1, rank, size)
                yield batch.to(self.runtime.device, self.memory_format)

    def optimize(self, batch: Batch) -> dict[str, float]:
        """One optimiser step of every active objective on the global batch; returns the losses."""
        self.stage.network.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        active = [name for name in self.groups if self.stage.active(name, self.step)]
        for part in batch.split(self.settings.gradient_accumulation):
            share = len(part) / self.settings.batch_size
            for name in active:
                losses = self.backward(name, part, share)
                for key, value in losses.items():
                    label = key if name == "generator" else f"{name}_{key}"
                    totals[label] = totals.get(label, 0.0) + value.item() * share
        self.require_grad(self.groups)
        totals = self.reduce(totals)
        for name in active:
            norm = nn.utils.clip_grad_norm_(self.groups[name], self.settings.clip_norm)
            totals["gradient_norm" if name == "generator" else f"{name}_gradient_norm"] = norm.item()
        self.check_finite(totals)
        for name in active:
            self.optimizers[name].step()
        return totals

    def backward(self, objective: str, part: Batch, share: float) -> Losses:
        """Add an objective's gradient on a part of the global batch, weighted by the part's share of it."""
        self.require_grad([objective])
        with torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            losses: Losses = self.module(objective, part, self.step)
        (losses["loss"] * (share * self.runtime.world_size)).backward()
        return {name: value.detach() for name, value in losses.items()}

    def require_grad(self, objectives: Iterable[str]) -> None:
        """Let the parameters of these objectives alone take part in a backward pass."""
        for name, parameters in self.groups.items():
            for parameter in parameters:
                parameter.requires_grad_(name in objectives)

    def reduce(self, totals: dict[str, float]) -> dict[str, float]:
        """The losses of the global batch from the workers' shares of it."""
        means = self.runtime.mean(torch.tensor(list(totals.values()), dtype=torch.float64))
        return dict(zip(totals, (means * self.runtime.world_size).tolist(), strict=True))

    def check_finite(self, totals: dict[str, float]) -> None:
        """Stop before a loss that is no number reaches the weights."""
        wrong = [name for name, value in totals.items() if not math.isfinite(value)]
        if wrong:
            raise TrainingError(
                f"stage {self.stage.name}, step {self.step}: {', '.join(wrong)} is not finite. The last checkpoint in "
                f"{self.folder} is good; run the same command to replay this step, or lower "
                f"training.{self.stage.name}.learning_rate"
            )

    def set_learning_rate(self) -> None:
        """Give every optimiser the step's learning rate."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.settings, self.step)

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
            return {name: images.float().cpu() for name, images in self.stage.preview(self.preview_batch).items()}

    def save(self) -> Path:
        """Write a checkpoint of the current step."""
        settings = self.stage.fixed_settings()
        state = {"stage": self.stage.name, "settings": settings, "upstream": self.upstream}
        training = {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "ema_step": self.ema.optimization_step,
            "extras": {name: module.state_dict() for name, module in self.stage.extras().items()},
        }
        checkpoint = save_checkpoint(self.folder, self.step, state, training, self.networks())
        prune_checkpoints(self.folder, self.settings.keep_checkpoints)
        return checkpoint

    def networks(self) -> Iterator[tuple[str, ModelMixin]]:
        """The network as trained, then with its averaged weights, finished if this is the last step."""
        yield "network", self.stage.network
        with self.averaged() as network:
            if self.step == self.settings.steps:
                network.eval()
                self.stage.finish(self.images, self.runtime.device)
            yield "ema", network

    def resume(self) -> Path | None:
        """Load the newest valid checkpoint, if there is one.

        Raises:
            WeightsError: it was made with other settings, which are listed.
        """
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is None:
            return None
        state = read_state(checkpoint)
        self.check_same_run(state, checkpoint)
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
        self.resumed_from = checkpoint
        log.info("%s continues at step %d of %d", self.stage.name, self.step, self.settings.steps)
        return checkpoint

    def check_same_run(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Refuse a checkpoint of other settings or of other upstream networks."""
        if state["stage"] != self.stage.name:
            raise WeightsError(f"{checkpoint} is of stage {state['stage']!r}, not {self.stage.name!r}")
        differing = [
            f"{key}: {state['settings'].get(key)!r} there, {value!r} now"
            for key, value in self.stage.fixed_settings().items()
            if state["settings"].get(key) != value
        ]
        differing += [
            f"upstream {name}: {state['upstream'].get(name)} there, {digest} now"
            for name, digest in self.upstream.items()
            if state["upstream"].get(name) != digest
        ]
        if differing:
            raise WeightsError(
                f"{checkpoint} was trained with other settings ({'; '.join(differing)}); "
                f"give them again, or choose another --run"
            )
