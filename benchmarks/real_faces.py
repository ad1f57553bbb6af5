"""Real low-quality faces restored, as one picture: input, first stage, restored, and what the numbers say of each.

    python benchmarks/real_faces.py --faces aligned512/ --weights faces_128 --output real-faces.png

The faces are aligned in FFHQ's framing at any size; for weights of another framing they are cut out of it by the two
templates' landmarks. There is no truth to compare with: identity is the distance to the input itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import numpy as np
import tyro

from ldbfr.data.index import iterate_images
from ldbfr.evaluation.metrics import IdentityModel, sharpness
from ldbfr.faces import TEMPLATES, fit_similarity, warp
from ldbfr.images import Pixels, decode_image, encode_image
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.sheets import contact_sheet


@dataclass(frozen=True)
class RealFaces:
    """Restore real faces and lay them out."""

    faces: Path
    """Folder, tar or zip of aligned faces in FFHQ's framing."""
    output: Path
    """The picture, .png."""
    weights: str = "faces_128"
    """Name or folder of the weights."""
    cell: int = 192
    """Side of a picture in the grid, in px."""
    seed: int = 0
    """Of the noise."""


def reframed(face: Pixels, template: str, side: int) -> Pixels:
    """A face of FFHQ's framing in another one."""
    here, there = (np.array(TEMPLATES[name]) for name in ("ffhq", template))
    return warp(face, fit_similarity(here * len(face) / 512, there * side / 512), side, side)


def main(args: RealFaces) -> None:
    """Restore, print, draw."""
    pipeline = LDBFRPipeline.from_pretrained(args.weights)
    loaded = [(name, decode_image(data, name=name)) for name, data in iterate_images(args.faces)]
    names = [name for name, _ in loaded]
    inputs = np.stack([reframed(face, pipeline.preset.template, pipeline.side) for _, face in loaded])
    output = pipeline(inputs, seed=args.seed, return_first_stage=True)
    identity = IdentityModel()
    titles = []
    for name, before, after in zip(names, inputs, output.images, strict=True):
        distance = identity.distance(after, before)
        titles.append(f"{name}, identity {distance:.2f}")
        print(f"{name:24} identity {distance:.3f}  sharpness {sharpness(before):.2f} -> {sharpness(after):.2f}")
    rows = [list(row) for row in zip(inputs, output.first_stage, output.images, strict=True)]
    sheet = contact_sheet(rows, ("input", "first stage", "restored"), titles, args.cell)
    args.output.write_bytes(encode_image(sheet, "png"))


if __name__ == "__main__":
    main(tyro.cli(RealFaces, description=__doc__))
