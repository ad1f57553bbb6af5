"""A bucket in memory, whose process may crash after any write: what is there stays, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from ldbfr import storage
from ldbfr.errors import StorageError


class Crash(BaseException):
    """The process ends here."""


@dataclass
class Bucket:
    """Takes the place of the storage; `changes_left` counts down to the crash."""

    objects: dict[str, bytes] = field(default_factory=dict)
    changes_left: int | None = None
    changes: int = 0
    reads: list[str] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let `ldbfr.storage` mean this bucket."""
        for name in ("write_bytes", "read_bytes", "read_range", "list_objects", "delete", "exists"):
            patch.setattr(storage, name, getattr(self, name))

    def change(self) -> None:
        if self.changes_left is not None:
            if self.changes_left == 0:
                raise Crash
            self.changes_left -= 1
        self.changes += 1

    def write_bytes(self, uri: str, data: bytes) -> None:
        self.change()
        self.objects[uri] = data

    def delete(self, uri: str) -> None:
        self.change()
        self.objects.pop(uri, None)

    def exists(self, uri: str) -> bool:
        return uri in self.objects

    def read_bytes(self, uri: str, *, max_bytes: int | None = None) -> bytes:
        self.reads.append(uri)
        if uri not in self.objects:
            raise StorageError(f"cannot read {uri}: there is no such object; check the key")
        return self.objects[uri]

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        return self.read_bytes(uri)[start : start + length]

    def list_objects(self, uri: str, start_after: str | None = None) -> Iterator[storage.ObjectInfo]:
        prefix = uri.rstrip("/") + "/"
        for name in sorted(self.objects):
            key = name.removeprefix(prefix)
            if name.startswith(prefix) and (start_after is None or key > start_after):
                yield storage.ObjectInfo(name, key, len(self.objects[name]))
        if uri in self.objects:
            yield storage.ObjectInfo(uri, uri.rpartition("/")[2], len(self.objects[uri]))
