"""LD-BFR: blind face restoration with vector-quantised features and latent diffusion.

Heavy parts load on first use, so that `import ldbfr` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldbfr.models.dc_vqr import DCVQRModel
    from ldbfr.models.dqe import DQEUNet2DModel
    from ldbfr.models.vqgan import VQGAN
    from ldbfr.pipeline import LDBFRPipeline

__version__ = "0.1.0"
__all__ = ["VQGAN", "DCVQRModel", "DQEUNet2DModel", "LDBFRPipeline", "__version__"]

_HOME = {
    "DCVQRModel": "ldbfr.models.dc_vqr",
    "DQEUNet2DModel": "ldbfr.models.dqe",
    "LDBFRPipeline": "ldbfr.pipeline",
    "VQGAN": "ldbfr.models.vqgan",
}


def __getattr__(name: str) -> Any:
    """Import a public class when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'ldbfr' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
