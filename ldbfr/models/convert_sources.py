"""Reading published checkpoints without running what is in them.

Safetensors hold nothing but tensors. Pickles are read by torch's restricted unpickler alone (`weights_only=True`),
which imports nothing. The bookkeeping that Lightning left beside the weights is replaced by empty stand-ins; anything
else that is no tensor is refused by name.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldbfr.errors import WeightsError
from ldbfr.models.convert_keys import Tensors

BOOKKEEPING = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\..+"
    r"|argparse\.Namespace|collections\.defaultdict|typing\.Any"
    r"|pathlib\.(Pure)?(Posix|Windows)?Path"
    r"|builtins\.(dict|list|tuple|int|float|str|bool)"
    r"|numpy\.dtype|numpy\.(_core|core)\.multiarray\.scalar"
)
"""Names in a Lightning checkpoint that may be replaced by a stand-in, since the weights do not need them."""

_DAMAGED = (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError, KeyError, AttributeError, IndexError)
"""What torch raises for a file that is no checkpoint, or is cut short."""

_EXTRACT = (
    "python -c \"import torch; from safetensors.torch import save_file; state = torch.load('model.ckpt', "
    "map_location='cpu', weights_only=False); state = state.get('state_dict', state); "
    "save_file({key: value.clone() for key, value in state.items()}, 'model.safetensors')\""
)


class Discarded:
    """Stands where an object of Lightning or omegaconf was: takes what it is given and keeps nothing."""

    def __new__(cls, *values: object) -> Self:
        """A new stand-in; the values are those that the object would have been made from."""
        return super().__new__(cls)

    def __init__(self, *values: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_tensors(path: Path) -> Tensors:
    """The tensors of a checkpoint: of a safetensors file, a plain state dict, or the `state_dict` of a Lightning one.

    Raises:
        WeightsError: there is no such file, it is damaged, or it holds what is no tensor.
    """
    if not path.is_file():
        raise WeightsError(f"no checkpoint {path}: give a .ckpt, .pt, .pth, .bin or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is no whole safetensors file ({error}); download it again") from error
    content = _unpickle(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path} holds no state dict but {type(state).__name__}; give a checkpoint of a network")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{path}: {key!r} is {type(value).__name__} and no tensor, so this is no state dict of a network; "
                f"save the one with its weights as safetensors and convert that"
            )
    return dict(state)


def _unpickle(path: Path) -> Any:
    """The content of a pickle, by the restricted unpickler; storages stay in the file until they are used."""
    zipped = zipfile.is_zipfile(path)
    try:
        foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) if zipped else []
        refused = [name for name in foreign if not BOOKKEEPING.fullmatch(name)]
        if not refused:
            with _stand_ins(foreign):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except _DAMAGED as error:
        text = str(error)
        found = re.search(r"GLOBAL ([\w.]+)", text)
        if found is None:
            raise WeightsError(
                f"{path} cannot be read as a checkpoint ({text.splitlines()[0] if text else repr(error)}); "
                "download it again, or compare its SHA-256 with the publisher's"
            ) from error
        refused = [found[1]]
    raise WeightsError(
        f"{path} holds {', '.join(refused)}, which is no tensor; nothing in a checkpoint is ever run here. If you "
        "trust the file, take the weights out on a machine that you can lose, with the libraries that wrote it:\n"
        f"  {_EXTRACT}\nand convert model.safetensors"
    )


@contextmanager
def _stand_ins(names: list[str]) -> Iterator[None]:
    replacements: list[Any] = [(Discarded, name) for name in names]
    with torch.serialization.safe_globals(replacements):
        yield
