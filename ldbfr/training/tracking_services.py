"""MLflow and Weights & Biases as trackers (`trackers.py`), each through its own library, imported when it is asked for.

A continued training continues the same run there, whose id follows from the URI of the stage's folder. Both keep what
was logged between the checkpoint and the interruption, so those steps appear twice; in TensorBoard they are replaced.

Where to, and who: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME; WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE,
WANDB_DIR, as the two libraries read them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldbfr.errors import ConfigError
from ldbfr.images import Pixels
from ldbfr.storage import is_local, local_path
from ldbfr.training.base import flatten

log = logging.getLogger(__name__)

PROJECT = "ldbfr"
"""The MLflow experiment and the W&B project, unless the environment names another."""

START_SECONDS = 60
FINISH_SECONDS = 60
"""How long W&B may take to find its server, and to send the last values."""


def run_id(stage_uri: str) -> str:
    """What names a stage's run in MLflow and W&B: 16 hexadecimal digits that follow from its absolute URI."""
    place = str(local_path(stage_uri).resolve()) if is_local(stage_uri) else stage_uri.rstrip("/")
    return hashlib.sha256(place.encode()).hexdigest()[:16]


class MLflowTracker:
    """A run of an MLflow tracking server, through MLflow's own client.

    Every call waits for the server, and fails with MLflow's errors.

    Args:
        stage_uri: RUN/<stage>; a run that was tagged with its `run_id` is continued.
        run_name: what people see.
        settings: logged as parameters; those that the run has already are left as they are.

    Raises:
        ConfigError: the extra `mlflow` is not installed.
    """

    def __init__(self, stage_uri: str, run_name: str, settings: dict[str, Any]) -> None:
        # Background repeats what fails, and urllib3 warns of each of the seven attempts that MLflow would make itself.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        try:
            from mlflow import MlflowClient, entities
        except ImportError as error:
            raise ConfigError(f"tracker mlflow is not installed ({error}): pip install 'ldbfr[mlflow]'") from error
        self._entities: Any = entities
        self._client_class: Callable[[], Any] = MlflowClient
        self._client: Any = None
        self._run = ""
        self.stage_uri, self.run_name, self.settings = stage_uri, run_name, flatten(settings)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log values by name."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._connected().log_batch(self._run, metrics=metrics)

    def image(self, name: str, step: int, pixels: Pixels) -> None:
        """Log a picture among the run's artifacts."""
        self._connected().log_image(self._run, pixels, key=name.replace("/", "."), step=step)  # it names a file

    def flush(self) -> None:
        """Every call is delivered at once."""

    def close(self) -> None:
        """Say that the run has ended."""
        if self._run:
            self._client.set_terminated(self._run)

    def _connected(self) -> Any:
        """The client, once the run is there; what fails half-way is found and completed by the next call."""
        if self._run:
            return self._client
        client = self._client_class()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        tags = {"ldbfr.run": run_id(self.stage_uri), "ldbfr.uri": self.stage_uri}
        wanted = f"tags.`ldbfr.run` = '{tags['ldbfr.run']}'"
        found = client.search_runs([experiment_id], wanted, max_results=1)
        run = found[0] if found else client.create_run(experiment_id, tags=tags, run_name=self.run_name)
        client.update_run(run.info.run_id, status="RUNNING")
        missing = [
            self._entities.Param(key, str(value)[:500])  # the longest that every version takes
            for key, value in self.settings.items()
            if key not in run.data.params
        ]
        for start in range(0, len(missing), 100):  # the most that one request may have
            client.log_batch(run.info.run_id, params=missing[start : start + 100])
        self._client, self._run = client, run.info.run_id
        return client


class WandbTracker:
    """A run of Weights & Biases, through its own library.

    Where its server does not answer at the start, the run is kept on this machine, below WANDB_DIR or beside the
    stage's results, and a warning says how to send it later. An outage after the start is W&B's own matter: it keeps
    trying, and gives up `FINISH_SECONDS` after the end.

    Args:
        stage_uri: RUN/<stage>; the run is `run_id` of it.
        run_name: what people see.
        settings: logged as the run's configuration.

    Raises:
        ConfigError: the extra `wandb` is not installed.
    """

    def __init__(self, stage_uri: str, run_name: str, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"tracker wandb is not installed ({error}): pip install 'ldbfr[wandb]'") from error
        self._wandb: Any = wandb
        self._run: Any = None
        self.stage_uri, self.run_name, self.settings = stage_uri, run_name, flatten(settings)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log values by name."""
        self._started().log({**values, "step": step})

    def image(self, name: str, step: int, pixels: Pixels) -> None:
        """Log a picture."""
        self._started().log({name: self._wandb.Image(pixels), "step": step})

    def flush(self) -> None:
        """W&B sends by itself, within seconds."""

    def close(self) -> None:
        """Send what is left, and end the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def folder(self) -> str:
        """Where W&B keeps a run's files on this machine."""
        if named := os.environ.get("WANDB_DIR"):
            return named
        folder = local_path(self.stage_uri) if is_local(self.stage_uri) else Path(tempfile.gettempdir()) / "ldbfr"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def _started(self) -> Any:
        if self._run is None:
            folder = self.folder()
            try:
                self._run = self._init(folder, None)
            except self._wandb.errors.Error as error:
                self._wandb.teardown()  # it would call the run's id taken
                self._run = self._init(folder, "offline")
                log.warning(
                    "Weights & Biases cannot be used now (%s). Training goes on, and the run is kept in %s: send it "
                    "with `wandb sync`",
                    error, self._run.settings.sync_dir,
                )  # fmt: skip
            # Not W&B's own step, which must never fall, as it does when training continues at a checkpoint.
            self._run.define_metric("*", step_metric="step")
        return self._run

    def _init(self, folder: str, mode: str | None) -> Any:
        return self._wandb.init(
            id=run_id(self.stage_uri),
            resume=None if mode else "allow",
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=self.run_name,
            config=self.settings,
            dir=folder,
            mode=mode,
            reinit="create_new",
            settings=self._wandb.Settings(
                console="off", silent=True, init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS
            ),
        )
