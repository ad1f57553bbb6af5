"""I_LQ = {[(I_HQ * k_sigma) down_r + n_delta] JPEG_q} up_r (LD-BFR, equation (7)): draw a recipe, apply it.

A `DegradationProfile` says from which ranges to draw, a `Degradation` is one draw, `apply` carries it out. All numbers
are stated for faces of 512 px; for a side S, sigma and r scale by S/512, so that every size loses the same detail.

Two choices where the paper is silent. The bicubic downsample is OpenCV's `INTER_CUBIC` without antialiasing: as in
GFPGAN and CodeFormer (which use `INTER_LINEAR`), the blur in front of it is the only low-pass filter. Noise is
independent in each colour channel, as theirs is.
"""

import hashlib
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, SupportsIndex, TypeAlias, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import ConfigError, InputError

Image: TypeAlias = NDArray[np.uint8]  # (S, S, 3), RGB
FloatImage: TypeAlias = NDArray[np.float32]  # (S, S, 3), RGB, in grey levels 0-255
NoiseKind: TypeAlias = Literal["gaussian", "poisson"]
Range: TypeAlias = tuple[float, float]

REFERENCE_SIDE = 512
MID_GREY = 127.5
_MIN_SIGMA = 0.1  # px: a narrower kernel has under 1e-20 of its weight off the centre
_MIN_NOISE = 0.01  # grey levels: invisible after rounding, and 1 / level^2 stays a sensible Poisson rate
_KERNEL_SIGMAS = 4.0  # where kernels are cut: 6e-5 of the weight lies outside

# What a number must lie in to be possible at all, by field of Degradation; a profile's ranges are held to it too.
_LIMITS: Mapping[str, Range] = MappingProxyType(
    {
        "sigma_x": (0.0, 128.0),
        "sigma_y": (0.0, 128.0),
        "theta": (0.0, math.pi),
        "scale": (1.0, 512.0),
        "noise_level": (0.0, 255.0),
        "jpeg_quality": (1, 100),
        "noise_seed": (0, 2**53 - 1),  # what a JSON number holds exactly everywhere
    }
)
_INTEGERS = ("jpeg_quality", "noise_seed")


def _check_number(name: str, value: object, limits: Range, *, integer: bool) -> None:
    """Raises ConfigError unless the value is a number (not NaN, not a truth value) within the limits."""
    low, high = limits
    kinds = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an integer" if integer else "a number"
        raise ConfigError(f"{name} is {value!r}. Give {kind} from {low} to {high}.")


@dataclass(frozen=True)
class DegradationProfile:
    """Ranges (min, max) of equation (7)'s parameters, for 512 px faces. Raises ConfigError for an impossible range.

    sigma: blur in px. scale: r. noise: delta in grey levels (0-255). jpeg: quality, both ends included.
    poisson, anisotropic: probabilities of Poisson instead of Gaussian noise, and of a kernel with two sigmas and an
    angle.
    """

    sigma: Range
    scale: Range
    noise: Range
    jpeg: tuple[int, int]
    poisson: float = 0.5
    anisotropic: float = 0.0

    def __post_init__(self) -> None:
        limits = {"sigma": "sigma_x", "scale": "scale", "noise": "noise_level", "jpeg": "jpeg_quality"}
        for name, field in limits.items():
            low, high = getattr(self, name)
            _check_number(f"{name} (minimum)", low, _LIMITS[field], integer=field in _INTEGERS)
            _check_number(f"{name} (maximum)", high, _LIMITS[field], integer=field in _INTEGERS)
            if low > high:
                raise ConfigError(f"{name} is ({low}, {high}): the minimum is above the maximum. Swap them.")
        for name in ("poisson", "anisotropic"):
            _check_number(name, getattr(self, name), (0.0, 1.0), integer=False)


PROFILES: Mapping[str, DegradationProfile] = MappingProxyType(
    {
        # The paper's training ranges and its three test splits; the even chance of Poisson noise is our choice.
        "train": DegradationProfile(sigma=(0.2, 10), scale=(1, 8), noise=(0, 15), jpeg=(60, 100)),
        "mild": DegradationProfile(sigma=(3, 5), scale=(4, 4), noise=(5, 20), jpeg=(60, 80)),
        "medium": DegradationProfile(sigma=(5, 7), scale=(8, 8), noise=(15, 40), jpeg=(40, 60)),
        "severe": DegradationProfile(sigma=(7, 9), scale=(16, 16), noise=(25, 50), jpeg=(30, 40)),
        # Ours: covers all of the above, because the paper's training ranges do not cover its own tests.
        "wide": DegradationProfile(sigma=(0.2, 12), scale=(1, 18), noise=(0, 50), jpeg=(30, 100), anisotropic=0.5),
    }
)


def get_profile(name: str) -> DegradationProfile:
    """The profile of that name. Raises ConfigError, listing the known names."""
    if name not in PROFILES:
        raise ConfigError(f"There is no degradation profile {name!r}. Choose one of: {', '.join(PROFILES)}.")
    return PROFILES[name]


@dataclass(frozen=True)
class Degradation:
    """One draw of equation (7)'s parameters, for a 512 px face. Raises ConfigError for an impossible value.

    sigma_x, sigma_y: standard deviations in px of k_sigma along its own axes. theta: angle in radians, 0 to pi, of the
    axis of sigma_x, from the image's x axis (to the right) towards its y axis (down). scale: r. noise_level: delta in
    grey levels. noise_seed: the noise is a function of this number and of the low-resolution image.
    """

    sigma_x: float
    sigma_y: float
    theta: float
    scale: float
    noise_kind: NoiseKind
    noise_level: float
    jpeg_quality: int
    noise_seed: int

    def __post_init__(self) -> None:
        for name, limits in _LIMITS.items():
            _check_number(name, getattr(self, name), limits, integer=name in _INTEGERS)
        if self.noise_kind not in ("gaussian", "poisson"):
            raise ConfigError(f"noise_kind is {self.noise_kind!r}. Give 'gaussian' or 'poisson'.")

    def to_json(self) -> str:
        """One line of JSON from which `from_json` makes an equal object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Degradation":
        """The inverse of `to_json`. Raises ConfigError, naming the field that is unknown, missing or impossible."""
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"A degradation must be one JSON object: {error}. Given: {text[:80]!r}.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"A degradation must be one JSON object with named fields. Given: {text[:80]!r}.")
        names = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in names]:
            raise ConfigError(f"A degradation has no field {unknown[0]!r}. Its fields are: {', '.join(names)}.")
        if missing := [name for name in names if name not in values]:
            raise ConfigError(f"The degradation lacks the field {missing[0]!r}. Its fields are: {', '.join(names)}.")
        return cls(**values)


def degradation_generator(seed: SupportsIndex, *what: SupportsIndex | str) -> np.random.Generator:
    """A generator that is a function of (seed, what) alone, on every machine: Philox keyed by their SHA-256.

    `what` names what the draw is for, such as ("train", step, index); the integer 1 and the text "1" differ.
    """
    parts = [part if isinstance(part, str) else operator.index(part) for part in (seed, *what)]
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def draw(profile: DegradationProfile, generator: np.random.Generator) -> Degradation:
    """One degradation, uniform in the profile's ranges.

    Always takes nine uniform numbers, in this order: sigma_x, anisotropic or not, sigma_y, theta, scale, noise kind,
    noise level, JPEG quality, noise seed. So what is drawn next from the generator does not depend on the profile.
    """
    u = [float(number) for number in generator.random(9)]
    sigma_x = _between(profile.sigma, u[0])
    anisotropic = u[1] < profile.anisotropic
    low, high = profile.jpeg
    return Degradation(
        sigma_x=sigma_x,
        sigma_y=_between(profile.sigma, u[2]) if anisotropic else sigma_x,
        theta=math.pi * u[3] if anisotropic else 0.0,
        scale=_between(profile.scale, u[4]),
        noise_kind="poisson" if u[5] < profile.poisson else "gaussian",
        noise_level=_between(profile.noise, u[6]),
        jpeg_quality=low + int(u[7] * (high - low + 1)),
        noise_seed=int(u[8] * 2**53),
    )


def apply(degradation: Degradation, hq: Image) -> Image:
    """I_LQ of equation (7): (S, S, 3) uint8 RGB -> (S, S, 3) uint8 RGB; the same draw and image give the same bytes.

    sigma and r are those of the draw times S/512, r at least 1; the low-resolution side is max(1, round(S / r)).
    Raises InputError for an image of another shape or type.
    """
    if hq.ndim != 3 or hq.shape[0] != hq.shape[1] or hq.shape[2] != 3 or hq.shape[0] == 0 or hq.dtype != np.uint8:
        raise InputError(
            f"Cannot degrade an image of shape {hq.shape} and type {hq.dtype}: expected (S, S, 3) and uint8, RGB. "
            "Align the face to a square first."
        )
    side = hq.shape[0]
    ratio = side / REFERENCE_SIDE
    low_side = max(1, round(side / max(1.0, degradation.scale * ratio)))
    blurred = _blur(hq, degradation.sigma_x * ratio, degradation.sigma_y * ratio, degradation.theta)  # (S, S, 3)
    low = _resize(blurred, low_side)  # (S/r, S/r, 3)
    low = _add_noise(low, degradation.noise_kind, degradation.noise_level, degradation.noise_seed)
    return _resize(_jpeg(np.clip(np.rint(low), 0, 255).astype(np.uint8), degradation.jpeg_quality), side)  # (S, S, 3)


def gaussian_kernel(sigma_x: float, sigma_y: float, theta: float) -> FloatImage:
    """k_sigma, a Gaussian with its own axes at the angle theta, as a (2n + 1, 2n + 1) grid of weights that sum to 1."""
    sigma_x, sigma_y = max(sigma_x, _MIN_SIGMA), max(sigma_y, _MIN_SIGMA)
    radius = math.ceil(_KERNEL_SIGMAS * max(sigma_x, sigma_y))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    along = (x * math.cos(theta) + y * math.sin(theta)) / sigma_x
    across = (y * math.cos(theta) - x * math.sin(theta)) / sigma_y
    kernel = np.exp(-0.5 * (along**2 + across**2))
    return cast(FloatImage, (kernel / kernel.sum()).astype(np.float32))


def _blur(image: Image, sigma_x: float, sigma_y: float, theta: float) -> FloatImage:
    """I * k_sigma in float32, the image mirrored at its border; separable where the kernel is isotropic."""
    pixels = image.astype(np.float32)
    if max(sigma_x, sigma_y) < _MIN_SIGMA:
        return pixels
    if sigma_x != sigma_y:
        kernel = gaussian_kernel(sigma_x, sigma_y, theta)
        return cast(FloatImage, cv2.filter2D(pixels, -1, kernel, borderType=cv2.BORDER_REFLECT_101))
    size = 2 * math.ceil(_KERNEL_SIGMAS * sigma_x) + 1
    return cast(FloatImage, cv2.GaussianBlur(pixels, (size, size), sigma_x, borderType=cv2.BORDER_REFLECT_101))


def _resize(image: NDArray[Any], side: int) -> NDArray[Any]:
    """Bicubic, without antialiasing, to (side, side, 3)."""
    return cast(NDArray[Any], cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC))


def _add_noise(image: FloatImage, kind: NoiseKind, level: float, seed: int) -> FloatImage:
    """I + n_delta in grey levels, delta = `level`.

    gaussian: n ~ N(0, delta^2). poisson: I + n = Poisson(k I) / k with k = 127.5 / delta^2 photons per grey level, so
    the standard deviation is delta sqrt(I / 127.5): delta at mid-grey, none in black.
    """
    if level < _MIN_NOISE:
        return image
    generator = np.random.Generator(np.random.Philox(key=seed))
    if kind == "gaussian":
        return image + np.float32(level) * generator.standard_normal(image.shape, dtype=np.float32)
    photons = MID_GREY / level**2
    return cast(FloatImage, (generator.poisson(np.maximum(image, 0) * photons) / photons).astype(np.float32))


def _jpeg(image: Image, quality: int) -> Image:
    """The image after one JPEG round trip, with the encoder's default chroma subsampling (4:2:0)."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None, "OpenCV cannot read the JPEG that it has just written"
    return cast(Image, cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))


def _between(limits: Range, u: float) -> float:
    low, high = limits
    return min(low + (high - low) * u, high)  # rounding may step over the maximum
