"""What a report's page is made of: escaped text, numbers for people, tables, bars, and the document around them."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# Control characters, which a browser drops or turns, and marks that turn the direction of the text around them.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# ---- text ----


def text(value: object) -> str:
    """Anything as text for a page: markup and invisible characters are shown, not obeyed."""
    return escape(_INVISIBLE.sub(lambda found: ascii(found[0])[1:-1], str(value)), quote=True)


def name(value: str, longest: int = 120) -> str:
    """A file's name, isolated from the direction of the text around it; its middle is left out where it is long."""
    if len(value) <= longest:
        return f'<bdi dir="auto">{text(value)}</bdi>'
    half = longest // 2
    return f'<bdi dir="auto" title="{text(value)}">{text(value[:half])}…{text(value[-half:])}</bdi>'


def shortened(value: str, longest: int) -> str:
    """Text cut after so many characters."""
    return text(value if len(value) <= longest else value[:longest] + "…")


def digest(value: str) -> str:
    """The start of a digest; all of it as a tooltip."""
    return f'<code title="{text(value)}">{text(value[:12])}</code>'


def amount(count: float) -> str:
    """A number with thousands separators, and three digits at least where it is not whole."""
    if count == int(count) or count >= 100:
        return f"{count:,.0f}"
    return f"{count:.{1 if count >= 10 else 2}f}"


def counted(count: int, one: str, many: str = "") -> str:
    """A number and its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def share(count: float, total: float) -> str:
    """A percentage that is neither 0 nor 100 unless it truly is."""
    if not total or not count:
        return "0 %"
    percent = 100 * count / total
    if percent < 0.1:
        return "< 0.1 %"
    return "100 %" if count == total else f"{min(percent, 99.9):.1f} %"


def in_bytes(size: int) -> tuple[str, str]:
    """A size as number and unit."""
    power = min(5, max(0, int(math.log(max(size, 1), 1000))))
    return amount(size / 1000**power), ("bytes", "kB", "MB", "GB", "TB", "PB")[power]


def moment(seconds: float) -> str:
    """A time of day, in UTC."""
    when = datetime.fromtimestamp(seconds, UTC)
    return f"{when.day} {when:%b %Y, %H:%M} UTC"


def picture(jpeg: bytes, alt: str) -> str:
    """A picture inside the page."""
    return f'<img src="data:image/jpeg;base64,{b64encode(jpeg).decode()}" alt="{text(alt)}">'


# ---- tables ----


def facts(rows: Iterable[tuple[str, str]], caption: str) -> str:
    """A table of names (text) and values (HTML)."""
    body = "".join(f'<tr><th scope="row">{text(head)}</th><td>{value}</td></tr>' for head, value in rows)
    return f'<table class="facts"><caption>{text(caption)}</caption><tbody>{body}</tbody></table>'


def plain(value: Any) -> str:
    """A setting's value as HTML."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "–"
    if isinstance(value, float | int):
        return text(f"{value:,}" if abs(value) < 1e15 else value)
    return name(str(value)) if str(value) else "–"


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (a.b.c, value)."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ---- bars ----


def bar(fraction: float, kind: str = "") -> str:
    """A horizontal bar; what it says is said beside it."""
    width = 100 * min(1.0, max(fraction, 0.008 if fraction > 0 else 0.0))
    return (
        f'<svg class="bar {kind}" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{width:.2f}" height="8"/></svg>'
    )


def stacked(parts: Sequence[tuple[float, str]], label: str) -> str:
    """One bar of several colours, by their weight."""
    total = sum(weight for weight, _ in parts) or 1
    rects, x = "", 0.0
    for weight, colour in parts:
        width = 100 * weight / total
        rects += f'<rect x="{x:.3f}" width="{width:.3f}" height="8" fill="var(--{colour})"/>' if weight else ""
        x += width
    return (
        '<svg class="progress" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(label)}">{rects}</svg>'
    )


def nice_scale(largest: float, lines: int = 4) -> tuple[float, float]:
    """Distance of the grid lines, 1, 2 or 5 times a power of ten, and the multiple of it that holds the largest."""
    rough = max(largest, 1e-9) / lines
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))
    return step, step * math.ceil(largest / step - 1e-9)


# ---- the document ----


def document(title: str, header: str, sections: Iterable[str], footer: str, style: str = "") -> str:
    """A page that holds everything it shows, loads nothing and runs nothing.

    Args:
        title: of the window, as text.
        header: HTML.
        sections: HTML.
        footer: HTML.
        style: CSS beside what all pages share.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{_style()}{style}</style>\n</head>\n<body>\n"
        f"{header}\n<main>\n" + "\n".join(sections) + f"\n</main>\n{footer}\n</body>\n</html>\n"
    )


@cache
def _style() -> str:
    return files("ldbfr").joinpath("pages.css").read_text(encoding="utf-8")
