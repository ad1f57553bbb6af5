"""What an evaluation gives: one table of scores, and everything that is needed to make it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from ldbfr.images import Pixels

Better = Literal["higher", "lower", "nearer to 1"]


class Record(BaseModel):
    """A part of the results: frozen, and an unknown key is an error. The PSNR of equal images is written "Infinity"."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Entry(Record):
    """One image of a test set.

    `name` is unique in the set, and what pairs are made by ("mild/000012"). `split` is "mild", "medium", "severe", or
    "all" where a set has no splits. `lq` and `hq` are places of files; `hq` is None where there is no ground truth.
    """

    name: str
    split: str
    lq: str
    hq: str | None = None


class TestSet(Protocol):
    """Images to restore, with or without their originals."""

    @property
    def name(self) -> str:
        """How reports call it: "CelebA-Test (3,000, seed 0)"."""

    @property
    def about(self) -> dict[str, Any]:
        """Where it is, how it was made, its digest: what a report states."""

    @property
    def entries(self) -> Sequence[Entry]:
        """All images, in order of their names."""

    def read(self, entry: Entry) -> tuple[Pixels, Pixels | None]:
        """The low-quality image and its original, (H, W, 3) uint8 of one shape; checked against their digests."""


TestSet.__test__ = False  # type: ignore[attr-defined]  # by its name, pytest takes it for one of its own


class Restorer(Protocol):
    """Anything that makes images out of a test set's: a pipeline, its first stage, a folder of another method's."""

    @property
    def name(self) -> str:
        """What its rows are called; unique in an evaluation."""

    @property
    def about(self) -> dict[str, Any]:
        """Weights' digest, steps, scheduler, seed, or the folder: what a report states."""

    @property
    def is_timed(self) -> bool:
        """Whether the time it takes says something: a folder of results only takes reading."""

    def check(self, entries: Sequence[Entry], side: int) -> None:
        """Refuse a test set that it cannot restore, before anything is done; `side` is its images', in px."""

    def prepare(self) -> None:
        """Load what it needs, once in a process, so that the first images take no longer than others."""

    def __call__(self, entries: Sequence[Entry], lq: Sequence[Pixels]) -> Sequence[Pixels]:
        """The restored images, each of its input's shape."""


class Measure(Record):
    """What a column of the table holds.

    `protocol` says in one or two sentences exactly how it is computed: variant, network and the digest of its weights,
    resize, reference set, library and version.
    """

    name: str
    label: str
    unit: str = ""
    better: Better
    protocol: str


class PairMetric(Protocol):
    """A number for every image, most often against its original."""

    @property
    def measure(self) -> Measure:
        """What it is."""

    @property
    def needs_original(self) -> bool:
        """Whether it can only be taken where there is a ground truth."""

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        """The number; NaN is never given: what cannot be measured raises InputError that says why."""


class SetMetric(Protocol):
    """A number for a set of images, from their features: FID, KID.

    Features are gathered image by image into moments or a bounded store, so that memory does not grow with the set.
    """

    @property
    def measure(self) -> Measure:
        """What it is."""

    @property
    def remark(self) -> str:
        """What has to stand beside the number (`Score.remark`): "" or that it was forced from too few images."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the number and is not in the protocol: whether it is forced, the reference's digest.

        Empty where there is nothing of that; a record of other settings is not taken for this metric's.
        """

    def update(self, image: Pixels, original: Pixels | None, name: str = "") -> None:
        """Take one image (and its original, where that is the reference) in; InputError, with `name`, for NaN."""

    def value(self) -> float:
        """The distance so far. InputError where there are too few images."""

    def fresh(self) -> SetMetric:
        """An empty one of the same kind: one for each restorer and split; networks and references are shared."""


class Missing(Record):
    """A metric that was asked for and could not be measured; never a number."""

    name: str
    reason: str


class Score(Record):
    """A mean over images with its bootstrap 95 % interval, or one number of a whole set (no interval)."""

    mean: float
    low: float | None = None
    high: float | None = None
    num_images: int
    remark: str = ""


class Results(Record):
    """Scores by restorer, split and measure, with all that has to be known about them."""

    test_set: dict[str, Any]
    restorers: dict[str, dict[str, Any]]
    measures: tuple[Measure, ...]
    missing: tuple[Missing, ...] = ()
    scores: dict[str, dict[str, dict[str, Score]]]
    """restorer -> split -> measure's name -> score; the split "all" is over everything."""
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    seconds: dict[str, float] = {}
    """Seconds per image of each restorer."""


@dataclass(frozen=True)
class Row:
    """What was measured on one image of one restorer."""

    restorer: str
    entry: Entry
    values: dict[str, float]
