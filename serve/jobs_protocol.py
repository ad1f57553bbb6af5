"""What the HTTP side and the side that runs archive jobs say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from ldbfr.config import Settings
from ldbfr.errors import InputError

Place = Annotated[
    str, Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/\u0000-\u001f\u007f]+)*/?$", max_length=1024)
]
"""A bucket, or a prefix in one."""


class JobRequest(Settings):
    """An archive to restore, as `jobs/restore.py` takes it."""

    input: Place = Field(description="where the images are", examples=["s3://archive/scans"])
    output: Place = Field(description="where the results go", examples=["s3://archive/restored"])
    faces: Literal["all", "largest", "center", "none"] = Field(
        "all", description="which faces of a photo are restored; none: each image is one aligned face"
    )
    format: Literal["same", "png", "jpeg", "webp"] = Field("same", description="of the results; same: the input's")


class JobStatus(Settings):
    """How a job stands. `progress` is what the job itself says, None before it does."""

    id: str = Field(examples=["restore-5f2c9a"])
    status: Literal["pending", "running", "succeeded", "failed", "cancelled"]
    input: str
    output: str
    message: str = ""
    progress: dict[str, Any] | None = None


class JobNotFound(InputError):
    """There is no job of this id."""


class Jobs(Protocol):
    """Starts and follows archive jobs. Whether a client may is settled before any of these is called."""

    async def submit(self, request: JobRequest) -> JobStatus:
        """Start a job."""

    async def get(self, id: str) -> JobStatus:
        """How a job stands; raises JobNotFound."""

    async def list(self) -> Sequence[JobStatus]:
        """All jobs that this endpoint knows, the newest first."""

    async def cancel(self, id: str) -> JobStatus:
        """Stop a job; one that has ended stays as it is. Raises JobNotFound."""
