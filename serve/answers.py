"""What the endpoint answers, as pydantic models: their JSON is sent, and their schemas are the OpenAPI description."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from ldbfr.images import ImageFormat
from serve.jobs_protocol import JobStatus
from serve.protocol import Found, ModelInfo, Preview, Restored
from serve.settings import EndpointSettings

MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Face(BaseModel):
    """A face of a photo. `reason` says why it is (or was) left as it is; null for one that is restored."""

    model_config = ConfigDict(extra="allow")

    box: list[float] = Field(description="left, top, width, height in px", min_length=4, max_length=4)
    score: float | None = Field(None, description="of the detector, 0 to 1")
    reason: str | None = None


class Restoration(BaseModel):
    """A restored image and all that belongs to it; images are base64."""

    image: str
    media_type: str = Field(examples=["image/png"])
    width: int
    height: int
    seed: int
    weights_digest: str
    faces: list[Face]
    samples: list[str] = Field(description="all of them, of the same media type; empty for one")
    uncertainty: str | None = Field(None, description="a grey PNG: the samples' standard deviation")
    timings: dict[str, float] = Field(description="seconds by stage")
    notes: str = ""

    @classmethod
    def of(cls, result: Restored) -> Self:
        """The answer for a result."""
        return cls(
            image=base64(result.image),
            media_type=MEDIA_TYPES[result.format],
            width=result.width,
            height=result.height,
            seed=result.seed,
            weights_digest=result.weights_digest,
            faces=_faces(result.faces),
            samples=[base64(sample) for sample in result.samples],
            uncertainty=None if result.uncertainty is None else base64(result.uncertainty),
            timings=result.timings,
            notes=result.notes,
        )


class PreviewEvent(BaseModel):
    """How a restoration looks on its way: step 0 is the first stage's image."""

    step: int
    steps: int
    image: str = Field(description="a JPEG in base64")

    @classmethod
    def of(cls, preview: Preview) -> Self:
        """The event for a preview."""
        return cls(step=preview.step, steps=preview.steps, image=base64(preview.image))


class Faces(BaseModel):
    """The faces of a photo."""

    width: int
    height: int
    faces: list[Face]

    @classmethod
    def of(cls, found: Found) -> Self:
        """The answer for what was found."""
        return cls(width=found.width, height=found.height, faces=_faces(found.faces))


class Model(BaseModel):
    """A model that answers."""

    name: str = Field(examples=["faces_64"])
    side: int = Field(description="of its faces, in px", examples=[64])
    template: str = Field(description="how faces are aligned", examples=["ffhq"])
    weights_digest: str
    defaults: dict[str, Any] = Field(examples=[{"steps": 16, "condition_scale": 1.0}])
    license: str = ""


class Models(BaseModel):
    """The models that answer."""

    models: list[Model]

    @classmethod
    def of(cls, info: ModelInfo) -> Self:
        """The answer for the one model that there is."""
        return cls(models=[Model(**vars(info))])


class ServiceLimits(BaseModel):
    """What a request may be, and whether it needs a key."""

    max_body_bytes: int
    max_pixels: int
    deadline_seconds: float
    max_samples: int
    max_steps: int
    auth: bool
    jobs: bool

    @classmethod
    def of(cls, settings: EndpointSettings, jobs: bool) -> Self:
        """The limits that the settings set."""
        names = cls.model_fields.keys() & type(settings).model_fields.keys()
        own = {name: getattr(settings, name) for name in names}
        return cls(**own, auth=settings.keys_file is not None, jobs=jobs)


class Status(BaseModel):
    """Whether the service lives."""

    status: str = Field(examples=["ok"])


class JobList(BaseModel):
    """The archive jobs."""

    jobs: list[JobStatus]


def base64(data: bytes) -> str:
    """Bytes as text."""
    return b64encode(data).decode("ascii")


def _faces(faces: Sequence[dict[str, Any]]) -> list[Face]:
    return [Face.model_validate(face) for face in faces]
