"""The chart of a run's throughput over time, drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from ldbfr.archive.summary import Session, Summary
from ldbfr.pages import amount, counted, moment, nice_scale, text
from ldbfr.progress import duration

_MINUTE = 60
_DAY = 24 * 60  # minutes
_WIDTHS = (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, _DAY, 2 * _DAY, 7 * _DAY, 30 * _DAY, 365 * _DAY)


@dataclass(frozen=True)
class Bin:
    """Restored inputs per second in some minutes."""

    start: float
    """Minutes since 1970."""
    end: float
    rate: float


@dataclass(frozen=True)
class Stretch:
    """A session on the time axis, from `left` to `right` px."""

    session: Session
    left: float
    right: float
    bins: Sequence[Bin]

    def x(self, minute: float) -> float:
        """Where a time lies, in px."""
        return self.left + (minute - self.session.first) / self.session.length * (self.right - self.left)


def rate_unit(summary: Summary) -> tuple[str, int]:
    """The unit of time for which a run's throughput is a handy number, and how many seconds it has."""
    return ("second", 1) if (summary.rate() or 0) >= 1 else ("minute", _MINUTE)


def bins_of(summary: Summary, session: Session, width: int) -> list[Bin]:
    """A session in bins of `width` minutes; the run's first and last count only for the time that they cover."""
    known_start, known_end = 0.0, math.inf
    if summary.rate() is not None and summary.first is not None and summary.last is not None:
        known_start, known_end = summary.first / _MINUTE, summary.last / _MINUTE
    _, seconds = rate_unit(summary)
    result = []
    for start in range(session.first, session.last + 1, width):
        end = min(start + width, session.last + 1)
        count = sum(summary.minutes.get(minute, 0) for minute in range(start, end))
        covered = max(min(end, known_end) - max(start, known_start), (end - start) / 2)
        result.append(Bin(start, end, count / covered * seconds / _MINUTE))
    return result


def chart(summary: Summary, width: int, height: int, kind: str) -> str:
    """Restored inputs over time, as an area; pauses between sessions are shortened to a grey band."""
    left, right, top, base = 46, width - 18, 12, height - 40
    stretches = _stretches(summary, left, right)
    peak = max(bin.rate for stretch in stretches for bin in stretch.bins)
    step, ceiling = nice_scale(peak)
    unit, _ = rate_unit(summary)

    def y(rate: float) -> float:
        return base - rate / ceiling * (base - top)

    parts = [
        _grid(step, ceiling, left, right, y),
        *(_pause(one, other, top, base) for one, other in pairwise(stretches)),
        *(_area(stretch, y, base) + _tooltips(stretch, unit, top, base) for stretch in stretches),
        f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>',
        _times(stretches, base, right),
    ]
    label = f"Restored images per {unit} over time: {amount(peak)} at most, {counted(len(stretches), 'session')}"
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _stretches(summary: Summary, left: float, right: float) -> list[Stretch]:
    """The sessions side by side, each as wide as it is long, with gaps of equal width."""
    sessions = summary.sessions()
    gaps = len(sessions) - 1
    gap = min(34.0, 0.3 * (right - left) / max(1, gaps))
    active = sum(session.length for session in sessions)
    per_minute = (right - left - gap * gaps) / active
    bin_width = next((minutes for minutes in _WIDTHS if active / minutes <= (right - left) / 5), _WIDTHS[-1])
    result, x = [], left
    for session in sessions:
        end = x + session.length * per_minute
        result.append(Stretch(session, x, end, bins_of(summary, session, bin_width)))
        x = end + gap
    return result


def _grid(step: float, ceiling: float, left: float, right: float, y: Callable[[float], float]) -> str:
    parts = []
    for number in range(1, round(ceiling / step) + 1):
        height = y(number * step)
        label = f"{number * step:,.6g}" if step < 1 else f"{number * step:,.0f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{height + 4:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<text x="{left - 8}" y="{y(0) + 4:.1f}" text-anchor="end">0</text>')
    return "".join(parts)


def _area(stretch: Stretch, y: Callable[[float], float], base: float) -> str:
    """The curve goes through the middle of every bin, and level to the ends."""
    points = [(stretch.x((bin.start + bin.end) / 2), y(bin.rate)) for bin in stretch.bins]
    points = [(stretch.left, points[0][1]), *points, (stretch.right, points[-1][1])]
    curve = " ".join(f"{x:.1f},{height:.1f}" for x, height in points)
    return (
        f'<polygon class="area" points="{stretch.left:.1f},{base} {curve} {stretch.right:.1f},{base}"/>'
        f'<polyline class="curve" points="{curve}"/>'
    )


def _tooltips(stretch: Stretch, unit: str, top: float, base: float) -> str:
    """What a bin says when the mouse is over it."""
    parts = []
    for bin in stretch.bins:
        x, end = stretch.x(bin.start), stretch.x(bin.end)
        said = f"{moment(bin.start * _MINUTE)}: {amount(bin.rate)} images per {unit}"
        place = f'x="{x:.1f}" y="{top}" width="{end - x:.1f}" height="{base - top}"'
        parts.append(f'<rect class="bin" {place}><title>{said}</title></rect>')
    return "".join(parts)


def _pause(before: Stretch, after: Stretch, top: float, base: float) -> str:
    """A grey band with the pause's length along it."""
    length = f"paused for {duration((after.session.first - before.session.last - 1) * _MINUTE)}"
    x, width = before.right, after.left - before.right
    label = ""
    if width >= 16:
        place = f"{x + width / 2 + 4:.1f} {(top + base) / 2:.1f}"
        label = f'<text text-anchor="middle" transform="translate({place}) rotate(-90)">{length}</text>'
    return (
        f'<g><title>{length}</title><rect class="idle" x="{x:.1f}" y="{top}" width="{width:.1f}" '
        f'height="{base - top}"/>{label}</g>'
    )


def _times(stretches: Sequence[Stretch], base: float, right: float) -> str:
    """Times of day (UTC) below the axis, as many as there is room for; the date below where it is another."""
    per_minute = (stretches[0].right - stretches[0].left) / stretches[0].session.length
    step = next((minutes for minutes in _WIDTHS if minutes * per_minute >= 68), _WIDTHS[-1])
    parts, free, day = [], -math.inf, -1
    for stretch in stretches:
        first, last = stretch.session
        ticks = list(range(-(-first // step) * step, last + 2, step))
        for minute in ticks if any(stretch.x(tick) - 20 > free for tick in ticks) else [first]:
            x = stretch.x(minute)
            if not free + 20 < x <= right:
                continue
            when = datetime.fromtimestamp(minute * _MINUTE, UTC)
            date = f"{when.day} {when:%b}"
            lines = [date] if step >= _DAY else [f"{when:%H:%M}", *([date] if minute // _DAY != day else [])]
            for place, line in enumerate(lines):
                parts.append(f'<text x="{x:.1f}" y="{base + 18 + 16 * place}" text-anchor="middle">{line}</text>')
            free, day = x + 20, minute // _DAY
    return "".join(parts)
