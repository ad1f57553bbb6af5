"""The report of a run: one HTML file that holds everything it shows and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from ldbfr import pages, storage
from ldbfr.archive.gallery import RANDOM, Gallery
from ldbfr.archive.naming import MANIFEST_FOLDER, REPORT_FILE
from ldbfr.archive.report_page import chart, rate_unit
from ldbfr.archive.rows import Picture
from ldbfr.archive.summary import IDLE_MINUTES, STEPS, Cause, Example, Summary
from ldbfr.pages import (
    amount,
    bar,
    counted,
    digest,
    facts,
    flat,
    in_bytes,
    moment,
    name,
    picture,
    plain,
    share,
    shortened,
    stacked,
    text,
)
from ldbfr.progress import duration

_INPUTS_SHOWN = 10
_WORKERS_SHOWN = 12
_CAUSES_SHOWN = 20
_REASON = 600  # characters
_NAME_OF_STEP = {"read": "Read and decode", "model": "Restore", "write": "Encode and write"}
_SHORT = {"second": "s", "minute": "min"}
NOTHING = "–"


def write_report(
    output: str,
    summary: Summary,
    gallery: Gallery,
    about: Mapping[str, Any],
    *,
    finished: bool,
    planned: int,
    num_done: int,
) -> str:
    """Write the report into the run's folder; its URI.

    Args:
        output: URI of the run.
        summary: of the parts that are in the manifest.
        gallery: pictures to show.
        about: the run: software, inputs, weights, settings, settings_digest, started; what it lacks is not shown.
        finished: whether all is done that can be.
        planned: inputs of the plan.
        num_done: inputs that are restored, failed or skipped.

    Raises:
        StorageError: the file cannot be written.
    """
    uri = storage.join(output, REPORT_FILE)
    page = document(output, summary, gallery, about, finished=finished, planned=planned, num_done=num_done)
    storage.write_bytes(uri, page.encode())
    return uri


def document(
    output: str,
    summary: Summary,
    gallery: Gallery,
    about: Mapping[str, Any],
    *,
    finished: bool,
    planned: int,
    num_done: int,
) -> str:
    """The report's HTML; equal arguments give an equal page."""
    status = "finished" if finished else f"unfinished: {num_done:,} of {planned:,}"
    sections = [
        numbers_section(summary, planned, num_done),
        random_section(gallery.random, summary),
        worst_section(gallery.worst) if len(gallery.random) == RANDOM else "",  # fewer are all there are
        failures_section(summary),
        throughput_section(summary),
        steps_section(summary),
        settings_section(output, about),
    ]
    head = header(output, summary, status, finished=finished, num_done=num_done)
    return pages.document(f"Restoration report, {status}", head, sections, footer(about))


def header(output: str, summary: Summary, status: str, *, finished: bool, num_done: int) -> str:
    """What this is, and how it stands."""
    kind = "done" if finished else "open"
    times = ""
    if summary.first is not None and summary.last is not None:
        times = f". First result {moment(summary.first)}, last {moment(summary.last)}"
    hint = ""
    if not finished:
        waiting = num_done - summary.total
        which = f" The numbers below are those of {counted(summary.total, 'input')}; " if waiting > 0 else ""
        which += f"{counted(waiting, 'more is', 'more are')} done and still being put together." if waiting > 0 else ""
        hint = (
            '<p class="hint"><strong>This run is not finished.</strong> The same command goes on where it stopped; '
            f"nothing is restored twice.{which}</p>"
        )
    return (
        f'<header>\n<div class="title"><h1>Restoration report</h1><span class="status {kind}">{status}</span></div>\n'
        f'<p class="lede">Results in <code>{name(output)}</code>{times}.</p>\n{hint}</header>'
    )


def footer(about: Mapping[str, Any]) -> str:
    """Who made this."""
    software = about.get("software")
    by = f" by {text(software)}" if software else ""
    return (
        f"<footer><p>Made{by}. Every input has its row in "
        f"<code>{MANIFEST_FOLDER}/</code>, a folder of parquet files. This page holds all it shows: it loads nothing "
        "and runs nothing.</p></footer>"
    )


# ---- sections ----


def numbers_section(summary: Summary, planned: int, num_done: int) -> str:
    """The large numbers."""
    rate, seconds = summary.rate(), summary.active_seconds()
    size, unit = in_bytes(summary.size)
    per, factor = rate_unit(summary)
    elapsed = duration(seconds) if seconds >= 1 else ("< 1 s" if summary.first is not None else NOTHING)
    figures = [
        ("planned", "inputs planned", amount(planned)),
        ("restored" if summary.restored else "", "restored", amount(summary.restored)),
        ("failed" if summary.failed else "", "failed", amount(summary.failed)),
        ("skipped" if summary.skipped else "", "skipped", amount(summary.skipped)),
        ("", "throughput", NOTHING if rate is None else f"{amount(rate * factor)} <small>images/{_SHORT[per]}</small>"),
        ("", "faces restored", amount(summary.faces)),
        ("", "time running", elapsed),
        ("", "read", f"{size} <small>{unit}</small>"),
    ]
    tiles = "".join(f'<div class="{kind}"><dt>{label}</dt><dd>{value}</dd></div>' for kind, label, value in figures)
    left = max(0, planned - summary.total)
    parts = [(summary.restored, "good"), (summary.failed, "bad"), (summary.skipped, "skip"), (left, "track")]
    label = (
        f"{amount(summary.restored)} restored, {summary.failed:,} failed, {summary.skipped:,} skipped, {left:,} left"
    )
    return (
        '<section class="numbers" aria-label="Numbers">'
        f'{stacked(parts, label)}<dl class="figures">{tiles}</dl></section>'
    )


def random_section(pictures: Sequence[Picture], summary: Summary) -> str:
    """What to expect of the results."""
    if not pictures:
        what = "No picture was restored yet." if not summary.restored else "No pictures were kept for this report."
        return f'<section><h2>Before and after</h2><p class="nothing">{what}</p></section>'
    before, after = summary.sharpness_input.median(), summary.sharpness.median()
    sharpness = ""
    if before is not None and after is not None:
        sharpness = f" The median sharpness of all results is {after:.2g}, that of their inputs {before:.2g}."
    return (
        f'<section class="long"><h2>Before and after</h2><p>{counted(len(pictures), "result")} drawn at random: '
        f"before on the left, after on the right.{sharpness}</p>{_pairs(pictures)}</section>"
    )


def worst_section(pictures: Sequence[Picture]) -> str:
    """What to look at first."""
    if not pictures:
        return ""
    return (
        '<section class="long"><h2>Least sharp results</h2><p>Look at these first. Sharpness is the mean absolute '
        f"Laplacian in grey levels: the smaller, the smoother the picture.</p>{_pairs(pictures)}</section>"
    )


def _pairs(pictures: Sequence[Picture]) -> str:
    return f'<ul class="pairs">{"".join(map(_pair, pictures))}</ul>'


def _pair(shown: Picture) -> str:
    sharpness = "no face restored" if math.isnan(shown.sharpness) else f"sharpness {amount(shown.sharpness)}"
    return (
        f'<li><figure class="pair"><div>{picture(shown.before, f"{shown.key}, before")}'
        f"{picture(shown.after, f'{shown.key}, after')}</div>"
        f'<figcaption><bdi dir="auto" title="{text(shown.input)}">{text(shown.key)}</bdi>'
        f"<span>{sharpness}</span></figcaption></figure></li>"
    )


def failures_section(summary: Summary) -> str:
    """Why inputs failed or were skipped."""
    parts = ['<section class="long"><h2>Failures</h2>']
    if summary.failed:
        tried = summary.restored + summary.failed
        parts.append(f"<p>{share(summary.failed, tried)} of {counted(tried, 'input')} that were tried.</p>")
        parts.append(_causes(summary.failures, "failed"))
    else:
        said = "Nothing failed." if summary.total else "Nothing was tried yet."
        parts.append(f'<p class="nothing">{said}</p>')
    if summary.skipped:
        parts.append(f"<h3>Skipped</h3>{_causes(summary.skips, 'skipped')}")
    return "".join(parts) + "</section>"


def _causes(causes: Mapping[str, Cause], kind: str) -> str:
    """The most frequent causes, each with a bar and its examples; the first is open."""
    ranked = sorted(causes.items(), key=lambda item: (-item[1].count, item[0]))
    total = sum(cause.count for cause in causes.values())
    items = []
    for place, (cause_name, cause) in enumerate(ranked[:_CAUSES_SHOWN]):
        examples = "".join(map(_example, cause.examples))
        more = cause.count - len(cause.examples)
        examples += f'<li class="more">and {more:,} more, in the manifest</li>' if more else ""
        items.append(
            f"<li><details{' open' if kind == 'failed' and not place else ''}>"
            f"<summary><b>{shortened(cause_name, 80)}</b>{bar(cause.count / ranked[0][1].count, kind)}"
            f"<span>{cause.count:,} · {share(cause.count, total)}</span></summary>"
            f'<ul class="examples">{examples}</ul></details></li>'
        )
    if len(ranked) > _CAUSES_SHOWN:
        items.append(f'<li class="more">and {len(ranked) - _CAUSES_SHOWN:,} rarer causes, in the manifest</li>')
    return f'<ul class="causes">{"".join(items)}</ul>'


def _example(example: Example) -> str:
    reason = example.reason.removeprefix(f"{example.input}: ")  # errors begin with what they are about
    return f'<li><code>{name(example.input)}</code><p dir="auto">{shortened(reason, _REASON)}</p></li>'


def throughput_section(summary: Summary) -> str:
    """How fast it went, over time."""
    if summary.rate() is None:
        nothing = '<p class="nothing">Too few results to tell how fast it goes.</p>'
        return f"<section><h2>Throughput</h2>{nothing}</section>"
    sessions = summary.sessions()
    unit, _ = rate_unit(summary)
    said = f"Restored images per {unit}, in UTC."
    if len(sessions) > 1:
        said += f" {len(sessions):,} sessions; pauses of more than {IDLE_MINUTES} minutes are shortened."
    if summary.undated:
        said += f" {counted(summary.undated, 'result has', 'results have')} no possible time and are left out."
    return (
        f"<section><h2>Throughput</h2><p>{said}</p>"
        f"{chart(summary, 1070, 280, 'broad')}{chart(summary, 340, 230, 'narrow')}</section>"
    )


def steps_section(summary: Summary) -> str:
    """Where the time went."""
    total = sum(summary.seconds.values())
    if not total:
        return '<section><h2>Time per step</h2><p class="nothing">Nothing was timed yet.</p></section>'
    rows = "".join(_step_row(step, summary.seconds[step], total, summary.restored) for step in STEPS)
    heads = '<th scope="col">Step</th><td class="wide"></td>'
    heads += "".join(f'<th scope="col" class="amount">{head}</th>' for head in ("Share", "Per image", "In all"))
    return (
        f"<section><h2>Time per step</h2><p>Of all workers together: {_workers(summary)}.</p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _step_row(step: str, seconds: float, total: float, restored: int) -> str:
    per_image = f"{amount(1000 * seconds / restored)} ms" if restored else NOTHING
    cells = (share(seconds, total), per_image, duration(seconds))
    return (
        f'<tr><th scope="row">{_NAME_OF_STEP[step]}</th><td class="wide">{bar(seconds / total)}</td>'
        + "".join(f'<td class="amount">{cell}</td>' for cell in cells)
        + "</tr>"
    )


def _workers(summary: Summary) -> str:
    ranked = sorted(summary.workers.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{name(worker)} ({counted(count, 'image')})" for worker, count in ranked[:_WORKERS_SHOWN])
    more = f" and {len(ranked) - _WORKERS_SHOWN:,} more" if len(ranked) > _WORKERS_SHOWN else ""
    return f"{counted(len(ranked), 'worker')}" + (f", {shown}{more}" if ranked else "")


def settings_section(output: str, about: Mapping[str, Any]) -> str:
    """What made these results."""
    others = ("inputs", "weights")  # they stand beside these
    settings = [(key, plain(value)) for key, value in flat(about.get("settings") or {}) if key not in others]
    table = facts(settings, "As they were given, or by default") if settings else ""
    return (
        '<section class="long"><h2>Settings</h2><div class="columns">'
        f"<div>{table}</div><div>{facts(_provenance(output, about), 'Where it came from')}</div></div></section>"
    )


def _provenance(output: str, about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Inputs, software and digests."""
    inputs = [str(uri) for uri in about.get("inputs") or ()]
    if inputs:
        shown = "<br>".join(f"<code>{name(uri)}</code>" for uri in inputs[:_INPUTS_SHOWN])
        more = f"<br>and {len(inputs) - _INPUTS_SHOWN:,} more" if len(inputs) > _INPUTS_SHOWN else ""
        yield "inputs" if len(inputs) > 1 else "input", shown + more
    yield "output", f"<code>{name(output)}</code>"
    if about.get("started"):
        yield "started", _started(str(about["started"]))
    if about.get("software"):
        yield "software", plain(about["software"])
    weights = about.get("weights") or {}
    for key in ("name", "preset", "side"):
        if weights.get(key) is not None:
            yield ("weights" if key == "name" else f"weights' {key}"), plain(weights[key])
    if weights.get("digest"):
        yield "weights' digest", digest(str(weights["digest"]))
    if about.get("settings_digest"):
        yield "settings' digest", digest(str(about["settings_digest"]))


def _started(iso: str) -> str:
    try:
        return moment(datetime.fromisoformat(iso).timestamp())
    except ValueError:  # of another version: shown as it is
        return text(iso)
