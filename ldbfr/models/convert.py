"""Published networks -> our layout, from which the training stages start.

| kind | what is published | becomes |
|---|---|---|
| `vq-f4` | latent-diffusion's first stage `vq-f4` | `latent_vqgan` |
| `ldm-vq-4` | latent-diffusion's `celebahq-ldm-vq-4` and `ffhq-ldm-vq-4` | `latent_vqgan`, `prior` |
| `taming-faces` | taming-transformers' `faceshq` VQGAN, alone or inside its transformer | `hq_vqgan` |
| `diffusers` | a folder like `CompVis/ldm-celebahq-256` | `latent_vqgan`, `prior` |

OUTPUT/<stage>/
    config.json, diffusion_pytorch_model.safetensors    what `load_network` reads
    manifest.json                                       sizes, SHA-256, and what the network was made from
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError

from ldbfr.config import Preset
from ldbfr.errors import ConfigError, StorageError, WeightsError
from ldbfr.models.convert_compvis import Weights, detect_kind, read_checkpoint
from ldbfr.models.convert_diffusers import read_folder
from ldbfr.models.convert_keys import Network
from ldbfr.models.convert_sources import read_tensors
from ldbfr.weights import MANIFEST, read_manifest, sha256_of, write_manifest

log = logging.getLogger(__name__)

Kind = Literal["vq-f4", "ldm-vq-4", "taming-faces", "diffusers"]


class Converted(NamedTuple):
    """A network in our layout: the stage that can start from it, its folder, its size and which weights it holds."""

    stage: str
    folder: Path
    num_parameters: int
    weights: str


def convert(
    source: Path,
    output: Path,
    preset: Preset,
    kind: Kind | None = None,
    weights: Weights | None = None,
    scaling_factor: float | None = None,
) -> list[Converted]:
    """Write the networks of a published checkpoint as `output`/<stage>, each with its manifest.

    Everything is read and checked before anything is written, and a folder takes its name only when it is whole.
    A network that was made from the same file before is left as it is.

    Args:
        source: a checkpoint, or a folder in diffusers' layout.
        output: folder of the stages' folders.
        preset: whose shapes the networks must have.
        kind: which publication; found out from the source when None.
        weights: the averaged ("ema") or the last ("raw") weights; the averaged when None, where there are any.
        scaling_factor: of the latents; the source's when None, or 1.

    Raises:
        WeightsError: the source cannot be read, or does not fit the preset (the text lists every key that does not),
            or `output` holds other networks.
        ConfigError: an argument says nothing about this source.
        StorageError: `output` cannot be written.
    """
    networks: list[Network]
    if source.is_dir() or kind == "diffusers":
        if kind not in (None, "diffusers"):
            raise ConfigError(f"{source} is a folder, a {kind} comes as a file: give the checkpoint in it")
        if weights is not None:
            raise ConfigError(f"{source}: a diffusers folder holds one set of weights; leave the choice {weights} out")
        kind, networks = "diffusers", read_folder(source, preset, scaling_factor)
    else:
        tensors = read_tensors(source)
        kind = kind or detect_kind(tensors, preset, source)
        networks = read_checkpoint(tensors, source, preset, kind, weights, scaling_factor)
    digests = {file: sha256_of(file) for file in {network.file for network in networks}}
    tasks = [
        (network, output / network.stage, describe(network, kind, digests[network.file], preset))
        for network in networks
    ]
    present = {network.stage for network, folder, about in tasks if is_present(folder, about)}
    for network, folder, about in tasks:
        if network.stage in present:
            log.info("%s is there already, made from the same file", folder)
        else:
            write_network(network, folder, about)
    return [
        Converted(network.stage, folder, network.network.num_parameters(), network.weights)
        for network, folder, _ in tasks
    ]


def describe(network: Network, kind: Kind, digest: str, preset: Preset) -> dict[str, Any]:
    """What the manifest says of a network besides its files."""
    return {
        "kind": "network",
        "stage": network.stage,
        "preset": preset.name,
        "weights": network.weights,
        "scaling_factor": network.network.config.get("scaling_factor"),
        "source": {"kind": kind, "file": network.file.name, "sha256": digest},
    }


def is_present(folder: Path, about: dict[str, Any]) -> bool:
    """Whether a folder holds this very network already.

    Raises:
        WeightsError: it holds another one, or is damaged.
    """
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if all(manifest.get(key) == value for key, value in about.items()):
            return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} holds something else already: choose another output, or remove it first")
    return False


def write_network(network: Network, folder: Path, about: dict[str, Any]) -> None:
    """Write a network beside its place, its manifest last, and move it there when it is whole.

    Raises:
        StorageError: it cannot be written; nothing is left behind.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        network.network.save_pretrained(partial)
        write_manifest(partial, about)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {folder}: {error}; free some space, or choose another output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
