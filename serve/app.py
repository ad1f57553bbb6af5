"""The endpoint on Ray Serve.

    serve run serve.app:build_app weights=faces_128         # on this machine
    serve deploy serve/config.yaml                          # on a running cluster

Two deployments: `Endpoint` speaks HTTP, checks, decodes, finds faces and encodes; `FaceModel` has the networks, in
batches over requests, and as many copies as there is work for.
"""

from __future__ import annotations

import logging
import os
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's announced default; it warns without

from fastapi import FastAPI
from ray import serve as ray_serve  # this folder is called serve too
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle

from ldbfr.archive.settings import Weights
from ldbfr.errors import ConfigError
from ldbfr.images import ImageLimits
from serve.api import make_app
from serve.deployment import DeploymentSettings
from serve.jobs import RayJobs
from serve.observability import log_as_json
from serve.replicas import RETRY_SECONDS, FaceModelReplica, RayFaceModel
from serve.restoring import PhotoService
from serve.settings import is_loopback

log = logging.getLogger(__name__)

OTHER_REQUESTS = 200
"""That an ingress holds beside restorations: pages, health checks, and those that wait to be refused."""
SPARE_SECONDS = 5.0
"""That a replica has, beyond the deadline of its last request, to end by itself."""
HEALTH_TIMEOUT = 90.0
"""Longer than a health check that waits for a face, see `LocalFaceModel.check`."""


@ray_serve.ingress()
class Endpoint:
    """The ingress: HTTP, limits, keys, and the steps of a restoration that need no networks.

    Args:
        model: the deployment with the networks.
        settings: of the endpoint.

    Raises:
        ConfigError: other machines can reach it, and there are no keys.
    """

    def __init__(self, model: DeploymentHandle[Any], settings: DeploymentSettings) -> None:
        log_as_json()  # Serve's own log has neither our ids nor our measures
        check_address(proxy_host(), settings)
        self.settings = settings
        self.service = PhotoService(
            RayFaceModel(model),
            limits=ImageLimits(settings.max_body_bytes, settings.max_pixels),
            detector=settings.detector,
            threads=settings.photo_threads,
            most_waiting=settings.max_requests,
        )
        self.jobs = RayJobs.of_replica(job_options(settings)) if settings.job_buckets else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve, in its event loop. Its proxy adds X-Request-Id by itself."""
        self.service.start()
        return make_app(self.service, self.settings, self.jobs, echo_request_id=False)

    async def __del__(self) -> None:
        """Called by Serve at the end, once the requests under way are answered."""
        if hasattr(self, "jobs"):
            await self.service.close()
            if self.jobs is not None:
                self.jobs.close()


def job_options(settings: DeploymentSettings) -> tuple[str, ...]:
    """Of jobs/restore.py, for every archive job: the endpoint's own weights and detector."""
    workers = () if settings.job_workers is None else ("--workers", settings.job_workers)
    detector = () if settings.detector is None else ("--detector", settings.detector)
    return ("--weights", settings.weights, *workers, *detector)


def proxy_host() -> str:
    """The address on which Serve's proxies listen."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    return str(client.http_config.host) if client is not None else "127.0.0.1"


def check_address(host: str, settings: DeploymentSettings) -> None:
    """Refuse to be reached from other machines without keys.

    Raises:
        ConfigError: naming the address.
    """
    if settings.keys_file is None and not is_loopback(host):
        raise ConfigError(
            f"Ray Serve listens on {host}, which other machines can reach, and there are no API keys: set keys_file, "
            "or start Serve with http_options host 127.0.0.1"
        )


def build_app(args: dict[str, Any]) -> Application:
    """The application, from `key=value` behind `serve run` or the `args` of a YAML file; see `DeploymentSettings`.

    Raises:
        ConfigError: a setting is unknown or cannot be.
        WeightsError: the weights are missing, cut short or changed.
    """
    settings = DeploymentSettings.from_args(args)
    weights = Weights.find(settings.weights)
    check_steps(weights, settings)
    log.info("weights %s, digest %s", weights.reference, weights.digest)
    settings = settings.model_copy(update={"weights": weights.reference})  # replicas may have another working folder
    return endpoint(settings).bind(face_model(settings).bind(settings), settings)


def check_steps(weights: Weights, settings: DeploymentSettings) -> None:
    """Refuse weights whose own number of steps, which a request that names none gets, is more than a request may have.

    Raises:
        ConfigError: naming both.
    """
    steps = weights.preset.sampling.num_inference_steps
    if steps > settings.max_steps:
        raise ConfigError(
            f"max_steps {settings.max_steps}: the weights {weights.reference} take {steps} steps unless a request says "
            f"otherwise; raise it to {steps}, or export the weights with fewer"
        )


def face_model(settings: DeploymentSettings) -> ray_serve.Deployment:
    """The deployment with the networks."""
    scaling: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.min_replicas,
                max_replicas=settings.max_replicas,
                # One batch under way and another that fills: below, a copy would idle; above, requests wait.
                target_ongoing_requests=min(2 * settings.batch_faces, settings.ongoing_per_replica),
                upscale_delay_s=settings.upscale_delay_seconds,
                downscale_delay_s=settings.downscale_delay_seconds,
                look_back_period_s=max(10.5, settings.upscale_delay_seconds),
            )
        }
    deployment: Any = ray_serve.deployment(FaceModelReplica)
    return deployment.options(
        name="FaceModel",
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        max_ongoing_requests=settings.ongoing_per_replica,
        max_queued_requests=settings.max_queued,
        **scaling,
        **lifetimes(settings, settings.deadline_seconds),
    )


def endpoint(settings: DeploymentSettings) -> ray_serve.Deployment:
    """The ingress' deployment."""
    deployment: Any = ray_serve.deployment(Endpoint)
    return deployment.options(
        name="Endpoint",
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_ingress},
        max_ongoing_requests=settings.max_requests + OTHER_REQUESTS,
        max_queued_requests=OTHER_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_SECONDS),
        **lifetimes(settings, settings.upload_seconds + settings.deadline_seconds),
    )


def lifetimes(settings: DeploymentSettings, longest: float) -> dict[str, Any]:
    """How replicas are watched, replaced and ended, where a request takes so many seconds at most."""
    return {
        "health_check_period_s": settings.health_check_seconds,
        "health_check_timeout_s": HEALTH_TIMEOUT,
        # What is under way ends; and the new ones work before the old ones go, so nobody notices a redeploy.
        "graceful_shutdown_timeout_s": longest + SPARE_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_surge_percent": 100,
    }
