"""Find faces and their five landmarks with YuNet (Wu et al. 2023, "YuNet: A Tiny Millisecond-level Face Detector").

YuNet knows faces of about 10 to 300 px. A photo is therefore looked at in several sizes, large ones in tiles, and what
is found twice is found once. Where nothing is found the photo is turned: a scan may lie on its side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from ldbfr.errors import WeightsError
from ldbfr.faces.face import Face, common_area
from ldbfr.images import Pixels
from ldbfr.weights import RemoteFile, find_file

DETECTOR_FILE = RemoteFile(
    name="face_detection_yunet_2026may.onnx",
    size=229_738,
    sha256="ebafce4e3c118d6554634be5c27ab333b4c047a9a8c3faf1d7cf93101c22f0f0",
    url="https://github.com/opencv/opencv_zoo/raw/main/models/face_detection_yunet/face_detection_yunet_2026may.onnx",
    variable="LDBFR_FACE_DETECTOR",
    about="the face detector YuNet (MIT)",
)

SMALLEST_SEEN = 12
"""Width of a face in px, as the network sees it, below which it is not found reliably."""
LARGEST_SEEN = 300
COARSER = 4
"""Between one size of the photo that is looked at and the next; less than LARGEST_SEEN / SMALLEST_SEEN."""
TILE = 2_560
OVERLAP = LARGEST_SEEN + 20
"""A face that the network knows lies whole in one of the tiles."""
MOST_ENLARGED = 1_280
"""A photo is enlarged, for its small faces, up to this length of its long side."""
SMALL_PHOTO = 640
"""Length in px of the long side up to which a turned photo is looked at as finely as an upright one."""
CERTAIN = 0.92
"""Score of a face from which the photo lies as it should; what YuNet sees in turned faces stays below."""
CLEARLY_MORE = 1.1
SAME = 0.4
"""Intersection over union, or over the smaller one of very unlike boxes, from which two boxes are one face."""


class YuNet:
    """The detector of OpenCV's zoo as a function of a photo (H, W, 3): its faces, best first. Not for several threads.

    Args:
        model: the network's file; `find_file(DETECTOR_FILE)` when left out.
        min_score: what the detector is less sure of is no face.
        min_size: the smallest face that is looked for, in px; it decides in how many sizes the photo is looked at.
        turn: look at a photo without faces on its side and upside down too.

    Raises:
        WeightsError: the file is missing, or is none that OpenCV reads.
    """

    def __init__(
        self, model: str | Path | None = None, *, min_score: float = 0.8, min_size: float = 16, turn: bool = True
    ) -> None:
        path = find_file(DETECTOR_FILE, model)
        self.network = path.read_bytes()  # goes to the workers of a cluster with us; none of them needs the file
        self.min_score, self.min_size, self.turn = min_score, min_size, turn
        try:
            _network(self.network)
        except cv2.error as error:
            what = f"{path}: OpenCV cannot read it as YuNet ({' '.join(str(error).split())})"
            raise WeightsError(f"{what}; {DETECTOR_FILE.how_to_supply()}") from error

    def __call__(self, photo: Pixels) -> list[Face]:
        """Find the faces, best first."""
        found = self.upright(photo)
        if not self.turn or max((face.score for face in found), default=0.0) >= CERTAIN:
            return found
        height, width = photo.shape[:2]
        # Half the size tells how it lies, in a quarter of the time.
        half = max(height, width) > SMALL_PHOTO
        size = max(1, width // 2), max(1, height // 2)
        small = np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), np.uint8) if half else photo
        least = 2 * self.min_size if half else self.min_size
        evidence = {quarters: certainty(self.upright(turned(small, quarters))) for quarters in (2, 1, 3)}
        quarters = max(evidence, key=lambda quarters: evidence[quarters])
        if evidence[quarters] <= CLEARLY_MORE * certainty([face for face in found if face.size >= least]):
            return found
        return [turn_back(face, quarters, width, height) for face in self.upright(turned(photo, quarters))]

    def upright(self, photo: Pixels) -> list[Face]:
        """The faces of a photo as it lies."""
        height, width = photo.shape[:2]
        faces = []
        for scale in looked_at(width, height, self.min_size):
            faces += self.at_scale(photo, scale)
        return [face for face in one_of_each(faces) if face.size >= self.min_size]

    def at_scale(self, photo: Pixels, scale: float) -> list[Face]:
        """What is found where the photo is shrunk or enlarged by this factor."""
        height, width = photo.shape[:2]
        seen_width, seen_height = (max(1, round(length * scale)) for length in (width, height))
        faces = []
        for top, bottom in tiles(seen_height):
            for left, right in tiles(seen_width):
                # Each tile is resized alone, so that no second large picture is held.
                x0, x1 = math.floor(left * width / seen_width), math.ceil(right * width / seen_width)
                y0, y1 = math.floor(top * height / seen_height), math.ceil(bottom * height / seen_height)
                part, size = photo[y0:y1, x0:x1], (right - left, bottom - top)
                way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
                tile = np.asarray(cv2.resize(part, size, interpolation=way), np.uint8)
                inner = (left > 0, top > 0, right < seen_width, bottom < seen_height)
                zoom = (x1 - x0) / size[0], (y1 - y0) / size[1]
                faces += [
                    moved(face, (x0, y0), zoom) for face in self.in_tile(tile) if not is_cut(face.box, tile, inner)
                ]
        return faces

    def in_tile(self, tile: Pixels) -> list[Face]:
        """One run of the network, over a picture padded to multiples of 32 px, its largest stride."""
        height, width = tile.shape[:2]
        padded = cv2.copyMakeBorder(
            cv2.cvtColor(tile, cv2.COLOR_RGB2BGR), 0, -height % 32, 0, -width % 32, cv2.BORDER_REPLICATE
        )
        network = _network(self.network)
        network.setInputSize((padded.shape[1], padded.shape[0]))
        network.setScoreThreshold(self.min_score)
        _, rows = network.detect(padded)
        return [to_face(row) for row in (() if rows is None else rows.astype(float).tolist())]


@lru_cache(maxsize=4)
def _network(model: bytes) -> cv2.FaceDetectorYN:
    """The network, built once by a process."""
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # it remarks on its own defaults
    try:
        parts = np.frombuffer(model, np.uint8), np.empty(0, np.uint8)
        return cv2.FaceDetectorYN.create("onnx", *parts, (32, 32), 0.8, 0.3, 5_000)
    finally:
        cv2.utils.logging.setLogLevel(before)


def to_face(row: Sequence[float]) -> Face:
    """A row of OpenCV: box, five points, score."""
    left, top, width, height = row[:4]
    return Face((left, top, width, height), tuple(zip(row[4:14:2], row[5:14:2], strict=True)), row[14])


def looked_at(width: int, height: int, min_size: float) -> list[float]:
    """The factors by which a photo is shrunk or enlarged to be looked at, the largest picture first."""
    long, short = max(width, height), min(width, height)
    most = max(1.0, min(2.0, MOST_ENLARGED / long))
    finest = min(most, SMALLEST_SEEN / min_size if min_size > 0 else most)
    scales = [finest]
    while short * scales[-1] > LARGEST_SEEN:
        scales.append(scales[-1] / COARSER)
    return scales


def tiles(length: int) -> list[tuple[int, int]]:
    """Begin and end of the tiles along a side: as few as will do, equally long, overlapping by OVERLAP at least."""
    if length <= TILE:
        return [(0, length)]
    count = math.ceil((length - OVERLAP) / (TILE - OVERLAP))
    each = math.ceil((length + (count - 1) * OVERLAP) / count)
    begins = [number * (length - each) // (count - 1) for number in range(count)]
    return [(begin, begin + each) for begin in begins]


def is_cut(box: Sequence[float], tile: Pixels, inner: tuple[bool, bool, bool, bool]) -> bool:
    """Whether a box ends at a border of its tile beyond which the photo goes on: another tile has all of it."""
    left, top, width, height = box
    ends = (left <= 2, top <= 2, left + width >= tile.shape[1] - 2, top + height >= tile.shape[0] - 2)
    return any(end and goes_on for end, goes_on in zip(ends, inner, strict=True))


def moved(face: Face, corner: tuple[int, int], zoom: tuple[float, float]) -> Face:
    """From px of a tile to px of the photo: where the tile begins, and px of the photo per px of the tile."""

    def point(x: float, y: float) -> tuple[float, float]:
        return (x + 0.5) * zoom[0] - 0.5 + corner[0], (y + 0.5) * zoom[1] - 0.5 + corner[1]

    left, top, width, height = face.box
    box = (*point(left, top), width * zoom[0], height * zoom[1])
    return Face(box, tuple(point(*one) for one in face.landmarks), face.score)


def certainty(faces: Sequence[Face]) -> float:
    """How much speaks for a photo lying as it does."""
    return sum(max(0.0, face.score - 0.7) for face in faces)


def turned(photo: Pixels, quarters: int) -> Pixels:
    """A photo turned clockwise by so many quarters."""
    return np.ascontiguousarray(np.rot90(photo, -quarters))


def turn_back(face: Face, quarters: int, width: int, height: int) -> Face:
    """From a photo turned clockwise by so many quarters to the photo (height, width) itself."""

    def point(x: float, y: float) -> tuple[float, float]:
        return {1: (y, height - 1 - x), 2: (width - 1 - x, height - 1 - y), 3: (width - 1 - y, x)}[quarters]

    left, top, wide, high = face.box
    (x0, y0), (x1, y1) = point(left, top), point(left + wide, top + high)
    box = (min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0))
    return Face(box, tuple(point(*one) for one in face.landmarks), face.score, 90 * quarters)


def one_of_each(faces: Sequence[Face]) -> list[Face]:
    """Of several boxes around one face the best; best first."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        twins = [other for other in kept if is_same(face, other)]
        if not twins:
            kept.append(face)
        elif len(twins) == 1 and face.size > 1.5 * twins[0].size:
            # A part of a face that looks like a small one, found first: the whole is meant.
            kept = [other for other in kept if other not in twins] + [face]
    return sorted(kept, key=lambda face: -face.score)


def is_same(one: Face, other: Face) -> bool:
    """Whether two boxes are around one face."""
    common = common_area(one.box, other.box)
    areas = one.size**2, other.size**2
    return common > SAME * (sum(areas) - common) or common > 2 * SAME * min(areas)
