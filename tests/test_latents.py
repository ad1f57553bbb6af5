"""Latents beside the shards: what the VQGAN would give, read back by place and flip, or refused."""

import json
import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ldbfr import storage
from ldbfr.data.latents import CachedLatents, LatentPart, LatentType, LatentWriter, latents_folder
from ldbfr.data.ranges import RangeCache
from ldbfr.data.shards import ShardedFaces
from ldbfr.errors import InputError, StorageError
from ldbfr.images import to_float
from ldbfr.models.vqgan import VQGAN
from tests.prepared import write_set
from tests.tiny import flip_byte, networks

DIGEST = "0123456789abcdef" * 4
FLIPS = np.arange(16) % 3 == 0


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URI below which there is nothing yet."""
    return str(request.getfixturevalue("s3_root")) if request.param == "s3" else str(tmp_path / "set")


@lru_cache
def vqgan() -> VQGAN:
    """The tiny latent VQGAN; nobody changes it."""
    network: VQGAN = networks()["latent_vqgan"]
    return network


@torch.no_grad()
def encode(pixels: np.ndarray) -> np.ndarray:
    """z_0 by the tiny latent DIGEST, (n, c, h, w)."""
    latents: np.ndarray = vqgan().to_latents(to_float(pixels.copy())).numpy()
    return latents


def both(pixels: np.ndarray) -> np.ndarray:
    """Latents of the faces and of their mirror images, (n, 2, c, h, w)."""
    return np.stack([encode(pixels), encode(pixels[:, :, ::-1])], axis=1)


def write_latents(root: str, dtype: LatentType = "float32", parts: tuple[int, ...] = (3, 1, 4)) -> np.ndarray:
    """A data set with the latents of all its faces, the parts written last to first; its pixels."""
    pixels, dataset = write_set(root)
    writer = LatentWriter(root, "train", DIGEST, dataset.splits["train"].digest, dtype)
    starts = np.cumsum([0, *parts])
    written = [
        writer.write_part(number, int(starts[number]), both(pixels[starts[number] : starts[number + 1]]))
        for number in reversed(range(len(parts)))
    ]
    writer.finish(written)
    return pixels


def test_any_order_and_flips_give_what_the_vqgan_gives(root: str, tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = write_latents(root)
    faces = ShardedFaces.open(root, cache=RangeCache(tmp_path / "cache", 10**6))
    latents = faces.latents(DIGEST)
    assert latents is not None

    for count in (0, 1, 16):
        indices, flips = rng.integers(8, size=count), FLIPS[:count]
        mirrored = faces.read(indices)
        mirrored[flips] = mirrored[flips, :, ::-1]
        found = latents.read(indices, flips)
        assert found.dtype == np.float32
        if count:
            np.testing.assert_allclose(found, encode(mirrored), atol=1e-5)  # batches of another size round otherwise
    every = np.repeat(np.arange(8), 2), np.tile([False, True], 8)
    parts = np.concatenate([both(pixels[a:b]) for a, b in ((0, 3), (3, 4), (4, 8))])
    assert np.array_equal(latents.read(*every), parts.reshape(16, *parts.shape[2:])), "bit for bit what was written"
    assert np.array_equal(pickle.loads(pickle.dumps(latents)).read(*every), latents.read(*every))


def test_latents_from_a_bucket_come_through_the_cache(s3_root: str, tmp_path: Path) -> None:
    write_latents(s3_root)
    faces = ShardedFaces.open(s3_root, cache=RangeCache(tmp_path, 10**6))
    latents = faces.latents(DIGEST)
    assert latents is not None
    before = latents.read(range(8), FLIPS[:8])
    for part in storage.list_objects(latents_folder(s3_root, "train", DIGEST)):
        storage.delete(part.uri)
    assert np.array_equal(latents.read(range(8), FLIPS[:8]), before)
    with pytest.raises(StorageError, match=r"cannot read latent of face 1 mirrored \(bytes .*part-000000\.npy\): "):
        latents.read([1], [True])


def test_half_precision_takes_half_the_space(tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        write_latents(str(tmp_path / dtype), dtype, (8,))
    sizes = [(next((tmp_path / dtype).rglob("part-000000.npy"))).stat().st_size for dtype in ("float32", "float16")]
    assert sizes[0] - 128 == 2 * (sizes[1] - 128)
    one, other = (ShardedFaces.open(str(tmp_path / dtype)).latents(DIGEST) for dtype in ("float32", "float16"))
    assert one is not None
    assert other is not None
    exact, rounded = one.read(range(8), [True] * 8), other.read(range(8), [True] * 8)
    assert rounded.dtype == np.float32
    assert np.array_equal(rounded, exact.astype(np.float16).astype(np.float32))


def test_numpy_reads_the_parts(tmp_path: Path) -> None:
    pixels = write_latents(str(tmp_path))
    folder = Path(latents_folder(str(tmp_path), "train", DIGEST))
    assert np.array_equal(np.load(folder / "part-000002.npy"), both(pixels[4:]))
    assert np.load(folder / "digests.npy").shape == (8, 2, 32)


def test_latents_that_do_not_fit_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = str(tmp_path)
    _, dataset = write_set(root)
    data = dataset.splits["train"].digest
    faces = ShardedFaces.open(root)
    assert faces.latents(DIGEST) is None
    with pytest.raises(InputError, match=r"no latents in .*0123456789abcdef/train: .*prepare them with"):
        CachedLatents.open(root, "train", DIGEST, data)
    assert not caplog.text

    write_latents(root)
    namesake = DIGEST[:-4] + "ffff"
    for vqgan, digest, text in (
        (namesake, data, r"they are of a VQGAN with digest 0123456789abcdef…cdef, expected 0123456789abcdef…ffff"),
        (DIGEST, "f" * 64, r"they are of data with digest [0-9a-f]{16}….{4}, expected f{16}…ffff"),
    ):
        with pytest.raises(InputError, match=rf"do not fit: {text}; prepare them again with jobs/prepare\.py"):
            CachedLatents.open(root, "train", vqgan, digest)
    assert faces.latents(namesake) is None
    assert "are not used: they are of a VQGAN with digest" in caplog.text
    assert faces.latents("a" * 64) is None, "another VQGAN's folder is another"


def test_latents_of_data_that_were_prepared_anew_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_latents(str(tmp_path))
    write_set(str(tmp_path), {"train": 6, "val": 2})
    assert ShardedFaces.open(str(tmp_path)).latents(DIGEST) is None
    assert "they are of data with digest" in caplog.text
    assert "prepare the latents again" in caplog.text


# ---- damage ----


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "half a description": (
        lambda f: (f / "latents.json").write_text('{"format"'),
        InputError,
        r"json is damaged .*del",
    ),
    "another format": (
        lambda f: edit_json(f / "latents.json", format=3),
        InputError,
        r"latents\.json is damaged \(Val",
    ),
    "another dtype": (
        lambda f: edit_json(f / "latents.json", dtype="O"),
        InputError,
        r"latents\.json is damaged \(Val",
    ),
    "no parts": (lambda f: edit_json(f / "latents.json", parts=[]), InputError, r"latents\.json is damaged \(Index"),
    "digests gone": (lambda f: (f / "digests.npy").unlink(), StorageError, r"digests\.npy: there is no such file"),
    "digests changed": (lambda f: flip_byte(f / "digests.npy", 300), InputError, "is not the one that latents.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_refused(tmp_path: Path, damage: str) -> None:
    write_latents(str(tmp_path))
    act, kind, text = DAMAGES[damage]
    act(Path(latents_folder(str(tmp_path), "train", DIGEST)))
    with pytest.raises(kind, match=text):
        ShardedFaces.open(str(tmp_path)).latents(DIGEST)


@pytest.mark.parametrize("damage", ["vanished", "cut", "flipped"])
def test_a_part_that_changes_mid_run_is_named(tmp_path: Path, damage: str) -> None:
    write_latents(str(tmp_path))
    latents = ShardedFaces.open(str(tmp_path)).latents(DIGEST)
    assert latents is not None
    before = latents.read(range(8), FLIPS[:8])
    part = Path(latents_folder(str(tmp_path), "train", DIGEST)) / "part-000002.npy"
    if damage == "vanished":
        part.unlink()
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:200])
    else:
        flip_byte(part, 130)
    text = {"vanished": "there is no such file", "cut": "it ends before", "flipped": "was changed: SHA-256"}[damage]
    with pytest.raises(StorageError, match=rf"latent of face 4 \(bytes 128 to .*part-000002\.npy\).*{text}"):
        latents.read([0, 4], [False, False])
    assert np.array_equal(latents.read(range(4), FLIPS[:4]), before[:4])


@pytest.mark.parametrize("index", [8, -1])
def test_a_place_that_is_none_is_refused(tmp_path: Path, index: int) -> None:
    write_latents(str(tmp_path))
    latents = ShardedFaces.open(str(tmp_path)).latents(DIGEST)
    assert latents is not None
    with pytest.raises(IndexError, match=f"index {index}: expected 0 to 7"):
        latents.read([index], [False])
    with pytest.raises(ValueError, match="1 flips for 2 indices"):
        latents.read([0, 1], [False])


# ---- writing ----


def test_a_finished_part_is_found_by_the_next_process_if_it_is_of_the_same_making(root: str) -> None:
    pixels, dataset = write_set(root)
    data = dataset.splits["train"].digest
    writer = LatentWriter(root, "train", DIGEST, data)
    assert writer.find_part(0) is None
    part = writer.write_part(0, 0, both(pixels))
    folder = latents_folder(root, "train", DIGEST)

    assert LatentWriter(root, "train", DIGEST, data).find_part(0) == part
    assert writer.find_part(1) is None
    for other in (
        LatentWriter(root, "train", DIGEST[:-1] + "0", data),
        LatentWriter(root, "train", DIGEST, "f" * 64),
        LatentWriter(root, "train", DIGEST, data, "float16"),
    ):
        assert other.find_part(0) is None
    storage.delete(storage.join(folder, part.file))
    assert writer.find_part(0) is None
    storage.write_bytes(storage.join(folder, part.file), b"")
    storage.write_bytes(storage.join(folder, "part-000000.json"), b"{")
    with pytest.raises(InputError, match=r"part-000000\.json is damaged .*delete it"):
        writer.find_part(0)
    writer.finish([writer.write_part(0, 0, both(pixels))])
    assert ShardedFaces.open(root).latents(DIGEST) is not None


def test_latents_are_not_described_before_every_face_has_its_own(tmp_path: Path) -> None:
    pixels, dataset = write_set(str(tmp_path))
    writer = LatentWriter(str(tmp_path), "train", DIGEST, dataset.splits["train"].digest)
    values = both(pixels)
    parts = [writer.write_part(number, 4 * number, values[4 * number : 4 * number + 4]) for number in (0, 1)]
    wide = writer.write_part(2, 4, np.zeros((4, 2, 3, 2, 2)))

    def refused(given: list[LatentPart], text: str, kind: type[Exception] = InputError) -> None:
        with pytest.raises(kind, match=text):
            writer.finish(given)
        assert ShardedFaces.open(str(tmp_path)).latents(DIGEST) is None

    refused([], "hold 0 faces, expected 8")
    refused(parts[:1], "hold 4 faces, expected 8; encode the rest")
    refused(parts[1:], r"part-000001\.npy in .* starts at face 4, expected 0; encode again")
    refused([parts[0], *parts], r"starts at face 0, expected 4")
    refused([parts[0], wide], r"part-000002\.npy in .* has latents of \(3, 2, 2\), expected")
    Path(writer.folder, parts[1].file).unlink()
    refused(parts, r"part-000001\.npy is gone; encode the part again", StorageError)
    write_set(str(tmp_path), {"train": 4})
    refused(parts, "the split 'train' of .* was prepared anew; encode it again")


def test_values_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    write_set(str(tmp_path))
    half = LatentWriter(str(tmp_path), "train", DIGEST, "f" * 64, "float16")
    whole = LatentWriter(str(tmp_path), "train", DIGEST, "f" * 64)
    large = np.full((1, 2, 3, 4, 4), 1e6, np.float32)
    with pytest.raises(InputError, match=r"faces from 7 on are not all finite in float16; .*or write float32"):
        half.write_part(0, 7, large)
    whole.write_part(0, 7, large)
    with pytest.raises(InputError, match="not all finite in float32; look for NaN"):
        whole.write_part(0, 7, large * np.nan)
    for shape in ((1, 3, 4, 4), (1, 1, 3, 4, 4), (0, 2, 3, 4, 4)):
        with pytest.raises(InputError, match=r"expected \(n, 2, c, h, w\), unflipped and mirrored"):
            whole.write_part(0, 0, np.zeros(shape))
    with pytest.raises(InputError, match="VQGAN digest 'short': expected a SHA-256"):
        LatentWriter(str(tmp_path), "train", "short", "f" * 64)
