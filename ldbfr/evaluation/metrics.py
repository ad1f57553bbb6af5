"""Distances between a restored face and its original.

PSNR and sharpness are closed formulas; SSIM is scikit-image's (extra `metrics`); identity comes from dlib's face
recognition network (extra `identity`), whose weights are inside the package `face_recognition_models` (CC0), so that
nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import laplace

from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.images import Pixels, resize

IDENTITY_SIDE = 128
"""Side in px to which faces are brought before landmarks and identity are measured."""

SSIM_WINDOW = 11
"""Side in px of the window over which SSIM compares."""


def psnr(image: Pixels, original: Pixels) -> float:
    """Peak signal-to-noise ratio of two 8-bit images of one shape, in dB; infinite for equal images."""
    error = np.mean((image.astype(np.float64) - original.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(image: Pixels, original: Pixels) -> float:
    """Structural similarity of two 8-bit images of one shape, (H, W, 3), sides of at least 11 px; 1 for equal images.

    The variant of Wang et al. 2004, "Image quality assessment": 11×11 Gaussian window of σ 1.5, K₁ 0.01, K₂ 0.03, not
    the sample covariance; then the mean over red, green and blue, and over all places where the window fits.

    Raises:
        ConfigError: the extra `metrics` is not installed.
        InputError: the images are too small for the window.
    """
    if min(image.shape[:2]) < SSIM_WINDOW:
        raise InputError(f"images of shape {image.shape}: SSIM needs sides of at least {SSIM_WINDOW} px")
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ConfigError(f"SSIM needs scikit-image ({error}): pip install 'ldbfr[metrics]'") from error
    similarity = structural_similarity(
        image, original, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(similarity)


def sharpness(image: Pixels) -> float:
    """Mean absolute Laplacian of the luma (ITU-R BT.601), in grey levels: (H, W, 3) uint8."""
    luma = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return float(np.abs(laplace(luma, mode="nearest")).mean())


@lru_cache(maxsize=1)
def load_dlib(folder: Path) -> tuple[Any, Any, Any]:
    """dlib, its landmark predictor and its embedding network, 120 MB, read once by a process."""
    import dlib

    predictor = dlib.shape_predictor(str(folder / "shape_predictor_68_face_landmarks.dat"))
    network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
    return dlib, predictor, network


class IdentityModel:
    """dlib's 128-dimensional face embedding (King 2017, "High quality face recognition with deep metric learning").

    Faces are aligned tight crops; they are brought to 128 px, landmarks are fitted with the whole frame as the face's
    box, and the embedding is taken from the aligned chip. A distance below 0.6 is dlib's threshold for "same person".

    Raises:
        WeightsError: the extra `identity` is not installed.
    """

    @staticmethod
    def is_installed() -> bool:
        """Whether dlib and its models are there."""
        return all(importlib.util.find_spec(name) for name in ("dlib", "face_recognition_models"))

    @classmethod
    def check_installed(cls) -> None:
        """Refuse to go on without.

        Raises:
            WeightsError: the extra `identity` is not installed.
        """
        if not cls.is_installed():
            raise WeightsError("identity distances need dlib and its models: pip install 'ldbfr[identity]'")

    def _models(self) -> tuple[Any, Any, Any]:
        self.check_installed()
        spec = importlib.util.find_spec("face_recognition_models")
        assert spec is not None
        assert spec.origin is not None
        return load_dlib(Path(spec.origin).parent / "models")

    def landmarks(self, image: Pixels) -> Any:
        """dlib's 68 landmarks of an aligned face, as its own shape object, on the 128 px image."""
        dlib, predictor, _ = self._models()
        face = resize(image, IDENTITY_SIDE, IDENTITY_SIDE)
        return predictor(face, dlib.rectangle(0, 0, IDENTITY_SIDE - 1, IDENTITY_SIDE - 1))

    def embed(self, image: Pixels, landmarks: Any = None) -> np.ndarray:
        """The embedding of an aligned face: (S, S, 3) uint8 -> (128,) float64."""
        _, _, network = self._models()
        face = resize(image, IDENTITY_SIDE, IDENTITY_SIDE)
        return np.array(network.compute_face_descriptor(face, landmarks or self.landmarks(image)))

    def distance(self, image: Pixels, original: Pixels) -> float:
        """Euclidean distance of two aligned faces' embeddings."""
        return float(np.linalg.norm(self.embed(image) - self.embed(original)))
