"""Photos: what their files hold is kept."""

import io
import struct
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from ldbfr.errors import InputError
from ldbfr.images import ImageFormat, Pixels, decode_image, encode_image
from ldbfr.metadata import read_provenance
from ldbfr.photos import Photo, decode_photo
from ldbfr.photos.paste import Area, Patch
from ldbfr.photos.photo import lanczos
from tests import tiny
from tests.test_metadata import ADOBE_RGB, DISPLAY_P3, camera_exif, rgb_profile, saved, smooth, srgb_profile, tags_of

ORIENTATION = 0x0112


def photo_of(data: bytes) -> Photo:
    return decode_photo(data, name="a.img")


def of_pixels(pixels: Pixels) -> Photo:
    return photo_of(encode_image(pixels, "png"))


def reopened(photo: Photo, format: ImageFormat = "png", **options: Any) -> Image.Image:
    image = Image.open(io.BytesIO(photo.encode(format, **options)))
    image.load()
    return image


# ---- files in, files out ----


def image_of_mode(mode: str, height: int = 12, width: int = 18, seed: int = 0) -> Image.Image:
    """A picture of any mode, with every alpha where there is one."""
    rng = np.random.default_rng(seed)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    if mode == "LAB":
        return Image.frombytes("LAB", rgb.size, rgb.tobytes())
    image = rgb.convert({"LA": "L", "RGBA": "RGB", "PA": "P", "clear P": "P", "clear RGB": "RGB"}.get(mode, mode))
    if mode in ("LA", "RGBA", "PA"):
        image.putalpha(alpha)
    if mode == "clear P":
        image.info["transparency"] = 3
    if mode == "clear RGB":
        image.info["transparency"] = image.getpixel((0, 0))
    return image


KEPT = {
    **{("PNG", mode): mode for mode in ("L", "LA", "RGB", "RGBA", "I;16")},
    **{("PNG", "1"): "L", ("PNG", "P"): "RGB", ("PNG", "clear P"): "RGBA", ("PNG", "clear RGB"): "RGBA"},
    **{("TIFF", mode): mode for mode in ("L", "LA", "RGB", "RGBA", "I;16", "CMYK")},
    **{("TIFF", "P"): "RGB", ("TIFF", "PA"): "RGBA", ("TIFF", "YCbCr"): "RGB", ("TIFF", "LAB"): "RGB"},
    **{("JPEG", "L"): "L", ("JPEG", "RGB"): "RGB", ("JPEG", "CMYK"): "CMYK", ("BMP", "RGB"): "RGB", ("TIFF", "1"): "L"},
    **{("WEBP", "RGB"): "RGB", ("WEBP", "RGBA"): "RGBA", ("BMP", "L"): "L", ("BMP", "P"): "RGB"},
}
"""What becomes of each mode of each format."""


@pytest.mark.parametrize(("format", "mode"), KEPT)
def test_every_mode_comes_through(format: str, mode: str) -> None:
    """Unchanged, a photo's file has its samples, bit for bit, its alpha and what it shows."""
    image = image_of_mode(mode)
    data = saved(image, format, lossless=True)
    source = Image.open(io.BytesIO(data))
    source.load()
    photo = photo_of(data)
    assert (photo.height, photo.width) == (12, 18)
    assert np.array_equal(photo.shown, decode_image(data, name="a.img"))
    kept = KEPT[format, mode]
    if kept == "CMYK":
        assert np.array_equal(photo.colours, np.asarray(source))
        result = reopened(photo, "jpeg", quality=100)
        assert np.abs(np.asarray(result).astype(int) - np.asarray(source)).max() <= 6
        assert reopened(photo).mode == "RGB"
        assert np.array_equal(np.asarray(reopened(photo)), photo.shown)
        return
    result = reopened(photo)
    assert result.mode == kept
    assert result.size == (18, 12)
    if kept == mode or "clear" in mode or mode in ("1", "P", "PA"):
        assert np.array_equal(np.asarray(result), np.asarray(source.convert(kept) if kept != mode else source))
    assert np.array_equal(decode_image(photo.encode("png"), name="a.img"), photo.shown)
    changed = kept != mode and "RGB" not in mode
    assert any("became" in note for note in photo.notes) == changed


@pytest.mark.parametrize("output", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "clear P", "RGB", "clear RGB", "RGBA", "I;16", "CMYK"])
def test_every_output_shows_the_photo(mode: str, output: ImageFormat) -> None:
    """On white every format shows the same, up to its loss, and `losses` tells what it does not hold."""
    smooth_alpha = Image.fromarray(smooth(20, 30)[..., 0])
    image = Image.fromarray(smooth(20, 30)).convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(smooth(20, 30)[..., 1].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert({"LA": "L", "RGBA": "RGB", "clear P": "P", "clear RGB": "RGB"}.get(mode, mode))
    if mode in ("LA", "RGBA"):
        image.putalpha(smooth_alpha)
    photo = photo_of(saved(image, "TIFF" if mode == "CMYK" else "PNG"))
    shown = decode_image(photo.encode(output, quality=100), name="a.img")
    tolerance = {"png": 0, "jpeg": 4, "webp": 12}[output] if mode not in ("1", "P", "clear P") else 90
    assert np.abs(shown.astype(int) - photo.shown).max() <= (0 if output == "png" else tolerance)
    expected = {
        ("RGBA", "jpeg"): "transparent",
        ("LA", "jpeg"): "transparent",
        ("CMYK", "png"): "CMYK became RGB",
        ("CMYK", "webp"): "CMYK became RGB",
        ("I;16", "jpeg"): "16 bits",
        ("I;16", "webp"): "16 bits",
    }.get((mode, output))
    assert [expected in loss for loss in photo.losses(output)] == ([] if expected is None else [True])


@given(st.sampled_from(sorted(KEPT)), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["png", "jpeg", "webp"]))
@hypothesis_settings(deadline=None, max_examples=60)
def test_any_size_of_any_mode(kind: tuple[str, str], height: int, width: int, output: ImageFormat) -> None:
    format, mode = kind
    photo = photo_of(saved(image_of_mode(mode, height, width), format))
    assert reopened(photo, output).size == (width, height)
    large = photo.enlarged(2)
    assert reopened(large, output).size == (2 * width, 2 * height)
    assert large.mode == photo.mode
    assert large.colours.dtype == photo.colours.dtype


def test_floating_point_is_refused() -> None:
    with pytest.raises(InputError, match=r"a\.img: floating-point samples, expected integers"):
        photo_of(saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_upright_and_its_exif(mode: str, orientation: int) -> None:
    format: ImageFormat = "jpeg" if mode == "CMYK" else "png"
    data = saved(image_of_mode(mode), format, exif=camera_exif(orientation=orientation))
    photo = photo_of(data)
    size = (12, 18) if orientation >= 5 else (18, 12)
    assert photo.shown.shape[1::-1] == photo.colours.shape[1::-1] == size
    assert np.array_equal(photo.shown, decode_image(data, name="a.img"))
    result = photo.encode(format, provenance={"by": "me"})
    assert tags_of(result)[ORIENTATION] == 1
    assert tags_of(result)[0x010F] == "Maker"
    assert read_provenance(result, name="a.img") == {"by": "me"}
    assert result == photo.encode(format, provenance={"by": "me"})
    assert 0x010F not in tags_of(photo.encode(format, keep_metadata=False))
    if format == "png":
        assert np.array_equal(decode_image(result, name="a.img"), photo.shown)


# ---- colour ----

P3 = rgb_profile(*DISPLAY_P3)
PROFILES = {"srgb": srgb_profile(), "p3": P3, "adobe": rgb_profile(*ADOBE_RGB)}


def repaint(photo: Photo, area: Area, value: int) -> None:
    """What `paste` does: change a part of what is shown, and tell of it."""
    before = area.of(photo.shown).copy()
    area.of(photo.shown)[...] = value
    assert photo.apply([Patch(area, before, area.of(photo.shown))]) == 1


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_profiles_are_kept_and_changes_made_in_them(profile: str, mode: str) -> None:
    """The photo's own samples stay where nothing changed; where something did, the file shows it."""
    image = Image.fromarray(smooth(20, 30))
    if mode == "RGBA":
        image.putalpha(255)
    data = saved(image, "PNG", icc_profile=PROFILES[profile])
    photo = photo_of(data)
    area = Area(5, 5, 15, 12)
    repaint(photo, area, 120)
    result = reopened(photo)
    assert result.info["icc_profile"] == PROFILES[profile]
    kept = np.ones((20, 30), bool)
    area.of(kept)[...] = False
    assert np.array_equal(np.asarray(result)[kept], np.asarray(image)[kept])
    shown = decode_image(photo.encode("png"), name="a.img")
    assert np.abs(shown.astype(int) - photo.shown).max() <= 2
    assert np.abs(area.of(shown).astype(int) - 120).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "CMYK", "RGBA", "clear P"])
def test_changes_reach_every_kind_of_samples(mode: str) -> None:
    image = image_of_mode(mode, 20, 30)
    photo = photo_of(saved(image, "TIFF" if mode == "CMYK" else "PNG"))
    before, area = photo.colours.copy(), Area(5, 5, 15, 12)
    repaint(photo, area, 120)
    kept = np.ones((20, 30), bool)
    area.of(kept)[...] = False
    assert np.array_equal(photo.colours[kept], before[kept])
    assert not np.array_equal(area.of(photo.colours), area.of(before))
    if mode in ("L", "I;16"):
        shown = decode_image(photo.encode("png"), name="a.img")
        assert np.abs(area.of(shown).astype(int) - 120).max() <= 1


@pytest.mark.parametrize(
    ("mode", "profile"),
    [(mode, b"no profile") for mode in ("RGBA", "RGB", "L", "P")] + [(mode, P3) for mode in ("L", "CMYK")],
)
def test_profiles_that_do_not_fit_change_nothing_that_is_shown(mode: str, profile: bytes) -> None:
    image = image_of_mode(mode)
    photo = photo_of(saved(image, "TIFF" if mode == "CMYK" else "PNG", icc_profile=profile))
    assert photo.profile == b""
    assert np.array_equal(decode_image(photo.encode("png"), name="a.img"), photo.shown)
    if mode == "RGBA":
        assert np.array_equal(np.asarray(reopened(photo)), np.asarray(image))


@pytest.mark.parametrize("mode", ["clear P", "P"])
def test_a_palettes_profile_stays_with_its_colours(mode: str) -> None:
    photo = photo_of(saved(image_of_mode(mode), "PNG", icc_profile=P3))

    assert photo.profile == P3
    assert photo.notes == ["a palette became RGB"]
    assert np.array_equal(decode_image(photo.encode("png"), name="a.img"), photo.shown)


def grey_profile() -> bytes:
    """A scanner's: one exponent, that of 1.8."""
    white, curve = struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061), struct.pack(">4s4xIH2x", b"curv", 1, 461)
    table = struct.pack(">I4s2I4s2I", 2, b"wtpt", 156, len(white), b"kTRC", 156 + len(white), len(curve))
    size = 156 + len(white) + len(curve)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp") + white[8:]
    return head.ljust(128, b"\0") + table + white + curve


@pytest.mark.parametrize("output", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_profiles(mode: str, output: ImageFormat) -> None:
    """Every format shows what the photo does; WebP, which has no grey, as sRGB."""
    image = Image.fromarray(smooth(20, 30)[..., 0])
    if mode == "LA":
        image.putalpha(100)
    photo = photo_of(saved(image, "PNG", icc_profile=grey_profile()))
    assert photo.profile == grey_profile()
    assert np.abs(photo.shown[..., 0].astype(int) - np.asarray(image.convert("RGB"))[..., 0]).max() > 5
    shown = decode_image(photo.encode(output, quality=100), name="a.img")
    assert np.abs(shown.astype(int) - photo.shown).max() <= 8


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_without_metadata_it_shows_the_same(mode: str) -> None:
    profile = P3 if mode.startswith("RGB") else b""
    photo = photo_of(saved(image_of_mode(mode), "PNG", icc_profile=profile, exif=camera_exif(orientation=6)))
    result = photo.encode("png", keep_metadata=False)
    assert "icc_profile" not in Image.open(io.BytesIO(result)).info
    assert 0x010F not in tags_of(result)
    assert np.abs(decode_image(result, name="a.img").astype(int) - photo.shown).max() <= 1


GREY = np.random.default_rng(0).integers(0, 256, (60, 80, 1)).astype(float)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (GREY * np.ones(3), True),
        (np.array([40, 26, 13]) + GREY / 255 * np.array([210, 209, 192]), True),
        (255 * (GREY / 255) ** np.array([0.9, 1, 1.15]), True),
        (GREY * np.array([1.351, 1.203, 0.937]), True),
        (np.full((1, 1, 3), 9.0) * np.array([20, 1, 3]), True),
        (smooth(60, 80).astype(float), False),
        (tiny.blob_faces(1, 64)[0].astype(float), False),
    ],
    ids=["grey", "brown", "warm", "sepia filter", "one pixel", "colours", "face"],
)
def test_one_tone(pixels: np.ndarray, expected: bool) -> None:
    """Grey and toned prints, noise or not, are of one tone."""
    for noise in (0, 2):
        values = pixels + noise * np.random.default_rng(1).standard_normal((*pixels.shape[:2], 1))
        assert of_pixels(np.clip(np.rint(values), 0, 255).astype(np.uint8)).is_of_one_tone() == expected


# ---- enlarging ----


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("scale", [2, 4])
def test_enlarged_by_a_filter(mode: str, scale: int) -> None:
    photo = photo_of(saved(image_of_mode(mode), "TIFF" if mode == "CMYK" else "PNG"))
    large = photo.enlarged(scale)
    assert np.array_equal(large.shown, lanczos(photo.shown, scale))
    assert large.colours.shape[:2] == (12 * scale, 18 * scale)
    assert (large.alpha is None) == (photo.alpha is None)
    assert large.shares_pixels == photo.shares_pixels
    assert photo.enlarged(1) is photo


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_enlarged_by_a_model(mode: str) -> None:
    """A model gets what is shown and the factor; what it gives is what the file shows."""
    asked = []

    def upscaler(pixels: Pixels, scale: int) -> Pixels:
        asked.append((pixels.shape, scale))
        return pixels.repeat(scale, axis=0).repeat(scale, axis=1)

    image = image_of_mode(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(100)
    photo = photo_of(saved(image, "TIFF" if mode == "CMYK" else "PNG"))
    large = photo.enlarged(2, upscaler)
    assert set(asked) == {((12, 18, 3), 2)}
    assert np.abs(large.shown.astype(int) - upscaler(photo.shown, 2)).max() <= 1
    shown = decode_image(large.encode("png"), name="a.img")
    assert np.abs(shown.astype(int) - large.shown).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_photos_become_coloured_ones_that_show_the_same(mode: str) -> None:
    photo = photo_of(saved(image_of_mode(mode), "PNG")).in_color()
    assert photo.mode == "RGB"
    assert "grey became RGB" in photo.notes
    assert np.array_equal(decode_image(photo.encode("png"), name="a.img"), photo.shown)


def test_what_a_photo_cannot_keep_is_noted() -> None:
    frames = [Image.fromarray(smooth(8, 9)), Image.fromarray(smooth(8, 9)[::-1].copy())]
    file = io.BytesIO()
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    assert "only the first of 2 frames or pages is kept" in photo_of(file.getvalue()).notes
    assert any("profile" in note for note in photo_of(saved(frames[0], "PNG", icc_profile=b"broken")).notes)
    deep = cv2.imencode(".png", np.full((4, 5, 3), 40_000, np.uint16))[1].tobytes()
    assert "16 bits a colour became 8" in photo_of(deep).notes
