"""Curves over the number of steps, drawn as SVG: inside a page, or as a file of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ldbfr.evaluation.numbers import number
from ldbfr.pages import nice_scale, text

WIDTH, HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BASE = 56, WIDTH - 16, 14, HEIGHT - 40
COLOURS = ("accent", "bad", "skip", "good")
"""Names of the pages' colours, one for each curve."""
_OWN_STYLE = """<style>
svg { --page: #ffffff; --soft: #596069; --line: #e4e1db; --left: #8b8880; --accent: #0f6b74; --good: #1d7a4f;
  --bad: #b23a26; --skip: #8a6412; background: var(--page); font: 12px sans-serif; }
@media (prefers-color-scheme: dark) { svg { --page: #1a1d22; --soft: #a2a9b2; --line: #2c3037; --left: #4a4f58;
  --accent: #5fbac3; --good: #6cc79a; --bad: #ee8b78; --skip: #d8b25a; } }
text { fill: var(--soft); } .grid { stroke: var(--line); } .axis { stroke: var(--left); }
</style>"""


@dataclass(frozen=True)
class Point:
    """A mean at a number of steps, with its interval where there is one."""

    steps: int
    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """The points of one scheduler, in order of their steps."""

    name: str
    points: tuple[Point, ...]


def chart(title: str, curves: Sequence[Curve], level: tuple[str, float] | None = None, alone: bool = False) -> str:
    """Curves over the number of steps, which has a logarithmic axis; intervals are bars.

    Args:
        title: what is drawn, with unit and the better direction.
        curves: at most four.
        level: a name and a number, drawn as a dashed line across: the first stage alone.
        alone: for a file of its own, with its style, title and legend.
    """
    values = [value for curve in curves for point in curve.points for value in (point.mean, point.low, point.high)]
    finite = [value for value in [*values, level[1] if level else None] if value is not None and math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    step, _ = nice_scale((high - low) or abs(high) or 1.0)
    floor, ceiling = step * math.floor(low / step), step * math.ceil(high / step)
    ceiling = ceiling if ceiling > floor else floor + step
    steps = sorted({point.steps for curve in curves for point in curve.points})
    top = _TOP + (40 if alone else 0)

    def x(count: int) -> float:
        first, last = math.log(steps[0]), math.log(steps[-1])
        share = (math.log(count) - first) / (last - first) if last > first else 0.5
        return _LEFT + 14 + share * (_RIGHT - _LEFT - 28)

    def y(value: float) -> float:
        return _BASE - (value - floor) / (ceiling - floor) * (_BASE - top)

    parts = []
    for tick in range(round((ceiling - floor) / step) + 1):
        value, height = floor + tick * step, y(floor + tick * step)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    parts += [f'<text x="{x(count):.1f}" y="{_BASE + 18}" text-anchor="middle">{count}</text>' for count in steps]
    parts.append(f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_BASE + 34}" text-anchor="middle">denoising steps</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BASE}" y2="{_BASE}"/>')
    if level is not None and math.isfinite(level[1]):
        height = y(level[1])
        parts.append(
            f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="var(--soft)" '
            f'stroke-dasharray="5 4"><title>{text(level[0])}: {number(level[1])}</title></line>'
        )
    for place, curve in enumerate(curves):
        parts.append(_curve(curve, COLOURS[place % len(COLOURS)], [(x(p.steps), y) for p in curve.points]))
    if alone:
        parts.append(f'<text x="{_LEFT}" y="18" font-weight="bold">{text(title)}</text>{_legend(curves, level)}')
    head = '<svg xmlns="http://www.w3.org/2000/svg"' if alone else '<svg class="chart"'
    style = _OWN_STYLE if alone else ""
    return f'{head} viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">{style}{"".join(parts)}</svg>'


def _curve(curve: Curve, colour: str, places: Sequence[tuple[float, object]]) -> str:
    parts, line = [], []
    for point, (x, y) in zip(curve.points, places, strict=True):
        assert callable(y)
        if not math.isfinite(point.mean):
            continue
        line.append(f"{x:.1f},{y(point.mean):.1f}")
        if point.low is not None and point.high is not None:
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}" '
                f'stroke="var(--{colour})" stroke-opacity="0.45"/>'
            )
        said = f"{curve.name}, {point.steps} steps: {number(point.mean)}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y(point.mean):.1f}" r="3.5" fill="var(--{colour})">'
            f"<title>{text(said)}</title></circle>"
        )
    return (
        f'<polyline fill="none" stroke="var(--{colour})" stroke-width="2" points="{" ".join(line)}"/>{"".join(parts)}'
    )


def _legend(curves: Sequence[Curve], level: tuple[str, float] | None) -> str:
    parts, x = [], float(_LEFT)
    names = [(curve.name, f"var(--{COLOURS[place % len(COLOURS)]})") for place, curve in enumerate(curves)]
    for name, colour in [*names, *([(f"- - {level[0]}", "")] if level else [])]:
        if colour:
            parts.append(f'<line x1="{x}" x2="{x + 14}" y1="34" y2="34" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + (18 if colour else 0)}" y="38">{text(name)}</text>')
        x += 34 + 6.6 * len(name)
    return "".join(parts)


def legend(curves: Sequence[Curve], level: str | None) -> str:
    """The curves' names with their colours, as HTML."""
    items = "".join(
        f'<li><b style="background: var(--{COLOURS[place % len(COLOURS)]})"></b>{text(curve.name)}</li>'
        for place, curve in enumerate(curves)
    )
    return f'<ul class="series">{items}{f"<li>- - {text(level)}</li>" if level else ""}</ul>'
