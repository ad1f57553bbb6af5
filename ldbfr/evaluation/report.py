"""The report of an evaluation: one HTML file that holds everything it shows and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ldbfr import pages, storage
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
from ldbfr.evaluation.report_markdown import markdown, write_sheets
from ldbfr.evaluation.results import Measure, Results, Score
from ldbfr.images import encode_image
from ldbfr.pages import facts, flat, name, picture, plain, text

REPORT_FILE, MARKDOWN_FILE = "report.html", "report.md"
_COLUMNS = 12
"""Pictures side by side; more would be too small to judge."""


@dataclass(frozen=True)
class Section:
    """A part of a report in both forms.

    `html` is a <section>, `markdown` begins with a heading of level 2.
    """

    html: str
    markdown: str


def write_reports(
    output: str, results: Results, gallery: Gallery, title: str = "Evaluation report", beside: Sequence[Section] = ()
) -> tuple[str, str]:
    """Write `report.html`, `report.md` and the latter's pictures; the places of both.

    Args:
        output: a folder or s3://bucket/prefix.
        results: what was measured.
        gallery: what is shown.
        title: of both.
        beside: sections that come first.

    Raises:
        StorageError: a file cannot be written.
    """
    sheets = write_sheets(output, gallery)
    page, plain_text = storage.join(output, REPORT_FILE), storage.join(output, MARKDOWN_FILE)
    storage.write_bytes(page, document(results, gallery, title, [section.html for section in beside]).encode())
    text_of = markdown(results, gallery, sheets, title, [section.markdown for section in beside])
    storage.write_bytes(plain_text, text_of.encode())
    return page, plain_text


def document(results: Results, gallery: Gallery, title: str = "Evaluation report", beside: Iterable[str] = ()) -> str:
    """The report's HTML; equal arguments give an equal page."""
    sections = [
        *beside,
        *(scores_section(results, split) for split in splits(results)),
        *(pictures_section(f"At random: {split}", shown, gallery.columns) for split, shown in gallery.random),
        worst_section(gallery),
        elsewhere_section(),
        protocol_section(results),
        settings_section(results),
    ]
    return pages.document(title, header(results, title), sections, footer(results), style())


@cache
def style() -> str:
    """The CSS that this kind of report has beside what all pages share."""
    return files("ldbfr.evaluation").joinpath("report.css").read_text(encoding="utf-8")


def header(results: Results, title: str) -> str:
    """What this is."""
    images = pages.counted(int(results.test_set.get("images", 0)), "image")
    restorers = pages.counted(len(results.restorers), "restorer")
    test_set = name(str(results.test_set.get("name", "")))
    return (
        f'<header><div class="title"><h1>{text(title)}</h1></div>'
        f'<p class="lede">{test_set}: {images}, {restorers}. Means, with bootstrap 95 % intervals below; the best of '
        "each column is green.</p></header>"
    )


def footer(results: Results) -> str:
    """Who made this."""
    return (
        f"<footer><p>Made by ldbfr {text(results.versions.get('ldbfr', ''))}. Every image has its row in "
        "<code>rows.jsonl</code>, every number stands in <code>results.json</code>. This page holds all it shows: it "
        "loads nothing and runs nothing.</p></footer>"
    )


# ---- scores ----


def scores_section(results: Results, split: str) -> str:
    """The table of one split."""
    title = split_title(split, results)
    return f"<section><h2>{text(title)}</h2>{scores_table(results, split, title)}</section>"


def scores_table(results: Results, split: str, label: str, only: Sequence[str] = ()) -> str:
    """Restorers × measures, and the time of an image; of some restorers only, where `only` names them."""
    results = restricted(results, only)
    measures = [measure for measure in results.measures if column(results, split, measure)]
    best = {measure.name: best_of(column(results, split, measure), measure) for measure in measures}
    timed = bool(results.seconds)
    heads = "".join(f'<th scope="col" class="amount">{text(heading(measure))}</th>' for measure in measures)
    heads += '<th scope="col" class="amount">ms/image</th>' if timed else ""
    rows = ""
    for restorer in results.restorers:
        cells = "".join(_cell(results, split, restorer, measure, best[measure.name]) for measure in measures)
        if timed:
            seconds = results.seconds.get(restorer)
            cells += f'<td class="amount">{"–" if seconds is None else number(1000 * seconds)}</td>'
        rows += f'<tr><th scope="row">{name(restorer, 60)}</th>{cells}</tr>'
    heads = f'<tr><th scope="col">Restorer</th>{heads}</tr>'
    table = f'<table class="scores"><thead>{heads}</thead><tbody>{rows}</tbody></table>'
    said = "".join(f"<p>{text(remark)}</p>" for remark in remarks(results, split))
    return scrolling(table, f"Scores: {label}") + said


def _cell(results: Results, split: str, restorer: str, measure: Measure, best: str | None) -> str:
    score: Score | None = results.scores[restorer].get(split, {}).get(measure.name)
    if score is None:
        return '<td class="amount">–</td>'
    small = f"<small>{span(score)}</small>" if span(score) else ""
    return f'<td class="amount{" best" if restorer == best else ""}">{marked(score)}{small}</td>'


def scrolling(table: str, label: str) -> str:
    """A part that may be wider than the page, which the keyboard can scroll too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">{table}</div>'


# ---- pictures ----


def pictures_section(title: str, shown: Sequence[Shown], columns: Sequence[str], said: str = "") -> str:
    """Rows of pictures under their titles."""
    if not shown:
        return ""
    said = f"<p>{text(said)}</p>" if said else ""
    grid = pictures_grid(shown, columns, title)
    return f'<section class="long"><h2>{text(title)}</h2>{said}{grid}</section>'


def pictures_grid(shown: Sequence[Shown], columns: Sequence[str], label: str) -> str:
    """Rows of pictures, each under its name."""
    count = min(len(columns), _COLUMNS)
    kept = [*range(count - 1), len(columns) - 1]  # the original is always shown
    heads = "".join(f"<div>{name(columns[place], 40)}</div>" for place in kept)
    grid = f'<div class="shown heads" style="--columns: {count}">{heads}</div>'
    for row in shown:
        figures = "".join(_figure(row, columns, place) for place in kept)
        grid += f'<p class="of">{name(row.name, 60)}</p><div class="shown" style="--columns: {count}">{figures}</div>'
    return scrolling(grid, label)


def _figure(row: Shown, columns: Sequence[str], place: int) -> str:
    if place >= len(row.pictures):
        return "<figure></figure>"
    jpeg = encode_image(row.pictures[place], "jpeg", quality=90)
    caption = f"<figcaption>{text(row.captions[place])}</figcaption>" if row.captions[place] else ""
    return f"<figure>{picture(jpeg, f'{row.name}, {columns[place]}')}{caption}</figure>"


def worst_section(gallery: Gallery) -> str:
    """Where a restorer did worst."""
    return pictures_section("Worst", gallery.worst, gallery.columns, f"The worst of {gallery.worst_of}, worst first.")


# ---- what else has to be known ----


def elsewhere_section() -> str:
    """The paper's tables, marked as what they are."""
    parts = []
    for table in TABLES:
        heads = "".join(f'<th scope="col" class="amount">{text(head)}</th>' for head in table.columns)
        rows = "".join(
            f'<tr><th scope="row">{text(method)}</th>'
            + "".join(f'<td class="amount">{value:g}</td>' for value in values)
            + "</tr>"
            for method, values in table.rows
        )
        parts.append(
            f"<h3>{text(table.title)}</h3><p>{text(table.about)}</p>"
            + scrolling(
                f'<table class="scores"><thead><tr><th scope="col">Method</th>{heads}</tr></thead>'
                f"<tbody>{rows}</tbody></table>",
                table.title,
            )
        )
    return (
        f'<section class="long elsewhere"><h2>Published elsewhere</h2><p>{text(WARNING)}</p>{"".join(parts)}</section>'
    )


def protocol_section(results: Results) -> str:
    """How every number was made, and which could not be."""
    rows = [(heading(measure), text(measure.protocol)) for measure in results.measures]
    missing = ""
    if results.missing:
        reasons = [(one.name, text(one.reason)) for one in results.missing]
        missing = facts(reasons, "Asked for, and could not be measured")
    interval = results.settings.get("bootstrap", {})
    said = (
        f"Intervals: percentile bootstrap of the mean over images, {interval.get('resamples', 0):,} resamples, seed "
        f"{interval.get('seed', 0)}. Scores of whole sets have none."
    )
    table = facts(rows, "What was measured, and how")
    return f'<section class="long"><h2>Protocols</h2><p>{text(said)}</p>{table}{missing}</section>'


def settings_section(results: Results) -> str:
    """Enough to run it again."""
    command = results.settings.get("command")
    again = f"<pre><code>{text(command)}</code></pre>" if command else ""
    tables = [
        facts([(key, plain(value)) for key, value in flat(results.test_set)], "Test set"),
        *(
            facts([(key, plain(value)) for key, value in flat(about)], f"Restorer {restorer}")
            for restorer, about in results.restorers.items()
        ),
        facts([(key, plain(value)) for key, value in flat(results.settings) if key != "command"], "Settings"),
        facts([(key, plain(value)) for key, value in results.versions.items()], "Versions"),
        facts([(key, plain(value)) for key, value in flat(results.machine)], "Machine"),
    ]
    cells = "".join(f"<div>{table}</div>" for table in tables)
    return f'<section class="long"><h2>To run it again</h2>{again}<div class="columns">{cells}</div></section>'
