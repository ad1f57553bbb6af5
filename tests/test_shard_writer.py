"""Writing shards: all of one or nothing, and no key that would not come back."""

from pathlib import Path

import numpy as np
import pytest

from ldbfr import storage
from ldbfr.data.shards import ShardWriter
from ldbfr.errors import InputError, StorageError
from ldbfr.images import encode_image
from tests.prepared import largest_file
from tests.tiny import blob_faces


def test_a_writer_left_without_closing_writes_nothing(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "set"), 0) as shard:
        shard.add("a", encode_image(blob_faces(1)[0], "png"))
        temporary = Path(shard._file.name)
        assert temporary.exists()
    assert not temporary.exists()
    assert list(storage.list_objects(str(tmp_path / "set"))) == []
    with ShardWriter(str(tmp_path / "set"), 0) as shard:
        assert shard.close() == []
    assert list(storage.list_objects(str(tmp_path / "set"))) == []


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("", "expected a relative path"),
        ("/absolute", "expected a relative path"),
        ("../up", "expected a relative path"),
        ("line\nbreak", "expected a relative path"),
        ("back\\slash", "expected a relative path"),
        ("face.jpg", "no dot in its last part"),
        ("there", "the key 'there' is already in shard-000000.tar"),
    ],
)
def test_a_key_that_would_not_come_back_is_refused(tmp_path: Path, key: str, text: str) -> None:
    png = encode_image(blob_faces(1)[0], "png")
    with ShardWriter(str(tmp_path), 0) as shard:
        shard.add("there", png)
        with pytest.raises(InputError, match=text):
            shard.add(key, png)
        with pytest.raises(InputError, match=r"jpeg: not a PNG file \(it starts with .*encode_image"):
            shard.add("jpeg", encode_image(blob_faces(1)[0], "jpeg"))
        assert [row.key for row in shard.close()] == ["there"]


def test_the_size_of_a_shard_is_known_while_it_grows(tmp_path: Path) -> None:
    png = encode_image(blob_faces(1)[0], "png")
    with ShardWriter(str(tmp_path), 999_999) as shard:
        sizes = [shard.size]
        for key in ("a", "b"):
            shard.add(key, png)
            sizes.append(shard.size)
        shard.close()
    assert sizes == [0, 512 + len(png), 1024 + 2 * len(png) + -len(png) % 512]
    with pytest.raises(InputError, match="shard number 1000000: expected 0 to 999999"):
        ShardWriter(str(tmp_path), 1_000_000)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_full_disk_while_collecting_leaves_nothing(tmp_path: Path, count: int) -> None:
    face = np.random.default_rng(0).integers(0, 256, (84, 84, 3), np.uint8)  # noise: 21 kB

    def fill(shard: ShardWriter) -> None:
        for number in range(count):
            shard.add(str(number), encode_image(face, "png"))
        shard.close()

    with largest_file(20_000), ShardWriter(str(tmp_path), 0) as shard:
        with pytest.raises(StorageError, match=r"cannot collect .*000000\.tar in .*; free some space, or point TMPDIR"):
            fill(shard)
        temporary = Path(shard._file.name)
    assert not temporary.exists()
    assert list(storage.list_objects(str(tmp_path))) == []
