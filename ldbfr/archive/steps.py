"""The three steps of a restoration, as functions of a unit: read its faces, run the model, write its results.

A picture that cannot be read, restored or written becomes a failed row that says why; the others go on. Where the
storage itself fails, the whole unit is given back as it is, to be done later.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from ldbfr.archive.ledger import is_worth_again, manifest_rows
from ldbfr.archive.parts import FORWARD, plan_folder, read_part, sized
from ldbfr.archive.plan import Mode, UnitId, WorkItem
from ldbfr.archive.rows import CHANGED, PlanRow, ResultRow
from ldbfr.archive.settings import RestoreSettings
from ldbfr.errors import InputError, LDBFRError, StorageError
from ldbfr.images import DEFAULT_LIMITS, ImageLimits, Pixels, crop_to_square, resize
from ldbfr.inputs.entries import Container
from ldbfr.inputs.keys import printable
from ldbfr.inputs.reading import Inputs
from ldbfr.memory import is_out_of_memory, release_memory
from ldbfr.metadata import Metadata, decode_with_metadata
from ldbfr.photos.finding import FoundFaces
from ldbfr.photos.photo import Photo, decode_photo

if TYPE_CHECKING:  # readers and writers do without the networks, whose import takes seconds
    from ldbfr.pipeline import LDBFRPipeline


UNFINISHED = "unfinished"
"""The cause of a row that is still in work."""


class FoundPhoto(NamedTuple):
    """A photo on its way: its file, which is small, and the faces found in it."""

    data: bytes
    found: FoundFaces


@dataclass
class UnitWork:
    """A unit on its way: a row for every input, and the faces (n, S, S, 3) of those that are still in work."""

    id: UnitId
    rows: list[ResultRow]
    places: list[int] = field(default_factory=list)
    """Which of the rows the faces belong to, ascending."""
    faces: Pixels | None = None
    metadata: list[Metadata] = field(default_factory=list)
    restored: Pixels | None = None
    first_stage: Pixels | None = None
    uncertainties: list[float | None] = field(default_factory=list)
    """Of the faces."""
    photos: dict[int, FoundPhoto] = field(default_factory=dict)
    """By the row's place, where whole photos are restored: each has as many of the faces as were chosen in it."""

    def faces_of(self, place: int) -> list[int]:
        """The numbers of the faces that belong to a row, in order."""
        return [number for number, other in enumerate(self.places) if other == place]

    def fail(self, places: Sequence[int], cause: str, reason: str) -> None:
        """Let the rows at these places fail, all for one reason."""
        for place in places:
            self.rows[place] = failed(self.rows[place], cause, reason)

    def keep(self, chosen: Sequence[int]) -> None:
        """Go on with these of the faces alone, by their numbers."""
        self.places = [self.places[number] for number in chosen]
        self.metadata = [self.metadata[number] for number in chosen] if self.metadata else []
        if self.faces is not None:
            self.faces = self.faces[list(chosen)]


@dataclass(frozen=True)
class UnitFailed:
    """A unit that could not be done, though nothing is wrong with its inputs."""

    id: UnitId
    reason: str
    fatal: bool = False
    """Whether going on with others makes no sense either."""


def this_worker() -> str:
    """host:process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def failed(row: ResultRow, cause: str, reason: str) -> ResultRow:
    """A row that ends here."""
    about = f"{row.input}: "
    text = " ".join(printable(reason).removeprefix(about).split())
    return row._replace(status="failed", cause=cause, reason=text, worker=this_worker(), finished=time.time())


def settled(row: PlanRow) -> ResultRow:
    """The row of an input that the listing alone settled."""
    cause, _, detail = str(row.reason).partition(": ")
    assert row.status is not None
    size = row.size or None
    return ResultRow(
        row.name, row.key, row.status, cause, printable(detail), size=size, worker=this_worker(), finished=time.time()
    )


# ---- read ----


@dataclass(frozen=True)
class UnitReader:
    """Reads the inputs of units: bytes -> upright RGB -> central square, or every face found -> (S, S, 3).

    Args:
        output: URI of the run, where its plan is.
        side: S, in px.
        column: of parquet files.
        limits: the largest file and picture accepted.
        finder: finds the faces of whole photos; None where every image is one aligned face.
    """

    output: str
    side: int
    column: str | None = None
    limits: ImageLimits = DEFAULT_LIMITS
    finder: Callable[[Photo], FoundFaces] | None = None

    def __call__(self, item: WorkItem) -> Iterator[UnitWork | UnitFailed]:
        """The units of an item, one after the other."""
        part, units = -1, dict[int, list[PlanRow]]()
        stream: Inputs | None = None
        for unit in item.units:
            try:
                if unit.part != part:
                    part, units = unit.part, by_unit(read_part(plan_folder(self.output), unit.part)[0])
                rows = units[unit.unit]
                container = forward_container(rows)
                if container is not None and (stream is None or stream.container.uri != container.uri):
                    stream = Inputs(sized(container), self.column)
                plain = Inputs(Container("file", "", ""))
                yield self.read(unit, rows, item.mode, stream if container is not None and stream else plain)
            except StorageError as error:
                stream = None
                yield UnitFailed(unit, printable(str(error)))

    def read(self, unit: UnitId, rows: Sequence[PlanRow], mode: Mode, inputs: Inputs) -> UnitWork:
        """One unit.

        Raises:
            StorageError: the inputs' place itself cannot be read.
        """
        prior = None if mode == "new" else manifest_rows(self.output, unit.part)[unit.unit]
        wanted = [place for place, row in enumerate(rows) if row.status is None]
        if mode == "failed" and prior is not None:
            wanted = [place for place in wanted if is_worth_again(prior[place])]
        work = UnitWork(unit, [start(row) for row in rows])
        if prior is not None:
            work.rows = list(prior)
        faces: list[Pixels] = []
        found_data = inputs.read([rows[place].entry() for place in wanted])
        started = time.perf_counter()
        for place, found in zip(wanted, found_data, strict=True):
            row, data = self.identify(start(rows[place]), found, prior[place] if prior is not None else None, mode)
            if data is not None:
                row, own = self.take(row, data, work, place)
                faces += own
            if row.seconds_read is None:
                row = row._replace(seconds_read=time.perf_counter() - started)
            started = time.perf_counter()
            work.rows[place] = row
        work.faces = np.stack(faces) if faces else None
        return work

    def identify(
        self, row: ResultRow, data: bytes | LDBFRError, prior: ResultRow | None, mode: Mode
    ) -> tuple[ResultRow, bytes | None]:
        """What is known of an input before it is decoded: its row, and its bytes unless there is nothing to do."""
        before = earlier(prior) if prior is not None else None
        if isinstance(data, LDBFRError):
            kept = prior if before is not None else None  # what is gone did not change
            return kept or failed(row, "unreadable", str(data)), None
        row = row._replace(size=len(data), digest=hashlib.sha256(data).hexdigest())
        if before is None:
            return row, data
        if row.digest == before.digest:
            return before, None
        if mode == "fail":
            reason = "the input has other bytes than when it was restored; see --on-change restore"
            return failed(before, CHANGED, reason), None
        # Should the new bytes be of no use, the old result stays, and the row says where.
        return row._replace(output=before.output, member=before.member), data

    def take(self, row: ResultRow, data: bytes, work: UnitWork, place: int) -> tuple[ResultRow, list[Pixels]]:
        """Decode an input: its row, and its faces (S, S, 3), which `work` is told of."""
        try:
            if self.finder is None:
                pixels, metadata = decode_with_metadata(data, name=row.input, limits=self.limits)
                faces = [resize(crop_to_square(pixels), self.side, self.side)]
                work.metadata.append(metadata)
                note = describe_fit(pixels, self.side)
            else:
                photo = decode_photo(data, name=row.input, limits=self.limits)
                found = self.finder(photo)
                pixels, faces, note = photo.shown, found.chosen(), None
                work.photos[place] = FoundPhoto(data, found)
        except InputError as error:
            return failed(row, "broken", str(error)), []
        except MemoryError:
            reason = "the memory does not suffice to decode it; shrink it, or give the machine more"
            return failed(row, "too large", reason), []
        except cv2.error as error:
            return failed(row, "broken", f"OpenCV cannot look at it ({error})"), []
        work.places += [place] * len(faces)
        height, width = pixels.shape[:2]
        return row._replace(width=width, height=height, note=note), faces


def earlier(prior: ResultRow) -> ResultRow | None:
    """The row of an input when it was restored last; None if it never was."""
    if prior.cause == CHANGED:
        return prior._replace(status="restored", cause=None, reason=None)
    return prior if prior.status == "restored" else None


def start(row: PlanRow) -> ResultRow:
    """The row of an input as it sets out; it ends as failed unless something better comes."""
    if row.status is not None:
        return settled(row)
    return ResultRow(row.name, row.key, "failed", UNFINISHED, size=row.size or None)


def by_unit(rows: Sequence[PlanRow]) -> dict[int, list[PlanRow]]:
    """The rows of a part, by unit."""
    units: dict[int, list[PlanRow]] = {}
    for row in rows:
        units.setdefault(row.unit, []).append(row)
    return units


def forward_container(rows: Sequence[PlanRow]) -> Container | None:
    """The archive that the rows of a unit are read forward from; None for what is read by ranges."""
    forward = next((row for row in rows if row.kind in FORWARD), None)
    return Container(forward.kind, forward.uri, "") if forward else None


def describe_fit(pixels: Pixels, side: int) -> str | None:
    """What was done to a picture (H, W, 3) to make it S×S; None if nothing."""
    height, width = pixels.shape[:2]
    square = min(height, width)
    done = [f"cropped to its central {square} px square"] if height != width else []
    done += [f"resized from {square} to {side} px"] if square != side else []
    return ", ".join(done) or None


# ---- restore ----


@dataclass
class UnitRestorer:
    """Runs the model on units, in micro-batches over all of a unit's faces.

    Args:
        pipeline: the model.
        settings: of the restoration.
        batch_size: most faces at a time; halved for good when the memory does not suffice.
    """

    pipeline: LDBFRPipeline
    settings: RestoreSettings
    batch_size: int

    def __call__(self, work: UnitWork) -> UnitWork | UnitFailed:
        """Restore the faces; those that the model refuses become failed rows."""
        try:
            return self.restored(work)
        except BrokenDeviceError as error:
            return UnitFailed(work.id, f"the GPU failed in process {this_worker()}: {error}")

    def restored(self, work: UnitWork) -> UnitWork:
        """The unit with its faces restored."""
        if work.faces is None:
            return work
        images, first_stages, uncertainties, chosen = [], [], [], []
        start = 0
        while start < len(work.faces):
            numbers = list(range(start, min(start + self.batch_size, len(work.faces))))
            done = self.batch(work, numbers)
            if done is None:
                continue  # the same faces again, fewer at a time
            for number, image, first_stage, uncertainty in done:
                chosen.append(number)
                images.append(image)
                first_stages.append(first_stage)
                uncertainties.append(uncertainty)
            start += len(numbers)
        work.keep(chosen)
        work.restored = np.stack(images) if images else None
        work.uncertainties = uncertainties
        work.first_stage = np.stack(first_stages) if images and self.settings.first_stage else None
        if not images:
            work.faces = None
        return work

    def batch(self, work: UnitWork, numbers: list[int]) -> list[RestoredFaceOf] | None:
        """Restore some of the faces; None where they were too many at a time.

        A micro-batch that the model refuses is tried again face by face, so that only the culprit fails.
        """
        assert work.faces is not None
        started = time.perf_counter()
        try:
            result = self.run(work.faces[numbers])
        except (LDBFRError, RuntimeError) as error:  # torch raises RuntimeError, for want of memory too
            if is_out_of_memory(error) and len(numbers) > 1:
                self.batch_size = max(1, len(numbers) // 2)
                release_memory()
                return None
            if "CUDA error" in str(error):
                raise BrokenDeviceError(str(error)) from error
            if len(numbers) > 1:
                return [done for number in numbers for done in self.batch(work, [number]) or ()]
            reason = f"the model failed ({str(error).strip()}); try it alone on another --device"
            work.fail([work.places[numbers[0]]], "model", reason)
            return []
        seconds = (time.perf_counter() - started) / len(numbers)
        for number in numbers:
            place = work.places[number]
            before = work.rows[place].seconds_model or 0.0
            work.rows[place] = work.rows[place]._replace(seconds_model=before + seconds, worker=this_worker())
        maps = result.uncertainty
        means = [None] * len(numbers) if maps is None else [float(map_.mean()) for map_ in maps]
        return list(map(RestoredFaceOf, numbers, result.images, result.first_stage, means))

    def run(self, faces: Pixels) -> Any:
        """One call of the pipeline."""
        return self.pipeline(faces, return_first_stage=True, **self.settings.pipeline_options())


class RestoredFaceOf(NamedTuple):
    """What the model made of one of a unit's faces."""

    number: int
    image: Pixels
    first_stage: Pixels
    uncertainty: float | None


class BrokenDeviceError(RuntimeError):
    """The GPU does not answer this process any more; nothing is wrong with the faces."""
