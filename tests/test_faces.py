"""Faces: alignment against closed forms and drawn faces, detection on real photos, selection as a partition."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldbfr.errors import WeightsError
from ldbfr.faces import DETECTOR_FILE, TEMPLATES, Face, Selection, YuNet, align, fit_similarity, select, template, warp
from ldbfr.faces.alignment import Matrix, Points, enlarged, inverse, scale_of, shifted, transform
from ldbfr.faces.detection import LARGEST_SEEN, OVERLAP, TILE, is_same, looked_at, one_of_each, tiles, turn_back, turned
from ldbfr.faces.selection import overlap
from ldbfr.images import Pixels, decode_image, resize

SIDE = 64
FACES_OF_PHOTO = {"00.jpg": 4, "01.jpg": 4, "02.png": 4, "03.jpg": 1}
IDENTITY = np.eye(2, 3)


def similarity(scale: float, angle: float, shift: tuple[float, float]) -> Matrix:
    """Turn by an angle in radians, scale, then shift."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


SIMILARITIES = st.builds(
    similarity,
    st.floats(0.05, 20),
    st.floats(-math.pi, math.pi),
    st.tuples(st.floats(-500, 500), st.floats(-500, 500)),
)


def checkerboard(height: int, width: int) -> Pixels:
    y, x = np.mgrid[:height, :width]
    return np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)


# ---- alignment ----


@pytest.mark.parametrize("name", TEMPLATES)
@given(matrix=SIMILARITIES)
@settings(deadline=None, max_examples=60)
def test_a_similarity_is_fitted_exactly(name: str, matrix: Matrix) -> None:
    points = template(name, 512)
    assert np.allclose(fit_similarity(points, transform(matrix, points)), matrix, rtol=1e-9, atol=1e-8)


@given(st.integers(0, 2**32), st.integers(2, 7))
@settings(deadline=None, max_examples=60)
def test_the_fit_has_the_least_squares(seed: int, count: int) -> None:
    """No turn, scale or shift away from the fit is better, and the fit of a mirrored face is no reflection."""
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(2, count, 2)) * 50
    fitted = fit_similarity(source, target)

    def error(matrix: Matrix) -> float:
        return float(((transform(matrix, source) - target) ** 2).sum())

    least = error(fitted)
    for step in (1e-3, 0.1, 3.0):
        for da, db, dx, dy in rng.normal(size=(20, 4)) * step:
            other = fitted + np.array([[da, -db, dx], [db, da, dy]])
            assert error(other) >= least * (1 - 1e-12)
    assert np.linalg.det(fitted[:, :2]) >= 0


def drawn_face(matrix: Matrix, height: int, width: int, radius: float) -> tuple[Pixels, Points]:
    """Five blobs where a similarity takes FFHQ's landmarks, drawn from their formula; and where they are."""
    points = transform(matrix, template("ffhq", SIDE))
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width), 60.0)
    for px, py in points:
        image += 180 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius**2))
    return np.repeat(np.rint(image)[..., None], 3, axis=2).astype(np.uint8), points


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7, 3.3])
@pytest.mark.parametrize("angle", [0.0, 0.4, 2.0, math.pi, -1.2])
def test_landmarks_come_to_the_template(scale: float, angle: float, rng: np.random.Generator) -> None:
    """Whatever similarity a face went through, its blobs are at the template's points to half a pixel."""
    middle = scale * SIDE * 0.75 + 4
    centre = transform(similarity(scale, angle, (0, 0)), np.full((1, 2), (SIDE - 1) / 2))[0]
    shift = tuple(middle - centre + rng.uniform(-1, 1, 2))
    photo, landmarks = drawn_face(similarity(scale, angle, shift), round(2 * middle), round(2 * middle), 1.6 * scale)
    aligned = align(photo, landmarks, "ffhq", SIDE)
    assert aligned.image.shape == (SIDE, SIDE, 3)
    assert aligned.photo_px == pytest.approx(scale)
    y, x = np.mgrid[:SIDE, :SIDE]
    for px, py in template("ffhq", SIDE):
        weight = np.maximum(aligned.image[..., 0].astype(float) - 60, 0) * (np.hypot(x - px, y - py) < 5)
        found = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
        assert math.dist(found, (px, py)) <= 0.5
    back = transform(inverse(aligned.matrix), template("ffhq", SIDE))
    assert np.abs(back - landmarks).max() <= 1e-6


@given(SIMILARITIES, st.integers(1, 4), st.integers(1, 4), st.floats(-9, 9), st.floats(-9, 9))
@settings(deadline=None, max_examples=60)
def test_matrices_agree_with_each_other(matrix: Matrix, source: int, target: int, left: float, top: float) -> None:
    points = np.array([[0.0, 0.0], [10.0, 3.0], [-4.0, 20.0]])
    assert np.allclose(transform(inverse(matrix), transform(matrix, points)), points, atol=1e-6)
    large = enlarged(matrix, source, target)
    there = transform(large, (points + 0.5) * source - 0.5)
    assert np.allclose(there, (transform(matrix, points) + 0.5) * target - 0.5, atol=1e-6)
    assert scale_of(large) == pytest.approx(scale_of(matrix) * target / source)
    assert np.allclose(transform(shifted(matrix, left, top), points), transform(matrix, points) - (left, top))


# ---- warp ----


@pytest.mark.parametrize("shape", [(9, 13), (9, 13, 3), (1, 1, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_the_identity_changes_nothing(shape: tuple[int, ...], kind: type, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, shape).astype(kind)
    result = warp(image, IDENTITY, shape[1], shape[0])
    assert result.dtype == kind
    assert np.array_equal(result, image)


@pytest.mark.parametrize("factor", [2, 3, 5, 16, 31, 48, 64])
def test_a_whole_reduction_is_the_mean_of_blocks(factor: int, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (4 * factor, 6 * factor, 3), dtype=np.uint8)
    means = image.reshape(4, factor, 6, factor, 3).mean(axis=(1, 3))
    small = warp(image, enlarged(IDENTITY, target=1 / factor), 6, 4)
    # 31 is no whole number of samples, at most MOST_OVERSAMPLING of them: that shows in white noise.
    assert np.abs(small.astype(float) - means).max() <= (2 if factor == 31 else 1)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.9])
@pytest.mark.parametrize("shrink", [3.7, 17.0, 40.0])
def test_fine_patterns_become_grey_and_gradients_stay(shrink: float, angle: float) -> None:
    side = 24
    half = round(shrink * side)
    matrix = similarity(1 / shrink, angle, (0, 0))
    matrix[:, 2] = (side - 1) / 2 - matrix[:, :2] @ np.full(2, half - 0.5)
    grey = warp(checkerboard(2 * half, 2 * half), matrix, side, side)
    assert np.abs(grey.astype(float) - 127.5).max() <= (20 if shrink < 10 else 5)
    ramp = np.tile(np.linspace(0, 250, 2 * half, dtype=np.float32), (2 * half, 1))
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    there = transform(inverse(matrix), np.stack([x.ravel(), y.ravel()], axis=1).astype(float))
    expected = there[:, 0].reshape(side, side) * 250 / (2 * half - 1)
    assert np.abs(warp(ramp, matrix, side, side) - expected).max() <= 250 / (2 * half) + 0.1
    assert (warp(np.full((2 * half, half, 3), 77, np.uint8), matrix, side, side) == 77).all()


def test_beyond_the_border_the_border_goes_on() -> None:
    image = np.array([[10, 20], [30, 40]], np.uint8)
    result = warp(image, shifted(IDENTITY, -5, -5), 12, 12)
    assert [result[0, 0], result[0, -1], result[-1, 0], result[-1, -1]] == [10, 20, 30, 40]
    assert (warp(image, shifted(IDENTITY, 100, 3), 4, 4) == 40).all(), "nothing of the image is in sight"
    assert (warp(image, shifted(IDENTITY, -1_000, -9), 4, 4) == 10).all()


@pytest.mark.parametrize("place", [100, 15_000, 29_900])
def test_very_wide_images(place: int) -> None:
    image = np.repeat((np.arange(30_000) % 251).astype(np.uint8)[None], 8, axis=0)
    assert np.array_equal(warp(image, shifted(IDENTITY, place, 0), 40, 8), image[:, place : place + 40])
    wider = np.concatenate([image, image], axis=1)
    assert np.array_equal(warp(wider, shifted(IDENTITY, 30_000 + place, 0), 40, 8), image[:, place : place + 40])
    assert warp(image, enlarged(IDENTITY, target=1 / 1_000), 30, 1).shape == (1, 30)


# ---- detection ----


@pytest.fixture(scope="session")
def yunet(shared_data: Path) -> YuNet:
    return YuNet(shared_data / "weights" / DETECTOR_FILE.name)


def real_photo(shared_data: Path, name: str) -> Pixels:
    return decode_image((shared_data / "real-lq" / "photos" / name).read_bytes(), name=name)


def paired(faces: list[Face], others: list[Face]) -> list[tuple[Face, Face]]:
    """Each face with the one of the others that is closest to it."""
    return [(face, min(others, key=lambda other: math.dist(face.centre, other.centre))) for face in faces]


@pytest.mark.parametrize("name", FACES_OF_PHOTO)
def test_faces_are_found_however_the_photo_lies(name: str, yunet: YuNet, shared_data: Path) -> None:
    photo = real_photo(shared_data, name)
    upright = yunet(photo)
    assert len(upright) == FACES_OF_PHOTO[name]
    assert all(face.turned == 0 and 0.8 <= face.score <= 1 for face in upright)
    assert upright == sorted(upright, key=lambda face: -face.score), "best first"
    for face in upright:
        left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
        assert left_eye[0] < right_eye[0]
        assert left_mouth[0] < right_mouth[0]
        assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])
    for quarters in (1, 2, 3):
        lying = turned(photo, quarters)
        found = yunet(lying)
        assert len(found) == len(upright)
        assert all(face.turned == 360 - 90 * quarters for face in found)
        back = [turn_back(face, 4 - quarters, *lying.shape[1::-1]) for face in upright]
        matches = paired(found, back)
        assert len({id(other) for _, other in matches}) == len(found)
        for face, other in matches:
            assert np.hypot(*(face.points - other.points).T).max() <= 2


def test_turning_can_be_forbidden(shared_data: Path) -> None:
    model = shared_data / "weights" / DETECTOR_FILE.name
    lying = turned(real_photo(shared_data, "03.jpg"), 2)
    assert all(face.turned == 0 for face in YuNet(model, turn=False)(lying))


def test_tiles_find_each_face_once(yunet: YuNet, shared_data: Path) -> None:
    """A photo at places of a large canvas that lie in one tile, across two, and across four."""
    photo = real_photo(shared_data, "01.jpg")
    height, width = photo.shape[:2]
    canvas = np.full((3_000, 5_000, 3), 128, np.uint8)
    corners = [(0, 0), (1_150, 1_300), (1_400, 100), (2_700, 1_450), (4_752, 2_811)]
    for left, top in corners:
        canvas[top : top + height, left : left + width] = photo
    expected = [(face.centre[0] + left, face.centre[1] + top) for face in yunet.upright(photo) for left, top in corners]
    found = yunet(canvas)
    assert len(found) == len(expected) == 20
    for x, y in expected:
        assert sum(math.dist(face.centre, (x, y)) <= 4 for face in found) == 1


def test_panoramas(yunet: YuNet, shared_data: Path) -> None:
    photo = real_photo(shared_data, "01.jpg")
    canvas = np.full((200, 30_000, 3), 128, np.uint8)
    for left in (7_000, 29_000):
        canvas[: photo.shape[0], left : left + photo.shape[1]] = photo
    assert len(yunet(canvas)) == 8
    assert len(yunet.upright(np.ascontiguousarray(canvas.transpose(1, 0, 2)))) < 8, "they lie on their side"


def test_two_hundred_faces(yunet: YuNet, shared_data: Path) -> None:
    face = yunet(photo := real_photo(shared_data, "03.jpg"))[0]
    left, top, width, height = (round(value) for value in face.box)
    around = photo[max(0, top - height // 4) : top + height * 5 // 4, left - width // 4 : left + width * 5 // 4]
    assert len(yunet(np.tile(resize(around, 60, 48), (20, 10, 1)))) == 200


@pytest.mark.parametrize("size", [(1, 1), (1, 3_000), (700, 2), (40, 40)])
def test_where_no_face_is(size: tuple[int, int], yunet: YuNet, rng: np.random.Generator) -> None:
    assert yunet(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) == []


def test_a_file_that_is_no_network(tmp_path: Path) -> None:
    for content in (b"not a network" * 99, b""):
        (tmp_path / "some.onnx").write_bytes(content)
        with pytest.raises(WeightsError, match=r"(?s)some\.onnx.*supply face_detection_yunet_2026may\.onnx"):
            YuNet(tmp_path / "some.onnx")


@given(st.integers(1, 60_000))
def test_tiles_cover_a_side(length: int) -> None:
    """Every face that the network knows lies whole in a tile, and no tile is larger than it may be."""
    found = tiles(length)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(0 < end - begin <= TILE for begin, end in found)
    assert all(before[1] - after[0] >= OVERLAP for before, after in pairwise(found))


@given(st.integers(1, 60_000), st.integers(1, 60_000), st.floats(4, 1_000))
def test_a_photo_is_looked_at_in_sizes_for_every_face(width: int, height: int, min_size: float) -> None:
    scales = looked_at(width, height, min_size)
    assert scales == sorted(scales, reverse=True)
    assert scales == looked_at(height, width, min_size)
    assert 0 < scales[-1] <= scales[0] <= 2
    assert scales[0] * max(width, height) <= max(1_280, width, height) + 1
    # The largest possible face, as high as the photo, and all down to the smallest one that is wanted.
    sizes = np.geomspace(min_size, max(min_size, min(width, height)), 30)
    if scales[0] * min_size >= 11.9:
        assert all(any(11.9 <= size * scale <= LARGEST_SEEN + 1 for scale in scales) for size in sizes)


COORDINATES = st.floats(-50, 300)


@given(
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(1, 300),
    st.tuples(COORDINATES, COORDINATES, st.floats(1, 99), st.floats(1, 99)),
    st.lists(st.tuples(COORDINATES, COORDINATES), min_size=5, max_size=5).map(tuple),
)
def test_turning_back_is_the_inverse(
    quarters: int,
    width: int,
    height: int,
    box: tuple[float, float, float, float],
    landmarks: tuple[tuple[float, float], ...],
) -> None:
    lying = (width, height) if quarters == 2 else (height, width)
    face = Face(box, landmarks, 0.9)
    there_and_back = turn_back(turn_back(face, 4 - quarters, *lying), quarters, width, height)
    assert there_and_back.box == pytest.approx(box)
    assert np.allclose(there_and_back.points, face.points)
    assert there_and_back.turned == 90 * quarters


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_turning_back_finds_the_pixel(quarters: int, rng: np.random.Generator) -> None:
    photo = rng.permutation(7 * 11).reshape(7, 11).astype(np.uint8)
    lying = turned(photo, quarters)
    y, x = np.argwhere(lying == photo[2, 9])[0]
    face = Face((x, y, 0, 0), ((x, y),) * 5)
    assert turn_back(face, quarters, 11, 7).landmarks[0] == (9, 2)


def box_face(left: float, top: float, width: float, height: float, score: float = 0.9) -> Face:
    return Face((left, top, width, height), ((left, top),) * 5, score)


def test_of_twins_one_is_kept() -> None:
    face, twin = box_face(10, 10, 50, 60), box_face(13, 8, 52, 58, 0.95)
    beside, part = box_face(70, 10, 50, 60, 0.85), box_face(25, 30, 20, 20, 0.99)
    assert one_of_each([face, twin, beside]) == [twin, beside]
    assert one_of_each([part, face]) == [face], "the part of a face that looks like one is not it"
    assert is_same(face, part)
    assert not is_same(face, beside)


# ---- selection ----

BOXES = st.tuples(COORDINATES, COORDINATES, st.floats(1, 90), st.floats(1, 90))
FACES = st.lists(BOXES, max_size=12, unique=True).map(lambda boxes: [box_face(*box) for box in boxes])


@given(
    FACES,
    st.sampled_from(["all", "largest", "center"]),
    st.none() | st.integers(1, 5),
    st.floats(0, 40),
    st.floats(40, 90),
    st.lists(BOXES, max_size=3).map(tuple),
)
@settings(deadline=None)
def test_every_face_has_its_choice(
    faces: list[Face], which: str, most: int | None, low: float, high: float, boxes: tuple
) -> None:
    """Each found face is there once, with a reason or without; only faces of boxes are added; order is no matter."""
    wanted = Selection(which, most, low, high, boxes)
    choices = select(faces, wanted, 200, 150)
    assert sorted(face.box for face, _ in choices if face.score > 0) == sorted(face.box for face in faces)
    assert [face.size for face, _ in choices] == sorted((face.size for face, _ in choices), reverse=True)
    assert select(faces[::-1], wanted, 200, 150) == choices
    chosen = [face for face, reason in choices if reason is None]
    assert all(reason != "" for _, reason in choices)
    if boxes:
        assert all(any(overlap(face.box, box) >= 0.2 for box in boxes) for face in chosen)
        return
    assert len(choices) == len(faces)
    eligible = [face for face in faces if low <= face.size <= high]
    expected = min(len(eligible), len(eligible) if most is None else most, 1 if which != "all" else 99)
    assert len(chosen) == expected
    if chosen and which != "center":
        assert min(face.size for face in chosen) >= max(
            (face.size for face in eligible if face not in chosen), default=0
        )
    if chosen and which == "center":
        middle = (99.5, 74.5)
        nearest = min(math.dist(face.centre, middle) for face in eligible)
        assert math.dist(chosen[0].centre, middle) == nearest


def test_reasons_name_the_cause() -> None:
    faces = [box_face(0, 0, 10, 10), box_face(80, 40, 30, 30), box_face(100, 0, 60, 60), box_face(9, 70, 40, 40)]
    reasons = {
        which: [reason for _, reason in select(faces, Selection(which, min_size=20, max_size=50), 200, 120)]
        for which in ("all", "largest", "center")
    }
    large, small = "larger than 50 px: it has 60", "smaller than 20 px: it has 10"
    assert reasons["all"] == [large, None, None, small]
    assert reasons["largest"] == [large, None, "not the largest", small]
    assert reasons["center"] == [large, "not the most central", None, small]
    assert [reason for _, reason in select(faces, Selection(most=2), 200, 120)][2:] == ["more than 2 faces"] * 2


def test_boxes_mean_faces_or_make_them() -> None:
    faces = [box_face(10, 10, 40, 50), box_face(100, 10, 40, 50)]
    choices = select(faces, Selection(boxes=((14, 8, 40, 50), (60, 60, 30, 40))), 200, 120)
    found = {face.box: (reason, face.score) for face, reason in choices}
    assert found == {
        faces[0].box: (None, 0.9),
        faces[1].box: ("not among the given boxes", 0.9),
        (60, 60, 30, 40): (None, 0.0),
    }
    made = next(face for face, _ in choices if face.score == 0)
    x, y = made.points.T
    assert 60 < x.min() < x.max() < 90
    assert 60 < y.min() < y.max() < 100
    assert x[0] < x[1]
    assert x[3] < x[4]
    assert y[:2].max() < y[2] < y[3:].min()


@pytest.mark.parametrize("boxes", [((60, 60, 30, 40),) * 2, ((14, 8, 40, 50), (12, 12, 38, 48))])
def test_a_face_that_two_boxes_mean_is_one(boxes: tuple) -> None:
    choices = select([box_face(10, 10, 40, 50)], Selection(boxes=boxes), 200, 120)
    assert len([face for face, reason in choices if reason is None]) == 1
