"""Metrics of pyiqa as an optional extra.

pyiqa is under the PolyForm Noncommercial licence, and so are numbers that a product would be built on: extra `iqa`.
It downloads weights itself, unchecked by ldbfr; with $LDBFR_OFFLINE only what it has already is used.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.evaluation.results import Measure
from ldbfr.images import Pixels, to_float

PREFIX = "pyiqa:"


class PyIQA:
    """A metric of pyiqa, by its name there ("niqe", "musiq", "dists").

    Args:
        metric: pyiqa's name.
        device: where it runs.

    Raises:
        ConfigError: the extra `iqa` is not installed or cannot be imported, or pyiqa has no such metric.
        WeightsError: its weights cannot be had.
    """

    def __init__(self, metric: str, device: str = "cpu") -> None:
        self.metric, self.device = metric, device
        if importlib.util.find_spec("pyiqa") is None:
            raise ConfigError(
                f"{PREFIX}{metric} needs pyiqa, which is for non-commercial use only: pip install 'ldbfr[iqa]'"
            )
        made = make(metric, device)
        self.needs_original = made.metric_mode == "FR"
        self.measure = Measure(
            name=f"{PREFIX}{metric}",
            label=f"{metric} (pyiqa)",
            better="lower" if made.lower_better else "higher",
            protocol=f"pyiqa {version('pyiqa')}, {metric}, its default settings and weights, images in [0, 1] at their "
            "own size; PolyForm Noncommercial",
        )

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        """pyiqa's number; InputError where it is none."""
        import torch

        network = make(self.metric, self.device)
        pixels = [image, original] if self.needs_original and original is not None else [image]
        with torch.no_grad():
            value = float(network(*(((to_float(each) + 1) / 2)[None].to(self.device) for each in pixels)))
        if value != value:
            raise InputError(f"pyiqa's {self.metric} gives no number for it")
        return value


@lru_cache(maxsize=4)
def make(metric: str, device: str) -> Any:
    """pyiqa's metric, once for a process.

    Raises:
        ConfigError: pyiqa has no such metric, or something that it imports is not there.
        WeightsError: its weights cannot be had.
    """
    try:
        import pyiqa

        if metric not in pyiqa.list_models():
            raise ConfigError(f"pyiqa has no metric {metric!r}; its own: {', '.join(pyiqa.list_models())}")
        with as_offline_as_asked():
            return pyiqa.create_metric(metric, device=device)
    except ImportError as error:
        raise ConfigError(
            f"pyiqa's {metric} cannot be imported ({error}); install what it names, or pip install --upgrade "
            "'ldbfr[iqa]'"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # what its downloads raise
        raise WeightsError(f"pyiqa cannot make {metric}: {error}; see its documentation for the weights") from error


@contextmanager
def as_offline_as_asked() -> Iterator[None]:
    """Refuses pyiqa's downloads where $LDBFR_OFFLINE forbids them: it has no such switch of its own."""
    if os.environ.get("LDBFR_OFFLINE", "0") in ("", "0"):
        yield
        return
    import urllib.request

    from pyiqa.utils import download_util

    def refuse(url: Any, *_: Any, **__: Any) -> None:
        raise OSError(f"$LDBFR_OFFLINE forbids the download of {url}")

    places = ((download_util, "download_url_to_file"), (urllib.request, "urlopen"))
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, refuse)
    try:
        yield
    finally:
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, function)
