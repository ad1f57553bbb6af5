"""Test sets: draws as by the seed, the same bytes everywhere, going on after a stop, digests, sources."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldbfr import storage
from ldbfr.data.index import FaceImages
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.errors import ConfigError, InputError
from ldbfr.evaluation import building
from ldbfr.evaluation.building import Plan, build_testset, same_everywhere
from ldbfr.evaluation.framing import tight_crop, tight_part
from ldbfr.evaluation.manifest import ManifestRow, read_rows
from ldbfr.evaluation.testset_command import TestSetCommand
from ldbfr.evaluation.testsets import BuiltTestSet, PlainFolder, open_testset
from ldbfr.faces import DETECTOR_FILE, TEMPLATES, YuNet
from ldbfr.images import decode_image, encode_image, resize
from tests.tiny import blob_faces

SIDE = 32
SETTINGS = {"side": SIDE, "processes": 1}


def faces_at(folder: Path, count: int = 7, side: int = 40) -> Path:
    """A folder of faces, some of them deeper in."""
    for number, face in enumerate(blob_faces(count, side)):
        path = folder / ("old" if number % 3 == 0 else "") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(face, "png"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_is_its_draws_applied_to_its_faces_and_both_are_stored(tmp_path: Path) -> None:
    source = faces_at(tmp_path / "faces")
    built = build_testset(str(source), str(tmp_path / "set"), **SETTINGS, every=True, seed=3)  # type: ignore[arg-type]
    testset = BuiltTestSet(str(tmp_path / "set"))
    faces = FaceImages.load([source], SIDE)
    names = [Path(name).with_suffix("").as_posix().partition("/")[2] for name in faces.names]
    assert built.counts == {"mild": 7, "medium": 7, "severe": 7}
    assert [entry.name for entry in testset.entries] == sorted(entry.name for entry in testset.entries)
    for entry in testset.entries:
        index = names.index(entry.name.partition("/")[2])
        lq, hq = testset.read(entry)
        drawn = draw(get_profile(entry.split), degradation_generator(3, entry.split, index))  # as benchmarks/quality.py
        assert testset.degradation(entry) == drawn
        assert hq is not None
        assert (hq == faces.pixels[index]).all()
        with same_everywhere():
            assert (lq == apply(drawn, hq)).all()


def test_thirds_are_disjoint_equal_and_drawn_by_the_seed() -> None:
    plan = Plan(SIDE, ("mild", "medium", "severe"), 0, False, "ffhq", "ffhq", 3_000)
    places = plan.places()
    assert sorted(places) == list(range(3_000))
    own = [plan.splits_of(index, places)[0] for index in range(3_000)]
    assert [own.count(split) for split in plan.splits] == [1_000] * 3
    other = replace(plan, seed=1)
    changed = sum(split != other.splits_of(index, other.places())[0] for index, split in enumerate(own[:300]))
    assert 150 < changed < 250  # two thirds
    assert max(own[:300].count(split) for split in plan.splits) < 140  # no order of the names stays


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_processes(tmp_path: Path) -> None:
    source = faces_at(tmp_path / "faces", 9)
    for name, processes in (("one", 1), ("two", 2)):
        build_testset(str(source), str(tmp_path / name), side=SIDE, processes=processes)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    build_testset(str(source), str(tmp_path / "other"), side=SIDE, processes=1, seed=1)
    assert read_rows(str(tmp_path / "other" / "manifest.jsonl")) != read_rows(str(tmp_path / "one" / "manifest.jsonl"))


@pytest.mark.skipif(sys.platform != "linux", reason="OpenCV's switches of processor features are tried on Linux only")
def test_the_pixels_do_not_depend_on_what_the_processor_can_do() -> None:
    code = (
        "import hashlib\nimport numpy as np\nfrom ldbfr.degradations import *\n"
        "from ldbfr.evaluation.building import same_everywhere\ndigest = hashlib.sha256()\n"
        "for i in range(3):\n"
        "    face = np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8).repeat(25, 0).repeat(25, 1)\n"
        "    for split in ('mild', 'medium', 'severe', 'wide'):\n"
        "        with same_everywhere():\n"
        "            digest.update(apply(draw(get_profile(split), degradation_generator(0, split, i)), face))\n"
        "print(digest.hexdigest())"
    )
    digests = set()
    for disabled in ("", "AVX512-SKX,AVX2,FP16", "AVX512-SKX,AVX2,FP16,AVX,SSE4.2,SSE4.1,SSSE3"):
        environment = {**os.environ, "OPENCV_CPU_DISABLE": disabled}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let builds in this process be interrupted after so many faces; the list grows by every face that was made."""
    real, made = building.MakeImages.__call__, list[int]()

    def make(self: building.MakeImages, task: tuple[int, str, bytes]) -> tuple[int, list[ManifestRow]]:
        if len(made) == count:
            raise KeyboardInterrupt
        made.append(task[0])
        return real(self, task)

    monkeypatch.setattr(building, "PART", 2)
    monkeypatch.setattr(building.MakeImages, "__call__", make)
    return made


def test_a_stopped_build_goes_on_and_ends_as_an_unstopped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, whole, stopped = faces_at(tmp_path / "faces"), tmp_path / "whole", tmp_path / "stopped"
    build_testset(str(source), str(whole), side=SIDE, processes=1)
    made = stop_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build_testset(str(source), str(stopped), side=SIDE, processes=1)
    with pytest.raises(InputError, match="is an unfinished test set; the command that began it goes on with it"):
        open_testset(str(stopped))
    made.clear()
    build_testset(str(source), str(stopped), side=SIDE, processes=1)
    assert made == [4, 5, 6]  # the first two parts were finished
    assert contents(stopped) == contents(whole)
    build_testset(str(source), str(stopped), side=SIDE, processes=1)
    assert made == [4, 5, 6]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"seed": 5}, "seed 0 there, 5 wanted"),
        ({"side": 16}, "side 32 there, 16 wanted"),
        ({"every": True}, "every False there, True wanted"),
        ({"limit": 3}, "faces 7 there, 3 wanted"),
    ],
)
def test_a_folder_with_another_set_is_refused_with_the_difference(
    tmp_path: Path, other: dict[str, object], text: str
) -> None:
    source, output = str(faces_at(tmp_path / "faces")), str(tmp_path / "set")
    build_testset(source, output, **SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"holds a test set of other settings: .*{text}.*Name another folder"):
        build_testset(source, output, **{**SETTINGS, **other})  # type: ignore[arg-type]


def other_faces_at(folder: Path) -> Path:
    """Faces of the same names as `faces_at`'s, of which one is another."""
    (faces_at(folder) / "old" / "003.png").write_bytes(encode_image(blob_faces(9, 40)[8], "png"))
    return folder


def test_other_faces_of_the_same_names_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source, output = faces_at(tmp_path / "one" / "faces"), tmp_path / "set"
    build_testset(str(source), str(output), **SETTINGS)  # type: ignore[arg-type]
    before = contents(output)
    other = other_faces_at(tmp_path / "two" / "faces")
    text = "other settings: sources_sha256 '.*' there, '.*' wanted; the sources' names or bytes are not those"
    with pytest.raises(ConfigError, match=text):
        build_testset(str(other), str(output), **SETTINGS)  # type: ignore[arg-type]
    assert contents(output) == before
    moved = str(faces_at(tmp_path / "three" / "faces"))
    assert build_testset(moved, str(output), **SETTINGS).digest in before["testset.json"].decode()  # type: ignore[arg-type]
    assert contents(output) == before


def test_a_stopped_build_does_not_go_on_with_other_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = faces_at(tmp_path / "faces"), tmp_path / "set"
    stop_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build_testset(str(source), str(output), **SETTINGS)  # type: ignore[arg-type]
    before = contents(output)
    other_faces_at(source)  # in its place
    with pytest.raises(ConfigError, match="the sources' names or bytes are not those that it is made of"):
        build_testset(str(source), str(output), **SETTINGS)  # type: ignore[arg-type]
    assert contents(output) == before


def forget_sources(description: Path) -> None:
    """As earlier versions wrote it."""
    found = json.loads(description.read_text("utf-8"))
    del found["settings"]["sources_sha256"]
    description.write_text(json.dumps(found), "utf-8")


@pytest.mark.parametrize("options", [SETTINGS, {"side": SIDE, "framing": "tight", "every": True, "processes": 2}])
def test_a_finished_set_that_did_not_record_its_sources_is_taken_if_its_originals_are_theirs(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source, output = faces_at(tmp_path / "faces"), tmp_path / "set"
    built = build_testset(str(source), str(output), **options)
    forget_sources(output / "testset.json")
    before = contents(output)
    assert BuiltTestSet(str(output)).about["digest"] == built.digest
    assert build_testset(str(source), str(output), **options).digest == built.digest
    with pytest.raises(ConfigError, match=r"seed 0 there, 1 wanted\. Name another folder"):
        build_testset(str(source), str(output), **options, seed=1)
    text = r"did not record .* other originals for 1 of 7: old/003\. .*build the set again"
    with pytest.raises(ConfigError, match=text):
        build_testset(str(other_faces_at(source)), str(output), **options)
    assert contents(output) == before


def test_an_unfinished_set_that_did_not_record_its_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = faces_at(tmp_path / "faces"), tmp_path / "set"
    stop_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build_testset(str(source), str(output), **SETTINGS)  # type: ignore[arg-type]
    forget_sources(output / "building.json")
    before = contents(output)
    with pytest.raises(ConfigError, match=r"an unfinished test set of an earlier version .* remove this one and build"):
        build_testset(str(source), str(output), **SETTINGS)  # type: ignore[arg-type]
    assert contents(output) == before


def test_what_was_changed_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    output = tmp_path / "set"
    build_testset(str(faces_at(tmp_path / "faces")), str(output), **SETTINGS)  # type: ignore[arg-type]
    testset = BuiltTestSet(str(output))
    entry = testset.entries[0]
    Path(entry.lq).write_bytes(encode_image(np.zeros((SIDE, SIDE, 3), np.uint8), "png"))
    with pytest.raises(InputError, match=r"was changed: its SHA-256 is not the manifest's .* copy it again"):
        testset.read(entry)
    manifest = output / "manifest.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="is not the manifest that the set was finished with"):
        BuiltTestSet(str(output))


def test_sources_are_archives_too_and_names_come_from_them(tmp_path: Path) -> None:
    folder = faces_at(tmp_path / "faces")
    packed = tmp_path / "faces.tar"
    with tarfile.open(packed, "w") as archive:
        for path in sorted(folder.rglob("*.png"), reverse=True):  # another order than the names'
            archive.add(path, path.relative_to(folder).as_posix())
    for source, name in ((folder, "of folder"), (packed, "of tar")):
        build_testset(str(source), str(tmp_path / name), **SETTINGS)  # type: ignore[arg-type]
    assert contents(tmp_path / "of folder") == contents(tmp_path / "of tar")
    assert "hq/old/000.png" in contents(tmp_path / "of tar")
    build_testset([str(folder), str(packed)], str(tmp_path / "both"), **SETTINGS)  # type: ignore[arg-type]
    assert {path for path in contents(tmp_path / "both") if path.endswith("/001.png") and path.startswith("hq")} == {
        "hq/faces/001.png",
        "hq/faces.tar/001.png",
    }


@pytest.mark.s3
def test_a_set_in_a_bucket_is_the_same(tmp_path: Path, s3_root: str) -> None:
    source = faces_at(tmp_path / "faces", 3)
    for path in source.rglob("*.png"):
        storage.write_bytes(storage.join(s3_root, "faces", path.relative_to(source).as_posix()), path.read_bytes())
    here = build_testset(str(source), str(tmp_path / "set"), **SETTINGS)  # type: ignore[arg-type]
    there = build_testset(storage.join(s3_root, "faces"), storage.join(s3_root, "set"), **SETTINGS)  # type: ignore[arg-type]
    assert here == there
    one, other = BuiltTestSet(str(tmp_path / "set")), BuiltTestSet(storage.join(s3_root, "set"))
    assert (one.read(one.entries[0])[0] == other.read(other.entries[0])[0]).all()


def test_the_tight_frame_is_where_the_templates_say() -> None:
    left, top, side = tight_part()
    moved = (np.array(TEMPLATES["ffhq"]) / 512 - (left, top)) / side
    assert np.abs(moved - np.array(TEMPLATES["tight"]) / 512).max() < 0.02
    face = blob_faces(1, 512)[0]
    assert tight_crop(face).shape == (339, 339, 3)
    with pytest.raises(InputError, match="a frame is a square; align it first"):
        tight_crop(face[:500])


def test_real_faces_cut_out_of_ffhqs_frame_are_framed_as_tight_ones(shared_data: Path) -> None:
    detector = YuNet(shared_data / "weights" / DETECTOR_FILE.name)
    files = sorted((shared_data / "celebahq512").glob("*.jpg"))[:16]
    faces = [resize(tight_crop(decode_image(file.read_bytes(), name=file.name)), 256, 256) for file in files]
    found = []
    for face in faces:
        around = np.full((384, 384, 3), 128, np.uint8)
        around[64:320, 64:320] = face
        found += [(np.array(one.landmarks) - 64 + 0.5) / 256 for one in detector(around)[:1]]
    assert len(found) >= 14
    assert np.abs(np.median(found, axis=0) - (np.array(TEMPLATES["tight"]) + 0.5) / 512).max() < 0.03


def test_a_tight_set_is_cut_out_of_wide_faces_but_not_of_tight_ones(tmp_path: Path) -> None:
    source = faces_at(tmp_path / "faces", 3, 100)
    face = decode_image((source / "001.png").read_bytes(), name="001")
    for name, framing in (("cut", "ffhq"), ("as it is", "tight")):
        build_testset(str(source), str(tmp_path / name), side=66, framing="tight", source_framing=framing, processes=1)  # type: ignore[arg-type]
    cut = decode_image((tmp_path / "cut" / "hq" / "001.png").read_bytes(), name="cut")
    assert (cut == tight_crop(face)).all()
    assert (decode_image((tmp_path / "as it is" / "hq" / "001.png").read_bytes(), name="") != cut).any()
    with pytest.raises(ConfigError, match="what was cut off is gone; say --framing tight"):
        build_testset(str(source), str(tmp_path / "no"), source_framing="tight")


def deep_png() -> bytes:
    """A grey PNG of 16 bits."""
    output = io.BytesIO()
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(output, "PNG")
    return output.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.png", b"", "the file is empty"),
        ("a.png", b"no image", "not a supported image"),
        ("a.png", deep_png(), r"16 bits a sample, .*magick IN.png -depth 8 OUT.png"),
        ("001.jpg", encode_image(blob_faces(1, 40)[0], "jpeg"), "1 names come twice, with different suffixes: 001;"),
        ("a.tar.gz", b"x", "cannot be read in the order of its names; unpack it"),
    ],
)
def test_faces_that_cannot_be_used_are_errors_since_a_set_leaves_nothing_out(
    tmp_path: Path, name: str, data: bytes, text: str
) -> None:
    source = faces_at(tmp_path / "faces", 3)
    (source / name).write_bytes(data)
    with pytest.raises(InputError, match=text):
        build_testset(str(source), str(tmp_path / "set"), **SETTINGS)  # type: ignore[arg-type]


def test_settings_that_are_impossible_are_refused(tmp_path: Path) -> None:
    source, output = str(faces_at(tmp_path / "faces", 3)), str(tmp_path / "set")
    with pytest.raises(ConfigError, match="There is no degradation profile 'harsh'"):
        build_testset(source, output, splits=("harsh",))
    with pytest.raises(ConfigError, match="splits mild, mild: expected one or more, each once"):
        build_testset(source, output, splits=("mild", "mild"))
    with pytest.raises(ConfigError, match="--side 4: expected 8 to 4,096"):
        build_testset(source, output, side=4)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="nothing is there"):
        build_testset(str(tmp_path / "none"), output)


def test_the_command_prints_counts_and_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = TestSetCommand((str(faces_at(tmp_path / "faces", 6)),), str(tmp_path / "set"), side=SIDE, processes=1)
    assert command() == 0
    digest = BuiltTestSet(str(tmp_path / "set")).about["digest"]
    assert f"2 mild, 2 medium, 2 severe\ndigest {digest}" in capsys.readouterr().out


def test_known_sets_must_be_whole_and_any_folder_will_do(tmp_path: Path) -> None:
    folder = str(faces_at(tmp_path / "lfw", 3))
    with pytest.raises(InputError, match=r"3 images, and LFW-Test has 1,711: .*open it as a plain folder"):
        open_testset(folder, kind="lfw")
    with pytest.raises(InputError, match="3 images, and WIDER-Test has 970"):
        open_testset(folder, kind="wider")
    with pytest.raises(ConfigError, match="LFW-Test has no ground truth"):
        open_testset(folder, hq=folder, kind="lfw")
    testset = open_testset(folder)
    assert isinstance(testset, PlainFolder)
    assert [entry.name for entry in testset.entries] == ["001", "002", "old/000"]
    image, original = testset.read(testset.entries[0])
    assert image.shape == (40, 40, 3)
    assert original is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there is no image in it"):
        open_testset(str(tmp_path / "empty"))


def test_a_known_set_of_other_sizes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldbfr.evaluation import testsets

    folder = str(faces_at(tmp_path / "lfw", 3))
    monkeypatch.setitem(testsets.KNOWN, "lfw", testsets.KnownSet("LFW-Test", 3, 40))
    assert len(open_testset(folder, kind="lfw").entries) == 3
    monkeypatch.setitem(testsets.KNOWN, "lfw", testsets.KnownSet("LFW-Test", 3))
    with pytest.raises(InputError, match=r"3 images of LFW-Test are not 512 px aligned faces: 001 \(40 × 40 px\)"):
        open_testset(folder, kind="lfw")
