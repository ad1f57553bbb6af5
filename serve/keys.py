"""API keys: a JSON file of their SHA-256 digests, read again whenever it changes; `python -m serve.keys` makes one.

    {"keys": [{"name": "alice", "sha256": "9f86d0…", "rate_per_minute": 60, "concurrency": 4, "jobs": false}]}

A key is 256 random bits, so its plain digest tells nothing about it; the key itself is kept nowhere.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, StringConstraints, ValidationError

from ldbfr.config import Settings
from ldbfr.errors import ConfigError

log = logging.getLogger("serve.keys")

LONGEST_KEY = 512
MOST_PER_MINUTE = 1e9
MOST_FILE_BYTES = 2**20


class Key(Settings):
    """A client of the endpoint, and what it may ask for."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = Field(repr=False)
    rate_per_minute: float = Field(60, gt=0, le=MOST_PER_MINUTE)
    """Requests a minute in the long run; as many may come at once after a minute of rest."""
    concurrency: PositiveInt = 4
    """Requests at a time."""
    jobs: bool = False
    """Whether it may start, see and cancel archive jobs."""


class _KeysFile(Settings):
    keys: tuple[Key, ...] = Field(min_length=1)


EVERYONE = Key(name="everyone", sha256="0" * 64, rate_per_minute=MOST_PER_MINUTE, concurrency=2**31, jobs=True)
"""Who asks where no keys are needed."""


class KeyRing:
    """The keys of a file, as it is now.

    Raises:
        ConfigError: at the start, for a file that cannot be read or used. Later such a file is logged as an error,
            and the keys stay those of before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._stamp_now()
        self._keys = load_keys(path)

    def find(self, presented: str) -> Key | None:
        """The key that a client presents.

        All digests are compared, each in constant time: how long it takes tells nothing about them.
        """
        self._refresh()
        digest = digest_of(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _refresh(self) -> None:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = load_keys(self.path)
        except ConfigError as error:
            log.error("the changed keys file is not used, the keys of before stay: %s", error)
        else:
            log.info("read %d keys from %s again", len(self._keys), self.path)

    def _stamp_now(self) -> tuple[int, ...] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def load_keys(path: Path) -> Sequence[Key]:
    """Read a keys file.

    Raises:
        ConfigError: it cannot be read, is not such a file, or names a key or a digest twice. Digests are not told.
    """
    hint = "`python -m serve.keys NAME` makes an entry"
    try:
        with path.open("rb") as file:
            text = file.read(MOST_FILE_BYTES + 1)
        if len(text) > MOST_FILE_BYTES:
            raise ConfigError(f"keys file {path} has more than {MOST_FILE_BYTES:,} bytes, expected a list of keys")
        keys = _KeysFile.model_validate_json(text).keys
    except OSError as error:
        raise ConfigError(f"keys file {path} cannot be read ({error.strerror}); {hint}") from error
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(f"keys file {path} cannot be used; {hint}:\n" + "\n".join(lines)) from None
    for what in ("name", "sha256"):
        values = [getattr(key, what) for key in keys]
        twice = {key.name for key in keys if values.count(getattr(key, what)) > 1}
        if twice:
            raise ConfigError(f"keys file {path} has a {what} twice (keys {', '.join(sorted(twice))}): remove one")
    return keys


def digest_of(key: str) -> str:
    """SHA-256 of a key, in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a new key and its entry for the keys file."""
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description=main.__doc__)
    parser.add_argument("name", help="who gets the key; it appears in logs")
    parser.add_argument("--rate-per-minute", type=float, default=60, help="requests a minute (60)")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at a time (4)")
    parser.add_argument("--jobs", action="store_true", help="may start archive jobs")
    given = parser.parse_args(arguments)
    secret = "ldbfr_" + secrets.token_urlsafe(32)
    try:
        key = Key(sha256=digest_of(secret), **vars(given))
    except ValidationError as error:
        parser.error("; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors()))
    print(f"key, for the client alone: {secret}\nentry for the keys file:   {json.dumps(key.model_dump())}")


if __name__ == "__main__":
    main()
