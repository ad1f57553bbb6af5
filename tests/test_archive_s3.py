"""Archives in buckets, through storms: whatever the server does, a run ends as on a quiet disk, or says why not.

The whole job in this process, with the real model at tiny size; the server is the one of `tests.s3_server`.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs import restore
from ldbfr import storage
from ldbfr.archive.listing import Sources, make_plan
from ldbfr.archive.parts import plan_folder, read_part
from ldbfr.archive.plan import WorkItem
from ldbfr.archive.rounds import FRUITLESS_ROUNDS
from ldbfr.archive.rows import PlanRow
from ldbfr.archive.run import lock_uri
from ldbfr.archive.settings import RunSettings
from ldbfr.errors import StorageError
from ldbfr.lease import Lease
from ldbfr.runner import run_here
from tests import archiving
from tests.archiving import KINDS, LocalExecution, manifest, outputs, png, put_files, restore_here, source_of
from tests.conftest import REPOSITORY
from tests.faulty_proxy import Fault, FaultyProxy, Handler

pytest_plugins = ["tests.faulty_proxy"]
pytestmark = pytest.mark.s3

FACES = {f"{number % 2}/{number:02d}.png": png(number) for number in range(12)}
"""Three units of four."""


@dataclass(frozen=True)
class Place:
    """A run of the faces in a bucket: where they are, and where the results go."""

    input: str
    output: str
    settings: RunSettings

    def run(self, execution: LocalExecution | None = None, pause: Callable[[float], None] = lambda _: None) -> Any:
        """The job, or go on with it."""
        return restore_here(self.output, self.settings, execution, pause)


@pytest.fixture
def place(s3_root: str) -> Place:
    source = storage.join(s3_root, "in")
    put_files(source, FACES)
    return Place(source, storage.join(s3_root, "out"), archiving.run_settings(source))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results on a quiet disk."""
    path = tmp_path_factory.mktemp("quiet")
    source = archiving.folder(path / "in", FACES)
    restore_here(str(path / "out"), archiving.run_settings(source))
    return outputs(str(path / "out"))


def assert_complete(place: Place, undisturbed: dict[str, bytes]) -> None:
    """Every input is restored, to the bytes of the quiet run; no record is left over."""
    rows = manifest(place.output)
    assert {key: row.status for key, row in rows.items()} == dict.fromkeys(FACES, "restored")
    assert outputs(place.output) == undisturbed
    assert not list(storage.list_objects(storage.join(place.output, "_ldbfr", "units")))


# ---- no storm ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_is_as_good_as_a_disk(kind: str, s3_root: str, tmp_path: Path) -> None:
    found = []
    for root in (str(tmp_path / "work"), s3_root):
        output = storage.join(root, "out")
        settings = archiving.run_settings(*source_of(kind, storage.join(root, "x"), FACES))
        ledger = restore_here(output, settings)
        rows, files = manifest(output), outputs(output)
        assert sum(ledger.done) == ledger.plan.num_rows == len(rows)
        assert {row.status for row in rows.values() if not row.key.endswith(".json")} == {"restored"}
        below = storage.join(root, "x").removeprefix("s3://")  # what a list names, keeps its whole path
        found.append({key.partition(below)[2] or key: (data, rows_digest(rows, key)) for key, data in files.items()})
        assert len(files) == len(FACES)

    assert found[0] == found[1]


def rows_digest(rows: dict[str, Any], key: str) -> str | None:
    """Of the input of a result: all kinds give it the input's own key, a parquet file's rows one of their own."""
    return next(row.digest for row in rows.values() if str(row.output).endswith(f"/{key}"))


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_shards_in_a_bucket_are_those_on_a_disk(layout: str, place: Place, tmp_path: Path) -> None:
    source = archiving.folder(tmp_path / "in", FACES)
    restore_here(str(tmp_path / "out"), archiving.run_settings(source, layout=layout))
    restore_here(place.output, archiving.run_settings(place.input, layout=layout))

    assert outputs(place.output) == outputs(str(tmp_path / "out"))


def test_a_finished_run_reads_no_input_again(place: Place, faulty_s3: FaultyProxy) -> None:
    place.run()
    assert [path for _, path in faulty_s3.requests if "/in/" in path]
    faulty_s3.requests.clear()

    ledger = place.run()

    assert ledger.done == (len(FACES), 0, 0)
    assert not [request for request in faulty_s3.requests if "/in/" in request[1]]
    assert {method for method, _ in faulty_s3.requests} <= {"GET", "HEAD"}


# ---- a storm that passes ----

STORMS: dict[str, Callable[[FaultyProxy], object]] = {
    "500 on reads": lambda s3: s3.fail(25, "GET", "/in/0/", 500),
    "503 on reads": lambda s3: s3.fail(25, "GET", "/in/", 503),
    "answers cut in the middle": lambda s3: s3.cut_download(100, 20, path="/in/"),
    "nobody answers reads": lambda s3: s3.refuse(25, "GET", "/in/1/"),
    "500 on results": lambda s3: s3.fail(25, "PUT", "/out/0/", 500),
    "503 on results": lambda s3: s3.fail(25, "PUT", "/out/", 503),
    "503 on records": lambda s3: s3.fail(12, "PUT", "/_ldbfr/units/", 503),
    "requests cut in the middle": lambda s3: s3.cut_upload(100, 25, path="/out/"),
    "503 on the plan": lambda s3: s3.fail(12, "GET", "/_ldbfr/plan/parts/", 503),
}


@pytest.mark.parametrize("storm", STORMS)
def test_a_storm_is_weathered_in_rounds(
    storm: str, place: Place, faulty_s3: FaultyProxy, undisturbed: dict[str, bytes]
) -> None:
    plan(place)
    STORMS[storm](faulty_s3)
    pauses: list[float] = []

    place.run(pause=pauses.append)

    assert pauses
    assert all(fault.hits == fault.times for fault in faulty_s3.faults)
    assert_complete(place, undisturbed)


def plan(place: Place) -> list[list[PlanRow]]:
    """List the inputs; the rows of every part."""
    settings = place.settings
    parts = make_plan(Sources(settings.inputs, place.output, settings.column, settings.shard_images), run_here)
    return [read_part(plan_folder(place.output), number)[0] for number in range(len(parts))]


def test_a_hiccup_costs_no_round(place: Place, faulty_s3: FaultyProxy, undisturbed: dict[str, bytes]) -> None:
    for key in FACES:
        faulty_s3.fail(1, "GET", f"/in/{key}", 503)
        faulty_s3.cut_download(50, 2, path=f"/in/{key}")
        faulty_s3.lose_answers(1, "PUT", f"/out/{key}")
    for path in ("/plan/", "/units/", "/manifest/", "/gallery"):
        faulty_s3.lose_answers(2, "PUT", path)
        faulty_s3.fail(2, "", path, 500)

    pauses: list[float] = []
    place.run(pause=pauses.append)

    assert not pauses
    assert all(fault.hits == fault.times for fault in faulty_s3.faults)
    assert_complete(place, undisturbed)


def test_a_slow_server_is_waited_for(
    place: Place, faulty_s3: FaultyProxy, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    delays, quick = random.Random(5), Handler.pass_on

    def pass_on(handler: Handler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        time.sleep(delays.random() * 0.1)
        return quick(handler, body)

    monkeypatch.setattr(Handler, "pass_on", pass_on)
    place.run()
    assert_complete(place, undisturbed)


# ---- what fails for good ----


def test_a_barred_object_fails_alone(place: Place, faulty_s3: FaultyProxy, undisturbed: dict[str, bytes]) -> None:
    faulty_s3.fail(method="GET", path="/in/1/05.png", status=403)
    place.run()

    rows = manifest(place.output)
    assert [key for key in rows if rows[key].status == "failed"] == ["1/05.png"]
    assert rows["1/05.png"].cause == "unreadable"
    assert "access denied" in str(rows["1/05.png"].reason)
    assert outputs(place.output) == {key: data for key, data in undisturbed.items() if key != "1/05.png"}


def test_a_read_only_output_ends_the_run_at_once(
    place: Place, faulty_s3: FaultyProxy, undisturbed: dict[str, bytes]
) -> None:
    plan(place)
    barred = faulty_s3.fail(method="PUT", path="/out/", status=403)
    execution = LocalExecution(place.output, place.settings)
    with pytest.raises(StorageError, match=r"access denied.*then run the same command again"):
        place.run(execution, pause=pytest.fail)

    assert len(execution.read) == 4
    assert barred.hits <= 4
    assert not manifest(place.output)
    faulty_s3.clear()
    place.run()
    assert_complete(place, undisturbed)


def test_a_manifest_that_cannot_be_written_is_written_later(
    place: Place, faulty_s3: FaultyProxy, undisturbed: dict[str, bytes]
) -> None:
    faulty_s3.fail(method="PUT", path="/out/manifest/", status=503)
    with pytest.raises(StorageError, match=r"cannot write s3://.*/out/manifest/000000\.parquet"):
        place.run()

    faulty_s3.clear()
    execution = LocalExecution(place.output, place.settings)
    place.run(execution)
    assert execution.read == []
    assert_complete(place, undisturbed)


@pytest.mark.parametrize("path", ["/in/", ""])
def test_a_storage_that_is_gone_ends_the_run_after_some_rounds(
    path: str, place: Place, faulty_s3: FaultyProxy, undisturbed: dict[str, bytes]
) -> None:
    class Gone(LocalExecution):
        def __call__(self, items: Sequence[WorkItem]) -> Iterator[Any]:
            if not faulty_s3.faults:
                faulty_s3.refuse(path=path)
            yield from super().__call__(items)

    pauses: list[float] = []
    with pytest.raises(StorageError, match=r"cannot be reached.*12 inputs are left after 3 rounds"):
        place.run(Gone(place.output, place.settings), pauses.append)

    assert len(pauses) == FRUITLESS_ROUNDS - 1
    assert pauses == sorted(set(pauses))
    faulty_s3.clear()
    assert not manifest(place.output)
    place.run()
    assert_complete(place, undisturbed)


class Meanwhile(LocalExecution):
    """Something happens between plan and read, once."""

    then: Callable[[], object] | None = None

    def __call__(self, items: Sequence[WorkItem]) -> Iterator[Any]:
        then, self.then = self.then, None
        if then is not None:
            then()
        yield from super().__call__(items)


def test_an_object_that_goes_between_plan_and_read_fails_alone(place: Place, undisturbed: dict[str, bytes]) -> None:
    execution = Meanwhile(place.output, place.settings)
    execution.then = lambda: storage.delete(storage.join(place.input, "0", "04.png"))
    place.run(execution)

    rows = manifest(place.output)
    assert (rows["0/04.png"].status, rows["0/04.png"].cause) == ("failed", "unreadable")
    assert "there is no such object" in str(rows["0/04.png"].reason)
    assert outputs(place.output) == {key: data for key, data in undisturbed.items() if key != "0/04.png"}


def test_a_row_has_the_digest_of_what_was_read(place: Place) -> None:
    execution, other = Meanwhile(place.output, place.settings), png(99)
    execution.then = lambda: put_files(place.input, {"0/04.png": other})
    place.run(execution)

    rows = manifest(place.output)
    assert {row.status for row in rows.values()} == {"restored"}
    assert rows["0/04.png"].digest == hashlib.sha256(other).hexdigest()
    assert rows["0/04.png"].size == len(other)
    assert all(rows[key].digest == hashlib.sha256(data).hexdigest() for key, data in FACES.items() if key != "0/04.png")


@pytest.mark.parametrize("kind", ["tar", "zip", "tar.gz", "parquet"])
def test_an_archive_cut_short_between_plan_and_read_fails_where_it_ends(kind: str, s3_root: str) -> None:
    (source,) = source_of(kind, s3_root, FACES)
    settings, output = archiving.run_settings(source), storage.join(s3_root, "out")
    execution, whole = Meanwhile(output, settings), storage.read_bytes(source)
    execution.then = lambda: storage.write_bytes(source, whole[: len(whole) // 2])

    ledger = restore_here(output, settings, execution)

    rows = manifest(output)
    assert len(rows) == ledger.done.total == len(FACES)
    assert ledger.done.failed > 0
    assert {row.cause for row in rows.values() if row.status == "failed"} == {"unreadable"}
    if kind in ("tar", "zip"):
        assert ledger.done.restored > 0


# ---- listing ----


@dataclass
class FromThe(Fault):
    """A fault that lets the first requests pass."""

    number: int = 0

    def fits(self, method: str, path: str) -> bool:
        if not super().fits(method, path):
            return False
        self.number -= 1
        return self.number < 0


@pytest.fixture
def small_pages(faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """Five objects to a page, eight to a part."""
    monkeypatch.setattr("ldbfr.archive.parts.ROWS_PER_PART", 8)
    client = storage._s3_client(os.getpid(), None)
    client.meta.events.register(
        "before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.setdefault("MaxKeys", 5)
    )
    return faulty_s3


def test_a_listing_that_breaks_off_goes_on_from_its_last_part(s3_root: str, small_pages: FaultyProxy) -> None:
    source = storage.join(s3_root, "in")
    put_files(source, {f"{number:03d}.png": b"x" for number in range(48)})
    settings = archiving.run_settings(source)
    whole = plan(Place(source, storage.join(s3_root, "whole"), settings))
    place = Place(source, storage.join(s3_root, "out"), settings)
    small_pages.add(FromThe("fail", method="GET", path="/in/&", status=503, number=6))

    with pytest.raises(StorageError, match="cannot list"):
        plan(place)
    small_pages.clear()
    small_pages.requests.clear()
    again = plan(place)

    assert again == whole
    assert [row.key for part in again for row in part] == [f"{number:03d}.png" for number in range(48)]
    starts = [match[1] for _, path in small_pages.requests if (match := re.search(r"start-after=\S*/(\d+)\.png", path))]
    listed = [path for _, path in small_pages.requests if re.search(r"prefix=[^&]*/in/(&|$)", path)]
    assert starts
    assert len(listed) <= 6, "not the first five pages again"
    assert min(starts) == "023", "three parts of eight were written"


def test_a_listing_that_is_broken_off_again_and_again_comes_to_its_end(
    s3_root: str, small_pages: FaultyProxy, undisturbed: dict[str, bytes]
) -> None:
    source = storage.join(s3_root, "in")
    put_files(source, FACES | {"more.zip": archiving.zip_file(FACES), "more.tar": archiving.tar_file(FACES)})
    place = Place(source, storage.join(s3_root, "out"), archiving.run_settings(source))
    attempts = 0
    while attempts < 30:
        small_pages.add(FromThe("fail", path="", status=500, number=3 + 4 * attempts))
        try:
            plan(place)
            break
        except StorageError:
            attempts += 1
        finally:
            small_pages.clear()
    assert 3 < attempts < 30

    place.run()
    files = outputs(place.output)
    rows = manifest(place.output)
    assert {row.status for row in rows.values()} == {"restored"}
    assert len(rows) == 3 * len(FACES)
    assert {key: files[key] for key in undisturbed} == undisturbed


# ---- the lock ----


@pytest.fixture
def command(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of the job, which runs without Ray."""
    archiving.without_ray(monkeypatch)
    options = ["--weights", archiving.save_weights(tmp_path / "weights"), "--steps", "2", "--shard-images", "4"]
    return ["--input", place.input, "--output", place.output, "--batch-size", "3", *options]


def test_the_job_ends_with_a_report(command: list[str], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert restore.main(command) == restore.EXIT_OK
    assert storage.join(place.output, "report.html") in capsys.readouterr().out
    assert set(outputs(place.output)) == set(FACES)


def test_a_second_live_run_is_refused(
    command: list[str], place: Place, faulty_s3: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lease.acquire(lock_uri(place.output), "`the first command`", renew_seconds=0.2):
        assert restore.main(command) == restore.EXIT_BAD_REQUEST
        told = capsys.readouterr().err
        assert not outputs(place.output)
    assert "in use by '`the first command`' on host" in told
    assert f"process {os.getpid()}" in told
    assert restore.main(command) == restore.EXIT_OK


def test_a_crashed_run_is_taken_over_at_once(
    command: list[str], place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    script = (
        "import os, signal, sys; from ldbfr.lease import Lease\n"
        "Lease.acquire(sys.argv[1], 'the crashed one'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    crashed = subprocess.run([sys.executable, "-c", script, lock_uri(place.output)], cwd=REPOSITORY, timeout=60)
    assert crashed.returncode == -signal.SIGKILL
    started = time.monotonic()

    assert restore.main(command) == restore.EXIT_OK

    assert "taking over from 'the crashed one'" in caplog.text
    assert time.monotonic() - started < 15


def test_a_bucket_that_cannot_be_written_is_refused_before_anything_is_listed(
    command: list[str], place: Place, faulty_s3: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty_s3.fail(method="PUT", status=403)
    assert restore.main(command) == restore.EXIT_BAD_REQUEST
    assert "access denied" in capsys.readouterr().err
    assert not [path for _, path in faulty_s3.requests if "/in/" in path]


def test_a_listing_that_fails_is_no_finished_run(
    command: list[str], place: Place, faulty_s3: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty_s3.fail(method="GET", path="prefix=" + place.input.partition("//")[2].partition("/")[2], status=503)
    assert restore.main(command) == restore.EXIT_INCOMPLETE
    assert f"cannot list {place.input}" in capsys.readouterr().err

    faulty_s3.clear()
    assert restore.main(command) == restore.EXIT_OK
    assert set(manifest(place.output)) == set(FACES)


def test_a_run_without_its_lock_stops_and_its_successor_completes(
    command: list[str], place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take = Lease.check
    calls: list[int] = []

    def stolen(lease: Lease) -> None:
        if not calls:
            lease._lost = "the lease was taken over by another"
        calls.append(1)
        take(lease)

    monkeypatch.setattr(Lease, "check", stolen)
    assert restore.main(command) == restore.EXIT_INCOMPLETE
    assert "taken over by another" in capsys.readouterr().err
    assert not manifest(place.output)

    monkeypatch.setattr(Lease, "check", take)
    assert restore.main(command) == restore.EXIT_OK
    assert set(manifest(place.output)) == set(FACES)
