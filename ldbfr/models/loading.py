"""Networks from their folders: `config.json` + safetensors, diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from diffusers.models.modeling_utils import ModelMixin

from ldbfr.errors import WeightsError


def load_network(network_class: type[ModelMixin], folder: Path, dtype: torch.dtype = torch.float32) -> ModelMixin:
    """A network from its folder, in the given precision.

    Raises:
        WeightsError: the folder holds another network or another shape.
    """
    try:
        return cast(ModelMixin, network_class.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise WeightsError(f"{folder} cannot be loaded as {network_class.__name__}: {error}") from error
