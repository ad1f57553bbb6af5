"""Settings of the endpoint's deployments on Ray Serve, beside those of the endpoint itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from serve.settings import EndpointSettings


class DeploymentSettings(EndpointSettings):
    """Everything that `serve.app.build_app` takes.

    Raises:
        pydantic.ValidationError: a setting is unknown, of another type or out of range (`from_args`: ConfigError).
        ConfigError: settings that do not go together.
    """

    batch_faces: PositiveInt = Field(16, description="faces that the model restores at a time")
    ongoing_per_replica: PositiveInt = Field(48, description="requests that a model replica holds at a time")

    detector: str | None = Field(
        None, description="the face detector's file; $LDBFR_FACE_DETECTOR, the cache or a download when left out"
    )
    threads: PositiveInt | None = Field(
        None, description="of torch in a model replica; all cores for the only replica, else cpus_per_replica"
    )
    photo_threads: PositiveInt = Field(2, description="of an ingress, for decoding, pasting and encoding")
    ingress_replicas: PositiveInt = Field(1, description="processes that speak HTTP and do all but the networks")
    cpus_per_ingress: NonNegativeFloat = Field(0.25, description="logical CPUs that Ray keeps for one of them")
    cpus_per_replica: NonNegativeFloat = Field(0.5, description="logical CPUs that Ray keeps for a model replica")
    gpus_per_replica: NonNegativeFloat = Field(0.0, description="GPUs of a model replica; 0.5 puts two on one")
    upscale_delay_seconds: NonNegativeFloat = Field(10.0, description="of more work before there is a replica more")
    downscale_delay_seconds: NonNegativeFloat = Field(300.0, description="of less work before there is one less")
    job_workers: str | None = Field(
        None, pattern=r"^[0-9]+(:[0-9]+)?$", description="copies of the model of an archive job: a number, or MIN:MAX"
    )
    health_check_seconds: PositiveFloat = Field(10.0, description="between two checks of a replica")

    @property
    def torch_threads(self) -> int:
        """Of a model replica."""
        if self.threads is not None:
            return self.threads
        if self.max_replicas > 1:
            return max(1, round(self.cpus_per_replica))
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def _problems(self) -> Iterable[str]:
        yield from super()._problems()
        for name in (
            "cpus_per_ingress",
            "cpus_per_replica",
            "gpus_per_replica",
            "upscale_delay_seconds",
            "downscale_delay_seconds",
            "health_check_seconds",
        ):
            if not math.isfinite(getattr(self, name)):
                yield f"{name} {getattr(self, name)}: expected a finite number"
        if self.gpus_per_replica and self.device == "cpu":
            yield (
                f"gpus_per_replica {self.gpus_per_replica:g} with device cpu: the GPUs would stay idle; set it to 0, "
                "or device to cuda"
            )
        if self.device == "cuda" and not self.gpus_per_replica:
            yield "device cuda with gpus_per_replica 0: Ray would hide every GPU from the model; set it to 1"
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            yield f"gpus_per_replica {self.gpus_per_replica:g}: above 1 Ray gives whole GPUs only; the model uses one"
