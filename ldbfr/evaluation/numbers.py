"""A score as text, and which of several is the best: what the pages and the Markdown of a report share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ldbfr.evaluation.results import Measure, Results, Score
from ldbfr.evaluation.work import ALL

Value = TypeVar("Value", float, NDArray[np.float64])

_ARROWS = {"higher": "↑", "lower": "↓", "nearer to 1": "→ 1"}


def heading(measure: Measure) -> str:
    """Label, unit, and which way is better: "PSNR, dB ↑"."""
    unit = f", {measure.unit}" if measure.unit else ""
    return f"{measure.label}{unit} {_ARROWS[measure.better]}"


def number(value: float) -> str:
    """A number with as many digits as are worth reading."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    digits = 0 if size >= 1000 else 2 if size >= 10 else 3 if size >= 0.1 or size == 0 else 4
    return f"{value:,.{digits}f}".replace("-", "−")


def span(score: Score) -> str:
    """The interval, "22.1–22.4"; "" where there is none."""
    return "" if score.low is None or score.high is None else f"{number(score.low)}–{number(score.high)}"


def distance(value: Value, measure: Measure) -> Value:
    """How far from the best there could be, of a number or of each in an array: smaller is better."""
    if measure.better == "nearer to 1":
        return abs(value - 1)
    return value if measure.better == "lower" else -value


def best_of(scores: Mapping[str, Score], measure: Measure) -> str | None:
    """The key of the best score; None where there is nothing to compare."""
    if len(scores) < 2:
        return None
    compared = [key for key, score in scores.items() if not is_forced(score)]
    return min(compared, key=lambda key: distance(scores[key].mean, measure), default=None)


def is_forced(score: Score) -> bool:
    """Whether it is the number of a set that was too small for it, asked for all the same: comparable with no other."""
    return score.low is None and bool(score.remark) and math.isfinite(score.mean)


def marked(score: Score) -> str:
    """The mean, marked where something has to be said beside it (`remarks`)."""
    return number(score.mean) + ("*" if score.remark else "")


def splits(results: Results) -> list[str]:
    """The splits of the results, in order; "all" alone where there is but one other."""
    found = list(dict.fromkeys(split for by_split in results.scores.values() for split in by_split))
    return [ALL] if len(found) == 2 and ALL in found else found


def split_title(split: str, results: Results) -> str:
    """What a split is called, with its number of images."""
    counts = [score.num_images for one in results.scores.values() for score in one.get(split, {}).values()]
    title = "All images" if split == ALL else split.capitalize()
    return f"{title} ({max(counts, default=0):,})"


def column(results: Results, split: str, measure: Measure) -> dict[str, Score]:
    """Restorer -> score of one measure, for those that have it."""
    scores = {name: results.scores[name].get(split, {}) for name in results.restorers}
    return {name: own[measure.name] for name, own in scores.items() if measure.name in own}


def restricted(results: Results, only: Sequence[str]) -> Results:
    """The results of some restorers, in that order; of all where none is named."""
    if not only:
        return results
    return results.model_copy(update={"restorers": {name: results.restorers[name] for name in only}})


def remarks(results: Results, split: str) -> Sequence[str]:
    """What has to be said beside the numbers of a split, each thing once."""
    said = []
    for measure in results.measures:
        for score in column(results, split, measure).values():
            if score.remark:
                said.append(f"* {measure.label}: {score.remark}")
    return list(dict.fromkeys(said))
