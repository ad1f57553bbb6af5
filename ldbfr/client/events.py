"""Server-sent events (the WHATWG's text/event-stream), as their bytes come in."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_EVENT = 2**30
"""Characters of one event: a large photo's result with all its samples."""


class Event(NamedTuple):
    """One event."""

    name: str
    data: str


class EventTooLongError(ValueError):
    """An event has no end within MOST_EVENT."""


@dataclass
class EventParser:
    """Takes bytes in pieces of any size, gives the events that are whole; comments and unknown fields say nothing."""

    most: int = MOST_EVENT
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8-sig")("replace")
    )
    _pieces: list[str] = field(default_factory=list)
    _name: str = ""
    _data: list[str] = field(default_factory=list)
    _size: int = 0
    _after_return: bool = False

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that end in this piece.

        Raises:
            EventTooLongError: one does not end.
        """
        text = self._decoder.decode(piece)
        if self._after_return and text:
            text = text.removeprefix("\n")  # of a line end that was cut in two
            self._after_return = False
        if text.endswith("\r"):
            self._after_return = True
        first, *others = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._keep(first)
        for other in others:
            line, self._pieces = "".join(self._pieces), []
            yield from self._line(line)
            self._keep(other)

    def _keep(self, piece: str) -> None:
        """Add to the line that has no end yet."""
        if piece:
            self._pieces.append(piece)
            self._size += len(piece)
            if self._size > self.most:
                raise EventTooLongError(f"an event of more than {self.most:,} characters")

    def _line(self, line: str) -> Iterator[Event]:
        """A whole line; an empty one ends an event."""
        if not line:
            if self._data:
                yield Event(self._name or "message", "\n".join(self._data))
            self._name, self._data, self._size = "", [], 0
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._name = value
        elif name == "data":
            self._data.append(value)
        elif not self._data:
            self._size = 0  # comments that keep the connection alive do not add up
