"""What numbers were measured on: the machine, and the versions that matter."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

from ldbfr import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "numpy",
    "scipy",
    "pillow",
    "opencv-python-headless",
    "scikit-image",
    "lpips",
    "dlib-bin",
    "dlib",
    "face_recognition_models",
)
"""Whose versions may change a number."""


def machine() -> dict[str, object]:
    """Processor, cores, GPU, system, and the versions that matter for speed."""
    import torch

    about: dict[str, object] = {
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


@cache
def kind_of_machine() -> str:
    """The same in a line, without what two machines of a kind differ in: what a number may depend on."""
    about = machine()
    processor = f"{about['gpu']}, " if "gpu" in about else ""
    return f"{processor}{about['cpu']}, {about['cores']} cores, torch {about['torch']}, ldbfr {__version__}"


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """ldbfr, Python, and the packages that are installed."""
    found = {"ldbfr": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
