"""Numbers for one image: against its original (PSNR, SSIM, LPIPS, identity, landmarks, sharpness) or alone.

A metric can be sent to another process, where it loads its network on first use. Nothing is resized but where the
protocol says so, no colours are matched, and images are 8-bit RGB pixels as they are.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.evaluation.backbones import LPIPS_FILES, Backbone, Net, load_tensors
from ldbfr.evaluation.framing import Framing
from ldbfr.evaluation.metrics import IdentityModel, psnr, sharpness
from ldbfr.evaluation.portraits import dlib_digest, dlib_version, identity_distance, landmark_distance, portray
from ldbfr.evaluation.results import Measure
from ldbfr.evaluation.ssim import windowed_ssim
from ldbfr.images import Pixels, to_float
from ldbfr.weights import sha256_of

LPIPS_HEADS = "0.1"
"""Version of the linear heads, inside the package `lpips`."""


class PSNR:
    """Peak signal-to-noise ratio."""

    needs_original = True
    measure = Measure(
        name="psnr",
        label="PSNR",
        unit="dB",
        better="higher",
        protocol="10 log10(255² / MSE) over all red, green and blue samples of 8 bits, then the mean over images; "
        "infinite for equal images",
    )

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        """In dB; infinite for equal images."""
        return psnr(image, given(original))


class SSIM:
    """Structural similarity."""

    needs_original = True
    measure = Measure(
        name="ssim",
        label="SSIM",
        better="higher",
        protocol="Wang et al. 2004: Gaussian window of 11×11 and σ 1.5, K1 0.01, K2 0.03, range 255, population "
        "covariance, mean over red, green and blue and over all places where the window fits; equal to scikit-image's "
        "structural_similarity with these settings",
    )

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        """At most 1."""
        return windowed_ssim(image, given(original))


class LPIPS:
    """Learned perceptual distance (Zhang et al. 2018) by the package lpips.

    Args:
        net: its backbone.
        path: of the backbone's weights, torchvision's file; see `ldbfr.evaluation.backbones` where it is left out.
        device: where it runs.

    Raises:
        ConfigError: the extra `lpips` is not installed.
        WeightsError: the weights are nowhere, damaged or of another network; the text says which file to supply.
    """

    needs_original = True

    def __init__(self, net: Net, path: str | Path | None = None, device: str = "cpu") -> None:
        self.net, self.device = net, device
        heads = lpips_heads(net)
        self.backbone = Backbone.of(LPIPS_FILES[net], path)
        if not self.backbone.is_published:
            load_lpips(net, self.backbone, "cpu")  # a file that will not do is refused before any work
        self.measure = Measure(
            name=f"lpips-{net}",
            label=f"LPIPS ({net})",
            better="lower",
            protocol=f"lpips {version('lpips')}, {net} backbone (weights {self.backbone.digest[:12]}), linear heads "
            f"{LPIPS_HEADS} ({sha256_of(heads)[:12]}), images in [-1, 1] at their own size",
        )

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        """The distance; 0 for equal images.

        Raises:
            WeightsError: this machine has no such weights.
        """
        import torch

        network = load_lpips(self.net, self.backbone, self.device)
        pair = [to_float(pixels)[None].to(self.device) for pixels in (image, given(original))]
        with torch.no_grad():
            return float(network(*pair))


def lpips_heads(net: Net) -> Path:
    """The file of the package with the linear heads.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise ConfigError("LPIPS needs the package lpips: pip install 'ldbfr[lpips]'")
    return Path(spec.origin).parent / "weights" / f"v{LPIPS_HEADS}" / f"{net}.pth"


@lru_cache(maxsize=3)
def load_lpips(net: Net, backbone: Backbone, device: str) -> Any:
    """The network, once for a process: lpips makes it at random, then it gets the weights of this machine's file.

    Raises:
        WeightsError: this machine lacks the file, or it is damaged or of another network.
    """
    import warnings

    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's own deprecations inside lpips
        network = lpips.LPIPS(net=net, version=LPIPS_HEADS, pnet_rand=True, verbose=False)
    path = backbone.find()
    weights = load_tensors(path)
    # A slice's module has its number among torchvision's features: slice2.5.weight is features.5.weight.
    wanted = network.net.state_dict()
    names = {name: "features." + name.split(".", 1)[1] for name in wanted}
    if bad := [
        there for own, there in names.items() if there not in weights or weights[there].shape != wanted[own].shape
    ]:
        raise WeightsError(
            f"{path} lacks {bad[0]}, or has it in another shape: it is not the {net} network; "
            f"{LPIPS_FILES[net].how_to_supply()}"
        )
    network.net.load_state_dict({own: weights[there] for own, there in names.items()})
    return network.requires_grad_(False).to(device)


class _OfPortraits:
    """What the two distances of dlib's portraits share."""

    needs_original = True

    def __init__(self, framing: Framing) -> None:
        IdentityModel.check_installed()
        self.framing: Framing = framing

    def frame_text(self) -> str:
        """For the protocol."""
        cut = "cut to the tight frame (66 % of FFHQ's)" if self.framing == "ffhq" else "tight frame"
        return f"{cut}, 128 px, landmarks fitted to the whole frame; dlib {dlib_version()}, {dlib_digest()[:12]}"


class Identity(_OfPortraits):
    """Distance of dlib's face embeddings.

    Raises:
        WeightsError: the extra `identity` is not installed.
    """

    @property
    def measure(self) -> Measure:
        """What it is."""
        return Measure(
            name="identity",
            label="Identity distance",
            better="lower",
            protocol="Euclidean distance of dlib's 128-dimensional face embeddings of image and original, below 0.6 "
            f"taken for one person; {self.frame_text()}",
        )

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        """The distance; 0 for equal images."""
        return identity_distance(portray(image, self.framing), portray(given(original), self.framing))


class Landmarks(_OfPortraits):
    """Distance of dlib's landmarks.

    Raises:
        WeightsError: the extra `identity` is not installed.
    """

    @property
    def measure(self) -> Measure:
        """What it is."""
        return Measure(
            name="landmarks",
            label="Landmark distance",
            unit="px of 128",
            better="lower",
            protocol=f"mean Euclidean distance of dlib's 68 landmarks of image and original; {self.frame_text()}",
        )

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        """In px of the 128 px faces; 0 for equal images."""
        return landmark_distance(portray(image, self.framing), portray(given(original), self.framing))


class SharpnessRatio:
    """How much detail there is, as a share of the original's."""

    needs_original = True
    measure = Measure(
        name="sharpness",
        label="Sharpness ratio",
        better="nearer to 1",
        protocol="mean absolute Laplacian (4 neighbours) of the BT.601 luma, divided by the original's; noise counts "
        "as detail",
    )

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        """1 for equal images; InputError where the original is one colour."""
        wanted = sharpness(given(original))
        if wanted == 0:
            raise InputError("the original is of one colour, so there is no sharpness to compare with")
        return sharpness(image) / wanted


class Blur:
    """A no-reference score of blur, by scikit-image.

    Raises:
        ConfigError: the extra `metrics` is not installed.
    """

    needs_original = False

    def __init__(self) -> None:
        if importlib.util.find_spec("skimage") is None:
            raise ConfigError("the blur score needs scikit-image: pip install 'ldbfr[metrics]'")
        self.measure = Measure(
            name="blur",
            label="Blur (no reference)",
            better="lower",
            protocol="perceptual blur of Crete et al. 2007, 0 sharp to 1 blurred, without a reference: scikit-image "
            f"{version('scikit-image')} blur_effect, h_size 11, on its rgb2gray",
        )

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        """0 to 1; InputError for an image of one colour."""
        from skimage.measure import blur_effect

        if (image == image[:1, :1]).all():
            raise InputError("it is of one colour, so its blur is not defined")
        return float(blur_effect(image, h_size=11, channel_axis=-1))


def given(original: Pixels | None) -> Pixels:
    """The original, which whoever calls has seen to (`needs_original`)."""
    assert original is not None, "this metric needs an original"
    return original
