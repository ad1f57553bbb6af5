"""The rule that picks a preset's default number of steps and scheduler from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldbfr.evaluation.bootstrap import central, stratified_means
from ldbfr.evaluation.engine import strata_of
from ldbfr.evaluation.numbers import distance, number
from ldbfr.evaluation.results import Measure, Results, Row, Score
from ldbfr.evaluation.work import ALL
from ldbfr.pages import counted

MARGINS: Mapping[str, float] = {
    "lpips-alex": 0.01,
    "lpips-vgg": 0.01,
    "lpips-squeeze": 0.01,
    "identity": 0.02,
    "landmarks": 0.1,
    "sharpness": 0.06,
}
"""The measures that judge, those of what the diffusion is for, and by how much a candidate may miss the best in each.

What is too little to be worth a user's time is our decision. Between published methods lie some hundredths of LPIPS;
0.02 is a thirtieth of the identity distance at which dlib parts two people, 0.1 pixels of 128 are a thousandth of the
face's width, and 0.06 is a tenth of the least sharpness that the reference weights had to reach, 0.6 of the original's.
PSNR and SSIM are not asked: they always prefer fewer steps, for every step adds detail that may be a pixel off.
"""

RULE = (
    "The rule: the fewest steps that miss the best candidate by no more than a margin in every measure that judges, "
    "over all images; of several, the fastest. Differences are of the same images, with bootstrap 95 % intervals. "
    f"Margins: {', '.join(f'{name} {margin:g}' for name, margin in MARGINS.items())}."
)


@dataclass(frozen=True)
class Difference:
    """By how much a candidate is worse than the best in a measure, on the same images: mean and 95 % interval."""

    mean: float
    low: float
    high: float
    margin: float

    @property
    def within(self) -> bool:
        """Whether it is as good as the best."""
        return self.mean <= self.margin

    @property
    def sure(self) -> bool:
        """Whether the whole interval says the same as the mean."""
        return self.high <= self.margin or self.low > self.margin


@dataclass(frozen=True)
class Choice:
    """What was picked, and why, in sentences."""

    name: str
    reason: str
    differences: Mapping[str, Mapping[str, Difference]]
    """Candidate -> measure -> what it misses the best by."""


def choose(results: Results, rows: Sequence[Row], candidates: Mapping[str, tuple[str, int]]) -> Choice | None:
    """The fewest steps that are as good as the best in every judging measure, over all images.

    As good means: worse by no more than the measure's margin in the mean. Where no candidate is that in all measures,
    those that are in most of them are left. Of several with the fewest steps, the fastest is taken.

    Args:
        results: with the candidates' scores.
        rows: what was measured on each image of each candidate, in the same order for all.
        candidates: restorer -> (scheduler, steps).

    Returns:
        None where nothing was measured that judges.
    """
    judges = [one for one in results.measures if one.name in MARGINS]
    columns = {one.name: scores_of(results, one, candidates) for one in judges}
    judges = [one for one in judges if columns[one.name]]
    if not judges:
        return None
    bests = {
        one.name: min(columns[one.name], key=lambda name: distance(columns[one.name][name].mean, one)) for one in judges
    }
    own = {name: [row for row in rows if row.restorer == name] for name in candidates}
    differences: dict[str, dict[str, Difference]] = {name: {} for name in candidates}
    for one in judges:
        column, best = columns[one.name], bests[one.name]
        measured = {name: [row for row in own[name] if one.name in row.values] for name in column}
        draws = {name: distance(stratified_means(strata_of(measured[name], one.name)), one) for name in column}
        for name, score in column.items():
            mean = distance(score.mean, one) - distance(column[best].mean, one)
            low, high = central(draws[name] - draws[best])
            differences[name][one.name] = Difference(mean, low, high, MARGINS[one.name])
    passed = {name: sum(found.within for found in missed.values()) for name, missed in differences.items()}
    left = [name for name in candidates if passed[name] == max(passed.values())]
    chosen = min(left, key=lambda name: (candidates[name][1], results.seconds.get(name, 0.0), name))
    return Choice(
        chosen, explain(results, judges, columns, bests, differences[chosen], candidates, chosen), differences
    )


def scores_of(results: Results, measure: Measure, candidates: Mapping[str, tuple[str, int]]) -> dict[str, Score]:
    """Candidate -> score over all images, for those that have an interval."""
    scores = {name: results.scores[name].get(ALL, {}).get(measure.name) for name in candidates}
    return {name: score for name, score in scores.items() if score is not None and score.low is not None}


def explain(
    results: Results,
    judges: Sequence[Measure],
    columns: Mapping[str, Mapping[str, Score]],
    bests: Mapping[str, str],
    differences: Mapping[str, Difference],
    candidates: Mapping[str, tuple[str, int]],
    chosen: str,
) -> str:
    """Why it was chosen."""
    scheduler, steps = candidates[chosen]
    found = sum(one.within for one in differences.values())
    how_many = "every measure" if found == len(judges) else f"{found} of {len(judges)} measures (none is in more)"
    text = (
        f"{scheduler} with {counted(steps, 'step')}: the fewest that are as good as the best, within the margin, in "
        f"{how_many} of those that judge ({', '.join(one.name for one in judges)})."
    )
    for one in judges:
        missed = differences.get(one.name)
        if missed is None:
            continue
        other, count = candidates[bests[one.name]]
        text += f" {one.label}: {number(columns[one.name][chosen].mean)}"
        if bests[one.name] == chosen:
            text += ", which is the best."
            continue
        doubt = f", though {columns[one.name][chosen].num_images} images cannot make sure of it"
        best = number(columns[one.name][bests[one.name]].mean)
        text += (
            f", worse than the best ({other}, {counted(count, 'step')}: {best}) by "
            f"{number(missed.mean)} [{number(missed.low)} to {number(missed.high)}], "
            f"{'within' if missed.within else 'beyond'} the margin of {missed.margin:g}"
            f"{'' if missed.sure else doubt}."
        )
    if chosen in results.seconds:
        slowest = max(results.seconds.get(name, 0.0) for name in candidates)
        text += (
            f" {number(1000 * results.seconds[chosen])} ms an image, against {number(1000 * slowest)} of the slowest."
        )
    return text
