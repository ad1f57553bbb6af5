"""`ldbfr testset`: build a test set from a folder of high-quality faces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from ldbfr.evaluation.framing import Framing


@dataclass(frozen=True)
class TestSetCommand:
    """Build a test set from high-quality faces: mild, medium and severe thirds by seed, every draw stored.

    Each face is brought to the set's side and degraded by equation (7). Originals and low-quality images are PNG files
    beside a manifest with the draw and the digests of each; the same seed gives the same bytes on any x86-64 machine
    with the same versions of OpenCV and numpy, and the digest printed at the end tells. The same command goes on where
    it was stopped. Set and sources may be in a bucket.

        ldbfr testset CelebA-HQ/ -o celeba-test/ --limit 3000
        ldbfr testset val-00000.tar -o val-64/ --side 64 --every --source-framing tight --framing tight
        ldbfr testset CelebA-HQ/ -o celeba-test-128/ --side 128 --framing tight
    """

    __test__: ClassVar[bool] = False  # by its name, pytest takes it for one of its own

    source: tyro.conf.Positional[tuple[str, ...]]
    """Aligned faces: folders, .tar or .zip files, here or as s3://…; taken in the order of their names."""
    output: Annotated[str, tyro.conf.arg(aliases=("-o",))]
    """The set: a folder or s3://bucket/prefix."""
    side: int = 512
    """Width and height of its images in px: 512 is the paper's; the side of the weights' preset for other weights."""
    splits: tuple[str, ...] = ("mild", "medium", "severe")
    """Degradation profiles; each gets an equal part of the faces."""
    seed: int = 0
    """Of the parts and of every draw."""
    every: bool = False
    """Put each face into every split, as validations do, instead of into one."""
    limit: int | None = None
    """How many faces, the first by name; all when left out."""
    framing: Framing = "ffhq"
    """Of the set's faces: "tight", for weights of tight crops, is cut out of faces in FFHQ's."""
    source_framing: Framing = "ffhq"
    """Of the faces given: "ffhq", as CelebA-HQ has it too, or "tight"."""
    name: str = "CelebA-Test"
    """Of the set, in reports."""
    processes: int | None = None
    """Processes that degrade and encode; one for every core when left out."""

    def __call__(self) -> int:
        """Build, print what is there; exit code 0."""
        from ldbfr.evaluation.building import build_testset
        from ldbfr.evaluation.manifest import counts_text

        built = build_testset(
            self.source,
            self.output,
            side=self.side,
            splits=self.splits,
            seed=self.seed,
            every=self.every,
            limit=self.limit,
            framing=self.framing,
            source_framing=self.source_framing,
            name=self.name,
            processes=self.processes,
        )
        print(f"{self.output}: {counts_text(built)}\ndigest {built.digest}")
        return 0
