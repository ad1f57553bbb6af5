"""Networks whose features sets of images are compared by: Inception-v3 for FID and KID, dlib's for faces offline."""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.evaluation.backbones import INCEPTION_FILE, Backbone, load_tensors
from ldbfr.evaluation.framing import Framing
from ldbfr.evaluation.metrics import IdentityModel
from ldbfr.evaluation.portraits import dlib_digest, portray
from ldbfr.evaluation.reading import pixels_digest
from ldbfr.images import Pixels

REMEMBERED = 2_048
"""Feature vectors that a network keeps (8 kB each for 2,048 numbers): an image comes once for its split and once for
all, and an original once for every restorer."""


class FeatureNetwork(Protocol):
    """Makes a vector of an image."""

    @property
    def name(self) -> str:
        """Network and layer; statistics of another name are refused."""

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, in hexadecimal."""

    @property
    def size(self) -> int:
        """Numbers in a vector."""

    @property
    def about(self) -> str:
        """Network, layer, resize and library, for a protocol."""

    def features(self, image: Pixels) -> NDArray[np.float64]:
        """(H, W, 3) uint8 -> (size,). InputError where a number is not finite."""


class InceptionFeatures:
    """The 2,048 numbers of FID's Inception-v3 before its classes, by torch-fidelity ("inception-v3-compat").

    The network brings images to 299 px itself, as TensorFlow 1 did it: bilinear without antialiasing.

    Args:
        path: of the weights; $LDBFR_INCEPTION, a cache or a checked download when left out.
        device: where it runs.

    Raises:
        ConfigError: torch-fidelity is not installed.
        WeightsError: the weights are nowhere, damaged or of another network; the text says which file to supply.
    """

    name = "inception-v3-compat-2048"
    size = 2_048

    def __init__(self, path: str | Path | None = None, device: str = "cpu") -> None:
        try:
            import torch_fidelity
        except ImportError as error:
            raise ConfigError(f"FID and KID need torch-fidelity ({error}): pip install 'ldbfr[metrics]'") from error
        self.backbone, self.device = Backbone.of(INCEPTION_FILE, path), device
        if not self.backbone.is_published:
            load_inception(self.backbone, "cpu")  # a file that will not do is refused before any work
        self.digest = self.backbone.digest
        self.library = f"torch-fidelity {torch_fidelity.__version__}"
        self._remembered: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    @property
    def about(self) -> str:
        """As the protocol says it."""
        return (
            f"2,048 pool features of Inception-v3 ({self.library}, inception-v3-compat, weights {self.digest[:12]}), "
            "8-bit images brought to 299 px by the network's own bilinear resize without antialiasing"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, without the images' vectors."""
        return {**self.__dict__, "_remembered": OrderedDict()}

    def features(self, image: Pixels) -> NDArray[np.float64]:
        """(H, W, 3) uint8 -> (2048,).

        Raises:
            InputError: a number is not finite.
            WeightsError: this machine has no such weights.
        """
        key = pixels_digest(image)
        if key not in self._remembered:
            self._remembered[key] = self._run(image)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key].astype(np.float64)

    def _run(self, image: Pixels) -> NDArray[np.float32]:
        import torch

        network = load_inception(self.backbone, self.device)
        batch = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(self.device)
        with torch.no_grad():
            vector: NDArray[np.float32] = network(batch)[0][0].float().cpu().numpy()
        if not np.isfinite(vector).all():
            raise InputError(
                f"its features hold numbers that are not finite; the weights (SHA-256 {self.digest}) may be damaged"
            )
        return vector


@lru_cache(maxsize=2)
def load_inception(backbone: Backbone, device: str) -> Any:
    """The network of this machine's file, once for a process: FID and KID share it.

    Raises:
        WeightsError: this machine lacks the file, or it is damaged or of another network.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = backbone.find()
    load_tensors(path)  # torch-fidelity would run code that is in the file
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        ).to(device)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"{path} is not {INCEPTION_FILE.about} ({reason} …); {INCEPTION_FILE.how_to_supply()}"
        ) from error


class DlibFeatures:
    """dlib's 128-dimensional face embedding, which needs no download; distances of it are no FID.

    Args:
        framing: of the faces.

    Raises:
        WeightsError: the extra `identity` is not installed.
    """

    size = 128

    def __init__(self, framing: Framing = "tight") -> None:
        IdentityModel.check_installed()
        self.framing: Framing = framing
        self.digest = dlib_digest()

    @property
    def name(self) -> str:
        """With the framing: embeddings of another are others."""
        return f"dlib-resnet-128-{self.framing}"

    @property
    def about(self) -> str:
        """As the protocol says it."""
        cut = "the tight frame of faces in FFHQ's" if self.framing == "ffhq" else "faces in a tight frame"
        return f"128 numbers of dlib's face recognition network (models {self.digest[:12]}), {cut} at 128 px"

    def features(self, image: Pixels) -> NDArray[np.float64]:
        """(S, S, 3) uint8 -> (128,).

        Raises:
            InputError: a number is not finite, or the image is no square.
        """
        return portray(image, self.framing).embedding
