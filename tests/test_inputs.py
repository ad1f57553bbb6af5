"""Archives: damage that is noticed, members that cannot be used, memory that does not grow."""

from __future__ import annotations

import gzip
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.preparation.plan import Plan
from ldbfr.preparation.run import Preparation, run_here
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
