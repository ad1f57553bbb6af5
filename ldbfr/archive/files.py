"""Restore files of this machine one after the other, in this process: what `ldbfr restore` does.

A result says in its metadata which input, weights and settings it is of; so a run that was stopped goes on where it
was, and a file that something else wrote is never overwritten unasked. Archives and buckets are for `jobs/restore.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from ldbfr.archive.file_work import FileWork, Job, is_something_else, provenance_of
from ldbfr.archive.naming import SIDE_BY_SIDE_FOLDER, OutputFormat, output_key
from ldbfr.archive.settings import RestoreSettings
from ldbfr.errors import ConfigError, InputError, StorageError
from ldbfr.images import IMAGE_SUFFIXES, fit_to_side, format_from_name
from ldbfr.metadata import Metadata, decode_with_metadata, encode_with_metadata
from ldbfr.photos.output import PhotoFile
from ldbfr.photos.photo import Photo, decode_photo
from ldbfr.photos.restorer import PhotoRestorer, PhotoResult
from ldbfr.progress import Tally

if TYPE_CHECKING:
    from ldbfr.pipeline import LDBFRPipeline


Done = tuple[Job, dict[str, Any], dict[Path, bytes]]
"""A file, what is to be said of it, and what is to be written."""


def plan_files(inputs: Sequence[Path], output: Path, format: OutputFormat, side_by_side: bool) -> list[Job]:
    """Which files there are, and where their results go: a file for a file, a folder for anything else.

    Args:
        inputs: files, and folders of any depth, of which the images are taken.
        output: a file with an image's suffix for a single input file; else a folder, made if needed.
        format: of the results.
        side_by_side: whether pictures of input and result go to a folder of their own.

    Raises:
        InputError: an input is missing, or a folder has no images.
        ConfigError: the output cannot be, two results meet in one file, or a result would overwrite an input.
    """
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; archives and s3:// are for jobs/restore.py")
    if output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        return [single(inputs, output, format, side_by_side)]
    if output.is_file():
        raise ConfigError(f"--output {output}: it is a file, expected a folder, or the name of an image for one input")
    jobs = []
    for path in inputs:
        files = [path] if path.is_file() else images_below(path, output)
        for file in files:
            key = output_key(file.name if path.is_file() else file.relative_to(path).as_posix(), format)
            beside = output / SIDE_BY_SIDE_FOLDER / key if side_by_side else None
            jobs.append(Job(file, output / key, beside))
    sources = {identity(job.source) for job in jobs}
    by_target: dict[Path, Path] = {}
    for job in jobs:
        if job.target in by_target:
            raise ConfigError(
                f"{by_target[job.target]} and {job.source} would both become {job.target}; give them apart"
            )
        if any(path.exists() and identity(path) in sources for path in job.outputs):
            raise ConfigError(
                f"--output {output}: {job.target} or a picture beside it is an input, and would be overwritten; name "
                "another folder"
            )
        by_target[job.target] = job.source
    return jobs


def single(inputs: Sequence[Path], output: Path, format: OutputFormat, side_by_side: bool) -> Job:
    """A file for a file.

    Raises:
        ConfigError: as `plan_files`.
    """
    if len(inputs) != 1 or not inputs[0].is_file():
        raise ConfigError(f"--output {output}: the name of an image is for one input file; name a folder")
    written = format_from_name(output.name)
    if format not in ("same", written):
        raise ConfigError(f"--format {format}: --output {output} is named as {written}; leave one of them out")
    beside = output.with_name(f"{output.stem}-side-by-side{output.suffix}") if side_by_side else None
    job = Job(inputs[0], output, beside)
    for path in job.outputs:
        if path.exists() and path.samefile(inputs[0]):
            raise ConfigError(f"--output {output}: {path} is the input, and would be overwritten; name another file")
    return job


def identity(path: Path) -> tuple[int, int]:
    """The same for two names of one file."""
    found = path.stat()
    return found.st_dev, found.st_ino


def images_below(folder: Path, output: Path) -> list[Path]:
    """The images of a folder of any depth, sorted; what lies in the output is not among them.

    Raises:
        InputError: there are none.
    """
    there = output.resolve()
    inside = there != folder.resolve() and there.is_relative_to(folder.resolve())
    found = [
        Path(root) / name
        for root, _, names in os.walk(folder, onerror=_unreadable)
        if not (inside and Path(root).resolve().is_relative_to(there))
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
    ]
    if not found:
        raise InputError(
            f"{folder}: no images in it, expected some of {', '.join(IMAGE_SUFFIXES)}; name another folder"
        )
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise StorageError(f"{error.filename}: {error.strerror}; nothing was restored")


@dataclass
class FileRestorer(FileWork):
    """Restores files.

    Args:
        pipeline: the model.
        settings: of the restoration, of photos or of aligned faces.
        restorer: of photos; None where every file is one aligned face.
        batch_size: aligned faces at a time.
        overwrite: replace files that are not of this input, weights and settings.
        details: gets a line of JSON for every file.
        tally: of what came of them.
        notes: what a person should know of a file that was restored, in lines.
    """

    pipeline: LDBFRPipeline
    settings: RestoreSettings
    restorer: PhotoRestorer | None
    batch_size: int
    overwrite: bool = False
    details: TextIO | None = None
    tally: Tally = field(default_factory=lambda: Tally(0))
    notes: list[str] = field(default_factory=list)
    num_unchanged: int = 0
    """Of the restored ones, those in which nothing was to be done."""

    def __call__(self, jobs: Sequence[Job]) -> Tally:
        """Restore them; a file that cannot be restored is counted, and does not stop the others.

        Raises:
            StorageError: the output itself cannot be written.
        """
        self.begin(jobs)
        work = self.photos(jobs) if self.restorer else self.faces(jobs)
        for job, about, files in work:
            self.write(job, about, files)
        return self.tally

    def read(self, job: Job) -> bytes | None:
        """The input's bytes; None if it cannot be read, or is done already."""
        try:
            data = job.source.read_bytes()
            done = self.is_done(job, data)
        except OSError as error:
            self.fail(job, f"{error.strerror}; check its rights")
            return None
        except InputError as error:
            self.fail(job, str(error))
            return None
        if done:
            self.skip(job)
        return None if done else data

    def is_done(self, job: Job, data: bytes) -> bool:
        """Whether all of the result is there.

        Raises:
            InputError: something else is there.
        """
        there = self.there(job, data)
        for path in there:
            if provenance_of(path) != self.about(data):
                raise is_something_else(path)
        return len(there) == len(job.outputs)

    def about(self, data: bytes) -> dict[str, str | int]:
        """The provenance of a result."""
        return self.settings.provenance(self.pipeline.weights_digest, hashlib.sha256(data).hexdigest())

    # ---- photos ----

    def photos(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """Whole photos; micro-batches fill across them."""
        assert self.restorer is not None
        assert self.settings.photos is not None
        waiting: list[tuple[Job, bytes]] = []

        def decoded() -> Iterator[Photo]:
            for job in jobs:
                data = self.read(job)
                if data is None:
                    continue
                try:
                    photo = decode_photo(data, name=str(job.source))
                except InputError as error:
                    self.fail(job, str(error))
                    continue
                except MemoryError:
                    self.fail(job, "the memory does not suffice to decode it; shrink it, or give the machine more")
                    continue
                waiting.append((job, data))
                yield photo

        for result in self.restorer.many(decoded()):
            job, data = waiting.pop(0)
            try:
                result.check(self.settings.photos)
                yield job, *self.photo(job, data, result)
            except InputError as error:
                self.fail(job, str(error))

    def photo(self, job: Job, data: bytes, result: PhotoResult) -> tuple[dict[str, Any], dict[Path, bytes]]:
        """What is to be said, and written, of a photo.

        Raises:
            InputError: the format cannot hold it.
        """
        settings = self.settings
        writer = PhotoFile(job.format, settings.quality, settings.keep_metadata, self.about(data))
        files = {job.target: writer(result, data)}
        if job.side_by_side is not None:
            before = decode_photo(data, name=str(job.source)).shown
            files = {job.side_by_side: writer.side_by_side(before, result)} | files
        note = "; ".join(filter(None, [result.note(), *result.photo.losses(writer.format)]))
        if result.is_unchanged:
            self.num_unchanged += 1
        if note:
            self.notes.append(f"{job.source}: {note}")
        return {"note": note, "faces": [face.values() for face in result.faces]}, files

    # ---- aligned faces ----

    def faces(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """Aligned faces, a micro-batch at a time."""
        batch: list[tuple[Job, bytes, np.ndarray, Metadata]] = []
        for number, job in enumerate(jobs):
            data = self.read(job)
            if data is not None:
                try:
                    pixels, metadata = decode_with_metadata(data, name=str(job.source))
                    batch.append((job, data, fit_to_side(pixels, self.settings.side), metadata))
                except InputError as error:
                    self.fail(job, str(error))
            if batch and (len(batch) == self.batch_size or number == len(jobs) - 1):
                yield from self.faces_of(batch)
                batch = []

    def faces_of(self, batch: Iterable[tuple[Job, bytes, np.ndarray, Metadata]]) -> Iterator[Done]:
        """The results of a micro-batch."""
        batch = list(batch)
        images = self.pipeline(np.stack([face for _, _, face, _ in batch]), **self.settings.pipeline_options()).images
        for (job, data, face, metadata), image in zip(batch, images, strict=True):
            kept = metadata if self.settings.keep_metadata else Metadata()
            wanted = {job.target: image}
            if job.side_by_side is not None:
                wanted = {job.side_by_side: np.concatenate([face, image], axis=1), **wanted}
            files = {
                path: encode_with_metadata(
                    pixels, job.format, quality=self.settings.quality, metadata=kept, provenance=self.about(data)
                )
                for path, pixels in wanted.items()
            }
            yield job, {}, files


@contextmanager
def details_file(path: Path | None) -> Iterator[TextIO | None]:
    """A text file to add to, or none.

    Raises:
        StorageError: it cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")  # what an earlier run of the command told stays
    except OSError as error:
        raise StorageError(f"--details {path}: {error.strerror}; name another file") from error
    with file:
        yield file
