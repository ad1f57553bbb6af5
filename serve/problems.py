"""Errors as RFC 9457 problem details: one table of them, one exception, one response."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, Self
from urllib.parse import quote

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ldbfr.errors import ConfigError, InputError, LDBFRError
from serve.jobs_protocol import JobNotFound
from serve.protocol import DeadlineExceeded, Overloaded

MEDIA_TYPE = "application/problem+json"

Slug = Literal[
    "bad-request",
    "unauthorized",
    "forbidden",
    "not-found",
    "method-not-allowed",
    "timeout",
    "too-large",
    "unsupported-media",
    "bad-image",
    "bad-options",
    "rate-limited",
    "internal",
    "overloaded",
    "not-ready",
    "deadline",
]


@dataclass(frozen=True)
class Kind:
    """A kind of problem: its status, and what it is in a few words."""

    status: int
    title: str


KINDS: dict[Slug, Kind] = {
    "bad-request": Kind(400, "The request is malformed"),
    "unauthorized": Kind(401, "An API key is needed"),
    "forbidden": Kind(403, "The request is not allowed"),
    "not-found": Kind(404, "There is nothing here"),
    "method-not-allowed": Kind(405, "The method is not allowed"),
    "timeout": Kind(408, "The upload took too long"),
    "too-large": Kind(413, "The upload is too large"),
    "unsupported-media": Kind(415, "The media type is not supported"),
    "bad-image": Kind(422, "The image cannot be used"),
    "bad-options": Kind(422, "The options cannot be used"),
    "rate-limited": Kind(429, "The key's limit is reached"),
    "internal": Kind(500, "Something went wrong in the service"),
    "overloaded": Kind(503, "The service is full"),
    "not-ready": Kind(503, "The service is not ready"),
    "deadline": Kind(504, "The request ran out of time"),
}

_SLUG_OF_STATUS: dict[int, Slug] = {
    400: "bad-request",
    401: "unauthorized",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    413: "too-large",
    415: "unsupported-media",
}


class FieldError(BaseModel):
    """What is wrong with one option."""

    field: str = Field(examples=["steps"])
    message: str = Field(examples=["Input should be less than or equal to 50"])


class ProblemDetails(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["/problems/bad-options"])
    title: str = Field(examples=["The options cannot be used"])
    status: int = Field(examples=[422])
    detail: str
    instance: str = Field(examples=["/v1/restorations"])
    request_id: str
    errors: list[FieldError] | None = Field(None, description="of bad-options: one entry for each option")


class Problem(LDBFRError):
    """An error that is meant for the client.

    Args:
        slug: which kind.
        detail: what is wrong here, and what to do.
        headers: of the response.
        members: further members of the problem details.
    """

    def __init__(self, slug: Slug, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.slug, self.detail = slug, detail
        self.headers, self.members = dict(headers or {}), members

    @classmethod
    def rate_limited(cls, detail: str, retry_after: float) -> Self:
        """The key's own limit is reached."""
        return cls("rate-limited", detail, _retry(retry_after))

    @classmethod
    def bad_options(cls, errors: Sequence[FieldError]) -> Self:
        """Options that are unknown, out of range, or do not go together."""
        detail = "; ".join(f"{error.field}: {error.message}" if error.field else error.message for error in errors)
        return cls("bad-options", detail, errors=[error.model_dump() for error in errors])

    @classmethod
    def of(cls, error: Exception) -> Problem:
        """What a client is told of an error; of one that nobody foresaw, only that it happened."""
        match error:
            case Problem():
                return error
            case Overloaded():
                return cls("overloaded", str(error), _retry(error.retry_after))
            case DeadlineExceeded():
                return cls("deadline", str(error) or "the result was not there in time; ask for less, or later")
            case JobNotFound():
                return cls("not-found", str(error))
            case InputError():
                return cls("bad-image", str(error))
            case ConfigError():
                return cls.bad_options([FieldError(field="", message=str(error))])
            case HTTPException():
                slug = _SLUG_OF_STATUS.get(error.status_code, "internal")
                return cls(slug, str(error.detail), error.headers)
            case _:
                return cls("internal", "the service's log has more under this request_id; please try again")

    def details(self, request: Request) -> dict[str, Any]:
        """The problem details, as the answer to a request."""
        kind = KINDS[self.slug]
        return {
            "type": f"/problems/{self.slug}",
            "title": kind.title,
            "status": kind.status,
            "detail": self.detail,
            "instance": quote(request.scope["path"], safe="/:@!$&'()*+,;=~"),
            "request_id": getattr(request.state, "request_id", ""),
            **self.members,
        }

    def response(self, request: Request) -> Response:
        """The HTTP response."""
        request.state.problem = self.slug
        text = json.dumps(self.details(request), ensure_ascii=False).encode("utf-8", "replace")
        return Response(text, KINDS[self.slug].status, self.headers, MEDIA_TYPE)


def handle_problems(app: FastAPI) -> None:
    """Let an application answer every error that it foresees with problem details.

    What nobody foresaw passes on to `serve.requests`, which logs it.
    """

    async def answer(request: Request, error: Exception) -> Response:
        problem = Problem.of(error)
        if isinstance(error, HTTPException) and error.status_code == 404:
            problem = Problem(
                "not-found", f"there is no {request.scope['path'][:256]!r} here; /openapi.json lists what is"
            )
        if isinstance(error, HTTPException) and error.status_code == 405:
            path = getattr(request.scope.get("route"), "path", "")
            # From the description: Starlette names the methods of one route, and a path may have several.
            described = app.openapi()["paths"].get(path, {})
            allowed = ", ".join(sorted(described)).upper() or problem.headers.get("Allow", "")
            detail = f"{request.method[:32]!r}: expected {allowed}"
            problem = Problem("method-not-allowed", detail, {"Allow": allowed})
        return problem.response(request)

    for kind in (Problem, InputError, ConfigError, Overloaded, DeadlineExceeded, HTTPException):
        app.add_exception_handler(kind, answer)


_HEADERS = {
    401: ("WWW-Authenticate", "Bearer", "string"),
    429: ("Retry-After", "seconds after which it is worth asking again", "integer"),
    503: ("Retry-After", "seconds after which it is worth asking again", "integer"),
}


def documented(*slugs: Slug) -> dict[int | str, dict[str, Any]]:
    """What FastAPI's `responses` takes: the problems that a route may answer, with an example of each."""
    responses: dict[int | str, dict[str, Any]] = {}
    for slug in slugs:
        kind = KINDS[slug]
        response = responses.setdefault(
            kind.status,
            {
                "description": HTTPStatus(kind.status).phrase,
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}, "examples": {}}},
            },
        )
        if kind.status in _HEADERS:
            name, description, type = _HEADERS[kind.status]
            response["headers"] = {name: {"description": description, "schema": {"type": type}}}
        response["content"][MEDIA_TYPE]["examples"][slug] = {
            "value": {
                "type": f"/problems/{slug}",
                "title": kind.title,
                "status": kind.status,
                "detail": kind.title,
                "instance": "/v1/restorations",
                "request_id": "6f0c1d7e",
            }
        }
    return responses


def _retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
