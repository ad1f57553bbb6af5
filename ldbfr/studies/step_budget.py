"""Quality against the number of denoising steps, for every scheduler: tables, curves, and the default that follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ldbfr import storage
from ldbfr.config import SchedulerName
from ldbfr.evaluation.engine import Evaluation, Execution
from ldbfr.evaluation.gallery import make_gallery
from ldbfr.evaluation.numbers import heading
from ldbfr.evaluation.report import Section, write_reports
from ldbfr.evaluation.restorers import InputItself, PipelineRestorer
from ldbfr.evaluation.results import Restorer, Results
from ldbfr.evaluation.work import ALL
from ldbfr.pages import text
from ldbfr.studies.charts import Curve, Point, chart, legend
from ldbfr.studies.choice import RULE, Choice, choose

STEPS = (1, 2, 4, 8, 16, 50)
SCHEDULERS: tuple[SchedulerName, ...] = ("dpm_solver", "ddim", "ddpm", "unipc")
TITLES = {"dpm_solver": "DPM-Solver++", "ddim": "DDIM", "ddpm": "DDPM", "unipc": "UniPC"}
FIRST_STAGE = "first-stage"
CHOICE_FILE = "choice.json"


def candidate(scheduler: str, steps: int) -> str:
    """What the restorer of a scheduler and a number of steps is called."""
    return f"{scheduler}, {steps}"


def candidates_of(steps: Sequence[int], schedulers: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Restorer -> (scheduler, steps)."""
    return {candidate(one, count): (one, count) for one in schedulers for count in sorted(set(steps))}


def restorers_of(
    weights: str, steps: Sequence[int], schedulers: Sequence[SchedulerName], device: str, **options: Any
) -> list[Restorer]:
    """The input, the first stage alone, and every scheduler with every number of steps.

    Raises:
        LDBFRError: as `PipelineRestorer`.
    """
    first = PipelineRestorer(FIRST_STAGE, weights, device, num_inference_steps=0, **options)
    return [
        InputItself(),
        first,
        *(
            PipelineRestorer(
                candidate(one, count), weights, device, num_inference_steps=count, scheduler=one, **options
            )
            for one in schedulers
            for count in sorted(set(steps))
        ),
    ]


def study(
    evaluation: Evaluation, steps: Sequence[int], schedulers: Sequence[str], execution: Execution
) -> tuple[Results, Choice | None, str]:
    """Evaluate the grid, draw the curves and pick a default; results, the pick, and the place of report.html."""
    results = evaluation(execution)
    candidates = candidates_of(steps, schedulers)
    rows = evaluation.all_rows()
    choice = choose(results, rows, candidates)
    main = choice.name if choice is not None else next(iter(candidates))
    scheduler = candidates[main][0]
    names = ["input", FIRST_STAGE, *(name for name, (own, _) in candidates.items() if own == scheduler)]
    shown = [row for row in rows if row.restorer in names]
    gallery = make_gallery(evaluation.test_set, shown, results.measures, evaluation.output, main)
    sections = [choice_section(choice), curves_section(evaluation.output, results, candidates)]
    page, _ = write_reports(evaluation.output, results, gallery, "Step budget", sections)
    if choice is not None:
        record = {"scheduler": scheduler, "steps": candidates[main][1], "reason": choice.reason}
        write_choice(evaluation.output, record)
    return results, choice, page


def write_choice(output: str, record: dict[str, Any]) -> None:
    """Keep what was picked, for those who set a preset's default by it."""
    storage.write_bytes(storage.join(output, CHOICE_FILE), json.dumps(record, indent=1).encode())


def choice_section(choice: Choice | None) -> Section:
    """Which default follows, and why."""
    said = "Nothing was measured that could judge a number of steps." if choice is None else choice.reason
    title = "The default that follows"
    return Section(
        f"<section><h2>{title}</h2><p>{text(RULE)}</p><p><strong>{text(said)}</strong></p></section>",
        f"## {title}\n\n{RULE}\n\n**{said}**",
    )


def curves_of(results: Results, candidates: dict[str, tuple[str, int]], measure: str) -> list[Curve]:
    """One curve for each scheduler, over all images; `measure` "seconds" is the time of an image."""
    curves: dict[str, list[Point]] = {}
    for name, (scheduler, steps) in candidates.items():
        if measure == "seconds":
            if name in results.seconds:
                curves.setdefault(scheduler, []).append(Point(steps, 1000 * results.seconds[name]))
            continue
        score = results.scores[name].get(ALL, {}).get(measure)
        if score is not None:
            curves.setdefault(scheduler, []).append(Point(steps, score.mean, score.low, score.high))
    return [
        Curve(TITLES.get(scheduler, scheduler), tuple(sorted(points, key=lambda point: point.steps)))
        for scheduler, points in curves.items()
    ]


def curves_section(output: str, results: Results, candidates: dict[str, tuple[str, int]]) -> Section:
    """Every measure over the number of steps, and the time of an image; each also as a file."""
    html, markdown = "", ""
    for name, title in [
        *((measure.name, heading(measure)) for measure in results.measures),
        ("seconds", "Time of an image, ms ↓"),
    ]:
        curves = curves_of(results, candidates, name)
        if not curves:
            continue
        score = results.scores.get(FIRST_STAGE, {}).get(ALL, {}).get(name)
        level = ("first stage alone", score.mean) if score is not None else None
        if name == "seconds" and FIRST_STAGE in results.seconds:
            level = ("first stage alone", 1000 * results.seconds[FIRST_STAGE])
        path = f"curves/{name.replace(':', '-')}.svg"
        storage.write_bytes(storage.join(output, path), chart(title, curves, level, alone=True).encode())
        names = legend(curves, level and level[0])
        html += f"<div><h3>{text(title)}</h3>{chart(title, curves, level)}{names}</div>"
        markdown += f"\n\n![{title}]({path})"
    said = "Over all images; bars are 95 % intervals, the dashed line is the first stage alone."
    title = "Quality and time against the number of steps"
    return Section(
        f'<section class="long"><h2>{title}</h2><p>{said}</p><div class="curves">{html}</div></section>',
        f"## {title}\n\n{said}{markdown}",
    )
