"""Prepared data sets: what is written is read, in any order, and nothing else is ever given out for it."""

import json
import multiprocessing
import pickle
import re
import tarfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from ldbfr import storage
from ldbfr.data.dataset import DATASET_FILE, IndexRow, is_dataset, read_dataset, read_index, write_dataset, write_index
from ldbfr.data.index import FaceImages
from ldbfr.data.sampler import BatchSampler
from ldbfr.data.shards import ShardedFaces, count_faces, has_split, open_faces
from ldbfr.errors import InputError, StorageError
from ldbfr.images import decode_image, encode_image
from tests.prepared import KEYS, write_set, write_shards
from tests.tiny import SIDE, blob_faces, flip_byte

SHARD = "shards/shard-000001.tar"


@pytest.fixture(params=["local", "file", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URI below which there is nothing yet."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_root"))
    return str(tmp_path / "set") if request.param == "local" else (tmp_path / "a file set").as_uri()


# ---- what is written is read ----


def test_any_order_with_any_repetition_gives_the_faces_that_were_written(root: str, rng: np.random.Generator) -> None:
    pixels, _ = write_set(root)
    faces = ShardedFaces.open(root)

    assert (len(faces), faces.side, list(faces.names)) == (len(KEYS), SIDE, list(KEYS))
    for count in (0, 1, 2, 8, 20):
        indices = rng.integers(len(KEYS), size=count)
        found = faces.read(indices)
        assert found.dtype == np.uint8
        assert np.array_equal(found, pixels[indices])
        found[:] = 0  # the caller's own
    assert np.array_equal(faces.read(list(range(8))), pixels)


def test_a_split_holds_its_rows_and_no_others(root: str) -> None:
    pixels, dataset = write_set(root, {"train": 5, "val": 3})
    train, val = (ShardedFaces.open(root, split) for split in ("train", "val"))
    assert np.array_equal(np.concatenate([train.read(range(5)), val.read(range(3))]), pixels)
    assert (*train.names, *val.names) == KEYS
    assert (train.digest, val.digest) == (dataset.splits["train"].digest, dataset.splits["val"].digest)
    assert read_dataset(root) == dataset


@pytest.mark.parametrize("mode", ["r:", "r|"], ids=["seeking", "streaming"])
def test_tarfile_reads_the_shards_and_agrees_with_the_index(root: str, mode: str) -> None:
    pixels, _ = write_set(root)
    index = read_index(root, "train")
    found: dict[str, np.ndarray] = {}
    for shard in index.shards:
        with tarfile.open(fileobj=BytesIO(storage.read_bytes(storage.join(root, "shards", shard))), mode=mode) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                found[member.name] = decode_image(stream.read(), name=member.name)
                assert member.offset_data == index.offsets[len(found) - 1]
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
    assert list(found) == [f"{key}.png" for key in KEYS]
    assert np.array_equal(np.stack(list(found.values())), pixels)


def test_equal_faces_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_set(str(tmp_path / name))
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 5
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files)


def test_the_digest_depends_on_side_order_keys_and_bytes(tmp_path: Path) -> None:
    rows = write_shards(str(tmp_path), blob_faces(3), KEYS[:3])
    variants = [rows, rows[::-1], rows[:2], [rows[0]._replace(key="other"), *rows[1:]]]
    variants.append([rows[0]._replace(sha256=rows[1].sha256), *rows[1:]])
    digests = set()
    for variant in variants:
        write_index(str(tmp_path), "train", variant)
        digests |= {read_index(str(tmp_path), "train").digest(side) for side in (32, 64)}
    assert len(digests) == 2 * len(variants)
    moved = [row._replace(offset=row.offset + 512) for row in rows]
    write_index(str(tmp_path), "train", moved)
    assert read_index(str(tmp_path), "train").digest(32) in digests, "where a face lies is not what it is"


def test_batches_are_those_of_the_same_faces_in_memory(tmp_path: Path) -> None:
    pixels, _ = write_set(str(tmp_path))
    batches = []
    for faces in (ShardedFaces.open(str(tmp_path)), FaceImages(pixels, KEYS)):
        sampler = BatchSampler(faces, 3, seed=1, stage="dc_vqr", flip=True, profile="wide")
        batches.append([(batch.hq, batch.lq) for batch in map(sampler.batch, range(6))])
        assert sampler.names(4) == [faces.names[int(i)] for i in sampler.batch(4).indices]
    for (hq, lq), (expected_hq, expected_lq) in zip(*batches, strict=True):
        assert lq is not None
        assert hq.equal(expected_hq)
        assert lq.equal(expected_lq)


def read_in_another_process(pickled: bytes, places: list[int]) -> np.ndarray:
    faces: ShardedFaces = pickle.loads(pickled)
    return faces.read(places)


def test_it_may_be_used_from_several_threads_and_in_another_process(tmp_path: Path) -> None:
    pixels, _ = write_set(str(tmp_path))
    faces = ShardedFaces.open(str(tmp_path), threads=4)
    orders = [np.random.default_rng(seed).integers(8, size=16) for seed in range(24)]
    with ThreadPoolExecutor(6) as callers:
        for order, found in zip(orders, callers.map(faces.read, orders), strict=True):
            assert np.array_equal(found, pixels[order])
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of a fork, from Python 3.12 on
        pool = multiprocessing.get_context("fork").Pool(1)
    with pool:
        found = pool.apply_async(read_in_another_process, (pickle.dumps(faces), [7, 0, 7])).get(timeout=60)
    assert np.array_equal(found, pixels[[7, 0, 7]])


@pytest.mark.parametrize("index", [8, -1])
def test_a_place_that_is_none_is_refused(tmp_path: Path, index: int) -> None:
    write_set(str(tmp_path))
    with pytest.raises(IndexError, match=f"index {index}: expected 0 to 7"):
        ShardedFaces.open(str(tmp_path)).read([0, index])


# ---- shards that vanish or change under a run ----


def change(uri: str, how: Callable[[bytes], bytes]) -> None:
    storage.write_bytes(uri, how(storage.read_bytes(uri)))


DAMAGES: dict[str, tuple[Callable[[str], None], str]] = {
    "vanished": (lambda root: storage.delete(storage.join(root, SHARD)), r"there is no such (file|object)"),
    "cut": (lambda root: change(storage.join(root, SHARD), lambda data: data[: len(data) // 3]), "it ends before"),
    "emptied": (lambda root: change(storage.join(root, SHARD), lambda data: b""), "it ends before"),
    "other bytes": (
        lambda root: change(storage.join(root, SHARD), lambda data: data[:-1000].replace(b"IDAT", b"IDAX")),
        r"was changed: SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}",
    ),
    "another shard": (
        lambda root: change(
            storage.join(root, SHARD), lambda data: storage.read_bytes(storage.join(root, SHARD.replace("1", "0")))
        ),
        r"was changed|it ends before",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_changes_mid_run_is_named_with_the_face_and_what_to_do(root: str, damage: str) -> None:
    pixels, _ = write_set(root)
    faces = ShardedFaces.open(root)
    faces.read(range(8))
    act, text = DAMAGES[damage]

    act(root)

    with pytest.raises(StorageError, match=text) as caught:
        faces.read([5, 0])
    for part in (SHARD, repr(KEYS[5]), "prepare the data set again"):
        assert part in str(caught.value)
    assert np.array_equal(faces.read([0, 1, 2, 6, 7]), pixels[[0, 1, 2, 6, 7]]), "the other shards serve on"


def test_no_flipped_byte_of_a_shard_is_ever_given_out(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels, _ = write_set(str(tmp_path))
    faces = ShardedFaces.open(str(tmp_path))
    index = faces.index
    for face in range(3):
        position = int(index.offsets[face] + rng.integers(index.sizes[face]))
        flip_byte(tmp_path / "shards" / "shard-000000.tar", position)
        with pytest.raises(StorageError, match=re.escape(f"face {KEYS[face]!r}")):
            faces.read([face])
        flip_byte(tmp_path / "shards" / "shard-000000.tar", position)
    assert np.array_equal(faces.read([0, 1, 2]), pixels[:3])


def test_a_face_of_another_size_is_refused(tmp_path: Path) -> None:
    rows = write_shards(str(tmp_path), blob_faces(2, side=16), KEYS[:2])
    write_index(str(tmp_path), "train", rows)
    write_dataset(str(tmp_path), SIDE, ["train"], {})
    with pytest.raises(InputError, match=rf"face 'plain' has 16 x 16 px, expected {SIDE} x {SIDE}.*prepare the data"):
        ShardedFaces.open(str(tmp_path)).read([0])


# ---- descriptions and indexes that are not there, or damaged ----


def rewrite_index(root: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    path = root / "index" / "train.parquet"
    pyarrow.parquet.write_table(edit(pyarrow.parquet.read_table(path)), path)


def set_column(name: str, values: list[object]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, pa.array(values))


def write_dataset_json(root: Path, **changes: object) -> None:
    path = root / DATASET_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no description": (lambda root: (root / DATASET_FILE).unlink(), InputError, r"no data set at .*written last"),
    "half a description": (
        lambda root: (root / DATASET_FILE).write_text('{"format": 1, "side"'),
        InputError,
        r"dataset\.json is damaged .*prepare the data again",
    ),
    "a list": (lambda root: (root / DATASET_FILE).write_text("[]"), InputError, r"dataset\.json is damaged"),
    "a later format": (lambda root: write_dataset_json(root, format=2), InputError, r"of format 2, expected 1; use"),
    "no split": (lambda root: write_dataset_json(root, splits={}), InputError, r"no split 'train', it has none; prep"),
    "another side": (lambda root: write_dataset_json(root, side=64), InputError, r"not the one that dataset\.json"),
    "no index": (
        lambda root: (root / "index" / "train.parquet").unlink(),
        StorageError,
        r"the index of train cannot be read: .*no such file.*or prepare the data again",
    ),
    "half an index": (
        lambda root: change(str(root / "index" / "train.parquet"), lambda data: data[: len(data) // 2]),
        InputError,
        r"train\.parquet is damaged \(.*prepare the data again",
    ),
    "a row less": (lambda root: rewrite_index(root, lambda t: t.slice(1)), InputError, r"\(7 faces\) is not the one"),
    "another order": (
        lambda root: rewrite_index(root, lambda table: table.take(list(range(7, -1, -1)))),
        InputError,
        r"\(8 faces\) is not the one that dataset\.json describes \(8 faces, digest [0-9a-f]{16}\): it was changed",
    ),
    "no offsets": (lambda root: rewrite_index(root, lambda t: t.drop_columns(["offset"])), InputError, "is damaged"),
    "numbers for keys": (
        lambda root: rewrite_index(root, set_column("offset", ["one"] * 8)),
        InputError,
        r"train\.parquet is damaged",
    ),
    "a shard elsewhere": (
        lambda root: rewrite_index(root, set_column("shard", ["../../secret"] * 8)),
        InputError,
        r"damaged \('\.\./\.\./secret' names no shard\)",
    ),
    "a short digest": (
        lambda root: rewrite_index(root, set_column("sha256", ["abc"] * 8)),
        InputError,
        r"damaged \('abc' is no SHA-256\)",
    ),
    "a missing value": (
        lambda root: rewrite_index(root, set_column("key", [None, *KEYS[1:]])),
        InputError,
        r"damaged \(a value is missing\)",
    ),
    "negative offsets": (
        lambda root: rewrite_index(root, set_column("offset", [-1] * 8)),
        InputError,
        "an offset is negative",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_damaged_data_set_is_refused_when_opened(tmp_path: Path, broken: str) -> None:
    write_set(str(tmp_path))
    act, kind, text = BROKEN[broken]
    act(tmp_path)
    with pytest.raises(kind, match=text):
        ShardedFaces.open(str(tmp_path))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_set(str(tmp_path), {"train": 8, "val": 0})
    assert not has_split(str(tmp_path), "val")
    with pytest.raises(InputError, match=r"the split 'val' of .* holds no face; prepare more"):
        ShardedFaces.open(str(tmp_path), "val")
    with pytest.raises(InputError, match=r"has no split 'test', it has train, val; prepare"):
        ShardedFaces.open(str(tmp_path), "test")
    with pytest.raises(InputError, match=r"split '\.\./x': expected letters"):
        write_index(str(tmp_path), "../x", [])


def test_a_description_is_not_written_over_a_gap(root: str) -> None:
    rows = write_shards(root, blob_faces(6), KEYS[:6])

    def refused(split_rows: dict[str, list[IndexRow]], text: str) -> None:
        for split, its_rows in split_rows.items():
            write_index(root, split, its_rows)
        with pytest.raises(InputError, match=text):
            write_dataset(root, SIDE, split_rows, {})
        assert not is_dataset(root)

    refused({"train": rows, "val": rows[:1]}, "the key 'plain' is in train and again in val")
    refused({"train": [*rows, rows[0]]}, "the key 'plain' is in train and again in train")
    refused({"train": [*rows, rows[0]._replace(key="new", shard="shard-000007.tar")]}, r"000007\.tar has 0 bytes, exp")
    change(storage.join(root, SHARD), lambda data: data[:600])
    refused({"train": rows}, r"shard-000001\.tar has 600 bytes, expected at least .* by the index of train; write the")


# ---- one way to open any data ----


def test_open_faces_takes_prepared_sets_and_plain_folders(root: str, tmp_path: Path) -> None:
    pixels, _ = write_set(root, {"train": 5, "val": 3})
    folder = tmp_path / "images"
    folder.mkdir()
    for number, face in enumerate(pixels):
        (folder / f"{number}.png").write_bytes(encode_image(face, "png"))

    for split, expected in {"train": pixels[:5], "val": pixels[5:]}.items():
        assert np.array_equal(open_faces([root], SIDE, split, 0).read(range(len(expected))), expected)
        assert count_faces([root], split) == len(expected)
        assert has_split(root, split)
    for source in (str(folder), folder.as_uri()):
        assert np.array_equal(open_faces([source], SIDE).read(range(8)), pixels)
        assert count_faces([source, source]) == 16
        assert not has_split(source, "train")
    assert count_faces([root], "test") == 0


def test_open_faces_says_what_to_do_with_other_data(root: str, tmp_path: Path) -> None:
    write_set(root)
    other = str(tmp_path)
    for sources, text in (
        ([root], rf"holds faces at {SIDE} px, expected 64; .*prepare the images again with jobs/prepare\.py at 64 px"),
        ([root, other], r"is a prepared data set, expected no other source .*found 2; prepare all of the images"),
        ([other, root], r"is a prepared data set, expected no other source"),
        ([], "no data: name"),
        ([str(tmp_path / "missing")], "expected a folder, a .tar or a .zip"),
    ):
        with pytest.raises(InputError, match=text):
            open_faces(sources, 64)
    storage.delete(storage.join(root, DATASET_FILE))
    text = r"there is no dataset\.json.*first, with jobs/prepare\.py" if root.startswith("s3:") else "is an unfinished"
    for use in (lambda: open_faces([root], SIDE), lambda: count_faces([root])):
        with pytest.raises(InputError, match=text):
            use()
