"""Sources: damaged archives, lists, listings that go on, names and keys, memory that does not grow."""

from __future__ import annotations

import gzip
import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.inputs.containers import list_archive
from ldbfr.inputs.entries import Container, Entry, Other
from ldbfr.inputs.keys import image_key, path_of_key
from ldbfr.inputs.sources import find_inputs
from ldbfr.preparation.plan import Plan
from ldbfr.preparation.run import Preparation
from ldbfr.runner import run_here
from tests.preparing import (
    as_face,
    damage,
    faces_of,
    make_settings,
    pngs,
    prepare,
    put,
    report_of,
    write_parquet,
    write_tar,
    write_zip,
)

# ---- damaged archives ----


DAMAGED = {
    "no tar": (0, "is not a readable tar file"),
    "empty tar": (0, "is not a readable tar file"),
    "cut member.tar": (5, "is not a readable tar file"),
    "cut between.tar": (5, "ends without its end mark, so the rest is lost"),
    "cut header.tar": (5, "a header in it is damaged, so the rest is lost"),
    "bad header.tar": (5, "a header in it is damaged, so the rest is lost"),
    "joined.tar": (8, "data follow its end mark, as when two archives are joined"),
    "cut.tgz": (None, "is not a readable tar.gz file"),
    "flipped.tgz": (8, "is not a readable tar.gz file"),
    "no gzip.tgz": (0, "is not a readable tar.gz file"),
    "cut.zip": (0, "is not a readable zip file"),
    "cut.parquet": (0, "is not a readable parquet file"),
    "other.parquet": (
        0,
        "--column none given, expected the one with the images' bytes or URIs among a (int64), b (string)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_archive_is_noticed_and_used_only_if_allowed(tmp_path: Path, kind: str) -> None:
    name = kind.replace(" ", ".") if "." not in kind else kind
    put(tmp_path / "in", {"good.png": pngs(1, seed=7)[0], name: damage(kind)})
    preparation = Preparation(str(tmp_path / "out"), make_settings(tmp_path / "in"))
    preparation.begin()
    plan = preparation.plan()
    preparation.list_archives(plan, run_here, allow_damaged=False)
    usable, text = DAMAGED[kind]

    assert len(plan.damaged) == 1
    assert text in plan.damaged[0]
    assert str(tmp_path / "in" / name) in plan.damaged[0]
    assert Preparation(str(tmp_path / "out"), make_settings(tmp_path / "in")).plan().missing == [1]

    summary = prepare(tmp_path / "out", tmp_path / "in", allow_damaged=True)
    kept = sum(summary.kept.values())
    assert kept == 1 + usable if usable is not None else 1 <= kept < 9
    assert summary.rejected["damaged archive"] == 1
    assert summary.damaged == plan.damaged
    assert summary.inputs == kept + sum(summary.rejected.values())


def test_a_replaced_archive_is_listed_again(tmp_path: Path) -> None:
    put(tmp_path / "in", {"x.tar": damage("cut between.tar")})
    with pytest.raises(AssertionError, match="ends without its end mark"):
        prepare(tmp_path / "out", tmp_path / "in")
    put(tmp_path / "in", {"x.tar": write_tar({f"{n}.png": data for n, data in enumerate(pngs(8))})})

    assert sum(prepare(tmp_path / "out", tmp_path / "in").kept.values()) == 8


def test_a_damaged_archive_can_be_taken_out(tmp_path: Path) -> None:
    files = [write_tar({f"{n}.png": data}) for n, data in enumerate(pngs(3))]
    put(tmp_path / "in", {"a.tar": damage("cut between.tar"), **{f"b{n}.tar": data for n, data in enumerate(files)}})
    preparation = Preparation(str(tmp_path / "out"), make_settings(tmp_path / "in"))
    preparation.begin()
    plan = preparation.plan()
    preparation.list_archives(plan, run_here, allow_damaged=False)
    preparation.discard(plan)
    (tmp_path / "in" / "a.tar").unlink()

    prepare(tmp_path / "out", tmp_path / "in")

    assert faces_of(tmp_path / "out").keys() == {f"in/b{n}.tar/{n}-png" for n in range(3)}


def test_settings_bind_only_once_something_was_listed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path, {"in/1.png": pngs(1)[0]})
    with pytest.raises(InputError, match="nothing is there; check the place"):
        prepare(tmp_path / "out", tmp_path / "empty")

    assert sum(prepare(tmp_path / "out", tmp_path / "in").kept.values()) == 1


def test_a_broken_member_does_not_stop_the_others(tmp_path: Path) -> None:
    files = {f"{n}.png": data for n, data in enumerate(pngs(4))}
    zipped = bytearray(write_zip(files, zipfile.ZIP_STORED))
    at = zipped.index(files["2.png"])
    zipped[at + 60] ^= 0xFF
    encrypted = bytearray(write_zip({"secret.png": files["0.png"]}, zipfile.ZIP_STORED))
    encrypted[encrypted.rindex(b"PK\1\2") + 8] |= 1
    put(
        tmp_path / "in",
        {"x.zip": bytes(zipped), "e.zip": bytes(encrypted), "l.zip": write_zip(files, zipfile.ZIP_LZMA)},
    )

    summary = prepare(tmp_path / "out", tmp_path / "in")

    assert faces_of(tmp_path / "out").keys() == {f"in/x.zip/{n}-png" for n in (0, 1, 3)}
    assert summary.rejected == {"packing": 4, "encrypted": 1, "unreadable": 1}
    (row,) = (row for name, row in report_of(tmp_path / "out").items() if name.endswith("x.zip/2.png"))
    assert row["reason"] == "unreadable: the member is damaged (its checksum differs); copy the archive again"


def test_the_column_can_be_named(tmp_path: Path) -> None:
    first, second = pngs(2), pngs(2, seed=1)
    put(tmp_path, {"x.parquet": write_parquet({"left": first, "right": second})})
    with pytest.raises(AssertionError, match=r"--column none given.*left \(binary\), right \(binary\); name it"):
        prepare(tmp_path / "none", tmp_path / "x.parquet")

    prepare(tmp_path / "out", tmp_path / "x.parquet", column="right")

    np.testing.assert_array_equal(faces_of(tmp_path / "out")["x.parquet/000000001"], as_face(second[1]))


# ---- names and keys ----

NAMES = st.lists(st.text(min_size=1, max_size=5) | st.binary(min_size=1, max_size=5).map(os.fsdecode), min_size=1).map(
    "/".join
)
TRICKY = st.text(alphabet="aF2E5C%-.\\\n\udcff", min_size=1, max_size=7)


@settings(max_examples=600, deadline=None)
@given(st.sets(NAMES | TRICKY, min_size=2, max_size=6))
def test_a_path_comes_back_from_its_key(names: set[str]) -> None:
    keys = [key for name in names if (key := image_key("", name.replace("\0", "0"))) is not None]

    paths = [path_of_key(key) for key in keys]

    assert len(set(paths)) == len(set(keys))
    for path in paths:
        assert path.isprintable()
        assert not {"", ".", ".."} & set(path.split("/"))


@settings(max_examples=600, deadline=None)
@given(st.text(alphabet="ab/.-_ #?é日\\%", min_size=1, max_size=9))
def test_what_can_be_printed_comes_back_as_it_was(name: str) -> None:
    key = image_key("label", name)
    assert (key is None) == bool({"", ".", ".."} & set(name.split("/")))
    if key is not None and not re.search("%[0-9a-f]{2}", name):
        assert path_of_key(key) == f"label/{name}"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *(
            (name, name)
            for name in ("100% #1?.png", "写真/顔.png", "a b.jpg", "a.b-c.tar.png", "a-b", ".x", "a\\b.png")
        ),
        ("a%FF.png", "a%25FF.png"),
        (os.fsdecode(b"a\xff.png"), "a%FF.png"),
        ("line\nbreak.png", "line%0Abreak.png"),
    ],
)
def test_paths_of_common_names(name: str, path: str) -> None:
    key = image_key("in", name)
    assert key is not None
    assert path_of_key(key) == f"in/{path}"
    assert path_of_key("in/x.parquet/000000012") == "in/x.parquet/000000012"


def test_other_files_have_names(tmp_path: Path) -> None:
    put(tmp_path / "in", {"notes.txt": b"", "a-b": b"", "x.zip": write_zip({"read.me": b"", "..": b"", "d/": b""})})

    found = [one for _, one in find_inputs(str(tmp_path / "in"), "in")]

    assert found[:2] == [
        Other(str(tmp_path / "in/a-b"), "in/a%2Db"),
        Other(str(tmp_path / "in/notes.txt"), "in/notes-txt"),
    ]
    archive = found[2]
    assert isinstance(archive, Container)
    name = f"{archive.uri}/.."
    assert list(list_archive(archive)) == [Other(f"{archive.uri}/read.me", "in/x.zip/read-me"), Other(name, name)]


# ---- lists ----


def listed(path: Path, data: bytes | str, start_after: str | None = None) -> list[tuple[str, Any]]:
    """What a list names."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(find_inputs(str(path), path.name, start_after))


def test_a_list_names_images_archives_and_others(tmp_path: Path) -> None:
    lines = [
        *("\ufeff# made by hand", "", "s3://bucket/a/b c.jpg", "sub/1.png\r", "./sub/../2.PNG", "  ", "/x//y.tar"),
        *("file:///x/%41.png", "s3://bucket/notes", "é.tgz"),
    ]
    here = str(tmp_path)

    found = listed(tmp_path / "list.txt", "\n".join(lines))

    label = "list.txt"
    assert found == [
        ("3", Entry("s3://bucket/a/b c.jpg", f"{label}/bucket/a/b c-jpg", "file", "s3://bucket/a/b c.jpg")),
        ("4", Entry(f"{here}/sub/1.png", f"{label}/_local{here}/sub/1-png", "file", f"{here}/sub/1.png")),
        ("5", Entry(f"{here}/2.PNG", f"{label}/_local{here}/2-PNG", "file", f"{here}/2.PNG")),
        ("7", Container("tar", "/x/y.tar", f"{label}/_local/x/y.tar")),
        ("8", Entry("/x/A.png", f"{label}/_local/x/A-png", "file", "/x/A.png")),
        ("9", Other("s3://bucket/notes", f"{label}/bucket/notes")),
        ("10", Container("tar.gz", f"{here}/é.tgz", f"{label}/_local{here}/é.tgz")),
    ]
    for taken in range(12):
        going_on = list(find_inputs(f"{here}/list.txt", label, str(taken)))
        assert going_on == [one for one in found if int(one[0]) > taken]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"http://host/a.png", "http:// cannot be read, expected a path, file:///path or s3://bucket/key; copy it"),
        (b"file://host/a.png", "expected file:///path on this machine; copy it here first"),
        (b"s3://_local/a.png", "'_local' is no bucket's name"),
        (b"s3:///a.png", "'' is no bucket's name"),
        (b"s3://bucket/a/../b.png", "expected a path without empty, '.' or '..' parts"),
        (b"s3://bucket//b.tar", "expected a path without empty, '.' or '..' parts"),
        (b"s3://bucket/\xff.png", "it is not UTF-8, as all keys of a bucket are"),
        (b"a\0b.png", "it has a null character"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused(tmp_path: Path, line: bytes, reason: str) -> None:
    ((position, entry),) = listed(tmp_path / "list.txt", line)
    assert position == "1"
    assert isinstance(entry, Entry)
    assert entry.refused is not None
    assert entry.refused.startswith(f"bad name: {reason}")
    assert entry.key == entry.name


def test_what_is_no_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"list\.txt, line 2: over 65,536 bytes, expected a URI or path a line"):
        listed(tmp_path / "list.txt", b"a.png\n" + b"x" * 2**20)
    with pytest.raises(InputError, match="nothing is there; check the place"):
        listed(tmp_path / "list.txt", "# empty\n")


def test_a_folder_may_have_the_name_of_a_list(tmp_path: Path) -> None:
    put(tmp_path / "in.txt", {"1.png": b"", "2.png": b"", "more.txt": b"/x.png"})
    found = [(position, type(one)) for position, one in find_inputs(str(tmp_path / "in.txt"), "in.txt", "1.png")]
    assert found == [("2.png", Entry), ("more.txt", Other)]


@pytest.mark.s3
def test_a_list_in_a_bucket(s3_root: str, tmp_path: Path) -> None:
    first, second = pngs(2)
    put(
        s3_root, {"faces/1.png": first, "lists/all.txt": f"../faces/1.png\n{tmp_path}/2.png\n../faces/1.png\n".encode()}
    )
    put(tmp_path, {"2.png": second})

    summary = prepare(tmp_path / "out", f"{s3_root}/lists/all.txt")

    bucket = s3_root.removeprefix("s3://")
    keys = {f"all.txt/{bucket}/faces/1-png", f"all.txt/_local{tmp_path}/2-png"}
    assert faces_of(tmp_path / "out").keys() == keys
    assert summary.rejected == {"repeated name": 1}


# ---- listings that go on ----


@pytest.mark.parametrize("remote", [False, pytest.param(True, marks=pytest.mark.s3)])
def test_a_listing_goes_on_and_leaves_the_output_out(
    request: pytest.FixtureRequest, tmp_path: Path, remote: bool
) -> None:
    root = str(request.getfixturevalue("s3_root") if remote else tmp_path / "in")
    names = ["1.png", "a/1.png", "a/x.tar", "outer/1.png", "out.png", "z"]
    put(root, dict.fromkeys([*names, "out/1.png", "out/deep/2.png", "report.html"], b""))
    if not remote:
        (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "out")

    def found(after: str | None = None) -> list[tuple[str, Any]]:
        return list(find_inputs(root, "in", after, exclude=(f"{root}/out/", f"{root}/report.html", f"{root}/none")))

    whole = found()
    assert [position for position, _ in whole] == sorted(names)
    for after in ("", "a", "a/1.png", "outer/", "zz"):
        assert found(after) == [one for one in whole if one[0] > after]


@pytest.mark.s3
@pytest.mark.parametrize("after", ["x.tar", "x.tar-more", "x.tar/0.png"])
def test_an_archive_with_the_name_of_a_folder_is_noticed_later(s3_root: str, after: str) -> None:
    put(s3_root, {"in/x.tar": write_tar({}), "in/x.tar-more": b"", "in/x.tar/1.png": b"", "in/y.tar/1.png": b""})

    with pytest.raises(InputError, match="its folder has the name of an archive; rename"):
        list(find_inputs(f"{s3_root}/in", "in", after))
    assert len(list(find_inputs(f"{s3_root}/in", "in", "x.tar/1.png"))) == 1


# ---- streaming ----


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.zip", "x.parquet"])
def test_memory_does_not_grow_with_an_archive(tmp_path: Path, name: str) -> None:
    def peak(count: int) -> int:
        files = {f"{n}.png": np.random.default_rng(n).bytes(120_000) for n in range(count)}
        whole: dict[str, Callable[[], bytes]] = {
            "x.tar": lambda: write_tar(files),
            "x.tgz": lambda: gzip.compress(write_tar(files), 1),
            "x.zip": lambda: write_zip(files, zipfile.ZIP_STORED),
            "x.parquet": lambda: write_parquet(
                {"image": list(files.values())}, count, use_dictionary=False, write_batch_size=4
            ),
        }
        place = tmp_path / str(count)
        put(place / "in", {name: whole[name]()})
        tracemalloc.start()
        preparation = Preparation(str(place / "out"), make_settings(place / "in"))
        preparation.begin()
        plan: Plan = preparation.plan()
        preparation.list_archives(plan, run_here, allow_damaged=False)
        assert len(list(preparation.write(plan, run_here))) == count // 4
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(8)  # what is imported on first use
    small, large = peak(40), peak(160)
    assert large < small + 2**20, (small, large)  # the archives differ by 14 MB


@pytest.mark.s3
def test_large_members_of_a_remote_tar_are_jumped_over(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    big = np.random.default_rng(0).integers(0, 256, 2**20, dtype=np.uint8).tobytes()
    put(s3_root, {"x.tar": write_tar({"film.bin": big, "1.png": pngs(1)[0], "more.bin": big})})
    preparation = Preparation(f"{s3_root}/out", make_settings(f"{s3_root}/x.tar"))
    preparation.begin()
    plan = preparation.plan()
    lengths: list[int] = []
    read_range = storage.read_range
    monkeypatch.setattr(
        storage, "read_range", lambda uri, start, length: lengths.append(length) or read_range(uri, start, length)
    )
    preparation.list_archives(plan, run_here, allow_damaged=False)

    assert plan.num_inputs == 1
    assert sum(lengths) < 2**20
    assert max(lengths) <= 2**17
