"""Near-duplicates: those of the definition, found without comparing every pair, dropped before anything is written."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldbfr.images import fit_to_side
from ldbfr.preparation import duplicates as prepare_duplicates
from ldbfr.preparation.duplicates import FINGERPRINT_BYTES, fingerprint, near_duplicates
from tests.preparing import (
    faces_of,
    members_of,
    prepare,
    put,
    report_of,
    saved,
    textures,
    write_tar,
)


def brute_force(fingerprints: np.ndarray) -> np.ndarray:
    """The definition: every face against every earlier one that stays."""
    bits = np.unpackbits(fingerprints, axis=1)
    result = np.full(len(bits), -1)
    for late in range(len(bits)):
        for early in range(late):
            different = bits[early] != bits[late]
            if result[early] < 0 and different[:64].sum() <= 3 and different[64:].sum() <= 16:
                result[late] = early
                break
    return result


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_those_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bases = rng.integers(0, 256, (30, FINGERPRINT_BYTES), dtype=np.uint8)
    bits = np.unpackbits(bases[rng.integers(0, 30, 400)], axis=1)
    noise = rng.random(bits.shape) < rng.choice([0, 0.004, 0.02, 0.04, 0.08], 400)[:, None]
    fingerprints = np.packbits(bits ^ noise, axis=1)

    found = near_duplicates(fingerprints)

    expected = brute_force(fingerprints)
    np.testing.assert_array_equal(found, expected)
    assert 50 < (found >= 0).sum() < 350


@pytest.mark.parametrize("count", [0, 1, 2])
def test_near_duplicates_of_hardly_any(count: int) -> None:
    same = np.zeros((count, FINGERPRINT_BYTES), np.uint8)

    assert near_duplicates(same).tolist() == [-1, 0][:count]


def test_near_duplicates_are_not_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    near = prepare_duplicates._near
    monkeypatch.setattr(
        prepare_duplicates, "_near", lambda words, pairs: compared.append(len(pairs)) or near(words, pairs)
    )
    fingerprints = np.random.default_rng(0).integers(0, 256, (50_000, FINGERPRINT_BYTES), dtype=np.uint8)

    assert (near_duplicates(fingerprints) < 0).all()

    assert sum(compared) < 50_000  # of 1.25e9 pairs


@pytest.mark.parametrize("change", ["jpeg", "half", "brighter"])
def test_a_changed_copy_is_near_and_another_face_is_not(shared_data: Path, change: str) -> None:
    with tarfile.open(shared_data / "faces200" / "val-00000.tar") as archive:
        members = archive.getmembers()[:60]
        faces = [Image.open(archive.extractfile(member) or io.BytesIO()).convert("RGB") for member in members]
    changed = {
        "jpeg": lambda face: Image.open(io.BytesIO(saved(face, "JPEG", quality=60))),
        "half": lambda face: face.resize((100, 100), Image.Resampling.BICUBIC),
        "brighter": lambda face: face.point(lambda value: min(255, int(value * 1.05))),
    }[change]
    pictures = [*faces, *map(changed, faces)]
    marks = [fingerprint(fit_to_side(np.array(picture), 64)) for picture in pictures]

    found = near_duplicates(np.frombuffer(b"".join(marks), np.uint8).reshape(-1, FINGERPRINT_BYTES))

    assert (found[:60] == -1).all()
    assert (found[60:] == np.arange(60)).mean() > 0.95


def test_dropping_keeps_the_first_by_key_and_writes_nothing_else(tmp_path: Path) -> None:
    images = textures(10)
    copies = [saved(Image.open(io.BytesIO(data)), "JPEG", quality=90) for data in images[:6]]
    put(tmp_path / "z", {f"{n}.png": data for n, data in enumerate(images)})
    put(tmp_path / "a", {"copies.tar": write_tar({f"{n}.jpg": data for n, data in enumerate(copies)})})

    summary = prepare(tmp_path / "out", tmp_path / "z", tmp_path / "a", near_duplicates="drop")

    kept = {f"a/copies.tar/{n}-jpg" for n in range(6)} | {f"z/{n}-png" for n in range(6, 10)}
    assert faces_of(tmp_path / "out").keys() == kept
    assert (summary.inputs, summary.duplicates) == (16, 6)
    rows = {row["key"]: row for row in report_of(tmp_path / "out").values()}
    assert rows["z/3-png"]["status"] == "duplicate"
    assert rows["z/3-png"]["reason"] == "near-duplicate: of a/copies.tar/3-jpg"
    members = [
        member.name for shard in (tmp_path / "out" / "shards").iterdir() for member in members_of(shard.read_bytes())
    ]
    assert sorted(name.removesuffix(".png") for name in members) == sorted(kept)
