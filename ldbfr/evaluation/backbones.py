"""Networks that others published and metrics stand on: which files, and where they are found.

They are the files of torchvision and torch-fidelity, byte for byte; nothing is downloaded but through
`ldbfr.weights.find_file`, which checks it.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldbfr.errors import WeightsError
from ldbfr.weights import RemoteFile, cache_folder, find_file, sha256_of

Net = Literal["alex", "vgg", "squeeze"]

LPIPS_FILES: dict[Net, RemoteFile] = {
    "alex": RemoteFile(
        name="alexnet-owt-7be5be79.pth",
        size=244_408_911,
        sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        variable="LDBFR_ALEXNET",
        about="torchvision's AlexNet",
    ),
    "vgg": RemoteFile(
        name="vgg16-397923af.pth",
        size=553_433_881,
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        variable="LDBFR_VGG16",
        about="torchvision's VGG-16",
    ),
    "squeeze": RemoteFile(
        name="squeezenet1_1-b8a52dc0.pth",
        size=4_958_839,
        sha256="b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        url="https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
        variable="LDBFR_SQUEEZENET",
        about="torchvision's SqueezeNet 1.1",
    ),
}

INCEPTION_FILE = RemoteFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    size=95_628_359,
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    variable="LDBFR_INCEPTION",
    about="the Inception-v3 of FID's authors, as torch-fidelity converted it",
)


def find_backbone(file: RemoteFile, path: str | Path | None = None) -> Path:
    """The file as `find_file` finds it; before a download, torch's own cache is looked at too.

    Raises:
        WeightsError: as `find_file`.
    """
    there = torch_cache() / file.name
    somewhere = path or os.environ.get(file.variable) or (cache_folder() / file.name).is_file()
    if not somewhere and there.is_file() and there.stat().st_size == file.size and sha256_of(there) == file.sha256:
        return there
    return find_file(file, path)


@dataclass(frozen=True)
class Backbone:
    """The file of a network as an evaluation was started with it; every machine that measures finds its own copy.

    Args:
        file: what was published.
        path: that was given, absolute; None where none was.
        digest: SHA-256 of the file that was found, in hexadecimal; not the published one where somebody gave another.
    """

    file: RemoteFile
    path: Path | None
    digest: str

    @classmethod
    def of(cls, file: RemoteFile, path: str | Path | None = None) -> Backbone:
        """The file on the machine where the evaluation starts.

        Raises:
            WeightsError: it is nowhere, or cannot be read.
        """
        return cls(file, Path(path).absolute() if path else None, digest_of(find_backbone(file, path)))

    @property
    def is_published(self) -> bool:
        """Whether it is the published file, byte for byte, which needs no further look."""
        return self.digest == self.file.sha256

    def find(self) -> Path:
        """The same file on this machine; a given path that is not here is passed over, and nothing else.

        Raises:
            WeightsError: it is not here, or another is; the text names the machine, and what to put where.
        """
        machine = platform.node()
        here = self.path if self.path is not None and self.path.is_file() else None
        if not (here or self.is_published or os.environ.get(self.file.variable)):  # a download would be another file
            raise WeightsError(
                f"{machine} lacks the weights that this evaluation was started with (SHA-256 {self.digest}): copy them "
                f"there to {self.path or 'any place'}, or name their place there in ${self.file.variable}"
            )
        try:
            found = find_backbone(self.file, here)
        except WeightsError as error:
            raise WeightsError(f"{machine}: {error}") from error
        if (digest := digest_of(found)) != self.digest:
            raise WeightsError(
                f"{machine}: {found} (SHA-256 {digest}) is another file than the one that this evaluation was started "
                f"with (SHA-256 {self.digest}); copy that one there"
            )
        return found


def digest_of(path: Path) -> str:
    """SHA-256 of a file of weights, in hexadecimal.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); give access to it, or copy it again") from error


def torch_cache() -> Path:
    """Where torchvision keeps what it downloads."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
    return Path(home) / "hub" / "checkpoints"


def load_tensors(path: Path) -> dict[str, Any]:
    """A file of tensors by name, on the CPU; no code in it is run.

    Raises:
        WeightsError: it is damaged or holds something else.
    """
    import torch

    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a garbled file: IndexError, KeyError, struct.error and whatever else
        # torch's own text advises to run the code in the file
        raise WeightsError(f"{path} is no readable file of weights ({type(error).__name__}); copy it again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds {type(values).__name__}, expected tensors by name; give the published file")
    return values
