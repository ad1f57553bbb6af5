"""PhotoRestorer: photos in, photos out (`ldbfr.pipeline` restores the faces in between).

from ldbfr import LDBFRPipeline
from ldbfr.photos import PhotoRestorer, decode_photo

restore = PhotoRestorer(LDBFRPipeline.from_pretrained("faces_128"))
result = restore(decode_photo(Path("photo.jpg").read_bytes(), name="photo.jpg"))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import cv2
import numpy as np

from ldbfr.errors import InputError
from ldbfr.evaluation.metrics import IdentityModel, sharpness
from ldbfr.faces.alignment import align, warp
from ldbfr.faces.detection import YuNet
from ldbfr.faces.face import Face, FaceDetector
from ldbfr.images import Pixels
from ldbfr.memory import is_out_of_memory, release_memory
from ldbfr.photos.finding import FaceFinder, FoundFaces
from ldbfr.photos.paste import Pasting, RestoredFace, paste
from ldbfr.photos.photo import Photo, Upscaler
from ldbfr.photos.settings import PhotoSettings

if TYPE_CHECKING:  # whoever finds faces and puts them back does without the networks, whose import takes seconds
    from ldbfr.pipeline import LDBFRPipeline

Outcome = Literal["restored", "left", "refused"]
MOST_WAITING = 100_000_000
"""Pixels of the photos whose faces wait for a full micro-batch."""
NO_FACE = "no face found, expected one at least; lower the score or the size, or give its box"
IDENTITY_FRAME = 128
"""Side in px of the tight frame in which identities are compared."""


@dataclass(frozen=True)
class FaceReport:
    """What became of one face.

    `sharpness_before` and `sharpness_after` are mean absolute Laplacians in the model's frame, in grey levels, the
    latter of what is pasted (but for grain);
    `identity_distance` is that of dlib's embeddings before and after, None without dlib; `uncertainty` is the mean
    standard deviation over several samples as a share of the full range, None for one sample.
    """

    box: tuple[float, float, float, float]
    landmarks: tuple[tuple[float, float], ...]
    score: float
    turned: int
    outcome: Outcome
    reason: str | None = None
    """Why it was left alone, or refused after the model had restored it."""
    sharpness_before: float | None = None
    sharpness_after: float | None = None
    identity_distance: float | None = None
    uncertainty: float | None = None

    def values(self) -> dict[str, Any]:
        """As JSON has it: places to a hundredth of a px, numbers to four places, without what is not known."""
        values = asdict(self)
        values["box"] = [round(value, 2) for value in self.box]
        values["landmarks"] = [[round(x, 2), round(y, 2)] for x, y in self.landmarks]
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        return {key: value for key, value in rounded.items() if value is not None}


@dataclass
class PhotoResult:
    """A restored photo, and what became of each of its faces."""

    photo: Photo
    faces: list[FaceReport] = field(default_factory=list)
    is_unchanged: bool = False
    """Whether it shows just what its file does."""
    error: str | None = None
    """Why it could not be restored."""

    @property
    def num_restored(self) -> int:
        """Faces that were restored."""
        return sum(face.outcome == "restored" for face in self.faces)

    def check(self, settings: PhotoSettings) -> None:
        """Refuse a photo that could not be restored, or that the settings call a failure.

        Raises:
            InputError: why.
        """
        if self.error is not None:
            raise InputError(f"{self.photo.name}: {self.error}")
        if not self.faces and settings.no_face == "failure":
            raise InputError(f"{self.photo.name}: {NO_FACE}")

    def note(self) -> str:
        """What a person should know, in a line; empty if all went as expected."""
        notes = list(self.photo.notes)
        if not self.faces:
            notes.append("no face found")
        for outcome, verb in (("left", "left alone"), ("refused", "refused and left alone")):
            reasons: dict[str, int] = {}
            for face in self.faces:
                if face.outcome == outcome:
                    reason = str(face.reason).partition(":")[0]
                    reasons[reason] = reasons.get(reason, 0) + 1
            notes += [f"{count} face{'s' * (count > 1)} {verb} ({reason})" for reason, count in reasons.items()]
        return "; ".join(notes)


def put_back(
    photo: Photo,
    found: FoundFaces,
    restored: Sequence[Pixels],
    settings: PhotoSettings,
    *,
    seed: int = 0,
    uncertainties: Sequence[float | None] = (),
    upscaler: Upscaler | None = None,
) -> PhotoResult:
    """The last step, which needs no networks: compose the restored faces into their photo, which is changed in place.

    Args:
        photo: as decoded.
        found: what `find_faces` gave for it.
        restored: (S, S, 3) for each of `found.chosen()`.
        settings: as for `find_faces`.
        seed: of the grain.
        uncertainties: one for each of `restored`, where there are any.
        upscaler: enlarges the background where `settings.scale` is above 1; Lanczos's filter when left out.

    Raises:
        WeightsError: `min_identity` is set, and dlib is not installed.
    """
    identity: IdentityModel | None = IdentityModel()
    if settings.min_identity is None and not IdentityModel.is_installed():
        identity = None
    how = Pasting(settings.strength, found.colors, settings.match_grain, settings.scale, seed)
    reports: list[FaceReport] = []
    faces: list[RestoredFace] = []
    results = iter(zip(restored, [*uncertainties, *[None] * len(restored)], strict=False))
    for one in found.faces:
        if one.alignment is None:
            reports.append(report(one.face, "left", one.reason))
            continue
        after, uncertainty = next(results)
        face = RestoredFace(one.alignment.image, after, one.alignment.matrix, one.face.points)
        distance = None if identity is None else drift(photo, face, how, identity)
        known = {
            "sharpness_before": sharpness(face.before),
            "sharpness_after": sharpness(face.result(how)),
            "identity_distance": distance,
            "uncertainty": uncertainty,
        }
        least = settings.min_identity
        if least is not None and distance is not None and 1 - distance < least:
            reason = f"another person: similarity {1 - distance:.2f} is below {least:g}"
            reports.append(report(one.face, "refused", reason, **known))
            continue
        reports.append(report(one.face, "restored", None, **known))
        faces.append(face)
    if settings.grey == "color" and faces:
        photo = photo.in_color()
    photo = photo.enlarged(settings.scale, upscaler)
    photo.apply(paste(photo.shown, faces, how))
    unchanged = settings.scale == 1 and (not faces or settings.strength == 0)
    return PhotoResult(photo, reports, is_unchanged=unchanged)


def report(face: Face, outcome: Outcome, reason: str | None, **known: float | None) -> FaceReport:
    """Of a face."""
    return FaceReport(face.box, face.landmarks, face.score, face.turned, outcome, reason, **known)


def drift(photo: Photo, face: RestoredFace, how: Pasting, identity: IdentityModel) -> float:
    """Distance of dlib's embeddings of a face before and after, in a tight frame; above 0.6 it is another person."""
    before = align(photo.shown, face.landmarks, "tight", IDENTITY_FRAME)
    # From the model's frame to the tight one, by way of the photo.
    away = np.vstack([face.matrix, [0, 0, 1]])
    there = (np.vstack([before.matrix, [0, 0, 1]]) @ np.linalg.inv(away))[:2]
    after = before.image + warp(face.applied(how), there, IDENTITY_FRAME, IDENTITY_FRAME)
    return identity.distance(np.clip(np.rint(after), 0, 255).astype(np.uint8), before.image)


class PhotoRestorer:
    """Restores the faces of whole photos.

    Args:
        pipeline: restores aligned faces; its preset names the template.
        settings: which faces, and how they are put back.
        detector: finds them; YuNet when left out.
        upscaler: enlarges the background where `settings.scale` is above 1; Lanczos's filter when left out.
        batch_size: faces that are restored at a time, of one photo or of several.
        seed: of noise and grain; a face's noise follows from it and the face alone.
        num_samples: restorations that are drawn of each face; above 1 they give its uncertainty.
        options: further ones of `LDBFRPipeline.__call__`.

    Raises:
        WeightsError: the detector's file cannot be found.
    """

    def __init__(
        self,
        pipeline: LDBFRPipeline,
        settings: PhotoSettings | None = None,
        *,
        detector: FaceDetector | None = None,
        upscaler: Upscaler | None = None,
        batch_size: int = 16,
        seed: int = 0,
        num_samples: int = 1,
        **options: Any,
    ) -> None:
        self.pipeline, self.upscaler, self.batch_size, self.seed = pipeline, upscaler, batch_size, seed
        self.settings = settings or PhotoSettings()
        detector = detector or YuNet(min_score=self.settings.min_score, min_size=self.settings.min_face)
        self.find = FaceFinder(detector, self.settings, pipeline.preset.template, pipeline.side)
        self.num_samples, self.options = num_samples, options

    def __call__(self, photo: Photo) -> PhotoResult:
        """Restore one photo, in place.

        Raises:
            InputError: it has no face, and the settings call that a failure.
        """
        result = next(self.many([photo]))
        result.check(self.settings)
        return result

    def many(self, photos: Iterable[Photo]) -> Iterator[PhotoResult]:
        """Restore photos, in order; a micro-batch takes faces of as many as it needs to be full.

        A photo that cannot be restored does not stop the others: `PhotoResult.check` tells. When the photos that wait
        for a full batch have more than MOST_WAITING pixels, the batch goes as it is.
        """
        waiting: list[tuple[Photo, FoundFaces | str]] = []
        faces: list[Pixels] = []
        done: list[Done] = []

        def finish(last: bool) -> Iterator[PhotoResult]:
            while len(faces) >= self.batch_size or (last and faces):
                batch = faces[: self.batch_size]
                del faces[: len(batch)]
                done.extend(self.restore(batch))
            while waiting and (isinstance(waiting[0][1], str) or len(waiting[0][1].chosen()) <= len(done)):
                photo, found = waiting.pop(0)
                if isinstance(found, str):
                    yield PhotoResult(photo, error=found)
                    continue
                count = len(found.chosen())
                own = done[:count]
                del done[:count]
                yield self.finish(photo, found, own)

        for photo in photos:
            found = self.look(photo)
            waiting.append((photo, found))
            faces += [] if isinstance(found, str) else found.chosen()
            yield from finish(last=sum(one.width * one.height for one, _ in waiting) > MOST_WAITING)
        yield from finish(last=True)

    def look(self, photo: Photo) -> FoundFaces | str:
        """The faces of a photo, or why they cannot be looked for."""
        try:
            return self.find(photo)
        except InputError as error:
            return str(error).removeprefix(f"{photo.name}: ")
        except cv2.error as error:
            return f"OpenCV cannot look at it ({error})"
        except MemoryError:
            return "the memory does not suffice; shrink it, or give the machine more"

    def restore(self, faces: Sequence[Pixels]) -> list[Done]:
        """A micro-batch of aligned faces; in smaller ones where they are too many at a time, or one is refused."""
        try:
            output = self.pipeline(np.stack(faces), seed=self.seed, num_samples=self.num_samples, **self.options)
        except (InputError, RuntimeError) as error:  # torch raises RuntimeError, for want of memory too
            if "CUDA error" in str(error):
                raise
            if len(faces) == 1:
                return [Done(error=f"the model failed ({str(error).strip()}); try it alone on another --device")]
            half = len(faces) // 2
            if is_out_of_memory(error):
                self.batch_size = min(self.batch_size, half)
                release_memory()
            return [*self.restore(faces[:half]), *self.restore(faces[half:])]
        if output.uncertainty is None:
            return [Done(image) for image in output.images]
        return [Done(*one) for one in zip(output.images, map(float, output.uncertainty.mean(axis=(1, 2))), strict=True)]

    def finish(self, photo: Photo, found: FoundFaces, done: Sequence[Done]) -> PhotoResult:
        """Put a photo's faces back."""
        errors = [one.error for one in done if one.error is not None]
        if errors:
            return PhotoResult(photo, error=errors[0])
        try:
            return put_back(
                photo,
                found,
                [one.image for one in done if one.image is not None],
                self.settings,
                seed=self.seed,
                uncertainties=[one.uncertainty for one in done],
                upscaler=self.upscaler,
            )
        except InputError as error:
            return PhotoResult(photo, error=str(error).removeprefix(f"{photo.name}: "))
        except MemoryError:
            return PhotoResult(photo, error="the memory does not suffice; shrink it, or give the machine more")


class Done(NamedTuple):
    """What the model made of a face, or why it did not."""

    image: Pixels | None = None
    uncertainty: float | None = None
    error: str | None = None
