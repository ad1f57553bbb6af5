"""Where the numbers and pictures of a training go: TensorBoard always, MLflow and Weights & Biases on request.

Training neither waits for a tracker nor fails with one: `make_trackers` gives each a thread of its own (`Background`).
When its server is down or its disk is full, one warning says so, values wait in memory, and what cannot be delivered in
the end is lost to that tracker alone.
"""

from __future__ import annotations

import logging
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from ldbfr.errors import ConfigError
from ldbfr.images import Pixels, encode_image
from ldbfr.storage import is_local, join, local_path, put_file, write_bytes
from ldbfr.training.base import flatten
from ldbfr.training.tracking_services import MLflowTracker, WandbTracker

log = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "mlflow", "wandb")
"""The trackers by name; the first is always there."""

MAX_WAITING = 500
"""Calls that wait for a slow tracker; then the oldest is left out for the newest."""

ATTEMPTS = 5
RETRY_SECONDS = 30.0
CLOSE_SECONDS = 70.0
"""Patience at the end of a stage, a little more than what W&B is given to send its last values."""
ROTATE_BYTES = 8 * 2**20
"""Size from which a bucket's event file is left as it is and a new one begun: every flush sends the whole of it."""


class Tracker(Protocol):
    """A place for the numbers and pictures of one stage's training."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Note values by name, after so many steps."""

    def image(self, name: str, step: int, pixels: Pixels) -> None:
        """Keep a picture, (H, W, 3) uint8."""

    def flush(self) -> None:
        """Bring everything noted so far to where others see it."""

    def close(self) -> None:
        """Flush and end; nothing may be noted afterwards."""


def make_trackers(
    names: Sequence[str], stage_uri: str, run_name: str, settings: dict[str, Any], purge_step: int
) -> list[Tracker]:
    """The trackers of a stage, each in its own thread.

    Args:
        names: some of `TRACKERS`; TensorBoard comes whether it is named or not.
        stage_uri: RUN/<stage>, local or in a bucket.
        run_name: what people see in MLflow and W&B.
        settings: logged once; nested tables appear under dotted names.
        purge_step: steps done so far; what an interrupted process noted after it counts no more.

    Raises:
        ConfigError: an unknown name, or one whose library is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"no tracker {name!r}: give some of {', '.join(TRACKERS)}")
    trackers: list[Tracker] = []
    for name in TRACKERS:
        tracker: Tracker
        if name == "tensorboard":
            tracker = TensorBoardTracker(join(stage_uri, "tensorboard"), purge_step, settings)
        elif name not in names:
            continue
        else:
            tracker = (MLflowTracker if name == "mlflow" else WandbTracker)(stage_uri, run_name, settings)
        trackers.append(Background(name, tracker))
    return trackers


class Background:
    """A tracker at work in a thread of its own: calls return at once, and its failures are warnings.

    A call that fails is repeated every `retry_seconds`, `ATTEMPTS` times in all. The first failure gives a warning, the
    others none until it works again. `close` waits for what is left for at most `close_seconds`, and hardly at all
    for a tracker that is failing.

    Args:
        name: in the warnings.
        tracker: used by this thread alone from now on.
        retry_seconds: between attempts.
        close_seconds: patience of `close`.
    """

    def __init__(
        self, name: str, tracker: Tracker, retry_seconds: float = RETRY_SECONDS, close_seconds: float = CLOSE_SECONDS
    ) -> None:
        self.name, self.tracker = name, tracker
        self.retry_seconds, self.close_seconds = retry_seconds, close_seconds
        self.failing, self.num_lost = False, 0
        self._warned = False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Note values by name, soon."""
        self._put(partial(self.tracker.scalars, step, dict(values)))

    def image(self, name: str, step: int, pixels: Pixels) -> None:
        """Keep a picture, soon."""
        self._put(partial(self.tracker.image, name, step, pixels))

    def flush(self) -> None:
        """Flush, soon."""
        self._put(self.tracker.flush)

    def close(self) -> None:
        """Wait until all is delivered, within limits, and end the thread; a second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._put(None)
        self._thread.join(min(5.0, self.close_seconds) if self.failing else self.close_seconds)
        unfinished = self._thread.is_alive()
        if self.num_lost or unfinished:
            level = logging.INFO if self._warned else logging.WARNING
            log.log(
                level, "%s lacks some of what was noted: %d calls lost%s",
                self.name, self.num_lost, ", the last ones still under way" if unfinished else "",
            )  # fmt: skip

    def _put(self, call: Callable[[], None] | None) -> None:
        while True:
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                try:
                    self._calls.get_nowait()
                except queue.Empty:
                    continue
                self.num_lost += 1
            else:
                return

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if not self._attempt(call):
                self.num_lost += 1
                if self._closing.is_set():
                    self.num_lost += self._calls.qsize() - 1
                    break
        self._try(self.tracker.close)

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Make a call, again and again if need be; once the tracker is being closed, only once more."""
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1 or self._closing.is_set()
            if self._try(call):
                if self.failing:
                    log.info("%s works again", self.name)
                self.failing = False
                return True
            if last:
                break
            self._closing.wait(self.retry_seconds)
        return False

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # noqa: BLE001  # whatever a tracker's library raises, training must not end by it
            if not self.failing:
                log.warning(
                    "%s does not take what is noted (%s: %s). Training goes on; up to %d calls wait, and it is tried "
                    "again every %.0f s",
                    self.name, type(error).__name__, error, MAX_WAITING, self.retry_seconds,
                )  # fmt: skip
            self.failing = self._warned = True
            return False
        return True


class PictureFiles:
    """Pictures as files, FOLDER/step-00001000.png; numbers are not kept.

    Args:
        folder_uri: local or in a bucket.
    """

    def __init__(self, folder_uri: str) -> None:
        self.folder_uri = folder_uri

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers are not kept."""

    def image(self, name: str, step: int, pixels: Pixels) -> None:
        """Write a picture; one of the same step is replaced."""
        write_bytes(join(self.folder_uri, f"step-{step:08d}.png"), encode_image(pixels, "png"))

    def flush(self) -> None:
        """Every file is written at once."""

    def close(self) -> None:
        """Nothing is open."""


class TensorBoardTracker:
    """TensorBoard's event files. For a bucket they are written on this machine and put there by `flush`.

    Args:
        folder_uri: local or in a bucket; every process adds files of its own.
        purge_step: steps done so far; TensorBoard drops what earlier files say of later ones.
        settings: shown as a table, if any are given.
    """

    def __init__(self, folder_uri: str, purge_step: int, settings: dict[str, Any] | None = None) -> None:
        self.folder_uri, self.settings = folder_uri, flatten(settings or {})
        self._purge_step: int | None = purge_step
        self._local = is_local(folder_uri)
        self._folder = local_path(folder_uri) if self._local else Path(tempfile.mkdtemp(prefix="ldbfr-events-"))
        self._writer: Any = None
        self._sent: dict[Path, int] = {}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Note values by name."""
        with self._writing() as writer:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

    def image(self, name: str, step: int, pixels: Pixels) -> None:
        """Keep a picture."""
        with self._writing() as writer:
            writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Write to disk and, for a bucket, put the files that grew there.

        Raises:
            StorageError: the bucket does not take them; they stay on this machine for the next flush.
        """
        if self._writer is not None:
            with self._writing() as writer:
                writer.flush()
        if self._local:
            return
        for file in sorted(self._folder.iterdir()):
            size = file.stat().st_size
            if self._sent.get(file) != size:
                put_file(file, join(self.folder_uri, file.name))
                self._sent[file] = size
        if sum(self._sent.values()) > ROTATE_BYTES:
            self._end_files()

    def close(self) -> None:
        """Flush and end."""
        self.flush()
        self._end_files()
        if not self._local:
            shutil.rmtree(self._folder)

    def _end_files(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for file in self._sent:
            file.unlink()
        self._sent.clear()

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """The writer; after a failure (a full disk), the next one is new, since this one's thread has ended."""
        try:
            if self._writer is None:
                first = self._purge_step
                # TensorBoard drops the named step too, but the checkpoint's own values stand.
                self._writer = SummaryWriter(str(self._folder), purge_step=None if first is None else first + 1)
                if first is not None and self.settings:
                    rows = "\n".join(f"| {key} | {value} |" for key, value in self.settings.items())
                    self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", first)
                self._purge_step = None
            yield self._writer
        except OSError:
            self._writer = None
            raise
