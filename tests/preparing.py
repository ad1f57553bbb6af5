"""What the tests of the preparation share: small images, archives of every kind, and a look at what came of them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ldbfr import storage
from ldbfr.data.dataset import read_dataset
from ldbfr.data.shards import ShardedFaces
from ldbfr.images import decode_image, encode_image, fit_to_side, resize
from ldbfr.places import absolute
from ldbfr.preparation.run import Preparation, Summary
from ldbfr.preparation.units import PrepareSettings
from ldbfr.runner import run_here
from tests import tiny

SIDE = 32


def make_settings(*inputs: object, **changes: Any) -> PrepareSettings:
    """Settings of a small preparation."""
    given = {"side": SIDE, "min_side": SIDE, "val_share": 0.3, "near_duplicates": "keep", "seed": 0, "shard_images": 4}
    places = tuple(sorted(absolute(str(place)) for place in inputs))
    return PrepareSettings(inputs=places, **{**given, "column": None, **changes})  # type: ignore[arg-type]


def prepare(
    output: object, *inputs: object, run: Any = run_here, allow_damaged: bool = False, **changes: Any
) -> Summary:
    """All of a preparation, in this process."""
    preparation = Preparation(absolute(str(output)), make_settings(*inputs, **changes))
    if (finished := preparation.begin()) is not None:
        return finished
    plan = preparation.plan()
    preparation.list_archives(plan, run, allow_damaged)
    assert not plan.damaged or allow_damaged, plan.damaged
    if preparation.settings.near_duplicates == "drop":
        list(preparation.scan(plan, run))
    list(preparation.write(plan, run))
    return preparation.finish(plan)


def faces_of(output: object) -> dict[str, np.ndarray]:
    """Every face of a data set, by key."""
    found: dict[str, np.ndarray] = {}
    for split, about in read_dataset(str(output)).splits.items():
        if about.count:
            faces = ShardedFaces.open(str(output), split)
            found |= dict(zip(faces.names, faces.read(range(len(faces))), strict=True))
    return found


def splits_of(output: object) -> dict[str, str]:
    """The split of every key."""
    names = {
        split: list(ShardedFaces.open(str(output), split).names)
        for split, about in read_dataset(str(output)).splits.items()
        if about.count
    }
    return {key: split for split, keys in names.items() for key in keys}


def digests(output: object) -> dict[str, str]:
    """Of the splits."""
    return {name: split.digest for name, split in read_dataset(str(output)).splits.items()}


def report_of(output: object) -> dict[str, dict[str, Any]]:
    """The report, by name."""
    data = storage.read_bytes(storage.join(str(output), "report.parquet"))
    rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    return {row["name"]: row for row in rows}


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pngs(count: int, side: int = 40, seed: int = 0) -> list[bytes]:
    """Blob faces as PNG files."""
    return [encode_image(face, "png") for face in tiny.blob_faces(count, side, seed)]


def textures(count: int, side: int = 40, seed: int = 0) -> list[bytes]:
    """Pictures that do not resemble each other, unlike blob faces."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    return [encode_image(resize(picture, side, side), "png") for picture in coarse]


def as_face(data: bytes) -> np.ndarray:
    """What the data set should hold of an image."""
    return fit_to_side(decode_image(data, name="expected"), SIDE)


def write_tar(files: Mapping[str, bytes], mode: Any = "w") -> bytes:
    """A tar file, or a compressed one."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return output.getvalue()


def members_of(data: bytes) -> list[tarfile.TarInfo]:
    """The members of a tar file."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmembers()


def write_zip(files: Mapping[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", packing) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return output.getvalue()


def write_parquet(columns: Mapping[str, Any], row_group_size: int = 3, **options: Any) -> bytes:
    """A parquet file with several row groups."""
    output = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), output, row_group_size=row_group_size, **options)
    return output.getvalue()


def put(root: object, files: Mapping[str, bytes]) -> None:
    """Write files below a place."""
    for name, data in files.items():
        storage.write_bytes(storage.join(str(root), name), data)


def damage(kind: str) -> bytes:
    """An archive of eight images of which some are lost."""
    files = {f"{n}.png": data for n, data in enumerate(pngs(8))}
    tar, compressed, zipped = write_tar(files), write_tar(files, "w:gz"), write_zip(files)
    offsets = [member.offset for member in members_of(tar)]
    return {
        "no tar": b"hello" * 1000,
        "empty tar": b"",
        "cut member.tar": tar[: offsets[5] + 600],
        "cut between.tar": tar[: offsets[5]],
        "cut header.tar": tar[: offsets[5] + 100],
        "bad header.tar": tar[: offsets[5]] + b"?" * 512 + tar[offsets[5] + 512 :],
        "joined.tar": tar + write_tar({"more.png": files["0.png"]}),
        "cut.tgz": compressed[: len(compressed) // 2],
        "flipped.tgz": compressed[:-6] + b"\0\0" + compressed[-4:],
        "no gzip.tgz": tar,
        "cut.zip": zipped[: len(zipped) // 2],
        "cut.parquet": write_parquet({"image": list(files.values())})[:-50],
        "other.parquet": write_parquet({"a": [1], "b": ["x"]}),
    }[kind]
