"""The rule that picks a preset's default number of steps and scheduler from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldbfr.evaluation.numbers import distance, number
from ldbfr.evaluation.results import Measure, Results, Score
from ldbfr.evaluation.work import ALL

JUDGES = ("lpips-alex", "lpips-vgg", "lpips-squeeze", "identity", "landmarks", "sharpness")
"""Measures of what the diffusion is for. PSNR and SSIM are not asked: they always prefer fewer steps, for every step
adds detail that may be a pixel off."""


@dataclass(frozen=True)
class Choice:
    """What was picked, and why, in sentences."""

    name: str
    reason: str
    passed: Mapping[str, tuple[str, ...]]
    """By candidate, the measures in which it is as good as the best."""


def choose(results: Results, candidates: Mapping[str, tuple[str, int]]) -> Choice | None:
    """The fewest steps that are as good as the best in every judging measure, over all images.

    As good means: the mean is within the bootstrap 95 % interval of the best mean. Where no candidate is that in all
    measures, those that are in most of them are left. Of several with the fewest steps, the fastest is taken.

    Args:
        results: with the candidates' scores.
        candidates: restorer -> (scheduler, steps).

    Returns:
        None where nothing was measured that judges.
    """
    judges = [one for one in results.measures if one.name in JUDGES]
    columns = {one.name: scores_of(results, one, candidates) for one in judges}
    judges = [one for one in judges if columns[one.name]]
    if not judges:
        return None
    bests = {
        one.name: min(columns[one.name], key=lambda name: distance(columns[one.name][name].mean, one)) for one in judges
    }
    passed = {
        name: tuple(
            one.name
            for one in judges
            if name in columns[one.name] and as_good(columns[one.name][name], columns[one.name][bests[one.name]], one)
        )
        for name in candidates
    }
    most = max(len(measures) for measures in passed.values())
    left = [name for name, measures in passed.items() if len(measures) == most]
    chosen = min(left, key=lambda name: (candidates[name][1], results.seconds.get(name, 0.0), name))
    return Choice(chosen, explain(results, judges, columns, bests, passed, candidates, chosen), passed)


def scores_of(results: Results, measure: Measure, candidates: Mapping[str, tuple[str, int]]) -> dict[str, Score]:
    """Candidate -> score over all images, for those that have an interval."""
    scores = {name: results.scores[name].get(ALL, {}).get(measure.name) for name in candidates}
    return {name: score for name, score in scores.items() if score is not None and score.low is not None}


def as_good(score: Score, best: Score, measure: Measure) -> bool:
    """Whether a mean is within the best's interval, or beyond the end of it that is better."""
    assert best.low is not None
    assert best.high is not None
    if measure.better == "nearer to 1":
        return best.low <= score.mean <= best.high
    return distance(score.mean, measure) <= max(distance(best.low, measure), distance(best.high, measure))


def explain(
    results: Results,
    judges: Sequence[Measure],
    columns: Mapping[str, Mapping[str, Score]],
    bests: Mapping[str, str],
    passed: Mapping[str, tuple[str, ...]],
    candidates: Mapping[str, tuple[str, int]],
    chosen: str,
) -> str:
    """Why it was chosen."""
    scheduler, steps = candidates[chosen]
    names = [one.name for one in judges]
    found = len(passed[chosen])
    how_many = "every measure" if found == len(judges) else f"{found} of {len(judges)} measures (none is in more)"
    text = (
        f"{scheduler} with {steps} {'step' if steps == 1 else 'steps'}: the fewest that are within the 95 % interval "
        f"of the best in {how_many} of those that judge ({', '.join(names)})."
    )
    for one in judges:
        best, own = columns[one.name][bests[one.name]], columns[one.name].get(chosen)
        if own is None:
            continue
        other, count = candidates[bests[one.name]]
        verdict = "within" if one.name in passed[chosen] else "outside"
        text += (
            f" {one.label}: {number(own.mean)}, {verdict} the best's interval ({other}, {count} steps: "
            f"{number(best.mean)} [{number(best.low or 0)}–{number(best.high or 0)}])."
        )
    if chosen in results.seconds:
        slowest = max(results.seconds.get(name, 0.0) for name in candidates)
        text += (
            f" {number(1000 * results.seconds[chosen])} ms an image, against {number(1000 * slowest)} of the slowest."
        )
    return text
