"""Archives made to do harm, or badly: an error or a refusal that names the file and the cause, in bounded memory."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldbfr import storage
from ldbfr.errors import InputError, LDBFRError, StorageError
from ldbfr.images import DEFAULT_LIMITS
from ldbfr.inputs.containers import LONGEST_NAME, MOST_HEADER, list_archive
from ldbfr.inputs.entries import Container, Entry, Kind, Other, Stretch
from ldbfr.inputs.keys import archive_kind
from ldbfr.inputs.reading import Inputs, is_about_one_input
from tests.faulty_proxy import FaultyProxy
from tests.preparing import pngs, put, write_parquet, write_tar, write_zip

pytest_plugins = ["tests.faulty_proxy"]

BOTH = ["x.tar", "x.tgz"]


def archive(folder: Path, name: str, data: bytes) -> Container:
    """An archive on the disk."""
    path = folder / name
    path.write_bytes(data)
    kind: Kind | None = archive_kind(name)
    assert kind is not None
    return Container(kind, str(path), name, len(data))


def list_all(container: Container) -> tuple[list[Entry], list[Other], InputError | None]:
    """The entries and the others that could be listed, and what went wrong in the end."""
    entries: list[Entry] = []
    others: list[Other] = []
    try:
        for found in list_archive(container):
            if isinstance(found, Entry):
                entries.append(found)
            elif not isinstance(found, Stretch):
                others.append(found)
    except InputError as error:
        return entries, others, error
    return entries, others, None


def read_all(container: Container, entries: list[Entry]) -> list[bytes | LDBFRError]:
    """The bytes of entries."""
    return list(Inputs(container).read(entries))


def check_error(error: object, name: str, text: str) -> None:
    """The error of an entry or an archive."""
    assert isinstance(error, LDBFRError), error
    assert name in str(error)
    assert text in str(error)


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """Within it, so many bytes are taken at most."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A tar file of members as they are."""
    blocks = [member.tobuf() + data + bytes(-len(data) % 512) for member, data in members]
    return b"".join(blocks) + bytes(1024)


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member of a tar file, with its data; some fields may lie."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def packed(name: str, tar: bytes) -> bytes:
    """A tar, compressed if the name says so."""
    return gzip.compress(tar, 1) if name.endswith("gz") else tar


# ---- bombs ----


def zip_saying(data: bytes, says: int) -> bytes:
    """A zip with one member of that content, whose directory says another size."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflate.compress(data) + deflate.flush()
    common = struct.pack("<HHHHHLLLHH", 20, 0, 8, 0, 0, zlib.crc32(data), len(body), says, 5, 0)
    local = b"PK\3\4" + common + b"x.png" + body
    central = b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHLL", 0, 0, 0, 0, 0) + b"x.png"
    end = b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


def test_a_zip_member_larger_than_it_says_is_not_inflated(tmp_path: Path) -> None:
    container = archive(tmp_path, "x.zip", zip_saying(bytes(100 * 2**20), says=1000))
    entries, _, error = list_all(container)
    assert error is None

    with bounded(2**20):
        (found,) = read_all(container, entries)
    check_error(found, "x.zip/x.png", "the member is damaged")


def test_a_zip_member_that_says_it_is_huge_is_not_read(tmp_path: Path) -> None:
    container = archive(tmp_path, "x.zip", zip_saying(bytes(2**20), says=4_000_000_000))
    entries, _, error = list_all(container)
    assert error is None

    with bounded(2**20):
        (found,) = read_all(container, entries)
    check_error(found, "x.zip/x.png", "4,000,000,000 bytes, expected at most 209,715,200; shrink it")


def write_gzip_bomb(path: Path, size: int) -> None:
    """A tar.gz of a run of zeros, and a small picture after it."""
    with gzip.open(path, "wb", 1) as file:
        file.write(member("x.png", size=size)[0].tobuf())
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
        file.write(tar_of(member("y.png", b"small")))


def test_a_gzip_bomb_is_passed_over_in_pieces(tmp_path: Path) -> None:
    size = 2**30
    write_gzip_bomb(tmp_path / "x.tgz", size)
    container = Container("tar.gz", str(tmp_path / "x.tgz"), "x.tgz", (tmp_path / "x.tgz").stat().st_size)

    with bounded(12 * 2**20):
        entries, _, error = list_all(container)
        first, second = read_all(container, entries)
    assert error is None
    check_error(first, "x.tgz/x.png", f"{size:,} bytes, expected at most {DEFAULT_LIMITS.max_bytes:,}; shrink it")
    assert second == b"small"


# ---- names ----


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.zip"])
def test_no_name_leads_out_of_an_archive(tmp_path: Path, name: str) -> None:
    names = ["../1.png", "a/../../2.png", "/etc/3.png", "..\\4.png", "C:\\5.png", "a//6.png", "../7.txt", ".."]
    files = dict.fromkeys(names, b"content")
    container = archive(tmp_path, name, packed(name, write_tar(files)) if name != "x.zip" else write_zip(files))

    entries, others, error = list_all(container)

    assert error is None
    refused = {entry.name.removeprefix(f"{container.uri}/") for entry in entries if entry.refused}
    assert refused == {"../1.png", "a/../../2.png"}
    assert all("bad name: expected a path without" in entry.refused for entry in entries if entry.refused)
    keys = {entry.key for entry in entries if not entry.refused}
    assert keys == {f"{name}/etc/3-png", f"{name}/%2E%2E%5C4-png", f"{name}/C:%5C5-png", f"{name}/a/6-png"}
    assert [other.key for other in others] == [f"{container.uri}/../7.txt", f"{container.uri}/.."]
    assert read_all(container, [entry for entry in entries if not entry.refused]) == [b"content"] * 4


@pytest.mark.parametrize("name", BOTH)
def test_a_name_without_end_is_refused(tmp_path: Path, name: str) -> None:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for long in ("x" * 2**20 + ".png", "y" * 2**20):
            tar.addfile(tarfile.TarInfo(long))
    entries, others, error = list_all(archive(tmp_path, name, packed(name, output.getvalue())))

    assert error is None
    assert entries[0].refused == f"bad name: 1,048,580 characters, expected at most {LONGEST_NAME:,}; rename the file"
    assert len(entries[0].name + entries[0].key + others[0].name + others[0].key) < 1_000


def test_archives_within_archives_are_others(tmp_path: Path) -> None:
    inner = write_zip({"1.png": b"x"})
    tar = archive(tmp_path, "x.tar", write_tar({"x.zip": inner, "y.tgz": b"", "1.png": b"p"}))
    entries, others, error = list_all(tar)

    assert error is None
    assert [entry.key for entry in entries] == ["x.tar/1-png"]
    assert [other.key for other in others] == ["x.tar/x-zip", "x.tar/y-tgz"]


# ---- tar ----


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("size", "text"),
    [
        (-5, "a member claims -5 bytes"),
        (-100_000, "a member claims -100,000 bytes"),
        (2**70, "is not a readable"),
        (10**12, "is not a readable"),
    ],
)
def test_a_size_that_cannot_be(tmp_path: Path, name: str, size: int, text: str) -> None:
    info = member("2.png", size=size)[0]
    header = info.tobuf(tarfile.GNU_FORMAT)
    tar = tar_of(member("1.png", b"good"))[:-1024] + header + b"short".ljust(512, b"\0")
    container = archive(tmp_path, name, packed(name, tar))

    with bounded(12 * 2**20):
        entries, _, error = list_all(container)
    check_error(error, container.uri, text)
    assert entries[0].key == f"{name}/1-png"
    for found in read_all(container, entries[1:]):
        assert isinstance(found, LDBFRError)
    assert read_all(container, entries[:1]) == [b"good"]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [MOST_HEADER + 1, 10**10, -1000])
def test_a_header_that_claims_too_much(tmp_path: Path, name: str, kind: bytes, size: int) -> None:
    header = member("pax", type=kind, size=size)[0].tobuf(tarfile.GNU_FORMAT)
    container = archive(tmp_path, name, packed(name, tar_of(member("1.png", b"good"))[:-1024] + header + bytes(2**20)))

    with bounded(12 * 2**20):
        entries, _, error = list_all(container)
    check_error(error, container.uri, f"is not a readable {container.kind} file (a header claims ")
    assert len(entries) == 1


@pytest.mark.parametrize("name", BOTH)
def test_headers_upon_headers(tmp_path: Path, name: str) -> None:
    long = member("@", b"name\0", type=tarfile.GNUTYPE_LONGNAME)
    container = archive(tmp_path, name, packed(name, tar_of(*[long] * 3000, member("1.png", b""))))

    check_error(list_all(container)[2], container.uri, "maximum recursion depth")


@pytest.mark.parametrize("name", BOTH)
def test_special_members_are_refused(tmp_path: Path, name: str) -> None:
    sparse = io.BytesIO()
    with tarfile.open(fileobj=sparse, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("sparse.png")
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**12)}
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    kinds = {"sym.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "dev.png": tarfile.CHRTYPE}
    kinds |= {"fifo.png": tarfile.FIFOTYPE, "dir.png": tarfile.DIRTYPE}
    odd = [member(key, type=kind, linkname="/etc/passwd") for key, kind in kinds.items()]
    tar_file = tar_of(*odd)[:-1024] + sparse.getvalue()[:2048] + tar_of(member("1.png", b"good"))
    container = archive(tmp_path, name, packed(name, tar_file))

    entries, others, error = list_all(container)

    assert (others, error) == ([], None)
    causes = {Path(entry.name).name: (entry.refused or "").partition(":")[0] for entry in entries}
    assert causes == {
        **{"sym.png": "link", "hard.png": "link", "dev.png": "not a plain file", "fifo.png": "not a plain file"},
        **{"sparse.png": "not a plain file", "1.png": ""},
    }
    assert read_all(container, entries[-1:]) == [b"good"]


@pytest.mark.parametrize("name", BOTH)
def test_many_small_members_take_no_time(tmp_path: Path, name: str) -> None:
    container = archive(tmp_path, name, packed(name, write_tar({f"{n}.png": b"x" for n in range(10_000)})))
    started = time.process_time()
    assert len(list_all(container)[0]) == 10_000
    assert time.process_time() - started < 20


def test_what_is_cut_within_a_compressed_tar_is_not_given_out_short(tmp_path: Path) -> None:
    tar = write_tar({"1.png": b"x" * 2000, "2.png": b"y" * 2000})
    container = archive(tmp_path, "x.tgz", gzip.compress(tar[:4000]))
    entries, _, error = list_all(container)
    check_error(error, "x.tgz", "is not a readable tar.gz file")

    first, second = read_all(container, entries)
    assert first == b"x" * 2000
    check_error(second, "x.tgz", "it ends within a member")


# ---- zip ----


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    data = write_zip({"1.png": b"1" * 500, "2.png": b"2" * 500}, zipfile.ZIP_STORED)
    second = data.rindex(b"PK\1\2")
    first_header = struct.pack("<L", 0)
    container = archive(tmp_path, "x.zip", data[: second + 42] + first_header + data[second + 46 :])

    entries, _, error = list_all(container)

    assert error is None
    assert len(entries) == 2
    assert [entry.refused for entry in entries].count(None) == 1
    assert {entry.refused for entry in entries if entry.refused} == {
        "overlap: its bytes are those of another member, or not there; pack the archive again"
    }
    (found,) = read_all(container, [entry for entry in entries if not entry.refused])
    assert found == b"1" * 500 or isinstance(found, InputError)


def test_a_zip_with_a_password_is_refused(tmp_path: Path) -> None:
    data = bytearray(write_zip({"1.png": b"1"}))
    data[data.index(b"PK\1\2") + 8] |= 1
    ((entry,), _, error) = list_all(archive(tmp_path, "x.zip", bytes(data)))
    assert error is None
    assert entry.refused == "encrypted: it needs a password; pack it without one"


@pytest.mark.parametrize("cut", ["end", "directory", "middle"])
def test_a_zip_without_its_directory_is_an_error(tmp_path: Path, cut: str) -> None:
    data = write_zip({f"{n}.png": b"x" for n in range(5)})
    start = data.index(b"PK\1\2")
    pieces = {"end": data[:-10], "directory": data[: start + 20], "middle": data[: start + 20] + data[start + 60 :]}
    container = archive(tmp_path, "x.zip", pieces[cut])

    entries, _, error = list_all(container)
    check_error(error, container.uri, "is not a readable zip file")
    assert entries == []


def test_a_zip_whose_directory_is_shorter_than_it_says_is_an_error(tmp_path: Path) -> None:
    data = write_zip({f"{n}.png": b"x" for n in range(5)})
    hidden = data[:-10] + struct.pack("<L", 0) + data[-6:]  # the directory's size
    container = archive(tmp_path, "x.zip", hidden)

    check_error(list_all(container)[2], container.uri, "its directory has 0 members, expected 5")


def test_a_zip_member_without_a_name_is_no_image(tmp_path: Path) -> None:
    data = write_zip({"@": b"x", "1.png": b"y"}).replace(
        b"@", b"\0"
    )  # zipfile takes a null character for the end of the name
    entries, others, error = list_all(archive(tmp_path, "x.zip", data))
    assert (len(entries), len(others), error) == (1, 1, None)


def test_large_zips_are_read(tmp_path: Path) -> None:
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as file:
        for number in range(66_000):
            file.writestr(f"{number}.png" if number < 2 else f"{number}", b"x")
        with file.open("big.png", "w", force_zip64=True) as inner:
            inner.write(b"large")
    container = archive(tmp_path, "x.zip", output.getvalue())

    entries, others, error = list_all(container)

    assert error is None
    assert len(others) == 65_998
    assert read_all(container, entries) == [b"x", b"x", b"large"]


# ---- all kinds ----


def whole(name: str) -> bytes:
    """A good archive of three pictures."""
    files = {f"{n}.png": data for n, data in enumerate(pngs(3))}
    if name == "x.zip":
        return write_zip(files)
    return write_parquet({"image": list(files.values())}) if name == "x.parquet" else packed(name, write_tar(files))


ALL = ["x.tar", "x.tgz", "x.zip", "x.parquet"]


@pytest.mark.parametrize("name", ALL)
def test_an_archive_that_is_empty_or_missing_is_an_error(tmp_path: Path, name: str) -> None:
    container = archive(tmp_path, name, b"")
    check_error(list_all(container)[2], container.uri, f"is not a readable {container.kind} file")
    os.unlink(container.uri)
    check_error(list_all(container)[2], container.uri, "there is no such archive; check the place")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("left", [None, 700])
def test_an_archive_that_is_deleted_or_cut_after_it_was_listed(tmp_path: Path, name: str, left: int | None) -> None:
    container = archive(tmp_path, name, whole(name))
    entries, _, error = list_all(container)
    assert error is None
    os.unlink(container.uri) if left is None else os.truncate(container.uri, left)

    found = read_all(container, entries)

    assert len(found) == 3
    for number, one in enumerate(found):
        if left is not None and name == "x.tar" and number == 0:
            continue  # it may have been whole before the cut
        assert isinstance(one, LDBFRError)
        assert container.uri in str(one)
    text = "there is no such file" if left is None else "ends before"
    assert any(text in str(one) for one in found)


def test_empty_cells_are_errors_of_their_own(tmp_path: Path) -> None:
    first, last = pngs(2)
    container = archive(tmp_path, "x.parquet", write_parquet({"image": [first, None, b"", last]}))
    entries, _, _ = list_all(container)
    found = read_all(container, entries)
    assert (found[0], found[2], found[3]) == (first, b"", last)
    check_error(found[1], "x.parquet/1", "there are no bytes in it; fill it in or leave it out")

    structs = archive(tmp_path, "s.parquet", write_parquet({"image": [{"bytes": first}, None, {"bytes": None}]}))
    found = read_all(structs, list_all(structs)[0])
    assert found[0] == first
    for one in found[1:]:
        check_error(one, "s.parquet/", "there are no bytes in it")

    named = archive(tmp_path, "u.parquet", write_parquet({"path": ["a.png", None, "", "a\0b.png"]}))
    causes = [(entry.refused or "").partition(":")[0] for entry in list_all(named)[0]]
    assert causes == ["", "empty", "empty", "bad name"]


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.zip"])
@settings(max_examples=150, deadline=None, database=None)
@given(seed=st.integers(0, 2**32))
def test_flipped_bytes_never_raise_anything_else(name: str, seed: int, tmp_path_factory: Any) -> None:
    rng = random.Random(seed)
    data = bytearray(
        write_zip({"1.png": b"1" * 90, "2": b"2"}) if name == "x.zip" else write_tar({"1.png": b"1", "2": b""})
    )
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(len(data), 2048))] = rng.randrange(256)
    if name != "x.zip" and rng.random() < 0.7:  # a header whose checksum is right all the same
        header = data[:148] + b" " * 8 + data[156:512]
        data[148:156] = b"%06o\0 " % sum(header)
    container = archive(tmp_path_factory.mktemp("flipped", numbered=True), name, packed(name, bytes(data)))

    entries, _, error = list_all(container)

    for entry, found in zip(entries, read_all(container, entries), strict=True):
        assert isinstance(found, bytes | LDBFRError), entry
    if error is not None:
        assert container.uri in str(error)


# ---- one input, or all of them ----


def failure(act: Any) -> StorageError:
    """What an act raises."""
    with pytest.raises(StorageError) as caught:
        act()
    return caught.value


def test_failures_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_about_one_input(failure(lambda: storage.read_bytes(str(tmp_path / "none.png"))))
    assert is_about_one_input(failure(lambda: storage.read_bytes(str(tmp_path))))
    assert is_about_one_input(failure(lambda: storage.read_bytes("http://host/x.png")))
    for code, one in ((13, True), (5, True), (28, False), (116, False)):  # EACCES, EIO, ENOSPC, ESTALE

        def broken(*_: Any, code: int = code) -> Any:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(Path, "open", broken)
        assert is_about_one_input(failure(lambda: storage.read_bytes(str(tmp_path / "x.png")))) == one, code


@pytest.mark.s3
def test_failures_of_one_object(s3_root: str, faulty_s3: FaultyProxy) -> None:
    put(s3_root, {"x.png": b"content"})
    uri = f"{s3_root}/x.png"
    assert is_about_one_input(failure(lambda: storage.read_bytes(f"{s3_root}/none.png")))
    assert is_about_one_input(failure(lambda: storage.read_range(uri, 100, 5)))
    assert is_about_one_input(failure(lambda: storage.read_bytes("s3://not valid/x.png")))
    assert is_about_one_input(failure(lambda: storage.read_bytes(f"{s3_root}/\udcff.png")))
    with storage.impatient(5):
        for status, one in ((403, True), (404, True), (401, False), (500, False), (503, False)):
            faulty_s3.fail(status=status)
            assert is_about_one_input(failure(lambda: storage.read_bytes(uri))) == one, status
            faulty_s3.clear()
        faulty_s3.refuse()
        assert not is_about_one_input(failure(lambda: storage.read_bytes(uri)))


@pytest.mark.parametrize(
    ("code", "one"),
    [
        *((code, True) for code in ("NoSuchKey", "AccessDenied", "403", "404", "InvalidRange")),
        *((code, False) for code in ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "SlowDown", "500")),
    ],
)
def test_answers_about_one_object(code: str, one: bool) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    error = StorageError("cannot read s3://bucket/x.png")
    error.__cause__ = exceptions.ClientError({"Error": {"Code": code}}, "GetObject")
    assert is_about_one_input(error) == one
