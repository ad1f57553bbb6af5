"""The report of an evaluation as Markdown, with its pictures as sheets beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ldbfr import storage
from ldbfr.evaluation.gallery import Gallery, Shown
from ldbfr.evaluation.numbers import (
    best_of,
    column,
    heading,
    marked,
    number,
    remarks,
    restricted,
    span,
    split_title,
    splits,
)
from ldbfr.evaluation.published import TABLES, WARNING
from ldbfr.evaluation.results import Results
from ldbfr.images import encode_image
from ldbfr.pages import flat
from ldbfr.sheets import contact_sheet

PICTURES_FOLDER = "pictures"


def write_sheets(output: str, gallery: Gallery) -> dict[str, str]:
    """Write a sheet for every split and one of the worst, as JPEG; title -> path relative to the report."""
    groups: list[tuple[str, str, Sequence[Shown]]] = [
        (f"At random: {split}", split, shown) for split, shown in gallery.random
    ]
    groups.append((f"Worst of {gallery.worst_of}", "worst", gallery.worst))
    return {title: write_sheet(output, name, shown, gallery.columns) for title, name, shown in groups if shown}


def write_sheet(output: str, name: str, shown: Sequence[Shown], columns: Sequence[str]) -> str:
    """Write one sheet; its path relative to the report."""
    sheet = contact_sheet([row.pictures for row in shown], columns, [row.name for row in shown], 160)
    path = f"{PICTURES_FOLDER}/{name}.jpg"
    storage.write_bytes(storage.join(output, path), encode_image(sheet, "jpeg", quality=90))
    return path


def markdown(
    results: Results,
    gallery: Gallery,
    sheets: Mapping[str, str],
    title: str = "Evaluation report",
    beside: Iterable[str] = (),
) -> str:
    """The report as Markdown; `sheets` as `write_sheets` gave them."""
    parts = [
        f"# {title}",
        f"{results.test_set.get('name', '')}: {results.test_set.get('images', 0):,} images. Means with bootstrap 95 % "
        "intervals in brackets; the best of each column is bold.",
        *beside,
    ]
    for split in splits(results):
        parts += [f"## {split_title(split, results)}", scores_table(results, split)]
    for head, path in sheets.items():
        parts += [f"## {head}", f"![{head}: {', '.join(gallery.columns)}]({path})"]
    parts += ["## Published elsewhere: not comparable", f"**{WARNING}**"]
    for published in TABLES:
        body = [[method, *(f"{value:g}" for value in values)] for method, values in published.rows]
        parts += [f"### {published.title}", published.about, table(["method", *published.columns], body)]
    parts += ["## Protocols", *(f"- **{heading(one)}**: {one.protocol}" for one in results.measures)]
    if results.missing:
        parts += [
            "## Asked for, and could not be measured",
            *(f"- {one.name}: {one.reason}" for one in results.missing),
        ]
    parts += ["## To run it again", *_again(results)]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def scores_table(results: Results, split: str, only: Sequence[str] = ()) -> str:
    """Restorers × measures, and the time of an image; of some restorers only, where `only` names them."""
    results = restricted(results, only)
    measures = [measure for measure in results.measures if column(results, split, measure)]
    best = {measure.name: best_of(column(results, split, measure), measure) for measure in measures}
    heads = ["restorer", *(heading(measure) for measure in measures), *(["ms/image"] if results.seconds else [])]
    rows = []
    for restorer in results.restorers:
        row = [restorer]
        for measure in measures:
            score = results.scores[restorer].get(split, {}).get(measure.name)
            if score is None:
                row.append("–")
                continue
            mean = f"**{marked(score)}**" if restorer == best[measure.name] else marked(score)
            row.append(f"{mean} [{span(score)}]" if span(score) else mean)
        if results.seconds:
            seconds = results.seconds.get(restorer)
            row.append("–" if seconds is None else number(1000 * seconds))
        rows.append(row)
    said = "".join(f"\n\n{remark.replace('*', chr(92) + '*', 1)}" for remark in remarks(results, split))
    return table(heads, rows) + said


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; what would end a cell or a line in it is escaped."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _again(results: Results) -> Iterable[str]:
    """Command, settings, versions, machine."""
    if results.settings.get("command"):
        yield f"```\n{results.settings['command']}\n```"
    groups = {
        "test set": results.test_set,
        **{f"restorer {restorer}": about for restorer, about in results.restorers.items()},
        "settings": {key: value for key, value in results.settings.items() if key != "command"},
        "versions": results.versions,
        "machine": results.machine,
    }
    for head, group in groups.items():
        yield f"- **{head}**: " + ", ".join(f"{key} {value}" for key, value in flat(group) if value is not None)
