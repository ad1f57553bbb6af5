"""Uploads: a body -> the image's bytes and the options, with every limit applied before any pixel is decoded.

The whole upload stays in memory, bounded by the settings; nothing of it is written to a disk.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serve.bombs import check_header
from serve.problems import FieldError, Problem
from serve.protocol import RestorationOptions
from serve.settings import EndpointSettings

RAW_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/tiff", "application/octet-stream")
FORM_TYPE = "multipart/form-data"
IMAGE_FIELD = "image"
REPEATED = ("boxes",)

MOST_PARTS = 96
MOST_FIELD_BYTES = 1024

Fields = list[tuple[str, str]]


@dataclass(frozen=True)
class Upload:
    """An image's file, whose header has been looked at, and the options of a form."""

    data: bytes
    fields: Fields = field(default_factory=list)


async def read_upload(request: Request, settings: EndpointSettings) -> Upload:
    """Read a request's image.

    Raises:
        Problem: bad-request, timeout, too-large, unsupported-media.
        InputError: no image, or a damaged one.
    """
    kind = request.headers.get("content-type", RAW_TYPES[-1])
    media_type, parameters = parse_options_header(kind)
    media = media_type.decode("latin-1").lower()
    if encoding := request.headers.get("content-encoding"):
        raise Problem("unsupported-media", f"Content-Encoding {encoding!r}: expected a body that is not encoded")
    if media == FORM_TYPE:
        upload = await _read_form(request, settings, parameters.get(b"boundary", b""))
    elif media in RAW_TYPES:
        upload = Upload(await read_body(request, settings.max_body_bytes, settings.upload_seconds))
    else:
        raise Problem(
            "unsupported-media",
            f"Content-Type {media!r}: expected {', '.join(RAW_TYPES)} or {FORM_TYPE}; "
            "with curl: -H 'Content-Type: application/octet-stream' --data-binary @FILE, or -F image=@FILE",
            {"Accept": ", ".join((*RAW_TYPES, FORM_TYPE))},
        )
    await asyncio.to_thread(check_header, upload.data, settings.max_pixels)  # a large header takes a while
    return upload


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """A whole body of at most `most` bytes; Problem too-large or timeout."""
    body = bytearray()
    await _receive(request, most, seconds, body.extend)
    return bytes(body)


def parse_options(
    fields: Iterable[tuple[str, str]],
    settings: EndpointSettings,
    known: Collection[str] = tuple(RestorationOptions.model_fields),
) -> RestorationOptions:
    """Options from the query string or a form, of those that the route knows.

    Raises:
        Problem: bad-options, with an entry for each that is unknown, given twice, or out of range.
    """
    values: dict[str, object] = {}
    boxes: list[tuple[float, ...]] = []
    errors: list[FieldError] = []
    for name, text in fields:
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "this route has none"
            errors.append(FieldError(field=name[:64], message=f"there is no such option; {there}"))
        elif name in REPEATED:
            if (box := _box(text)) is None:
                errors.append(FieldError(field=name, message=f"{text[:64]!r}: expected left,top,width,height in px"))
            else:
                boxes.append(box)
        elif name in values:
            errors.append(FieldError(field=name, message="given more than once; give it once"))
        else:
            values[name] = text
    try:
        options = RestorationOptions.model_validate({**values, **({"boxes": boxes} if boxes else {})})
    except ValidationError as error:
        errors += [
            FieldError(field=".".join(map(str, problem["loc"])), message=problem["msg"]) for problem in error.errors()
        ]
        raise Problem.bad_options(errors) from None
    errors += _beyond(options, settings)
    if errors:
        raise Problem.bad_options(errors)
    return options


def _beyond(options: RestorationOptions, settings: EndpointSettings) -> Iterable[FieldError]:
    for name, value, most in (
        ("samples", options.samples, settings.max_samples),
        ("steps", options.steps or 0, settings.max_steps),
    ):
        if value > most:
            yield FieldError(field=name, message=f"{value}: expected at most {most}, which this service allows")


def _box(text: str) -> tuple[float, ...] | None:
    try:
        box = tuple(float(part) for part in text.split(","))
    except ValueError:
        return None
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        return None
    return box


async def _receive(request: Request, most: int, seconds: float, sink: Callable[[bytes], object]) -> None:
    """A body as it comes, in a bounded time and of a bounded size, whether or not it says its length."""
    too_large = Problem("too-large", f"the body has more than {most:,} bytes; send a smaller file", max_body_bytes=most)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    received, limit = 0, asyncio.timeout(seconds)
    try:
        async with limit:
            async for chunk in request.stream():
                received += len(chunk)
                if received > most:
                    raise too_large
                sink(chunk)
    except TimeoutError:
        if not limit.expired():
            raise
        raise Problem(
            "timeout",
            f"the body was not complete after {seconds:g} s ({received:,} bytes had come); send it in one go",
        ) from None


async def _read_form(request: Request, settings: EndpointSettings, boundary: bytes) -> Upload:
    if not boundary:
        raise Problem("bad-request", f"Content-Type {FORM_TYPE} without a boundary; let the client library set it")
    try:
        form = _Form(boundary)
        await _receive(request, settings.max_body_bytes, settings.upload_seconds, form.parser.write)
        form.parser.finalize()
    except FormParserError as error:
        raise Problem("bad-request", f"the form cannot be read: {error}") from error
    if not form.is_complete:
        raise Problem("bad-request", "the form ends before its last boundary; send it again")
    if form.image is None:
        raise Problem("bad-request", f"the form has no field {IMAGE_FIELD!r}, expected one with the image file")
    return Upload(bytes(form.image), form.fields)


class _Form:
    """Collects the parts of a multipart body; Problem bad-request for what no upload needs.

    Args:
        boundary: between the parts.
    """

    def __init__(self, boundary: bytes) -> None:
        self.image: bytearray | None = None
        self.fields: Fields = []
        self.is_complete = False
        self._parts = 0
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._name, self._data = "", bytearray()
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise Problem("bad-request", f"the form has more than {MOST_PARTS} fields; leave out what is no option")
        self._disposition, self._data = b"", bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, parameters = parse_options_header(self._disposition)
        self._name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if self._name != IMAGE_FIELD:
            return
        if self.image is not None:
            raise Problem("bad-request", f"the form has several fields {IMAGE_FIELD!r}, expected one; send one by one")
        self._data = self.image = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != IMAGE_FIELD and len(self._data) + end - start > MOST_FIELD_BYTES:
            raise Problem(
                "bad-request",
                f"the form's field {self._name[:64]!r} has more than {MOST_FIELD_BYTES:,} bytes; "
                f"the image belongs into the field {IMAGE_FIELD!r}",
            )
        self._data += data[start:end]

    def _part_end(self) -> None:
        if self._name != IMAGE_FIELD:
            self.fields.append((self._name, self._data.decode("utf-8", "replace")))

    def _end(self) -> None:
        self.is_complete = True
