"""Storage: one set of laws, held by a folder and by a bucket alike."""

import builtins
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldbfr import storage
from ldbfr.errors import StorageError
from tests.faulty_proxy import FaultyProxy

pytest_plugins = ["tests.faulty_proxy"]

ODD_KEYS = (
    "plain.png",
    "a b/c d.png",
    "a#b?c=d&e.png",
    "100%/50%25.png",
    "+plus+.png",
    "grün/日本語/🙂.png",
    "quote'\"<>.png",
    "back\\slash.png",
    ".hidden",
    "...",
)


@pytest.fixture(params=["local", "file", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URI below which there is nothing yet."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_root"))
    return str(tmp_path / "root") if request.param == "local" else (tmp_path / "a file root").as_uri()


@pytest.fixture
def fresh_client() -> Iterator[None]:
    """The cached S3 client is made anew within the test, and after it."""
    storage._s3_client.cache_clear()
    yield
    storage._s3_client.cache_clear()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore repeats a request at once."""
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _seconds: None)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_what_is_written_is_listed_and_read(root: str, key: str) -> None:
    uri = storage.join(root, key)
    data = key.encode() + bytes(range(256))

    assert not storage.exists(uri)
    storage.write_bytes(uri, data)

    assert storage.exists(uri)
    assert storage.read_bytes(uri) == data
    assert list(storage.list_objects(root)) == [storage.ObjectInfo(uri, key, len(data))]
    storage.delete(uri)
    assert not storage.exists(uri)
    assert list(storage.list_objects(root)) == []


def test_a_write_replaces(root: str) -> None:
    uri = storage.join(root, "a")
    for data in (b"first, and long", b"", b"third"):
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data


def test_deleting_nothing_is_allowed(root: str) -> None:
    storage.delete(storage.join(root, "never/was"))


def test_listing_is_in_the_order_of_keys(root: str) -> None:
    keys = ["a-b", "a.png", "a/b", "a/b0", "a/c/d", "a0", "B", "b/a", "z", "é", "日", "🙂"]
    for key in reversed(keys):
        storage.write_bytes(storage.join(root, key), key.encode())

    listed = list(storage.list_objects(root))

    assert [info.key for info in listed] == sorted(keys)
    assert [storage.read_bytes(info.uri).decode() for info in listed] == sorted(keys)
    assert [info.key for info in storage.list_objects(storage.join(root, "a") + "/")] == ["b", "b0", "c/d"]


def test_a_listing_root_is_a_folder_and_not_a_prefix(root: str) -> None:
    for key in ("part/1", "partly/2", "part.txt"):
        storage.write_bytes(storage.join(root, key), b"")
    assert [info.key for info in storage.list_objects(storage.join(root, "part"))] == ["1"]


def test_listing_an_object_gives_that_object(root: str) -> None:
    uri = storage.join(root, "deep/one.png")
    storage.write_bytes(uri, b"123")
    assert list(storage.list_objects(uri)) == [storage.ObjectInfo(uri, "one.png", 3)]


KEYS = st.lists(
    st.text(alphabet="a./-0b\udcff", min_size=1, max_size=6).filter(
        lambda key: not {"", ".", ".."} & set(key.split("/"))
    ),
    min_size=1,
    max_size=8,
)


def without_clashes(keys: list[str]) -> list[str]:
    """Those of which none is the folder of another."""
    return [key for key in set(keys) if not any(other.startswith(key + "/") for other in keys)]


@settings(max_examples=150, deadline=None)
@given(KEYS, st.text(alphabet="a./-0b\udcff", max_size=6))
def test_a_listing_goes_on_after_any_key_of_a_folder(keys: list[str], other: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        for key in without_clashes(keys):
            path = Path(root, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        whole = list(storage.list_objects(root))
        assert [found.key for found in whole] == sorted(without_clashes(keys))
        for after in ("", other, *(found.key for found in whole)):
            assert list(storage.list_objects(root, after)) == [found for found in whole if found.key > after], after


@pytest.mark.s3
def test_a_listing_goes_on_after_any_key_of_a_bucket(s3_root: str) -> None:
    keys = [
        "a-b",
        "a.png",
        "a/b",
        "a/b0",
        "a/c/d",
        "a0",
        "B",
        "b/a",
        "z",
        "é",
        "日",
        "🙂",
        "a+b %?/x",
        "a",
    ]
    for key in keys:
        storage.write_bytes(storage.join(s3_root, key), b"")

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(keys) | st.text(alphabet="aB/.b0é🙂 \n%", max_size=4))
    def check(after: str) -> None:
        found = [info.key for info in storage.list_objects(s3_root, after)]
        assert found == [key for key in sorted(keys) if key > after]
        below = [info.key for info in storage.list_objects(storage.join(s3_root, "a"), after)]
        assert below == [key for key in ["b", "b0", "c/d"] if key > after]

    check()


@pytest.mark.parametrize(("after", "left"), [(None, 1), ("", 1), ("one", 1), ("one.png", 0), ("p", 0)])
def test_the_listing_of_an_object_goes_on(root: str, after: str | None, left: int) -> None:
    storage.write_bytes(storage.join(root, "one.png"), b"")
    assert len(list(storage.list_objects(storage.join(root, "one.png"), after))) == left


def test_what_lies_before_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        storage.write_bytes(str(tmp_path / f"{number:02}" / "deep" / "x"), b"")
    walked: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walked.append(str(path)) or scandir(path))

    assert [found.key for found in storage.list_objects(str(tmp_path), "18/deep/x")] == ["19/deep/x"]
    assert [os.path.relpath(path, tmp_path) for path in walked] == [".", "18", "18/deep", "19", "19/deep"]


def test_a_folder_is_no_object(root: str) -> None:
    storage.write_bytes(storage.join(root, "folder/one"), b"")
    assert not storage.exists(storage.join(root, "folder"))
    with pytest.raises(StorageError, match=r"folder: .*(folder|no such object)"):
        storage.read_bytes(storage.join(root, "folder"))


def test_missing_object(root: str) -> None:
    uri = storage.join(root, "absent.png")
    with pytest.raises(StorageError, match=r"cannot read .*absent\.png: there is no such (file|object); check"):
        storage.read_bytes(uri)


def test_size_limit(root: str) -> None:
    uri = storage.join(root, "large")
    storage.write_bytes(uri, bytes(1000))
    assert len(storage.read_bytes(uri, max_bytes=1000)) == 1000
    with pytest.raises(StorageError, match=r"large: 1,000 bytes, expected at most 999; shrink"):
        storage.read_bytes(uri, max_bytes=999)


def test_one_creator_wins(root: str) -> None:
    num_threads = 8
    for turn in range(5):
        uri = storage.join(root, f"lock-{turn}")
        start = threading.Barrier(num_threads)

        def create(number: int, uri: str = uri, start: threading.Barrier = start) -> bool:
            start.wait()
            return storage.create_bytes(uri, str(number).encode())

        with ThreadPoolExecutor(num_threads) as pool:
            won = list(pool.map(create, range(num_threads)))

        assert sum(won) == 1
        assert storage.read_bytes(uri) == str(won.index(True)).encode()
        assert not storage.create_bytes(uri, b"late")
    assert [info.key for info in storage.list_objects(root)] == [f"lock-{turn}" for turn in range(5)]


def test_readers_never_see_part_of_a_write(root: str) -> None:
    uri = storage.join(root, "busy")
    contents = [bytes([value]) * 200_000 for value in range(8)]
    storage.write_bytes(uri, contents[0])
    with ThreadPoolExecutor(2) as pool:
        writes = pool.map(lambda data: storage.write_bytes(uri, data), contents)
        for _ in range(10):
            assert storage.read_bytes(uri) in contents
        list(writes)


@pytest.mark.parametrize("part", ["..", "../a", "a/../b", "a/..", "", ".", "./a", "/etc/passwd", "a//b", "a/", "a\0b"])
def test_parts_that_could_lead_elsewhere_are_refused(root: str, part: str) -> None:
    with pytest.raises(StorageError, match=r"expected a relative key .*; rename the object"):
        storage.join(root, part)


def test_join() -> None:
    assert storage.join("s3://bucket", "a", "b/c") == "s3://bucket/a/b/c"
    assert storage.join("s3://bucket/", "a") == "s3://bucket/a"
    assert storage.join("s3://bucket/x/", "a%20b") == "s3://bucket/x/a%20b"
    assert storage.join("out/", "a", "b") == "out/a/b"
    assert storage.join("/", "a") == "/a"
    assert storage.join("file:///tmp/a%20b", "c%20d") == "/tmp/a b/c%20d"
    assert storage.join("out") == "out"


def test_local_uris() -> None:
    assert storage.local_path("file:///tmp/a%20b%23") == Path("/tmp/a b#")
    assert storage.local_path("file://localhost/tmp/a") == Path("/tmp/a")
    assert storage.local_path("rel/50%25.png") == Path("rel/50%25.png")
    assert storage.is_local("C#/x")
    assert not storage.is_local("S3://bucket/key")
    for uri in ("s3://bucket/key", "file://elsewhere/tmp/a", "file://"):
        with pytest.raises(StorageError, match="expected a path or file:///path"):
            storage.local_path(uri)


@pytest.mark.parametrize("uri", ["gs://bucket/key", "https://host/a.png", ""])
@pytest.mark.parametrize("act", [storage.read_bytes, storage.list_objects, storage.exists, storage.is_local])
def test_unknown_scheme(uri: str, act: Callable[[str], object]) -> None:
    with pytest.raises(StorageError, match=r"unsupported URI, expected a local path, file:///path or s3://bucket/key"):
        act(uri)


# ---- ranges and whole files ----


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 1000), (999, 1), (250, 500), (500, 0), (0, 0)])
def test_a_range_is_that_part_of_the_whole(root: str, start: int, length: int) -> None:
    uri = storage.join(root, "object")
    data = bytes(value % 251 for value in range(1000))
    storage.write_bytes(uri, data)
    assert storage.read_range(uri, start, length) == data[start : start + length]


@pytest.mark.parametrize(("start", "length"), [(0, 1001), (999, 2), (1000, 1), (5000, 10)])
def test_a_range_beyond_the_end_is_an_error(root: str, start: int, length: int) -> None:
    uri = storage.join(root, "object")
    storage.write_bytes(uri, bytes(1000))
    with pytest.raises(StorageError, match=r"object.*ends before.*it was cut short or replaced"):
        storage.read_range(uri, start, length)


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, -1)])
def test_a_range_counts_from_the_start(root: str, start: int, length: int) -> None:
    uri = storage.join(root, "object")
    storage.write_bytes(uri, bytes(1000))
    with pytest.raises(StorageError, match=rf"{length} bytes from byte {start} on asked for"):
        storage.read_range(uri, start, length)


def test_a_range_of_nothing_is_an_error_that_names_it(root: str) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*absent: there is no such (file|object)"):
        storage.read_range(storage.join(root, "absent"), 0, 10)


@pytest.mark.parametrize("size", [0, 1, 20 << 20], ids=["empty", "a byte", "several pieces"])
def test_a_file_comes_back_as_it_was_put(root: str, tmp_path: Path, size: int) -> None:
    uri = storage.join(root, "deep/er/file")
    source, target = tmp_path / "source", tmp_path / "fetched" / "here" / "target"
    source.write_bytes(np.random.default_rng(size).bytes(size))
    storage.put_file(source, uri)
    storage.fetch_file(uri, target)
    assert target.read_bytes() == source.read_bytes() == storage.read_bytes(uri)
    assert [entry.key for entry in storage.list_objects(root)] == ["deep/er/file"]
    assert list(target.parent.iterdir()) == [target]
    source.write_bytes(b"the second")
    storage.put_file(source, uri)
    storage.fetch_file(uri, target)  # replaces what is there
    assert target.read_bytes() == b"the second"


def test_files_that_are_not_there(root: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(StorageError, match=r"cannot read .*absent: there is no such (file|object)"):
        storage.fetch_file(storage.join(root, "absent"), target)
    with pytest.raises(StorageError, match=rf"cannot read {tmp_path}/none: there is no such file"):
        storage.put_file(tmp_path / "none", storage.join(root, "new"))
    assert not target.exists()
    assert not storage.exists(storage.join(root, "new"))


def test_targets_that_cannot_be_written(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "object")
    storage.write_bytes(uri, b"content")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for target, reason in (
        ("file/below", "a file stands where a folder is needed"),
        ("folder", "this is a folder, expected a file"),
    ):
        with pytest.raises(StorageError, match=rf"cannot \w+ .*{tmp_path}/{target}: {reason}"):
            storage.fetch_file(uri, tmp_path / target)
    assert not any(path.name.startswith(".ldbfr") for path in tmp_path.rglob("*"))


def test_a_disk_that_is_full_leaves_what_was_there(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "object")
    storage.write_bytes(uri, bytes(100_000))
    target = tmp_path / "into" / "target"
    target.parent.mkdir()
    target.write_bytes(b"before")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(StorageError, match=rf"cannot (write|copy) .*{target}: File too large"):
            storage.fetch_file(uri, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert target.read_bytes() == b"before"
    assert list(target.parent.iterdir()) == [target]


def test_readers_never_see_part_of_a_file_that_is_put(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "busy")
    contents = [bytes([value]) * 500_000 for value in range(6)]
    sources = [tmp_path / f"source-{number}" for number in range(6)]
    for source, content in zip(sources, contents, strict=True):
        source.write_bytes(content)
    storage.put_file(sources[0], uri)
    with ThreadPoolExecutor(2) as pool:
        puts = pool.map(lambda source: storage.put_file(source, uri), sources)
        for number in range(10):
            storage.fetch_file(uri, tmp_path / f"target-{number}")
            assert (tmp_path / f"target-{number}").read_bytes() in contents
        list(puts)


# ---- local files only ----


@pytest.mark.parametrize("broken", ["fsync", "replace", "link"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_failed_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, before: bytes | None
) -> None:
    target = tmp_path / "target"
    if before is not None:
        target.write_bytes(before)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    if broken != "link":
        with pytest.raises(StorageError, match=r"cannot write .*target: the disk is full; free some space"):
            storage.write_bytes(str(target), b"new")
    if broken != "replace" and before is None:
        with pytest.raises(StorageError, match=r"cannot create .*target: the disk is full"):
            storage.create_bytes(str(target), b"new")

    assert list(tmp_path.iterdir()) == ([target] if before is not None else [])
    assert before is None or target.read_bytes() == before


def test_a_writer_that_was_killed_while_it_wrote_leaves_nothing_at_all(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY))
    except (OSError, AttributeError) as error:
        pytest.skip(f"files without names are not known here: {error}")
    script = (
        "import os, sys\n"
        "from ldbfr import storage\n"
        "os.fsync = lambda *_: os._exit(9)\n"
        "storage.write_bytes(sys.argv[1], b'half')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "target")], timeout=60)

    assert done.returncode == 9
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_was_killed_leaves_nothing_to_list(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from ldbfr import storage\n"
        "os.replace = lambda *_: os._exit(9)\n"
        "storage.write_bytes(sys.argv[1], b'half')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "target")], check=False)
    assert done.returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    assert list(storage.list_objects(str(tmp_path))) == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    storage.write_bytes(str(tmp_path / "written"), b"")
    storage.create_bytes(str(tmp_path / "created"), b"")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_links_are_followed_and_loops_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"12")
    (root / "linked").symlink_to(outside)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe")

    assert [(info.key, info.size) for info in storage.list_objects(str(root))] == [("gone", 0), ("linked/x", 2)]

    (root / "sub" / "loop").symlink_to(root)
    with pytest.raises(StorageError, match=r"sub/loop: .*; remove the link"):
        list(storage.list_objects(str(root)))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("file/below", "a file stands where a folder is needed"),
        ("folder", "this is a folder, expected a file"),
        ("x" * 300, "the name is too long"),
    ],
)
def test_places_that_cannot_be_written(tmp_path: Path, key: str, reason: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=reason):
        storage.write_bytes(storage.join(str(tmp_path), key), b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission denied; give this user access"):
        storage.write_bytes(str(tmp_path / "a"), b"")


def test_read_only_file_system() -> None:
    with pytest.raises(StorageError, match="cannot write /proc/ldbfr/a: "):
        storage.write_bytes("/proc/ldbfr/a", b"")


def test_null_character_in_a_path() -> None:
    with pytest.raises(StorageError, match="null byte; rename the object"):
        storage.read_bytes("a\0b")


# ---- S3 only ----


@pytest.mark.s3
def test_listing_goes_on_after_the_first_page(s3_root: str) -> None:
    num_objects = 1_005
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.write_bytes(storage.join(s3_root, f"{i:05}"), b""), range(num_objects)))
    assert [info.key for info in storage.list_objects(s3_root)] == [f"{i:05}" for i in range(num_objects)]


@pytest.mark.s3
@pytest.mark.usefixtures("s3_endpoint")
def test_missing_bucket() -> None:
    uri = "s3://ldbfr-no-such-bucket/key"
    acts: tuple[Callable[[str], object], ...] = (
        storage.read_bytes,
        lambda uri: list(storage.list_objects(uri)),
        lambda uri: storage.write_bytes(uri, b""),
    )
    for act in acts:
        with pytest.raises(StorageError, match=rf"{uri}: there is no such bucket; create it, or check its name"):
            act(uri)
    assert not storage.exists(uri)


@pytest.mark.s3
@pytest.mark.parametrize("size", [100_000, 20 << 20], ids=["one piece", "several pieces"])
def test_files_get_through_a_bad_connection(faulty_s3: FaultyProxy, s3_root: str, tmp_path: Path, size: int) -> None:
    uri, source, target = storage.join(s3_root, "file"), tmp_path / "source", tmp_path / "target"
    source.write_bytes(np.random.default_rng(0).bytes(size))
    faults = [
        faulty_s3.cut_upload(50_000, times=2),
        faulty_s3.fail(1, method="PUT", status=503),
        faulty_s3.lose_answers(1, method="PUT"),
        faulty_s3.cut_download(50_000, times=2),
        faulty_s3.fail(1, method="GET"),
    ]
    storage.put_file(source, uri)
    storage.fetch_file(uri, target)
    assert target.read_bytes() == source.read_bytes()
    assert storage.read_range(uri, 1000, 60_000) == source.read_bytes()[1000:61_000]
    assert [fault.hits for fault in faults] == [2, 1, 1, 2, 1]


@pytest.mark.s3
@pytest.mark.parametrize("size", [100_000, 20 << 20], ids=["one piece", "several pieces"])
def test_connections_that_stay_bad_are_an_error_and_leave_nothing(
    faulty_s3: FaultyProxy, s3_root: str, tmp_path: Path, size: int
) -> None:
    uri, new = storage.join(s3_root, "file"), storage.join(s3_root, "new")
    source, target = tmp_path / "source", tmp_path / "into" / "target"
    source.write_bytes(bytes(size))
    storage.put_file(source, uri)
    faulty_s3.cut_upload(50_000)
    faulty_s3.cut_download(50_000)
    with pytest.raises(StorageError, match=rf"cannot write {new}: the endpoint .* cannot be reached"):
        storage.put_file(source, new)
    with pytest.raises(StorageError, match=rf"cannot read {uri}: "):
        storage.fetch_file(uri, target)
    with pytest.raises(StorageError, match=rf"cannot read {uri}: "):
        storage.read_range(uri, 0, 90_000)
    faulty_s3.clear()
    for status, reason in ((403, "access denied; check the credentials"), (500, "500")):
        faulty_s3.fail(status=status)
        with pytest.raises(StorageError, match=rf"cannot write {new}: .*{reason}"):
            storage.put_file(source, new)
        with pytest.raises(StorageError, match=rf"cannot read {uri}: .*{reason}"):
            storage.fetch_file(uri, target)
        faulty_s3.clear()
    assert not storage.exists(new)
    assert list(target.parent.iterdir()) == []


@pytest.mark.s3
def test_an_object_that_is_replaced_while_it_is_fetched_is_not_mixed(
    faulty_s3: FaultyProxy, s3_root: str, tmp_path: Path
) -> None:
    """Its pieces are fetched one by one."""
    uri = storage.join(s3_root, "file")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"1" * (20 << 20))
    storage.put_file(source, uri)
    source.write_bytes(b"2" * (20 << 20))
    original, turns = faulty_s3.strike, iter([False, False, True])  # after the size and a piece

    def strike(method: str, path: str) -> Any:
        if method == "GET" and next(turns, False):
            boto3 = pytest.importorskip("boto3")
            bucket, key = uri.removeprefix("s3://").split("/", 1)
            direct = boto3.client("s3", endpoint_url=f"http://{faulty_s3.upstream}")
            direct.upload_file(str(source), bucket, key)
            direct.close()
        return original(method, path)

    faulty_s3.strike = strike  # type: ignore[method-assign]
    with pytest.raises(StorageError, match=rf"cannot read {uri}: .*did not match"):
        storage.fetch_file(uri, target)
    assert list(tmp_path.iterdir()) == [source]
    storage.fetch_file(uri, target)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.s3
def test_the_impatient_do_not_wait(faulty_s3: FaultyProxy, s3_root: str) -> None:
    uri = storage.join(s3_root, "object")
    storage.write_bytes(uri, b"content")
    fault = faulty_s3.hang(method="GET")
    started = time.monotonic()
    with storage.impatient(0.3), pytest.raises(StorageError, match=rf"cannot read {uri}: .* cannot be reached"):
        storage.read_bytes(uri)
    assert time.monotonic() - started < 5
    faulty_s3.clear()
    fault = faulty_s3.fail(4, method="GET")
    with storage.impatient(5), pytest.raises(StorageError, match="500"):
        storage.read_bytes(uri)
    assert fault.hits == 1
    assert storage.read_bytes(uri) == b"content"  # as patient as ever
    assert fault.hits == 4


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3://bucket/folder/"])
def test_a_bucket_or_folder_cannot_be_read(uri: str) -> None:
    with pytest.raises(StorageError, match="names a folder, expected an object"):
        storage.read_bytes(uri)
    with pytest.raises(StorageError, match="no bucket in it, expected s3://bucket/key"):
        storage.read_bytes("s3:///key")


@pytest.mark.usefixtures("fresh_client", "no_waiting")
@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("not a url", "Invalid endpoint: not a url; check the URI and AWS_ENDPOINT_URL"),
        ("http://127.0.0.1:9", r"the endpoint http://127\.0\.0\.1:9 cannot be reached .*; check AWS_ENDPOINT_URL"),
    ],
)
def test_endpoints_that_are_not_there(monkeypatch: pytest.MonkeyPatch, endpoint: str, reason: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageError, match=f"cannot read s3://bucket/key: {reason}"):
        storage.read_bytes("s3://bucket/key")


@pytest.mark.usefixtures("fresh_client")
def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    with pytest.raises(StorageError, match="s3://bucket/key: no credentials; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes("s3://bucket/key")


def test_without_boto3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] in ("boto3", "botocore"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    storage.write_bytes(str(tmp_path / "a"), b"local needs no boto3")
    with pytest.raises(StorageError, match=r"s3://bucket/key: S3 needs boto3; pip install 'ldbfr\[s3\]'"):
        storage.read_bytes("s3://bucket/key")


class Unreliable(BaseHTTPRequestHandler):
    """Answers with fewer bytes than promised, or with an error, as often as the server's `failures` says."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, UnreliableServer)
        server.num_requests += 1
        status = 200 if server.num_requests > server.num_failures else server.failure
        broken_off = status == 0
        self.send_response(200 if broken_off else status)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"half" if broken_off else b"complete" if status == 200 else b"<Error/>")
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


class UnreliableServer(ThreadingHTTPServer):
    def __init__(self, failure: int, num_failures: int) -> None:
        super().__init__(("127.0.0.1", 0), Unreliable)
        self.failure = failure
        self.num_failures = num_failures
        self.num_requests = 0


@pytest.mark.usefixtures("fresh_client", "no_waiting")
@pytest.mark.parametrize(
    ("failure", "num_failures", "num_requests", "reason"),
    [
        (0, 2, 3, None),  # the body breaks off
        (0, 99, 3, "s3://bucket/key"),
        (503, 1, 2, None),
        (403, 1, 1, "access denied; check the credentials"),
    ],
)
def test_a_server_that_stumbles(
    monkeypatch: pytest.MonkeyPatch, failure: int, num_failures: int, num_requests: int, reason: str | None
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with UnreliableServer(failure, num_failures) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            if reason is None:
                assert storage.read_bytes("s3://bucket/key") == b"complete"
            else:
                with pytest.raises(StorageError, match=reason):
                    storage.read_bytes("s3://bucket/key")
        finally:
            server.shutdown()
    assert server.num_requests == num_requests
