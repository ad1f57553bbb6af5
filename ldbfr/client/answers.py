"""What an endpoint answers, checked."""

from __future__ import annotations

import binascii
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ldbfr.errors import StorageError
from ldbfr.images import ImageFormat, format_of_data

MEDIA_TYPE: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
JobState = Literal["pending", "running", "succeeded", "failed", "cancelled"]


class MalformedAnswerError(ValueError):
    """An answer is not what was asked for; the text says what is wrong with it."""


class Answer(BaseModel):
    """A part of an answer; fields that a newer server adds are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


def _bytes_of_base64(value: object) -> bytes:
    """Base64 in text, strictly."""
    if not isinstance(value, str):
        raise ValueError("expected base64 in text")
    return binascii.a2b_base64(value, strict_mode=True)


Encoded = Annotated[bytes, BeforeValidator(_bytes_of_base64)]


class Restoration(Answer):
    """A restored image.

    Args:
        image: its file.
        media_type: of the file, see also `format`.
        width: in px.
        height: in px.
        seed: of the noise; the same image, options, seed and weights give the same bytes.
        weights_digest: of the model that restored it.
        faces: what became of each face: box, landmarks, score, outcome, reason, …; none in mode "aligned".
        samples: files of all restorations, in mode "aligned" and where several were asked for.
        uncertainty: grey PNG of the image's size, brighter where the samples differ; None for one sample.
        timings: seconds by step.
        notes: what a person should know.
        request_id: under which the server's log has it.
    """

    image: Encoded = Field(repr=False)
    media_type: Literal["image/png", "image/jpeg", "image/webp"]
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    seed: int
    weights_digest: str
    faces: tuple[dict[str, Any], ...] = Field((), repr=False)
    samples: tuple[Encoded, ...] = Field((), repr=False)
    uncertainty: Encoded | None = Field(None, repr=False)
    timings: dict[str, float] = Field(default_factory=dict)
    notes: str = ""
    request_id: str | None = None

    @property
    def format(self) -> ImageFormat:
        """Of the file."""
        return next(format for format, media_type in MEDIA_TYPE.items() if media_type == self.media_type)

    @model_validator(mode="after")
    def _is_what_it_says(self) -> Self:
        """Refuse bytes that are no such image."""
        if format_of_data(self.image) != self.format:
            raise ValueError(f"the image is no {self.media_type}")
        return self

    def save(self, path: str | Path) -> None:
        """Write the image's file.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            Path(path).write_bytes(self.image)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}; name another file") from error


class Preview(Answer):
    """A restoration on its way: `step` 0 is the first stage, `step` k of `steps` the k-th denoising."""

    step: int = Field(ge=0)
    steps: int = Field(ge=0)
    image: Encoded = Field(repr=False)
    """A JPEG."""


class Found(Answer):
    """The faces of a photo: box, landmarks, score, and the reason why one would be left alone, or None."""

    width: int
    height: int
    faces: tuple[dict[str, Any], ...]


class Model(Answer):
    """A model that restores."""

    name: str
    side: int
    """Of an aligned face, in px."""
    template: str
    weights_digest: str
    defaults: dict[str, Any] = Field(default_factory=dict)
    license: str = ""


class Models(Answer):
    """All of a server."""

    models: tuple[Model, ...]


class Limits(Answer):
    """What a server takes."""

    max_body_bytes: int
    max_pixels: int
    deadline_seconds: float
    max_samples: int
    auth: bool = False
    """Whether it asks for a key."""


class Job(Answer):
    """A batch between two places in buckets."""

    id: str
    status: JobState
    input: str
    output: str
    message: str | None = None
    progress: dict[str, Any] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it ended, in one way or another."""
        return self.status in ("succeeded", "failed", "cancelled")


class Jobs(Answer):
    """All of a server."""

    jobs: tuple[Job, ...]


Kind = TypeVar("Kind", bound=Answer)


def parse(kind: type[Kind], body: bytes | str) -> Kind:
    """An answer of a kind.

    Raises:
        MalformedAnswerError: it is another.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise MalformedAnswerError(f"{f'{place}: ' if place else ''}{first['msg']}") from None
