"""What the endpoint tells about itself: Prometheus metrics, JSON log lines, OpenTelemetry traces.

None of them holds any part of an image, a key, or a query string.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from serve.protocol import Restored

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BYTES = tuple(4.0**power * 1024 for power in range(9))

_RECORD = frozenset(vars(logging.makeLogRecord({})))


class Metrics:
    """The metrics of one ingress process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own: dict[str, Any] = {"namespace": "ldbfr", "registry": self.registry}
        self.requests = Counter("requests_total", "Requests that ended", ("method", "route", "status"), **own)
        self.request_seconds = Histogram(
            "request_seconds", "From the head of a request to the end of its answer", ("route",), buckets=SECONDS, **own
        )
        self.in_progress = Gauge("requests_in_progress", "Requests that are being read or answered", **own)
        self.problems = Counter("problems_total", "Requests that were answered with a problem", ("problem",), **own)
        self.upload_bytes = Histogram("upload_bytes", "Sizes of images that were accepted", buckets=BYTES, **own)
        self.stage_seconds = Histogram(
            "stage_seconds",
            "Time of a restoration by stage: decode, detect, queue, model, paste, encode",
            ("stage",),
            buckets=SECONDS,
            **own,
        )
        self.faces = Counter("faces_total", "Faces that were found in photos that were restored", **own)

    def restored(self, result: Restored) -> None:
        """Count a restoration."""
        for stage, seconds in result.timings.items():
            self.stage_seconds.labels(stage).observe(seconds)
        self.faces.inc(len(result.faces))

    def text(self) -> bytes:
        """All of them, as Prometheus reads it."""
        return generate_latest(self.registry)


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON, with what was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _RECORD},
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def log_as_json(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Let the loggers `serve` and `ldbfr` write JSON lines, to standard error by default; others stay as they are."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    for name in ("serve", "ldbfr"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of bytes that a client sent


def make_tracer() -> Tracer:
    """A tracer whose spans go to where OTEL_EXPORTER_OTLP_ENDPOINT says, in batches."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "ldbfr"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("ldbfr.serve")


def server_timing(timings: Mapping[str, float]) -> str:
    """Seconds by stage -> the header Server-Timing."""
    return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in timings.items())
