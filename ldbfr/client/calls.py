"""The requests that an endpoint understands."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict
from urllib.parse import quote

from ldbfr.client.answers import MEDIA_TYPE
from ldbfr.errors import ConfigError, InputError
from ldbfr.images import ImageFormat, format_of_data

Box = tuple[float, float, float, float]
ImageSource = bytes | str | os.PathLike[str]
"""An image's bytes, or the path of its file."""


class Options(TypedDict, total=False):
    """How an image is restored; what is left out is the model's default.

    mode: "photo" finds the faces of a photo, "aligned" takes the image as one aligned face.
    steps: denoising steps; 0 gives the first stage's own image.
    seed: of all noise; 0 when left out.
    condition_scale: factor on the injections.
    strength: share of the model's change that is applied to a photo, 0 to 1.
    samples: restorations of each face; above 1 there is an uncertainty.
    boxes: just these faces: left, top, width, height in px of the upright photo.
    format: of the result; the upload's own when left out.
    quality: of JPEG and WebP, 1 to 100.
    """

    mode: Literal["photo", "aligned"]
    steps: int | None
    seed: int
    condition_scale: float | None
    strength: float
    samples: int
    boxes: Sequence[Box]
    format: ImageFormat | None
    quality: int


@dataclass(frozen=True)
class Call:
    """One request.

    Args:
        method: of HTTP.
        path: below the server's address.
        query: options.
        content: the body.
        content_type: of the body.
        accept: what the answer may be.
        repeatable: whether sending it twice is as good as once.
    """

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    content: bytes = b""
    content_type: str | None = None
    accept: str = "application/json"
    repeatable: bool = True


def restoration(data: bytes, options: Mapping[str, Any]) -> Call:
    """Restore an image. The seed is always said, so that the same request gives the same answer."""
    return Call("POST", "/v1/restorations", query_of({"seed": 0, **options}), data, media_type(data))


def restoration_stream(data: bytes, options: Mapping[str, Any]) -> Call:
    """Restore an image, with previews."""
    query = query_of({"seed": 0, **options})
    return Call("POST", "/v1/restorations/stream", query, data, media_type(data), "text/event-stream")


def faces(data: bytes) -> Call:
    """Find the faces of a photo."""
    return Call("POST", "/v1/faces", content=data, content_type=media_type(data))


def models() -> Call:
    """What restores."""
    return Call("GET", "/v1/models")


def limits() -> Call:
    """What is taken."""
    return Call("GET", "/v1/limits")


def new_job(values: Mapping[str, Any]) -> Call:
    """Begin a batch; not repeatable, because each request begins one."""
    given = {name: value for name, value in values.items() if value is not None}
    body = json.dumps(given).encode()
    return Call("POST", "/v1/jobs", content=body, content_type="application/json", repeatable=False)


def jobs() -> Call:
    """All batches."""
    return Call("GET", "/v1/jobs")


def job(id: str) -> Call:
    """How a batch stands."""
    return Call("GET", job_path(id))


def cancelled_job(id: str) -> Call:
    """Stop a batch."""
    return Call("DELETE", job_path(id))


def job_path(id: str) -> str:
    """Where a batch is.

    Raises:
        ConfigError: it is no name of one.
    """
    if not id or id in (".", ".."):
        raise ConfigError(f"job {id!r}: expected the id that submit_job gave")
    return f"/v1/jobs/{quote(id, safe='')}"


def query_of(options: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Options as a query; None is left out, a box is left,top,width,height.

    Raises:
        ConfigError: an option is unknown.
    """
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    if unknown:
        raise ConfigError(f"option {unknown[0]!r}: expected some of {', '.join(Options.__annotations__)}")
    pairs = []
    for name, value in options.items():
        if name == "boxes":
            pairs += [(name, ",".join(f"{float(length):.17g}" for length in box)) for box in value]
        elif value is not None:
            pairs.append((name, str(value)))
    return tuple(pairs)


def media_type(data: bytes) -> str:
    """Of an image's file, as far as its beginning tells."""
    format = format_of_data(data)
    return "application/octet-stream" if format is None else MEDIA_TYPE[format]


def read_image(image: ImageSource) -> bytes:
    """The bytes of an image that is given as such, or by its path.

    Raises:
        InputError: the file cannot be read.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise InputError(f"{image}: {error.strerror}; give the path of an image, or its bytes") from error
