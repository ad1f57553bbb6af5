"""What the tests of archives share: inputs of every kind, and runs in this process with the real model at tiny size."""

from __future__ import annotations

import gzip
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image

from ldbfr import storage
from ldbfr.archive.ledger import Ledger, UnitDone, manifest_folder
from ldbfr.archive.listing import Sources, make_plan
from ldbfr.archive.outputs import UnitWriter
from ldbfr.archive.plan import Plan, WorkItem
from ldbfr.archive.rounds import Execution, Rounds
from ldbfr.archive.rows import ResultRow
from ldbfr.archive.run import Run
from ldbfr.archive.settings import RestoreSettings, RunSettings
from ldbfr.archive.steps import UnitFailed, UnitReader, UnitRestorer, UnitWork
from ldbfr.photos import FoundFaces, Photo
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.runner import run_here
from ldbfr.tables import from_table
from tests import tiny

WEIGHTS = "0" * 64


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """A picture as a file."""
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(number: int = 0, side: int = 48) -> bytes:
    """A face as a PNG file; every number is another face."""
    return saved(Image.fromarray(tiny.blob_faces(1, side=side, seed=number)[0]), "PNG")


def huge_header() -> bytes:
    """A PNG of a few bytes that claims 30,000 x 30,000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    lines = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(lines)


def input_files() -> dict[str, bytes]:
    """Every kind of file that the job may meet."""
    faces = [Image.fromarray(face) for face in tiny.blob_faces(13, side=48)]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Kodak"
    whole = saved(faces[0], "JPEG")
    return {
        "a.jpg": saved(faces[0], "JPEG"),
        "a.png": saved(faces[1], "PNG"),
        "alpha.png": saved(
            Image.merge("RGBA", (*faces[2].split(), Image.linear_gradient("L").resize((48, 48)))), "PNG"
        ),
        "b.webp": saved(faces[3], "WEBP"),
        "cmyk.jpg": saved(faces[4].convert("CMYK"), "JPEG"),
        "deep.png": saved(Image.fromarray(np.asarray(faces[6])[..., 0].astype(np.uint16) * 257), "PNG"),
        "nested/déjà vu/100% #1?.png": saved(faces[7], "PNG"),
        "nested/scan.bmp": saved(faces[8], "BMP"),
        "nested/scan.tif": saved(faces[9], "TIFF"),
        "palette.png": saved(faces[10].quantize(32), "PNG"),
        "rotated.jpg": saved(faces[11].resize((48, 32)), "JPEG", exif=exif),
        "写真/顔.png": saved(faces[12].resize((tiny.SIDE, tiny.SIDE)), "PNG"),
        "blocked.png": saved(faces[0], "PNG"),
        "empty.png": b"",
        "huge.png": huge_header(),
        "nested/text.png": b"not a picture at all",
        "truncated.jpg": whole[: len(whole) // 2],
        "notes.txt": b"skip me",
    }


def put_files(place: str, files: dict[str, bytes]) -> None:
    """Write files below a place, local or a bucket."""
    for name, data in files.items():
        storage.write_bytes(storage.join(place, *name.split("/")), data)


@lru_cache
def pipeline() -> LDBFRPipeline:
    """The tiny pipeline."""
    return tiny.new_pipeline()


def run_settings(*inputs: str, **options: Any) -> RunSettings:
    """Settings of a run with the tiny preset; what is no setting of a run is one of the restoration."""
    own = {"column": None, "layout": "files", "shard_images": 4, "batch_size": 3, "weights": WEIGHTS}
    own |= {name: options.pop(name) for name in list(options) if name in own}
    restore = RestoreSettings.resolve(tiny.preset(), **{"steps": 2, **options})
    return RunSettings(inputs=tuple(sorted(inputs)), restore=restore, **own)


@contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small are faster so, and do not suffer from what else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class LocalExecution:
    """The three steps in this process, one unit after the other."""

    output: str
    settings: RunSettings
    restore: Callable[[UnitWork], UnitWork | UnitFailed] | None = None
    finder: Callable[[Photo], FoundFaces] | None = None
    """Finds the faces of whole photos."""
    read: list[str] = field(default_factory=list)
    """Keys of the inputs that the model saw."""

    def __call__(self, items: Sequence[WorkItem]) -> Iterator[UnitDone | UnitFailed]:
        reader = UnitReader(self.output, self.settings.restore.side, self.settings.column, finder=self.finder)
        restorer = self.restore or UnitRestorer(pipeline(), self.settings.restore, self.settings.batch_size)
        writer = UnitWriter(self.output, self.settings)
        for item in items:
            for work in reader(item):
                if isinstance(work, UnitFailed):
                    yield work
                    continue
                self.read += [work.rows[place].key for place in work.places]
                with one_thread():
                    restored = restorer(work)
                yield restored if isinstance(restored, UnitFailed) else writer(restored)


def restore_here(
    output: str,
    settings: RunSettings,
    execution: Execution | None = None,
    pause: Callable[[float], None] = lambda _: None,
) -> Ledger:
    """Restore an archive in this process, or go on with it."""
    sources = Sources(settings.inputs, output, settings.column, settings.shard_images)
    plan = Plan(tuple(make_plan(sources, run_here)))
    ledger = Ledger.read(output, plan)
    Rounds(ledger, execution or LocalExecution(output, settings), pause=pause)()
    return ledger


def manifest(output: str) -> dict[str, ResultRow]:
    """The manifest by key; every key must be there once."""
    rows: list[ResultRow] = []
    for found in storage.list_objects(manifest_folder(output)):
        rows += from_table(pq.read_table(pa.BufferReader(storage.read_bytes(found.uri))), ResultRow)
    assert len({row.key for row in rows}) == len(rows)
    return {row.key: row for row in rows}


def outputs(output: str) -> dict[str, bytes]:
    """Everything below the output but the manifest, the report and the work folder."""
    ours = ("_ldbfr/", "manifest/")
    listed = (entry for entry in storage.list_objects(output) if not entry.key.startswith(ours))
    found = (entry for entry in listed if entry.key != "report.html")
    return {entry.key: storage.read_bytes(entry.uri) for entry in found}


def begin(output: str, settings: RunSettings) -> Run:
    """A run, without its lock and what it writes of itself."""
    return Run(output, settings)


def folder(path: Path, files: dict[str, bytes]) -> str:
    """A local folder with files; its path."""
    put_files(str(path), files)
    return str(path)


# ---- sources of every kind ----

KINDS = ("prefix", "tar", "tar.gz", "zip", "webdataset", "parquet", "parquet of URIs", "list", "mixed")


def source_of(kind: str, place: str, files: dict[str, bytes]) -> tuple[str, ...]:
    """Write files below a place, a folder or a prefix, as a source of that kind; the URIs to give to the job."""
    uris = tuple(storage.join(place, "faces", *name.split("/")) for name in files)
    packed = {
        "tar": ("faces.tar", tar_file),
        "tar.gz": ("faces.tar.gz", lambda files: gzip.compress(tar_file(files), mtime=0)),
        "zip": ("faces.zip", zip_file),
        "webdataset": ("shard-000000.tar", lambda files: tar_file(with_sidecars(files))),
        "parquet": ("faces.parquet", lambda files: table_file(image=list(files.values()))),
        "parquet of URIs": ("uris.parquet", lambda _: table_file(uri=[f"faces/{name}" for name in files])),
        "list": ("uris.txt", lambda _: "\n".join(("# faces", "", *uris)).encode()),
    }
    if kind == "mixed":
        names = list(files)
        parts = [{name: files[name] for name in names[start::3]} for start in range(3)]
        chosen = ("prefix", "tar", "parquet")
        return sum((source_of(*one) for one in zip(chosen, [place] * 3, parts, strict=True)), ())
    if kind in ("prefix", "parquet of URIs", "list"):
        put_files(storage.join(place, "faces"), files)
    if kind == "prefix":
        return (storage.join(place, "faces"),)
    name, pack = packed[kind]
    put_files(place, {name: pack(files)})
    return (storage.join(place, name),)


def tar_file(files: dict[str, bytes]) -> bytes:
    """A tar."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return file.getvalue()


def zip_file(files: dict[str, bytes]) -> bytes:
    """A zip."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def table_file(**columns: list[Any]) -> bytes:
    """A parquet file."""
    file = BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=5)
    return file.getvalue()


def with_sidecars(files: dict[str, bytes]) -> dict[str, bytes]:
    """Every file with a .json beside it, as in a webdataset's shard."""
    return {
        key: data
        for name, image in files.items()
        for key, data in ((name, image), (f"{name.rpartition('.')[0]}.json", b'{"caption": "a face"}'))
    }


# ---- the job itself, without Ray ----


def save_weights(folder: Path) -> str:
    """The tiny pipeline as a folder of weights; its path."""
    pipeline().save_pretrained(folder)
    return str(folder)


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """Let `jobs.restore.main` do its work in this process, and not wait between its rounds."""
    from jobs import restore

    def work_off(
        request: Any, run: Run, weights: Any, cluster: Any, finder: Any, rounds: Rounds, progress: Any
    ) -> None:
        rounds.execute = LocalExecution(run.output, run.settings, finder=finder)
        rounds.pause = lambda _: None
        rounds()

    patch.setattr(restore, "work_off", work_off)
