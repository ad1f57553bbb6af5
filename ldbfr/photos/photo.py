"""A whole photo: what it shows, and what its file holds, which is kept to the last bit wherever no face is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ldbfr.errors import InputError
from ldbfr.images import (
    BAD_PROFILE,
    DEFAULT_LIMITS,
    ImageFormat,
    ImageLimits,
    Pixels,
    decode_file,
    encode_pillow,
    format_of_data,
    orientation_of,
    to_srgb,
    upright,
)
from ldbfr.metadata import exif_block, exif_of
from ldbfr.photos.paste import LUMA, Patch

Mode = Literal["L", "RGB", "CMYK"]
Samples = NDArray[np.uint8] | NDArray[np.uint16]
Upscaler = Callable[[Pixels, int], Pixels]
"""Enlarges sRGB pixels (H, W, 3) by a whole factor: where a super-resolution model goes."""

MOST_PIXELS = 480_000_000
"""Of an enlarged photo."""
DEEP = 257
"""From 8 to 16 bits."""
_SPACE_OF_MODE: dict[Mode, str] = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
_NAMES = {"P": "a palette", "PA": "a palette"}
_BITS_PER_SAMPLE = 258  # TIFF tag
_TONES = 3.0
"""Grey levels by which the colours of a photo may spread around one tone for it to be of one tone: grey, or sepia."""


@dataclass
class Photo:
    """An upright photo.

    `shown` and `colours` may be the same array.

    Args:
        name: for people.
        shown: what a screen shows of it, (H, W, 3) sRGB, transparent parts over white.
        colours: its own samples, (H, W) or (H, W, 3 or 4), 8 or 16 bits.
        mode: what these are.
        alpha: (H, W), or None.
        profile: ICC, of the mode; empty if there is none that fits.
        exif: see `ldbfr.metadata.Metadata`.
        format: of its file.
        notes: what could not be kept.
    """

    name: str
    shown: Pixels
    colours: Samples
    mode: Mode
    alpha: Pixels | None = None
    profile: bytes = b""
    exif: bytes = b""
    format: ImageFormat | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def height(self) -> int:
        """In px."""
        return len(self.shown)

    @property
    def width(self) -> int:
        """In px."""
        return self.shown.shape[1]

    @property
    def shares_pixels(self) -> bool:
        """Whether what is shown and what it holds are the same array."""
        return self.shown is self.colours

    def apply(self, patches: Iterable[Patch]) -> int:
        """Bring changes of what is shown to its own samples; how many there were."""
        count = 0
        for patch in patches:
            count += 1
            if self.shares_pixels:
                continue
            own, one = patch.area.of(self.colours), DEEP if self.colours.dtype == np.uint16 else 1
            change = self.from_srgb(patch.after).astype(np.int32) - self.from_srgb(patch.before)
            own[...] = np.clip(own + change * one, 0, 255 * one).astype(own.dtype)
        return count

    def from_srgb(self, pixels: Pixels) -> Pixels:
        """sRGB in its own space, 8 bits."""
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if self.profile:
            source, target = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(BytesIO(self.profile))
            converted = ImageCms.profileToProfile(image, source, target, outputMode=self.mode)
            assert converted is not None
            return np.array(converted)
        return np.array(image.convert(self.mode))

    def in_color(self) -> Photo:
        """A grey photo as an RGB one, for faces that get colours."""
        if self.mode != "L":
            return self
        return replace(self, colours=self.in_srgb(), mode="RGB", profile=b"", notes=[*self.notes, "grey became RGB"])

    def in_srgb(self) -> Pixels:
        """Its own samples as sRGB, (H, W, 3): what is shown, but for transparent parts."""
        if self.alpha is None:
            return self.shown
        return np.array(to_srgb(Image.fromarray(self.colours), self.profile))

    def check_scale(self, scale: int) -> None:
        """Refuse what would be too large.

        Raises:
            InputError: naming the sizes.
        """
        size = self.width * self.height * scale**2
        if scale > 1 and size > MOST_PIXELS:
            raise InputError(
                f"{self.name}: enlarged by {scale} it has {size / 1e6:,.0f} megapixels, expected at most "
                f"{MOST_PIXELS / 1e6:,.0f}; choose a smaller --scale"
            )

    def enlarged(self, scale: int, upscaler: Upscaler | None = None) -> Photo:
        """Larger by a whole factor, by Lanczos's filter or by a model, which gives 8-bit samples.

        Raises:
            InputError: too large, or the model gave another size or type.
        """
        if scale == 1:
            return self
        self.check_scale(scale)
        alpha = None if self.alpha is None else lanczos(self.alpha, scale)
        if upscaler is not None:
            shown = upscaled(self.shown, scale, upscaler)
            own = shown if alpha is None else upscaled(self.in_srgb(), scale, upscaler)
            plain = self.mode == "RGB" and not self.profile
            lost = ["16 bits became 8, for the upscaler"] if self.colours.dtype == np.uint16 else []
            colours = own if plain else self.from_srgb(own)
            return replace(self, shown=shown, colours=colours, alpha=alpha, notes=[*self.notes, *lost])
        shown = lanczos(self.shown, scale)
        return replace(
            self, shown=shown, colours=shown if self.shares_pixels else lanczos(self.colours, scale), alpha=alpha
        )

    def is_of_one_tone(self) -> bool:
        """Whether it has no colours of its own: a grey photo, or one in the shades of a single tone."""
        if self.mode == "L":
            return True
        step = max(1, round((self.height * self.width / 250_000) ** 0.5))
        few = self.shown[::step, ::step].reshape(-1, 3).astype(np.float32)
        whole = few[few.max(axis=1) < 254]  # where a channel is clipped, the tone is another
        few = whole if 10 * len(whole) > len(few) else few
        luma = few @ LUMA
        tone = np.stack([few[:, 0] - luma, few[:, 2] - luma], axis=1)
        # A toned print's colour follows from its lightness: by a parabola well enough.
        terms = np.stack([np.ones_like(luma), luma, luma**2], axis=1) / np.array([1, 255, 255**2], np.float32)
        rest = tone - terms @ np.linalg.lstsq(terms, tone, rcond=None)[0]
        return bool(np.quantile(np.abs(rest), 0.98) <= _TONES)

    def encode(
        self,
        format: ImageFormat,
        *,
        quality: int = 95,
        provenance: Mapping[str, str | int] | None = None,
        keep_metadata: bool = True,
    ) -> bytes:
        """The photo as a file; equal photos give equal bytes. What the format cannot hold is told by `losses`.

        Args:
            format: "png", "jpeg" or "webp".
            quality: of the latter two, 1 to 100.
            provenance: see `ldbfr.metadata.encode_with_metadata`.
            keep_metadata: the EXIF data and the colour profile; without them it becomes sRGB.

        Raises:
            InputError: it is too large for the format.
        """
        kept = self if keep_metadata else self.without_metadata()
        image, profile = kept.image(format)
        exif = exif_block(kept.exif, provenance)
        return encode_pillow(image, format, quality=quality, exif=exif, icc_profile=profile)

    def without_metadata(self) -> Photo:
        """Without EXIF and profile, in sRGB where there was one."""
        if not self.profile:
            return replace(self, exif=b"")
        own = self.in_srgb()
        shown = own[..., 0] if self.mode == "L" else own
        mode: Mode = "L" if self.mode == "L" else "RGB"
        return replace(self, colours=np.ascontiguousarray(shown), mode=mode, profile=b"", exif=b"")

    def image(self, format: ImageFormat) -> tuple[Image.Image, bytes]:
        """What a format holds of it, and the profile that belongs to that."""
        colours, profile, mode = self.colours, self.profile, self.mode
        if colours.dtype == np.uint16 and format != "png":
            colours = np.rint(colours / DEEP).astype(np.uint8)
        if (mode == "CMYK" and format != "jpeg") or (mode == "L" and format == "webp" and profile):
            colours, profile, mode = self.in_srgb(), b"", "RGB"
        if self.alpha is not None and format == "jpeg":
            weight = self.alpha.astype(np.float32)[(...,) + (None,) * (colours.ndim - 2)] / 255
            colours = np.rint(colours * weight + 255 * (1 - weight)).astype(np.uint8)
        image = Image.fromarray(colours, mode="CMYK") if mode == "CMYK" else Image.fromarray(colours)
        if self.alpha is not None and format != "jpeg":
            image.putalpha(Image.fromarray(self.alpha))
        return image, profile

    def losses(self, format: ImageFormat) -> list[str]:
        """What a file of this format does not keep."""
        lost = []
        if self.colours.dtype == np.uint16 and format != "png":
            lost.append(f"16 bits became 8, since {format} has no more")
        if self.mode == "CMYK" and format != "jpeg":
            lost.append(f"CMYK became RGB, since {format} has no CMYK")
        if self.alpha is not None and format == "jpeg":
            lost.append("transparent parts are white now, since jpeg has no transparency")
        return lost


def decode_photo(data: bytes, *, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> Photo:
    """Decode a file as `ldbfr.images.decode_image` does, and keep its own samples, alpha, EXIF and profile too.

    Modes that no output has become the nearest one, with a note: palettes RGB, one bit grey, Lab and YCbCr RGB.

    Raises:
        InputError: as `decode_image`.
    """
    shown, image = decode_file(data, name=name, limits=limits)
    exif = exif_of(data, image)
    format = format_of_data(data)
    notes = lost_on_reading(data, image)
    profile = image.info.get("icc_profile")
    colours, mode, alpha, changed = own_samples(image, shown, has_profile=bool(profile))
    is_own = not changed or image.mode in _NAMES  # the samples are what the profile explains
    fits = isinstance(profile, bytes) and is_own and profile_fits(profile, mode)
    if changed:
        notes.append(changed)
    if profile and not fits:
        notes.append("its colour profile is broken, or of another mode, and is left out")
    if profile and not fits and mode == "RGB" and alpha is None:
        colours = shown
    return Photo(name, shown, colours, mode, alpha, profile if fits and profile else b"", exif, format, notes)


def lost_on_reading(data: bytes, image: ImageFile) -> list[str]:
    """What a loaded file has that a `Photo` does not."""
    lost = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        lost.append(f"only the first of {frames} frames or pages is kept")
    if isinstance(image, PngImageFile) and data[24] == 16 and image.mode.startswith("RGB"):
        lost.append("16 bits a colour became 8")
    if "transparency" in image.info and (image.mode == "1" or image.mode.startswith("I")):
        lost.append("the transparent grey level is left out")
    return lost


def own_samples(image: ImageFile, shown: Pixels, has_profile: bool) -> tuple[Samples, Mode, Pixels | None, str]:
    """A loaded file's samples, mode and alpha, upright; and, if they had to become others, what was changed."""
    turn = orientation_of(image)
    if image.mode.startswith("I"):
        deep = np.asarray(upright(image, turn))
        twelve = isinstance(image, TiffImageFile) and image.tag_v2.get(_BITS_PER_SAMPLE) == (12,)
        if twelve or deep.max(initial=0) > 2**16 - 1:
            return np.ascontiguousarray(shown[..., 0]), "L", None, "grey of 12 or 32 bits became 8 bits"
        return np.clip(deep, 0, 2**16 - 1).astype(np.uint16), "L", None, ""
    alpha = None
    if image.has_transparency_data and image.mode != "1":
        alpha = np.array(upright(image.convert("RGBA").getchannel("A"), turn))
    if image.mode in ("1", "L", "LA", "La"):
        grey = image.convert("LA").getchannel("L") if image.mode in ("LA", "La") else image.convert("L")
        changed = "one bit became 8-bit grey" if image.mode == "1" else ""
        return np.array(upright(grey, turn)), "L", alpha, changed
    if image.mode == "CMYK":
        return np.array(upright(image, turn)), "CMYK", None, ""
    changed = "" if image.mode.startswith("RGB") else f"{_NAMES.get(image.mode, image.mode)} became RGB"
    if alpha is None and has_profile and image.mode in ("RGB", *_NAMES):
        return np.array(upright(image.convert("RGB"), turn)), "RGB", None, changed
    if alpha is not None:
        return np.array(upright(image.convert("RGBA").convert("RGB"), turn)), "RGB", alpha, changed
    return shown, "RGB", None, changed


def profile_fits(profile: bytes, mode: Mode) -> bool:
    """Whether sRGB can be converted into a profile's space, and it is that of the mode."""
    try:
        target = ImageCms.ImageCmsProfile(BytesIO(profile))
        if target.profile.xcolor_space.strip() != _SPACE_OF_MODE[mode]:
            return False
        small = Image.new("RGB", (1, 1))
        return ImageCms.profileToProfile(small, ImageCms.createProfile("sRGB"), target, outputMode=mode) is not None
    except BAD_PROFILE:
        return False


def upscaled(pixels: Pixels, scale: int, upscaler: Upscaler) -> Pixels:
    """What a model makes of pixels, as an array of our own.

    Raises:
        InputError: another size or type than was asked for.
    """
    grown = upscaler(pixels, scale)
    expected = (pixels.shape[0] * scale, pixels.shape[1] * scale, 3)
    if grown.shape != expected or grown.dtype != np.uint8:
        raise InputError(f"the upscaler gave {grown.dtype} {grown.shape}, expected uint8 {expected}; see its scale")
    return np.array(grown)


def lanczos(samples: Any, scale: int) -> Any:
    """Enlarge (H, W) or (H, W, C) of 8 or 16 bits by a whole factor."""
    size = (samples.shape[1] * scale, samples.shape[0] * scale)
    if samples.dtype == np.uint16:
        grown = np.asarray(Image.fromarray(samples.astype(np.float32)).resize(size, Image.Resampling.LANCZOS))
        return np.clip(np.rint(grown), 0, 2**16 - 1).astype(np.uint16)
    if samples.ndim == 3 and samples.shape[2] == 4:
        return np.stack([lanczos(samples[..., channel], scale) for channel in range(4)], axis=-1)
    return np.array(Image.fromarray(samples).resize(size, Image.Resampling.LANCZOS))
