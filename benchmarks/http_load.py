"""Clients for a benchmark: HTTP/1.1 over kept connections with as little work as will do: they share the cores."""

from __future__ import annotations

import asyncio
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PATIENCE = 120.0
"""Seconds after which a request counts as without an answer."""
IDLE_SECONDS = 2.0
"""After which a connection is not used again: a server may close it at any time after about five."""


@dataclass(frozen=True)
class Reply:
    """What became of a request. `status` 0: it was not answered. Times in `time.monotonic()`'s seconds."""

    status: int
    due: float
    """When it was to be sent."""
    ended: float
    retry_after: float | None = None


class Connections:
    """Kept connections to an endpoint on this machine; as many as requests are under way."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes, due: float | None = None) -> Reply:
        """Send an image, and wait for the answer."""
        due = time.monotonic() if due is None else due
        try:
            async with asyncio.timeout(PATIENCE):
                status, headers = await self._exchange(path, body)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return Reply(0, due, time.monotonic())
        retry_after = headers.get("retry-after")
        return Reply(status, due, time.monotonic(), None if retry_after is None else float(retry_after))

    async def _exchange(self, path: str, body: bytes) -> tuple[int, dict[str, str]]:
        reader, writer = await self._connection()
        try:
            writer.write(request(path, body))
            status, headers = await head(reader)
            await reader.readexactly(int(headers["content-length"]))
        except BaseException:
            writer.close()
            raise
        self.idle.append((time.monotonic(), reader, writer))
        return status, headers

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One that was in use a moment ago, or a new one."""
        while self.idle:
            since, reader, writer = self.idle.pop()
            if time.monotonic() - since < IDLE_SECONDS:
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self.port)

    def close(self) -> None:
        """Close those that are idle."""
        for _, _, writer in self.idle:
            writer.close()


def request(path: str, body: bytes) -> bytes:
    """A request's bytes."""
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/octet-stream",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join((*lines, "", "")).encode() + body


async def head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    return int(lines[0].split()[1]), headers


async def first_event(port: int, path: str, body: bytes) -> float:
    """Seconds from a stream's request to its first event."""
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
    try:
        writer.write(request(path, body))
        status, _ = await head(reader)
        assert status == 200, status
        await reader.readuntil(b"event:")
        seconds = time.monotonic() - started
        await reader.readuntil(b"event: result")
        return seconds
    finally:
        writer.close()


async def closed_loop(
    connections: Connections, path: str, images: Sequence[bytes], clients: int, seconds: float
) -> list[Reply]:
    """So many clients, each of whom asks again when it is answered; all replies, in order of their end."""
    end = time.monotonic() + seconds
    replies: list[Reply] = []

    async def client(number: int) -> None:
        while time.monotonic() < end:
            reply = await connections.post(path, images[number % len(images)])
            replies.append(reply)
            number += clients
            if reply.status != 200:  # as well-behaved clients do; asking again at once would be another load
                await asyncio.sleep(max(0.0, min(reply.retry_after or 1.0, end - time.monotonic())))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return replies


async def open_loop(
    connections: Connections, path: str, images: Sequence[bytes], rate: float, seconds: float
) -> list[Reply]:
    """Requests at the times of a Poisson process, whatever became of those before; all replies."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(1 / rate, round(2 * rate * seconds) + 10))
    begun = time.monotonic()
    tasks = []
    for number, offset in enumerate(times[times < seconds].tolist()):
        await asyncio.sleep(max(0.0, begun + offset - time.monotonic()))
        post = connections.post(path, images[number % len(images)], begun + offset)
        tasks.append(asyncio.create_task(post))
    return list(await asyncio.gather(*tasks))


def wait_ready(port: int, process: subprocess.Popen[bytes], seconds: float = 600) -> None:
    """Until the endpoint says that it is ready.

    Raises:
        RuntimeError: its process ended, or it took too long.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10):
                return
        except OSError:  # of urllib too
            pass
        if process.poll() is not None:
            raise RuntimeError(f"the endpoint ended with code {process.returncode}; its output says why")
        time.sleep(0.1)
    raise RuntimeError(f"the endpoint was not ready after {seconds:g} s")
