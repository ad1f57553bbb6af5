"""Archives made to break, end to end: every input has its row, what is good is restored, nothing else is written."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ldbfr.archive.ledger import Ledger
from ldbfr.archive.rows import ResultRow
from ldbfr.images import DEFAULT_LIMITS
from tests import archiving, tiny
from tests.archiving import huge_header, manifest, outputs, png, restore_here, saved, tar_file, zip_file

GOOD = {f"{number}.png": png(number) for number in range(6)}


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A folder for a run, deep in the test's own: whatever it writes above its output is seen."""
    folder = tmp_path / "a" / "b" / "work"
    folder.mkdir(parents=True)
    here = set(os.listdir())
    yield folder
    outside = {path for path in tmp_path.rglob("*") if path.is_file() and "out" not in path.relative_to(tmp_path).parts}
    assert {path.relative_to(folder).parts[0] for path in outside} <= {"in"}, "written outside the output"
    assert set(os.listdir()) == here


def restored(work: Path, files: dict[str, bytes], shard_images: int = 4) -> tuple[Ledger, dict[str, ResultRow]]:
    """Restore a folder with these files; every planned input has one row, and each restored one its result."""
    source, output = archiving.folder(work / "in", files), str(work / "out")
    before = {path: path.read_bytes() for path in (work / "in").rglob("*") if path.is_file()}
    ledger = restore_here(output, archiving.run_settings(source, shard_images=shard_images))
    rows = manifest(output)
    assert sum(ledger.done) == ledger.plan.num_rows == len(rows)
    assert {str(work / "out" / key) for key in outputs(output)} == {row.output for row in rows.values() if row.output}
    assert {path: path.read_bytes() for path in (work / "in").rglob("*") if path.is_file()} == before
    for row in rows.values():
        assert (row.status == "restored") == (row.output is not None) == (row.cause is None)
        assert row.status == "restored" or row.reason
        assert str(row.reason).isprintable()
        assert row.key.isprintable()
    return ledger, rows


def failures(rows: dict[str, ResultRow]) -> dict[str, str | None]:
    """Key and cause of what is not restored."""
    return {key: row.cause for key, row in rows.items() if row.status != "restored"}


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_of_a_truncated_tar_the_readable_members_are_restored(kind: str, work: Path) -> None:
    whole = archiving.source_of(kind, str(work / "whole"), {f"{n}.png": png(n) for n in range(6)})[0]
    data = Path(whole).read_bytes()
    for path in (work / "whole").iterdir():
        path.unlink()
    ledger, rows = restored(work, {f"x.{kind}": data[: len(data) * 2 // 3], "loose.png": png(9)})

    assert "loose.png" not in failures(rows)
    assert ledger.done.restored >= 3
    assert list(failures(rows).values()).count("damaged archive") == 1
    (damage,) = [row for row in rows.values() if row.cause == "damaged archive"]
    assert damage.input.endswith(f"x.{kind}")
    assert ledger.done.failed <= 2, "the member that is cut, and the archive itself"


def test_a_zip_bomb_is_not_unpacked(work: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(DEFAULT_LIMITS.max_bytes + 1))
        for name, data in GOOD.items():
            archive.writestr(name, data)
    bomb = file.getvalue()
    liar = bytearray(zip_file({"liar.png": bytes(2**26)}))
    for mark, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):  # it claims to be small
        struct.pack_into("<I", liar, liar.index(mark) + offset, 100)
    _, rows = restored(work, {"bomb.zip": bomb, "liar.zip": bytes(liar)})

    assert failures(rows).keys() == {"bomb.zip/bomb.png", "liar.zip/liar.png"}
    assert "expected at most" in str(rows["bomb.zip/bomb.png"].reason)
    assert "damaged" in str(rows["liar.zip/liar.png"].reason)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_lead_out_are_refused(kind: str, work: Path) -> None:
    names = ("../up.png", "../../../up.png", "sub/../../up.png", "/root.png", "a//b.png", "./fine.png")
    files = dict.fromkeys(names, png()) | GOOD
    _, rows = restored(work, {f"x.{kind}": tar_file(files) if kind == "tar" else zip_file(files)})

    assert {row.cause for row in rows.values() if row.cause} == {"bad name"}
    refused = {row.input.partition(f"x.{kind}/")[2] for row in rows.values() if row.cause}
    assert {"../up.png", "../../../up.png", "sub/../../up.png"} <= refused
    assert f"x.{kind}/fine.png" in rows
    assert all(f"x.{kind}/{key}" in rows for key in GOOD)


def test_links_lead_nowhere(work: Path) -> None:
    secret = work / "in" / "secret.txt"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind, target in (
            ("link.png", tarfile.SYMTYPE, str(secret)),
            ("hard.png", tarfile.LNKTYPE, "0.png"),
            ("device.png", tarfile.CHRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    _, rows = restored(work, {"x.tar": file.getvalue(), "secret.txt": b"secret", **GOOD})

    inside = str(work / "in") + "/"
    assert {row.input.removeprefix(inside): row.cause for row in rows.values() if row.cause} == {
        "x.tar/link.png": "link",
        "x.tar/hard.png": "link",
        "x.tar/device.png": "not a plain file",
        "secret.txt": "not an image",
    }


def test_an_encrypted_zip_fails_member_by_member(work: Path) -> None:
    data = bytearray(zip_file(GOOD))
    place = data.index(b"PK\1\2")
    while place >= 0:
        data[place + 8] |= 1
        place = data.find(b"PK\1\2", place + 1)
    ledger, rows = restored(work, {"locked.zip": bytes(data), "loose.png": png(9)})

    assert set(failures(rows).values()) == {"encrypted"}
    assert ledger.done == (1, len(GOOD), 0)


def test_image_bombs_fail_before_they_are_decoded(work: Path) -> None:
    wide = saved(Image.new("1", (30_000, 30_000)), "PNG")
    strip = saved(Image.new("RGB", (100_000, 1)), "PNG")
    _, rows = restored(work, {"header.png": huge_header(), "wide.png": wide, "strip.png": strip, **GOOD})

    assert {"header.png", "wide.png"} <= failures(rows).keys() <= {"header.png", "wide.png", "strip.png"}
    assert "30000 x 30000 pixels" in str(rows["wide.png"].reason)


def test_an_unreadable_file_every_twenty(work: Path) -> None:
    junk = (b"", b"x", png(1)[:60], huge_header(), b"\x89PNG\r\n\x1a\n" + bytes(100), png(2)[:-20] + bytes(8))
    few = [png(number, side=tiny.SIDE) for number in range(5)]
    files = {f"{n:03d}.png": junk[n // 20 % len(junk)] if n % 20 == 7 else few[n % 5] for n in range(200)}
    ledger, rows = restored(work, files, shard_images=32)

    assert failures(rows) == {f"{n:03d}.png": "broken" for n in range(7, 200, 20)}
    assert ledger.done == (190, 10, 0)


def test_empty_files(work: Path) -> None:
    empty = dict.fromkeys(("a.png", "b.JPG", "c.webp", "d.tiff", "sub/e.bmp"), b"")
    _, rows = restored(
        work, {**empty, **GOOD, "f.tar": b"", "g.zip": b"", "h.parquet": b"", "i.tar.gz": b"", "notes.txt": b""}
    )

    causes = failures(rows)
    assert {causes.pop(key) for key in empty} == {"broken"}
    assert causes.pop("notes.txt") == "not an image"
    assert len(causes) == 4
    assert set(causes.values()) == {"damaged archive"}


def test_archives_that_are_something_else(work: Path) -> None:
    noise = bytes(range(256)) * 50
    files = {f"noise.{suffix}": noise for suffix in ("tar", "tar.gz", "zip", "parquet")}
    files |= {f"face.{suffix}": png() for suffix in ("tar", "tar.gz", "zip", "parquet")}
    ledger, rows = restored(work, files | GOOD)

    assert ledger.done == (len(GOOD), 8, 0)
    assert set(failures(rows).values()) == {"damaged archive"}


NAMES = (
    *("ünï/cödé.png", "写真/顔.png", "😀.png", "e\u0301.png", "\u00e9.png", "\u202egnp.png", "\u2028.png"),
    *("new\nline.png", "tab\t.png", "bell\x07.png", "%0A.png", "a%2Fb.png", "back\\slash.png", "-rf.png", "~.png"),
    *("CON.png", " lead.png", "trail .png", "dots...png", "q?#&.png", "{x}$HOME`.png", "a'b\".png"),
    *("_ldbfr/x.png", "manifest/000000.parquet.png", "shards/x.png", "report.html/x.png", "_first-stage/x.png"),
)


@pytest.mark.parametrize("kind", ["prefix", "tar", "zip"])
def test_names_of_all_kinds(kind: str, work: Path) -> None:
    files = {name: png(number % 7, side=tiny.SIDE) for number, name in enumerate(NAMES)}
    packed = {"prefix": files, "tar": {"x.tar": tar_file(files)}, "zip": {"x.zip": zip_file(files)}}
    ledger, rows = restored(work, packed[kind])

    assert failures(rows) == {}
    assert ledger.done.restored == len(NAMES) == len(outputs(str(work / "out")))


def test_names_that_are_no_text(work: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("\udcff\udcfe.png", "a\udc80.png", "fine.png"):
            info = tarfile.TarInfo(name)
            info.size = len(GOOD["0.png"])
            archive.addfile(info, io.BytesIO(GOOD["0.png"]))
    ledger, _ = restored(work, {"x.tar": file.getvalue()})
    assert ledger.done.restored == 3


def test_an_archive_in_an_archive_is_skipped(work: Path) -> None:
    inner = tar_file(GOOD)
    files = {"inner.tar": inner, "inner.zip": zip_file(GOOD), "face.png": png(), "x/inner.tgz": inner}
    _, rows = restored(work, {"outer.tar": tar_file(files), "outer.zip": zip_file(files)})

    for outer in ("outer.tar", "outer.zip"):
        for name in ("inner.tar", "inner.zip", "x/inner.tgz"):
            row = rows[f"{outer}/{name}"]
            assert (row.status, row.cause) == ("skipped", "not an image")
        assert rows[f"{outer}/face.png"].status == "restored"


def test_a_name_that_comes_twice_in_an_archive(work: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(2):
            info = tarfile.TarInfo("same.png")
            info.size = len(png(number))
            archive.addfile(info, io.BytesIO(png(number)))
    ledger, rows = restored(work, {"x.tar": file.getvalue(), "loose.png": png()})

    assert rows["x.tar/same.png"].status == "restored"
    assert ledger.done == (2, 1, 0)


def test_joined_and_trailing_tars_say_what_is_lost(work: Path) -> None:
    joined = tar_file({"a.png": png()}) + tar_file({"b.png": png(1)})
    ledger, rows = restored(work, {"joined.tar": joined})

    assert ledger.done == (1, 1, 0)
    (damage,) = [row for row in rows.values() if row.status == "failed"]
    assert damage.cause == "damaged archive"
    assert "joined" in str(damage.reason)
