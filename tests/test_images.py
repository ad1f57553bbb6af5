"""Images: files of every kind come out as the same upright RGB pixels, or as an InputError."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ldbfr.errors import ConfigError, InputError
from ldbfr.images import (
    FORMAT_OF_SUFFIX,
    IMAGE_SUFFIXES,
    SUFFIX_OF_FORMAT,
    ImageFormat,
    ImageLimits,
    Pixels,
    crop_to_square,
    decode_image,
    encode_image,
    fit_to_side,
    format_from_name,
    resize,
    to_float,
    to_uint8,
)
from ldbfr.sheets import contact_sheet

ORIENTATION_TAG = 0x0112


def smooth(height: int, width: int) -> Pixels:
    """A picture without symmetry that lossy formats keep well."""
    y, x = np.mgrid[0:height, 0:width] / (height + width)
    return np.stack([60 + 180 * x, 230 - 200 * y, 40 + 150 * (x + y) ** 2], axis=-1).astype(np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    output = io.BytesIO()
    image.save(output, format, **options)
    return output.getvalue()


def decode(data: bytes) -> Pixels:
    """Decode, and hold every result to the contract."""
    pixels = decode_image(data, name="test.img")
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags["C_CONTIGUOUS"]
    assert pixels.flags["WRITEABLE"]
    return pixels


# ---- formats and modes ----


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_round_trip(format: str, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (19, 31, 3), dtype=np.uint8)
    assert np.array_equal(decode(saved(Image.fromarray(pixels), format, lossless=True)), pixels)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_tiff_compressions(compression: str) -> None:
    pixels = smooth(40, 50)
    decoded = decode(saved(Image.fromarray(pixels), "TIFF", compression=compression))
    assert np.abs(decoded.astype(int) - pixels).max() <= (12 if compression == "jpeg" else 0)


MODES_OF_FORMAT = {
    "PNG": ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("L", "P", "LA", "RGB", "RGBA", "CMYK"),
}


@pytest.mark.parametrize(("format", "mode"), [(f, mode) for f, modes in MODES_OF_FORMAT.items() for mode in modes])
def test_every_mode_looks_the_same(format: str, mode: str) -> None:
    """An opaque picture, whatever it is stored as, agrees with Pillow's own conversion; 16 bits with 8."""
    rgb = Image.fromarray(smooth(24, 36))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
        expected = rgb.convert("L").convert("RGB")
    else:
        image = rgb.convert(mode)
        expected = image.convert("RGB")
    decoded = decode(saved(image, format, quality=95, lossless=True))
    tolerance = 0 if format != "JPEG" else 80 if mode == "1" else 12  # a dithered picture rings
    assert np.abs(decoded.astype(int) - np.asarray(expected)).max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(format: str) -> None:
    values = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    grey = decode(saved(Image.fromarray(values), format))[..., 0]
    assert np.abs(grey - values / 257).max() <= 0.5 + 1e-3


def test_deep_grey_of_other_depths() -> None:
    wide = np.linspace(0, 65535, 64).round().astype(np.int32).reshape(8, 8)
    assert np.abs(decode(saved(Image.fromarray(wide), "TIFF"))[..., 0] - wide / 257).max() <= 0.501
    wider = np.linspace(-5, 2**31 - 1, 64).astype(np.int64).astype(np.int32).reshape(8, 8)
    expected = np.clip(wider, 0, None) / (2**31 - 1) * 255
    assert np.abs(decode(saved(Image.fromarray(wider), "TIFF"))[..., 0] - expected).max() <= 0.501
    assert decode(twelve_bit_tiff([0, 2048, 4095, 819]))[0, :, 0].tolist() == [0, 128, 255, 51]


def twelve_bit_tiff(values: list[int]) -> bytes:
    """One row of 12-bit grey, which Pillow reads but does not write."""
    bits = "".join(f"{value:012b}" for value in values)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = ImageFileDirectory_v2()
    for tag, value in {256: len(values), 257: 1, 258: 12, 259: 1, 262: 1, 277: 1, 278: 1, 279: len(row)}.items():
        tags[tag] = value
    tags[273] = 0  # the strip's place, which Pillow counts from the end of the tags
    output = io.BytesIO()
    tags.save(output)
    output.write(row)
    return output.getvalue()


def test_floating_point_is_refused() -> None:
    data = saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(InputError, match=r"test\.img: floating-point samples, expected integers"):
        decode(data)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(mode: str, format: str) -> None:
    alpha = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1))
    rgba = np.dstack([np.full((16, 32, 3), 100, np.uint8), alpha])
    data = saved(Image.fromarray(rgba).convert(mode), format, lossless=True)
    weight = alpha[..., None] / 255
    assert np.abs(decode(data) - (100 * weight + 255 * (1 - weight))).max() <= 1


def test_transparent_palette_and_key_colours() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    assert decode(saved(palette, "PNG", transparency=1))[0].tolist() == expected
    half = decode(saved(palette, "PNG", transparency=bytes([255, 0, 128])))[0].tolist()
    assert half[:2] == expected[:2]
    assert half[2] == [162, 167, 172]
    grey = Image.fromarray(np.array([[5, 6]], np.uint8))
    assert decode(saved(grey, "PNG", transparency=6))[0, :, 0].tolist() == [5, 255]
    colours = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decode(saved(colours, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_many(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


# ---- orientation and colour ----

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation(format: str, orientation: int) -> None:
    image = Image.fromarray(smooth(16, 40))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    plain = decode(saved(image, format, lossless=True))
    turned = decode(saved(image, format, lossless=True, exif=exif.tobytes()))
    assert np.array_equal(turned, UPRIGHT[orientation](plain))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_unknown_orientations_change_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = value
    pixels = smooth(8, 12)
    assert np.array_equal(decode(saved(Image.fromarray(pixels), "PNG", exif=exif.tobytes())), pixels)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
def test_damaged_exif_does_not_cost_the_picture(rng: np.random.Generator) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    exif[0x010E] = "a description"
    exif[0x8769] = {0x9003: "2004:01:01 00:00:00"}
    good = exif.tobytes()
    image = Image.fromarray(smooth(12, 12))
    for format in ("PNG", "JPEG", "WEBP"):
        for _ in range(40):
            bad = bytearray(good[: rng.integers(4, len(good) + 1)])
            for position in rng.integers(0, len(bad), 3):
                bad[position] = rng.integers(0, 256)
            assert decode(saved(image, format, exif=bytes(bad))).shape == (12, 12, 3)


def icc_profile(kind: str) -> bytes:
    if kind == "grey":  # gamma 1.0, made by hand, because Pillow makes none
        tags = {b"kTRC": b"curv" + bytes(8), b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)}
        header_size, body, table = 128 + 4 + 12 * len(tags), b"", b""
        for tag, content in tags.items():
            table += tag + struct.pack(">2I", header_size + len(body), len(content))
            body += content
        size = header_size + len(body)
        header = struct.pack(
            ">I4xI4s4s4s12x4s28x3i", size, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp", 63190, 65536, 54061
        )
        return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()  # type: ignore[arg-type]


def swapped_srgb() -> bytes:
    """The sRGB profile with its red and blue primaries exchanged: what it shows is known exactly."""
    return icc_profile("sRGB").replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")


def test_a_profile_is_converted_to_srgb() -> None:
    pixels = smooth(20, 30)
    image = Image.fromarray(pixels)
    for format in ("PNG", "TIFF"):
        unchanged = decode(saved(image, format, icc_profile=icc_profile("sRGB"))).astype(int)
        assert np.abs(unchanged - pixels).max() <= 1
        swapped = decode(saved(image, format, icc_profile=swapped_srgb())).astype(int)
        assert np.abs(swapped - pixels[..., ::-1]).max() <= 1


def test_a_profile_leaves_transparency_alone() -> None:
    rgba = Image.fromarray(np.array([[[200, 0, 50, 255], [200, 0, 50, 0]]], np.uint8))
    decoded = decode(saved(rgba, "PNG", icc_profile=swapped_srgb()))[0].astype(int)
    assert np.abs(decoded - [[50, 0, 200], [255, 255, 255]]).max() <= 1


@pytest.mark.parametrize("profile", [b"not a profile", bytes(200), icc_profile("LAB"), swapped_srgb()[:300]])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_broken_or_unfitting_profile_is_ignored(profile: bytes, mode: str) -> None:
    image = Image.fromarray(smooth(8, 8)).convert(mode)
    data = saved(image, "TIFF", icc_profile=profile)
    assert np.array_equal(decode(data), np.asarray(image.convert("RGB")))


def test_grey_profile() -> None:
    """Linear grey 55 is sRGB 128: 0.2157 against ((0.502 + 0.055) / 1.055) ** 2.4 = 0.2159."""
    grey = Image.fromarray(np.array([[0, 55, 255]], np.uint8))
    decoded = decode(saved(grey, "PNG", icc_profile=icc_profile("grey")))
    assert np.abs(decoded[0].astype(int) - [[0] * 3, [128] * 3, [255] * 3]).max() <= 1


# ---- what is refused ----


def samples() -> dict[str, bytes]:
    image = Image.fromarray(smooth(40, 56))
    return {
        "png": saved(image, "PNG"),
        "jpeg": saved(image, "JPEG"),
        "progressive jpeg": saved(image, "JPEG", progressive=True),
        "webp": saved(image, "WEBP"),
        "lossless webp": saved(image, "WEBP", lossless=True),
        "bmp": saved(image, "BMP"),
        "tiff": saved(image, "TIFF"),
        "lzw tiff": saved(image, "TIFF", compression="tiff_lzw"),
    }


@pytest.mark.parametrize("kind", samples())
def test_a_truncated_file_is_never_half_a_picture(kind: str) -> None:
    """Every cut is refused, or took no pixel (an end mark, a checksum): then the picture is whole."""
    data = samples()[kind]
    whole = decode(data)
    cuts = {*range(1, 64), *range(64, len(data), max(1, len(data) // 150)), *range(len(data) - 32, len(data))}
    for cut in sorted(cuts):
        try:
            pixels = decode(data[:cut])
        except InputError as error:
            assert "test.img: " in str(error)  # noqa: PT017 - either outcome is allowed
        else:
            assert np.array_equal(pixels, whole)
            assert cut > len(data) - 32


@pytest.mark.parametrize("kind", samples())
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
def test_damage_is_an_input_error_or_a_picture(kind: str, rng: np.random.Generator) -> None:
    data = samples()[kind]
    for _ in range(100):
        bad = bytearray(data)
        for position in rng.integers(2, min(len(bad), 400), 4):
            bad[position] = rng.integers(0, 256)
        with suppress(InputError):
            decode_image(bytes(bad), name="test.img", limits=ImageLimits(max_pixels=1_000_000))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", r"test\.img: the file is empty \(0 bytes\), expected an image; copy it again"),
        (b"hello", r"test\.img: not a supported image \(it starts with b'hello'\), expected PNG, JPEG"),
        (saved(Image.new("RGB", (2, 2)), "GIF"), "not a supported image .*GIF8"),
        (saved(Image.new("RGB", (2, 2)), "PPM"), "not a supported image"),
        (saved(Image.new("RGB", (2, 2)), "ICO"), "not a supported image"),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(30), "not a supported image"),
        (b"RIFF\x24\0\0\0WEBPVP8 " + bytes(30), r"test\.img: the image is damaged or truncated .* copy it again"),
    ],
)
def test_what_is_no_image(data: bytes, text: str) -> None:
    with pytest.raises(InputError, match=text):
        decode(data)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bmp_header(width: int, height: int) -> bytes:
    return (
        b"BM" + struct.pack("<3I", 1000, 0, 54) + struct.pack("<3I2H6I", 40, width, height, 1, 24, *[0] * 6) + bytes(99)
    )


@pytest.mark.parametrize("header", [png_header, bmp_header])
def test_a_bomb_is_refused_by_its_header(header: Callable[[int, int], bytes]) -> None:
    with pytest.raises(
        InputError, match=r"test\.img: 30000 x 30000 pixels, expected at most 120,000,000 in all; shrink"
    ):
        decode(header(30_000, 30_000))


def test_limits_are_inclusive() -> None:
    pixels = smooth(10, 20)
    data = encode_image(pixels, "png")
    limits = ImageLimits(max_bytes=len(data), max_pixels=200)
    assert np.array_equal(decode_image(data, name="a", limits=limits), pixels)
    with pytest.raises(InputError, match=r"a: 20 x 10 pixels, expected at most 199 .* raise max_pixels"):
        decode_image(data, name="a", limits=ImageLimits(max_pixels=199))
    with pytest.raises(InputError, match=r"a: .* bytes, expected at most .* raise max_bytes"):
        decode_image(data, name="a", limits=ImageLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
def test_pillows_own_limit_does_not_interfere(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.fromarray(smooth(30, 40)), format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    assert decode(data).shape == (30, 40, 3)


# ---- encoding ----


@pytest.mark.parametrize(("format", "tolerance"), [("png", 0), ("jpeg", 8), ("webp", 12)])
def test_encode_and_decode(format: ImageFormat, tolerance: int) -> None:
    pixels = smooth(48, 32)
    data = encode_image(pixels, format)
    assert data == encode_image(pixels.copy(), format)
    assert np.abs(decode(data).astype(int) - pixels).max() <= tolerance
    assert np.array_equal(decode(encode_image(pixels[::-1, ::-1], "png")), pixels[::-1, ::-1])


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_lower_quality_is_smaller(format: ImageFormat, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sizes = [len(encode_image(pixels, format, quality=quality)) for quality in (20, 60, 95)]
    assert sizes == sorted(set(sizes))


def test_encoding_refuses() -> None:
    pixels = smooth(4, 4)
    with pytest.raises(ConfigError, match="image format 'gif', expected one of png, jpeg, webp"):
        encode_image(pixels, "gif")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="image quality 0, expected 1 to 100"):
        encode_image(pixels, "jpeg", quality=0)
    with pytest.raises(InputError, match=r"20000 x 1 pixels do not fit into webp .*; write png"):
        encode_image(np.zeros((1, 20_000, 3), np.uint8), "webp")
    for bad in (pixels[..., 0], pixels.astype(np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=r"pixels are .*, expected uint8 \(H, W, 3\)"):
            encode_image(bad, "png")  # type: ignore[arg-type]


def test_suffixes() -> None:
    for format, suffix in SUFFIX_OF_FORMAT.items():
        assert format_from_name(f"some.dir/x{suffix.upper()}") == format
    assert set(FORMAT_OF_SUFFIX) <= set(IMAGE_SUFFIXES)
    with pytest.raises(ConfigError, match=r"out\.tif: suffix '\.tif' names no format that is written"):
        format_from_name("out.tif")


# ---- arrays ----


def test_every_level_round_trips() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = to_float(levels)
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert np.array_equal(to_uint8(images), levels)
    assert np.array_equal(to_uint8(images.double()), levels)


def test_to_uint8_rounds_and_clips() -> None:
    values = torch.tensor([-9.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 9.0, float("inf"), -float("inf")])
    assert to_uint8(values.expand(3, 1, 8))[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255, 0]
    with pytest.raises(InputError, match="images hold NaN"):
        to_uint8(torch.full((3, 1, 1), torch.nan))
    with pytest.raises(InputError, match=r"images are \(1, 4, 4\), expected \(\.\.\., 3, H, W\)"):
        to_uint8(torch.zeros(1, 4, 4))
    with pytest.raises(InputError, match=r"pixels are float64 .* expected uint8 \(\.\.\., H, W, 3\)"):
        to_float(np.zeros((4, 4, 3)))  # type: ignore[arg-type]


def test_arrays_of_any_layout(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    for view in (pixels, pixels[:, ::-1, ::2], pixels.swapaxes(1, 2)):
        assert np.array_equal(to_uint8(to_float(view)), view)
    flipped = pixels[0, ::-1]
    assert np.array_equal(resize(flipped, 8, 6), flipped)


def test_resizing_keeps_constants_and_brightness(rng: np.random.Generator) -> None:
    flat = np.full((37, 53, 3), 77, np.uint8)
    noise = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    for height, width in ((10, 17), (80, 90), (1, 1), (10, 90)):
        assert (resize(flat, height, width) == 77).all()
        assert resize(noise, height, width).shape == (height, width, 3)
    assert np.abs(resize(noise, 24, 32).mean((0, 1)) - noise.mean((0, 1))).max() < 1


def test_shrinking_does_not_alias() -> None:
    checks = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    shrunk = resize(np.dstack([checks] * 3), 16, 16)
    assert np.abs(shrunk.astype(int) - 127.5).max() < 8


def test_a_ramp_stays_a_ramp() -> None:
    """Resizing is centred: the pixel at x shows the place (x + 1/2) * scale."""
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (8, 1, 3))
    for width in (30, 60, 240):
        expected = 2 * ((np.arange(width) + 0.5) * 120 / width - 0.5)
        assert np.abs(resize(ramp, 8, width)[0, 4:-4, 0] - expected[4:-4]).max() <= 1.01


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 9), (7, 7)])
def test_the_square_is_centred(shape: tuple[int, int]) -> None:
    pixels = smooth(*shape)
    square = crop_to_square(pixels)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    assert square.shape == (side, side, 3)
    assert np.array_equal(square, pixels[top : top + side, left : left + side])
    assert fit_to_side(pixels, 12).shape == (12, 12, 3)


def test_resize_refuses_nothing_to_show() -> None:
    with pytest.raises(InputError, match="size 0 x 4, expected at least 1 x 1"):
        resize(smooth(4, 4), 0, 4)


# ---- contact sheets ----


def test_a_sheet_shows_every_picture() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    shapes = [(10, 10), (100, 50), (50, 300)]
    row = [np.full((*shape, 3), colour, np.uint8) for shape, colour in zip(shapes, colours, strict=True)]
    sheet = contact_sheet([row, row[:2]], ["LQ", "restored", "truth"], ["one.png", "a/very/long/name" * 20], cell=60)
    areas = [int((sheet == colour).all(-1).sum()) for colour in colours]
    assert areas == [2 * 60 * 60, 2 * 60 * 30, 60 * 10]
    assert sheet.shape[1] < 5 * 60 + 60
    for border in (sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]):
        assert (border == 255).all()


def test_titles_are_drawn() -> None:
    row = [smooth(32, 32)]
    plain, titled = contact_sheet([row], [""], cell=32), contact_sheet([row], ["Ä title\nof two lines"], cell=32)
    assert titled.shape[0] > plain.shape[0]
    above = titled[: titled.shape[0] - plain.shape[0]]
    assert (above < 100).any()


def test_sheet_refuses() -> None:
    with pytest.raises(InputError, match=r"rows of \[2\] pictures, expected at least one row, each at most 1 long"):
        contact_sheet([[smooth(4, 4)] * 2], ["one"])
    with pytest.raises(InputError, match=r"rows of \[\] pictures"):
        contact_sheet([], ["one"])
    with pytest.raises(InputError, match="2 row titles for 1 rows"):
        contact_sheet([[smooth(4, 4)]], ["one"], ["a", "b"])
