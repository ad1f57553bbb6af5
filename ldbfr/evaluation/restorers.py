"""What can be measured: weights with any sampling, their first stage alone, another method's results, the input itself.

A restorer is named by a text:

| text | restorer |
|---|---|
| `input` | the low-quality images as they are |
| `first-stage` | the first stage alone of the weights that the command was given |
| `faces_128`, `runs/mine/weights` | weights with their own sampling |
| `faces_128@steps=8,scheduler=ddim,start=450` | weights with another sampling; the options are those of `OPTIONS` |
| `CodeFormer=results/codeformer/` | a folder with another method's results: PNG files with the names of the test set |
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ldbfr import storage
from ldbfr.config import Preset, SchedulerName, parse_preset
from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.evaluation.pairing import listed
from ldbfr.evaluation.reading import read_image
from ldbfr.evaluation.results import Entry, Restorer
from ldbfr.images import IMAGE_SUFFIXES, Pixels, resize
from ldbfr.places import absolute
from ldbfr.storage import ObjectInfo
from ldbfr.weights import PRESET_FILE, find_weights, manifest_digest, read_manifest

if TYPE_CHECKING:
    from ldbfr.pipeline import LDBFRPipeline


class InputItself:
    """The low-quality image as it is: what every restorer has to be better than."""

    name = "input"
    is_timed = False

    @property
    def about(self) -> dict[str, Any]:
        """Nothing is done."""
        return {"kind": "the low-quality images themselves"}

    def check(self, entries: Sequence[Entry], side: int) -> None:
        """Every test set will do."""

    def prepare(self) -> None:
        """Nothing is needed."""

    def __call__(self, entries: Sequence[Entry], lq: Sequence[Pixels]) -> Sequence[Pixels]:
        """The images that were given."""
        return list(lq)


# ---- weights ----


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it is not finite")
    return value


def _yes_or_no(text: str) -> bool:
    return {"yes": True, "no": False}[text]


def _scheduler(text: str) -> str:
    if text not in get_args(SchedulerName):
        raise ValueError
    return text


OPTIONS: Mapping[str, tuple[str, Callable[[str], Any], str]] = {
    "steps": ("num_inference_steps", int, "a whole number, 0 for the first stage alone"),
    "start": ("start_step", int, "a step of the noise schedule"),
    "scheduler": ("scheduler", _scheduler, f"one of {', '.join(get_args(SchedulerName))}"),
    "condition": ("condition_scale", _number, "a number of at least 0"),
    "color": ("color_correction", _yes_or_no, "yes or no"),
    "seed": ("seed", int, "a whole number"),
    "resize": ("resize", _yes_or_no, "yes or no"),
}
"""Option of a restorer's text -> (argument of `PipelineRestorer`, how it is read, what is expected)."""


class PipelineRestorer:
    """Weights and how images are drawn from them; the networks are loaded at the first images.

    It can be sent to other processes: each loads the networks for itself.

    Args:
        name: what its rows are called.
        weights: name of weights, or a folder of `ldbfr export`.
        device: where it runs.
        num_inference_steps: denoising steps; 0 is the first stage alone. The weights' own where None, as the rest.
        start_step: where the diffusion starts.
        scheduler: the sampler.
        condition_scale: factor on the injections.
        color_correction: whether low frequencies are the first stage's.
        seed: of the noise, which follows from it and the image alone.
        resize: bring images of another side to the model's, and the results back (bicubic), instead of refusing them.

    Raises:
        WeightsError: the weights are missing or damaged.
        ConfigError: a setting is out of range.
    """

    is_timed = True

    def __init__(
        self,
        name: str,
        weights: str,
        device: str = "cpu",
        *,
        num_inference_steps: int | None = None,
        start_step: int | None = None,
        scheduler: SchedulerName | None = None,
        condition_scale: float | None = None,
        color_correction: bool | None = None,
        seed: int = 0,
        resize: bool = False,
    ) -> None:
        self.name, self.weights, self.device, self.resize = name, weights, device, resize
        self.preset, self.digest = read_weights(weights)
        given = {
            "num_inference_steps": num_inference_steps,
            "start_step": start_step,
            "scheduler": scheduler,
            "condition_scale": condition_scale,
            "color_correction": color_correction,
        }
        own = self.preset.sampling.model_dump()
        self.options: dict[str, Any] = own | {key: value for key, value in given.items() if value is not None}
        self.options["seed"] = seed
        steps, start = self.options["num_inference_steps"], self.options["start_step"]
        limit = self.preset.diffusion.num_train_timesteps
        if not 1 <= start <= limit or not 0 <= steps <= start or self.options["condition_scale"] < 0:
            raise ConfigError(
                f"{name}: steps {steps}, start {start}, condition {self.options['condition_scale']}: expected a start "
                f"of 1 to {limit}, 0 to {start} steps, and a condition of at least 0"
            )

    @property
    def about(self) -> dict[str, Any]:
        """The weights and every setting."""
        resized = {"resize": f"to {self.preset.side} px and back, bicubic"} if self.resize else {}
        weights = {"weights": self.weights, "weights_digest": self.digest, "preset": self.preset.name}
        return {"kind": "weights", **weights, "side": self.preset.side, **self.options, **resized}

    def check(self, entries: Sequence[Entry], side: int) -> None:
        """Refuse images of another side, unless they are to be resized.

        Raises:
            ConfigError: naming both sides.
        """
        if side != self.preset.side and not self.resize:
            raise ConfigError(
                f"{self.name} restores faces of {self.preset.side} px, the test set's have {side} px: make one with "
                f"`ldbfr testset --side {self.preset.side}`, or let every image be resized and the result resized back "
                f"with {self.name}{',' if '@' in self.name else '@'}resize=yes, which the report states"
            )

    def prepare(self) -> None:
        """Load the networks.

        Raises:
            WeightsError: they are not those that were asked for.
        """
        load_pipeline(self.weights, self.digest, self.device)

    def __call__(self, entries: Sequence[Entry], lq: Sequence[Pixels]) -> Sequence[Pixels]:
        """The restored images; with `resize`, at their inputs' sizes.

        Raises:
            InputError: an image has another side, and is not to be resized.
        """
        side = self.preset.side
        for entry, image in zip(entries, lq, strict=True):
            if image.shape[:2] != (side, side) and not self.resize:
                raise InputError(
                    f"{entry.name} is {image.shape[1]} × {image.shape[0]} px, {self.name} restores {side} × {side}: "
                    "give a test set of one side"
                )
        batch = np.stack([resize(image, side, side) if image.shape[:2] != (side, side) else image for image in lq])
        restored = load_pipeline(self.weights, self.digest, self.device)(batch, **self.options).images
        return [
            image if image.shape == own.shape else resize(image, *own.shape[:2])
            for image, own in zip(restored, lq, strict=True)
        ]


def read_weights(weights: str) -> tuple[Preset, str]:
    """The preset and the digest of weights, whose every byte is checked; torch is not needed.

    Raises:
        WeightsError: missing or damaged.
    """
    folder = find_weights(weights)
    digest = manifest_digest(read_manifest(folder))
    try:
        return parse_preset(json.loads((folder / PRESET_FILE).read_text("utf-8")), str(folder / PRESET_FILE)), digest
    except (OSError, ValueError) as error:
        text = f"{folder / PRESET_FILE} cannot be read ({error}): expected a folder that `ldbfr export` wrote"
        raise WeightsError(text) from error


@lru_cache(maxsize=1)
def load_pipeline(weights: str, digest: str, device: str) -> LDBFRPipeline:
    """The networks of weights, loaded once for all restorers that only draw differently.

    Raises:
        WeightsError: they are not (or on this machine, are not) those that were asked for.
    """
    from ldbfr.pipeline import LDBFRPipeline

    pipeline: LDBFRPipeline = LDBFRPipeline.from_pretrained(weights, device=device)
    if pipeline.weights_digest != digest:
        raise WeightsError(f"{weights} are other weights here than where the evaluation was started; copy them here")
    return pipeline


# ---- another method's results ----


class FolderRestorer:
    """Another method's results for the same inputs: a PNG file for every image of the test set, by the same name.

    `FOLDER/mild/000012.png` is the result for `mild/000012`. Strict, so that a method is measured on what it was given:
    a missing file, one too many, and a file of another size are errors. JPEG is refused, because it would be measured
    along with the method.

    Args:
        name: what its rows are called.
        folder: local or s3://bucket/prefix.
    """

    is_timed = False

    def __init__(self, name: str, folder: str) -> None:
        self.name, self.folder = name, folder

    @cached_property
    def files(self) -> dict[str, str]:
        """Place of each image, by name.

        Raises:
            InputError: there are none, some are not PNG, or two have one name.
        """
        found: dict[str, ObjectInfo] = {}
        other, doubled = [], []
        for file in storage.list_objects(self.folder):
            stem, dot, suffix = file.key.rpartition(".")
            if dot and suffix.lower() == "png":
                if stem in found:
                    doubled.append(f"{stem} ({found[stem].key} and {file.key})")
                found[stem] = file
            elif dot and f".{suffix.lower()}" in IMAGE_SUFFIXES:
                other.append(file.key)
        if other:
            raise InputError(
                f"{self.name}: {self.folder} has {len(other):,} images that are not PNG ({listed(other)}): a lossy "
                "format would be measured along with the method; let the method write PNG"
            )
        if doubled:
            raise InputError(
                f"{self.name}: {self.folder} has {len(doubled):,} names twice, so nobody knows which file is the "
                f"result: {listed(doubled)}; remove one of each"
            )
        if not found:
            raise InputError(f"{self.name}: {self.folder} has no PNG files: give the folder of the method's results")
        return {name: file.uri for name, file in found.items()}

    @cached_property
    def about(self) -> dict[str, Any]:
        """Where it is, and what it holds."""
        digest = hashlib.sha256()
        for name, uri in sorted(self.files.items()):
            digest.update(f"{name}\0{hashlib.sha256(storage.read_bytes(uri)).hexdigest()}\n".encode())
        return {"kind": "a folder of results", "folder": self.folder, "digest": digest.hexdigest()}

    def check(self, entries: Sequence[Entry], side: int) -> None:
        """Refuse a folder that does not hold exactly the test set's images.

        Raises:
            InputError: naming what is missing or too much.
        """
        wanted = {entry.name for entry in entries}
        missing, more = sorted(wanted - set(self.files)), sorted(set(self.files) - wanted)
        if missing:
            raise InputError(
                f"{self.name}: {self.folder} has no result for {len(missing):,} of {len(wanted):,} images "
                f"({listed([f'{name}.png' for name in missing])}): run the method on the test set's lq/ folder"
            )
        if more:
            raise InputError(
                f"{self.name}: {self.folder} has {len(more):,} images that are not in the test set ({listed(more)}): "
                "it may be of another one; take them away"
            )

    def prepare(self) -> None:
        """Nothing is needed."""

    def __call__(self, entries: Sequence[Entry], lq: Sequence[Pixels]) -> Sequence[Pixels]:
        """The method's images.

        Raises:
            InputError: one has another size than its input.
        """
        images = []
        for entry, own in zip(entries, lq, strict=True):
            image = read_image(self.files[entry.name], lossless=True)
            if image.shape != own.shape:
                raise InputError(
                    f"{self.name}: {self.files[entry.name]} is {image.shape[1]} × {image.shape[0]} px, its input "
                    f"{own.shape[1]} × {own.shape[0]}; let the method write its input's size, nothing is resized here"
                )
            images.append(image)
        return images


# ---- from texts ----


def parse_restorers(texts: Sequence[str], weights: str, device: str, seed: int) -> list[Restorer]:
    """The restorers that texts name, see the table above.

    Args:
        texts: as on the command line.
        weights: whose first stage `first-stage` is.
        device: where pipelines run.
        seed: of the noise, where a text has none.

    Raises:
        ConfigError: a text is not understood, or two restorers have one name.
    """
    restorers = [parse_restorer(text, weights, device, seed) for text in texts]
    for number, restorer in enumerate(restorers):
        for other in restorers[:number]:
            if restorer.name.casefold() == other.name.casefold():
                raise ConfigError(f"two restorers are called {restorer.name!r}: name each once")
    if not restorers:
        raise ConfigError("no restorer: name at least one, such as input or faces_128")
    return restorers


def parse_restorer(text: str, weights: str, device: str, seed: int) -> Restorer:
    """The restorer that a text names."""
    before, at, options = text.partition("@")
    name, equals, folder = text.partition("=")
    if equals and "@" not in name:
        if not name or not folder:
            raise ConfigError(f"restorer {text!r}: expected NAME=FOLDER, such as CodeFormer=results/codeformer/")
        return FolderRestorer(name, absolute(folder))
    if text == "input":
        return InputItself()
    given = {"seed": seed} | parse_options(text, options if at else None)
    if before == "first-stage":
        if given.get("num_inference_steps", 0):
            raise ConfigError(f"restorer {text!r}: the first stage alone has no steps; name the weights instead")
        before, given["num_inference_steps"] = weights, 0
    return PipelineRestorer(text.rstrip("/"), before, device, **given)


def parse_options(text: str, options: str | None) -> dict[str, Any]:
    """ "steps=8,scheduler=ddim" -> arguments of `PipelineRestorer`.

    Raises:
        ConfigError: naming the option and what is expected.
    """
    given: dict[str, Any] = {}
    for option in options.split(",") if options is not None else ():
        key, _, value = option.partition("=")
        if key not in OPTIONS:
            raise ConfigError(f"restorer {text!r}: no option {key!r}, expected some of {', '.join(OPTIONS)}")
        argument, read, expected = OPTIONS[key]
        try:
            given[argument] = read(value)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"restorer {text!r}: {key}={value}, expected {expected}") from error
    return given
