"""When a request is sent again: exponential back-off with full jitter, within an overall deadline."""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from ldbfr.errors import ConfigError

RETRIED = (429, 502, 503)
"""Statuses of HTTP after which the same request may succeed; 502 is a gateway whose server went away."""
REFUSED_UNSEEN = (429, 503)
"""Statuses that say that nothing was done."""
SPREAD = 0.1
"""Share by which clients that were told the same time come back later than told, so that they do not meet again."""


@dataclass(frozen=True)
class Retries:
    """Before retry k, from 0, a client waits for a time drawn from 0 to min(longest, first · 2^k) seconds.

    A server's Retry-After takes the place of that; it is kept, and at most a tenth is added.

    Args:
        max_retries: after the first try.
        first: seconds; the most before the first retry.
        longest: seconds; the most before any.
        clock: seconds, for tests.
        draw: from 0 to 1, for tests.
    """

    max_retries: int = 5
    first: float = 0.5
    longest: float = 30.0
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: naming the value.
        """
        if self.max_retries < 0:
            raise ConfigError(f"max_retries {self.max_retries}: expected 0 or more; 0 tries once")
        if not (0 <= self.first <= self.longest < math.inf):
            raise ConfigError(
                f"first {self.first:g} and longest {self.longest:g}: expected seconds, the first no longer; 0.5 and 30 "
                "are the defaults"
            )

    def wait(self, retry: int, retry_after: float | None = None) -> float:
        """Seconds before retry `retry`, from 0."""
        if retry_after is not None:
            return retry_after * (1 + SPREAD * self.draw())
        return self.draw() * min(self.longest, self.first * 2.0 ** min(retry, 60))


DEFAULT_RETRIES = Retries()


def seconds_of_retry_after(value: str | None, now: float) -> float | None:
    """A Retry-After header in seconds from now: it has seconds, or a date; None if it says nothing.

    Args:
        value: of the header.
        now: seconds since 1970.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
