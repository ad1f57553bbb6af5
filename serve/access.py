"""Who asks: an API key, or, where none are needed, somebody on this machine."""

from __future__ import annotations

from starlette.requests import Request

from serve.keys import EVERYONE, LONGEST_KEY, Key, KeyRing
from serve.problems import Problem
from serve.settings import EndpointSettings, is_loopback


class Access:
    """Finds out who asks.

    Args:
        settings: with the keys' file, if there is one; read here (ConfigError where it cannot be used).
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.ring = KeyRing(settings.keys_file) if settings.keys_file is not None else None
        self.hosts = {name.lower() for name in (settings.host, *settings.allowed_hosts)}

    def who(self, request: Request) -> Key:
        """The key of a request, noted for the log by its name; Problem unauthorized or forbidden."""
        if self.ring is None:
            self._check_browser(request)
            return EVERYONE
        presented = _presented(request)
        if not presented:
            raise Problem(
                "unauthorized",
                "no API key was given: send the header `Authorization: Bearer KEY` or `X-API-Key: KEY`",
                {"WWW-Authenticate": 'Bearer realm="ldbfr"'},
            )
        key = self.ring.find(presented) if len(presented) <= LONGEST_KEY else None
        if key is None:
            raise Problem(
                "unauthorized",
                "the API key is not known (any more); ask whoever runs this service for one",
                {"WWW-Authenticate": 'Bearer realm="ldbfr", error="invalid_token"'},
            )
        request.state.key = key.name
        return key

    def _check_browser(self, request: Request) -> None:
        """Without keys, other sites' pages in this machine's browser must not act for its user."""
        host = _host_name(request.headers.get("host", "localhost"))
        if not (is_loopback(host) or host in self.hosts):
            raise Problem(
                "forbidden",
                f"the service was asked for as {host[:255]!r}; without API keys it answers to localhost and to the "
                "names in its setting allowed_hosts",
            )
        site = request.headers.get("sec-fetch-site", "none")
        if request.method != "GET" and site not in ("same-origin", "none"):
            raise Problem("forbidden", "another site's page sent this request; without API keys only the own page may")


def _presented(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "").strip()


def _host_name(header: str) -> str:
    """The Host header without its port, in lower case."""
    name = header[: header.find("]") + 1] if header.startswith("[") else header.partition(":")[0]
    return name.lower()
