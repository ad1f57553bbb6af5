"""What restoring files of this machine takes, whoever restores them: this process, or a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.images import ImageFormat, format_from_name
from ldbfr.metadata import read_provenance
from ldbfr.progress import Progress, Tally

NOTES_SHOWN = 20


@dataclass(frozen=True)
class Job:
    """One file, and where its result goes."""

    source: Path
    target: Path
    side_by_side: Path | None = None

    @property
    def outputs(self) -> list[Path]:
        """All files that are written."""
        return [self.target, *([] if self.side_by_side is None else [self.side_by_side])]

    @property
    def format(self) -> ImageFormat:
        """Of the result."""
        return format_from_name(self.target.name)


class FileWork:
    """Keeps account of files: what is restored, failed, done already; subclasses are dataclasses with these fields.

    Args:
        overwrite: replace files that are not of this input, weights and settings.
        details: gets a line of JSON for every file.
        tally: of what came of them.
        notes: what a person should know of a file that was restored, in lines.
        num_unchanged: of the restored ones, those in which nothing was to be done.
    """

    overwrite: bool
    details: TextIO | None
    tally: Tally
    notes: list[str]
    num_unchanged: int
    progress: Progress

    def begin(self, jobs: Sequence[Job]) -> None:
        """There are so many."""
        self.tally.planned = len(jobs)
        self.progress = Progress(self.tally)

    def summary(self) -> list[str]:
        """What came of it, in lines."""
        lines = [self.progress.summary()]
        if self.num_unchanged:
            lines.append(f"  {self.num_unchanged:,} of the restored had nothing to restore, and are as they were")
        if self.tally.skipped:
            lines.append(f"  {self.tally.skipped:,} were skipped: they are done already")
        lines += self.tally.describe_failures()
        shown, rest = self.notes[:NOTES_SHOWN], len(self.notes) - NOTES_SHOWN
        return lines + [f"  {note}" for note in shown] + ([f"  … and {rest:,} more: see --details"] if rest > 0 else [])

    def there(self, job: Job, data: bytes) -> list[Path]:
        """The results that are there and may be what is wanted: none where they are to be made anew.

        A copy of the input is none: other settings may find faces in it.

        Raises:
            OSError: a file cannot be read.
        """
        paths = [] if self.overwrite else [path for path in job.outputs if path.exists()]
        return [] if job.target in paths and job.target.read_bytes() == data else paths

    def write(self, job: Job, about: Mapping[str, Any], files: Mapping[Path, bytes]) -> None:
        """Write a file's results, the result itself last, and count it.

        Raises:
            StorageError: the output cannot be written.
        """
        for target, content in files.items():
            storage.write_bytes(str(target.absolute()), content)
        self.tally.restored += 1
        self.tell({"input": str(job.source), "output": str(job.target), "status": "restored", **about})
        self.progress.update()

    def skip(self, job: Job) -> None:
        """Count a file that is done already."""
        self.tally.skipped += 1
        self.tell({"input": str(job.source), "output": str(job.target), "status": "done already"})
        self.progress.update()

    def fail(self, job: Job, reason: str) -> None:
        """Count a file that failed."""
        text = reason.removeprefix(f"{job.source}: ")
        self.tally.fail(f"{job.source}: {text}")
        self.tell({"input": str(job.source), "status": "failed", "reason": text})
        self.progress.update()

    def tell(self, line: Mapping[str, Any]) -> None:
        """Add a line to the details."""
        if self.details is not None:
            self.details.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.details.flush()


def is_something_else(path: Path) -> InputError:
    """What to say of a file that is in the way."""
    return InputError(f"{path} is there already, and is of other settings or another input; see --overwrite")


def provenance_of(path: Path) -> dict[str, Any] | None:
    """What a file says of where it comes from; None if it is no result of ours."""
    return provenance_in(path.read_bytes(), str(path))


def provenance_in(data: bytes, name: str) -> dict[str, Any] | None:
    """The same, of a file's bytes."""
    try:
        return read_provenance(data, name=name)
    except InputError:
        return None
