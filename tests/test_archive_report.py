"""The report of a run: its pictures, its numbers, and how they look in a browser."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldbfr.archive.gallery import RANDOM, WORST, Gallery, wanted
from ldbfr.archive.report import document, write_report
from ldbfr.archive.rows import Picture, ResultRow, Status
from ldbfr.archive.summary import CAUSES, EXAMPLES, OTHER_CAUSES, STEPS, Summary, summarise
from ldbfr.errors import StorageError
from ldbfr.images import encode_image
from ldbfr.pages import amount, in_bytes, nice_scale, share, text
from ldbfr.tables import write_rows

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["tests.browser"]

NOON = 1_763_985_600.0  # 24 Nov 2025, 12:00 UTC
HOSTILE = "<script>document.title='run'</script>\"'><img src=x onerror=\"document.title='run'\">.jpg"
TURNED = "photo\u202egpj.exe"
EMOJI = "عائلة/👨‍👩‍👧‍👦 at the sea.jpg"
LONG = "/".join(f"folder {number:02d} with a name" for number in range(22)) + "/last.jpg"
ABOUT = {
    "software": "ldbfr 0.1.0",
    "inputs": ["s3://scans/", "/mnt/albums.tar"],
    "weights": {"name": "runs/final", "digest": "8f31b0a7c2de" * 5, "preset": "faces-512", "side": 512},
    "settings": {"steps": 50, "start_step": None, "scheduler": "ddim", "faces": {"detect": True, "sides": [32, 512]}},
    "settings_digest": "01ab23cd45ef" * 5,
    "started": "2025-11-24T11:58:00+00:00",
}

keys = st.sampled_from("abcdefghijklmnopqrstuvwxyz")
sharpnesses = st.floats(0, 9) | st.sampled_from([0.0, 1.0, math.nan, math.inf])
pictures_drawn = st.lists(
    st.builds(Picture, keys, st.just("in"), st.integers(0, 30), sharpnesses, st.binary(max_size=1), st.just(b"")),
    max_size=60,
)
times = st.none() | st.floats(NOON, NOON + 9000) | st.sampled_from([-5.0, 0.0, 1e18, math.nan, math.inf, -math.inf])
seconds_drawn = st.none() | st.floats(0, 5) | st.sampled_from([-1.0, math.nan])
rows_drawn = st.lists(
    st.fixed_dictionaries(
        {
            "input": keys,
            "key": keys,
            "status": st.sampled_from(["restored", "failed", "skipped"]),
            "cause": st.none() | st.sampled_from(["damaged", "gone", "dark"]),
            "reason": st.none() | st.just("why"),
            "size": st.none() | st.integers(0, 1 << 55),
            "faces": st.none() | st.integers(0, 9),
            "worker": st.none() | st.sampled_from(["one:1", "two:2"]),
            "finished": times,
            "seconds_read": seconds_drawn,
            "sharpness": st.none() | st.floats(0.01, 100),
        }
    ).map(lambda fields: ResultRow(**fields)),
    max_size=40,
)


def picture(number: int, side: int = 64) -> Picture:
    """A pair of the size of the smallest model's faces."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    before, after = (encode_image(pixels // half, "jpeg") for half in (2, 1))
    return Picture(f"box/{number:04d}.jpg", f"s3://scans/box/{number:04d}.jpg", number, float(number), before, after)


def restored(number: int, finished: float | None) -> ResultRow:
    return ResultRow(
        f"s3://scans/{number:04d}.jpg",
        f"{number:04d}.jpg",
        "restored",
        size=1000,
        faces=1,
        worker=f"node-{number % 2}:7",
        finished=finished,
        seconds_read=0.01,
        seconds_model=0.2,
        seconds_write=0.02,
        sharpness_input=2.0,
        sharpness=8.0,
    )


def failed(name: str, cause: str, status: Status = "failed") -> ResultRow:
    return ResultRow(name, name, status, cause, f"{name}: it is {cause}; mend it", size=10)


def realistic_rows() -> list[ResultRow]:
    """Two sessions with a night between them, failures with all that a name can hold, and skipped files."""
    rows = [restored(number, NOON + number * 2) for number in range(600)]
    rows += [restored(number, NOON + 36_000 + number) for number in range(600, 1200)]
    rows += [failed(name, "damaged") for name in (HOSTILE, TURNED, EMOJI, LONG)]
    rows += [failed(f"{number}.jpg", "no <b>face</b>") for number in range(9)]
    return [*rows, *(failed(f"{number}.txt", "not an image", "skipped") for number in range(7))]


# ---- pictures ----


@given(pictures_drawn, st.data())
def test_a_gallery_depends_on_no_order_grouping_or_repetition(pictures: list[Picture], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(pictures))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(pictures)), max_size=4)))
    groups = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, len(shuffled)], strict=True)]
    one, other = Gallery(), Gallery()
    for group in groups:
        one.add(group)
    for group in reversed(groups):
        part = Gallery(group)
        part.merge(other)
        other = part
        other.merge(Gallery(group[:3]))
    assert one == other == Gallery(pictures)
    one.merge(Gallery())
    one.merge(one)
    assert one == other == Gallery(one.pictures())


@given(pictures_drawn)
def test_a_gallery_holds_the_first_of_every_key(pictures: list[Picture]) -> None:
    gallery = Gallery(pictures)
    ranks = {p.key: min(other.rank for other in pictures if other.key == p.key) for p in pictures}
    assert [picture.rank for picture in gallery.random] == sorted(ranks.values())[:RANDOM]
    numbers = {p.key: min(_last(other.sharpness) for other in pictures if other.key == p.key) for p in pictures}
    assert [_last(picture.sharpness) for picture in gallery.worst] == sorted(numbers.values())[:WORST]
    assert len({picture.key for picture in gallery.random}) == len(gallery.random) == min(RANDOM, len(ranks))


def _last(sharpness: float) -> float:
    return math.inf if math.isnan(sharpness) else sharpness


@given(st.lists(st.tuples(st.integers(0, 30), sharpnesses), max_size=60))
def test_the_pictures_wanted_are_those_that_the_gallery_shows(rows: list[tuple[int, float]]) -> None:
    pictures = [Picture(f"{n:03d}", "in", rank, sharpness, b"", b"") for n, (rank, sharpness) in enumerate(rows)]
    chosen = wanted(rows)
    assert chosen == sorted(set(chosen))
    assert {picture.key for picture in Gallery(pictures).pictures()} == {pictures[place].key for place in chosen}


def test_a_gallery_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Gallery.read(str(tmp_path)) == Gallery()
    gallery = Gallery(picture(number, side=8) for number in range(30))
    gallery.write(str(tmp_path))
    assert Gallery.read(str(tmp_path)) == gallery
    assert len(gallery.random) == 12
    assert [shown.sharpness for shown in gallery.worst] == list(range(8))
    Gallery().write(str(tmp_path))
    assert Gallery.read(str(tmp_path)).pictures() == []


# ---- numbers ----


def numbers_of(summary: Summary) -> dict[str, Any]:
    """All of a summary in a form that compares."""
    histograms = {name: getattr(summary, name).counts.tolist() for name in ("sharpness", "sharpness_input")}
    seconds = {step: pytest.approx(value) for step, value in summary.seconds.items()}
    return {**vars(summary), **histograms, "seconds": seconds}


@given(rows_drawn, st.lists(st.integers(0, 40), max_size=3))
def test_a_summary_of_parts_is_that_of_the_whole(rows: list[ResultRow], cuts: list[int]) -> None:
    merged = Summary()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(rows)], strict=True):
        merged.merge(Summary.of(rows[start:end]))
    assert numbers_of(merged) == numbers_of(Summary.of(rows))


@given(rows_drawn)
def test_a_summary_counts_every_row_once(rows: list[ResultRow]) -> None:
    summary = Summary.of(rows)
    good = [row for row in rows if row.status == "restored"]
    bad = [row for row in rows if row.status == "failed"]
    assert (summary.total, summary.restored, summary.failed) == (len(rows), len(good), len(bad))
    assert summary.size == sum(row.size or 0 for row in good + bad)
    assert summary.faces == sum(row.faces or 0 for row in good)
    assert summary.workers == Counter(row.worker for row in good if row.worker)
    assert {name: cause.count for name, cause in summary.failures.items()} == Counter(
        row.cause or "no cause given" for row in bad
    )
    for name, cause in summary.failures.items():
        same = [row for row in bad if (row.cause or "no cause given") == name]
        assert cause.examples == [(row.input, row.reason or name) for row in same[:EXAMPLES]]
    dated = [row.finished for row in good if row.finished is not None and NOON <= row.finished <= NOON + 9000]
    assert summary.minutes == Counter(int(time // 60) for time in dated)
    assert summary.undated == len(good) - len(dated)
    assert (summary.first, summary.last) == (min(dated, default=None), max(dated, default=None))
    read = [row.seconds_read for row in rows if row.seconds_read is not None and row.seconds_read > 0]
    assert summary.seconds["read"] == pytest.approx(sum(read))
    known = sorted(row.sharpness for row in good if row.sharpness is not None)
    assert summary.sharpness.median() == (pytest.approx(known[(len(known) - 1) // 2], rel=0.01) if known else None)


def test_a_pause_parts_sessions_and_counts_as_no_time() -> None:
    summary = Summary.of(realistic_rows())
    lengths = [session.length for session in summary.sessions()]
    assert lengths == [20, 10]
    assert summary.active_seconds() == pytest.approx(29 * 60 + 59)
    assert summary.rate() == pytest.approx(1200 / 1799)
    assert Summary().sessions() == []
    assert Summary().rate() is Summary.of([restored(1, NOON)]).rate() is None
    assert Summary.of([restored(0, NOON + 3), restored(1, NOON + 7)]).active_seconds() == pytest.approx(4)


def test_a_manifest_in_many_parts_is_summed_up(tmp_path: Path) -> None:
    rows = realistic_rows()
    parts = []
    for start in range(0, len(rows), 25):
        parts.append(str(tmp_path / "manifest" / f"{start // 25:06d}.parquet"))
        write_rows(parts[-1], rows[start : start + 25], ResultRow)
    assert len(parts) > 40
    assert numbers_of(summarise(str(tmp_path), parts)) == numbers_of(Summary.of(rows))
    assert numbers_of(summarise(str(tmp_path), [])) == numbers_of(Summary())


def test_what_is_no_part_of_a_manifest_is_named(tmp_path: Path) -> None:
    part = tmp_path / "000000.parquet"
    part.write_bytes(b"PAR1 is not enough")
    with pytest.raises(StorageError, match=r"000000\.parquet is no part of a manifest .*, expected parquet .*; put"):
        summarise(str(tmp_path), [str(part)])
    write_rows(str(part), [picture(1, side=8)], Picture)
    with pytest.raises(StorageError, match=r"no part of a manifest .*status.*expected parquet with the columns"):
        summarise(str(tmp_path), [str(part)])


def test_causes_without_end_are_one_more_cause() -> None:
    summary = Summary.of(failed(f"{number}", f"cause {number}") for number in range(CAUSES + 50))
    assert len(summary.failures) == CAUSES + 1
    assert summary.failures[OTHER_CAUSES].count == 50
    assert sum(cause.count for cause in summary.failures.values()) == summary.failed == CAUSES + 50
    assert "and 181 rarer causes" in page_of(summary)


# ---- the page's text ----


def page_of(summary: Summary, pictures: Sequence[Picture] = (), finished: bool = True, **about: Any) -> str:
    """A page about a run in which nothing is left, unless it is unfinished."""
    planned = summary.total + (0 if finished else 4000)
    num_done = summary.total + (0 if finished else 64)
    given = {**ABOUT, **about}
    return document("/out", summary, Gallery(pictures), given, finished=finished, planned=planned, num_done=num_done)


def test_numbers_are_written_for_people() -> None:
    assert [amount(count) for count in (0, 7, 1234567, 0.1234, 12.34, 1234.5)] == [
        *("0", "7", "1,234,567"),
        *("0.12", "12.3", "1,234"),
    ]
    assert [share(count, 100_000) for count in (0, 1, 4321, 99_999, 100_000)] == [
        *("0 %", "< 0.1 %", "4.3 %"),
        *("99.9 %", "100 %"),
    ]
    assert [in_bytes(size) for size in (0, 999, 1500, 2 * 10**12)] == [
        *(("0", "bytes"), ("999", "bytes")),
        *(("1.50", "kB"), ("2", "TB")),
    ]


@given(st.floats(1e-6, 1e9))
def test_a_scale_holds_the_largest_in_a_few_round_steps(largest: float) -> None:
    step, ceiling = nice_scale(largest)
    assert ceiling >= largest * (1 - 1e-6)
    assert 1 <= round(ceiling / step) <= 4
    assert f"{step:.0e}"[0] in "125"


def test_text_shows_what_would_be_obeyed() -> None:
    assert text("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert text("a\u202eb\0c\udcffd") == r"a\u202eb\x00c\udcffd"
    assert text(EMOJI) == EMOJI


def test_equal_runs_have_equal_pages_that_load_nothing() -> None:
    rows, pictures = realistic_rows(), [picture(number, side=16) for number in range(30)]
    page = page_of(Summary.of(rows), pictures)
    assert page == page_of(Summary.of(rows), pictures[::-1])
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert not re.search(r"<(script|link|iframe|object|embed|base)|url\(|@import|<img src=\"(?!data:)", page)
    assert "\udcff" not in page_of(Summary(), inputs=["/mnt/\udcff"])


@pytest.mark.parametrize("pause", [660, 90_000])
def test_many_short_sessions_still_fit_the_chart(pause: int) -> None:
    page = page_of(Summary.of(restored(number, NOON + number * pause) for number in range(300)))
    places = [float(x) for x in re.findall(r'<text x="([-0-9.]+)"', page)]
    assert all(0 <= place <= 1070 for place in places)
    assert "300 sessions" in page
    assert not re.search(r'width="-', page)


def test_the_report_of_a_run_in_a_bucket_lies_beside_its_results(tmp_path: Path) -> None:
    given = {"finished": False, "planned": 12_000, "num_done": 5}
    uri = write_report(f"file://{tmp_path}", Summary(), Gallery(), {}, **given)
    assert uri == str(tmp_path / "report.html")
    assert "unfinished: 5 of 12,000" in (tmp_path / "report.html").read_text(encoding="utf-8")


# ---- the page in a browser ----

CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    const over = (colour, below) => {
        canvas.fillStyle = `rgb(${below.join(' ')})`; canvas.fillRect(0, 0, 1, 1);
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const ground = element => over(getComputedStyle(element).backgroundColor,
        element.parentElement ? ground(element.parentElement) : [255, 255, 255]);
    const light = colour => colour.map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
    const result = {};
    for (const element of document.body.querySelectorAll('*')) {
        const says = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        if (!says || !element.checkVisibility() || element.tagName === 'title') continue;
        const below = ground(element), style = getComputedStyle(element);
        const ink = over(element.closest('svg') ? style.fill : style.color, below);
        const [a, b] = [light(ink), light(below)];
        result[`${element.tagName}.${element.getAttribute('class') ?? ''}`] =
            (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }
    return result;
}"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
STATES = ("full", "unfinished", "empty", "one")


def state(which: str) -> str:
    """A page of every kind there is."""
    if which == "empty":
        return page_of(Summary(), finished=False)
    if which == "one":
        return page_of(Summary.of([restored(0, NOON)]), [picture(0)])
    rows = realistic_rows()
    return page_of(Summary.of(rows), [picture(number) for number in range(30)], finished=which == "full")


def opened(page: Page, tmp_path: Path, html: str) -> list[str]:
    """Open a page from the disk; whatever it asks for or complains about is added to the list that is returned."""
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    uri = (tmp_path / "report.html").as_uri()
    events: list[str] = []
    page.on("console", lambda message: events.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error: {error}"))
    page.on("dialog", lambda dialog: events.append(f"dialog: {dialog.message}"))
    page.on(
        "request", lambda asked: events.append(asked.url) if not asked.url.startswith(("data:image/", uri)) else None
    )
    page.goto(uri)
    return events


@pytest.mark.browser
@pytest.mark.parametrize("which", STATES)
def test_a_page_opens_without_network_errors_or_overflow(page: Page, tmp_path: Path, which: str) -> None:
    events = opened(page, tmp_path, state(which))
    widths = page.eval_on_selector_all("img", "all => all.map(image => image.complete && image.naturalWidth)")
    assert widths == [64] * 2 * {"empty": 0, "one": 1}.get(which, RANDOM + WORST)
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    for width in (360, 800, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(OVERFLOW) <= 0, width
        charts = page.locator("svg.chart:visible").count()
        assert charts == (which in ("full", "unfinished")), width
    assert events == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", STATES)
def test_every_text_stands_out_in_light_and_dark(page: Page, tmp_path: Path, which: str, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    opened(page, tmp_path, state(which))
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 8
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) < 128) == (scheme == "dark")


@pytest.mark.browser
def test_a_hostile_name_is_text_and_runs_nothing(page: Page, tmp_path: Path) -> None:
    shown = [picture(n)._replace(key=key, input=key) for n, key in enumerate((HOSTILE, EMOJI, LONG))]
    html = page_of(Summary.of(realistic_rows()), shown, settings={HOSTILE: HOSTILE}, inputs=[HOSTILE])
    events = opened(page, tmp_path, html)
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    names = page.locator("li", has_text="damaged").locator(".examples code").all_inner_texts()
    assert names[:3] == [HOSTILE, r"photo\u202egpj.exe", EMOJI]
    assert names[3].startswith("folder 00")
    assert names[3].endswith("/last.jpg")
    assert page.locator(".examples bdi[title]").get_attribute("title") == LONG
    assert page.locator("figcaption bdi").first.inner_text() == HOSTILE
    assert page.locator("script").count() == 0
    assert page.title() == "Restoration report, finished"
    assert events == []


@pytest.mark.browser
def test_a_page_tells_what_came_of_the_run(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, state("full"))
    said = page.locator("body").inner_text()
    for expected in ("1,220", "1,200", "13", "finished", "no <b>face</b>", "paused for 9 h 50 min", "2 sessions"):
        assert expected in said or expected in page.content(), expected
    assert "faces.detect" in said
    assert page.locator("code[title]").first.get_attribute("title") == "8f31b0a7c2de" * 5
    assert "is not finished" not in said
    assert [head.inner_text() for head in page.locator("h2").all()] == [
        *("Before and after", "Least sharp results", "Failures"),
        *("Throughput", "Time per step", "Settings"),
    ]


@pytest.mark.browser
def test_an_unfinished_run_says_how_to_go_on(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, state("unfinished"))
    assert page.locator(".status").inner_text() == "unfinished: 1,284 of 5,220"
    hint = page.locator(".hint").inner_text()
    assert "The same command goes on where it stopped" in hint
    assert "64 more are done" in hint
    opened(page, tmp_path, state("empty"))
    said = page.locator("main").inner_text()
    for expected in ("No picture was restored yet.", "Nothing was tried yet.", "Too few results to tell"):
        assert expected in said


@pytest.mark.browser
@pytest.mark.parametrize("which", STATES)
def test_a_page_can_be_read_by_a_machine(page: Page, tmp_path: Path, which: str) -> None:
    opened(page, tmp_path, state(which))
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(head => Number(head.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert [page.locator(f"body > {landmark}").count() for landmark in ("header", "main", "footer")] == [1, 1, 1]
    assert page.locator("html[lang]").count() == 1
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("svg:not([aria-hidden]):not([aria-label])").count() == 0
    timed = 0 if which == "empty" else len(STEPS)
    assert timed == page.locator("tbody th[scope=row]", has_text=re.compile("^(Read|Restore|Encode)")).count()
