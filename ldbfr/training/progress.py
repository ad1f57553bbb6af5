"""What a person sees of a training run: a progress bar or log lines with the time left, TensorBoard, picture grids."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ldbfr.config import StageSettings
from ldbfr.images import contact_sheet, encode_image, to_uint8
from ldbfr.storage import write_bytes

log = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class StageLog:
    """Logs one stage: a bar on a terminal, otherwise a line every `log_every` steps; TensorBoard always.

    Args:
        folder: RUN/<stage>; gets `tensorboard/` and `images/`.
        name: of the stage.
        settings: of the stage.
        first_step: where this process starts.
    """

    def __init__(self, folder: Path, name: str, settings: StageSettings, first_step: int) -> None:
        self.folder, self.name, self.settings, self.first_step = folder, name, settings, first_step
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.bar = tqdm(
            total=settings.steps, initial=first_step, desc=name, unit="step", disable=not sys.stderr.isatty()
        )
        self.started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()
        self.writer.close()

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
        if self.bar.disable:
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != "learning_rate")
            log.info(
                "%s %d/%d, %.1f images/s, %s left: %s",
                self.name, step, self.settings.steps, images_per_second, left, shown,
            )  # fmt: skip
        for key, value in values.items():
            self.writer.add_scalar(f"{self.name}/{key}", value, step)
        self.writer.add_scalar(f"{self.name}/images_per_second", images_per_second, step)
        self.writer.add_scalar(f"{self.name}/step_seconds", seconds, step)

    def images(self, step: int, columns: dict[str, Tensor]) -> None:
        """Keep a grid of pictures, one row a face, in TensorBoard and as PNG.

        Args:
            step: steps done.
            columns: pictures (B, 3, S, S) by title.
        """
        rows = [list(row) for row in zip(*(to_uint8(images) for images in columns.values()), strict=True)]
        sheet = contact_sheet(rows, list(columns), cell=128)
        self.writer.add_image(f"{self.name}/faces", sheet, step, dataformats="HWC")
        write_bytes(str(self.folder / "images" / f"step-{step:08d}.png"), encode_image(sheet, "png"))
