"""Images to shards: every kind of input, what is left out and why, and results that depend on nothing else."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from ldbfr import storage
from ldbfr.data.shards import _check_key
from ldbfr.errors import ConfigError, InputError, LDBFRError, StorageError
from ldbfr.images import decode_image
from ldbfr.inputs.keys import image_key
from ldbfr.inputs.sources import find_inputs, label_sources
from ldbfr.preparation.run import WORK_FOLDER, Preparation
from ldbfr.preparation.units import split_of
from ldbfr.runner import Item, Result, run_here
from tests import tiny
from tests.faulty_proxy import FaultyProxy
from tests.preparing import (
    SIDE,
    as_face,
    digests,
    faces_of,
    make_settings,
    pngs,
    prepare,
    put,
    report_of,
    saved,
    splits_of,
    textures,
    write_parquet,
    write_tar,
    write_zip,
)

pytest_plugins = ["tests.faulty_proxy"]

# ---- every kind of input, local and in a bucket ----


@dataclass(frozen=True)
class Mixture:
    """Inputs of every kind below one place, and the face that each key must give."""

    root: str
    faces: dict[str, np.ndarray]


def write_mixture(root: str, uri_root: str) -> Mixture:
    """Two images in each kind of input, equal names everywhere, and more than a unit in some."""
    images = iter(pngs(60))
    expected: dict[str, bytes] = {}

    def take(count: int, keys: Callable[[int], str]) -> list[bytes]:
        taken = [next(images) for _ in range(count)]
        expected.update({keys(number): data for number, data in enumerate(taken)})
        return taken

    def named(folder: str, count: int) -> dict[str, bytes]:
        below = f"raw/{folder}/" if folder else "raw/"
        return {f"{n}.png": data for n, data in enumerate(take(count, lambda n: f"{below}{n}-png"))}

    put(root, {f"raw/{name}": data for name, data in named("", 2).items()})
    put(root, {f"raw/a/b.c/{name}": data for name, data in named("a/b.c", 2).items()})
    put(root, {"raw/notes.txt": b"no image"})
    put(root, {"raw/one.tar": write_tar({"readme": b"", **named("one.tar", 6)})})
    dotted = {f"./{name}": data for name, data in named("sub/two.tgz", 9).items()}
    put(root, {"raw/sub/two.tgz": write_tar(dotted, "w:gz")})
    put(root, {"raw/three.tar.gz": write_tar(named("three.tar.gz", 2), "w:gz")})
    put(root, {"raw/four.zip": write_zip(named("four.zip", 5))})
    put(root, {"raw/stored.zip": write_zip(named("stored.zip", 2), zipfile.ZIP_STORED)})
    rows = take(11, lambda n: f"raw/bytes.parquet/{n:09d}")
    put(root, {"raw/bytes.parquet": write_parquet({"label": ["x"] * 11, "image": rows}, row_group_size=7)})
    structs = [{"bytes": data, "path": None} for data in take(5, lambda n: f"raw/hf.parquet/{n:09d}")]
    put(root, {"raw/hf.parquet": write_parquet({"image": structs}, row_group_size=2)})
    linked = take(5, lambda n: f"raw/uris.parquet/{n:09d}")
    put(uri_root, {f"elsewhere/{n}": data for n, data in enumerate(linked)})
    uris = [f"../elsewhere/{n}" if storage.is_local(root) else f"{uri_root}/elsewhere/{n}" for n in range(5)]
    put(root, {"raw/uris.parquet": write_parquet({"path": uris})})
    return Mixture(f"{root}/raw", {key: as_face(data) for key, data in expected.items()})


def check_mixture(mixture: Mixture, output: str) -> None:
    """Prepare it, and compare every face."""
    summary = prepare(output, mixture.root)

    found = faces_of(output)
    assert found.keys() == mixture.faces.keys()
    for key, face in mixture.faces.items():
        np.testing.assert_array_equal(found[key], face, err_msg=key)
    assert (summary.inputs, summary.skipped) == (len(mixture.faces), 2)
    assert sum(summary.kept.values()) == len(mixture.faces)
    assert {row["status"] for row in report_of(output).values()} == {"kept"}
    names = {found.key for found in storage.list_objects(output)}
    assert not any(name.startswith(WORK_FOLDER) for name in names)
    assert {"dataset.json", "report.parquet", "contact-sheet.png"} <= names


def test_every_kind_of_input_on_a_disk(tmp_path: Path) -> None:
    check_mixture(write_mixture(str(tmp_path), str(tmp_path)), str(tmp_path / "out"))


@pytest.mark.s3
def test_every_kind_of_input_in_a_bucket(s3_root: str) -> None:
    check_mixture(write_mixture(s3_root, s3_root), f"{s3_root}/out")


@pytest.mark.s3
def test_local_and_bucket_inputs_mix(s3_root: str, tmp_path: Path) -> None:
    data = pngs(4)
    put(tmp_path / "faces", {"1.png": data[0]})
    put(f"{s3_root}/faces", {"1.png": data[1]})
    put(s3_root, {"one.tar": write_tar({"1.png": data[2]}), "single.png": data[3]})

    prepare(tmp_path / "out", tmp_path / "faces", f"{s3_root}/faces", f"{s3_root}/one.tar", f"{s3_root}/single.png")

    found = faces_of(tmp_path / "out")
    keys = [
        f"{tmp_path.name}/faces/1-png",
        f"{s3_root.rpartition('/')[2]}/faces/1-png",
        "one.tar/1-png",
        "single-png",
    ]
    assert sorted(found) == sorted(keys)
    for key, image in zip(keys, data, strict=True):
        np.testing.assert_array_equal(found[key], as_face(image))


def test_an_archive_or_an_image_alone(tmp_path: Path) -> None:
    data = pngs(3)
    put(
        tmp_path,
        {"one.zip": write_zip({"x/1.png": data[0]}), "a.png": data[1], "b/one.zip": write_zip({"1.png": data[2]})},
    )

    prepare(tmp_path / "out", tmp_path / "one.zip", tmp_path / "a.png", tmp_path / "b" / "one.zip")

    assert set(faces_of(tmp_path / "out")) == {f"{tmp_path.name}/one.zip/x/1-png", "a-png", "b/one.zip/1-png"}


# ---- names ----


PATHS = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3).map("/".join)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(PATHS, st.sampled_from([".png", ".PNG", ".jpg", ".tif"])), min_size=2, max_size=6, unique=True)
)
def test_keys_are_usable_and_different(paths: list[tuple[str, str]]) -> None:
    names = {path + suffix for path, suffix in paths}
    keys = [key for name in names if (key := image_key("faces", name)) is not None]

    assert len(set(keys)) == len(keys)
    assert len(keys) >= sum("/" not in name for name in names)  # only folders can be unusable
    for key in keys:
        _check_key(key)


def test_odd_names_survive(tmp_path: Path) -> None:
    names = [
        "déjà vu/100% #1?.png",
        "写真/顔.png",
        "a.b.c.png",
        "back\\slash.png",
        "line\nbreak.png",
        "x" * 200 + ".png",
    ]
    data = dict(zip(names, pngs(6), strict=True))
    put(tmp_path / "in", data)
    (tmp_path / "in" / os.fsdecode(b"latin-\xe9.png")).write_bytes(data["a.b.c.png"])
    put(tmp_path / "in", {"t.tar": write_tar(data), "z.zip": write_zip(data)})

    prepare(tmp_path / "out", tmp_path / "in")

    found = faces_of(tmp_path / "out")
    assert len(found) == 19
    assert {"in/déjà vu/100%25 #1?-png", "in/写真/顔-png", "in/a%2Eb%2Ec-png", "in/latin-%E9-png"} <= found.keys()
    assert {"in/back%5Cslash-png", "in/t.tar/line%0Abreak-png", "in/z.zip/写真/顔-png"} <= found.keys()
    np.testing.assert_array_equal(found["in/t.tar/a%2Eb%2Ec-png"], as_face(data["a.b.c.png"]))


def test_a_repeated_or_wandering_member_is_rejected(tmp_path: Path) -> None:
    first, second, third, fourth = pngs(4)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in (("1.png", first), ("./1.png", second), ("../2.png", third), ("3.png", fourth)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("4.png")
        link.type, link.linkname = tarfile.SYMTYPE, "3.png"
        tar.addfile(link)
    put(tmp_path, {"x.tar": archive.getvalue()})

    summary = prepare(tmp_path / "out", tmp_path / "x.tar")

    assert summary.rejected == {"repeated name": 1, "bad name": 1, "link": 1}
    found = faces_of(tmp_path / "out")
    assert found.keys() == {"x.tar/1-png", "x.tar/3-png"}
    np.testing.assert_array_equal(found["x.tar/1-png"], as_face(first))
    reasons = {Path(name).name: row["reason"] for name, row in report_of(tmp_path / "out").items() if row["reason"]}
    assert "holds only a link to '3.png'" in reasons["4.png"]


def test_labels_tell_sources_apart() -> None:
    labels = label_sources(["/a/x/faces", "/b/x/faces", "s3://x/faces", "/c/one.tar", "/c/other"])

    assert labels == {
        "/a/x/faces": "a/x/faces",
        "/b/x/faces": "b/x/faces",
        "s3://x/faces": "s3/x/faces",
        "/c/one.tar": "one.tar",
        "/c/other": "other",
    }


def test_a_place_given_twice_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"in/sub/1.png": pngs(1)[0]})
    (tmp_path / "link").symlink_to(tmp_path / "in")

    for other in ("in/sub", "link", "in/"):
        with pytest.raises(ConfigError, match="so images would come twice; name each place once"):
            prepare(tmp_path / "out", tmp_path / "in", f"{tmp_path}/{other}")
    assert not (tmp_path / "out").exists()


@pytest.mark.s3
def test_an_archive_with_the_name_of_a_folder_is_refused(s3_root: str) -> None:
    put(s3_root, {"in/x.tar": write_tar({}), "in/x.tar-more": b"", "in/x.tar/1.png": b""})

    with pytest.raises(InputError, match="its folder has the name of an archive; rename"):
        list(find_inputs(f"{s3_root}/in", "in"))


# ---- what is left out, and why ----


def odd_files() -> dict[str, bytes]:
    """Images of every kind, good and bad."""
    faces = [Image.fromarray(face) for face in tiny.blob_faces(8, side=48)]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    whole = saved(faces[0], "JPEG")
    return {
        "alpha.png": saved(
            Image.merge("RGBA", (*faces[0].split(), Image.linear_gradient("L").resize((48, 48)))), "PNG"
        ),
        "cmyk.jpg": saved(faces[1].convert("CMYK"), "JPEG"),
        "grey.png": saved(faces[2].convert("L"), "PNG"),
        "rotated.jpg": saved(faces[3].resize((64, 48)), "JPEG", exif=exif),
        "small.png": saved(faces[4].resize((31, 90)), "PNG"),
        "empty.png": b"",
        "text.png": b"not a picture at all",
        "truncated.jpg": whole[: len(whole) // 2],
        "palette.PNG": saved(faces[5].quantize(32), "PNG"),
    }


BAD = {
    "small.png": f"too small: 31 x 90 px, expected at least {SIDE} px on the shorter side",
    "empty.png": "broken: the file is empty (0 bytes), expected an image",
    "text.png": "broken: not a supported image",
    "truncated.jpg": "broken: the image is damaged or truncated",
}


@pytest.mark.parametrize("packed", ["folder", "tar", "zip", "parquet"])
def test_what_cannot_be_used_is_rejected_with_a_reason(tmp_path: Path, packed: str) -> None:
    files = odd_files()
    if packed == "folder":
        put(tmp_path / "in", files)
        (tmp_path / "in" / "dangling.png").symlink_to(tmp_path / "nowhere")
    elif packed == "parquet":
        put(tmp_path / "in", {"x.parquet": write_parquet({"image": [*files.values(), None]})})
    else:
        put(
            tmp_path / "in",
            {"x.tar" if packed == "tar" else "x.zip": (write_tar if packed == "tar" else write_zip)(files)},
        )

    summary = prepare(tmp_path / "out", tmp_path / "in")

    rows = report_of(tmp_path / "out")
    by_name = (
        dict(zip(files, rows.values(), strict=False))
        if packed == "parquet"
        else {Path(n).name: r for n, r in rows.items()}
    )
    for name, data in files.items():
        row = by_name[name]
        if name in BAD:
            assert row["status"] == "rejected"
            assert row["reason"].startswith(BAD[name]), row["reason"]
            assert row["split"] is None
        else:
            assert row["status"] == "kept", row
            np.testing.assert_array_equal(faces_of(tmp_path / "out")[row["key"]], as_face(data))
    extra = {"folder": 1, "parquet": 1}.get(packed, 0)
    assert summary.inputs == len(files) + extra == len(rows)
    assert sum(summary.kept.values()) == 5
    assert summary.rejected == {"broken": 3, "too small": 1} | ({"unreadable": 1} if extra else {})


def test_no_usable_image_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    put(tmp_path / "in", {name: data for name, data in odd_files().items() if name in BAD})

    for _ in range(2):  # nothing is forgotten by having failed once
        with pytest.raises(InputError, match=r"no usable image among 4: 3 broken, 1 too small\n .*empty.png: broken: "):
            prepare(tmp_path / "out", tmp_path / "in")

    assert not storage.exists(str(tmp_path / "out" / "dataset.json"))


def test_an_input_without_images_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "in", {"notes.txt": b"x"})

    with pytest.raises(InputError, match=r"no image in .*in \(1 other files\); check the place"):
        prepare(tmp_path / "out", tmp_path / "in")


def test_the_sheet_shows_kept_and_rejected(tmp_path: Path) -> None:
    put(tmp_path / "in", odd_files())
    for number, data in enumerate(textures(12)):
        put(
            tmp_path / "in", {f"{number}.png": data, f"again-{number}.jpg": saved(Image.open(io.BytesIO(data)), "JPEG")}
        )

    prepare(tmp_path / "out", tmp_path / "in", near_duplicates="drop")

    sheet = decode_image((tmp_path / "out" / "contact-sheet.png").read_bytes(), name="sheet")
    rows = 3 + 1 + 1 + 1  # kept, too small, dropped, and for which
    assert rows * 144 < sheet.shape[0] < (rows + 1) * 144
    assert 8 * 144 < sheet.shape[1] < 10 * 144


# ---- splits ----


def test_a_split_follows_from_the_key_alone(tmp_path: Path) -> None:
    images = {f"{n}.png": data for n, data in enumerate(pngs(24))}
    put(tmp_path / "all" / "faces", images)
    put(tmp_path / "some" / "faces", dict(list(images.items())[::2]))
    put(tmp_path / "more", {"x.png": pngs(1, seed=9)[0]})

    prepare(tmp_path / "one", tmp_path / "all" / "faces", shard_images=5)
    prepare(tmp_path / "two", tmp_path / "more", tmp_path / "some" / "faces", shard_images=2)

    one, two = splits_of(tmp_path / "one"), splits_of(tmp_path / "two")
    assert {key: split for key, split in two.items() if key != "more/x-png"}.items() <= one.items()
    assert set(one.values()) == {"train", "val"}


def test_the_share_is_that_of_the_keys() -> None:
    keys = [f"faces/{n:05d}-png" for n in range(20_000)]
    splits = [split_of(key, 0, 0.05) for key in keys]

    assert splits.count("val") / len(keys) == pytest.approx(0.05, abs=0.006)  # four standard deviations
    assert splits != [split_of(key, 1, 0.05) for key in keys]
    assert {split_of(key, 0, 0.0) for key in keys} == {"train"}


# ---- the result depends on inputs and settings alone ----


def test_order_and_unit_size_do_not_matter(tmp_path: Path) -> None:
    mixture = write_mixture(str(tmp_path), str(tmp_path))
    put(tmp_path / "b", {"1.png": pngs(1, seed=3)[0]})

    def backwards(step: Callable[[Item], Iterator[Result]], items: Sequence[Item]) -> Iterator[Result]:
        return run_here(step, items[::-1])

    prepare(tmp_path / "one", mixture.root, tmp_path / "b")
    prepare(tmp_path / "two", tmp_path / "b", mixture.root, run=backwards)
    prepare(tmp_path / "three", mixture.root, tmp_path / "b", shard_images=7)

    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "three")
    shards = [sorted((tmp_path / name / "shards").iterdir()) for name in ("one", "two")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


class Interrupted(Exception):
    """The process was killed."""


class StoppingRunner:
    """Does so many results, and is killed; counts what was done."""

    def __init__(self, results: int) -> None:
        self.left, self.done = results, 0

    def __call__(self, step: Callable[[Item], Iterator[Result]], items: Sequence[Item]) -> Iterator[Result]:
        for result in run_here(step, items):
            if self.left == 0:
                raise Interrupted
            self.left, self.done = self.left - 1, self.done + 1
            yield result


@pytest.mark.parametrize("near_duplicates", ["keep", "drop"])
def test_a_stopped_run_goes_on_and_repeats_nothing(tmp_path: Path, near_duplicates: str) -> None:
    mixture = write_mixture(str(tmp_path), str(tmp_path))
    prepare(tmp_path / "undisturbed", mixture.root, near_duplicates=near_duplicates)
    counting = StoppingRunner(10**9)
    prepare(tmp_path / "counted", mixture.root, run=counting, near_duplicates=near_duplicates)

    done = 0
    while True:
        stopping = StoppingRunner(4)
        try:
            prepare(tmp_path / "out", mixture.root, run=stopping, near_duplicates=near_duplicates)
            break
        except Interrupted:
            done += stopping.done

    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    # What was under way when the process was killed had been written: none of it is done again.
    assert done + stopping.done <= counting.done
    assert counting.done > 16


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    put(tmp_path / "in", {f"{n}.png": data for n, data in enumerate(pngs(5))})
    first = prepare(tmp_path / "out", tmp_path / "in")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    again = prepare(tmp_path / "out", tmp_path / "in", run=lambda *_: pytest.fail("a step was run"))

    assert again == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_the_difference(tmp_path: Path, finished: bool) -> None:
    put(tmp_path / "in", {f"{n}.png": data for n, data in enumerate(pngs(5))})
    run: Any = run_here if finished else StoppingRunner(1)
    try:
        prepare(tmp_path / "out", tmp_path / "in", run=run)
    except Interrupted:
        assert not finished

    text = r"--output .*out was begun with other settings \(--side 32 there, 16 now; --val-share 0.3 there, 0.5 now\)"
    with pytest.raises(ConfigError, match=text):
        prepare(tmp_path / "out", tmp_path / "in", side=16, val_share=0.5)


@pytest.mark.parametrize(("output", "source"), [("in", "in"), ("in/out", "in"), ("out", "out/in")])
def test_output_and_input_must_not_overlap(tmp_path: Path, output: str, source: str) -> None:
    put(tmp_path / source, {"1.png": pngs(1)[0]})

    with pytest.raises(ConfigError, match="so results would be read as input; name another output"):
        prepare(tmp_path / output, tmp_path / source)


def test_an_unwritable_output_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, {"in/1.png": pngs(1)[0], "file": b""})

    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        prepare(tmp_path / "file" / "out", tmp_path / "in")


# ---- a place that fails is no reason to reject ----


def test_an_input_that_vanishes_is_rejected(tmp_path: Path) -> None:
    put(tmp_path / "in", {f"{n}.png": data for n, data in enumerate(pngs(5))})
    preparation = Preparation(str(tmp_path / "out"), make_settings(tmp_path / "in"))
    preparation.begin()
    plan = preparation.plan()
    (tmp_path / "in" / "3.png").unlink()
    list(preparation.write(plan, run_here))

    assert preparation.finish(plan).rejected == {"unreadable": 1}
    row = report_of(tmp_path / "out")[str(tmp_path / "in" / "3.png")]
    assert "there is no such file; check the path" in row["reason"]


@pytest.mark.s3
@pytest.mark.parametrize("packed", [True, False])
def test_a_bucket_that_fails_stops_the_run_and_rejects_nothing(
    s3_root: str, faulty_s3: FaultyProxy, tmp_path: Path, packed: bool
) -> None:
    files = {f"{n}.png": data for n, data in enumerate(pngs(10))}
    put(f"{s3_root}/in", {"x.tar": write_tar(files)} if packed else files)
    preparation = Preparation(str(tmp_path / "out"), make_settings(f"{s3_root}/in"))
    preparation.begin()
    plan = preparation.plan()
    preparation.list_archives(plan, run_here, allow_damaged=False)

    faulty_s3.refuse()
    with pytest.raises(StorageError, match="cannot be reached"):
        list(preparation.write(plan, run_here))
    faulty_s3.clear()
    faulty_s3.fail(status=401)
    with pytest.raises(StorageError, match=r"cannot read .*401.*; look it up in the logs"):
        list(preparation.write(plan, run_here))
    faulty_s3.clear()

    assert sum(prepare(tmp_path / "out", f"{s3_root}/in").kept.values()) == 10


@pytest.mark.s3
def test_an_object_that_vanishes_is_rejected(s3_root: str, tmp_path: Path) -> None:
    put(f"{s3_root}/in", {f"{n}.png": data for n, data in enumerate(pngs(3))})
    preparation = Preparation(str(tmp_path / "out"), make_settings(f"{s3_root}/in"))
    preparation.begin()
    plan = preparation.plan()
    storage.delete(f"{s3_root}/in/1.png")
    list(preparation.write(plan, run_here))

    assert preparation.finish(plan).rejected == {"unreadable": 1}


def test_errors_are_of_the_library(tmp_path: Path) -> None:
    for source, text in (
        ("missing", "there is no such file or folder"),
        ("notes.md", r"expected a folder, an image, an archive \(.*\) or a list of URIs \(\.txt\), by its name"),
    ):
        put(tmp_path, {"notes.md": b"x"})
        with pytest.raises(LDBFRError, match=text):
            prepare(tmp_path / "out", tmp_path / source)
