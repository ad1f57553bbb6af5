"""The pictures of a report: some of each split at random, and the worst, each with its input, all results, original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldbfr.evaluation.results import Entry, Measure, Row, TestSet
from ldbfr.evaluation.work import ALL, Places, splits_of
from ldbfr.images import Pixels, resize
from ldbfr.seeds import derive_seed

RANDOM, WORST = 4, 8
"""Rows of each split, and of the worst."""
LARGEST = 256
"""Longer side in px above which a picture is shown smaller."""
_WORST_BY = ("identity", "lpips-alex", "lpips-vgg", "lpips-squeeze", "psnr", "blur")


@dataclass(frozen=True)
class Shown:
    """One row: pictures of one test image, each with its caption."""

    name: str
    pictures: tuple[Pixels, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """What a report shows.

    `columns` are titles: the input, the restorers, the original. `worst_of` says of which restorer, and by what.
    """

    columns: tuple[str, ...] = ()
    random: tuple[tuple[str, tuple[Shown, ...]], ...] = ()
    worst: tuple[Shown, ...] = ()
    worst_of: str = ""


def make_gallery(
    test_set: TestSet,
    rows: Sequence[Row],
    measures: Sequence[Measure],
    output: str,
    worst_of: str,
    random: int = RANDOM,
) -> Gallery:
    """Choose and read pictures; which are drawn at random follows from the images' names alone.

    Args:
        test_set: originals and inputs.
        rows: of all restorers.
        measures: what the rows hold.
        output: of the evaluation, with the restored images.
        worst_of: the restorer whose worst images are shown.
        random: rows of each split.
    """
    restorers = list(dict.fromkeys(row.restorer for row in rows))
    values = {(row.restorer, row.entry.name): row.values for row in rows}
    entries = [row.entry for row in rows if row.restorer == restorers[0]]
    by_name = {one.name: one for one in measures}
    measure = next((by_name[name] for name in _WORST_BY if name in by_name), None)
    captioned = [by_name[name] for name in ("identity", "psnr") if name in by_name]

    def shown(entry: Entry) -> Shown:
        lq, original = test_set.read(entry)
        restored = [one for one in restorers if one != "input"]
        pictures = [lq, *(Places(output, one).read_image(entry.name) for one in restored)]
        captions = [caption(values.get((one, entry.name), {}), captioned) for one in ("input", *restored)]
        if original is not None:
            pictures.append(original)
            captions.append("")
        return Shown(entry.name, tuple(small(picture) for picture in pictures), tuple(captions))

    splits = splits_of(entries)
    drawn = []
    for split in splits[1:] or splits:
        own = [entry for entry in entries if split in (ALL, entry.split)]
        own.sort(key=lambda entry: derive_seed("picture", entry.name))
        drawn.append((split, tuple(shown(entry) for entry in sorted(own[:random], key=lambda entry: entry.name))))
    worst: tuple[Shown, ...] = ()
    said = ""
    if measure is not None:
        sign = -1 if measure.better == "lower" else 1
        ranked = [entry for entry in entries if measure.name in values[worst_of, entry.name]]
        ranked.sort(key=lambda entry: sign * values[worst_of, entry.name][measure.name])
        worst = tuple(shown(entry) for entry in ranked[:WORST])
        said = f"{worst_of}, by {measure.label}"
    titles = ("input", *(one for one in restorers if one != "input"), "original")
    has_original = any(entry.hq is not None for entry in entries)
    return Gallery(titles if has_original else titles[:-1], tuple(drawn), worst, said)


def caption(values: dict[str, float], measures: Sequence[Measure]) -> str:
    """The numbers of one picture."""
    parts = []
    for measure in measures:
        if measure.name in values:
            number = f"{values[measure.name]:.{1 if measure.unit == 'dB' else 2}f}"
            parts.append(f"{number} {measure.unit}" if measure.unit else f"{measure.name} {number}")
    return ", ".join(parts)


def small(pixels: Pixels) -> Pixels:
    """A picture of at most `LARGEST` px."""
    height, width = pixels.shape[:2]
    scale = LARGEST / max(height, width)
    return pixels if scale >= 1 else resize(pixels, round(height * scale), round(width * scale))
