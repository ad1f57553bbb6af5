"""What the HTTP side and the restoring side say to each other; neither knows more of the other.

The HTTP side (`serve.api`) speaks to a `Restorer`. `serve.restoring.PhotoService` is the real one; it runs the steps
that need no networks itself and hands aligned faces to a `FaceModel`, which on Ray is the batched deployment.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import Field

from ldbfr.config import Settings
from ldbfr.errors import LDBFRError
from ldbfr.faces.selection import Box
from ldbfr.images import ImageFormat, Pixels

Mode = Literal["photo", "aligned"]


class RestorationOptions(Settings):
    """What a client may ask for; what is None is the model's default."""

    mode: Mode = Field("photo", description="photo: find the faces of a photo; aligned: the image is one aligned face")
    steps: int | None = Field(None, ge=0, le=50, description="denoising steps; 0 gives the first stage's own image")
    seed: int = Field(0, ge=0, lt=2**53, description="of all noise; the same seed gives the same bytes")
    condition_scale: float | None = Field(None, ge=0, le=4, description="factor on the injections")
    strength: float = Field(1.0, ge=0, le=1, description="share of the model's change that is applied to a photo")
    samples: int = Field(1, ge=1, le=8, description="restorations of each face; above 1 there is an uncertainty map")
    boxes: tuple[Box, ...] = Field((), max_length=64, description="just these faces: left, top, width, height")
    format: ImageFormat | None = Field(None, description="of the answer; the upload's own when left out")
    quality: int = Field(95, ge=1, le=100, description="of JPEG and WebP")


@dataclass(frozen=True)
class Restored:
    """A restored image.

    `image` is the encoded file, `samples` all of them (encoded; aligned mode and more than one asked for), and
    `uncertainty` a grey PNG of the image's size (more than one sample). `faces` are `FaceReport.values()`, empty in
    aligned mode; `timings` are seconds by step: decode, detect, queue, model, paste, encode.
    """

    image: bytes
    format: ImageFormat
    width: int
    height: int
    seed: int
    weights_digest: str
    faces: Sequence[dict[str, Any]] = ()
    samples: Sequence[bytes] = ()
    uncertainty: bytes | None = None
    timings: dict[str, float] = field(default_factory=dict)
    notes: str = ""


@dataclass(frozen=True)
class Found:
    """The faces of a photo, without restoring any: `faces` have box, landmarks, score and reason (or None)."""

    width: int
    height: int
    faces: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Preview:
    """What a restoration looks like on its way; `step` 0 is the first stage, `step` k of `steps` the k-th denoising."""

    step: int
    steps: int
    image: bytes
    """A JPEG, no larger than 1,024 px a side."""


@dataclass(frozen=True)
class ModelInfo:
    """The model that answers."""

    name: str
    side: int
    template: str
    weights_digest: str
    defaults: dict[str, Any]
    """steps, condition_scale, start_step, scheduler, color_correction."""
    license: str = ""


class Overloaded(LDBFRError):
    """No room for the request now: 429 where it is the client's own limit, 503 where it is the service's.

    Args:
        message: what is full.
        retry_after: seconds after which it is worth asking again.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(LDBFRError):
    """The request's time ran out before its result was there: 504."""


class OtherModelError(LDBFRError):
    """The faces were cut out for other weights than those that answer, as happens while weights are replaced.

    Args:
        model: that answers: cut the faces out for it, and ask again.
    """

    def __init__(self, model: ModelInfo) -> None:
        super().__init__(model)  # nothing but arguments, so that it can go from process to process
        self.model = model

    def __str__(self) -> str:
        return (
            f"expected faces of {self.model.side} px in the {self.model.template} frame, which {self.model.name} takes"
        )


class Restorer(Protocol):
    """Restores encoded images.

    `deadline` is in `time.monotonic()`'s seconds; what cannot be done by then raises `DeadlineExceeded`, and a
    cancelled call stops between two denoising steps. All raise InputError for a bad image, ConfigError for options
    that do not go together, `Overloaded` when there is no room.
    """

    async def ready(self) -> bool:
        """Whether a request would be answered now: weights loaded and warmed up."""

    async def info(self) -> ModelInfo:
        """About the model."""

    async def find(self, data: bytes, deadline: float) -> Found:
        """The faces of a photo."""

    async def restore(self, data: bytes, options: RestorationOptions, deadline: float) -> Restored:
        """Restore an image."""

    def stream(self, data: bytes, options: RestorationOptions, deadline: float) -> AsyncIterator[Preview | Restored]:
        """Restore an image, with previews; the last item is the result."""


@dataclass(frozen=True)
class FaceJob:
    """Aligned faces of one request: (n, S, S, 3) uint8, in which frame, and how to restore them.

    `previews` asks for every step's.
    """

    faces: Pixels
    template: str
    steps: int | None = None
    seed: int = 0
    condition_scale: float | None = None
    samples: int = 1
    previews: bool = False


@dataclass(frozen=True)
class FaceResult:
    """`images` (n, S, S, 3) uint8, `samples` (N, n, S, S, 3) or None, `uncertainty` (n, S, S) float32 or None.

    `model` are the weights that made it; `queue_seconds` and `model_seconds` are what it waited and took, `batch_faces`
    how many faces shared the batch.
    """

    images: Pixels
    model: ModelInfo
    samples: Pixels | None = None
    uncertainty: Any = None
    queue_seconds: float = 0.0
    model_seconds: float = 0.0
    batch_faces: int = 0


@dataclass(frozen=True)
class FacePreview:
    """Faces (n, S, S, 3) uint8 after a step of `steps`; step 0 is the first stage."""

    step: int
    steps: int
    images: Pixels


class FaceModel(Protocol):
    """Restores aligned faces in batches; may raise `Overloaded`, `DeadlineExceeded` and `OtherModelError`."""

    async def info(self) -> ModelInfo:
        """About the model."""

    async def restore(self, job: FaceJob, deadline: float) -> FaceResult:
        """Restore faces."""

    def stream(self, job: FaceJob, deadline: float) -> AsyncIterator[FacePreview | FaceResult]:
        """Restore faces, with previews; the last item is the result."""
