"""Images are found wherever they lie; a global batch is a function of (seed, step), however many workers share it."""

import io
import logging
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldbfr.data.index import FaceImages, iterate_images
from ldbfr.data.sampler import Batch, BatchSampler, global_indices, worker_slice
from ldbfr.degradations import PROFILES, apply, degradation_generator, draw
from ldbfr.errors import ConfigError, InputError
from ldbfr.images import encode_image, to_float
from ldbfr.seeds import derive_seed
from tests import tiny

SIDE = 16
FIELDS = ("hq", "lq", "indices", "flips", "places", "seeds")
PIXELS = tiny.blob_faces(6, side=SIDE)
ENCODED = {f"face-{number}.png": encode_image(face, "png") for number, face in enumerate(PIXELS)}


def write_folder(path: Path) -> Path:
    for name, data in ENCODED.items():
        (path / "deep" / "er").mkdir(parents=True, exist_ok=True)
        (path / "deep" / "er" / name if name > "face-3" else path / name).write_bytes(data)
    (path / "notes.txt").write_text("no image")
    return path


def write_tar(path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in reversed(ENCODED.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in reversed(ENCODED.items()):
            archive.writestr(name, data)
        archive.writestr("notes.txt", "no image")
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": write_folder,
    "tar": lambda folder: write_tar(folder / "faces.tar"),
    "tar.gz": lambda folder: write_tar(folder / "faces.tar.gz", "w:gz"),
    "tgz": lambda folder: write_tar(folder / "faces.tgz", "w:gz"),
    "zip": lambda folder: write_zip(folder / "faces.zip"),
}


# ------------------------------------------------------------------------------------------------------ finding images


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_images(tmp_path: Path, kind: str) -> None:
    images = FaceImages.load([SOURCES[kind](tmp_path)], SIDE)
    assert len(images) == 6
    assert images.side == SIDE
    order = [int(Path(name).stem[-1]) for name in images.names]
    assert sorted(order) == list(range(6))
    assert np.array_equal(images.pixels, PIXELS[order])
    if kind != "folder":
        assert order == sorted(order)  # by name, though the archive has them the other way round


def test_the_archives_of_a_folder_are_opened_and_sources_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    write_tar(tmp_path / "many" / "a.tar")
    write_zip(tmp_path / "many" / "b.zip")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "last.png").write_bytes(ENCODED["face-0.png"])
    images = FaceImages.load([tmp_path / "many", tmp_path / "one"], SIDE)
    assert len(images) == 13
    assert images.names[0] == "many/a.tar/face-0.png"
    assert images.names[6] == "many/b.zip/face-0.png"
    assert images.names[12] == "one/last.png"


def test_the_order_does_not_depend_on_when_files_were_written(tmp_path: Path) -> None:
    for folder, names in (("one", sorted(ENCODED)), ("other", sorted(ENCODED, reverse=True))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(ENCODED[name])
    orders = [[name for name, _ in iterate_images(tmp_path / folder)] for folder in ("one", "other")]
    assert orders[0] == orders[1] == sorted(ENCODED)


def test_images_of_another_size_are_cropped_to_a_square_and_resized(tmp_path: Path) -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200  # the centred square
    (tmp_path / "wide.png").write_bytes(encode_image(wide, "png"))
    images = FaceImages.load([tmp_path], SIDE)
    assert images.pixels.shape == (1, SIDE, SIDE, 3)
    assert (images.pixels == 200).all()


@pytest.mark.parametrize(
    "data",
    [b"", b"no image at all", ENCODED["face-0.png"][:50], ENCODED["face-0.png"][:-100]],
    ids=["empty", "text", "cut in the header", "cut in the pixels"],
)
def test_a_broken_image_is_left_out_with_a_warning_that_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    write_folder(tmp_path)
    (tmp_path / "broken.png").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        images = FaceImages.load([tmp_path], SIDE)
    assert len(images) == 6
    assert not any(name.endswith("broken.png") for name in images.names)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "broken.png" in caplog.text


def test_a_link_to_nothing_is_left_out_with_a_warning_that_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images = FaceImages.load([tmp_path], SIDE)
    assert len(images) == 6
    assert "gone.png" in caplog.text


def test_a_folder_that_is_called_like_an_image_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "album.png").mkdir()
    (tmp_path / "album.png" / "face.png").write_bytes(ENCODED["face-0.png"])
    assert FaceImages.load([tmp_path], SIDE).names == [f"{tmp_path.name}/album.png/face.png"]


def test_a_source_without_usable_images_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=rf"no usable image in {tmp_path}.*\.png"):
        FaceImages.load([tmp_path], SIDE)


@pytest.mark.parametrize("name", ["missing", "missing.tar", "notes.txt"])
def test_a_source_that_is_none_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=rf"{name}: expected a folder, a \.tar or a \.zip"):
        FaceImages.load([tmp_path / name], SIDE)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_that_is_cut_in_an_image_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """A tar file has no table of contents, so a cut between two images would go unseen."""
    file = SOURCES[kind](tmp_path)
    data = file.read_bytes()
    inside = len(data) // 2
    if kind == "tar":
        with tarfile.open(file) as archive:
            inside = archive.getmembers()[2].offset_data + 40
    for size in (inside, 100, 0):
        file.write_bytes(data[:size])
        with pytest.raises(InputError, match=file.name):
            FaceImages.load([file], SIDE)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_an_archive_with_a_flipped_byte_is_refused_by_name_or_loses_images(tmp_path: Path, kind: str) -> None:
    """Nothing else may happen: no error of zlib's or zipfile's own."""
    file = SOURCES[kind](tmp_path)
    texts = []
    for position in np.random.default_rng(0).integers(0, file.stat().st_size, 60).tolist():
        tiny.flip_byte(file, position)
        try:
            assert 0 < len(FaceImages.load([file], SIDE)) <= 6
        except InputError as error:
            texts.append(str(error))
        tiny.flip_byte(file, position)
    assert texts
    assert all(file.name in text for text in texts)


# --------------------------------------------------------------------------------------------------------- the sampler


def sampler(batch_size: int = 7, seed: int = 0, stage: str = "dc_vqr", profile: str | None = "wide") -> BatchSampler:
    return BatchSampler(FaceImages(PIXELS, [""] * 6), batch_size, seed, stage, True, profile)


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.lq is None) == (other.lq is None)
    for field in FIELDS:
        if getattr(one, field) is not None:
            assert torch.equal(getattr(one, field), getattr(other, field)), field


@pytest.mark.parametrize(("num_images", "batch_size"), [(6, 4), (6, 6), (5, 7), (1, 3), (100, 8)])
def test_every_image_comes_once_before_any_comes_again(num_images: int, batch_size: int) -> None:
    steps = 3 * num_images // batch_size + 2
    sequence = np.concatenate([global_indices(num_images, batch_size, 5, step) for step in range(steps)])
    epochs = [sequence[start : start + num_images] for start in range(0, len(sequence) - num_images + 1, num_images)]
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_images))
    if num_images == 100:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], np.arange(100))


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    one, other = sampler(), sampler()
    for step in (9, 2, 0):
        other.batch(step)  # another history
    assert_same(one.batch(4), other.batch(4))
    changed = [one.batch(5), sampler(seed=1).batch(4), sampler(stage="enhancer").batch(4)]
    for batch in changed:
        assert not torch.equal(batch.seeds, one.batch(4).seeds)
        assert batch.lq is not None
        assert not torch.equal(batch.lq, one.batch(4).lq)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_the_workers_slices_put_together_are_the_global_batch(world_size: int) -> None:
    """Seven samples do not divide evenly among 2, 3 or 5 workers."""
    parts = [sampler().batch(3, rank, world_size) for rank in range(world_size)]
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    together = {field: torch.cat([getattr(part, field) for part in parts]) for field in FIELDS}
    assert_same(Batch(**together, latents=None), sampler().batch(3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 11])
def test_the_slices_of_any_number_of_workers_cover_the_batch_once(world_size: int) -> None:
    slices = [range(7)[worker_slice(7, rank, world_size)] for rank in range(world_size)]
    assert [position for part in slices for position in part] == list(range(7))


def test_a_batch_holds_the_images_flips_and_draws_that_it_names() -> None:
    batch = sampler(batch_size=12).batch(1)
    assert 0 < batch.flips.sum() < 12
    for place, (index, flip) in enumerate(zip(batch.indices.tolist(), batch.flips.tolist(), strict=True)):
        face = PIXELS[index][:, ::-1] if flip else PIXELS[index]
        assert torch.equal(batch.hq[place], to_float(np.ascontiguousarray(face)))
    assert batch.lq is not None
    assert batch.hq.shape == batch.lq.shape == (12, 3, SIDE, SIDE)
    assert len(set(batch.seeds.tolist())) == 12


def test_an_image_that_comes_twice_is_degraded_differently_each_time() -> None:
    batch = sampler(batch_size=12).batch(0)
    assert batch.lq is not None
    same = [(i, j) for i in range(12) for j in range(i) if batch.indices[i] == batch.indices[j]]
    assert same
    assert all(not torch.equal(batch.lq[i], batch.lq[j]) for i, j in same)


def test_the_low_quality_faces_are_degradations_of_the_profile() -> None:
    """Re-drawn from the profile with the same generator: equation (7) on the flipped face."""
    batch = sampler(batch_size=3).batch(2)
    assert batch.lq is not None
    seed = derive_seed(0, "dc_vqr")
    for place in range(3):
        face = PIXELS[batch.indices[place]]
        face = np.ascontiguousarray(face[:, ::-1] if batch.flips[place] else face)
        degradation = draw(PROFILES["wide"], degradation_generator(seed, "degradation", 2, place))
        assert torch.equal(batch.lq[place], to_float(apply(degradation, face)))


def test_without_a_profile_there_is_no_low_quality() -> None:
    assert sampler(profile=None).batch(0).lq is None


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'savage'.*wide"):
        sampler(profile="savage").batch(0)


def test_flips_can_be_switched_off() -> None:
    still = BatchSampler(FaceImages(PIXELS, [""] * 6), 50, 0, "prior", False, None)
    assert not still.batch(0).flips.any()


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 20])
def test_micro_batches_put_together_are_the_batch(parts: int) -> None:
    whole = sampler().batch(0)
    split = whole.split(parts)
    sizes = [len(part) for part in split]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 1
    assert len(split) == min(parts, 7)
    together = {field: torch.cat([getattr(part, field) for part in split]) for field in FIELDS}
    assert_same(Batch(**together, latents=None), whole)


def test_the_images_of_the_data_set_stay_as_they_were() -> None:
    before = PIXELS.copy()
    sampler(batch_size=50).batch(0)
    assert np.array_equal(PIXELS, before)
