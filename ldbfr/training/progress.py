"""What a person sees of a training run: a progress bar or log lines with the time left, picture grids, trackers."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from torch import Tensor
from tqdm import tqdm

from ldbfr.config import StageSettings
from ldbfr.images import to_uint8
from ldbfr.progress import duration
from ldbfr.sheets import contact_sheet
from ldbfr.storage import join
from ldbfr.training.trackers import Background, PictureFiles, Tracker

log = logging.getLogger(__name__)


class StageLog:
    """Logs one stage: a bar on a terminal, otherwise a line every `log_every` steps; the same values to the trackers.

    Args:
        stage_uri: RUN/<stage>, local or in a bucket; gets `images/`.
        name: of the stage.
        settings: of the stage.
        first_step: where this process starts.
        trackers: closed with the log.
        quiet: neither bar nor lines.
    """

    def __init__(
        self,
        stage_uri: str,
        name: str,
        settings: StageSettings,
        first_step: int,
        trackers: Sequence[Tracker],
        quiet: bool = False,
    ) -> None:
        self.name, self.settings, self.first_step, self.quiet = name, settings, first_step, quiet
        self.trackers = (*trackers, Background("images", PictureFiles(join(stage_uri, "images"))))
        self.bar = tqdm(
            total=settings.steps, initial=first_step, desc=name, unit="step", disable=quiet or not sys.stderr.isatty()
        )
        self.started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()

    def step(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Note a finished step.

        Args:
            step: steps done.
            values: losses and the like.
            seconds: what the step took.
        """
        self.bar.update()
        if step % self.settings.log_every and step != self.settings.steps and step != self.first_step + 1:
            return
        elapsed = time.monotonic() - self.started
        per_step = elapsed / (step - self.first_step)
        images_per_second = self.settings.batch_size / per_step
        left = duration(per_step * (self.settings.steps - step))
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {images_per_second:.1f} images/s")
        if self.bar.disable and not self.quiet:
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != "learning_rate")
            log.info(
                "%s %d/%d, %.1f images/s, %s left: %s",
                self.name, step, self.settings.steps, images_per_second, left, shown,
            )  # fmt: skip
        noted = {**values, "images_per_second": images_per_second, "step_seconds": seconds}
        for tracker in self.trackers:
            tracker.scalars(step, {f"{self.name}/{key}": value for key, value in noted.items()})

    def images(self, step: int, columns: dict[str, Tensor]) -> None:
        """Keep a grid of pictures, one row a face, with the trackers and as PNG.

        Args:
            step: steps done.
            columns: pictures (B, 3, S, S) by title.
        """
        rows = [list(row) for row in zip(*(to_uint8(images) for images in columns.values()), strict=True)]
        sheet = contact_sheet(rows, list(columns), cell=128)
        for tracker in self.trackers:
            tracker.image(f"{self.name}/faces", step, sheet)

    def checkpoint(self, step: int, seconds: float) -> None:
        """Note a checkpoint and how long it held the training up; what was noted so far goes to where others see it."""
        for tracker in self.trackers:
            tracker.scalars(step, {f"{self.name}/checkpoint_seconds": seconds})
        self.flush()

    def flush(self) -> None:
        """Bring everything noted so far to where others see it, without waiting for it."""
        for tracker in self.trackers:
            tracker.flush()
