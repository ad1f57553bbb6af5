"""Restore files of this machine by a server: what `ldbfr restore --server` does.

The same files come out as without a server: same names, same bytes for the same weights and settings. A result's
provenance is the server's, so what is done already is known by it here too.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ldbfr.archive.file_work import FileWork, Job, is_something_else, provenance_in, provenance_of
from ldbfr.client import (
    AsyncClient,
    ImageRefusedError,
    Limits,
    Model,
    Options,
    Restoration,
    Retries,
    ServerError,
    UnreachableError,
)
from ldbfr.errors import ConfigError, InputError
from ldbfr.images import ImageFormat, fit_to_side, format_of_data
from ldbfr.metadata import decode_with_metadata, encode_with_metadata
from ldbfr.photos.output import PhotoFile
from ldbfr.photos.photo import decode_photo
from ldbfr.photos.restorer import PhotoResult
from ldbfr.progress import Tally

log = logging.getLogger(__name__)

REQUEST_SECONDS = 600.0
"""For one file, with all retries."""
PATIENT = Retries(max_retries=12, longest=20.0)
"""Several files at a time may well ask for more than a key's share."""
SERVED_OPTIONS = {
    *("input", "output", "photos", "faces", "strength", "box", "steps", "condition_scale", "seed", "samples"),
    *("format", "quality", "side_by_side", "details", "overwrite", "server", "workers"),
}
"""Of `ldbfr restore`, what goes along with --server."""
UPLOAD_NAME = re.compile(r"^the (image|upload): ")
"""What a server calls a file, whose name it does not know."""
OF_THE_FILE = (408, 500, 504)
"""Statuses that say that this request failed, and nothing about the next one."""


def check_options(given: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Refuse options of `ldbfr restore` that are not an endpoint's.

    Args:
        given: all options.
        usual: what they are when left out.

    Raises:
        ConfigError: naming the first one.
    """
    for name in sorted(given.keys() - SERVED_OPTIONS):
        if given[name] != usual[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} {given[name]} with --server: that is decided where the endpoint runs; "
                "leave it out, or restore on this machine without --server"
            )
    if given["faces"] not in ("all", "none"):
        raise ConfigError(
            f"--faces {given['faces']} with --server: an endpoint takes all, none, or the faces of --box; name one of "
            "these"
        )


@dataclass
class ServedFiles(FileWork):
    """Restores files by a server, several at a time.

    Args:
        url: its address; the key is the environment's.
        options: of every restoration, but for its format.
        same_format: whether the results' format is the inputs' own, which the server then is not told.
        workers: requests at a time.
        overwrite: see `FileWork`, also for the others.
        retries: when a request is tried again.
    """

    url: str
    options: Options
    same_format: bool = True
    workers: int = 4
    overwrite: bool = False
    details: TextIO | None = None
    retries: Retries = field(default_factory=lambda: PATIENT)
    tally: Tally = field(default_factory=lambda: Tally(0))
    notes: list[str] = field(default_factory=list)
    num_unchanged: int = 0
    settings: dict[ImageFormat | None, str] = field(default_factory=dict)
    """Digests of the settings, by the format that was asked for, as the server's answers have them."""
    learning: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __call__(self, jobs: Sequence[Job]) -> Tally:
        """Restore them; a file that cannot be restored is counted, and does not stop the others.

        Raises:
            ServerError: the server is not there, does not let us in, or has no time for us.
            ConfigError: it does not take the options.
            StorageError: the output itself cannot be written.
        """
        try:
            asyncio.run(self.work(jobs))
        except ExceptionGroup as group:
            raise next(leaves(group)) from None
        return self.tally

    async def work(self, jobs: Sequence[Job]) -> None:
        """All files."""
        async with AsyncClient(self.url, timeout=REQUEST_SECONDS, retries=self.retries) as client:
            models, limits = await client.models(), await client.limits()
            if not models:
                raise ServerError(f"{self.url} has no model; is it an endpoint of ldbfr?")
            model = models[0]
            log.info("%d images; %s restores them with %s (%d px)", len(jobs), self.url, model.name, model.side)
            self.begin(jobs)
            left = iter(jobs)

            async def worker() -> None:
                for job in left:
                    await self.one(client, model, limits, job)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.workers, len(jobs))):
                    group.create_task(worker())

    async def one(self, client: AsyncClient, model: Model, limits: Limits, job: Job) -> None:
        """One file.

        Raises:
            ServerError: see `__call__`, also for the others.
        """
        try:
            data = job.source.read_bytes()
            if len(data) > limits.max_body_bytes:
                raise InputError(
                    f"{len(data):,} bytes, the server takes at most {limits.max_body_bytes:,}; shrink it, or restore "
                    "it without --server"
                )
            if await self.is_done(client, model, job, data):
                self.skip(job)
                return
            answer = await self.ask(client, model, job, data)
            files = await asyncio.to_thread(self.files, job, data, answer)
        except OSError as error:
            self.fail(job, f"{error.strerror}; check its rights")
        except ImageRefusedError as error:
            self.fail(job, UPLOAD_NAME.sub("", error.detail) or str(error))
        except InputError as error:
            self.fail(job, str(error))
        except ServerError as error:
            if not await self.is_of_the_file(client, error):
                raise
            self.fail(job, str(error))
        else:
            self.write(job, self.about(job, data, answer), files)

    async def is_of_the_file(self, client: AsyncClient, error: ServerError) -> bool:
        """Whether an error says nothing about the next file: the server itself is there, and takes requests."""
        if error.status in OF_THE_FILE:
            return True
        if not (isinstance(error, UnreachableError) or error.status in (502, 503)):
            return False
        with suppress(ServerError):
            await client.models()
            return True
        return False

    # ---- what is done ----

    async def is_done(self, client: AsyncClient, model: Model, job: Job, data: bytes) -> bool:
        """Whether all of the result is there.

        The weights and the seed are known, but the digest of the settings is the server's matter. So the first result
        that may be the right one is made once more, to see it.

        Raises:
            InputError: something else is there.
        """
        there = self.there(job, data)
        known = {
            "weights": model.weights_digest,
            "seed": self.options.get("seed", 0),
            "input_sha256": hashlib.sha256(data).hexdigest(),
        }
        found = {path: provenance_of(path) or {} for path in there}
        for path, provenance in found.items():
            if any(provenance.get(name) != value for name, value in known.items()):
                raise is_something_else(path)
        if not there:
            return False
        format = self.format(job, data)
        async with self.learning:
            if format not in self.settings:
                await self.ask(client, model, job, data)
        for path, provenance in found.items():
            if provenance.get("settings") != self.settings.get(format):
                raise is_something_else(path)
        return len(there) == len(job.outputs)

    async def ask(self, client: AsyncClient, model: Model, job: Job, data: bytes) -> Restoration:
        """The server's answer.

        Raises:
            ServerError: also if its weights are others by now.
        """
        format = self.format(job, data)
        options: Options = {**self.options, "format": format}
        answer = await client.restore(data, **options)
        if answer.weights_digest != model.weights_digest:
            raise ServerError(
                f"{self.url} restores with other weights by now ({answer.weights_digest[:12]}, before "
                f"{model.weights_digest[:12]}); results of both would be mixed: give another output, or --overwrite"
            )
        if answer.format != job.format:
            raise ServerError(f"{self.url} gives {answer.format} where {job.format} was asked for; is it up to date?")
        found = None if answer.image == data else provenance_in(answer.image, self.url)
        if found is not None and "settings" in found:
            self.settings[format] = str(found["settings"])
        return answer

    def format(self, job: Job, data: bytes) -> ImageFormat | None:
        """The format that is asked for; None where the server takes it by itself."""
        return None if self.same_format and (format_of_data(data) or "png") == job.format else job.format

    # ---- what is written ----

    def about(self, job: Job, data: bytes, answer: Restoration) -> Mapping[str, Any]:
        """What is to be said of a file, beside its name."""
        self.num_unchanged += answer.image == data
        if self.options.get("mode") == "aligned":
            return {}
        if answer.notes:
            self.notes.append(f"{job.source}: {answer.notes}")
        return {"note": answer.notes, "faces": list(answer.faces)}

    def files(self, job: Job, data: bytes, answer: Restoration) -> dict[Path, bytes]:
        """What is to be written of a file.

        Raises:
            InputError: the format cannot hold it.
        """
        files = {job.target: answer.image}
        return files if job.side_by_side is None else {job.side_by_side: self.side_by_side(job, data, answer), **files}

    def side_by_side(self, job: Job, data: bytes, answer: Restoration) -> bytes:
        """Input and result in one picture, as a run without a server makes it."""
        name, quality = str(job.source), self.options.get("quality", 95)
        provenance = provenance_in(answer.image, self.url)
        if self.options.get("mode") == "aligned":
            pixels, metadata = decode_with_metadata(data, name=name)
            after, _ = decode_with_metadata(answer.image, name=name)
            both = np.concatenate([fit_to_side(pixels, answer.height), after], axis=1)
            return encode_with_metadata(both, job.format, quality=quality, metadata=metadata, provenance=provenance)
        before, result = (decode_photo(file, name=name) for file in (data, answer.image))
        writer = PhotoFile(job.format, quality, provenance=provenance)
        return writer.side_by_side(before.shown, PhotoResult(result))


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group of groups, the first first."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error
