"""How much a client may ask for: requests a minute and at a time, by key; and how much all of them may together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.keys import Key
from serve.problems import Problem
from serve.protocol import Overloaded

RETRY_SECONDS = 1.0
"""After which a place may be free again."""


@dataclass
class _Use:
    """What a key has used: `tokens` at the time `at`, and its requests in progress."""

    tokens: float
    at: float
    ongoing: int = 0


class Limits:
    """Admits requests.

    A key's rate is a bucket of `rate_per_minute` tokens that fills at that rate; a request takes one.

    Args:
        max_requests: of all keys together, at a time.
        clock: seconds that only grow.
    """

    def __init__(self, max_requests: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_requests, self.clock = max_requests, clock
        self.ongoing = 0
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def admit(self, key: Key) -> Iterator[None]:
        """Let a request in, and count it until the end of the block.

        Raises:
            Problem: rate-limited; the key's own limit is reached.
            Overloaded: the service is full.
        """
        use = self._take(key)
        use.ongoing += 1
        self.ongoing += 1
        try:
            yield
        finally:
            use.ongoing -= 1
            self.ongoing -= 1

    def _take(self, key: Key) -> _Use:
        now = self.clock()
        # By digest: a new key under an old name starts afresh, and a changed limit of the same key does not.
        most = max(1.0, key.rate_per_minute)
        use = self._uses.setdefault(key.sha256, _Use(most, now))
        use.tokens = min(most, use.tokens + (now - use.at) * key.rate_per_minute / 60)
        use.at = now
        if use.ongoing >= key.concurrency:
            raise Problem.rate_limited(
                f"{use.ongoing} requests of this key are in progress, at most {key.concurrency} may be; "
                "wait for one to end",
                RETRY_SECONDS,
            )
        if self.ongoing >= self.max_requests:
            raise Overloaded(
                f"{self.ongoing} requests are in progress, which is all that fit; ask again", RETRY_SECONDS
            )
        if use.tokens < 1:
            raise Problem.rate_limited(
                f"this key has used its {key.rate_per_minute:g} requests a minute; wait as long as Retry-After says",
                (1 - use.tokens) * 60 / key.rate_per_minute,
            )
        use.tokens -= 1
        return use
