"""Plot the losses of training runs over one another, from their TensorBoard files.

python benchmarks/curve.py undisturbed=runs/a killed=runs/b --stage hq_vqgan --output docs/images/curve.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
from matplotlib import pyplot as plt

WIDTHS = (6.0, 1.5, 1.0)
"""A later run is drawn thinner, so that equal ones stay visible."""


@dataclass(frozen=True)
class Curve:
    """Plot losses."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """LABEL=FOLDER, in the order in which they are drawn."""
    stage: str
    """Which stage."""
    output: Path
    """PNG file."""
    loss: str = "loss"
    """Which of the values logged."""
    marks: tuple[str, ...] = ()
    """STEP=TEXT: a dashed line with a word to it."""


def main(options: Curve) -> None:
    """Draw."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for number, text in enumerate(options.runs):
        label, _, folder = text.partition("=")
        events = EventAccumulator(str(Path(folder) / options.stage / "tensorboard"), size_guidance={"scalars": 0})
        points = {e.step: e.value for e in events.Reload().Scalars(f"{options.stage}/{options.loss}")}
        width = WIDTHS[min(number, len(WIDTHS) - 1)]
        axes.plot(list(points), list(points.values()), label=label, linewidth=width, alpha=0.55 if number == 0 else 1)
    for text in options.marks:
        step, _, word = text.partition("=")
        axes.axvline(int(step), color="0.5", linestyle="--", linewidth=0.8)
        axes.text(int(step), axes.get_ylim()[1], f" {word}", rotation=90, va="top", ha="right", fontsize=8, color="0.3")
    axes.set(xlabel="step", ylabel=options.loss, title=f"{options.stage}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(options.output, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Curve))
