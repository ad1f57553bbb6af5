"""Put a restored face back into its photo, so that nobody sees where it begins.

What is pasted is not the face but what the model changed of it: photo + mask · (restored − aligned), brought back to
the photo's pixels. So a face that the model leaves as it is leaves the photo as it is, to the last bit, and what the
photo shows beyond the model's resolution is not lost. Where the mask is zero nothing is touched at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ldbfr.faces.alignment import Matrix, Points, enlarged, inverse, scale_of, shifted, transform, warp
from ldbfr.images import Pixels
from ldbfr.seeds import derive_seed

Floats = NDArray[np.float32]
Colors = Literal["none", "fine", "all"]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601."""

FRAME_RIM = 0.12
"""Share of the frame's side over which the mask fades towards the frame's border."""
FACE_RIM = (0.70, 1.05)
"""Where the mask begins to fade and where it ends, in units of the face's outline."""
CORE = (0.45, 0.75)
"""Within, the change counts in full; without, only as far as it agrees with what is there."""
TOLERANCE = 30.0
"""Grey levels of a broad change outside the core that halve (1/e) its weight: hair or a hat became something else."""
COLOR_SCALE = 1 / 16
"""Standard deviation, as a share of the frame's side, of the filter that tells broad colours from fine ones."""
LEAST_WEIGHT = 1 / 256
"""Below it a weight is zero."""
MOST_GRAIN = 12.0
"""Grey levels of grain that are added at most."""
PATCH = 1_024
"""Side in px of what is composed at a time, which bounds the memory however large a face is."""


class Area(NamedTuple):
    """A part of a picture: left, top, right, bottom in px, the last two excluded."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """In px."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """In px."""
        return self.bottom - self.top

    def of(self, image: NDArray[Any]) -> NDArray[Any]:
        """The part of an image, as a view."""
        return image[self.top : self.bottom, self.left : self.right]

    def common(self, other: Area) -> Area:
        """What two areas share; empty if right ≤ left or bottom ≤ top."""
        return Area(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return self.width <= 0 or self.height <= 0


@dataclass(frozen=True)
class RestoredFace:
    """A face before and after, in the model's frame.

    Args:
        before: (S, S, 3), as it was cut out of the photo.
        after: (S, S, 3), as the model gives it.
        matrix: from the photo to the frame.
        landmarks: (5, 2), in the photo.
    """

    before: Pixels
    after: Pixels
    matrix: Matrix
    landmarks: Points

    @property
    def side(self) -> int:
        """S."""
        return len(self.before)

    @cached_property
    def mask(self) -> Floats:
        """How far the change counts, (S, S) in [0, 1]."""
        outline = face_outline(self.side, transform(self.matrix, self.landmarks))
        raw = self.after.astype(np.float32) - self.before
        return face_mask(outline) * agreement(outline, raw)

    def result(self, how: Pasting) -> Pixels:
        """The face in its frame as it will be in the photo, but for grain, (S, S, 3)."""
        return np.clip(np.rint(self.before + self.applied(how)), 0, 255).astype(np.uint8)

    def applied(self, how: Pasting) -> Floats:
        """The change under its mask, (S, S, 3), without grain."""
        return np.asarray(self.change(how.colors) * self.mask[..., None] * np.float32(how.strength), np.float32)

    def change(self, colors: Colors) -> Floats:
        """What the model changed, (S, S, 3) in grey levels, with its colours brought to the photo's.

        The lightness follows the photo at the mask's rim; of the colours only what is finer than COLOR_SCALE changes,
        because even a bad photo tells the broad colours of a face better than a model can guess them.

        Args:
            colors: "none" changes the luma alone, the same in all channels; "all" takes the model's broad colours too,
                for a photo that has none.
        """
        raw = self.after.astype(np.float32) - self.before
        luma = np.asarray((raw @ LUMA)[..., None], np.float32)
        change = luma - offset_at_rim(luma, self.mask)
        if colors == "none":
            return np.repeat(change, 3, axis=2)
        color = raw - luma
        if colors == "all":
            return np.asarray(change + color, np.float32)
        return np.asarray(change + color - cv2.GaussianBlur(color, (0, 0), COLOR_SCALE * self.side), np.float32)


@dataclass(frozen=True)
class Pasting:
    """How faces are put back.

    Args:
        strength: share of the change that is applied, 0 to 1.
        colors: of the change, see `RestoredFace.change`.
        match_grain: give back to a face the grain that the model took from it, as far as its surroundings have it.
        scale: by how much the photo was enlarged.
        seed: of the grain.
    """

    strength: float = 1.0
    colors: Colors = "fine"
    match_grain: bool = True
    scale: int = 1
    seed: int = 0


class Patch(NamedTuple):
    """A part of the photo before and after, (h, w, 3) uint8."""

    area: Area
    before: Pixels
    after: Pixels


def paste(photo: Pixels, faces: Sequence[RestoredFace], how: Pasting) -> Iterator[Patch]:
    """Compose faces into a photo (H, W, 3), in place, and tell of every part that was changed.

    Where faces overlap the larger one, which is closer to the camera, lies above.

    Args:
        photo: sRGB, enlarged already where `how.scale` says so.
        faces: with matrices of the photo before it was enlarged.
    """
    # From the smallest in the photo on; of equally large ones any order will do, as long as it is always the same.
    order = sorted(faces, key=lambda face: (-scale_of(face.matrix), *face.matrix.ravel()))
    areas = [area_of(face, photo, how.scale) for face in order]
    for number, (face, area) in enumerate(zip(order, areas, strict=True)):
        above = [place for place in range(number + 1, len(order)) if not area.common(areas[place]).is_empty]
        yield from _paste_one(photo, face, area, [(order[place], areas[place]) for place in above], how)


def _paste_one(
    photo: Pixels, face: RestoredFace, whole: Area, above: Sequence[tuple[RestoredFace, Area]], how: Pasting
) -> Iterator[Patch]:
    """Compose one face, below others."""
    if how.strength == 0 or whole.is_empty or np.array_equal(face.before, face.after):
        return
    change = face.change(how.colors) * np.float32(how.strength)
    grain = grain_to_add(photo, face, change, how) if how.match_grain else 0.0
    for area in patches(whole):
        weight = weight_in(face, area, how.scale)
        for other, there in above:
            if not area.common(there).is_empty:
                weight = weight * (1 - weight_in(other, area, how.scale))
        if not weight.any():
            continue
        back = shifted(inverse(enlarged(face.matrix, source=how.scale)), area.left, area.top)
        amount = warp(change, back, area.width, area.height)
        if grain:
            amount = amount + grain_field(face, area, grain, how)[..., None]
        before = area.of(photo).copy()
        area.of(photo)[...] = np.clip(np.rint(before + weight[..., None] * amount), 0, 255).astype(np.uint8)
        yield Patch(area, before, area.of(photo))


def weight_in(face: RestoredFace, area: Area, scale: int) -> Floats:
    """The mask of a face in a part of the photo, (h, w); exactly zero outside."""
    back = shifted(inverse(enlarged(face.matrix, source=scale)), area.left, area.top)
    weight = np.clip(warp(face.mask, back, area.width, area.height), 0, 1)
    weight[weight < LEAST_WEIGHT] = 0
    return np.asarray(weight, np.float32)


def area_of(face: RestoredFace, photo: Pixels, scale: int) -> Area:
    """The part of a photo that a face's frame covers."""
    end = face.side - 0.5
    corners = np.array([(-0.5, -0.5), (end, -0.5), (-0.5, end), (end, end)])
    there = transform(inverse(enlarged(face.matrix, source=scale)), corners)
    left, top = np.floor(there.min(axis=0)).astype(int)
    right, bottom = np.ceil(there.max(axis=0)).astype(int) + 1
    return Area(int(left), int(top), int(right), int(bottom)).common(Area(0, 0, photo.shape[1], photo.shape[0]))


def patches(area: Area) -> Iterator[Area]:
    """An area in pieces of PATCH px a side at most."""
    for top in range(area.top, area.bottom, PATCH):
        for left in range(area.left, area.right, PATCH):
            yield area.common(Area(left, top, left + PATCH, top + PATCH))


# ---- the mask ----


def smooth_step(values: NDArray[Any], start: float, end: float) -> Floats:
    """0 at `start`, 1 at `end`, with a horizontal tangent at both."""
    t = np.clip((values - start) / (end - start), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def face_outline(side: int, points: Points) -> Floats:
    """A function of the frame's pixels, (S, S), that is 1 on the face's outline and 0 in its middle.

    The outline is an oval from the forehead to the chin that follows the landmarks: their axis, the distance from eyes
    to mouth, the eyes' distance, and the nose, which in a profile points to where the face is.

    Args:
        side: S.
        points: the five landmarks in the frame.
    """
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    down = mouth - eyes
    height = float(np.hypot(*down))
    down = down / max(height, 1e-6)
    across = np.array([down[1], -down[0]])
    width = max(1.15 * float(np.hypot(*(points[1] - points[0]))), 0.95 * height)
    centre = eyes + 0.38 * height * down + 0.3 * float((points[2] - eyes) @ across) * across
    y, x = np.mgrid[:side, :side].astype(np.float32)
    from_centre = np.stack([x - centre[0], y - centre[1]], axis=-1)
    u, v = np.abs(from_centre @ across) / width, np.abs(from_centre @ down) / (1.42 * height)
    return np.asarray((u**2.5 + v**2.5) ** (1 / 2.5), np.float32)


def face_mask(outline: Floats) -> Floats:
    """1 in the face, 0 outside of it and at the frame's border, smooth in between."""
    side = len(outline)
    to_border = np.minimum(np.arange(side), np.arange(side)[::-1]).astype(np.float32) / side
    inside = smooth_step(to_border, 0, FRAME_RIM)
    return np.asarray((1 - smooth_step(outline, *FACE_RIM)) * inside[:, None] * inside[None, :], np.float32)


def agreement(outline: Floats, raw: Floats) -> Floats:
    """Less than 1 where, outside the face's core, the model broadly made something else of what is there.

    There the model's hair, hat or background would lie as a halo around the face.
    """
    broad = cv2.GaussianBlur(raw, (0, 0), len(outline) / 24)
    distance = np.sqrt((broad**2).mean(axis=2))
    core = 1 - smooth_step(outline, *CORE)
    return np.asarray(core + (1 - core) * np.exp(-((distance / TOLERANCE) ** 2)), np.float32)


def offset_at_rim(luma: Floats, mask: Floats) -> Floats:
    """The change at the mask's rim, carried smoothly over the frame, (S, S, 1): without it there is no step there.

    Args:
        luma: the change, (S, S, 1).
        mask: (S, S).
    """
    rim = 4 * mask * (1 - mask) + np.float32(1e-6)
    sigma = len(mask) / 6
    blurred = [cv2.GaussianBlur(values, (0, 0), sigma) for values in (rim * luma[..., 0], rim)]
    return np.asarray((blurred[0] / blurred[1])[..., None], np.float32)


# ---- grain ----


def noise_level(luma: Floats) -> float:
    """Standard deviation of the noise in a picture (h, w), in grey levels; 0 where it is too small to tell.

    Immerkær 1996, "Fast noise variance estimation", in blocks of 8×8 px, of which the quieter quarter counts: what
    differs there is not the motif.
    """
    if min(luma.shape) < 10:
        return 0.0
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32) / 6
    response = np.abs(cv2.filter2D(luma, -1, kernel)[1:-1, 1:-1])
    rows, columns = (length // 8 for length in response.shape)
    blocks = response[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).mean(axis=(1, 3))
    return float(np.quantile(blocks, 0.25) * np.sqrt(np.pi / 2))


def grain_to_add(photo: Pixels, face: RestoredFace, change: Floats, how: Pasting) -> float:
    """Standard deviation of the grain that the change takes from a face, though its surroundings have it."""
    if how.scale != 1:
        return 0.0  # an enlarged photo is smooth everywhere
    area = area_of(face, photo, how.scale)
    middle = patch_around(area, PATCH)
    weight = weight_in(face, middle, how.scale)
    inner = inner_area(weight > 0.9)
    if inner is None:
        return 0.0
    back = shifted(inverse(face.matrix), middle.left, middle.top)
    before = np.asarray(middle.of(photo), np.float32) @ LUMA
    after = before + warp(change @ LUMA, back, middle.width, middle.height)
    around = np.asarray(area_around(area, photo).of(photo), np.float32) @ LUMA
    had, has = noise_level(inner.of(before)), noise_level(inner.of(after))
    wanted = min(had, noise_level(around), MOST_GRAIN)
    return float(np.sqrt(max(0.0, wanted**2 - has**2)))


def patch_around(area: Area, most: int) -> Area:
    """The middle of an area, `most` px a side at most."""
    left, top = max(0, (area.width - most) // 2), max(0, (area.height - most) // 2)
    return area.common(Area(area.left + left, area.top + top, area.left + left + most, area.top + top + most))


def area_around(area: Area, photo: Pixels) -> Area:
    """A face's area with its surroundings, half as much on every side, PATCH px each at most."""
    x, y = min(area.width // 2, PATCH), min(area.height // 2, PATCH)
    whole = Area(0, 0, photo.shape[1], photo.shape[0])
    return patch_around(Area(area.left - x, area.top - y, area.right + x, area.bottom + y).common(whole), 2 * PATCH)


def inner_area(inside: NDArray[np.bool_]) -> Area | None:
    """The box around what is inside; None if there is nothing."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return None
    return Area(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def grain_field(face: RestoredFace, area: Area, sigma: float, how: Pasting) -> Floats:
    """Noise for a part of the photo, (h, w); it follows from the seed, the face and the place."""
    seed = derive_seed("grain", how.seed, face.before.tobytes(), area.left, area.top)
    noise = np.random.default_rng(seed).standard_normal((area.height, area.width), np.float32)
    return noise * np.float32(sigma)
