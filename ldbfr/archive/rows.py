"""The rows of a run: what is planned for an input, and what became of it.

A plan's rows lie in parts of some thousand, in the order of the listing. What became of the inputs of a unit is written
as one small record, and put together into the part of the manifest that belongs to the plan's part.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ldbfr.inputs.entries import Entry, Kind

Status = Literal["restored", "failed", "skipped"]

CHANGED = "changed"
"""The cause of what failed because its bytes are others than when it was restored."""
NOT_AN_IMAGE = "not an image"
"""The cause of what is skipped by its name."""


class PlanRow(NamedTuple):
    """One input of the plan; the fields up to `checksum` are those of an `Entry`."""

    key: str
    """Path in the mirrored layout, in printable characters; unique among the rows that are not settled."""
    name: str
    """What a person looks for: the file's URI, or archive/member."""
    kind: Kind
    uri: str
    """Of the file or the archive."""
    place: int = 0
    span: int = 0
    size: int = 0
    packing: int = 0
    checksum: int = 0
    unit: int = 0
    """Which unit of its part the row belongs to."""
    status: Status | None = None
    """What the listing alone settles: failed or skipped; None where there is work to do."""
    reason: str | None = None
    """Why, as "cause: detail"."""

    def entry(self) -> Entry:
        """Where the bytes are."""
        return Entry(self.name, self.key, self.kind, self.uri, self.place, self.span, self.size, *self[7:9])


class ResultRow(NamedTuple):
    """What became of one input: a row of the manifest."""

    input: str
    """The file's URI, or archive/member."""
    key: str
    """Path in the mirrored layout."""
    status: Status
    cause: str | None = None
    """A word or two, the same for all inputs that failed alike."""
    reason: str | None = None
    """Why it failed or was skipped, and what to do."""
    note: str | None = None
    """What was done to the picture before the model saw it."""
    size: int | None = None
    """Bytes of the input."""
    digest: str | None = None
    """SHA-256 of the input's bytes."""
    width: int | None = None
    """Of the upright input, in px."""
    height: int | None = None
    faces: int | None = None
    """Faces restored in it."""
    face_details: str | None = None
    """JSON: a list with the box, the landmarks, the outcome and more of every face found in a photo."""
    output: str | None = None
    """URI of the restored image, or of the shard that holds it."""
    member: str | None = None
    """Name of the restored image in its shard; None where it is a file of its own."""
    first_stage: str | None = None
    """The first stage's image, where it is kept: its URI, or its name in the shard."""
    side_by_side: str | None = None
    """Input and result in one picture, where that is kept: its URI, or its name in the shard."""
    seed: int | None = None
    weights: str | None = None
    """Digest of the weights."""
    settings: str | None = None
    """Digest of the settings."""
    sharpness_input: float | None = None
    """Mean absolute Laplacian of what the model saw, in grey levels."""
    sharpness: float | None = None
    """The same of the result."""
    seconds_read: float | None = None
    """Reading, decoding, cropping."""
    seconds_model: float | None = None
    """The micro-batch's time over its length, for each of the faces."""
    seconds_write: float | None = None
    """Encoding and writing."""
    worker: str | None = None
    """host:process that ran the model, or that found out why not."""
    finished: float | None = None
    """Seconds since 1970 (UTC) by that machine's clock."""


class Picture(NamedTuple):
    """A before/after pair that the report may show."""

    key: str
    input: str
    rank: int
    """Place among the random ones: those with the smallest are shown."""
    sharpness: float
    """Of the result; the smallest are the worst. NaN where no face was restored."""
    before: bytes
    """JPEG of what the model saw, or of the photo, small."""
    after: bytes
    """JPEG of the result, of the same size."""
