"""The three steps of a restoration, as functions of rows: read a face, run the model, write the result.

A picture that cannot be read, restored or written becomes a failed row that says why; the others go on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ldbfr import storage
from ldbfr.archive.naming import FIRST_STAGE_FOLDER, format_of_output
from ldbfr.archive.rows import FaceRow
from ldbfr.archive.settings import RestoreSettings
from ldbfr.errors import LDBFRError
from ldbfr.images import DEFAULT_LIMITS, ImageLimits, Pixels, crop_to_square, decode_image, encode_image, resize

if TYPE_CHECKING:  # readers and writers do without the networks, whose import takes seconds
    from ldbfr.pipeline import LDBFRPipeline

THUMBNAIL_SIDE = 192


@dataclass(frozen=True)
class Reader:
    """Reads an input: bytes -> upright RGB -> central square -> (S, S, 3).

    Args:
        side: S, in px.
        picks: indexes of the rows that carry pictures for the contact sheet.
        limits: the largest file and picture accepted.
    """

    side: int
    picks: frozenset[int] = frozenset()
    limits: ImageLimits = DEFAULT_LIMITS

    def __call__(self, row: FaceRow) -> FaceRow:
        """planned -> read, or failed."""
        if row.status != "planned":
            return row
        started = time.perf_counter()
        try:
            data = storage.read_bytes(row.input, max_bytes=self.limits.max_bytes)
            row = replace(row, size=len(data), digest=hashlib.sha256(data).hexdigest())
            pixels = decode_image(data, name=row.key, limits=self.limits)
            row = replace(row, height=pixels.shape[0], width=pixels.shape[1])
            square = crop_to_square(pixels)
            face = resize(square, self.side, self.side)
        except LDBFRError as error:
            return row.failed(str(error), seconds_read=time.perf_counter() - started)
        except MemoryError:
            reason = f"{row.key}: the memory does not suffice to decode it; shrink it, or give the machine more"
            return row.failed(reason, seconds_read=time.perf_counter() - started)
        return replace(
            row,
            status="read",
            note=describe_fit(pixels, self.side),
            pixels=face.tobytes(),
            sheet_input=thumbnail(square) if row.index in self.picks else None,
            seconds_read=time.perf_counter() - started,
        )


def describe_fit(pixels: Pixels, side: int) -> str | None:
    """What was done to a picture (H, W, 3) to make it S×S; None if nothing."""
    height, width = pixels.shape[:2]
    square = min(height, width)
    done = [f"cropped to its central {square} px square"] if height != width else []
    done += [f"resized from {square} to {side} px"] if square != side else []
    return ", ".join(done) or None


def thumbnail(pixels: Pixels) -> bytes:
    """A PNG of a square picture, at most THUMBNAIL_SIDE wide."""
    side = min(len(pixels), THUMBNAIL_SIDE)
    return encode_image(resize(pixels, side, side), "png")


def restore_faces(pipeline: LDBFRPipeline, rows: Sequence[FaceRow], settings: RestoreSettings) -> list[FaceRow]:
    """read -> modelled, or failed; rows that have failed before pass through.

    A batch that the model refuses is tried again image by image, so that only the culprit fails.
    """
    good = [row for row in rows if row.status == "read"]
    done = {row.index: row for row in restore_batch(pipeline, good, settings)} if good else {}
    return [done.get(row.index, row) for row in rows]


def restore_batch(pipeline: LDBFRPipeline, rows: Sequence[FaceRow], settings: RestoreSettings) -> list[FaceRow]:
    """Restore rows in one call of the pipeline, or one by one if that raises."""
    side = settings.side
    faces = np.stack([np.frombuffer(row.pixels or b"", np.uint8).reshape(side, side, 3) for row in rows])
    started = time.perf_counter()
    try:
        result = pipeline(
            faces,
            num_inference_steps=settings.steps,
            start_step=settings.start_step,
            scheduler=settings.scheduler,
            condition_scale=settings.condition_scale,
            color_correction=settings.color_correction,
            seed=settings.seed,
            return_first_stage=True,
        )
    except (LDBFRError, RuntimeError) as error:  # torch raises RuntimeError, for want of memory too
        if len(rows) > 1:
            return [done for row in rows for done in restore_batch(pipeline, [row], settings)]
        reason = f"{rows[0].key}: the model failed ({str(error).strip()}); try it alone on another --device"
        return [rows[0].failed(reason, seconds_model=time.perf_counter() - started)]
    seconds = (time.perf_counter() - started) / len(rows)
    return [
        replace(
            row,
            status="modelled",
            pixels=image.tobytes(),
            first_stage_pixels=first.tobytes() if settings.first_stage or row.sheet_input else None,
            seconds_model=seconds,
        )
        for row, image, first in zip(rows, result.images, result.first_stage, strict=True)
    ]


@dataclass(frozen=True)
class Writer:
    """Encodes a result and puts it where its key says, whole or not at all.

    Args:
        output: URI of the run's output.
        settings: format, quality, side.
    """

    output: str
    settings: RestoreSettings

    def __call__(self, row: FaceRow) -> FaceRow:
        """modelled -> restored, or failed; the pictures leave the row."""
        if row.status != "modelled":
            return row
        started = time.perf_counter()
        image = self.picture(row.pixels)
        first = None if row.first_stage_pixels is None else self.picture(row.first_stage_pixels)
        try:
            if self.settings.first_stage and first is not None:
                row = replace(row, first_stage=self.put(row, first, FIRST_STAGE_FOLDER))
            row = replace(row, output=self.put(row, image))
        except LDBFRError as error:
            return row.failed(str(error), seconds_write=time.perf_counter() - started)
        return replace(
            row,
            status="restored",
            pixels=None,
            first_stage_pixels=None,
            sheet_first_stage=thumbnail(first) if row.sheet_input and first is not None else None,
            sheet_restored=thumbnail(image) if row.sheet_input else None,
            seconds_write=time.perf_counter() - started,
        )

    def picture(self, data: bytes | None) -> Pixels:
        """(S, S, 3) from a row's bytes."""
        return np.frombuffer(data or b"", np.uint8).reshape(self.settings.side, self.settings.side, 3)

    def put(self, row: FaceRow, image: Pixels, *folder: str) -> str:
        """Encode and write one picture; its URI."""
        uri = storage.join(self.output, *folder, row.output_key)
        format = format_of_output(row.key, self.settings.format)
        storage.write_bytes(uri, encode_image(image, format, quality=self.settings.quality))
        return uri
