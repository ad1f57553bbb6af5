"""`ldbfr archive`: runs of jobs/restore.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ldbfr.places import absolute


@dataclass(frozen=True)
class ArchiveStatus:
    """Tell how far a run of jobs/restore.py is, and who is at work on it."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's --output: a folder or s3://bucket/prefix."""

    def __call__(self) -> int:
        """Print."""
        from ldbfr.archive.commands import status

        print(status(absolute(self.run)))
        return 0


@dataclass(frozen=True)
class ArchiveReport:
    """Write report.html from what a run's manifest has by now."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's --output: a folder or s3://bucket/prefix."""

    def __call__(self) -> int:
        """Write it, and say where."""
        from ldbfr.archive.run import report

        print(report(absolute(self.run)))
        return 0


@dataclass(frozen=True)
class ArchiveRetryFailed:
    """Let the same command try the failed inputs of a run again; what was restored stays as it is.

    Until the command has been given, the manifest keeps the failed rows.
    """

    run: Annotated[str, tyro.conf.Positional]
    """The run's --output: a folder or s3://bucket/prefix."""

    def __call__(self) -> int:
        """Mark them, and say what to do."""
        from ldbfr.archive.commands import retry_failed

        print(retry_failed(absolute(self.run)))
        return 0


@dataclass(frozen=True)
class ArchiveCommands:
    """Look at a run of jobs/restore.py, report on it, or let it try again what failed.

    ldbfr archive status s3://bucket/restored
    """

    command: (
        Annotated[ArchiveStatus, tyro.conf.subcommand("status", prefix_name=False)]
        | Annotated[ArchiveReport, tyro.conf.subcommand("report", prefix_name=False)]
        | Annotated[ArchiveRetryFailed, tyro.conf.subcommand("retry-failed", prefix_name=False)]
    )

    def __call__(self) -> int:
        """Do what was chosen."""
        return self.command()
