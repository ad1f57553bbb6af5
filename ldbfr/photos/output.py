"""A restored photo as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ldbfr.images import ImageFormat, Pixels, encode_image, resize
from ldbfr.metadata import exif_block
from ldbfr.photos.restorer import PhotoResult

MOST_SIDE: dict[ImageFormat, int] = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
"""Pixels a side that a format holds."""


@dataclass(frozen=True)
class PhotoFile:
    """Encodes results.

    Args:
        format: "png", "jpeg" or "webp".
        quality: of the latter two, 1 to 100.
        keep_metadata: the inputs' EXIF data and colour profile.
        provenance: see `ldbfr.metadata.encode_with_metadata`.
    """

    format: ImageFormat
    quality: int = 95
    keep_metadata: bool = True
    provenance: Mapping[str, str | int] | None = None

    def __call__(self, result: PhotoResult, data: bytes) -> bytes:
        """The file; of a photo in which nothing changed its own bytes, if they are of the format.

        Args:
            result: what became of a photo.
            data: its input file.

        Raises:
            InputError: the format cannot hold it.
        """
        photo = result.photo
        if result.is_unchanged and self.format == photo.format and self.keep_metadata:
            return data
        return photo.encode(
            self.format, quality=self.quality, provenance=self.provenance, keep_metadata=self.keep_metadata
        )

    def side_by_side(self, before: Pixels, result: PhotoResult) -> bytes:
        """Input and result in one sRGB picture, the input enlarged as the result is, both shrunk to fit the format."""
        after = result.photo.shown
        shrink = min(1.0, MOST_SIDE[self.format] / max(after.shape[0], 2 * after.shape[1]))
        height, width = (max(1, int(length * shrink)) for length in after.shape[:2])
        both = np.concatenate([resize(picture, height, width) for picture in (before, after)], axis=1)
        return encode_image(both, self.format, quality=self.quality, exif=exif_block(b"", self.provenance))
