"""A part of a study's report: some restorers side by side, as a table and as pictures."""

from __future__ import annotations

from collections.abc import Sequence

from ldbfr.evaluation.engine import Evaluation
from ldbfr.evaluation.gallery import make_gallery
from ldbfr.evaluation.numbers import split_title, splits
from ldbfr.evaluation.report import Section, pictures_grid, scores_table
from ldbfr.evaluation.report_markdown import scores_table as markdown_table
from ldbfr.evaluation.report_markdown import write_sheet
from ldbfr.evaluation.results import Results, Row
from ldbfr.pages import text

ROWS = 2
"""Pictures of each split in a comparison."""


def comparison(
    evaluation: Evaluation, results: Results, rows: Sequence[Row], slug: str, title: str, said: str, only: Sequence[str]
) -> Section:
    """Some restorers side by side.

    Args:
        evaluation: that gave the results.
        results: of all restorers.
        rows: of all restorers.
        slug: name of the sheet of pictures.
        title: of the section.
        said: what is compared.
        only: the restorers, in order.
    """
    chosen = [row for name in only for row in rows if row.restorer == name]
    gallery = make_gallery(evaluation.test_set, chosen, results.measures, evaluation.output, only[-1], ROWS)
    shown = [row for _, part in gallery.random for row in part]
    sheet = write_sheet(evaluation.output, slug, shown, gallery.columns)
    html, markdown = "", ""
    for split in splits(results):
        head = split_title(split, results)
        html += f"<h3>{text(head)}</h3>{scores_table(results, split, f'{title}, {head}', only)}"
        markdown += f"\n\n### {head}\n\n{markdown_table(results, split, only)}"
    html += pictures_grid(shown, gallery.columns, title)
    markdown += f"\n\n![{title}: {', '.join(gallery.columns)}]({sheet})"
    return Section(
        f'<section class="long"><h2>{text(title)}</h2><p>{text(said)}</p>{html}</section>',
        f"## {title}\n\n{said}{markdown}",
    )
