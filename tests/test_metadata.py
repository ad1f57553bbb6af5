"""Metadata: what a photo says beside its pixels reaches the result, and what is no longer true of it does not."""

import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ldbfr.errors import ConfigError, InputError
from ldbfr.images import ImageFormat, ImageLimits, Pixels, decode_image, encode_image
from ldbfr.metadata import (
    MAX_EXIF_BYTES,
    MAX_ICC_BYTES,
    Metadata,
    decode_with_metadata,
    encode_with_metadata,
    read_provenance,
)

INPUTS = ("JPEG", "PNG", "WEBP", "TIFF")
OUTPUTS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")
MAKE, MODEL, ORIENTATION, SOFTWARE, DATE, ARTIST = 0x010F, 0x0110, 0x0112, 0x0131, 0x0132, 0x013B
PROCESSING_SOFTWARE, EXIF_IFD, GPS_IFD, INTEROP_IFD, THUMBNAIL_IFD = 0x000B, 0x8769, 0x8825, 0xA005, -1
DATE_ORIGINAL, MAKER_NOTE, EXPOSURE, PIXEL_WIDTH, SUBJECT_AREA = 0x9003, 0x927C, 0x829A, 0xA002, 0x9214
PROVENANCE: dict[str, str | int] = {"model": "paper_512", "seed": 7, "note": 'é "ü" \0 日本'}
THUMBNAIL = b"\xff\xd8 a thumbnail of the degraded face \xff\xd9"


def smooth(height: int, width: int) -> Pixels:
    """A picture without symmetry, of colours that every RGB space holds well."""
    y, x = np.mgrid[0:height, 0:width] / (height + width)
    return np.stack([100 + 70 * x, 150 - 60 * y, 90 + 60 * (x + y) ** 2], axis=-1).astype(np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    output = io.BytesIO()
    image.save(output, format, **options)
    return output.getvalue()


def metadata_of(data: bytes) -> Metadata:
    return decode_with_metadata(data, name="test.img")[1]


def tags_of(data: bytes) -> Image.Exif:
    """The EXIF tags as Pillow reads them."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.getexif()


def parsed(block: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(block)
    return exif


def camera_exif(order: str = "<", orientation: int = 6) -> bytes:
    """What a camera writes, without a thumbnail."""
    exif = Image.Exif()
    exif.endian = order
    exif[MAKE], exif[MODEL], exif[ORIENTATION] = "Maker", "Mark II", orientation
    exif[SOFTWARE], exif[DATE], exif[ARTIST] = "1.0", "2004:01:02 03:04:05", b"Ren\xc3\xa9e"
    exif[EXIF_IFD] = {
        DATE_ORIGINAL: "2003:12:31 23:59:59",
        EXPOSURE: 0.008,
        MAKER_NOTE: b"a secret " * 20,
        PIXEL_WIDTH: 4000,
        SUBJECT_AREA: (2000, 1500, 40, 40),
        INTEROP_IFD: {1: "R98", 0x1001: 4000},
    }
    exif[GPS_IFD] = {1: "N", 2: (48.0, 51.0, 29.5), 3: "E", 4: (2.0, 17.0, 40.2)}
    return exif.tobytes()


def with_thumbnail(block: bytes) -> bytes:
    """The same block with a second directory behind the first, which holds a thumbnail."""
    prefix, tiff = block[:6], bytearray(block[6:])
    order = "<" if tiff[:2] == b"II" else ">"
    (count,) = struct.unpack_from(order + "H", tiff, 8)
    struct.pack_into(order + "I", tiff, 10 + 12 * count, len(tiff))
    tags = ((0x0103, 3, 6), (0x0201, 4, len(tiff) + 2 + 3 * 12 + 4), (0x0202, 4, len(THUMBNAIL)))
    tiff += struct.pack(order + "H", len(tags))
    for tag, kind, value in tags:
        field = struct.pack(order + ("H2x" if kind == 3 else "I"), value)
        tiff += struct.pack(order + "HHI", tag, kind, 1) + field
    return prefix + bytes(tiff) + bytes(4) + THUMBNAIL


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with_late(name: bytes, content: bytes) -> bytes:
    """A PNG file with a chunk behind its pixels."""
    data = saved(Image.fromarray(smooth(6, 9)), "PNG")
    end = data.index(b"IEND") - 4
    return data[:end] + chunk(name, content) + data[end:]


# ---- pixels ----

MODES_OF_FORMAT = {
    "PNG": ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("L", "P", "LA", "RGB", "RGBA", "CMYK"),
}


@pytest.mark.parametrize(("format", "mode"), [(f, mode) for f, modes in MODES_OF_FORMAT.items() for mode in modes])
def test_the_pixels_are_those_of_decode_image(format: str, mode: str) -> None:
    rgb = Image.fromarray(smooth(12, 18))
    grey = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    image = Image.fromarray(grey) if mode == "I;16" else rgb.convert(mode)
    for options in ({}, {"exif": camera_exif()} if format != "BMP" else {}):
        data = saved(image, format, **options)
        pixels, metadata = decode_with_metadata(data, name="test.img")
        assert np.array_equal(pixels, decode_image(data, name="test.img"))
        assert bool(metadata.exif) == bool(options)
        assert metadata.icc_profile == b""


def test_the_errors_are_those_of_decode_image() -> None:
    with pytest.raises(InputError, match=r"a\.png: the file is empty \(0 bytes\)"):
        decode_with_metadata(b"", name="a.png")
    with pytest.raises(InputError, match=r"a\.png: not a supported image"):
        decode_with_metadata(b"hello", name="a.png")
    with pytest.raises(InputError, match=r"a\.png: 9 x 6 pixels, expected at most 53"):
        decode_with_metadata(encode_image(smooth(6, 9), "png"), name="a.png", limits=ImageLimits(max_pixels=53))


@pytest.mark.parametrize("format", OUTPUTS)
def test_nothing_to_say_is_a_plain_file(format: ImageFormat) -> None:
    pixels = smooth(20, 30)
    data = encode_with_metadata(pixels, format, quality=80)
    assert data == encode_image(pixels, format, quality=80)
    assert metadata_of(data) == Metadata()


def test_encoding_refuses_as_encode_image_does() -> None:
    profile = rgb_profile(*ADOBE_RGB)
    with pytest.raises(ConfigError, match="image format 'gif'"):
        encode_with_metadata(smooth(4, 4), "gif")  # type: ignore[arg-type]
    for bad in (smooth(4, 4)[..., 0], smooth(4, 4).astype(np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=r"pixels are .*, expected uint8 \(H, W, 3\)"):
            encode_with_metadata(bad, "png", metadata=Metadata(icc_profile=profile))  # type: ignore[arg-type]


# ---- EXIF ----


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("provenance", [None, PROVENANCE])
def test_a_cameras_fields_survive(
    input: str, order: str, output: ImageFormat, provenance: dict[str, str | int] | None
) -> None:
    data = saved(Image.fromarray(smooth(16, 40)), input, exif=camera_exif(order))
    pixels, metadata = decode_with_metadata(data, name="test.img")
    result = encode_with_metadata(pixels[:8], output, metadata=metadata, provenance=provenance)

    exif = tags_of(result)
    assert (exif[MAKE], exif[MODEL], exif[DATE]) == ("Maker", "Mark II", "2004:01:02 03:04:05")
    details = exif.get_ifd(EXIF_IFD)
    assert details[DATE_ORIGINAL] == "2003:12:31 23:59:59"
    assert float(details[EXPOSURE]) == pytest.approx(0.008)
    interop = set() if input == "TIFF" else {INTEROP_IFD}  # Pillow writes a TIFF file without it
    assert exif.get_ifd(INTEROP_IFD) == ({1: "R98"} if interop else {})
    position = exif.get_ifd(GPS_IFD)
    assert [float(part) for part in position[2]] == [48, 51, 29.5]
    assert (position[1], position[3]) == ("N", "E")
    assert set(details) == {DATE_ORIGINAL, EXPOSURE} | interop, "what is true of the input alone stays there"
    ours = set() if provenance is None else {PROCESSING_SOFTWARE}
    known = {MAKE, MODEL, ORIENTATION, SOFTWARE, DATE, ARTIST, EXIF_IFD, GPS_IFD}
    assert set(exif) == known | ours, "no tag that says where a TIFF file's pixels are"
    assert metadata_of(result) == metadata


def test_bigtiff() -> None:
    data = saved(Image.fromarray(smooth(8, 8)), "TIFF", exif=camera_exif(orientation=1), big_tiff=True)
    exif = parsed(metadata_of(data).exif)
    assert data[2] == 43
    assert exif[MAKE] == "Maker"
    assert exif.get_ifd(EXIF_IFD)[DATE_ORIGINAL] == "2003:12:31 23:59:59"


def test_accented_letters_survive() -> None:
    data = saved(Image.fromarray(smooth(8, 8)), "JPEG", exif=camera_exif())
    assert parsed(metadata_of(data).exif)[ARTIST].encode("latin-1").decode() == "Renée"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("input", ["JPEG", "PNG", "WEBP"])
def test_the_picture_is_upright_and_says_so(input: str, orientation: int) -> None:
    image = Image.fromarray(smooth(16, 40))
    data = saved(image, input, exif=camera_exif(orientation=orientation), lossless=True)
    pixels, metadata = decode_with_metadata(data, name="test.img")
    assert pixels.shape == ((16, 40, 3) if orientation < 5 else (40, 16, 3))
    result = encode_with_metadata(pixels, "png", metadata=metadata)
    assert tags_of(result)[ORIENTATION] == 1
    assert np.array_equal(decode_image(result, name="test.img"), pixels)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("input", ["JPEG", "PNG", "WEBP"])
def test_no_thumbnail_and_no_makers_note_is_left(input: str, order: str) -> None:
    block = with_thumbnail(camera_exif(order))
    assert 0x0201 in parsed(block).get_ifd(THUMBNAIL_IFD), "the test's own block has one"
    data = saved(Image.fromarray(smooth(8, 8)), input, exif=block)
    assert THUMBNAIL in data
    metadata = metadata_of(data)
    result = encode_with_metadata(smooth(8, 8), "jpeg", metadata=metadata)
    assert THUMBNAIL not in result
    assert b"secret" not in result
    assert not tags_of(result).get_ifd(THUMBNAIL_IFD)
    assert tags_of(result)[MAKE] == "Maker"


def test_png_keeps_exif_in_more_places_than_one() -> None:
    block = camera_exif(orientation=1)
    late = png_with_late(b"eXIf", block[6:])
    assert parsed(metadata_of(late).exif)[MAKE] == "Maker"
    digits = block.hex()
    heading = f"\nexif\n{len(block):8}\n"
    text = png_with_late(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress((heading + digits).encode()))
    assert metadata_of(text) == metadata_of(late)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"Exif\0\0",
        b"hello",
        b"Exif\0\0II",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*" + bytes(4),
        bytes(99),
    ],
)
def test_broken_exif_says_nothing(block: bytes) -> None:
    for data in (png_with_late(b"eXIf", block), saved(Image.fromarray(smooth(4, 4)), "JPEG", exif=block)):
        assert metadata_of(data).exif == b""
    assert encode_with_metadata(smooth(4, 4), "png", metadata=Metadata(block)) == encode_image(smooth(4, 4), "png")
    result = encode_with_metadata(smooth(4, 4), "webp", metadata=Metadata(block), provenance=PROVENANCE)
    assert read_provenance(result, name="test.img") == PROVENANCE


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_exif_is_never_an_error(data: st.DataObject) -> None:
    """Whatever a block's bytes, what is made of it is sound (Pillow reads it without a warning), and stays the same."""
    good = with_thumbnail(camera_exif(data.draw(st.sampled_from("<>"))))
    bad = bytearray(good[: data.draw(st.integers(10, len(good)))])
    for place in data.draw(st.lists(st.integers(6, len(bad) - 1), max_size=4)):
        bad[place] = data.draw(st.integers(0, 255))
    result = encode_with_metadata(smooth(4, 4), "png", metadata=Metadata(bytes(bad)))
    once = metadata_of(result)
    assert encode_with_metadata(smooth(4, 4), "png", metadata=once) == result
    exif = tags_of(result)
    for directory in (EXIF_IFD, GPS_IFD):
        exif.get_ifd(directory)


VALUES = st.one_of(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=9).map(tuple),
    st.binary(min_size=1, max_size=40),
)


@settings(deadline=None, max_examples=60)
@given(
    order=st.sampled_from("<>"),
    tags=st.dictionaries(st.integers(0xC000, 0xE000), VALUES, min_size=1, max_size=12),
)
def test_values_of_every_type_survive(order: str, tags: dict[int, object]) -> None:
    """Tags that no standard knows come back with the value and the type that Pillow gave them."""
    before = Image.Exif()
    before.endian = order
    before[EXIF_IFD] = tags
    block = before.tobytes()
    result = encode_with_metadata(smooth(4, 4), "png", metadata=Metadata(block), provenance=PROVENANCE)
    assert tags_of(result).get_ifd(EXIF_IFD) == parsed(block).get_ifd(EXIF_IFD)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_block_that_does_not_fit_is_dropped(output: ImageFormat) -> None:
    """The limit is inclusive, and the provenance goes before the camera's tags."""

    def block(size: int) -> bytes:
        exif = Image.Exif()
        exif[EXIF_IFD] = {0xC001: bytes(size)}
        return exif.tobytes()

    beside = len(block(10)) - 10
    full, over = block(MAX_EXIF_BYTES - 1 - beside), block(MAX_EXIF_BYTES + 1 - beside)
    assert MAX_EXIF_BYTES - 1 <= len(full) <= MAX_EXIF_BYTES < len(over)
    pixels = smooth(4, 4)
    assert tags_of(encode_with_metadata(pixels, output, metadata=Metadata(full))).get_ifd(EXIF_IFD)
    assert encode_with_metadata(pixels, output, metadata=Metadata(over)) == encode_image(pixels, output)
    assert metadata_of(png_with_late(b"eXIf", over[6:])).exif == b""
    result = encode_with_metadata(pixels, output, metadata=Metadata(full), provenance=PROVENANCE)
    assert not tags_of(result).get_ifd(EXIF_IFD)
    assert read_provenance(result, name="test.img") == PROVENANCE


def test_tags_that_share_one_large_value_are_not_copied() -> None:
    """A few kilobytes of such tags would otherwise become gigabytes."""
    count, size = 60_000, 60_000
    tags = b"".join(struct.pack("<HHII", tag, 7, size, 40 + 12 * count) for tag in range(1, count + 1))
    exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, EXIF_IFD, 4, 1, 26, 0)
    exif += struct.pack("<H", count) + tags + bytes(4 + 8 + size)
    assert encode_with_metadata(smooth(4, 4), "png", metadata=Metadata(exif)) == encode_image(smooth(4, 4), "png")


# ---- colour ----

DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)), 2.4
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), 2.19921875


def rgb_profile(primaries: tuple[tuple[float, float, float], ...], gamma: float, space: bytes = b"RGB ") -> bytes:
    """A matrix profile: the primaries' XYZ under D50, and one exponent."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in values))

    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(gamma * 256))
    tags = {name: xyz(values) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    tags |= {b"wtpt": xyz((0.9642, 1.0, 0.8249)), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, body, begin = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">2I", begin + len(body), len(content))
        body += content
    head = struct.pack(">I4xI4s4s4s12x4s28x", begin + len(body), 0x02400000, b"mntr", space, b"XYZ ", b"acsp")
    head += xyz((0.9642, 1.0, 0.8249))[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("profile", [rgb_profile(*DISPLAY_P3), rgb_profile(*ADOBE_RGB)], ids=["p3", "adobe"])
def test_a_profile_survives_and_the_colours_with_it(profile: bytes, output: ImageFormat) -> None:
    """Encoding undoes the conversion to sRGB: the file's numbers come back, and what they show."""
    stored = smooth(24, 36)
    for input in ("PNG", "TIFF"):
        data = saved(Image.fromarray(stored), input, icc_profile=profile)
        pixels, metadata = decode_with_metadata(data, name="test.img")
        assert metadata.icc_profile == profile
        assert np.abs(pixels.astype(int) - stored).max() > 5, "the profile is far from sRGB"
        result = encode_with_metadata(pixels, output, quality=100, metadata=metadata)
        assert metadata_of(result) == metadata
        tolerance = {"png": 2, "jpeg": 6, "webp": 12}[output]
        assert np.abs(decode_image(result, name="test.img").astype(int) - pixels).max() <= tolerance
        with Image.open(io.BytesIO(result)) as image:
            assert np.abs(np.asarray(image).astype(int) - stored).max() <= tolerance


def test_an_srgb_profile_changes_no_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    result = encode_with_metadata(pixels, "png", metadata=Metadata(icc_profile=srgb_profile()))
    assert np.array_equal(decode_image(result, name="test.img"), pixels)
    assert metadata_of(result).icc_profile == srgb_profile()


@pytest.mark.parametrize(
    "profile",
    [
        b"not a profile",
        bytes(200),
        rgb_profile(*ADOBE_RGB)[:200],
        rgb_profile(*ADOBE_RGB, space=b"CMYK"),
        rgb_profile(*ADOBE_RGB, space=b"GRAY"),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes(),
        rgb_profile(*ADOBE_RGB) + bytes(MAX_ICC_BYTES),
    ],
    ids=["text", "zeros", "cut", "cmyk", "grey", "lab", "xyz", "large"],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_other_profiles_are_not_passed_on(profile: bytes, mode: str) -> None:
    data = saved(Image.fromarray(smooth(8, 8)).convert(mode), "TIFF", icc_profile=profile)
    pixels, metadata = decode_with_metadata(data, name="test.img")
    assert np.array_equal(pixels, decode_image(data, name="test.img"))
    assert metadata == Metadata()
    plain = encode_image(pixels, "png")
    assert encode_with_metadata(pixels, "png", metadata=Metadata(icc_profile=profile)) == plain


# ---- provenance ----


@pytest.mark.parametrize("format", OUTPUTS)
@pytest.mark.parametrize("metadata", [Metadata(), Metadata(camera_exif(">"), rgb_profile(*DISPLAY_P3))])
def test_provenance_round_trip(format: ImageFormat, metadata: Metadata) -> None:
    data = encode_with_metadata(smooth(8, 8), format, metadata=metadata, provenance=PROVENANCE)
    assert read_provenance(data, name="test.img") == PROVENANCE
    text = tags_of(data)[PROCESSING_SOFTWARE]
    assert text == json.dumps(PROVENANCE, sort_keys=True, separators=(",", ":"))
    backwards = dict(reversed(PROVENANCE.items()))
    assert data == encode_with_metadata(smooth(8, 8), format, metadata=metadata, provenance=backwards)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40) | st.integers(-(2**60), 2**60), max_size=8))
def test_any_provenance_round_trips(provenance: dict[str, str | int]) -> None:
    data = encode_with_metadata(smooth(4, 4), "jpeg", provenance=provenance)
    assert read_provenance(data, name="test.img") == provenance


def test_provenance_is_of_the_last_restoration() -> None:
    """A result restored again does not say twice, nor when it is written plainly, where it came from."""
    first = encode_with_metadata(smooth(8, 8), "jpeg", metadata=Metadata(camera_exif()), provenance={"run": 1})
    pixels, metadata = decode_with_metadata(first, name="test.img")
    second = encode_with_metadata(pixels, "webp", metadata=metadata, provenance={"run": 2})
    assert read_provenance(second, name="test.img") == {"run": 2}
    assert tags_of(second)[MAKE] == "Maker"
    assert read_provenance(encode_with_metadata(pixels, "png", metadata=metadata), name="test.img") is None


def test_provenance_is_read_without_pixels() -> None:
    data = encode_with_metadata(smooth(64, 64), "png", provenance=PROVENANCE)
    with_broken_pixels = data.replace(data[data.index(b"IDAT") + 6 : data.index(b"IDAT") + 60], bytes(54))
    assert read_provenance(with_broken_pixels, name="test.img") == PROVENANCE
    with pytest.raises(InputError):
        decode_image(with_broken_pixels, name="test.img")
    exif = Image.Exif()
    exif[PROCESSING_SOFTWARE] = '{"a":1}'
    assert read_provenance(png_with_late(b"eXIf", exif.tobytes()[6:]), name="test.img") == {"a": 1}


@pytest.mark.parametrize("text", ["digiKam-8.1", "", "[1]", "7", '{"a":[1]}', '{"a":null}', '{"a":true}', '{"a":1'])
@pytest.mark.parametrize("format", INPUTS)
def test_foreign_files_have_no_provenance(format: str, text: str) -> None:
    image = Image.fromarray(smooth(8, 8))
    exif = Image.Exif()
    exif[PROCESSING_SOFTWARE] = text
    assert read_provenance(saved(image, format, exif=exif.tobytes()), name="test.img") is None
    for plain in (saved(image, format), saved(image, format, exif=camera_exif()), saved(image, "BMP")):
        assert read_provenance(plain, name="test.img") is None


def test_provenance_refuses() -> None:
    with pytest.raises(InputError, match=r"a\.png: not a supported image"):
        read_provenance(b"hello", name="a.png")
    with pytest.raises(ConfigError, match=r"provenance of 70,008 characters, expected one that fits .* 65,533 bytes"):
        encode_with_metadata(smooth(4, 4), "png", provenance={"a": "x" * 70_000})


# ---- as a value ----


def test_metadata_travels_between_processes() -> None:
    metadata = Metadata(camera_exif(), srgb_profile())
    assert pickle.loads(pickle.dumps(metadata)) == metadata


@pytest.mark.parametrize("format", OUTPUTS)
def test_equal_arguments_give_equal_bytes(format: ImageFormat) -> None:
    data = saved(Image.fromarray(smooth(16, 12)), "JPEG", exif=camera_exif(), icc_profile=rgb_profile(*ADOBE_RGB))
    results = set()
    for _ in range(2):
        pixels, metadata = decode_with_metadata(data, name="test.img")
        results.add(encode_with_metadata(pixels, format, metadata=metadata, provenance=PROVENANCE))
    assert len(results) == 1
