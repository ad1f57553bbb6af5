"""Settings of the endpoint: frozen, checked as a whole, and made from what Ray Serve passes to `build_app`."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from ldbfr.config import DEFAULT_WEIGHTS, Settings
from ldbfr.errors import ConfigError

MOST_SAMPLES, MOST_STEPS = 8, 50  # what `RestorationOptions` allows at most

_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/\s]+)*/?")
_HOST = re.compile(r"[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]")


def _split(value: Any) -> Any:
    """A text with commas, as a command line gives it, -> its parts."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


class EndpointSettings(Settings):
    """Everything that can be set about the endpoint.

    Limits of requests, bodies and keys count in each ingress process; with several, each has its own.

    Raises:
        pydantic.ValidationError: a setting is unknown, of another type or out of range (`from_args`: ConfigError).
        ConfigError: settings that do not go together.
    """

    weights: str = Field(DEFAULT_WEIGHTS, min_length=1, description="name of weights that come with ldbfr, or a folder")
    device: Literal["cpu", "cuda"] | None = Field(None, description="where the model runs; a GPU where there is one")

    host: str = Field("127.0.0.1", min_length=1, description="where it is reached; beyond loopback it needs keys")
    keys_file: Path | None = Field(None, description="JSON file of API keys; read again whenever it changes")
    allowed_hosts: Names = Field((), description="without keys: names, beside this machine's own, that clients may use")

    max_body_bytes: PositiveInt = Field(20 * 2**20, description="of an upload, with all its form fields")
    max_pixels: PositiveInt = Field(40_000_000, description="width times height of an upload, before it is decoded")
    upload_seconds: PositiveFloat = Field(30.0, description="in which a whole body has to arrive")
    deadline_seconds: PositiveFloat = Field(60.0, description="from the last byte of a body to the end of its answer")
    max_samples: int = Field(MOST_SAMPLES, ge=1, le=MOST_SAMPLES)
    max_steps: int = Field(MOST_STEPS, ge=1, le=MOST_STEPS)
    max_requests: PositiveInt = Field(64, description="restorations at a time in one ingress process; more answer 503")

    min_replicas: PositiveInt = Field(1, description="of the model")
    max_replicas: PositiveInt = Field(1, description="of the model; autoscaling goes from min_replicas to here")
    ongoing_per_replica: PositiveInt = Field(16, description="requests that a model replica holds at a time")
    max_queued: int = Field(32, ge=0, description="requests that wait for a replica; more answer 503")
    batch_faces: PositiveInt = Field(8, description="faces that the model restores at a time")
    batch_wait_seconds: float = Field(0.01, ge=0, description="that a batch waits for more faces")

    job_buckets: Names = Field((), description="places, s3://bucket/prefix, that jobs may read and write")
    page: bool = Field(True, description="whether / is a page for people")
    otlp: bool = Field(False, description="send traces to where OTEL_EXPORTER_OTLP_ENDPOINT says")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> Self:
        """Settings from the `args` of Serve's YAML file, or from `key=value` behind `serve run`.

        Raises:
            ConfigError: listing every setting that is wrong.
        """
        try:
            return cls.model_validate(dict(args))
        except ValidationError as error:
            raise ConfigError("the endpoint's settings cannot be used:\n" + "\n".join(_lines(cls, error))) from error

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse what could not work.

        Raises:
            ConfigError: naming the values, one line each.
        """
        if problems := list(self._problems()):
            raise ConfigError("\n".join(problems))
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    def _problems(self) -> Iterable[str]:
        for name in ("upload_seconds", "deadline_seconds", "batch_wait_seconds"):
            if not math.isfinite(getattr(self, name)):
                yield f"{name} {getattr(self, name)}: expected a number of seconds, such as 30; every request must end"
        if self.keys_file is None and not self.is_loopback:
            yield (
                f"host {self.host} can be reached from other machines, and there are no API keys: set keys_file "
                "(`python -m serve.keys NAME` makes an entry), or host to 127.0.0.1"
            )
        if self.min_replicas > self.max_replicas:
            yield f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}: lower it or raise that"
        if self.ongoing_per_replica < self.batch_faces:
            yield (
                f"ongoing_per_replica {self.ongoing_per_replica} is below batch_faces {self.batch_faces}: a batch of "
                "one-face requests would never fill; raise it to twice batch_faces"
            )
        if self.batch_wait_seconds >= self.deadline_seconds:
            yield (
                f"batch_wait_seconds {self.batch_wait_seconds:g} is not below deadline_seconds "
                f"{self.deadline_seconds:g}: every request would expire in the queue; 0.01 is usual"
            )
        for bucket in self.job_buckets:
            if not _BUCKET.fullmatch(bucket) or {".", ".."} & set(bucket.split("/")):
                yield f"job_buckets {bucket!r}: expected s3://bucket or s3://bucket/prefix"
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                yield f"allowed_hosts {host!r}: expected a host name without scheme and port, such as faces.example.org"


def is_loopback(host: str) -> bool:
    """Whether an address, or `localhost`, can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _lines(settings: type[EndpointSettings], error: ValidationError) -> Iterable[str]:
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"])) or "settings"
        if problem["type"] == "extra_forbidden":
            yield f"  {name}: there is no such setting; there are {', '.join(sorted(settings.model_fields))}"
        else:
            yield f"  {name} {problem['input']!r}: {problem['msg']}"
