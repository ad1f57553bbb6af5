"""Archive jobs over HTTP: /v1/jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from fastapi import APIRouter
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from ldbfr.inputs.lists import is_list
from ldbfr.places import place
from serve.access import Access
from serve.answers import JobList
from serve.calls import call
from serve.jobs_protocol import JobRequest, Jobs, JobStatus
from serve.limits import Limits
from serve.openapi import job_id_parameter, job_request_body
from serve.problems import FieldError, Problem, documented
from serve.settings import EndpointSettings
from serve.uploads import read_body

MOST_REQUEST_BYTES = 64 * 1024

_FAILURES = documented("unauthorized", "forbidden", "not-found", "rate-limited", "internal", "overloaded", "deadline")


def job_routes(jobs: Jobs | None, settings: EndpointSettings, access: Access, limits: Limits) -> APIRouter:
    """The routes; all answer problem not-found where there are no jobs.

    Args:
        jobs: that runs them.
        settings: with the places that jobs may use.
        access: finds out who asks.
        limits: admits requests.
    """
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    def enter(request: Request) -> Jobs:
        """The jobs, for a client that may use them."""
        key = access.who(request)
        if jobs is None:
            raise Problem("not-found", "this service runs no archive jobs; use jobs/restore.py")
        if not key.jobs:
            raise Problem("forbidden", f'the key {key.name!r} may not use jobs; its entry needs "jobs": true')
        request.state.held.enter_context(limits.admit(key))
        return jobs

    def deadline() -> float:
        return time.monotonic() + settings.deadline_seconds

    @router.post(
        "",
        status_code=202,
        summary="Start to restore an archive",
        response_model=JobStatus,
        responses={
            **_FAILURES,
            **documented("bad-request", "timeout", "too-large", "unsupported-media", "bad-options"),
        },
        openapi_extra=job_request_body(),
    )
    async def submit(request: Request) -> Response:
        """Both places must lie in one of the buckets that the service was started with."""
        runner = enter(request)
        wanted = await _read_request(request, settings)
        check_places(wanted, settings.job_buckets)
        status = await call(request, runner.submit(wanted), deadline())
        return _json(status, 202, {"Location": f"/v1/jobs/{status.id}"})

    @router.get("", summary="All jobs, the newest first", response_model=JobList, responses=_FAILURES)
    async def list_jobs(request: Request) -> Response:
        """Of every client."""
        statuses = await call(request, enter(request).list(), deadline())
        return _json(JobList(jobs=list(statuses)))

    @router.get(
        "/{id}",
        summary="How a job stands",
        response_model=JobStatus,
        responses=_FAILURES,
        openapi_extra=job_id_parameter(),
    )
    async def get(request: Request) -> Response:
        """Whether it has ended, and how far it is."""
        return _json(await call(request, enter(request).get(request.path_params["id"]), deadline()))

    @router.delete(
        "/{id}",
        summary="Stop a job",
        response_model=JobStatus,
        responses=_FAILURES,
        openapi_extra=job_id_parameter(),
    )
    async def cancel(request: Request) -> Response:
        """What it has restored stays; the same job, started again, goes on from there."""
        return _json(await call(request, enter(request).cancel(request.path_params["id"]), deadline()))

    return router


def check_places(wanted: JobRequest, allowed: Sequence[str]) -> None:
    """Refuse a job that would read or write elsewhere than allowed; prefixes are compared by whole components.

    Raises:
        Problem: forbidden.
    """
    for name, uri in (("input", wanted.input), ("output", wanted.output)):
        parts = place(uri)
        if not any(parts[: len(place(bucket))] == place(bucket) for bucket in allowed) or {".", ".."} & set(parts):
            where = ", ".join(allowed) or "none"
            raise Problem("forbidden", f"{name} {uri!r}: jobs may use these places only: {where}")
    if is_list(wanted.input.rstrip("/")):
        raise Problem("forbidden", f"input {wanted.input!r}: a list of URIs could name any place; give a prefix")


async def _read_request(request: Request, settings: EndpointSettings) -> JobRequest:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Problem("unsupported-media", f"Content-Type {media!r}: expected application/json")
    body = await read_body(request, MOST_REQUEST_BYTES, settings.upload_seconds)
    try:
        return JobRequest.model_validate(json.loads(body))
    except ValidationError as error:
        raise Problem.bad_options(
            [
                FieldError(field=".".join(map(str, problem["loc"])), message=problem["msg"])
                for problem in error.errors(include_url=False)
            ]
        ) from None
    except (ValueError, RecursionError) as error:
        raise Problem("bad-request", f"the body is not JSON: {error}") from None


def _json(answer: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(answer.model_dump_json(), status, headers, "application/json")
