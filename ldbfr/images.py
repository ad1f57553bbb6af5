"""Pictures: bytes <-> RGB uint8 (H, W, 3) <-> float in [-1, 1] (3, H, W).

Everything that a file can do to a picture is settled here: orientation, colour profile, transparency, bit depth, size.
"""

from __future__ import annotations

import re
import struct
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ldbfr.errors import ConfigError, InputError

if TYPE_CHECKING:  # whoever reads and writes pictures alone does without torch, whose import takes seconds
    import torch

Pixels = NDArray[np.uint8]
ImageFormat = Literal["png", "jpeg", "webp"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes (lower case) of the files that `decode_image` reads."""

SUFFIX_OF_FORMAT: dict[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
FORMAT_OF_SUFFIX: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

# Pillow's plugins are called by name rather than through Image.open: that would try every plugin installed, and
# would measure the picture against a process-wide limit (with a warning) before ours could be looked at.
_PLUGIN_OF_SIGNATURE: dict[bytes, type[ImageFile]] = {
    rb"\x89PNG\r\n\x1a\n": PngImageFile,
    rb"\xff\xd8\xff": JpegImageFile,
    rb"RIFF.{4}WEBP": WebPImageFile,
    rb"BM": BmpImageFile,
    rb"II[*+]\0|MM\0[*+]": TiffImageFile,
}

_FORMAT_OF_PLUGIN: dict[type[ImageFile], ImageFormat] = {
    PngImageFile: "png",
    JpegImageFile: "jpeg",
    WebPImageFile: "webp",
}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258  # TIFF tag
_BAD_EXIF = (OSError, SyntaxError, ValueError, KeyError, IndexError, TypeError, EOFError, struct.error)
BAD_PROFILE = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
"""What Pillow raises for an ICC profile that is broken, or that does not fit."""


@dataclass(frozen=True)
class ImageLimits:
    """The largest picture that is accepted; both limits are checked before any pixel is decoded.

    Pillow itself refuses TIFF and WebP files of more than 178 million pixels, whatever `max_pixels` says.
    """

    max_bytes: int = 200 * 2**20
    max_pixels: int = 120_000_000


DEFAULT_LIMITS = ImageLimits()


def decode_image(data: bytes, *, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> Pixels:
    """Decode a PNG, JPEG, WebP, BMP or TIFF file into upright sRGB pixels, (H, W, 3) uint8, contiguous.

    The EXIF orientation is applied, an embedded ICC profile is converted to sRGB, deeper samples are scaled to 8 bits,
    transparency is laid over white (what a browser or a print shows), and of an animation the first frame is taken.
    A file that lost its end is refused, unless all that it lost is an end mark behind the last pixel.

    `name` stands for the file in the text of an InputError, which is raised for a file that is empty, over the
    limits, of another format, damaged or truncated.
    """
    return decode_file(data, name=name, limits=limits)[0]


def decode_file(data: bytes, *, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[Pixels, ImageFile]:
    """What `decode_image` does, and the loaded file itself, for what it says beside the pixels."""
    if not data:
        raise InputError(f"{name}: the file is empty (0 bytes), expected an image; copy it again from its source")
    if len(data) > limits.max_bytes:
        raise InputError(
            f"{name}: {len(data):,} bytes, expected at most {limits.max_bytes:,}; shrink it or raise max_bytes"
        )
    image = open_header(data, name)
    width, height = image.size
    if width * height > limits.max_pixels:
        raise InputError(
            f"{name}: {width} x {height} pixels, expected at most {limits.max_pixels:,} in all; "
            "shrink it or raise max_pixels"
        )
    try:
        with _without_bomb_warning(width * height):
            image.load()
        return np.array(upright(_to_rgb(image, name), orientation_of(image))), image
    except (MemoryError, InputError):
        raise
    except Exception as error:  # for a damaged file Pillow's decoders raise nearly any type
        raise _damaged(name, error) from error


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn a picture as its EXIF orientation, 1 to 8, says."""
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def format_of_data(data: bytes) -> ImageFormat | None:
    """The format of a file, if it is one that is written too."""
    plugin = next((plugin for start, plugin in _PLUGIN_OF_SIGNATURE.items() if re.match(start, data, re.DOTALL)), None)
    return _FORMAT_OF_PLUGIN.get(plugin) if plugin is not None else None


def open_header(data: bytes, name: str) -> ImageFile:
    """Read the file's header only; InputError for another format or a damaged header."""
    for signature, plugin in _PLUGIN_OF_SIGNATURE.items():
        if re.match(signature, data, re.DOTALL):
            try:
                return plugin(BytesIO(data))
            except MemoryError:
                raise
            except Exception as error:  # as above
                raise _damaged(name, error) from error
    raise InputError(
        f"{name}: not a supported image (it starts with {data[:12]!r}), expected PNG, JPEG, WebP, BMP or TIFF; "
        "convert it to one of these"
    )


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(
        f"{name}: the image is damaged or truncated ({error}), expected a complete file; copy it again from its source"
    )


def _without_bomb_warning(num_pixels: int) -> AbstractContextManager[Any]:
    """Silence Pillow's own size warning where it would come: our limit has been checked.

    Only for such large pictures, because the warning filters belong to the whole process, not to this thread.
    """
    if num_pixels <= (Image.MAX_IMAGE_PIXELS or num_pixels):
        return nullcontext()
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


def orientation_of(image: ImageFile) -> int:
    """EXIF orientation, 1 to 8, of a loaded image; damaged EXIF data says nothing, and the pixels are still good."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except _BAD_EXIF:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: ImageFile, name: str) -> Image.Image:
    """Any mode -> RGB: deep grey to 8 bits, alpha aside, colours to sRGB, then over white."""
    if image.mode.startswith("I"):
        return to_srgb(_deep_grey_to_8_bits(image), image.info.get("icc_profile"))
    if image.mode == "F":
        raise InputError(f"{name}: floating-point samples, expected integers of 8 or 16 bits; export it as such")
    colours: Image.Image = image
    alpha = None
    if image.mode in ("LA", "La"):
        colours, alpha = image.convert("LA").split()
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        colours, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    elif image.mode not in ("L", "RGB", "CMYK"):
        colours = image.convert("RGB")
    rgb = to_srgb(colours, image.info.get("icc_profile"))
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def _deep_grey_to_8_bits(image: ImageFile) -> Image.Image:
    """Scale 12-, 16- or 32-bit grey so that full scale becomes 255."""
    values = np.asarray(image)
    full_scale = 2**16 - 1
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_BITS_PER_SAMPLE) == (12,):
        full_scale = 2**12 - 1
    elif values.max() > full_scale:  # Pillow's 32-bit mode mostly carries 16-bit samples
        full_scale = 2**31 - 1
    scaled = np.clip(values, 0, full_scale) * np.float32(255 / full_scale)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def to_srgb(colours: Image.Image, profile: bytes | None) -> Image.Image:
    """L, RGB or CMYK -> sRGB through the embedded profile; a broken or unfitting profile is ignored."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None  # None is for in-place conversion
            return converted
        except BAD_PROFILE:
            pass
    return colours.convert("RGB")


def encode_image(
    pixels: Pixels, format: ImageFormat, *, quality: int = 95, exif: bytes = b"", icc_profile: bytes = b""
) -> bytes:
    """Encode (H, W, 3) uint8 RGB; equal arguments give equal bytes.

    See `encode_pillow`, which raises the errors; InputError also for pixels of another kind.
    """
    return encode_pillow(Image.fromarray(_checked(pixels)), format, quality=quality, exif=exif, icc_profile=icc_profile)


def encode_pillow(
    image: Image.Image, format: ImageFormat, *, quality: int = 95, exif: bytes = b"", icc_profile: bytes = b""
) -> bytes:
    """Encode a picture of any mode that the format has; equal arguments give equal bytes.

    `quality`, 1 to 100, is that of jpeg and webp; png is lossless. The EXIF block and the ICC profile are embedded as
    they are; `ldbfr.metadata` makes ones that fit. ConfigError for another format or quality, InputError for a picture
    that the format cannot hold.
    """
    if format not in SUFFIX_OF_FORMAT:
        raise ConfigError(f"image format {format!r}, expected one of {', '.join(SUFFIX_OF_FORMAT)}")
    if not 1 <= quality <= 100:
        raise ConfigError(f"image quality {quality}, expected 1 to 100; 95 keeps a face's detail")
    output = BytesIO()
    beside: dict[str, Any] = {"exif": exif, "icc_profile": icc_profile}
    try:
        if format == "png":
            image.save(output, "PNG", compress_level=4, **beside)  # 4 % larger than level 6, in 40 % of the time
        elif format == "jpeg":
            image.save(output, "JPEG", quality=quality, subsampling="4:4:4", **beside)  # lips and eyes keep their edges
        else:
            image.save(output, "WEBP", quality=quality, **beside)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{image.width} x {image.height} pixels do not fit into {format} ({error}); write png, or shrink the image"
        ) from error
    return output.getvalue()


def format_from_name(name: str) -> ImageFormat:
    """The format that a file name's suffix asks for; ConfigError if it is not one that is written."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in FORMAT_OF_SUFFIX:
        raise ConfigError(
            f"{name}: suffix {suffix!r} names no format that is written, expected one of {', '.join(FORMAT_OF_SUFFIX)}"
        )
    return FORMAT_OF_SUFFIX[suffix]


def to_float(pixels: Pixels) -> torch.Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-1, 1], contiguous and on the CPU."""
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-1] != 3:
        raise InputError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 (..., H, W, 3); convert them first")

    import torch

    return torch.from_numpy(pixels.astype(np.float32, order="C")).movedim(-1, -3).contiguous() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> Pixels:
    """(..., 3, H, W) float in [-1, 1] -> (..., H, W, 3) uint8, rounded; values outside are clipped.

    The inverse of `to_float`, exactly. InputError for another shape and for NaN.
    """
    if images.ndim < 3 or images.shape[-3] != 3:
        raise InputError(f"images are {tuple(images.shape)}, expected (..., 3, H, W); move the channels first")

    import torch

    values = images.detach().float()
    if values.isnan().any():
        raise InputError(
            "images hold NaN, expected numbers in [-1, 1]; run the model in float32 to see where it starts"
        )
    levels = ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.movedim(-3, -1).cpu().numpy())


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize (H, W, 3) uint8 to (height, width, 3), bicubic.

    Pillow's filter grows with the reduction, axis by axis, so every input pixel counts and nothing aliases.
    """
    if height < 1 or width < 1:
        raise InputError(f"size {height} x {width}, expected at least 1 x 1 pixel")
    image = Image.fromarray(_checked(pixels))
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def crop_to_square(pixels: Pixels) -> Pixels:
    """The largest centred square of (H, W, 3)."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def fit_to_side(pixels: Pixels, side: int) -> Pixels:
    """The largest centred square of (H, W, 3), resized to (side, side, 3)."""
    return resize(crop_to_square(pixels), side, side)


def _checked(pixels: Pixels) -> Pixels:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise InputError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 (H, W, 3); convert them first")
    return np.ascontiguousarray(pixels)
