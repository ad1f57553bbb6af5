"""Pairs by name, strictly, and exactly the pixels that files have."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldbfr import storage
from ldbfr.errors import ConfigError, InputError, StorageError
from ldbfr.evaluation.digests import file_digest
from ldbfr.evaluation.pairing import ImageFiles, pair
from ldbfr.evaluation.reading import decode_exactly, pixels_digest
from ldbfr.evaluation.testsets import PairedFolders, open_testset
from ldbfr.images import encode_image
from ldbfr.storage import ObjectInfo

FACE = np.arange(16 * 12 * 3, dtype=np.uint8).reshape(16, 12, 3)


def folder(root: Path, *names: str, pixels: np.ndarray = FACE) -> str:
    """A folder of images."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(pixels, "png"))
    return str(root)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """As Pillow writes it."""
    output = BytesIO()
    image.save(output, format, **options)
    return output.getvalue()


def test_pairs_go_by_the_path_without_its_suffix(tmp_path: Path) -> None:
    testset = open_testset(folder(tmp_path / "lq", "b.png", "x/a.png"), folder(tmp_path / "hq", "x/a.jpg", "b.png"))
    assert isinstance(testset, PairedFolders)
    assert [(entry.name, entry.split) for entry in testset.entries] == [("b", "all"), ("x/a", "all")]
    lq, hq = testset.read(testset.entries[1])
    assert hq is not None
    assert (lq == hq).all()


def test_all_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    lq = folder(tmp_path / "lq", "one.png", "two.png", "two.jpg", "only.png", "size.png")
    hq = folder(tmp_path / "hq", "one.png", "two.png", *(f"more{number:02d}.png" for number in range(12)))
    folder(tmp_path / "hq", "size.png", pixels=FACE[:8])
    with pytest.raises(InputError) as caught:
        open_testset(lq, hq)
    text = str(caught.value)
    assert f"12 missing in {lq}: more00, more01, more02, more03, more04, more05, more06, more07, more08, more09" in text
    assert "more09 and 2 more" in text
    assert f"1 missing in {hq}: only" in text
    assert f"1 names twice in {lq}: two (two.jpg and two.png)" in text
    assert "1 of two sizes: size (12 × 16 and 12 × 8 px)" in text


def test_a_digest_tells_what_the_files_hold_and_under_which_names(tmp_path: Path) -> None:
    lq, hq = folder(tmp_path / "lq", "a.png", "b.png"), folder(tmp_path / "hq", "a.png", "b.png")
    first = open_testset(lq, hq).about["digest"]
    contents = hashlib.sha256((tmp_path / "lq" / "a.png").read_bytes()).hexdigest()
    assert first == hashlib.sha256(f"a\0{contents * 2}\nb\0{contents * 2}\n".encode()).hexdigest()
    found = {first, open_testset(lq).about["digest"]}
    for place, name, pixels in ((lq, "b.png", FACE + 1), (lq, "b.png", FACE), (hq, "b.png", FACE + 1)):
        folder(Path(place), name, pixels=pixels)
        found.add(open_testset(lq, hq).about["digest"])
    assert len(found) == 4  # one of them is the first again
    (tmp_path / "lq" / "a.png").unlink()
    with pytest.raises(StorageError, match=r"a.png: there is no such file"):
        file_digest(ObjectInfo(str(tmp_path / "lq" / "a.png"), "a.png", 9))


def test_a_large_file_is_digested_in_pieces_and_one_cut_short_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "large", bytes(range(256)) * 40_000
    path.write_bytes(data)
    pieces: list[int] = []
    read = storage.read_range

    def counted(uri: str, start: int, length: int) -> bytes:
        pieces.append(length)
        return read(uri, start, length)

    monkeypatch.setattr(storage, "read_range", counted)
    assert file_digest(ObjectInfo(str(path), "large", len(data))) == hashlib.sha256(data).hexdigest()
    assert sum(pieces) == len(data)
    assert max(pieces) <= 2**22 < len(data)
    path.write_bytes(data[:-1])
    with pytest.raises(StorageError, match="it was cut short or replaced"):
        file_digest(ObjectInfo(str(path), "large", len(data)))


@pytest.mark.s3
def test_the_same_files_in_a_bucket_have_the_same_digest(tmp_path: Path, s3_root: str) -> None:
    lq, hq = folder(tmp_path / "lq", "a.png", "x/b.png"), folder(tmp_path / "hq", "a.png", "x/b.png", pixels=FACE + 1)
    for part in ("lq", "hq"):
        for name in ("a.png", "x/b.png"):
            storage.write_bytes(storage.join(s3_root, part, name), (tmp_path / part / name).read_bytes())
    there, originals = storage.join(s3_root, "lq"), storage.join(s3_root, "hq")
    assert open_testset(there, originals).about["digest"] == open_testset(lq, hq).about["digest"]
    assert open_testset(there).about["digest"] == open_testset(lq).about["digest"]


def test_a_name_case_and_folders_matter(tmp_path: Path) -> None:
    lq, hq = folder(tmp_path / "lq", "A.png", "x/b.png"), folder(tmp_path / "hq", "a.png", "b.png")
    with pytest.raises(InputError, match=r"2 missing in .*lq: a, b. 2 missing in .*hq: A, x/b"):
        pair(ImageFiles.of(lq), ImageFiles.of(hq))


def test_an_empty_folder_and_a_set_with_originals_given_too(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="there is no image in it"):
        open_testset(folder(tmp_path / "lq", "a.png"), str(tmp_path / "none"))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "testset.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a test set with originals of its own"):
        open_testset(str(tmp_path / "ours"), str(tmp_path / "lq"))
    with pytest.raises(InputError, match="is damaged, or of another version"):
        open_testset(str(tmp_path / "ours"))


def test_grey_of_8_bits_becomes_rgb_without_loss() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = decode_exactly(encoded(Image.fromarray(grey), "PNG"), "grey")
    assert (pixels == grey[..., None]).all()
    assert pixels.shape == (16, 16, 3)


def deep_rgb() -> bytes:
    """An RGB PNG of 16 bits a sample, which Pillow would halve silently."""
    import cv2

    return bytes(cv2.imencode(".png", np.full((4, 4, 3), 40_000, np.uint16))[1])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (deep_rgb(), "16 bits a sample, and metrics are defined on 8; .*-depth 8"),
        (encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "PNG"), "16 bits a sample"),
        (encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "TIFF"), "16 bits a sample"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "32 bits a sample"),
        (encoded(Image.new("RGBA", (4, 4)), "PNG"), "it has transparency, which no metric defines; .*-alpha off"),
        (encoded(Image.new("LA", (4, 4)), "PNG"), "it has transparency"),
        (encoded(Image.new("P", (4, 4)), "PNG", transparency=0), "it has transparency"),
        (b"", "the file is empty"),
        (b"GIF89a", "not a supported image"),
    ],
)
def test_what_cannot_be_measured_exactly_is_refused_with_the_conversion(data: bytes, text: str) -> None:
    with pytest.raises(InputError, match=f"face.png: {text}"):
        decode_exactly(data, "face.png")


def test_lossy_files_are_refused_where_somebody_computed_the_images() -> None:
    data = encode_image(FACE, "jpeg")
    assert decode_exactly(data, "face.jpg").shape == FACE.shape
    with pytest.raises(InputError, match=r"a JPEG file, whose losses would be measured as the method's; write .* PNG"):
        decode_exactly(data, "face.jpg", lossless=True)


def test_a_digest_of_pixels_tells_shape_and_samples() -> None:
    others = (FACE.reshape(12, 16, 3), FACE[::-1], FACE + 1)
    assert pixels_digest(np.asfortranarray(FACE)) == pixels_digest(FACE)
    assert len({pixels_digest(image) for image in (FACE, *others)}) == 4
