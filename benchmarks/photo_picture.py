"""Draw the README's picture of whole photos: two public-domain portraits, made small and bad, before and after.

    python benchmarks/photo_picture.py

Needs the face detector's file (see docs/photos.md) and the extra `demo`.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import numpy as np
import tyro

from jobs.demo import PORTRAITS
from ldbfr.config import DEFAULT_WEIGHTS
from ldbfr.images import Pixels, decode_image, encode_image, resize

REPOSITORY = Path(__file__).resolve().parent.parent
HEIGHT = 560


@dataclass(frozen=True)
class Picture:
    """What is drawn."""

    weights: str = DEFAULT_WEIGHTS
    """Which model."""
    eyes: float = 14
    """Their distance in the degraded photos, in px: it decides how bad they are."""
    output: Path = REPOSITORY / "docs" / "images" / "photos.jpg"
    """The picture."""


def main(wanted: Picture) -> None:
    """Degrade, restore with the command, and lay out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for portrait in PORTRAITS:
            photo = portrait.load()
            shrink = wanted.eyes / math.dist(*portrait.eyes)
            small = resize(photo, round(shrink * photo.shape[0]), round(shrink * photo.shape[1]))
            (folder / "in").mkdir(exist_ok=True)
            (folder / "in" / f"{portrait.name}.png").write_bytes(encode_image(degraded(small), "png"))
        command = [sys.executable, "-m", "ldbfr.cli", "restore", str(folder / "in"), "-o", str(folder / "out")]
        command += ["--scale", "4"]
        subprocess.run([*command, "--weights", wanted.weights], check=True, cwd=REPOSITORY)
        columns = []
        for portrait in PORTRAITS:
            for where in ("in", "out"):
                path = folder / where / f"{portrait.name}.png"
                photo = decode_image(path.read_bytes(), name=str(path))
                columns += [resize(photo, HEIGHT, round(HEIGHT * photo.shape[1] / photo.shape[0]))]
                columns += [np.full((HEIGHT, 4 if where == "in" else 16, 3), 255, np.uint8)]
    wanted.output.write_bytes(encode_image(np.concatenate(columns[:-1], axis=1), "jpeg", quality=88))


def degraded(photo: Pixels) -> Pixels:
    """As a scan on the web: out of focus, noisy, compressed."""
    height, width = photo.shape[:2]
    blurred = resize(resize(photo, round(height / 1.6), round(width / 1.6)), height, width)
    noise = np.random.default_rng(1).normal(0, 5, blurred.shape)
    noisy = np.clip(np.rint(blurred + noise), 0, 255).astype(np.uint8)
    return decode_image(encode_image(noisy, "jpeg", quality=70), name="degraded")


if __name__ == "__main__":
    main(tyro.cli(Picture, description=__doc__))
