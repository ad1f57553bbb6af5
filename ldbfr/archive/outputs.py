"""Write the results of a unit: as files that mirror the input, or as one tar or parquet file of their own.

Whatever is written follows from the inputs and the settings alone, so a unit that is done twice writes the same bytes.
"""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from math import nan
from typing import Any, NamedTuple

import numpy as np

from ldbfr import storage
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
from ldbfr.archive.steps import UNFINISHED, UnitFailed, UnitWork, failed
from ldbfr.data.ranges import THREADS, in_parallel
from ldbfr.errors import InputError, LDBFRError, StorageError
from ldbfr.evaluation.metrics import sharpness
from ldbfr.images import Pixels, encode_image, resize
from ldbfr.metadata import Metadata, encode_with_metadata
from ldbfr.photos.output import PhotoFile
from ldbfr.photos.photo import decode_photo
from ldbfr.photos.restorer import NO_FACE, put_back
from ldbfr.seeds import derive_seed
from ldbfr.tables import read_rows, write_rows

PICTURE_SIDE = 192
"""Most px a side of an aligned face in the report."""
PHOTO_SIDE = 320
"""Most px a side of a photo."""


class Shown(NamedTuple):
    """The files that are made of one input."""

    key: str
    """Of the result."""
    files: dict[str, bytes]
    """By the folder that they go to; "" is that of the results."""


class Encoded(NamedTuple):
    """A result before it is written."""

    key: str
    files: dict[str, bytes]
    before: bytes
    """Small JPEG for the report."""
    after: bytes
    known: dict[str, Any]
    """Fields of its row."""


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
            done = UnitDone(work.id, work.rows, self.pictures(work, shown))
            write_record(self.output, done)
        except StorageError as error:
            return UnitFailed(work.id, str(error), fatal=scope(error) == "all")
        return done

    def encode(self, work: UnitWork) -> dict[int, Encoded]:
        """The files of every row that is in work, by its place; rows get everything but where the files lie."""
        shown = {}
        restore = self.settings.restore
        for place in work.photos or work.places:
            started = time.perf_counter()
            row = work.rows[place]
            if work.photos and row.cause != UNFINISHED:
                continue  # one of its faces failed
            try:
                encoded = self.photo(work, place) if work.photos else self.face(work, work.places.index(place))
            except InputError as error:  # a format that cannot hold it
                work.rows[place] = failed(row, "not written", str(error))
                continue
            except MemoryError:
                reason = "the memory does not suffice to compose it; shrink it, or give the machine more"
                work.rows[place] = failed(row, "too large", reason)
                continue
            if isinstance(encoded, str):
                work.rows[place] = failed(row, "no face", encoded)
                continue
            shown[place] = encoded
            work.rows[place] = row._replace(
                status="restored",
                cause=None,
                seed=restore.seed,
                weights=self.settings.weights,
                settings=self.settings_digest,
                seconds_write=time.perf_counter() - started,
                **encoded.known,
            )
        return shown

    @cached_property
    def settings_digest(self) -> str:
        """Of the restoration's settings."""
        return self.settings.restore.digest()

    def face(self, work: UnitWork, number: int) -> Encoded:
        """The files of an aligned face.

        Raises:
            InputError: the format cannot hold it.
        """
        row = work.rows[work.places[number]]
        assert work.faces is not None
        assert work.restored is not None
        face, image = work.faces[number], work.restored[number]
        wanted = {"": image}
        if work.first_stage is not None:
            wanted[FIRST_STAGE_FOLDER] = work.first_stage[number]
        if self.settings.restore.side_by_side:
            wanted[SIDE_BY_SIDE_FOLDER] = np.concatenate([face, image], axis=1)
        files = {folder: self.file(row, pixels, work.metadata[number]) for folder, pixels in wanted.items()}
        known = {"faces": 1, "sharpness_input": sharpness(face), "sharpness": sharpness(image)}
        return Encoded(output_key(row.key, self.settings.restore.format), files, small(face), small(image), known)

    def file(self, row: ResultRow, image: Pixels, metadata: Metadata) -> bytes:
        """One encoded picture, with where it comes from."""
        restore = self.settings.restore
        kept = metadata if restore.keep_metadata else Metadata()
        format = format_of_output(row.key, restore.format)
        about = restore.provenance(self.settings.weights, row.digest or "")
        return encode_with_metadata(image, format, quality=restore.quality, metadata=kept, provenance=about)

    def photo(self, work: UnitWork, place: int) -> Encoded | str:
        """The files of a whole photo; or why it has none.

        Raises:
            InputError: the format cannot hold it.
        """
        restore, row, (data, found) = self.settings.restore, work.rows[place], work.photos[place]
        assert restore.photos is not None
        numbers = work.faces_of(place)
        uncertainties = [work.uncertainties[number] for number in numbers]
        images = [] if work.restored is None else [work.restored[number] for number in numbers]
        if not found.faces and restore.photos.no_face == "failure":
            return NO_FACE
        writer = PhotoFile(
            format_of_output(row.key, restore.format),
            restore.quality,
            restore.keep_metadata,
            restore.provenance(self.settings.weights, row.digest or ""),
        )
        photo = decode_photo(data, name=row.input)
        before = photo.shown.copy() if restore.side_by_side else None
        thumbnail = small(photo.shown, PHOTO_SIDE)
        result = put_back(photo, found, images, restore.photos, seed=restore.seed, uncertainties=uncertainties)
        files = {"": writer(result, data)}
        if before is not None:
            files[SIDE_BY_SIDE_FOLDER] = writer.side_by_side(before, result)
        if work.first_stage is not None:
            firsts = [work.first_stage[number] for number in numbers]
            photo = decode_photo(data, name=row.input)
            files[FIRST_STAGE_FOLDER] = writer(put_back(photo, found, firsts, restore.photos, seed=restore.seed), data)
        notes = [result.note(), *result.photo.losses(writer.format)]
        known = {
            "faces": result.num_restored,
            "face_details": json.dumps([face.values() for face in result.faces]),
            "note": "; ".join(filter(None, notes)) or None,
            "sharpness_input": mean(face.sharpness_before for face in result.faces),
            "sharpness": mean(face.sharpness_after for face in result.faces),
        }
        return Encoded(
            output_key(row.key, restore.format), files, thumbnail, small(result.photo.shown, PHOTO_SIDE), known
        )

    # ---- files ----

    def write_files(self, work: UnitWork, shown: Mapping[int, Encoded]) -> None:
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
                key, files = shown[place].key, shown[place].files
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

    def write_shard(self, work: UnitWork, shown: Mapping[int, Encoded]) -> None:
        """All pictures of the unit in one file, in the order of the inputs; what was kept of an earlier one stays.

        Raises:
            StorageError: the output fails.
        """
        uri = shard_uri(self.output, work.id, self.settings.layout)
        started = time.perf_counter()
        members = {place: Shown(one.key, one.files) for place, one in shown.items()}
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

    def pictures(self, work: UnitWork, shown: Mapping[int, Encoded]) -> list[Picture]:
        """Small pictures of those that the report may show."""
        seed = self.settings.restore.seed
        places = [place for place in shown if work.rows[place].status == "restored"]
        rows = [work.rows[place] for place in places]
        ranks = [derive_seed("gallery", seed, row.key) for row in rows]
        # A photo without faces has no sharpness; it goes last among the worst.
        scores = [nan if row.sharpness is None else row.sharpness for row in rows]
        return [
            Picture(rows[i].key, rows[i].input, ranks[i], scores[i], shown[places[i]].before, shown[places[i]].after)
            for i in wanted(list(zip(ranks, scores, strict=True)))
        ]


def mean(values: Iterable[float | None]) -> float | None:
    """Of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def small(image: Pixels, side: int = PICTURE_SIDE) -> bytes:
    """A JPEG of a picture, at most `side` px a side."""
    height, width = image.shape[:2]
    shrink = min(1.0, side / max(height, width))
    height, width = max(1, round(height * shrink)), max(1, round(width * shrink))
    return encode_image(image if shrink == 1 else resize(image, height, width), "jpeg", quality=85)


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
