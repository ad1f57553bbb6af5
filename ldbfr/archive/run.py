"""A run: what it was asked to do, kept beside its results, and how it stands.

_ldbfr/run.json      software, inputs, weights, settings; another request on the same output is refused
_ldbfr/lock/         who is at work on it, see `ldbfr.lease`
_ldbfr/status.json   the line of progress, for others to read
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ldbfr import __version__, storage
from ldbfr.archive.gallery import Gallery
from ldbfr.archive.ledger import (
    Counts,
    manifest_folder,
    read_again,
    read_counts,
    read_record,
    record_uri,
    recorded_units,
    sum_counts,
)
from ldbfr.archive.listing import is_planned, work_uri
from ldbfr.archive.naming import WORK_FOLDER
from ldbfr.archive.parts import PartInfo, part_numbers, part_uri
from ldbfr.archive.plan import UnitId
from ldbfr.archive.report import write_report
from ldbfr.archive.settings import RunSettings, Weights
from ldbfr.archive.summary import summarise
from ldbfr.errors import ConfigError, InputError, StorageError
from ldbfr.inputs.sources import check_source, label_sources
from ldbfr.lease import Record, holder_of
from ldbfr.places import overlap, place
from ldbfr.tables import read_rows

log = logging.getLogger(__name__)

OPTIONS = {"inputs": "input", "first_stage": "first-stage", "keep_metadata": "no-keep-metadata"}


def check_places(inputs: Sequence[str], output: str) -> None:
    """Refuse places where results could overwrite inputs, and inputs that are not there; the output may lie in one.

    Raises:
        ConfigError: the same place, the input inside the output, or one input in another.
        InputError: a local input that does not exist, or is of no known kind.
    """
    for source in inputs:
        if overlap(source, output):
            if place(source) == place(output):
                raise ConfigError(f"--output {output} is the input: results would overwrite it; name another folder")
            if len(place(source)) > len(place(output)):
                raise ConfigError(
                    f"--input {source} lies inside --output {output}: results could overwrite it; name another"
                )
        check_source(source)
    label_sources(inputs)


@dataclass(frozen=True)
class Run:
    """The run in a folder.

    Args:
        output: its URI, absolute.
        settings: what makes it itself.
    """

    output: str
    settings: RunSettings

    def begin(self, weights: Weights, command: str) -> None:
        """Write down what is asked for; the lock must be held.

        Raises:
            ConfigError: something else was asked for before on this output; the text shows the difference.
            StorageError: the output cannot be written.
        """
        uri = run_uri(self.output)
        if storage.exists(uri):
            self.check_same(json.loads(storage.read_bytes(uri)))
            return
        about = {
            "software": f"ldbfr {__version__}",
            "command": command,
            "inputs": list(self.settings.inputs),
            "weights": {
                "name": weights.reference,
                "digest": weights.digest,
                "preset": weights.preset.name,
                "side": weights.preset.side,
            },
            "settings": self.settings.values(),
            "settings_digest": self.settings.restore.digest(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        storage.write_bytes(uri, json.dumps(about, indent=1).encode())

    def forget(self) -> None:
        """Let another request be made on this output: nothing was done of this one."""
        storage.delete(run_uri(self.output))

    def check_same(self, there: dict[str, Any]) -> None:
        """ConfigError, with the difference, unless these are the settings."""
        before = there.get("settings", {})
        if "shard_images" not in before:
            raise ConfigError(f"--output {self.output} holds a run of an older ldbfr; name another output")
        now = json.loads(json.dumps(self.settings.values()))
        different = [
            f"{option(name)} {shown(before.get(name))} there, {shown(now[name])} now"
            for name in now
            if before.get(name) != now[name]
        ]
        if different:
            raise ConfigError(
                f"--output {self.output} was begun with other settings ({'; '.join(different)}); repeat those to go "
                "on, or name another output"
            )


def option(name: str) -> str:
    """The option that a setting is given by."""
    return "--" + OPTIONS.get(name, name.replace("_", "-"))


def shown(value: Any) -> str:
    """A setting's value, short enough for a line; of a digest the beginning."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text


def run_uri(output: str) -> str:
    """What the run was asked to do."""
    return storage.join(output, WORK_FOLDER, "run.json")


def lock_uri(output: str) -> str:
    """Where the lock is."""
    return storage.join(output, WORK_FOLDER, "lock")


def status_uri(output: str) -> str:
    """The line of progress."""
    return storage.join(output, WORK_FOLDER, "status.json")


def write_status(output: str, line: str) -> None:
    """Tell others how far the run is; that may fail without harm."""
    try:
        storage.write_bytes(status_uri(output), json.dumps({"line": line, "at": time.time()}).encode())
    except StorageError as error:
        log.warning("the status could not be written: %s", error)


@dataclass(frozen=True)
class Standing:
    """How a run stands."""

    about: dict[str, Any]
    parts: Sequence[PartInfo] | None
    """Of its plan; None while it is listed."""
    counts: Counts
    """What the manifest has, but for what is to be done again."""
    recorded: Counts
    """What is done besides, and goes into the manifest with others."""
    holder: Record | None
    """Who is at work on it, as far as is known."""
    line: str | None
    """The last line of progress."""

    @property
    def planned(self) -> int:
        """Inputs."""
        return sum(part.rows for part in self.parts or ())

    @property
    def finished(self) -> bool:
        """Whether every input has its row in the manifest."""
        return self.parts is not None and self.counts.total == self.planned


def read_standing(output: str) -> Standing:
    """How the run in a folder stands.

    Raises:
        InputError: there is no run.
        StorageError: it cannot be read.
    """
    if not storage.exists(run_uri(output)):
        raise InputError(f"{output}: there is no run of jobs/restore.py; give the folder that was its --output")
    about: dict[str, Any] = json.loads(storage.read_bytes(run_uri(output)))
    parts = read_rows(work_uri(output, "index.parquet"), PartInfo) if is_planned(output) else None
    units = open_units(output)
    recorded = sum_counts(Counts.of(read_record(output, unit).rows) for unit in units)
    status = json.loads(storage.read_bytes(status_uri(output))) if storage.exists(status_uri(output)) else {}
    line = None
    if status:
        line = f"{status['line']} (told {datetime.fromtimestamp(status['at'], UTC):%Y-%m-%d %H:%M:%S} UTC)"
    again = (counts for one in read_again(output).values() for counts in one.units.values())
    counts = sum_counts(read_counts(output).values()).minus(sum_counts(again))
    return Standing(about, parts, counts, recorded, holder_of(lock_uri(output)), line)


def open_units(output: str) -> list[UnitId]:
    """Recorded units of parts that are not in the manifest yet."""
    finished = part_numbers(manifest_folder(output))
    return [unit for unit in recorded_units(output)[0] if unit.part not in finished]


def report(output: str) -> str:
    """Write report.html from what is done by now; its URI.

    Raises:
        InputError: there is no run, or nothing of it is listed yet.
        StorageError: it cannot be read, or the report not written.
    """
    standing = read_standing(output)
    if standing.parts is None:
        raise InputError(f"{output}: the inputs are not listed yet; run the job, then ask for the report again")
    folder = manifest_folder(output)
    parts = [part_uri(folder, number) for number in part_numbers(folder)]
    units = open_units(output)
    summary = summarise(output, [*parts, *(record_uri(output, unit) for unit in units)])
    gallery = Gallery.read(output)
    for unit in units:
        gallery.add(read_record(output, unit).pictures)
    return write_report(
        output,
        summary,
        gallery,
        standing.about,
        finished=standing.finished,
        planned=standing.planned,
        num_done=standing.counts.plus(standing.recorded).total,
    )
