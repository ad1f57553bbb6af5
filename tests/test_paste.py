"""Putting faces back: nothing outside the masks changes, no seam shows, grain is that of the surroundings."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldbfr.faces import align, template
from ldbfr.faces.alignment import enlarged, inverse, shifted, transform, warp
from ldbfr.images import Pixels
from ldbfr.photos import paste as pasting
from ldbfr.photos.paste import (
    LUMA,
    Area,
    Colors,
    Pasting,
    RestoredFace,
    area_of,
    face_mask,
    face_outline,
    noise_level,
    paste,
    patches,
    smooth_step,
    weight_in,
)
from ldbfr.photos.photo import lanczos
from tests import tiny

SIDE = 64
PLAIN = Pasting(match_grain=False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are faster so, and do not suffer from what else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scene(height: int, width: int, seed: int = 0, noise: float = 0) -> Pixels:
    """Smooth colours with waves of some 20 px, which have gradients everywhere, and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 25 * np.sin(x / 7 + y / 11)[..., None] + 20 * np.cos(y / 5 - x / 13)[..., None] * np.array([1.0, 0.4, -0.5])
    values = np.array([150, 125, 110]) + waves + noise * rng.standard_normal((height, width, 1))
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def face_in(
    photo: Pixels, centre: tuple[float, float], size: float, angle: float = 0.1, side: int = SIDE
) -> RestoredFace:
    """A face whose frame shows `size` px of the photo around a centre, not changed yet."""
    c, s = (size / side * value for value in (math.cos(angle), math.sin(angle)))
    points = template("tight", side) - (side - 1) / 2
    landmarks = points @ np.array([[c, s], [-s, c]]) + centre
    alignment = align(photo, landmarks, "tight", side)
    return RestoredFace(alignment.image, alignment.image, alignment.matrix, landmarks)


def changed(face: RestoredFace, after: Pixels) -> RestoredFace:
    return RestoredFace(face.before, after, face.matrix, face.landmarks)


def noisy(face: RestoredFace, seed: int = 0) -> RestoredFace:
    """The worst change: any pixels at all."""
    return changed(face, np.random.default_rng(seed).integers(0, 256, face.before.shape, dtype=np.uint8))


def repainted(face: RestoredFace, amount: float = 40) -> RestoredFace:
    """A smooth change that differs from place to place, as a restoration's does."""
    side = face.side
    y, x = np.mgrid[:side, :side] / side
    wave = amount * np.sin(9 * x + 4 * y)[..., None] * np.array([1.0, 0.8, 0.6]) + amount * (y - 0.4)[..., None]
    return changed(face, np.clip(np.rint(face.before + wave), 0, 255).astype(np.uint8))


def pasted(photo: Pixels, faces: Sequence[RestoredFace], how: Pasting = PLAIN) -> Pixels:
    result = photo.copy()
    for patch in paste(result, faces, how):
        assert patch.before.shape == patch.after.shape == (patch.area.height, patch.area.width, 3)
        assert np.array_equal(patch.after, patch.area.of(result))
    return result


def mask_of(face: RestoredFace, photo: Pixels, scale: int = 1) -> np.ndarray:
    """The mask in the whole photo, by the formula alone."""
    back = inverse(enlarged(face.matrix, source=scale))
    return np.clip(warp(face.mask, back, photo.shape[1], photo.shape[0]), 0, 1)


# ---- what stays ----


@given(
    st.tuples(st.floats(-20, 140), st.floats(-20, 120)),
    st.floats(8, 300),
    st.floats(-math.pi, math.pi),
    st.integers(1, 120),
    st.integers(1, 120),
    st.sampled_from([1, 2, 4]),
)
@settings(deadline=None, max_examples=40)
def test_unchanged_faces_and_backgrounds_stay_bit_for_bit(
    centre: tuple[float, float], size: float, angle: float, height: int, width: int, scale: int
) -> None:
    """Align and paste is the identity; whatever the model made of a face, nothing beyond its mask has another bit."""
    photo = scene(height, width, noise=30)
    face = face_in(photo, centre, size, angle)
    large = lanczos(photo, scale) if scale > 1 else photo
    assert np.array_equal(pasted(large, [face], Pasting(scale=scale)), large)
    result = pasted(large, [noisy(face)], Pasting(scale=scale))
    mask = mask_of(noisy(face), large, scale)
    assert np.array_equal(result[mask <= 1e-3], large[mask <= 1e-3])
    area = area_of(face, large, scale)
    if not area.is_empty:
        result[area.top : area.bottom, area.left : area.right] = area.of(large)
    assert np.array_equal(result, large)


def test_the_change_arrives(rng: np.random.Generator) -> None:
    """In the middle of the face the photo gets the change at its scale: in a frame of the photo's own px, itself."""
    photo = scene(120, 130)
    face = repainted(face_in(photo, (64.5, 60.5), SIDE, angle=0))
    expected = face.change("fine") * face.mask[..., None]
    result = pasted(photo, [face])
    left, top = np.rint(transform(inverse(face.matrix), np.zeros((1, 2))))[0].astype(int)
    inner = result[top : top + SIDE, left : left + SIDE] - photo[top : top + SIDE, left : left + SIDE].astype(float)
    assert np.abs(expected).max() > 20
    assert np.abs(inner - expected).max() <= 2


def test_where_the_photo_is_sharper_than_the_frame_its_detail_stays() -> None:
    photo = scene(400, 400, noise=20)
    face = repainted(face_in(photo, (200, 200), 360))
    difference = pasted(photo, [face]).astype(float) - photo
    fine = difference[1:-1, 1:-1] * 2 - difference[:-2, 1:-1] - difference[2:, 1:-1]
    assert np.abs(difference).max() > 15
    assert np.abs(fine[120:280, 120:280]).mean() < 1, "what changes is smooth: the photo's own grain is in both"


@pytest.mark.parametrize("colors", ["none", "fine", "all"])
def test_strength_is_a_share(colors: Colors) -> None:
    photo = scene(100, 100, noise=3)
    face = repainted(face_in(photo, (50, 48), 80))
    change = [
        pasted(photo, [face], Pasting(strength=strength, colors=colors, match_grain=False)).astype(float) - photo
        for strength in (0, 0.25, 0.5, 1)
    ]
    assert not change[0].any()
    assert np.abs(change[3]).max() > 15
    for strength, part in zip((0.25, 0.5), change[1:3], strict=True):
        assert np.abs(part - strength * change[3]).max() <= 1


def test_grey_photos_stay_grey() -> None:
    photo = np.repeat(scene(100, 100, noise=5)[..., :1], 3, axis=2)
    face = noisy(face_in(photo, (50, 50), 80))
    result = pasted(photo, [face], Pasting(colors="none"))
    assert not np.array_equal(result, photo)
    assert np.array_equal(result[..., 0], result[..., 1])
    assert np.array_equal(result[..., 0], result[..., 2])
    coloured = pasted(photo, [face], Pasting(colors="fine"))
    assert not np.array_equal(coloured[..., 0], coloured[..., 2])


def test_a_photo_without_colours_may_get_the_models() -> None:
    """Broad colours are the photo's own, unless it has none and is to get some."""
    photo = np.repeat(scene(100, 100, noise=5)[..., :1], 3, axis=2)
    face = face_in(photo, (50, 50), 80)
    skin = np.clip(face.before + np.array([40, 0, -40]), 0, 255).astype(np.uint8)
    face = RestoredFace(face.before, skin, face.matrix, face.landmarks)
    tint = {
        colors: np.ptp(pasted(photo, [face], Pasting(colors=colors))[45:55, 45:55].astype(float).mean(axis=(0, 1)))
        for colors in ("none", "fine", "all")
    }
    assert tint["none"] == 0
    assert tint["fine"] < 5
    assert tint["all"] > 60


# ---- overlap ----


def test_overlapping_faces() -> None:
    """The larger lies above; where its mask is 1 the smaller has no influence; the list's order is no matter."""
    photo = scene(200, 200)
    large = repainted(face_in(photo, (100, 100), 150), 30)
    small = noisy(face_in(photo, (150, 112), 60))
    both = pasted(photo, [large, small])
    assert np.array_equal(both, pasted(photo, [small, large]))
    covered, apart = mask_of(large, photo) >= 1 - 1e-6, mask_of(large, photo) <= 1e-3
    assert (covered & (mask_of(small, photo) > 0.5)).any(), "they do overlap"
    assert np.array_equal(both[covered], pasted(photo, [large])[covered])
    assert np.array_equal(both[apart], pasted(photo, [small])[apart])
    assert not np.array_equal(both[apart], photo[apart])


def test_the_order_of_equal_faces_is_no_matter() -> None:
    photo = scene(200, 200)
    one = noisy(face_in(photo, (90, 100), 90), seed=1)
    other = noisy(one, seed=2)
    other = RestoredFace(other.before, other.after, shifted(one.matrix, 20, 5), np.add(one.landmarks, (20, 5)))
    assert np.array_equal(pasted(photo, [one, other]), pasted(photo, [other, one]))


# ---- seams ----


def gradients(image: Pixels) -> np.ndarray:
    """Length of the gradient of the luma, by central differences."""
    luma = image.astype(float) @ LUMA
    return np.hypot(*np.gradient(luma))


def restored_by_a_model(face: RestoredFace) -> RestoredFace:
    small = warp(face.before, enlarged(np.eye(2, 3), target=tiny.SIDE / SIDE), tiny.SIDE, tiny.SIDE)
    output = tiny.pipeline()(small[None], num_inference_steps=1).images[0]
    return changed(face, warp(output, enlarged(np.eye(2, 3), target=SIDE / tiny.SIDE), SIDE, SIDE))


@pytest.mark.parametrize("make", [repainted, restored_by_a_model])
@pytest.mark.parametrize("size", [50, 90, 170])
def test_no_seam(make: Callable[[RestoredFace], RestoredFace], size: float) -> None:
    """Along the rim of the mask, where a change begins, the photo has no more gradient than it had."""
    photo = scene(200, 200, noise=2)
    face = make(face_in(photo, (100, 98), size))
    mask, result = mask_of(face, photo), pasted(photo, [face])
    rim = (mask > 1e-3) & (mask < 0.1)
    before, after = gradients(photo)[rim], gradients(result)[rim]
    assert not np.array_equal(result, photo)
    assert after.mean() <= before.mean() * 1.1 + 0.1
    assert np.quantile(after, 0.99) <= np.quantile(before, 0.99) * 1.1 + 1


@pytest.mark.parametrize("offset", [-20, 20])
@pytest.mark.parametrize("size", [50, 170])
def test_another_brightness_is_no_change(offset: int, size: float) -> None:
    """The lightness follows the photo: a face that is brighter as a whole is the same face."""
    photo = scene(200, 200)
    face = face_in(photo, (100, 98), size)
    result = pasted(photo, [changed(face, (face.before.astype(int) + offset).astype(np.uint8))])
    assert np.abs(result.astype(int) - photo).max() <= 1


def test_a_tint_is_no_change() -> None:
    photo = scene(200, 200)
    face = face_in(photo, (100, 98), 120)
    tinted = changed(face, (face.before + np.array([15, 0, -15])).clip(0, 255).astype(np.uint8))
    assert np.abs(pasted(photo, [tinted]).astype(int) - photo).max() <= 2


@given(st.integers(16, 80), st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_masks_end_before_the_frame(side: int, seed: int) -> None:
    """Whatever the landmarks, the mask is in [0, 1], zero at the border, and without a step."""
    points = template("tight", side) + np.random.default_rng(seed).normal(size=(5, 2)) * side / 10
    mask = face_mask(face_outline(side, points))
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert not np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any()


def test_the_mask_of_a_face() -> None:
    points = template("tight", 128)
    mask = face_mask(face_outline(128, points))
    for x, y in points:
        assert mask[round(y), round(x)] > 0.9, "eyes, nose and mouth are the face"
    assert np.abs(np.diff(mask, axis=0)).max() < 0.12
    assert np.abs(np.diff(mask, axis=1)).max() < 0.12
    assert np.allclose(smooth_step(np.array([-1.0, 2, 3, 4, 9]), 2, 4), [0, 0, 0.5, 1, 1])


# ---- grain ----


def fine_noise(image: Pixels) -> float:
    """Standard deviation of white noise, from the differences of diagonal neighbours."""
    luma = image.astype(float) @ LUMA
    mixed = (luma[:-1, :-1] + luma[1:, 1:] - luma[1:, :-1] - luma[:-1, 1:]) / 2
    return float(mixed.std())


def grainy(sigma: float) -> Pixels:
    noise = sigma * np.random.default_rng(1).standard_normal((240, 240, 1))
    y, x = np.mgrid[:240, :240]
    return np.clip(np.rint((90 + x / 4 + y / 6)[..., None] * np.ones(3) + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma", [3, 6, 10])
@pytest.mark.parametrize("size", [100, 128, 180])
def test_a_face_has_the_grain_of_its_surroundings(sigma: float, size: int) -> None:
    """The model took the noise; the photo gets it back where the face is, and only there."""
    photo, clean = grainy(sigma), grainy(0)
    face = face_in(photo, (120, 120), size, side=128)
    face = changed(face, face_in(clean, (120, 120), size, side=128).before)
    middle = np.s_[100:140, 100:140]
    surroundings = fine_noise(photo)
    with_grain = fine_noise(pasted(photo, [face], Pasting())[middle])
    assert abs(with_grain / surroundings - 1) <= 0.35
    if size <= 128:
        assert fine_noise(pasted(photo, [face])[middle]) < 0.6 * surroundings, "the model did take it"


def test_grain_follows_from_the_seed() -> None:
    photo = grainy(6)
    face = changed(face := face_in(photo, (120, 120), 120), face_in(grainy(0), (120, 120), 120).before)
    first = pasted(photo, [face], Pasting(seed=1))
    assert np.array_equal(first, pasted(photo, [face], Pasting(seed=1)))
    assert not np.array_equal(first, pasted(photo, [face], Pasting(seed=2)))
    assert not np.array_equal(first, pasted(photo, [face]))


@pytest.mark.parametrize("scale", [1, 2])
def test_clean_and_enlarged_photos_get_no_grain(scale: int) -> None:
    photo = scene(160, 160) if scale == 1 else scene(160, 160, noise=8)
    face = repainted(face_in(photo, (80, 80), 100))
    large = lanczos(photo, scale) if scale > 1 else photo
    plain = pasted(large, [face], Pasting(match_grain=False, scale=scale))
    assert np.array_equal(pasted(large, [face], Pasting(scale=scale)), plain)


@pytest.mark.parametrize("sigma", [0, 2, 6, 12])
def test_the_noise_level_is_measured(sigma: float) -> None:
    luma = np.asarray(grainy(sigma) @ LUMA, np.float32)
    assert noise_level(luma) == pytest.approx(sigma, abs=0.15 * sigma + 0.3)
    assert noise_level(luma[:9]) == 0


# ---- large faces ----


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("side", [32, 96])
def test_patches_are_seamless(scale: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed in pieces, which bounds the memory, a face is the same as in one."""
    photo = scene(150, 170, noise=4)
    face = repainted(face_in(photo, (80, 70), 130, 0.7, side))
    large = lanczos(photo, scale) if scale > 1 else photo
    how = Pasting(match_grain=False, scale=scale)
    whole = pasted(large, [face], how)
    monkeypatch.setattr(pasting, "PATCH", 37)
    assert np.abs(pasted(large, [face], how).astype(int) - whole).max() <= 1
    assert len(list(paste(large.copy(), [face], how))) > 10


@given(*[st.integers(0, 50)] * 2, *[st.integers(0, 40)] * 2)
def test_patches_cover_an_area_once(left: int, top: int, width: int, height: int) -> None:
    count = np.zeros((100, 100), int)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pasting, "PATCH", 16)
        for area in patches(Area(left, top, left + width, top + height)):
            assert 0 < area.width <= 16
            assert 0 < area.height <= 16
            area.of(count)[...] += 1
    assert (count[top : top + height, left : left + width] == 1).all()
    assert count.sum() == width * height


def test_weights_beside_the_frame_are_zero() -> None:
    face = face_in(scene(100, 100), (50, 50), 40)
    assert not weight_in(face, Area(80, 80, 100, 100), 1).any()
    assert weight_in(face, Area(40, 40, 60, 60), 1).min() > 0.5
