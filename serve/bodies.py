"""Bodies that are answered before they have been read, such as ones that are too large."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

DRAIN_SECONDS = 2.0
DRAIN_BYTES = 64 * 2**20


async def drain(receive: Receive) -> None:
    """Read on for a moment and drop it, after the answer and before the connection is closed.

    A socket that is closed with unread data resets the connection, and a client that is still sending would lose the
    answer that tells it why (nginx calls this a lingering close).
    """
    dropped = 0
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while dropped < DRAIN_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                dropped += len(message.get("body", b""))
    except TimeoutError:
        return
