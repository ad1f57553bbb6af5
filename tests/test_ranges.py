"""The cache of byte ranges: bounded, shared, never wrong, and never the end of a training."""

import hashlib
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ldbfr import storage
from ldbfr.data import shards
from ldbfr.data.ranges import Piece, RangeCache, read_piece
from ldbfr.data.shards import ShardedFaces, open_faces
from ldbfr.errors import StorageError
from tests.cache_worker import digest, put_many
from tests.prepared import KEYS, largest_file, write_set
from tests.tiny import SIDE, flip_byte


def entries(folder: Path) -> list[Path]:
    """Files that hold entries, finished or not."""
    return sorted(path for path in folder.glob("*/*") if path.is_file())


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


def counted(folder: Path) -> int:
    return int((folder / "bytes").read_text())


@pytest.fixture
def ranges_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URI of every range that is read from storage from here on."""
    calls: list[str] = []
    read_range = storage.read_range

    def counting(uri: str, start: int, length: int) -> bytes:
        calls.append(uri)
        return read_range(uri, start, length)

    monkeypatch.setattr(storage, "read_range", counting)
    return calls


# ---- what is kept is given back ----


def test_what_is_put_is_got_by_its_digest(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 1000)
    assert cache.get(digest(b"one")) is None
    for data in (b"one", b"other"):
        cache.put(digest(data), data)
    for reader in (cache, RangeCache(tmp_path, 1000)):
        assert [reader.get(digest(data)) for data in (b"one", b"other")] == [b"one", b"other"]
        assert reader.get(digest(b"third")) is None
    assert counted(tmp_path) == held(tmp_path) == 8


def test_a_piece_whose_bytes_are_others_is_refused_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    cache = RangeCache(tmp_path / "cache", 1000)
    piece = Piece(str(tmp_path / "file"), 2, 3, digest(b"234"), "piece 7")
    assert read_piece(piece, cache) == b"234"
    with pytest.raises(StorageError, match=r"piece 7 \(bytes 2 to 5 of .*file\) was changed: SHA-256 .*expected .*put"):
        read_piece(piece._replace(sha256=digest(b"235")), cache)
    with pytest.raises(StorageError, match=r"cannot read piece 7 \(bytes 9 to 12 of .*file\): .*ends before.*prepare"):
        read_piece(piece._replace(start=9, sha256=digest(b"9")), cache)
    assert held(tmp_path / "cache") == 3


# ---- the bound ----


def test_a_full_cache_answers_in_every_epoch_what_it_took_in_the_first(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Half of the data fits: the hits are half of the reads, in whatever order."""
    pieces = [bytes([number]) * 100 for number in range(20)]
    cache = RangeCache(tmp_path, 1000)
    hits = []
    for _ in range(4):
        hits.append(0)
        for number in rng.permutation(20):
            data = pieces[number]
            kept = cache.get(digest(data))
            hits[-1] += kept is not None
            assert kept in (None, data)
            if kept is None:
                cache.put(digest(data), data)
        assert held(tmp_path) == 1000
    assert hits == [0, 10, 10, 10]


def test_processes_share_a_cache_and_its_bound(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        most = pool.starmap(put_many, [(tmp_path, seed) for seed in range(3)])
    assert max(most) <= 20_000
    assert 19_000 < held(tmp_path) == counted(tmp_path) <= 20_000
    assert all(path.name == hashlib.sha256(path.read_bytes()).hexdigest() for path in entries(tmp_path))


def test_threads_share_a_cache_and_its_bound(tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as threads:
        assert max(threads.map(put_many, [tmp_path] * 6, range(6))) <= 20_000
    assert 19_000 < held(tmp_path) == counted(tmp_path) <= 20_000


def test_a_cache_leaves_the_disk_its_free_space(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 1000, keep_free=2**60)
    cache.put(digest(b"one"), b"one")
    assert cache.get(digest(b"one")) is None
    assert held(tmp_path) == 0


def test_what_a_dead_process_left_is_removed_after_an_hour_and_counted_until_then(tmp_path: Path) -> None:
    RangeCache(tmp_path, 1000)
    (tmp_path / "ab").mkdir()
    for name, size, age in (("old.part", 400, 4000), ("new.part", 400, 60), ("a power cut's", 0, 60)):
        (tmp_path / "ab" / name).write_bytes(bytes(size))
        os.utime(tmp_path / "ab" / name, (time.time() - age,) * 2)
    RangeCache(tmp_path, 1000)
    assert [path.name for path in entries(tmp_path)] == ["new.part"]
    assert counted(tmp_path) == 400


@pytest.mark.parametrize("text", ["", "many", "-5"])
def test_a_lost_count_is_made_again(tmp_path: Path, text: str) -> None:
    cache = RangeCache(tmp_path, 1000)
    cache.put(digest(b"one"), b"one")
    (tmp_path / "bytes").write_text(text)
    cache.put(digest(b"other"), b"other")
    assert counted(tmp_path) == held(tmp_path) == 8


# ---- damage ----


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "longer"])
def test_a_damaged_entry_is_noticed_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    (tmp_path / "file").write_bytes(bytes(range(200)))
    pieces = [
        Piece(str(tmp_path / "file"), start, 100, digest(bytes(range(start, start + 100))), "piece")
        for start in (0, 100)
    ]
    cache = RangeCache(tmp_path / "cache", 200)
    expected = [read_piece(piece, cache) for piece in pieces]
    entry = next(path for path in entries(tmp_path / "cache") if path.name == pieces[0].sha256.hex())
    if damage == "flipped":
        flip_byte(entry, 50)
    else:
        entry.write_bytes({"cut": bytes(50), "empty": b"", "longer": bytes(150)}[damage])

    assert [read_piece(piece, cache) for piece in pieces] == expected
    assert f"the cached {entry} is damaged and will be fetched again" in caplog.text
    assert RangeCache(tmp_path / "cache", 200).get(pieces[0].sha256) == expected[0], "replaced, and the room is there"
    assert held(tmp_path / "cache") == 200


@pytest.mark.parametrize("size", [0, 3, 50], ids=["counter", "counter later", "entry"])
def test_a_full_disk_turns_the_cache_off_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(200)))
    pieces = [Piece(str(tmp_path / "file"), n, 60, digest(bytes(range(n, n + 60))), "piece") for n in range(20)]
    with largest_file(size):
        cache = RangeCache(tmp_path / "cache", 10_000)
        read = [read_piece(piece, cache) for piece in pieces]
    assert read == [bytes(range(n, n + 60)) for n in range(20)]
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "File too large" in warnings[0]
    assert "Reading goes on without it" in warnings[0]
    assert not list((tmp_path / "cache").glob("*/*.part"))


@pytest.mark.parametrize("obstacle", ["a file in its place", "deleted meanwhile"])
def test_a_folder_that_cannot_be_used_turns_the_cache_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, obstacle: str
) -> None:
    folder = tmp_path / "cache"
    if obstacle == "a file in its place":
        folder.write_text("")
    cache = RangeCache(folder, 1000)
    if obstacle == "deleted meanwhile":
        (folder / "bytes").unlink()
        folder.rmdir()
    for data in (b"one", b"other"):
        cache.put(digest(data), data)
        assert cache.get(digest(data)) is None
    assert caplog.text.count("is off: cannot") == 1


# ---- under a data set ----


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the caches of this test are."""
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.s3
def test_a_second_epoch_from_a_bucket_reads_nothing_of_it(
    s3_root: str, cache_home: Path, monkeypatch: pytest.MonkeyPatch, ranges_read: list[str]
) -> None:
    monkeypatch.setattr(shards, "KEEP_FREE_BYTES", 0)
    pixels, dataset = write_set(s3_root)
    for epoch in range(3):
        faces = open_faces([s3_root], SIDE)
        assert np.array_equal(faces.read([*range(8), 0]), pixels[[*range(8), 0]])
        assert len(ranges_read) == 8, f"epoch {epoch}"
    folder = cache_home / "ranges" / dataset.splits["train"].digest[:16]
    assert len(entries(folder)) == 8

    for shard in storage.list_objects(storage.join(s3_root, "shards")):
        storage.delete(shard.uri)
    entry = entries(folder)[0]
    flip_byte(entry, 40)
    place = [bytes(value).hex() for value in ShardedFaces.open(s3_root).index.sha256].index(entry.name)
    others = [number for number in range(8) if number != place]
    assert np.array_equal(faces.read(others), pixels[others])
    with pytest.raises(StorageError, match="there is no such object"):
        faces.read([place])


@pytest.mark.s3
def test_the_bound_holds_under_a_data_set_too_and_every_face_is_right(
    s3_root: str, tmp_path: Path, ranges_read: list[str], rng: np.random.Generator
) -> None:
    pixels, _ = write_set(s3_root)
    sizes = ShardedFaces.open(s3_root).index.sizes
    limit = int(sizes.sum()) // 2
    cache = RangeCache(tmp_path, limit)
    faces = ShardedFaces.open(s3_root, cache=cache)
    for _ in range(3):
        order = rng.permutation(8)
        assert np.array_equal(faces.read(order), pixels[order])
        assert held(tmp_path) <= limit
    kept = len(entries(tmp_path))
    assert 2 <= kept <= 5
    assert len(ranges_read) == 8 + 2 * (8 - kept)


def test_a_data_set_on_a_disk_is_read_directly(tmp_path: Path, cache_home: Path, ranges_read: list[str]) -> None:
    write_set(str(tmp_path / "set"))
    for faces in (open_faces([str(tmp_path / "set")], SIDE), ShardedFaces.open(str(tmp_path / "set"))):
        faces.read(range(len(KEYS)))
    assert len(ranges_read) == 16
    assert not cache_home.exists()


@pytest.mark.s3
def test_without_room_for_a_cache_there_is_none(s3_root: str, cache_home: Path, ranges_read: list[str]) -> None:
    write_set(s3_root)
    faces = open_faces([s3_root], SIDE, cache_bytes=0)
    for _ in range(2):
        faces.read([0, 1])
    assert len(ranges_read) == 4
    assert not cache_home.exists()
