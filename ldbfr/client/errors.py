"""What a server can answer instead of a result, as errors; all of them are also of `ldbfr.errors`' kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ldbfr.client.retries import seconds_of_retry_after
from ldbfr.errors import ConfigError, InputError, LDBFRError

MOST_TEXT = 500
"""Characters of a server's text that are repeated."""
_ABOUT_THE_IMAGE = (413, 415)
_NEXT_STEPS = {
    401: "give a valid key: api_key, or the environment variable LDBFR_API_KEY",
    403: "ask whoever runs the server for a key that may do this",
    429: "send fewer requests at a time, or later",
    503: "try again later",
}


class ServerError(LDBFRError):
    """A server did not give what was asked for.

    Args:
        message: what happened, for people.
        status: of HTTP; None where there was no answer.
        title: of the problem.
        detail: what the server says about it.
        request_id: under which the server's log has it.
        problem: its slug, such as "overloaded"; empty if the answer was no problem of ours.
        retry_after: seconds after which the server wants to be asked again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        title: str = "",
        detail: str = "",
        request_id: str | None = None,
        problem: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.title, self.detail, self.request_id = status, title, detail, request_id
        self.problem, self.retry_after = problem, retry_after
        self.attempts = 1

    def __str__(self) -> str:
        """The message, and how often it was tried."""
        text = super().__str__()
        return text if self.attempts == 1 else f"{text} (tried {self.attempts} times)"


class ImageRefusedError(ServerError, InputError):
    """The server does not take the image."""


class OptionsRefusedError(ServerError, ConfigError):
    """The server does not take the options."""


class UnreachableError(ServerError):
    """There was no answer, or it broke off."""


def error_of(url: str, status: int, headers: Mapping[str, str], body: bytes, now: float) -> ServerError:
    """The error that an answer stands for which is no success.

    Args:
        url: of the server, for people.
        status: of HTTP.
        headers: with small letters.
        body: problem details (RFC 9457), or anything.
        now: seconds since 1970, to understand a date in Retry-After.
    """
    problem = _problem(headers, body)
    title, detail = shown(problem.get("title", "")), shown(problem.get("detail", ""))
    fields = problem.get("errors")
    if isinstance(fields, list):
        named = [f"{one.get('field')}: {one.get('message')}" for one in fields if isinstance(one, dict)]
        detail = "; ".join(filter(None, [detail, shown(", ".join(named))]))
    slug = str(problem.get("type", "")).rpartition("/")[2]
    request_id = shown(problem.get("request_id") or headers.get("x-request-id") or "") or None
    kind: type[ServerError] = ServerError
    if slug == "bad-image" or status in _ABOUT_THE_IMAGE:
        kind = ImageRefusedError
    elif slug == "bad-options":
        kind = OptionsRefusedError
    return kind(
        _text(url, status, headers, title, detail, request_id),
        status=status,
        title=title,
        detail=detail,
        request_id=request_id,
        problem=slug if problem else "",
        retry_after=seconds_of_retry_after(headers.get("retry-after"), now),
    )


def _text(url: str, status: int, headers: Mapping[str, str], title: str, detail: str, request_id: str | None) -> str:
    """What happened, and what to do."""
    if 300 <= status < 400:
        place = shown(headers.get("location", "nowhere"))
        return f"{url} answers {status} and points to {place}; no redirect is followed: give the address meant"
    said = detail or title or "no reason is given; is this an endpoint of ldbfr?"
    text = f"{url} answers {status}: {said}"
    if request_id:
        text += f" (request {request_id})"
    return f"{text}; {_NEXT_STEPS[status]}" if status in _NEXT_STEPS else text


def _problem(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """Problem details; nothing if the answer has none."""
    if "json" not in headers.get("content-type", ""):
        return {}
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def shown(text: object) -> str:
    """A server's text, safe for a terminal: of bounded length, and with what a terminal would obey escaped."""
    cut = str(text)[: MOST_TEXT + 1]
    safe = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in cut)
    return safe if len(cut) <= MOST_TEXT else f"{safe[:MOST_TEXT]}…"
