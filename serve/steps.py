"""The steps of a restoration that need no networks: decode, find and cut out faces, put them back, encode.

They block, so `serve.restoring` runs them in threads. A `Work` is an image between the first step and the last; what
comes out is, byte for byte, what `ldbfr restore` writes for the same file, weights and settings.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ldbfr.archive.settings import RestoreSettings
from ldbfr.errors import ConfigError, InputError
from ldbfr.faces.alignment import enlarged, inverse, shifted, warp
from ldbfr.faces.face import FaceDetector
from ldbfr.images import ImageFormat, ImageLimits, Pixels, encode_image, fit_to_side, format_of_data, resize
from ldbfr.metadata import Metadata, decode_with_metadata, encode_with_metadata
from ldbfr.photos.finding import FoundFaces, find_faces
from ldbfr.photos.options import PhotoOptions
from ldbfr.photos.output import PhotoFile
from ldbfr.photos.paste import Area, Pasting, RestoredFace, area_of, paste, weight_in
from ldbfr.photos.photo import Photo, decode_photo
from ldbfr.photos.restorer import put_back
from ldbfr.photos.settings import PhotoSettings
from serve.protocol import FaceResult, ModelInfo, RestorationOptions, Restored

NAME = "the image"
"""What an upload is called in errors; its own name is the client's business."""
PREVIEW_SIDE, PREVIEW_QUALITY = 1_024, 85
MOST_UNCERTAIN = 0.25
"""Standard deviation over the samples, as a share of the full range, that is white in the uncertainty's picture."""


class Timings:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        """Add what happens inside to a step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(step, time.perf_counter() - started)

    def add(self, step: str, seconds: float) -> None:
        """Add to a step."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds


def photo_settings(options: RestorationOptions) -> PhotoSettings | None:
    """How faces are found and put back: the command line's own settings; None for an aligned face.

    Raises:
        ConfigError: options that do not go together.
    """
    if options.mode == "aligned":
        if options.boxes:
            raise ConfigError("boxes with mode aligned: the image is one face as a whole; leave one of them out")
        if options.strength != 1:
            raise ConfigError(f"strength {options.strength:g} with mode aligned: it is for photos; leave it out")
        return None
    return PhotoOptions(strength=options.strength).settings(options.boxes)


def check_samples(options: RestorationOptions, model: ModelInfo) -> None:
    """Refuse samples of what has only one.

    Raises:
        ConfigError: naming both options.
    """
    steps = model.defaults["steps"] if options.steps is None else options.steps
    if options.samples > 1 and steps == 0:
        raise ConfigError(f"samples {options.samples} with steps 0: the first stage alone has only one; ask for 1")


def restore_settings(options: RestorationOptions, model: ModelInfo) -> RestoreSettings:
    """All that a result depends on but the weights, as `ldbfr restore` resolves it."""
    own = model.defaults
    return RestoreSettings(
        side=model.side,
        steps=own["steps"] if options.steps is None else options.steps,
        start_step=own["start_step"],
        scheduler=own["scheduler"],
        condition_scale=own["condition_scale"] if options.condition_scale is None else options.condition_scale,
        color_correction=own["color_correction"],
        seed=options.seed,
        format=options.format or "same",
        quality=options.quality,
        first_stage=False,
        num_samples=options.samples,
        photos=photo_settings(options),
    )


@dataclass
class Work:
    """An image on its way.

    Args:
        data: its file.
        options: what the client asks for.
        model: that the faces are cut out for.
        timings: by step.
    """

    data: bytes
    options: RestorationOptions
    model: ModelInfo
    timings: Timings = field(default_factory=Timings, kw_only=True)

    @property
    def format(self) -> ImageFormat:
        """Of the answer: the upload's own, or PNG where that is none that is written."""
        return self.options.format or format_of_data(self.data) or "png"

    def provenance(self, model: ModelInfo) -> dict[str, str | int]:
        """What the answer's file says of where it comes from."""
        settings = restore_settings(self.options, model)
        return settings.provenance(model.weights_digest, hashlib.sha256(self.data).hexdigest())

    def restored(self, image: bytes, size: tuple[int, int], model: ModelInfo, **more: Any) -> Restored:
        """The answer."""
        width, height = size
        return Restored(
            image,
            self.format,
            width,
            height,
            self.options.seed,
            model.weights_digest,
            timings=self.timings.seconds,
            **more,
        )


@dataclass
class AlignedWork(Work):
    """One aligned face of any size."""

    metadata: Metadata
    faces: Pixels
    """(1, S, S, 3)."""

    @classmethod
    def begin(cls, data: bytes, options: RestorationOptions, limits: ImageLimits, model: ModelInfo) -> AlignedWork:
        """Decode it, and bring it to the model's side.

        Raises:
            InputError: it is no image, or over the limits.
        """
        timings = Timings()
        with timings.measure("decode"):
            pixels, metadata = decode_with_metadata(data, name=NAME, limits=limits)
            faces = fit_to_side(pixels, model.side)[None]
        return cls(data, options, model, metadata, faces, timings=timings)

    def preview(self, images: Pixels) -> bytes:
        """A JPEG of what became of the face by now."""
        return encode_image(fitting(images[0]), "jpeg", quality=PREVIEW_QUALITY)

    def finish(self, result: FaceResult) -> Restored:
        """Encode."""
        side = len(result.images[0])
        with self.timings.measure("encode"):
            images = result.images[:1] if result.samples is None else result.samples[:, 0]
            samples = [
                encode_with_metadata(
                    image,
                    self.format,
                    quality=self.options.quality,
                    metadata=self.metadata,
                    provenance=self.provenance(result.model),
                )
                for image in images
            ]
            uncertainty = None if result.uncertainty is None else grey_png(result.uncertainty[0])
        return self.restored(
            samples[0],
            (side, side),
            result.model,
            samples=samples if len(samples) > 1 else (),
            uncertainty=uncertainty,
        )


@dataclass
class PhotoWork(Work):
    """A whole photo, and the faces found in it."""

    photo: Photo
    found: FoundFaces
    settings: PhotoSettings

    @property
    def faces(self) -> Pixels | None:
        """(n, S, S, 3); None if there are none to restore."""
        chosen = self.found.chosen()
        return np.stack(chosen) if chosen else None

    @property
    def how(self) -> Pasting:
        """How a preview's faces are put back; grain would cost more than it shows."""
        return Pasting(self.settings.strength, self.found.colors, match_grain=False)

    @cached_property
    def small(self) -> Pixels:
        """The photo as previews show it."""
        return fitting(self.photo.shown)

    def preview(self, images: Pixels) -> bytes:
        """A JPEG of the photo with what became of its faces by now."""
        shown = self.small.copy()
        zoom = len(shown) / len(self.photo.shown)
        faces = []
        for face in self.restored_faces(images):
            landmarks = (face.landmarks + 0.5) * zoom - 0.5
            faces.append(RestoredFace(face.before, face.after, enlarged(face.matrix, source=zoom), landmarks))
        for _ in paste(shown, faces, self.how):
            pass  # composed in place
        return encode_image(shown, "jpeg", quality=PREVIEW_QUALITY)

    def restored_faces(self, images: Pixels) -> list[RestoredFace]:
        """The chosen faces with what the model made of them."""
        chosen = [one for one in self.found.faces if one.alignment is not None]
        return [
            RestoredFace(one.alignment.image, image, one.alignment.matrix, one.face.points)
            for one, image in zip(chosen, images, strict=True)
            if one.alignment is not None
        ]

    def finish(self, result: FaceResult | None) -> Restored:
        """Put the faces back, and encode.

        Args:
            result: of the model; None where there was nothing for it to do.

        Raises:
            InputError: the format cannot hold the photo.
        """
        options, model = self.options, self.model if result is None else result.model
        uncertainty = None
        with self.timings.measure("paste"):
            images: list[Pixels] = [] if result is None else list(result.images)
            maps = None if result is None else result.uncertainty
            means = [] if maps is None else [float(one.mean()) for one in maps]
            if options.samples > 1:
                uncertainty = grey_png(self.uncertainty_map(result))
            done = put_back(self.photo, self.found, images, self.settings, seed=options.seed, uncertainties=means)
        with self.timings.measure("encode"):
            writer = PhotoFile(self.format, options.quality, provenance=self.provenance(model))
            image = writer(done, self.data)
        return self.restored(
            image,
            (done.photo.width, done.photo.height),
            model,
            faces=[face.values() for face in done.faces],
            uncertainty=uncertainty,
            notes="; ".join(filter(None, [done.note(), *done.photo.losses(self.format)])),
        )

    def uncertainty_map(self, result: FaceResult | None) -> np.ndarray:
        """(H, W) float32: each face's, where it is pasted; 0 elsewhere."""
        whole = np.zeros(self.photo.shown.shape[:2], np.float32)
        if result is None or result.uncertainty is None:
            return whole
        for face, own in zip(self.restored_faces(result.images), result.uncertainty, strict=True):
            area = area_of(face, self.photo.shown, 1)
            if area.is_empty:
                continue
            back = shifted(inverse(face.matrix), area.left, area.top)
            there = warp(np.asarray(own, np.float32), back, area.width, area.height)
            part = Area.of(area, whole)
            np.maximum(part, there * weight_in(face, area, 1), out=part)
        return whole


def decode(data: bytes, limits: ImageLimits, timings: Timings) -> Photo:
    """The first step on a photo.

    Raises:
        InputError: it is no image, or over the limits.
    """
    with timings.measure("decode"):
        return decode_photo(data, name=NAME, limits=limits)


def look(
    photo: Photo, detector: FaceDetector, settings: PhotoSettings, model: ModelInfo, timings: Timings
) -> FoundFaces:
    """The second step on a photo.

    Raises:
        InputError: it cannot be looked at.
    """
    with timings.measure("detect"):
        try:
            return find_faces(photo, detector, settings, model.template, model.side)
        except cv2.error as error:
            raise InputError(f"{NAME}: OpenCV cannot look at it ({error}); save it as another format") from error


def fitting(pixels: Pixels) -> Pixels:
    """No larger than a preview may be."""
    height, width = pixels.shape[:2]
    shrink = min(1.0, PREVIEW_SIDE / max(height, width))
    return pixels if shrink == 1 else resize(pixels, max(1, round(height * shrink)), max(1, round(width * shrink)))


def grey_png(uncertainty: np.ndarray) -> bytes:
    """(H, W) in [0, 1] as a grey picture, see MOST_UNCERTAIN."""
    levels = np.rint(np.clip(uncertainty / MOST_UNCERTAIN, 0, 1) * 255).astype(np.uint8)
    output = BytesIO()
    Image.fromarray(levels).save(output, "PNG", compress_level=4)
    return output.getvalue()
