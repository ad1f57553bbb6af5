"""PhotoRestorer with the tiny pipeline and given faces: it changes faces and nothing else."""

import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from ldbfr.errors import ConfigError, InputError
from ldbfr.evaluation.metrics import IdentityModel
from ldbfr.faces import Face
from ldbfr.faces.selection import face_of_box
from ldbfr.images import ImageFormat, Pixels, encode_image, resize
from ldbfr.photos import Photo, PhotoRestorer, PhotoSettings, decode_photo
from ldbfr.photos.paste import Area, RestoredFace, weight_in
from ldbfr.photos.photo import lanczos
from tests import tiny
from tests.test_metadata import saved


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are faster so, and do not suffer from what else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def without_identity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests go without the slowest of what is measured."""
    if "least" not in request.fixturenames:
        monkeypatch.setattr(IdentityModel, "is_installed", lambda: False)


def photo_of(data: bytes) -> Photo:
    return decode_photo(data, name="a.img")


def of_pixels(pixels: Pixels) -> Photo:
    return photo_of(encode_image(pixels, "png"))


def reopened(photo: Photo, format: ImageFormat = "png", **options: Any) -> Image.Image:
    image = Image.open(io.BytesIO(photo.encode(format, **options)))
    image.load()
    return image


SETTINGS = PhotoSettings(min_face=4, sharp_faces="restore")


class Counted:
    """The tiny pipeline, and how many faces each call had."""

    def __init__(self) -> None:
        self.preset, self.side, self.sizes = tiny.preset(), tiny.SIDE, []

    def __call__(self, images: np.ndarray, **options: Any) -> Any:
        self.sizes.append(len(images))
        return tiny.pipeline()(images, num_inference_steps=1, **options)


def restorer(faces: Sequence[Face], settings: PhotoSettings = SETTINGS, **options: Any) -> PhotoRestorer:
    """With a detector that finds these faces."""
    return PhotoRestorer(Counted(), settings, detector=lambda _: list(faces), **options)


def portrait(height: int = 90, width: int = 120, seed: int = 0) -> Pixels:
    """A crowd: smooth pictures of faces side by side."""
    side = math.ceil(max(height, width) / 3)
    faces = tiny.blob_faces(9, side, seed).reshape(3, 3, side, side, 3)
    return np.ascontiguousarray(faces.swapaxes(1, 2).reshape(3 * side, 3 * side, 3)[:height, :width])


def outside(restore: PhotoRestorer, pixels: Pixels) -> np.ndarray:
    """Where no mask reaches, whatever the model made of a face."""
    reached = np.zeros(pixels.shape[:2], bool)
    for one in restore.find(of_pixels(pixels)).faces:
        if one.alignment is not None:
            whole = Area(0, 0, pixels.shape[1], pixels.shape[0])
            face = RestoredFace(one.alignment.image, one.alignment.image, one.alignment.matrix, one.face.points)
            rim = 2 * math.ceil(2 * one.alignment.photo_px) + 1  # interpolation reaches two px of the frame further
            reached |= cv2.dilate((weight_in(face, whole, 1) > 0).astype(np.uint8), np.ones((rim, rim))) > 0
    return ~reached


CROWD = [face_of_box((2.0 + 6 * (n % 20), 3.0 + 9 * (n // 20), 5.0, 7.0)) for n in range(200)]
HOSTILE: dict[str, tuple[tuple[int, int], list[Face]]] = {
    "cut by every border": (
        (90, 120),
        [face_of_box(box) for box in ((-20, 20, 40, 50), (100, 20, 40, 50), (40, -25, 40, 50), (40, 70, 40, 50))],
    ),
    "8 px": ((90, 120), [face_of_box((50, 40, 8, 8))]),
    "200": ((90, 120), CROWD),
    "overlapping": ((90, 120), [face_of_box((20, 10, 50, 60)), face_of_box((40, 15, 40, 50))]),
    "one pixel": ((1, 1), [face_of_box((-10, -10, 20, 20))]),
    "larger than the photo": ((30, 20), [face_of_box((-40, -40, 100, 120))]),
    "beyond the photo": ((90, 120), [face_of_box((300, 20, 40, 50)), face_of_box((20, -30, 12, 15))]),
    "upside down": ((90, 120), [Face((20, 10, 50, 60), face_of_box((70, 70, -50, -60)).landmarks)]),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("scale", [1, 2])
def test_faces_of_every_kind(case: str, scale: int) -> None:
    """No face is an error, each has its report, and nothing outside the masks has another bit."""
    size, faces = HOSTILE[case]
    pixels = portrait(*size)
    restore = restorer(faces, SETTINGS.model_copy(update={"scale": scale}))
    result = restore(of_pixels(pixels))
    assert [report.outcome for report in result.faces] == ["restored"] * len(faces)
    assert sorted(report.box for report in result.faces) == sorted(face.box for face in faces)
    shown = np.asarray(reopened(result.photo))
    assert shown.shape == (size[0] * scale, size[1] * scale, 3)
    kept = outside(restore, pixels)
    if scale == 1:
        assert np.array_equal(shown[kept], pixels[kept])
        if case in ("8 px", "200", "overlapping", "cut by every border", "upside down"):
            assert not np.array_equal(shown, pixels)


@pytest.mark.parametrize("scale", [2, 4])
def test_the_background_is_enlarged(scale: int) -> None:
    """By Lanczos's filter or by the upscaler that is given."""
    pixels = portrait()
    for upscaler in (None, lambda image, factor: image.repeat(factor, axis=0).repeat(factor, axis=1)):
        settings = SETTINGS.model_copy(update={"scale": scale})
        result = restorer([face_of_box((30, 20, 40, 50))], settings, upscaler=upscaler)(of_pixels(pixels))
        expected = (upscaler or lanczos)(pixels, scale)
        difference = np.abs(result.photo.shown.astype(int) - expected).max(axis=2)
        assert not difference[: 2 * scale].any()
        assert not difference[:, -30 * scale :].any()
        assert difference[20 * scale : 70 * scale, 30 * scale : 70 * scale].any()
        assert not result.is_unchanged


def test_photos_without_faces() -> None:
    data = encode_image(portrait(), "png")
    restore = restorer([])
    result = restore(photo_of(data))
    assert result.is_unchanged
    assert result.note() == "no face found"
    assert np.array_equal(result.photo.shown, portrait())
    assert restore.pipeline.sizes == []
    strict = restorer([], PhotoSettings(no_face="failure"))
    with pytest.raises(InputError, match=r"a\.img: no face found, expected one at least"):
        strict(photo_of(data))
    assert len(list(strict.many([photo_of(data)] * 2))) == 2, "of several it is told by check()"


def test_micro_batches_span_photos() -> None:
    """In order, of the pixels that each photo alone gives, and no photo is read before it is needed."""
    boxes = [(5.0, 5.0, 30.0, 40.0), (40.0, 20.0, 40.0, 50.0), (80.0, 10.0, 30.0, 30.0), (70.0, 50.0, 30.0, 35.0)]
    counts = [3, 0, 4, 1, 2, 0]
    widths = {120 + number: count for number, count in enumerate(counts)}
    read: list[int] = []

    def detector(pixels: Pixels) -> list[Face]:
        return [face_of_box(box) for box in boxes[: widths[pixels.shape[1]]]]

    def photos() -> Iterator[Photo]:
        for width in widths:
            read.append(width)
            yield of_pixels(portrait(90, width, seed=width))

    restore = PhotoRestorer(Counted(), SETTINGS, detector=detector, batch_size=4, seed=5)
    results = restore.many(photos())
    first = next(results)
    assert len(read) == 3
    both = [first, *results]
    assert restore.pipeline.sizes == [4, 4, 2]
    assert [len(result.faces) for result in both] == [result.num_restored for result in both] == counts
    for result, photo in zip(both, photos(), strict=True):
        alone = restore(photo)
        assert np.array_equal(result.photo.shown, alone.photo.shown)
        assert result.faces == alone.faces


def test_samples_give_an_uncertainty() -> None:
    faces = [face_of_box((10, 10, 40, 50)), face_of_box((60, 20, 30, 40))]
    many = restorer(faces, num_samples=2)(of_pixels(portrait()))
    assert all(0 < report.uncertainty < 1 for report in many.faces)
    assert all(report.uncertainty is None for report in restorer(faces)(of_pixels(portrait())).faces)
    values = many.faces[0].values()
    assert json.loads(json.dumps(values)) == values
    assert values["box"] == [10, 10, 40, 50]
    assert "reason" not in values


def test_sharp_faces_are_left_alone() -> None:
    """A face with detail that the model's 32 px cannot hold stays; a large smooth one does not."""
    rng = np.random.default_rng(0)
    face = face_of_box((60, 50, 200, 240))
    smooth_one, pattern = portrait(340, 320), rng.integers(0, 2, (57, 54, 1)).repeat(6, axis=0).repeat(6, axis=1)
    sharp_one = np.clip(smooth_one.astype(int) // 2 + 60 * pattern[:340, :320], 0, 255).astype(np.uint8)
    settings = PhotoSettings()
    left = restorer([face], settings)(of_pixels(sharp_one))
    assert left.faces[0].outcome == "left"
    assert str(left.faces[0].reason).startswith("sharper than the model's 32 px: the photo shows it in ")
    assert left.note() == "1 face left alone (sharper than the model's 32 px)"
    assert left.is_unchanged
    assert np.array_equal(left.photo.shown, sharp_one)
    assert restorer([face])(of_pixels(sharp_one)).num_restored == 1
    blurred = resize(resize(smooth_one, 12, 12), 340, 320)
    assert restorer([face], settings)(of_pixels(blurred)).num_restored == 1


@pytest.mark.parametrize("grey", ["keep", "color"])
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_grey_photos_may_stay_grey(mode: str, grey: str) -> None:
    values = portrait()[..., 1]
    image = Image.fromarray(values.astype(np.uint16) * 257 if mode == "I;16" else values)
    photo = photo_of(saved(image.convert("RGB") if mode == "RGB" else image, "PNG"))
    result = restorer([face_of_box((30, 20, 40, 50))], SETTINGS.model_copy(update={"grey": grey}))(photo)
    shown = reopened(result.photo)
    assert shown.mode == (mode if grey == "keep" else "RGB")
    colours = np.ptp(result.photo.shown.astype(int), axis=2)
    assert colours.any() == (grey == "color")
    assert not np.array_equal(result.photo.shown[..., 1], values)


def test_strength_and_seed() -> None:
    pixels, face = portrait(), face_of_box((30, 20, 40, 50))
    nothing = restorer([face], SETTINGS.model_copy(update={"strength": 0.0}))(of_pixels(pixels))
    assert np.array_equal(nothing.photo.shown, pixels)
    first, again, other = (restorer([face], seed=seed)(of_pixels(pixels)).photo.shown for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.skipif(not IdentityModel.is_installed(), reason="needs dlib and its models: the extra `identity`")
@pytest.mark.parametrize("least", [-1, 1])
def test_other_people_are_refused(least: float) -> None:
    pixels, faces = portrait(), [face_of_box((30, 20, 40, 50)), face_of_box((85, 40, 30, 40))]
    result = restorer(faces, SETTINGS.model_copy(update={"min_identity": least}))(of_pixels(pixels))
    assert all(report.identity_distance > 0 for report in result.faces)
    assert result.is_unchanged == np.array_equal(result.photo.shown, pixels) == (least == 1)
    assert {report.outcome for report in result.faces} == {"refused" if least == 1 else "restored"}
    if least == 1:
        assert "is below 1" in str(result.faces[0].reason)
        assert result.note() == "2 faces refused and left alone (another person)"


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"max_face": 8}, ConfigError, r"max_face 8 is below min_face 16"),
        ({"boxes": ((1, 2, 0, 3),)}, ConfigError, r"box \(1\.0, 2\.0, 0\.0, 3\.0\): expected left, top, width, height"),
        ({"boxes": ((1, math.nan, 1, 3),)}, ConfigError, r"nan"),
        *[({"strength": value}, ValidationError, r"strength") for value in (-0.1, 1.1, math.nan)],
        ({"scale": 3}, ValidationError, r"1, 2 or 4"),
        ({"min_face": math.nan}, ValidationError, r"min_face"),
        ({"max_faces": 0}, ValidationError, r"max_faces"),
        ({"min_score": 1.0}, ValidationError, r"min_score"),
        ({"min_identity": 1.5}, ValidationError, r"min_identity"),
        ({"faces": "none"}, ValidationError, r"'all', 'largest' or 'center'"),
        ({"oops": 1}, ValidationError, r"oops"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        PhotoSettings(**settings)


class Refusing(Counted):
    """Fails for want of memory above a number of faces, and on some faces always."""

    def __init__(self, most: int, bad: Sequence[Pixels] = ()) -> None:
        super().__init__()
        self.most, self.bad = most, [face.tobytes() for face in bad]

    def __call__(self, images: np.ndarray, **options: Any) -> Any:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(image.tobytes() in self.bad for image in images):
            raise RuntimeError("refused")
        return super().__call__(images, **options)


def test_a_photo_that_cannot_be_restored_does_not_stop_the_others() -> None:
    faces = [face_of_box((5.0 + 30 * n, 20, 25, 32)) for n in range(3)]
    photos = [of_pixels(portrait(seed=seed)) for seed in range(4)]
    bad = restorer(faces).find(photos[2]).chosen()[1]
    model = Refusing(4, [bad])

    def detect(pixels: Pixels) -> list[Face]:
        if np.array_equal(pixels, photos[1].shown):
            raise InputError("this one cannot be looked at")
        return list(faces)

    results = list(PhotoRestorer(model, SETTINGS, detector=detect, batch_size=8).many(photos))

    assert [result.error is None for result in results] == [True, False, False, True]
    with pytest.raises(InputError, match="cannot be looked at"):
        results[1].check(SETTINGS)
    with pytest.raises(InputError, match=r"the model failed \(refused\)"):
        results[2].check(SETTINGS)
    for number in (0, 3):
        alone = restorer(faces)(of_pixels(portrait(seed=number)))
        assert np.abs(alone.photo.shown.astype(int) - results[number].photo.shown).max() <= 1


def test_photos_do_not_pile_up_while_a_batch_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldbfr.photos.restorer.MOST_WAITING", 3 * 90 * 120)
    first = portrait()
    read = 0

    def photos() -> Iterator[Photo]:
        nonlocal read
        for number in range(40):
            read += 1
            yield of_pixels(first if number == 0 else portrait(seed=number))

    def detect(pixels: Pixels) -> list[Face]:
        return [face_of_box((30, 20, 40, 50))] if np.array_equal(pixels, first) else []

    results = PhotoRestorer(Counted(), SETTINGS, detector=detect).many(photos())
    next(results)
    assert read == 4


def test_strength_nought_changes_nothing_and_says_so() -> None:
    result = restorer([face_of_box((30, 20, 40, 50))], SETTINGS.model_copy(update={"strength": 0.0}))(
        of_pixels(portrait())
    )

    assert result.is_unchanged
    assert result.faces[0].sharpness_before == result.faces[0].sharpness_after


def test_a_box_outside_the_photo_is_said_to_be() -> None:
    settings = PhotoSettings(boxes=((5_000, 5_000, 64, 64),))
    result = restorer([], settings)(of_pixels(portrait()))

    assert (result.faces[0].outcome, result.is_unchanged) == ("left", True)
    assert "outside the photo of 120 x 90 px" in str(result.faces[0].reason)


def test_too_large_is_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldbfr.photos.photo.MOST_PIXELS", 40_000)
    with pytest.raises(InputError, match="choose a smaller --scale"):
        restorer([], SETTINGS.model_copy(update={"scale": 2}))(of_pixels(portrait()))


@pytest.mark.parametrize("grown", [np.zeros((270, 360, 3), np.uint8), np.zeros((180, 240, 3), np.float32)])
def test_an_upscaler_that_gives_something_else_is_refused(grown: np.ndarray) -> None:
    settings = SETTINGS.model_copy(update={"scale": 2})
    with pytest.raises(InputError, match="the upscaler gave"):
        restorer([], settings, upscaler=lambda pixels, scale: grown)(of_pixels(portrait()))
