"""Write the results of a unit: as files that mirror the input, or as one tar or parquet file of their own.

Whatever is written follows from the inputs and the settings alone, so a unit that is done twice writes the same bytes.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np

from ldbfr import __version__, storage
from ldbfr.archive.faults import scope
from ldbfr.archive.gallery import wanted
from ldbfr.archive.ledger import UnitDone, write_record
from ldbfr.archive.naming import (
    FIRST_STAGE_FOLDER,
    SHARDS_FOLDER,
    SIDE_BY_SIDE_FOLDER,
    format_of_output,
    output_key,
)
from ldbfr.archive.plan import UnitId
from ldbfr.archive.rows import Picture, ResultRow
from ldbfr.archive.settings import RunSettings
from ldbfr.archive.steps import UnitFailed, UnitWork, failed
from ldbfr.data.ranges import THREADS, in_parallel
from ldbfr.errors import InputError, LDBFRError, StorageError
from ldbfr.evaluation.metrics import sharpness
from ldbfr.images import Pixels, encode_image, resize
from ldbfr.metadata import Metadata, encode_with_metadata
from ldbfr.seeds import derive_seed
from ldbfr.tables import read_rows, write_rows

PICTURE_SIDE = 192


class Shown(NamedTuple):
    """The files that are made of one input."""

    key: str
    """Of the result."""
    files: dict[str, bytes]
    """By the folder that they go to; "" is that of the results."""


class ShardRow(NamedTuple):
    """A result in a parquet shard."""

    key: str
    image: bytes
    first_stage: bytes | None = None
    side_by_side: bytes | None = None


@dataclass(frozen=True)
class UnitWriter:
    """Encodes the results of a unit and puts them where their keys say; then records the unit.

    Args:
        output: URI of the run.
        settings: of the run.
    """

    output: str
    settings: RunSettings

    def __call__(self, work: UnitWork) -> UnitDone | UnitFailed:
        """Write the results; a file that cannot be written fails alone, unless nothing can be."""
        try:
            shown = self.encode(work)
            if self.settings.layout == "files":
                self.write_files(work, shown)
            else:
                self.write_shard(work, shown)
            done = UnitDone(work.id, work.rows, self.pictures(work))
            write_record(self.output, done)
        except StorageError as error:
            return UnitFailed(work.id, str(error), fatal=scope(error) == "all")
        return done

    def encode(self, work: UnitWork) -> dict[int, Shown]:
        """The files of every face that is in work, by its row's place; rows get everything but where the files lie."""
        shown = {}
        restore = self.settings.restore
        for number, place in enumerate(work.places):
            started = time.perf_counter()
            row = work.rows[place]
            assert work.faces is not None
            assert work.restored is not None
            face, image = work.faces[number], work.restored[number]
            try:
                shown[place] = Shown(output_key(row.key, restore.format), self.files(work, number))
            except InputError as error:  # a format that cannot hold it
                work.rows[place] = failed(row, "not written", str(error))
                continue
            work.rows[place] = row._replace(
                status="restored",
                cause=None,
                faces=1,
                seed=restore.seed,
                weights=self.settings.weights,
                settings=restore.digest(),
                sharpness_input=sharpness(face),
                sharpness=sharpness(image),
                seconds_write=time.perf_counter() - started,
            )
        return shown

    def files(self, work: UnitWork, number: int) -> dict[str, bytes]:
        """What is written of a face, by folder."""
        row, metadata = work.rows[work.places[number]], work.metadata[number]
        assert work.faces is not None
        assert work.restored is not None
        image = work.restored[number]
        files = {"": self.file(row, image, metadata)}
        if work.first_stage is not None:
            files[FIRST_STAGE_FOLDER] = self.file(row, work.first_stage[number], metadata)
        if self.settings.restore.side_by_side:
            both = np.concatenate([work.faces[number], image], axis=1)
            files[SIDE_BY_SIDE_FOLDER] = self.file(row, both, metadata)
        return files

    def file(self, row: ResultRow, image: Pixels, metadata: Metadata) -> bytes:
        """One encoded picture, with where it comes from."""
        restore = self.settings.restore
        about: dict[str, str | int] = {
            "software": f"ldbfr {__version__}",
            "weights": self.settings.weights,
            "settings": restore.digest(),
            "seed": restore.seed,
            "input_sha256": row.digest or "",
        }
        kept = metadata if restore.keep_metadata else Metadata()
        format = format_of_output(row.key, restore.format)
        return encode_with_metadata(image, format, quality=restore.quality, metadata=kept, provenance=about)

    # ---- files ----

    def write_files(self, work: UnitWork, shown: Mapping[int, Shown]) -> None:
        """Every picture as a file of its own.

        Raises:
            StorageError: the output itself fails.
        """

        places = list(shown)

        def write(number: int) -> None:
            started = time.perf_counter()
            place = places[number]
            row = work.rows[place]
            try:
                # The result itself, "", comes last: where it is, all the others are.
                key, files = shown[place]
                uris = {folder: self.put(key, folder, files[folder]) for folder in sorted(files, reverse=True)}
            except LDBFRError as error:
                if isinstance(error, StorageError) and scope(error) != "one":
                    raise
                work.rows[place] = failed(row, "not written", str(error))
                return
            work.rows[place] = row._replace(
                output=uris[""],
                first_stage=uris.get(FIRST_STAGE_FOLDER),
                side_by_side=uris.get(SIDE_BY_SIDE_FOLDER),
                seconds_write=(row.seconds_write or 0) + time.perf_counter() - started,
                finished=time.time(),
            )

        in_parallel(write, len(places), 1 if storage.is_local(self.output) else THREADS)

    def put(self, key: str, folder: str, data: bytes) -> str:
        """Write one picture; its URI."""
        uri = storage.join(self.output, *([folder] if folder else []), key)
        storage.write_bytes(uri, data)
        return uri

    # ---- shards ----

    def write_shard(self, work: UnitWork, shown: Mapping[int, Shown]) -> None:
        """All pictures of the unit in one file, in the order of the inputs; what was kept of an earlier one stays.

        Raises:
            StorageError: the output fails.
        """
        uri = shard_uri(self.output, work.id, self.settings.layout)
        started = time.perf_counter()
        members = dict(shown)
        kept = [place for place, row in enumerate(work.rows) if row.output == uri and place not in shown]
        if kept:
            try:
                before = {one.key: one for one in read_shard(uri)}
                members |= {place: before[work.rows[place].member or ""] for place in kept}
            except (tarfile.TarError, KeyError, AssertionError) as error:
                raise StorageError(
                    f"{uri} is not the shard that this run wrote ({error!r}), and {len(kept)} of its results would be "
                    "lost; put it back, or begin anew with another output"
                ) from error
        if not members:
            return
        ordered = [members[place] for place in sorted(members)]
        if self.settings.layout == "tar":
            storage.write_bytes(uri, tar_bytes(ordered))
        else:
            write_rows(uri, [shard_row(one) for one in ordered], ShardRow)
        share = (time.perf_counter() - started) / len(members)
        for place, one in shown.items():
            row = work.rows[place]
            work.rows[place] = row._replace(
                output=uri,
                member=one.key,
                first_stage=one.key if FIRST_STAGE_FOLDER in one.files else None,
                side_by_side=one.key if SIDE_BY_SIDE_FOLDER in one.files else None,
                seconds_write=(row.seconds_write or 0) + share,
                finished=time.time(),
            )

    # ---- pictures for the report ----

    def pictures(self, work: UnitWork) -> list[Picture]:
        """Small pictures of those that the report may show."""
        seed = self.settings.restore.seed
        numbers = [number for number, place in enumerate(work.places) if work.rows[place].status == "restored"]
        rows = [work.rows[work.places[number]] for number in numbers]
        ranks = [derive_seed("gallery", seed, row.key) for row in rows]
        scores = [row.sharpness or 0.0 for row in rows]
        if work.faces is None or work.restored is None:
            return []
        return [
            Picture(rows[i].key, rows[i].input, ranks[i], scores[i], small(work.faces[n]), small(work.restored[n]))
            for i in wanted(list(zip(ranks, scores, strict=True)))
            for n in [numbers[i]]
        ]


def small(face: Pixels) -> bytes:
    """A JPEG of a face, at most PICTURE_SIDE wide."""
    side = min(len(face), PICTURE_SIDE)
    return encode_image(face if side == len(face) else resize(face, side, side), "jpeg", quality=85)


def shard_uri(output: str, unit: UnitId, layout: str) -> str:
    """Where the results of a unit are, in a layout of shards."""
    return storage.join(output, SHARDS_FOLDER, f"{unit.part:06d}-{unit.unit:06d}.{layout}")


def shard_row(shown: Shown) -> ShardRow:
    """As a row of a parquet shard."""
    files = shown.files
    return ShardRow(shown.key, files[""], files.get(FIRST_STAGE_FOLDER), files.get(SIDE_BY_SIDE_FOLDER))


def tar_bytes(members: Sequence[Shown]) -> bytes:
    """A plain tar with the pictures, the others than results below folders of their own."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for shown in members:
            for folder, data in shown.files.items():
                info = tarfile.TarInfo(f"{folder}/{shown.key}" if folder else shown.key)
                info.size = len(data)
                archive.addfile(info, BytesIO(data))
    return file.getvalue()


def read_shard(uri: str) -> Iterator[Shown]:
    """The pictures of a shard, in order."""
    if uri.endswith(".parquet"):
        for row in read_rows(uri, ShardRow):
            files = {"": row.image, FIRST_STAGE_FOLDER: row.first_stage, SIDE_BY_SIDE_FOLDER: row.side_by_side}
            yield Shown(row.key, {folder: data for folder, data in files.items() if data is not None})
        return
    found: dict[str, Shown] = {}
    with tarfile.open(fileobj=BytesIO(storage.read_bytes(uri)), mode="r:") as archive:
        for member in archive:
            first, _, rest = member.name.partition("/")
            folder, key = (first, rest) if first in (FIRST_STAGE_FOLDER, SIDE_BY_SIDE_FOLDER) else ("", member.name)
            data = archive.extractfile(member)
            assert data is not None
            found.setdefault(key, Shown(key, {})).files[folder] = data.read()
    yield from found.values()
