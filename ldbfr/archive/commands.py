"""`ldbfr archive status|report|retry-failed`: what an archive's run has done, for people."""

from __future__ import annotations

from ldbfr.archive.ledger import do_again
from ldbfr.archive.parts import plan_folder
from ldbfr.archive.run import Standing, lock_uri, read_standing
from ldbfr.errors import ConfigError
from ldbfr.lease import Lease


def status(output: str) -> str:
    """How the run in a folder stands, in a few lines.

    Raises:
        InputError: there is no run.
        StorageError: it cannot be read.
    """
    standing = read_standing(output)
    lines = [f"{output}: {headline(standing)}"]
    if standing.parts is not None:
        done = standing.counts.plus(standing.recorded)
        lines.append(
            f"  {done.total:,} of {standing.planned:,} inputs: {done.restored:,} restored, {done.failed:,} failed, "
            f"{done.skipped:,} skipped"
        )
    if standing.recorded.total:
        lines.append(f"  {standing.recorded.total:,} of them go into the manifest once their neighbours are done")
    if standing.line and not standing.finished:
        lines.append(f"  last line of progress: {standing.line}")
    lines.append(f"  inputs: {', '.join(standing.about['inputs'])}")
    lines.append(f"  command: {standing.about.get('command', 'unknown')}")
    if standing.counts.failed or standing.recorded.failed:
        lines.append(f"  to try the failed ones again: ldbfr archive retry-failed {output}")
    return "\n".join(lines)


def headline(standing: Standing) -> str:
    """Finished, at work, or stopped."""
    if standing.holder is not None:
        return f"held by {standing.holder}"
    if standing.finished:
        return "finished"
    if standing.parts is None:
        return "stopped while its inputs were listed; the same command goes on"
    return "stopped; the same command goes on"


def retry_failed(output: str) -> str:
    """Ask for the failed inputs of a run again; what to do next, in words.

    Raises:
        InputError: there is no run.
        LeaseHeldError: it is at work.
        ConfigError: its inputs are not listed yet.
    """
    standing = read_standing(output)
    if standing.parts is None:
        raise ConfigError(f"{plan_folder(output)}: the inputs are not listed yet; run the job first")
    with Lease.acquire(lock_uri(output), "`ldbfr archive retry-failed`"):
        count = do_again(output, "failed")
    if not count:
        return f"{output}: nothing to try again"
    return f"{count:,} failed inputs will be tried again by the same command:\n  {standing.about['command']}"
