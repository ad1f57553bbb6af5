"""A lock on a folder, on a disk or in a bucket, that ends with its holder.

The lock is a sequence of generations, FOLDER/lease-00000001.json and so on, of which the newest counts. A generation
is taken by creating its file, which of several takers one can do. While its holder lives it counts up a number in the
file; whoever wants the lock watches that number, and takes the next generation when it has not moved for long enough.
So no two machines' clocks are compared: each measures how long something lasts, with a clock that nobody sets.

The holder for its part stops counting itself as one when it could not write for three quarters of that time, before
anybody can have taken over; to go on, it too has to win the next generation. Between two calls of `check` there is no
such guarantee: a process that is stopped in the middle of a write, and goes on later, finishes that write.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldbfr import storage
from ldbfr.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


class LeaseHeldError(StorageError):
    """The lock is held by somebody who is alive."""


class LeaseLostError(StorageError):
    """The lock was held, and is not any more."""


class Record(BaseModel):
    """What a lease's file says."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    holder: str
    """What holds it, in words, such as a command."""
    host: str
    process: int = Field(gt=0, lt=2**31)
    since: str
    """When it was acquired, by the holder's clock: for people only."""
    counter: int
    """Moves while the holder lives."""
    released: bool
    renew_seconds: float = Field(gt=0)
    patience_seconds: float = Field(gt=0)
    token: str
    """Which of all acquisitions this is."""
    boot: str
    """The host's boot and process namespace, within which a process has its number; "" where that is not known."""
    process_started: str
    """When the process started, in ticks after the boot: its number may be given to another later."""

    def to_bytes(self) -> bytes:
        """The file's content, for people to read too."""
        return self.model_dump_json(indent=1).encode()

    def has_died(self) -> bool:
        """Whether the holder is a process of this machine that has ended; False if that cannot be said."""
        here = bool(self.boot) and (self.host, self.boot) == (socket.gethostname(), _boot())
        return here and _has_ended(self.process, self.process_started)

    def __str__(self) -> str:
        return f"{self.holder!r} on host {self.host}, process {self.process}, since {self.since}"


class Lease:
    """The lock on a folder, held from `acquire` to `release`; a context manager that releases it.

    Args:
        folder_uri: a folder for the lease alone, local or s3://.
        holder: who this is, for those who are refused: a command, say.
        renew_seconds: how often the holder shows that it lives.
        patience_seconds: how long it may fail to before others take over; at least twice as long.
    """

    def __init__(
        self, folder_uri: str, holder: str, renew_seconds: float = 5.0, patience_seconds: float = 20.0
    ) -> None:
        if not 0 < 2 * renew_seconds <= patience_seconds:
            raise ConfigError(
                f"a lease renewed every {renew_seconds} s with a patience of {patience_seconds} s: "
                "expected a patience of at least two renewals"
            )
        self.folder_uri, self.generation = folder_uri, 0
        self.record = Record(
            holder=holder,
            host=socket.gethostname(),
            process=os.getpid(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            counter=0,
            released=False,
            renew_seconds=renew_seconds,
            patience_seconds=patience_seconds,
            token=uuid.uuid4().hex,
            boot=_boot(),
            process_started=_process_stat(os.getpid())[1],
        )
        self._renewed = 0.0
        self._lost = self._trouble = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    @classmethod
    def acquire(cls, folder_uri: str, holder: str, renew_seconds: float = 5.0, patience_seconds: float = 20.0) -> Lease:
        """Take the lock on a folder; see the class.

        Takes a moment where nobody holds it or its holder ended on this machine, about a renewal if it is refused, and
        the patience if the holder vanished without a word.

        Raises:
            LeaseHeldError: somebody holds it, who is named.
            StorageError: the folder cannot be read or written.
        """
        lease = cls(folder_uri, holder, renew_seconds, patience_seconds)
        while not lease._take(lease._free_generation()):
            pass  # another was faster: see whether it lives
        lease._thread.start()
        return lease

    def check(self) -> None:
        """Do nothing while the lock is held.

        Raises:
            LeaseLostError: it was lost or released, or has not been renewed for so long that it may be lost.
        """
        if self._lost:
            raise LeaseLostError(self._lost)
        if self._lapsed(_now()):
            raise LeaseLostError(
                f"the lease in {self.folder_uri} could not be renewed for {_now() - self._renewed:.0f} s, so that "
                f"another may have taken it ({self._trouble or 'this process did not run'}); mend this, and give the "
                "same command again"
            )

    def release(self) -> None:
        """Let go of the lock, so that others need not wait; nothing happens if it was lost or released before."""
        self._stop.set()
        self._thread.join(self.record.patience_seconds)
        if not self._lost:
            self.record.released = True
            self._lost = f"the lease in {self.folder_uri} was released"
            try:
                with storage.impatient(self._timeout):
                    storage.write_bytes(self._uri(self.generation), self.record.to_bytes())
            except StorageError as error:
                log.warning("the lease could not be released, so the next one waits: %s", error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    # ---- holding ----

    @property
    def _timeout(self) -> float:
        """How long to wait for an answer: a few must fit into the patience."""
        return self.record.patience_seconds / 4

    def _lapsed(self, now: float) -> bool:
        return now - self._renewed > 0.75 * self.record.patience_seconds

    def _renew_until_stopped(self) -> None:
        pause = self.record.renew_seconds
        while not self._stop.wait(pause):
            try:
                with storage.impatient(self._timeout):
                    self._renew()
                pause, self._trouble = self.record.renew_seconds, ""
            except LeaseLostError as error:
                self._lost = str(error)
                return
            except StorageError as error:
                if not self._trouble:
                    log.warning("the lease could not be renewed, trying again: %s", error)
                pause, self._trouble = min(_POLL_SECONDS, self.record.renew_seconds), str(error)

    def _renew(self) -> None:
        started = _now()
        if not self._lapsed(started):
            self.record.counter += 1
            storage.write_bytes(self._uri(self.generation), self.record.to_bytes())
            if self._newest() > self.generation:
                raise LeaseLostError(self._taken_over())
            if not self._lapsed(_now()):  # else this took so long that `check` has given the lease up meanwhile
                self._renewed = started
                return
        if not self._take(self.generation + 1):  # somebody may be about to take it: one of us gets it
            raise LeaseLostError(self._taken_over())

    def _taken_over(self) -> str:
        """Who has it now, as an error's text."""
        try:
            holder = str(Record.model_validate_json(storage.read_bytes(self._uri(self._newest()))))
        except (StorageError, ValidationError):
            holder = "another process"
        return (
            f"the lease in {self.folder_uri} was taken over by {holder}, because this process did not renew it for "
            f"{self.record.patience_seconds:g} s; stop this one"
        )

    # ---- taking ----

    def _uri(self, generation: int) -> str:
        return storage.join(self.folder_uri, f"lease-{generation:08d}.json")

    def _generations(self) -> list[int]:
        """Those whose files are there, ascending."""
        names = (re.fullmatch(r"lease-(\d{8,})\.json", entry.key) for entry in storage.list_objects(self.folder_uri))
        return sorted(int(match[1]) for match in names if match)

    def _newest(self) -> int:
        return max(self._generations(), default=0)

    def _read(self, generation: int) -> bytes | None:
        """The file of a generation; None if it is not there (any more)."""
        try:
            return storage.read_bytes(self._uri(generation))
        except StorageError:
            if storage.exists(self._uri(generation)):
                raise
            return None

    def _take(self, generation: int) -> bool:
        """Create a generation, and become its holder unless somebody was faster."""
        started, uri = _now(), self._uri(generation)
        try:
            created = storage.create_bytes(uri, self.record.to_bytes())
        except StorageError:
            if not self._is_mine(generation):  # the answer may have been lost, not the request
                raise
            created = True
        if not created and not self._is_mine(generation):
            return False
        *older, newest = self._generations() or [0]
        if newest != generation:  # one who was slow to create a generation that had already been cleaned up
            storage.delete(uri)
            return False
        self.generation, self._renewed = generation, started
        try:
            for number in older:
                storage.delete(self._uri(number))
        except StorageError as error:
            log.warning("an old lease remains, which does no harm: %s", error)
        return True

    def _is_mine(self, generation: int) -> bool:
        data = self._read(generation)
        return data is not None and self.record.token.encode() in data

    def _free_generation(self) -> int:
        """The number of the next generation, as soon as the newest is nobody's.

        Raises:
            LeaseHeldError: it is somebody's.
        """
        seen: tuple[int, bytes] | None = None
        since = 0.0
        while True:
            asked, newest = _now(), self._newest()
            if not newest:
                return 1
            data = self._read(newest)
            if data is not None:  # else a newer one has come meanwhile
                record, holder = self._who(newest, data, first=seen is None)
                if record is not None and (record.released or record.has_died()):
                    if not record.released:
                        log.warning("taking over from %s, which has ended without a word", holder)
                    return newest + 1
                if seen is None or seen[0] != newest:
                    seen, since = (newest, data), _now()
                elif seen[1] != data:
                    raise LeaseHeldError(
                        f"{self.folder_uri} is in use by {holder}: wait until that has ended, stop it, or choose "
                        "another folder"
                    )
                elif asked - since >= max(self.record.patience_seconds, record.patience_seconds if record else 0.0):
                    log.warning("taking over from %s, of which nothing was heard for %.0f s", holder, asked - since)
                    return newest + 1
            time.sleep(min(_POLL_SECONDS, self.record.renew_seconds / 4))

    def _who(self, generation: int, data: bytes, first: bool) -> tuple[Record | None, str]:
        """A generation's record, None if it is damaged, and its holder in words; `first`: when it is seen first."""
        uri, patience = self._uri(generation), self.record.patience_seconds
        try:
            record = Record.model_validate_json(data)
        except ValidationError as error:
            if first:
                reason = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
                log.warning("%s is damaged (%s): waiting %g s for a sign of its holder", uri, reason, patience)
            return None, f"a process that cannot be named, for {uri} is damaged"
        if first and not record.released and not record.has_died():
            log.info(
                "%s is held by %s: waiting up to %g s to see whether that lives", self.folder_uri, record, patience
            )
        return record, str(record)


def holder_of(folder_uri: str) -> Record | None:
    """Who holds the lock on a folder, alive or not, without asking for it; None if nobody does.

    Raises:
        StorageError: the folder cannot be read.
    """
    found = max((entry for entry in storage.list_objects(folder_uri)), key=lambda entry: entry.key, default=None)
    if found is None:
        return None
    try:
        record = Record.model_validate_json(storage.read_bytes(found.uri))
    except ValidationError:
        return None
    return None if record.released or record.has_died() else record


def _now() -> float:
    """Seconds on a clock that nobody sets, and that goes on while the machine sleeps where there is such a one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _boot() -> str:
    """What this boot of the machine and this process namespace are called; "" where that cannot be said."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # a container may share the host's name, not its processes
    except OSError:
        return ""


def _process_stat(process: int) -> tuple[str, str]:
    """State and start (in ticks after the boot) of a process of this machine; "" where they cannot be said."""
    try:
        # The second field is the command in parentheses, which may hold anything.
        fields = Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _has_ended(process: int, started: str) -> bool:
    """Whether the process of this number that started then has ended; False if that cannot be said."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, and alive
    state, started_now = _process_stat(process)
    return state in ("Z", "X") or (bool(started_now) and started_now != started)
