"""A run's progress as Prometheus metrics, through Ray's own exporter: every node of a cluster is scraped already."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from ldbfr.archive.ledger import Counts
from ldbfr.progress import Progress


class RunMetrics:
    """The metrics of a run, tagged with its output; Ray puts `ray_` before their names.

    Args:
        output: URI of the run.
        progress: of the run.
    """

    def __init__(self, output: str, progress: Progress) -> None:
        self.progress, self.tags = progress, {"output": output}
        self.before = Counts()
        self.images = Counter(
            "ldbfr_archive_images_total",
            "Images of the archive that are done, by status",
            tag_keys=("output", "status"),
        )
        tags = ("output",)
        self.planned = Gauge("ldbfr_archive_images_planned", "Images of the archive, done or not", tag_keys=tags)
        self.rate = Gauge("ldbfr_archive_images_per_second", "Images done a second since the start", tag_keys=tags)
        self.left = Gauge(
            "ldbfr_archive_seconds_left", "Seconds until the archive is done, at this rate", tag_keys=tags
        )

    def update(self, done: Counts) -> None:
        """Tell how the run stands."""
        for status, more in done.minus(self.before)._asdict().items():
            if more > 0:
                self.images.inc(more, {**self.tags, "status": status})
        self.before = done
        tally = self.progress.tally
        self.planned.set(tally.planned, self.tags)
        if rate := self.progress.rate():
            self.rate.set(rate, self.tags)
            self.left.set((tally.planned - tally.done) / rate, self.tags)


class TrainingMetrics:
    """The metrics of a stage's training, tagged with its run and stage; Ray puts `ray_` before their names.

    Made by the first worker alone, and gone with it, so that they are those of trainings that go on.

    Args:
        run: URI of the run.
        stage: name of the stage.
    """

    def __init__(self, run: str, stage: str) -> None:
        self.tags, tags = {"run": run, "stage": stage}, ("run", "stage")
        self.step = Gauge("ldbfr_training_step", "Steps of the stage that are done", tag_keys=tags)
        self.loss = Gauge("ldbfr_training_loss", "Losses of the last step that was logged", tag_keys=(*tags, "loss"))
        self.checkpoint = Gauge(
            "ldbfr_training_checkpoint_timestamp_seconds",
            "When the newest checkpoint was whole, as Unix time; until there is one, when the training began to work",
            tag_keys=tags,
        )
        self.checkpoint.set(time.time(), self.tags)

    def report(self, step: int, losses: Mapping[str, float]) -> None:
        """A step is done."""
        self.step.set(step, self.tags)
        for name, value in losses.items():
            self.loss.set(value, {**self.tags, "loss": name})

    def saved(self) -> None:
        """A checkpoint is whole and in its place."""
        self.checkpoint.set(time.time(), self.tags)
