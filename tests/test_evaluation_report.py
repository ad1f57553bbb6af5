"""The report of an evaluation: its numbers, what it says beside them, and how it looks in a browser."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ldbfr.evaluation.engine import Evaluation, on_this_machine
from ldbfr.evaluation.gallery import RANDOM, WORST, Gallery, make_gallery
from ldbfr.evaluation.numbers import best_of, number, split_title, splits
from ldbfr.evaluation.published import TABLE_1, TABLE_2
from ldbfr.evaluation.report import document, pictures_grid, write_reports
from ldbfr.evaluation.report_markdown import markdown, scores_table, table
from ldbfr.evaluation.restorers import InputItself
from ldbfr.evaluation.results import Measure, Missing, Results, Score
from ldbfr.images import decode_image
from tests.evaluating import BlobSet, metrics
from tests.test_archive_report import CONTRAST, HOSTILE, OVERFLOW, opened

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["tests.browser"]

PSNR = Measure(name="psnr", label="PSNR", unit="dB", better="higher", protocol="over all samples")
FID = Measure(name="fid", label="FID", better="lower", protocol="Inception <b>v3</b>")
SHARP = Measure(name="sharpness", label="Sharpness", better="nearer to 1", protocol="a ratio")


class Copy(InputItself):
    """The input under another name, three grey levels darker."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, entries: object, lq: Any) -> Any:
        return [image - np.minimum(image, 3) for image in lq]


def evaluated(tmp_path: Path, names: tuple[str, ...] = ("ours",), count: int = 12) -> tuple[Results, Gallery]:
    """An evaluation of copies of the input."""
    test_set = BlobSet(count)
    restorers = (InputItself(), *map(Copy, names))
    settings = {"command": f"ldbfr evaluate {HOSTILE}", "seed": 0}
    evaluation = Evaluation(test_set, restorers, metrics(), str(tmp_path), settings=settings)
    results = evaluation(on_this_machine())
    return results, make_gallery(test_set, evaluation.all_rows(), results.measures, str(tmp_path), names[-1])


def results_of(scores: dict[str, dict[str, Score]], **changes: Any) -> Results:
    """Results over all images."""
    given: dict[str, Any] = {
        "test_set": {"name": "set", "images": 9},
        "restorers": {name: {"kind": "weights"} for name in scores},
        "measures": (PSNR, FID, SHARP),
        "scores": {name: {"all": own} for name, own in scores.items()},
        "settings": {},
        "versions": {"ldbfr": "0"},
        "machine": {},
    }
    return Results(**(given | changes))


def score(mean: float, spread: float | None = None, remark: str = "") -> Score:
    low, high = (None, None) if spread is None else (mean - spread, mean + spread)
    return Score(mean=mean, low=low, high=high, num_images=9, remark=remark)


# ---- numbers ----


def test_numbers_have_the_digits_that_are_worth_reading() -> None:
    values = (22.3456, 0.61234, 0.0123456, 1234.5, 0.0, -1.5, math.inf, -math.inf)
    assert [number(value) for value in values] == ["22.35", "0.612", "0.0123", "1,234", "0.000", "−1.500", "∞", "−∞"]


def test_the_best_is_the_highest_the_lowest_or_the_nearest_to_1() -> None:
    scores = {"a": score(0.5), "b": score(0.9), "c": score(1.2)}
    assert best_of(scores, PSNR) == "c"
    assert best_of(scores, FID) == "a"
    assert best_of(scores, SHARP) == "b"
    assert best_of({"a": score(1)}, PSNR) is None
    forced = {"a": score(0.1, remark="forced"), "b": score(0.2, spread=0.1, remark="of 9 images, 2 have no original")}
    assert best_of(forced, FID) == "b"


def test_one_split_is_shown_once() -> None:
    results = results_of({"a": {"psnr": score(1)}})
    assert splits(results) == ["all"]
    two = results.model_copy(update={"scores": {"a": {"all": {"psnr": score(1)}, "mild": {"psnr": score(1)}}}})
    assert splits(two) == ["all"]
    assert split_title("all", two) == "All images (9)"


def test_the_published_tables_are_the_paper_s() -> None:
    assert dict(TABLE_1.rows)["LD-BFR"] == (22.9940, 0.6297, 0.4282, 38.9823)
    assert dict(TABLE_2.rows)["LD-BFR"] == (38.74, 36.35)
    assert [name for name, _ in TABLE_1.rows] == [name for name, _ in TABLE_2.rows]
    best = [max(values) if head.endswith("↑") else min(values) for head, values in columns(TABLE_1)]
    assert best == [22.9940, 0.6310, 0.3964, 38.9823]


def columns(published: Any) -> list[tuple[str, list[float]]]:
    return [(head, [values[place] for _, values in published.rows]) for place, head in enumerate(published.columns)]


# ---- what it says ----


def test_both_forms_have_every_number_reason_and_setting(tmp_path: Path) -> None:
    results, gallery = evaluated(tmp_path)
    page, plain = write_reports(str(tmp_path), results, gallery)
    html, text = Path(page).read_text("utf-8"), Path(plain).read_text("utf-8")
    for restorer in results.restorers:
        for split in ("all", "mild", "severe"):
            for value in results.scores[restorer][split].values():
                for said in (number(value.mean), *([number(value.low), number(value.high)] if value.low else [])):
                    assert said in html
                    assert said in text
    for said in ("its network is not on this machine", "a formula", "1,000 resamples", "of blobs", "opencv-python"):
        assert said in html
    for said in (
        "its network is not on this machine",
        "a formula",
        "of blobs",
        "opencv-python",
        "Not comparable".lower(),
    ):
        assert said in text
    assert "22.994" in html
    assert html.index("Published elsewhere") > html.index("All images (12)")


def test_equal_results_have_equal_pages_that_load_nothing(tmp_path: Path) -> None:
    results, gallery = evaluated(tmp_path)
    html = document(results, gallery)
    assert html == document(results, gallery)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert not re.search(r"<(script|link|iframe|object|embed|base)|url\(|@import|<img src=\"(?!data:)", html)
    assert html.count("<h1") == 1


def test_remarks_and_infinite_numbers_are_said(tmp_path: Path) -> None:
    results = results_of({"a": {"psnr": score(math.inf, remark="9 images equal their originals"), "fid": score(3)}})
    html, text = document(results, Gallery()), markdown(results, Gallery(), {})
    for said in ("∞", "PSNR: 9 images equal their originals"):
        assert said in html
        assert said in text
    assert "&lt;b&gt;v3" in html
    assert "∞*" in scores_table(results, "all")
    assert "\\* PSNR: 9 images" in scores_table(results, "all")


def test_a_markdown_table_keeps_its_columns() -> None:
    lines = table(["a", "b"], [["x|y", "two\nlines"]]).splitlines()
    assert lines == ["| a | b |", "| --- | ---: |", r"| x\|y | two lines |"]


def test_markdown_shows_the_pictures_that_were_written(tmp_path: Path) -> None:
    results, gallery = evaluated(tmp_path)
    _, plain = write_reports(str(tmp_path), results, gallery)
    paths = re.findall(r"!\[[^]]*\]\(([^)]+)\)", Path(plain).read_text("utf-8"))
    assert paths == ["pictures/mild.jpg", "pictures/severe.jpg", "pictures/worst.jpg"]
    for path in paths:
        assert decode_image((tmp_path / path).read_bytes(), name=path).shape[1] > 300


# ---- pictures ----


def test_the_original_and_as_many_results_as_can_be_judged_are_side_by_side(tmp_path: Path) -> None:
    _, gallery = evaluated(tmp_path, MANY)
    assert len(gallery.columns) == 13
    html = pictures_grid(gallery.random[0][1], gallery.columns, "x")
    heads = re.findall(r'<div><bdi dir="auto">([^<]*)', html)
    assert heads == ["input", *MANY[:10], "original"]


def test_a_gallery_shows_input_results_and_original_of_random_and_worst_images(tmp_path: Path) -> None:
    results, gallery = evaluated(tmp_path, count=20)
    assert gallery.columns == ("input", "ours", "original")
    assert [split for split, _ in gallery.random] == ["mild", "severe"]
    assert all(len(shown) == RANDOM for _, shown in gallery.random)
    test_set = BlobSet(20)
    by_name = {entry.name: entry for entry in test_set.entries}
    for shown in (*gallery.random[0][1], *gallery.worst):
        lq, original = test_set.read(by_name[shown.name])
        assert (shown.pictures[0] == lq).all()
        assert (shown.pictures[2] == original).all()
    rows = Evaluation(test_set, (InputItself(), Copy("ours")), metrics(), str(tmp_path)).all_rows()
    own = sorted((row.values["psnr"], row.entry.name) for row in rows if row.restorer == "ours")
    assert [shown.name for shown in gallery.worst] == [name for _, name in own[:WORST]]
    assert gallery.worst[0].captions[1] == f"{own[0][0]:.1f} dB"
    assert gallery.worst_of == "ours, by PSNR"
    assert set(results.scores) == {"input", "ours"}


def test_a_set_without_originals_has_no_column_for_them(tmp_path: Path) -> None:
    test_set = BlobSet(4, originals=False)
    pair = type(metrics())(metrics().pair)
    evaluation = Evaluation(test_set, (InputItself(),), pair, str(tmp_path))
    results = evaluation(on_this_machine())
    gallery = make_gallery(test_set, evaluation.all_rows(), results.measures, str(tmp_path), "input")
    assert gallery.columns == ("input",)
    assert gallery.worst == ()
    document(results, gallery)


# ---- the page in a browser ----

MANY = tuple(f"a method with the name {number}" for number in range(11))


def page_of(which: str, tmp_path: Path) -> str:
    """A usual page, one with many restorers of long and hostile names, and one with nothing but a number."""
    if which == "least":
        return document(results_of({"a": {"psnr": score(1)}}, missing=(Missing(name="fid", reason="none"),)), Gallery())
    results, gallery = evaluated(tmp_path, ("ours",) if which == "usual" else (*MANY, HOSTILE))
    return document(results, gallery)


@pytest.mark.browser
@pytest.mark.parametrize("which", ["usual", "many", "least"])
def test_a_page_opens_without_network_errors_or_overflow(page: Page, tmp_path: Path, which: str) -> None:
    events = opened(page, tmp_path, page_of(which, tmp_path))
    assert page.eval_on_selector_all("img", "all => all.every(image => image.complete && image.naturalWidth == 32)")
    for width in (360, 800, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(OVERFLOW) <= 0, width
    assert page.locator("script").count() == 0
    assert page.title() == "Evaluation report"
    assert events == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_in_light_and_dark(page: Page, tmp_path: Path, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    opened(page, tmp_path, page_of("usual", tmp_path))
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 8
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}


@pytest.mark.browser
def test_what_was_published_elsewhere_is_visibly_marked(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, page_of("usual", tmp_path))
    marked = page.locator("section.elsewhere")
    assert marked.count() == 1
    assert "none of these numbers may be compared" in marked.inner_text()
    mark = "element => getComputedStyle(element, '::after').content"
    assert page.locator("section.elsewhere h2").evaluate(mark) == '"not comparable"'
    border = "element => getComputedStyle(element).borderTopStyle"
    assert marked.evaluate(border) == "dashed"
    assert page.locator("section:not(.elsewhere)").first.evaluate(border) == "solid"
