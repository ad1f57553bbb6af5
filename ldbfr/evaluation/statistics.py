"""Statistics of a reference set for Fréchet distances: a file with mean, covariance, and whose features they are.

Ours is an .npz with `mu` (d,), `sigma` (d, d), `num_images`, `network` (name), `weights_sha256` and `about`. Those that
pytorch-fid and others publish have `mu` and `sigma` alone: which network they are of has to be said.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.evaluation.features import FeatureNetwork

SUFFIX = ".npz"
SYMMETRY = 1e-6
"""By how much a covariance may differ from its transpose, as a share of its largest element."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of a set's features; `count` is None where the file does not say. `about`: what set."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int | None
    about: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of mean and covariance, in hexadecimal."""
        return hashlib.sha256(self.mean.tobytes() + self.covariance.tobytes()).hexdigest()


def write_statistics(uri: str, statistics: Statistics, network: FeatureNetwork) -> None:
    """Write a statistics file.

    Raises:
        StorageError: it cannot be written.
    """
    output = BytesIO()
    np.savez(
        output,
        mu=statistics.mean,
        sigma=statistics.covariance,
        num_images=np.int64(statistics.count or 0),
        network=np.array(network.name),
        weights_sha256=np.array(network.digest),
        about=np.array(statistics.about),
    )
    storage.write_bytes(uri, output.getvalue())


def read_statistics(uri: str, network: FeatureNetwork, stated: str | None = None) -> Statistics:
    """Read a statistics file for features of this network.

    Args:
        uri: of the file.
        network: whose features it is to be compared with.
        stated: the network's name, as somebody states it for a file that does not say.

    Raises:
        InputError: it is damaged, of another network or other weights, or does not say and nobody states it.
        StorageError: it cannot be read.
    """
    values = _arrays(uri)
    if "mu" not in values or "sigma" not in values:
        raise InputError(f"{uri}: it holds {', '.join(values) or 'nothing'}; expected mu and sigma")
    _check_network(uri, values, network, stated)
    mean, covariance = (np.asarray(values[name], np.float64) for name in ("mu", "sigma"))
    if mean.shape != (network.size,) or covariance.shape != (network.size, network.size):
        raise InputError(
            f"{uri}: mu of shape {mean.shape} and sigma of {covariance.shape}, while {network.name} has {network.size} "
            "features: it is of another network or layer"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{uri}: it holds numbers that are not finite; make it again")
    if np.abs(covariance - covariance.T).max() > SYMMETRY * np.abs(covariance).max():
        raise InputError(f"{uri}: sigma is not symmetric, so it is no covariance; make it again")
    count = int(values["num_images"]) if "num_images" in values else 0
    return Statistics(mean, covariance, count or None, str(values.get("about", uri)))


def _check_network(uri: str, values: dict[str, Any], network: FeatureNetwork, stated: str | None) -> None:
    if "network" not in values:
        if stated is None:
            raise InputError(
                f"{uri} does not say which network's features it is of: state it, if you know it to be {network.name!r}"
            )
        if stated != network.name:
            raise InputError(f"{uri} is stated to be of {stated!r}, and the features here are of {network.name!r}")
        return
    name, digest = str(values["network"]), str(values.get("weights_sha256", ""))
    if (name, digest) != (network.name, network.digest):
        what = f"the network {name!r}" if name != network.name else f"other weights of it (SHA-256 {digest})"
        raise InputError(
            f"{uri} is of {what}, and the features here are of {network.name!r} (SHA-256 {network.digest}): distances "
            "between two networks' features mean nothing. Make the statistics again with this one"
        )


def _arrays(uri: str) -> dict[str, Any]:
    data = storage.read_bytes(uri)
    try:
        with np.load(BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{uri} is no readable .npz file ({error}); copy or make it again") from error
