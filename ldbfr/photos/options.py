"""The options about faces that the commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from ldbfr.errors import ConfigError
from ldbfr.faces.selection import Box
from ldbfr.photos.settings import PhotoSettings, Scale


@dataclass(frozen=True)
class PhotoOptions:
    """Which faces of a photo are restored, and how they are put back."""

    faces: Literal["all", "largest", "center", "none"] = "all"
    """Which faces of a photo; "none" looks for none: then an image is one aligned face as a whole."""
    max_faces: int | None = None
    """At most so many of a photo, the largest first."""
    min_face: float = 16
    """The smallest face that is looked for, in px of the photo; larger is faster."""
    max_face: float | None = None
    """Faces larger than so many px are left as they are."""
    min_score: float = 0.8
    """How sure the detector has to be, above 0 and below 1."""
    sharp_faces: Literal["leave", "restore"] = "leave"
    """What to do with a face that shows more detail than the model can give."""
    strength: float = 1.0
    """Share of the model's change that is applied, 0 to 1."""
    scale: Scale = 1
    """Enlarge the photos, and the faces in them."""
    grey: Literal["keep", "color"] = "keep"
    """Whether the faces of a photo without colours may get some."""
    grain: bool = True
    """Give the photo's grain to the faces."""
    no_face: Literal["copy", "failure"] = "copy"
    """What a photo without a face is."""
    min_identity: float | None = None
    """Keep a face as it was if its similarity (1 - distance of dlib's embeddings) to what it was is below; 0.4 is
    dlib's own limit for the same person. Needs the extra "identity"."""

    def settings(self, boxes: tuple[Box, ...] = ()) -> PhotoSettings | None:
        """The same, checked; None where no faces are looked for.

        Args:
            boxes: of the faces that are meant.

        Raises:
            ConfigError: naming the option, its value and what is expected.
        """
        if self.faces == "none":
            return None
        try:
            return PhotoSettings(
                faces=self.faces,
                max_faces=self.max_faces,
                min_face=self.min_face,
                max_face=self.max_face,
                boxes=boxes,
                min_score=self.min_score,
                sharp_faces=self.sharp_faces,
                strength=self.strength,
                scale=self.scale,
                grey=self.grey,
                match_grain=self.grain,
                no_face=self.no_face,
                min_identity=self.min_identity,
            )
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + str(first["loc"][0]).replace("_", "-").replace("match-grain", "grain")
            raise ConfigError(f"{option} {first['input']}: {first['msg']}; see --help") from error


def parse_boxes(texts: Sequence[str], faces: str) -> tuple[Box, ...]:
    """ "120,80,64,64" -> (120.0, 80.0, 64.0, 64.0), for each.

    Raises:
        ConfigError: one is not four numbers, or no faces are looked for.
    """
    if texts and faces == "none":
        raise ConfigError("--box with --faces none: an aligned face is taken as a whole; leave one of them out")
    boxes = []
    for text in texts:
        try:
            left, top, width, height = (float(part) for part in text.split(","))
        except ValueError as error:
            raise ConfigError(f"--box {text}: expected LEFT,TOP,WIDTH,HEIGHT in px, such as 120,80,64,64") from error
        boxes.append((left, top, width, height))
    return tuple(boxes)
