"""Make the sample pictures of the endpoint's page: two public-domain portraits, made small and bad.

    python benchmarks/page_samples.py

Needs the extra `demo`. Equal versions of its packages give equal bytes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import numpy as np
import tyro

from benchmarks.photo_picture import degraded
from jobs.demo import PORTRAITS, Portrait
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.images import Pixels, encode_image, resize

REPOSITORY = Path(__file__).resolve().parent.parent
ENLARGED = 4
"""The bad pictures are shown at this many times their size, as one finds them on the web."""


@dataclass(frozen=True)
class Samples:
    """What is made."""

    eyes: float = 14
    """Their distance in the photos before these are enlarged, in px: it decides how bad they are."""
    template: str = "tight"
    """Framing of the aligned face: that of the weights that ldbfr comes with."""
    side: int = 256
    """Of the aligned face, in px."""
    output: Path = REPOSITORY / "serve" / "static" / "samples"
    """Folder of the pictures."""


def main(wanted: Samples) -> None:
    """Make a portrait, a photo with two people, and one aligned face."""
    collins, hopper = PORTRAITS
    wanted.output.mkdir(parents=True, exist_ok=True)
    left, right = bust(collins, wanted.eyes), bust(hopper, wanted.eyes)
    write(wanted.output / "portrait.jpg", enlarged(right))
    write(wanted.output / "two-people.jpg", enlarged(np.concatenate([left, right], axis=1)))
    face = collins.face(wanted.template, wanted.side)
    write(wanted.output / "face.jpg", apply(draw(get_profile("medium"), degradation_generator(1, "page")), face))


def bust(portrait: Portrait, eyes: float) -> Pixels:
    """Head and shoulders, 5.6 by 6.6 eye distances, degraded at the size at which the eyes are so far apart."""
    (left, top), (right, bottom) = portrait.eyes
    distance = math.dist(*portrait.eyes)
    width, height = round(5.6 * distance), round(6.6 * distance)
    photo = portrait.load()
    x = min(max(round((left + right - width) / 2), 0), photo.shape[1] - width)
    y = max(round((top + bottom) / 2 - 2.2 * distance), 0)
    return degraded(resize(photo[y : y + height, x : x + width], round(6.6 * eyes), round(5.6 * eyes)))


def enlarged(photo: Pixels) -> Pixels:
    """The same picture with more pixels, and no more to see."""
    return resize(photo, ENLARGED * photo.shape[0], ENLARGED * photo.shape[1])


def write(path: Path, picture: Pixels) -> None:
    """As a JPEG."""
    path.write_bytes(encode_image(picture, "jpeg", quality=85))


if __name__ == "__main__":
    main(tyro.cli(Samples, description=__doc__))
