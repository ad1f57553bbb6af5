"""Which of the found faces are restored, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ldbfr.faces.face import Face, common_area

WhichFaces = Literal["all", "largest", "center"]
Box = tuple[float, float, float, float]

BOX_OVERLAP = 0.2
"""Intersection over union from which a found face is the one that a given box means."""

# Where the detector's box lies in the frame of FFHQ's template, as shares of its side: medians over found faces.
_BOX_IN_FRAME = (0.235, 0.175, 0.54, 0.735)


class Choice(NamedTuple):
    """A face, and why it is left as it is; None where it is restored."""

    face: Face
    reason: str | None = None


@dataclass(frozen=True)
class Selection:
    """The faces that are wanted.

    Args:
        which: all, the largest one, or the one closest to the photo's centre.
        most: how many at most, the largest first.
        min_size: in px, of the box; smaller ones are left alone.
        max_size: in px; larger ones are left alone.
        boxes: left, top, width, height of the faces that are wanted, whatever else there is; a box in which none was
            found is taken for an upright face that fills it.
    """

    which: WhichFaces = "all"
    most: int | None = None
    min_size: float = 0
    max_size: float = math.inf
    boxes: tuple[Box, ...] = ()


def select(faces: Sequence[Face], wanted: Selection, width: int, height: int) -> list[Choice]:
    """Every face of a photo with what is to become of it, largest first; faces of boxes that held none are added."""
    if wanted.boxes:
        return by_boxes(faces, wanted.boxes, width, height)
    choices, candidates = [], []
    for face in sorted(faces, key=lambda face: (-face.size, face.box)):
        if face.size < wanted.min_size:
            choices.append(Choice(face, f"smaller than {wanted.min_size:g} px: it has {face.size:.0f}"))
        elif face.size > wanted.max_size:
            choices.append(Choice(face, f"larger than {wanted.max_size:g} px: it has {face.size:.0f}"))
        else:
            candidates.append(face)
    if wanted.which == "center":
        middle = (width - 1) / 2, (height - 1) / 2
        candidates.sort(key=lambda face: (math.dist(face.centre, middle), face.box))
    most = len(candidates) if wanted.most is None else wanted.most
    if wanted.which != "all":
        most = min(most, 1)
    for place, face in enumerate(candidates):
        why = {"all": f"more than {most} faces", "largest": "not the largest", "center": "not the most central"}
        choices.append(Choice(face, None if place < most else why[wanted.which]))
    return sorted(choices, key=lambda choice: (-choice.face.size, choice.face.box))


def by_boxes(faces: Sequence[Face], boxes: Sequence[Box], width: int, height: int) -> list[Choice]:
    """The faces that boxes mean, and the others as not chosen."""
    chosen: list[Face] = []
    for box in boxes:
        best = max(faces, key=lambda face: overlap(face.box, box), default=None)
        if best is not None and overlap(best.box, box) >= BOX_OVERLAP:
            chosen += [] if best in chosen else [best]
        else:
            made = face_of_box(box)
            chosen += [] if made in chosen else [made]
    rest = [Choice(face, "not among the given boxes") for face in faces if face not in chosen]
    outside = f"the box lies outside the photo of {width} x {height} px"
    wanted = [Choice(face, None if overlap(face.box, (0, 0, width, height)) > 0 else outside) for face in chosen]
    return sorted([*wanted, *rest], key=lambda choice: (-choice.face.size, choice.face.box))


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    common = common_area(one, other)
    union = one[2] * one[3] + other[2] * other[3] - common
    return common / union if union > 0 else 0.0


def face_of_box(box: Box) -> Face:
    """An upright frontal face with this box, its landmarks where most faces have them; its score is 0."""
    from ldbfr.faces.alignment import template  # OpenCV takes time, which the command line's options should not cost

    left, top, width, height = _BOX_IN_FRAME
    points = (template("ffhq", 512) + 0.5) / 512
    within = (points - (left, top)) / (width, height)
    landmarks = np.array(box[:2]) + within * np.array(box[2:])
    return Face(box, tuple((float(x), float(y)) for x, y in landmarks), score=0.0)
