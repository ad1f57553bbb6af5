"""The steps of a conversation over HTTP, with httpx2: once as plain calls, once as coroutines."""

from __future__ import annotations

import logging
import os
import ssl
import string
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from ldbfr import __version__
from ldbfr.client.conversation import Failure, Head, Open
from ldbfr.client.errors import UnreachableError, shown
from ldbfr.errors import ConfigError

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

KEY_VARIABLE = "LDBFR_API_KEY"
CONNECT_SECONDS = 10.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_KEY_CHARACTERS = set(string.ascii_letters + string.digits + string.punctuation)


def http_library() -> ModuleType:
    """httpx2, imported when it is first needed.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import httpx2
    except ImportError as error:
        raise ConfigError("httpx2 is not installed, which speaks to servers: pip install 'ldbfr[client]'") from error
    return httpx2


def checked_url(url: str) -> str:
    """A server's address without a slash at its end.

    Raises:
        ConfigError: it is none; a password in it is not repeated.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"server {url!r}: {error}; expected an address such as http://127.0.0.1:8000") from error
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"server {parts.scheme}://…@{host}: no user or password belongs there; set {KEY_VARIABLE}")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(f"server {url!r}: expected http:// or https://, a host and no query: http://127.0.0.1:8000")
    return url.rstrip("/")


def checked_key(key: str | None) -> str | None:
    """A key that a header can carry, or none; the text of the error does not repeat it.

    Raises:
        ConfigError: it cannot be one.
    """
    key = (key or "").strip()
    if set(key) - _KEY_CHARACTERS:
        raise ConfigError(
            f"the API key ({KEY_VARIABLE} or api_key) has characters that no key has, expected visible ASCII without "
            "spaces; copy it again"
        )
    return key or None


def warn_of_plain_text(url: str, key: str | None) -> None:
    """Say so if a key goes over a network that others can read."""
    parts = urlsplit(url)
    if key is not None and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        log.warning("%s: the API key goes there unencrypted; use https:// outside a network of your own", url)


@dataclass(frozen=True)
class Line:
    """What both lines to a server share.

    Args:
        url: the server's address.
        key: for it, or None.
    """

    url: str
    key: str | None = field(repr=False)

    @classmethod
    def to(cls, url: str, api_key: str | None) -> Self:
        """A line to a server, with the environment's key where none is given.

        Raises:
            ConfigError: the address or the key cannot be one.
        """
        url = checked_url(url)
        key = checked_key(os.environ.get(KEY_VARIABLE) if api_key is None else api_key)
        warn_of_plain_text(url, key)
        return cls(url, key)

    def arguments(self, step: Open) -> dict[str, Any]:
        """Of httpx2's `build_request`."""
        call = step.call
        headers = {
            "Accept": call.accept,
            "Accept-Encoding": "identity",  # images do not get smaller, and nothing can unpack to more than was sent
            "User-Agent": f"ldbfr/{__version__}",
        }
        if call.content_type is not None:
            headers["Content-Type"] = call.content_type
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        connect = min(CONNECT_SECONDS, step.seconds)
        timeout = http_library().Timeout(
            connect=connect, read=step.silence, write=step.seconds, pool=max(connect, step.seconds)
        )
        return {
            "method": call.method,
            "url": self.url + call.path,
            "params": list(call.query) or None,
            "content": call.content if call.method in ("POST", "PUT") else None,
            "headers": headers,
            "timeout": timeout,
        }

    def failure(self, error: Exception, *, begun: bool) -> Failure:
        """What went wrong, by httpx2's word for it.

        Args:
            error: of httpx2's transport.
            begun: whether the answer had begun.
        """
        library = http_library()
        reason = shown(str(error) or type(error).__name__)
        unsent = isinstance(error, library.ConnectError | library.ConnectTimeout | library.PoolTimeout)
        if isinstance(error, library.ConnectTimeout | library.PoolTimeout):
            text = "did not take a connection in time; is it up?"
        elif isinstance(error, library.TimeoutException):
            text = "went silent in the middle of its answer" if begun else "gave no answer in time; allow more"
        elif unsent:
            text = f"cannot be reached ({reason}); is it up, and is this its address?"
        else:
            text = f"broke the connection off ({reason})"
        lasting = any(isinstance(one, ssl.SSLCertVerificationError) for one in chain(error))
        lasting = lasting or isinstance(error, library.UnsupportedProtocol | library.LocalProtocolError)
        return Failure(UnreachableError(f"{self.url} {text}"), lasting, unsent)


class SyncLine:
    """One request at a time, as plain calls.

    Args:
        http: httpx2's client.
        line: where to.
    """

    def __init__(self, http: httpx2.Client, line: Line) -> None:
        self.http, self.line = http, line
        self.response: httpx2.Response | None = None
        self.pieces: Iterator[bytes] = iter(())

    def open(self, step: Open) -> Head | Failure:
        """Send a request."""
        self.close()
        library = http_library()
        try:
            self.response = self.http.send(self.http.build_request(**self.line.arguments(step)), stream=True)
        except library.TransportError as error:
            return self.line.failure(error, begun=False)
        self.pieces = self.response.iter_bytes()
        return head_of(self.response)

    def read(self) -> bytes | Failure:
        """Some bytes of the answer; none at its end."""
        library = http_library()
        try:
            return next((piece for piece in self.pieces if piece), b"")
        except (library.TransportError, library.DecodingError) as error:
            return self.line.failure(error, begun=True)

    def close(self) -> None:
        """End what is open."""
        if self.response is not None:
            self.response.close()
            self.response = None


class AsyncLine:
    """One request at a time, as coroutines.

    Args:
        http: httpx2's client.
        line: where to.
    """

    def __init__(self, http: httpx2.AsyncClient, line: Line) -> None:
        self.http, self.line = http, line
        self.response: httpx2.Response | None = None
        self.pieces: AsyncIterator[bytes] | None = None

    async def open(self, step: Open) -> Head | Failure:
        """Send a request."""
        await self.close()
        library = http_library()
        try:
            self.response = await self.http.send(self.http.build_request(**self.line.arguments(step)), stream=True)
        except library.TransportError as error:
            return self.line.failure(error, begun=False)
        self.pieces = self.response.aiter_bytes()
        return head_of(self.response)

    async def read(self) -> bytes | Failure:
        """Some bytes of the answer; none at its end."""
        library = http_library()
        assert self.pieces is not None
        try:
            async for piece in self.pieces:
                if piece:
                    return piece
        except (library.TransportError, library.DecodingError) as error:
            return self.line.failure(error, begun=True)
        return b""

    async def close(self) -> None:
        """End what is open."""
        if self.response is not None:
            await self.response.aclose()
            self.response = None


def head_of(response: httpx2.Response) -> Head:
    """The beginning of an answer."""
    return Head(response.status_code, {name.lower(): value for name, value in response.headers.items()})


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
