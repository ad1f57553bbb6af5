"""Places by URI, compared: the same, inside one another, or the same from every working directory."""

from __future__ import annotations

import os
from pathlib import Path

from ldbfr import storage


def absolute(uri: str) -> str:
    """A place as every machine and every working directory finds it; no slash at its end. Links are not followed."""
    if storage.is_local(uri):
        return os.path.abspath(storage.local_path(uri))
    return uri.rstrip("/")


def place(uri: str) -> tuple[str, ...]:
    """The parts of a location, comparable: links followed, slashes at the end ignored."""
    if storage.is_local(uri):
        return Path(storage.local_path(uri)).resolve().parts
    return ("s3://", *(part for part in uri.partition("://")[2].split("/") if part))


def overlap(one: str, other: str) -> bool:
    """Whether two places are the same, or one lies in the other."""
    first, second = place(one), place(other)
    shared = min(len(first), len(second))
    return first[:shared] == second[:shared]
