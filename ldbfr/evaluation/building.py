"""Build a test set: low-quality images by equation (7) from a folder of faces, every draw stored.

TEST SET/
    building.json                settings, versions and names, written first; the set is unfinished without testset.json
    hq/<name>.png                the originals at side S
    lq/<split>/<name>.png        what is restored
    parts/part-00000.jsonl       rows of finished images; gone once the set is
    manifest.jsonl               one row for every low-quality image, in order of names
    testset.json                 written last: settings, counts, versions, digest

Which draw an image gets follows from (seed, split, index), as in `benchmarks/quality.py`; which third it is in from
(seed, index). The files' bytes follow from the pixels (`ldbfr.evaluation.png`). The pixels rest on OpenCV's and numpy's
arithmetic: it runs without the processor's extensions and IPP here, so that x86-64 machines agree as long as the
versions of OpenCV and numpy do. The digest tells.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any

import cv2

from ldbfr import storage
from ldbfr.config import check_range
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.errors import ConfigError, LDBFRError
from ldbfr.evaluation.framing import Framing, tight_crop
from ldbfr.evaluation.manifest import (
    BUILDING_FILE,
    MANIFEST_FILE,
    TESTSET_FILE,
    Description,
    Digests,
    ManifestRow,
    counts_text,
    differences_of,
    dumped,
    read_description,
    read_rows,
    row_lines,
    rows_digest,
)
from ldbfr.evaluation.measuring import in_processes, num_cores
from ldbfr.evaluation.pairing import listed
from ldbfr.evaluation.png import encode_png
from ldbfr.evaluation.reading import decode_exactly, pixels_digest
from ldbfr.evaluation.sources import Face, faces_digest, list_faces, read_faces
from ldbfr.images import Pixels, fit_to_side
from ldbfr.progress import Progress, Tally
from ldbfr.seeds import derive_seed
from ldbfr.storage import join

log = logging.getLogger(__name__)

SOURCES = "sources_sha256"
"""The setting that says what the faces hold, see `ldbfr.evaluation.sources.faces_digest`. Sets of earlier versions have
none."""
PART = 64
"""Faces whose rows are written together: so much is done again after a stop, at most."""
PAPER_SPLITS = ("mild", "medium", "severe")
REPORT_SECONDS = 5.0
LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Plan:
    """What is to be made of every face.

    `splits` are profiles' names, `every` makes each face once for each of them instead of once in all.
    """

    side: int
    splits: tuple[str, ...]
    seed: int
    every: bool
    framing: Framing
    source_framing: Framing
    count: int

    def splits_of(self, index: int, places: Sequence[int]) -> tuple[str, ...]:
        """The splits that face `index` is in."""
        return self.splits if self.every else (self.splits[places[index] * len(self.splits) // self.count],)

    def places(self) -> list[int]:
        """Every face's place in an order drawn by the seed, from which equal parts are cut."""
        order = sorted(range(self.count), key=lambda index: derive_seed(self.seed, "test set", index))
        places = [0] * self.count
        for place, index in enumerate(order):
            places[index] = place
        return places


def build_testset(
    sources: Sequence[str] | str,
    output: str,
    *,
    side: int = 512,
    splits: Sequence[str] = PAPER_SPLITS,
    seed: int = 0,
    every: bool = False,
    limit: int | None = None,
    framing: Framing = "ffhq",
    source_framing: Framing = "ffhq",
    name: str = "CelebA-Test",
    processes: int | None = None,
) -> Description:
    """Build a test set, or go on with it where it was stopped; nothing is done to one that is finished.

    Args:
        sources: folders, tar or zip files of aligned faces, local or in a bucket; taken in order of their names.
        output: of the set: a folder or s3://bucket/prefix.
        side: S, in px, to which the faces are brought.
        splits: degradation profiles; each gets an equal part of the faces, chosen by the seed.
        seed: of the parts and of every draw.
        every: put each face into every split instead, as validations do.
        limit: how many faces, the first ones; all when left out.
        framing: of the set's faces; "tight" is cut out of faces in FFHQ's.
        source_framing: of the faces that are given.
        name: of the set, in reports.
        processes: that degrade and encode; one for every core when left out.

    Raises:
        ConfigError: a setting is impossible, or the folder holds a set of other settings or of other faces (the text
            says which).
        InputError: a face cannot be read; a test set leaves nothing out.
        StorageError: a place cannot be read or written.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    check_range("--side", side, 8, LARGEST_SIDE, "512 is the paper's")
    if limit is not None:
        check_range("--limit", limit, 1, 10**7, "leave it out for all faces")
    check_splits(splits)
    if (source_framing, framing) == ("tight", "ffhq"):
        raise ConfigError("--framing ffhq of --source-framing tight: what was cut off is gone; say --framing tight")
    faces = list_faces(sources, limit)
    plan = Plan(side, tuple(splits), seed, every, framing, source_framing, len(faces))
    names = [face_name for face_name, _, _ in faces]
    settings = {**settings_of(plan, names), SOURCES: faces_digest(faces)}
    description = Description(name=name, settings=settings, versions=versions())
    if (finished := agreed(description, output)) is not None:
        if SOURCES not in finished.settings:
            check_originals(output, plan, faces, processes or num_cores())
        log.info("%s is finished: %s", output, counts_text(finished))
        return finished
    done = finished_parts(output)
    left = [number for number in range(-(-len(faces) // PART)) if number not in done]
    tasks = (
        (index, *face)
        for number in left
        for index, face in enumerate(read_faces(faces[number * PART : (number + 1) * PART]), number * PART)
    )
    results = in_processes(MakeImages(plan, tuple(plan.places()), output), tasks, processes or num_cores())
    write_parts(output, results, left, len(faces))
    return finish(output, description)


def check_splits(splits: Sequence[str]) -> None:
    """ConfigError for no split, one that comes twice, or one that is no profile."""
    if not splits or len(set(splits)) < len(splits):
        raise ConfigError(f"splits {', '.join(splits) or 'none'}: expected one or more, each once")
    for split in splits:
        get_profile(split)


def settings_of(plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    """All that decides what the set holds, but the faces themselves."""
    return {
        "seed": plan.seed,
        "side": plan.side,
        "framing": plan.framing,
        "source_framing": plan.source_framing,
        "every": plan.every,
        "splits": {split: json.loads(json.dumps(asdict(get_profile(split)))) for split in plan.splits},
        "faces": plan.count,
        "names_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }


def versions() -> dict[str, str]:
    """Of what the pixels rest on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("ldbfr", "numpy", "opencv-python-headless", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # another build of OpenCV, or a checkout that is not installed
            found[package] = cv2.__version__ if package.startswith("opencv") else "not installed"
    return found


def agreed(wanted: Description, output: str) -> Description | None:
    """The finished set in the folder; None where it is to be made, after building.json is there.

    Raises:
        ConfigError: the folder holds a set of other settings or faces, or an unfinished one of other versions, or one
            that does not say what its faces hold.
    """
    for file in (TESTSET_FILE, BUILDING_FILE):
        uri = join(output, file)
        if not storage.exists(uri):
            continue
        found = read_description(uri)
        recorded = SOURCES in found.settings
        expected = {key: value for key, value in wanted.settings.items() if recorded or key != SOURCES}
        differences = differences_of(found.settings, expected)
        if not differences and file == BUILDING_FILE:
            differences = differences_of(found.versions, wanted.versions)
        if recorded and found.settings[SOURCES] != wanted.settings[SOURCES]:
            differences.append("the sources' names or bytes are not those that it is made of")
        if differences:
            raise ConfigError(
                f"{output} holds a test set of other settings: {'; '.join(differences)}. Name another folder, or "
                "remove this one"
            )
        if file == BUILDING_FILE and not recorded:
            raise ConfigError(
                f"{output} holds an unfinished test set of an earlier version of ldbfr, which did not record what its "
                "faces hold: whether these are the same cannot be told. Name another folder, or remove this one and "
                "build the set again"
            )
        return found if file == TESTSET_FILE else None
    storage.write_bytes(join(output, BUILDING_FILE), dumped(wanted))
    return None


def check_originals(output: str, plan: Plan, faces: Sequence[Face], processes: int) -> None:
    """Whether a finished set that does not say what it was made of has the originals that these faces give.

    Every draw follows from the settings, so equal originals make an equal set.

    Raises:
        ConfigError: some are others, or cannot be told from others since this machine computes other pixels.
        InputError, StorageError: a face or the manifest cannot be read.
    """
    log.info("%s does not say what its faces held: making %s originals to compare", output, f"{len(faces):,}")
    known = {row.hq: row.pixels_sha256.hq for row in read_rows(join(output, MANIFEST_FILE))}
    progress = Progress(Tally(len(faces)), every=REPORT_SECONDS)
    others = []
    for name, digest in in_processes(OriginalDigest(plan), read_faces(faces), processes):
        if known.get(original_key(name)) != digest:
            others.append(name)
        progress.tally.restored += 1
        progress.update()
    if others:
        raise ConfigError(
            f"{output} holds a test set of an earlier version of ldbfr, which did not record what its faces held, and "
            f"these faces give other originals for {len(others):,} of {len(faces):,}: {listed(others)}. They are other "
            "faces, or other versions of OpenCV or Pillow decode or resize them otherwise. Name another folder, or "
            "remove this one and build the set again"
        )


@dataclass(frozen=True)
class OriginalDigest:
    """Makes a face's original and says what its pixels are; can be sent to a process."""

    plan: Plan

    def __call__(self, face: tuple[str, bytes]) -> tuple[str, str]:
        """(name, encoded face) -> (name, digest of the original's pixels)."""
        name, data = face
        return name, pixels_digest(original_of(self.plan, name, data))


def original_of(plan: Plan, name: str, data: bytes) -> Pixels:
    """The original that an encoded face gives: decoded, framed and brought to the side, (S, S, 3) uint8.

    Raises:
        InputError: it cannot be measured exactly.
    """
    face = decode_exactly(data, name)
    if plan.framing != plan.source_framing:
        face = tight_crop(face)
    return fit_to_side(face, plan.side)


def original_key(name: str) -> str:
    """Path of a face's original in the set."""
    return f"hq/{name}.png"


class MakeImages:
    """Makes all images of a face and writes them; rows come back."""

    def __init__(self, plan: Plan, places: tuple[int, ...], output: str) -> None:
        self.plan, self.places, self.output = plan, places, output

    def __call__(self, task: tuple[int, str, bytes]) -> tuple[int, list[ManifestRow]]:
        """(index, name, encoded face) -> (index, rows)."""
        index, name, data = task
        plan = self.plan
        hq = original_of(plan, name, data)
        hq_file, hq_key = encode_png(hq), original_key(name)
        storage.write_bytes(join(self.output, hq_key), hq_file)
        hq_digest, hq_pixels = hashlib.sha256(hq_file).hexdigest(), pixels_digest(hq)
        rows = []
        for split in plan.splits_of(index, self.places):
            degradation = draw(get_profile(split), degradation_generator(plan.seed, split, index))
            with same_everywhere():
                lq = apply(degradation, hq)
            lq_file, lq_key = encode_png(lq), f"lq/{split}/{name}.png"
            storage.write_bytes(join(self.output, lq_key), lq_file)
            row = ManifestRow(
                name=f"{split}/{name}",
                split=split,
                lq=lq_key,
                hq=hq_key,
                side=plan.side,
                degradation=json.loads(degradation.to_json()),
                sha256=Digests(lq=hashlib.sha256(lq_file).hexdigest(), hq=hq_digest),
                pixels_sha256=Digests(lq=pixels_digest(lq), hq=hq_pixels),
            )
            rows.append(row)
        return index, rows


@contextmanager
def same_everywhere() -> Iterator[None]:
    """OpenCV without code for particular processors: fused or wider arithmetic rounds otherwise."""
    optimized, ipp = cv2.useOptimized(), cv2.ipp.useIPP()
    cv2.setUseOptimized(False)
    cv2.ipp.setUseIPP(False)
    try:
        yield
    finally:
        cv2.setUseOptimized(optimized)
        cv2.ipp.setUseIPP(ipp)


def finished_parts(output: str) -> set[int]:
    """Numbers of the parts whose rows are written."""
    found = (re.fullmatch(r"part-(\d+)\.jsonl", info.key) for info in storage.list_objects(join(output, "parts")))
    return {int(match[1]) for match in found if match}


def write_parts(
    output: str, results: Iterator[tuple[int, list[ManifestRow]]], left: Sequence[int], num_faces: int
) -> None:
    """Write the rows of every part once its images are, and say how far it is."""
    progress = Progress(Tally(sum(min(PART, num_faces - number * PART) for number in left)), every=REPORT_SECONDS)
    for number in left:
        rows: list[ManifestRow] = []
        for _, made in islice(results, min(PART, num_faces - number * PART)):
            rows += made
            progress.tally.restored += 1
            progress.update()
        storage.write_bytes(join(output, "parts", f"part-{number:05d}.jsonl"), row_lines(rows))


def finish(output: str, description: Description) -> Description:
    """Write the manifest from the parts, then testset.json; what was for building only goes."""
    parts = sorted(storage.list_objects(join(output, "parts")), key=lambda info: info.key)
    rows = sorted((row for info in parts for row in read_rows(info.uri)), key=lambda row: row.name)
    counts = Counter(row.split for row in rows)
    per_face = len(description.settings["splits"]) if description.settings["every"] else 1
    if len(rows) != per_face * description.settings["faces"]:
        raise LDBFRError(f"{output}: {len(rows):,} rows for {description.settings['faces']:,} faces; build it anew")
    storage.write_bytes(join(output, MANIFEST_FILE), row_lines(rows))
    wanted = [split for split in description.settings["splits"] if split in counts]
    finished = description.model_copy(
        update={"counts": {split: counts[split] for split in wanted}, "digest": rows_digest(rows)}
    )
    storage.write_bytes(join(output, TESTSET_FILE), dumped(finished))
    for info in parts:
        storage.delete(info.uri)
    storage.delete(join(output, BUILDING_FILE))
    log.info("%s: %s; digest %s", output, counts_text(finished), finished.digest)
    return finished
