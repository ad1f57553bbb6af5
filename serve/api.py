"""The endpoint's HTTP contract: a FastAPI application over a `Restorer`. It knows nothing of Ray.

    app = make_app(restorer, EndpointSettings())

Every route finds out who asks and whether there is room before it reads a body; the restorer sees nothing that has not
passed the limits. All errors are problem details (`serve.problems`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ldbfr import __version__
from serve.access import Access
from serve.answers import MEDIA_TYPES, Faces, Models, PreviewEvent, Restoration, ServiceLimits, Status
from serve.calls import call
from serve.events import KEEP_ALIVE_SECONDS, EventStream, Item, Items
from serve.job_routes import job_routes
from serve.jobs_protocol import Jobs
from serve.limits import Limits
from serve.observability import Metrics, make_tracer, server_timing
from serve.openapi import describe, event_response, restored_response, upload_operation
from serve.page import STATIC, serve_page
from serve.problems import Problem, documented, handle_problems
from serve.protocol import DeadlineExceeded, Preview, RestorationOptions, Restored, Restorer
from serve.requests import Requests
from serve.settings import EndpointSettings
from serve.uploads import Upload, parse_options, read_upload

READY_SECONDS = 5.0

_KEYED = documented("unauthorized", "forbidden", "internal")
_UPLOADS = documented(
    "bad-request",
    "unauthorized",
    "forbidden",
    "timeout",
    "too-large",
    "unsupported-media",
    "bad-image",
    "bad-options",
    "rate-limited",
    "internal",
    "overloaded",
    "deadline",
)


def make_app(
    restorer: Restorer,
    settings: EndpointSettings,
    jobs: Jobs | None = None,
    *,
    echo_request_id: bool = True,
    static: Path = STATIC,
) -> FastAPI:
    """The application.

    Args:
        restorer: does the work.
        settings: limits, keys, and whether there is a page.
        jobs: runs archive jobs; without it /v1/jobs answers 404.
        echo_request_id: False where the server in front adds X-Request-Id to answers, as Ray Serve's proxy does.
        static: folder of the page.

    Raises:
        ConfigError: the keys file cannot be used.
    """
    app = FastAPI(
        title="LD-BFR",
        version=__version__,
        summary="Blind face restoration",
        description="Restores faces in photos. Errors are problem details (RFC 9457).",
        docs_url=None,  # these pages would load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # to wherever the Host header says
    )
    metrics, access, limits = Metrics(), Access(settings), Limits(settings.max_requests)
    app.include_router(Service(restorer, settings, access, limits, metrics, jobs is not None).routes())
    app.include_router(job_routes(jobs, settings, access, limits))
    if settings.page:
        serve_page(app, static)
    handle_problems(app)
    describe(app, lambda path: access.ring is not None and path not in ("/healthz", "/readyz", "/v1/limits"))
    app.add_middleware(
        Requests, metrics=metrics, tracer=make_tracer() if settings.otlp else None, echo_id=echo_request_id
    )
    return app


class Service:
    """The routes about images and about the service itself, as methods.

    Args:
        restorer: does the work.
        settings: of the endpoint.
        access: finds out who asks.
        limits: admits requests.
        metrics: counts restorations.
        has_jobs: whether there are archive jobs.
    """

    def __init__(
        self,
        restorer: Restorer,
        settings: EndpointSettings,
        access: Access,
        limits: Limits,
        metrics: Metrics,
        has_jobs: bool,
    ) -> None:
        self.restorer, self.settings, self.access, self.limits = restorer, settings, access, limits
        self.metrics, self.has_jobs = metrics, has_jobs

    def routes(self) -> APIRouter:
        """The router."""
        router = APIRouter()
        with_options: dict[str, Any] = {"openapi_extra": upload_operation(options=True), "tags": ["images"]}
        about: dict[str, Any] = {"tags": ["service"]}

        router.add_api_route(
            "/v1/restorations",
            self.restore,
            methods=["POST"],
            response_class=Response,
            responses={200: restored_response(), **_UPLOADS},
            **with_options,
        )
        router.add_api_route(
            "/v1/restorations/stream",
            self.stream,
            methods=["POST"],
            response_class=Response,
            responses={200: event_response(), **_UPLOADS},
            **with_options,
        )
        router.add_api_route(
            "/v1/faces",
            self.faces,
            methods=["POST"],
            response_model=Faces,
            responses=_UPLOADS,
            openapi_extra=upload_operation(options=False),
            tags=["images"],
        )
        router.add_api_route(
            "/v1/models",
            self.models,
            response_model=Models,
            responses={**_KEYED, **documented("overloaded", "deadline")},
            **about,
        )
        router.add_api_route("/v1/limits", self.service_limits, response_model=ServiceLimits, **about)
        router.add_api_route("/healthz", self.healthz, response_model=Status, **about)
        router.add_api_route(
            "/readyz", self.readyz, response_model=Status, responses=documented("not-ready", "internal"), **about
        )
        text: dict[int | str, dict[str, Any]] = {
            200: {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}
        }
        router.add_api_route(
            "/metrics", self.prometheus, response_class=Response, responses={**text, **_KEYED}, **about
        )
        return router

    async def restore(self, request: Request) -> Response:
        """Restore the faces of a photo, or one aligned face."""
        upload, options, deadline = await self._enter(request)
        result = await call(request, self.restorer.restore(upload.data, options, deadline), deadline)
        self._account(request, result)
        headers = {
            "X-Seed": str(result.seed),
            "X-Weights-Digest": result.weights_digest,
            "X-Faces": str(len(result.faces)),
            "Server-Timing": server_timing(result.timings),
            "Vary": "Accept",
        }
        if wants_json(request.headers.get("accept", "*/*")):
            return _json(Restoration.of(result), headers)
        return Response(result.image, headers=headers, media_type=MEDIA_TYPES[result.format])

    async def stream(self, request: Request) -> Response:
        """Restore an image and see it on its way; an error at first is an ordinary answer, later an event."""
        upload, options, deadline = await self._enter(request)
        items = Items(request, self.restorer.stream(upload.data, options, deadline), deadline)
        try:
            early = await items.next(KEEP_ALIVE_SECONDS)
        except TimeoutError:
            early = None
        except BaseException:
            items.close()
            raise

        def event(item: Item) -> tuple[str, bytes]:
            if isinstance(item, Preview):
                return "preview", PreviewEvent.of(item).model_dump_json().encode()
            self._account(request, item)
            return "result", Restoration.of(item).model_dump_json().encode()

        return EventStream(request, items, early, event)

    async def faces(self, request: Request) -> Response:
        """Find the faces of a photo, without restoring any."""
        upload, _, deadline = await self._enter(request, options=False)
        return _json(Faces.of(await call(request, self.restorer.find(upload.data, deadline), deadline)))

    async def models(self, request: Request) -> Response:
        """The model that answers."""
        self.access.who(request)
        deadline = time.monotonic() + self.settings.deadline_seconds
        return _json(Models.of(await call(request, self.restorer.info(), deadline)))

    async def service_limits(self, request: Request) -> Response:
        """What a request may be; needs no key."""
        return _json(ServiceLimits.of(self.settings, self.has_jobs))

    async def healthz(self, request: Request) -> Response:
        """The process lives."""
        return _json(Status(status="ok"))

    async def readyz(self, request: Request) -> Response:
        """A request would be answered now."""
        try:
            ready = await call(request, self.restorer.ready(), time.monotonic() + READY_SECONDS)
        except DeadlineExceeded:
            ready = False
        if not ready:
            raise Problem("not-ready", "the model is being loaded, or does not answer; ask again", {"Retry-After": "1"})
        return _json(Status(status="ready"))

    async def prometheus(self, request: Request) -> Response:
        """Metrics of this process; where there are API keys, it needs one."""
        self.access.who(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _enter(self, request: Request, *, options: bool = True) -> tuple[Upload, RestorationOptions, float]:
        """Who asks, whether there is room, the upload within the limits, and until when it must be answered."""
        key = self.access.who(request)
        request.state.held.enter_context(self.limits.admit(key))
        upload = await read_upload(request, self.settings)
        fields = [*request.query_params.multi_items(), *upload.fields]
        parsed = parse_options(fields, self.settings, RestorationOptions.model_fields if options else ())
        self.metrics.upload_bytes.observe(len(upload.data))
        return upload, parsed, time.monotonic() + self.settings.deadline_seconds

    def _account(self, request: Request, result: Restored) -> None:
        self.metrics.restored(result)
        seconds = {f"{stage}_seconds": round(value, 4) for stage, value in result.timings.items()}
        request.state.noted = {"faces": len(result.faces), **seconds}


def wants_json(accept: str) -> bool:
    """Whether a client names JSON, and no image type that it likes better."""
    json_quality = image_quality = 0.0
    for part in accept.lower().split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        if media == "application/json":
            json_quality = max(json_quality, quality)
        elif media.startswith("image/"):
            image_quality = max(image_quality, quality)
    return json_quality > 0 and json_quality >= image_quality


def _json(answer: BaseModel, headers: dict[str, str] | None = None) -> Response:
    return Response(answer.model_dump_json(), 200, headers, "application/json")
