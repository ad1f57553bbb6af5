"""What a process does that shares a cache with others; it imports little, since it is started often."""

import hashlib
from pathlib import Path

import numpy as np

from ldbfr.data.ranges import RangeCache


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def put_many(folder: Path, seed: int, max_bytes: int = 20_000) -> int:
    """Put and get random entries, many of them the same as the other processes'; the most that was ever held."""
    cache = RangeCache(folder, max_bytes)
    rng = np.random.default_rng(seed)
    most = 0
    for number in rng.integers(60, size=120):
        data = np.random.default_rng(number).bytes(500 + int(number))
        kept = cache.get(digest(data))
        assert kept in (None, data)
        cache.put(digest(data), data)
        with cache._counter() as counter:
            used = cache._count()
            assert int(counter.read()) == used
        most = max(most, used)
    return most
