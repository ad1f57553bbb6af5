"""What a user decides about photos."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from ldbfr.config import Settings
from ldbfr.errors import ConfigError
from ldbfr.faces.selection import Box, Selection, WhichFaces

Scale = Literal[1, 2, 4]
SMALLEST_BOX, LARGEST_BOX = 4, 100_000


class PhotoSettings(Settings):
    """Everything but weights, seed and sampling that the restoration of a whole photo depends on.

    Args:
        faces: which of the found faces.
        max_faces: at most so many, the largest first.
        min_face: the smallest face that is looked for, in px of the photo.
        max_face: larger ones are left alone.
        boxes: (left, top, width, height) in px of the upright photo: just these faces.
        min_score: of the detector, 0 to 1.
        sharp_faces: "leave" alone what shows more detail than the model can give, or "restore" it too.
        strength: share of the model's change that is applied.
        scale: enlarge the photo, and the faces in it.
        grey: "keep" a photo's lack of colours, or let the model "color" the faces.
        match_grain: give the photo's grain to the faces.
        no_face: photos without a face are a "copy" of the input, or a "failure".
        min_identity: least similarity, 1 − distance of dlib's embeddings, of a face to what it was; one that drifted
            further stays as it was.
    """

    faces: WhichFaces = "all"
    max_faces: int | None = Field(default=None, ge=1)
    min_face: float = Field(default=16, ge=4)
    max_face: float | None = Field(default=None, gt=0)
    boxes: tuple[Box, ...] = ()
    min_score: float = Field(default=0.8, gt=0, lt=1)
    sharp_faces: Literal["leave", "restore"] = "leave"
    strength: float = Field(default=1.0, ge=0, le=1)
    scale: Scale = 1
    grey: Literal["keep", "color"] = "keep"
    match_grain: bool = True
    no_face: Literal["copy", "failure"] = "copy"
    min_identity: float | None = Field(default=None, ge=-1, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: naming the values.
        """
        if self.max_face is not None and self.max_face < self.min_face:
            raise ConfigError(
                f"max_face {self.max_face:g} is below min_face {self.min_face:g}: no face could be chosen"
            )
        if self.boxes and (self.faces != "all" or self.max_faces is not None or self.max_face is not None):
            raise ConfigError("boxes say which faces are meant: leave faces, max_faces and max_face out beside them")
        for box in self.boxes:
            if not (all(abs(value) <= LARGEST_BOX for value in box) and min(box[2:]) >= SMALLEST_BOX):
                raise ConfigError(
                    f"box {box}: expected left, top, width, height in px, such as 120,80,64,64; width and height from "
                    f"{SMALLEST_BOX} to {LARGEST_BOX:,}"
                )
        return self

    @property
    def selection(self) -> Selection:
        """The part that chooses among the found faces."""
        most = math.inf if self.max_face is None else self.max_face
        return Selection(self.faces, self.max_faces, self.min_face, most, self.boxes)
