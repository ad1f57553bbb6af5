"""Whether an endpoint or a cluster's job server answers, and with which version."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from importlib import metadata
from urllib.parse import urlsplit

from ldbfr.doctor.findings import Finding, ok, problem, warning

PATIENCE_S = 10.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_BYTES = 100_000


def get(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Status and text of an answer, errors' too.

    Raises:
        OSError: there is none, or the text is no URL.
    """
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "ldbfr", **(headers or {})})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read(MOST_BYTES).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(MOST_BYTES).decode("utf-8", "replace")
    except (HTTPException, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def check_server(url: str) -> Iterator[Finding]:
    """An endpoint: alive, ready, and reached safely."""
    name, base = f"endpoint {url}", url.rstrip("/")
    try:
        alive, _ = get(f"{base}/healthz")
        ready, text = get(f"{base}/readyz")
    except OSError as error:
        advice = "check the address, and that `serve run` or `serve deploy` is up: serve status"
        yield problem(name, f"no answer ({getattr(error, 'reason', error)})", advice)
        return
    if alive != 200:
        yield problem(name, f"/healthz answers {alive}", "is it ldbfr's endpoint? Its log says what is wrong")
    elif ready != 200:
        yield problem(
            name,
            f"alive, but not ready ({ready}: {text})",
            "wait for a minute after its start; else serve status, and its log",
        )
    else:
        yield ok(name, "alive and ready")
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in LOOPBACK:
        yield warning(f"{name}: way", "keys and photos are readable on the way", "put a proxy with TLS in front of it")


def check_cluster(address: str) -> Iterator[Finding]:
    """A cluster's job server, and how to look at its machines."""
    name, base = f"cluster {address}", address.rstrip("/")
    if not base.startswith(("http://", "https://")):
        advice = "give the job server's, such as http://127.0.0.1:8265 (ray start --head prints it)"
        yield problem(name, "no http:// or https:// address", advice)
        return
    token = os.environ.get("RAY_AUTH_TOKEN")
    try:
        status, text = get(f"{base}/api/version", {"Authorization": f"Bearer {token}"} if token else {})
    except OSError as error:
        advice = "check the address, or forward it: ssh -L 8265:127.0.0.1:8265 HEAD"
        yield problem(name, f"no answer ({getattr(error, 'reason', error)})", advice)
        return
    if status in (401, 403):
        given = "RAY_AUTH_TOKEN is not its token" if token else "it wants a token"
        yield problem(name, f"{status}: {given}", "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's")
        return
    try:
        theirs = str(json.loads(text)["ray_version"])
    except (ValueError, KeyError, TypeError):
        yield problem(name, f"{status}, and no version of Ray", "is it Ray's job server? Its port is 8265 unless told")
        return
    yield judge_versions(name, theirs)
    command = f"ray job submit --address {base} --working-dir . -- python jobs/doctor.py"
    yield ok(f"{name}: machines", f"each looks at itself: {command}")


def judge_versions(name: str, theirs: str) -> Finding:
    """Ray's version here and there."""
    try:
        ours = metadata.version("ray")
    except metadata.PackageNotFoundError:
        return warning(name, f"Ray {theirs}; none here", f"to submit jobs: pip install 'ray[default]=={theirs}'")
    if ours != theirs:
        advice = f"pip install 'ray[default]=={theirs}' here, or bring the cluster to {ours}"
        return warning(name, f"Ray {theirs}, here {ours}", advice)
    return ok(name, f"Ray {theirs}, as here")
