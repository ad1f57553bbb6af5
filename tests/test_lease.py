"""The run lock: one holder at a time, whatever dies, stops, races or loses its connection."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ldbfr import lease as lease_module
from ldbfr import storage
from ldbfr.errors import ConfigError, StorageError
from ldbfr.lease import Lease, LeaseHeldError, LeaseLostError
from tests.faulty_proxy import FaultyProxy

pytest_plugins = ["tests.faulty_proxy"]

RENEW, PATIENCE = 0.1, 3.0


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder's URI, with nothing in it."""
    return str(request.getfixturevalue("s3_root") if request.param == "s3" else tmp_path / "run" / "lease")


def acquire(folder: str, holder: str = "python train.py --stage prior") -> Lease:
    return Lease.acquire(folder, holder, RENEW, PATIENCE)


def files(folder: str) -> list[str]:
    return [entry.key for entry in storage.list_objects(folder)]


def content(folder: str, generation: int) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, f"lease-{generation:08d}.json")))
    return data


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def holds(lease: Lease) -> bool:
    try:
        lease.check()
    except LeaseLostError:
        return False
    return True


PROCESS = """
import socket, sys
from ldbfr.lease import Lease, LeaseHeldError, LeaseLostError

host, lease = sys.argv[1], None
if host:
    socket.gethostname = lambda: host
for line in sys.stdin:
    command, *given = line.rstrip("\\n").split("\\t")
    try:
        if command == "acquire":
            lease = Lease.acquire(given[0], "another run", float(given[1]), float(given[2]))
        else:
            getattr(lease, command)()
        print("done", flush=True)
    except (LeaseHeldError, LeaseLostError) as error:
        print(type(error).__name__, error, flush=True)
"""


class Process:
    """Another process, which does what it is told: acquire, check, release."""

    def __init__(self, host: str = "", **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self.process.stdin
        assert self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout

    def tell(self, command: str, *given: object) -> None:
        self.input.write("\t".join(map(str, (command, *given))) + "\n")
        self.input.flush()

    def answer(self) -> str:
        return self.output.readline().strip()

    def ask(self, command: str, *given: object) -> str:
        self.tell(command, *given)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.input.close()
        self.output.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Starts other processes, which end with the test."""
    started: list[Process] = []

    def start_one(host: str = "", **environment: str) -> Process:
        started.append(Process(host, **environment))
        return started[-1]

    yield start_one
    for process in started:
        process.end()


# ------------------------------------------------------------------------------------------------------- ordinary life


def test_one_after_the_other(folder: str) -> None:
    with acquire(folder) as first:
        first.check()
        said = content(folder, 1)
        assert (said["holder"], said["host"]) == ("python train.py --stage prior", socket.gethostname())
        assert (said["process"], said["released"]) == (os.getpid(), False)
    assert content(folder, 1)["released"] is True
    with pytest.raises(LeaseLostError, match="was released"):
        first.check()
    first.release()  # once is enough, twice does nothing
    started = time.monotonic()
    with acquire(folder):
        assert time.monotonic() - started < PATIENCE / 2
        assert files(folder) == ["lease-00000002.json"]  # those before are cleaned up


def test_a_second_one_is_refused_with_the_holders_name(folder: str) -> None:
    with acquire(folder) as first:
        since = content(folder, 1)["since"]
        started = time.monotonic()
        with pytest.raises(LeaseHeldError) as refused:
            acquire(folder)
        assert time.monotonic() - started < PATIENCE  # a renewal tells, not the patience
        first.check()
    assert str(refused.value) == (
        f"{folder} is in use by 'python train.py --stage prior' on host {socket.gethostname()}, process {os.getpid()}, "
        f"since {since}: wait until that has ended, stop it, or choose another folder"
    )


def test_it_is_held_for_longer_than_the_patience(folder: str) -> None:
    with acquire(folder) as lease:
        first = content(folder, 1)["counter"]
        deadline = time.monotonic() + 1.2 * PATIENCE
        while time.monotonic() < deadline:
            lease.check()
            time.sleep(0.05)
        assert content(folder, 1)["counter"] > first + 3
        assert files(folder) == ["lease-00000001.json"]


def test_it_is_released_when_the_work_fails_and_the_error_is_the_works(folder: str) -> None:
    with pytest.raises(ZeroDivisionError), acquire(folder):
        _ = 1 / 0
    assert content(folder, 1)["released"] is True


def test_other_files_in_the_folder_are_nobodys_business(folder: str) -> None:
    for name in ("aaa", "lease-00000007.json.txt", "lease-7.json", "zzz/lease-00000009.json"):
        storage.write_bytes(storage.join(folder, name), b"")
    acquire(folder).release()
    acquire(folder).release()
    assert files(folder) == [
        *("aaa", "lease-00000002.json", "lease-00000007.json.txt", "lease-7.json", "zzz/lease-00000009.json")
    ]


@pytest.mark.parametrize(("renew", "patience"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.9)])
def test_a_patience_that_leaves_no_second_chance_is_refused(tmp_path: Path, renew: float, patience: float) -> None:
    with pytest.raises(ConfigError, match=rf"every {renew} s with a patience of {patience} s: expected"):
        Lease.acquire(str(tmp_path), "x", renew, patience)


# ------------------------------------------------------------------------------------------------- holders that vanish


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_process_of_this_machine_that_was_killed_is_followed_at_once(
    folder: str, start: Callable[..., Process], caplog: pytest.LogCaptureFixture, reaped: bool
) -> None:
    process = start()
    assert process.ask("acquire", folder, 5.0, 600.0) == "done"
    process.process.send_signal(signal.SIGKILL)
    if reaped:
        process.process.wait()
    else:
        os.waitid(os.P_PID, process.process.pid, os.WEXITED | os.WNOWAIT)
    with caplog.at_level(logging.WARNING):
        acquire(folder).release()  # the patience would be ten minutes
    assert f"process {process.process.pid}" in caplog.text
    assert "which has ended without a word" in caplog.text


def test_a_process_of_another_machine_that_was_killed_is_followed_after_the_patience(
    folder: str, start: Callable[..., Process]
) -> None:
    process = start("elsewhere")
    assert process.ask("acquire", folder, RENEW, PATIENCE) == "done"
    with pytest.raises(LeaseHeldError, match="'another run' on host elsewhere, process"):
        acquire(folder)
    process.end()
    killed = time.monotonic()
    acquire(folder).release()
    assert PATIENCE <= time.monotonic() - killed < PATIENCE + 5


def test_the_holders_patience_counts_if_it_is_longer(tmp_path: Path, start: Callable[..., Process]) -> None:
    process = start("elsewhere")
    assert process.ask("acquire", tmp_path, RENEW, PATIENCE) == "done"
    process.end()
    killed = time.monotonic()
    Lease.acquire(str(tmp_path), "one in a hurry", 0.1, 0.2).release()
    assert time.monotonic() - killed >= PATIENCE


@pytest.mark.parametrize(
    ("change", "at_once"),
    [
        ({"process_started": "1"}, True),  # the number was given to another process: this one
        ({}, False),  # alive, though it does not renew
        ({"boot": "another"}, False),  # before a restart, or in a container of the same name
        ({"boot": "", "process_started": ""}, False),  # a system that cannot tell
    ],
)
def test_a_process_is_known_by_more_than_its_number(tmp_path: Path, change: dict[str, str], at_once: bool) -> None:
    Lease.acquire(str(tmp_path), "x", RENEW, 1.0).release()
    record = {**content(str(tmp_path), 1), "released": False, **change}
    (tmp_path / "lease-00000001.json").write_text(json.dumps(record))
    started = time.monotonic()
    Lease.acquire(str(tmp_path), "y", RENEW, 1.0).release()
    assert (time.monotonic() - started < 1.0) == at_once


def test_a_holder_that_was_stopped_and_goes_on_has_lost(folder: str, start: Callable[..., Process]) -> None:
    process = start()
    assert process.ask("acquire", folder, RENEW, PATIENCE) == "done"
    process.process.send_signal(signal.SIGSTOP)
    with acquire(folder, "the second") as second:
        process.process.send_signal(signal.SIGCONT)
        assert process.ask("check").startswith("LeaseLostError")  # at once: it has not asked anybody yet
        said = ""

        def told() -> bool:
            nonlocal said
            said = process.ask("check")
            return "was taken over by" in said

        wait_until(told)
        assert "'the second' on host" in said
        assert f"did not renew it for {PATIENCE:g} s; stop this one" in said
        second.check()
        assert process.ask("release") == "done"
        second.check()  # what it released is not the second's
        assert content(folder, second.generation)["released"] is False


# --------------------------------------------------------------------------------------------------------------- races


def test_of_several_processes_one_wins(folder: str, start: Callable[..., Process]) -> None:
    processes = [start(f"host-{number}") for number in range(3)]
    for process in processes:  # once each alone: the first use of S3 takes its time
        assert process.ask("acquire", folder, RENEW, 30.0) == "done"
        time.sleep(5 * RENEW)
        assert process.ask("release") == "done"
    for before in ("nothing", "released", "dead", "nothing", "released"):
        place = storage.join(folder, uuid.uuid4().hex)
        if before != "nothing":
            acquire(place).release()
        if before == "dead":
            record = {**content(place, 1), "released": False, "boot": "", "patience_seconds": PATIENCE}
            storage.write_bytes(storage.join(place, "lease-00000001.json"), json.dumps(record).encode())
        for process in processes:
            process.tell("acquire", place, RENEW, PATIENCE if before == "dead" else 30.0)
        answers = [process.answer() for process in processes]
        winners = [process for process, answer in zip(processes, answers, strict=True) if answer == "done"]
        assert len(winners) == 1, answers
        assert sum(answer.startswith("LeaseHeldError") for answer in answers) == 2
        assert winners[0].ask("check") == "done"
        assert winners[0].ask("release") == "done"


def test_of_many_threads_one_wins_every_time(folder: str) -> None:
    """The lock goes from hand to hand, and is never in two."""
    num_threads, num_rounds = 6, 8
    inside = threading.Semaphore(1)
    barrier = threading.Barrier(num_threads)

    def take_turns(number: int) -> int:
        won = 0
        for _ in range(num_rounds):
            barrier.wait()
            try:
                with acquire(folder, f"thread {number}"):
                    assert inside.acquire(blocking=False), "two hold it"
                    barrier.wait()
                    inside.release()
                    won += 1
            except LeaseHeldError:
                barrier.wait()
        return won

    with ThreadPoolExecutor(num_threads) as pool:
        assert sum(pool.map(take_turns, range(num_threads))) == num_rounds


def test_who_takes_a_generation_that_was_cleaned_up_has_not_won(folder: str) -> None:
    """One that saw generation 1 free, and slept until others had come and gone."""
    for _ in range(2):
        acquire(folder).release()
    with acquire(folder) as third:
        late = Lease(folder, "late", RENEW, PATIENCE)
        assert not late._take(2)
        assert files(folder) == ["lease-00000003.json"]
        third.check()


# ------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"holder": "x"}', b"null"])
def test_a_damaged_lease_is_explained_and_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    (tmp_path / "lease-00000004.json").write_bytes(data)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), Lease.acquire(str(tmp_path), "x", 0.1, 0.5) as lease:
        assert time.monotonic() - started >= 0.5
        assert lease.generation == 5
    assert "lease-00000004.json is damaged (" in caplog.text
    assert "waiting 0.5 s for a sign of its holder" in caplog.text


def test_a_damaged_lease_that_changes_is_somebodys(tmp_path: Path) -> None:
    file, stop = tmp_path / "lease-00000001.json", threading.Event()
    file.write_bytes(b"a format to come 0")

    def renew() -> None:
        number = 0
        while not stop.wait(RENEW):
            number += 1
            storage.write_bytes(str(file), f"a format to come {number}".encode())

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(
            LeaseHeldError, match=r"a process that cannot be named, for .*lease-00000001\.json is damaged"
        ):
            acquire(str(tmp_path))
    finally:
        stop.set()
        thread.join()


def test_clocks_that_jump_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    with acquire(str(tmp_path)) as lease:
        for jump in (-1e9, 1e9):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            with pytest.raises(LeaseHeldError):
                acquire(str(tmp_path))
            lease.check()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot create .*file/lease-00000001\.json: a file stands where a folder"):
        acquire(str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot create /proc/ldbfr/lease-00000001\.json: "):
        acquire("/proc/ldbfr")


@pytest.mark.s3
@pytest.mark.usefixtures("s3_endpoint")
def test_a_bucket_that_is_not_there_is_named() -> None:
    with pytest.raises(StorageError, match=r"s3://ldbfr-no-such-bucket/run.*: there is no such bucket"):
        acquire("s3://ldbfr-no-such-bucket/run")


def test_a_lease_that_cannot_be_released_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    lease = acquire(str(tmp_path))
    monkeypatch.setattr(storage, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        lease.release()
    assert "the lease could not be released, so the next one waits: the disk is full" in caplog.text


def test_without_a_clock_that_counts_sleep_there_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    assert lease_module._now() == pytest.approx(time.monotonic(), abs=1)


# ---------------------------------------------------------------------------------------------------- S3 that stumbles


@pytest.mark.s3
@pytest.mark.parametrize("times", [1, 5], ids=["once", "every attempt"])
def test_a_winner_whose_answer_was_lost_knows_that_it_won(faulty_s3: FaultyProxy, s3_root: str, times: int) -> None:
    fault = faulty_s3.lose_answers(times, method="PUT", path="lease-00000001.json")
    with acquire(s3_root) as lease:
        assert fault.hits == times
        lease.check()
        with pytest.raises(LeaseHeldError):
            acquire(s3_root)


@pytest.mark.s3
def test_a_renewal_that_fails_is_tried_again(
    faulty_s3: FaultyProxy, s3_root: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Lease.acquire(s3_root, "x", RENEW, 8.0) as lease:
        for fault in (
            faulty_s3.fail(2, method="PUT"),
            faulty_s3.refuse(2),
            faulty_s3.lose_answers(2, method="PUT"),
            faulty_s3.hang(1, method="PUT"),
        ):
            wait_until(lambda fault=fault: fault.hits == fault.times)
            before = content(s3_root, 1)["counter"]
            wait_until(lambda before=before: content(s3_root, 1)["counter"] > before)
            lease.check()
        assert lease.generation == 1
    assert "the lease could not be renewed, trying again: " in caplog.text


@pytest.mark.s3
@pytest.mark.parametrize("action", ["fail", "refuse", "hang"])
def test_a_holder_that_cannot_renew_stops_in_time_and_goes_on_if_nobody_came(
    faulty_s3: FaultyProxy, s3_root: str, action: str
) -> None:
    with acquire(s3_root) as lease:
        getattr(faulty_s3, action)()
        cut = time.monotonic()
        asked = cut
        while holds(lease):
            assert asked - cut < PATIENCE  # nobody else can hold it before
            time.sleep(0.02)
            asked = time.monotonic()
        with pytest.raises(
            LeaseLostError, match=r"could not be renewed for \d+ s, so that another .* \(cannot \w+ s3:"
        ):
            lease.check()
        faulty_s3.clear()
        wait_until(lambda: holds(lease))
        assert lease.generation >= 2  # for which it had to be the first
        with pytest.raises(LeaseHeldError):
            acquire(s3_root)


def test_a_renewal_that_came_too_late_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives, but after others may have given the holder up: that has to win the next generation too."""
    write, slow = storage.write_bytes, threading.Event()

    def write_slowly(uri: str, data: bytes) -> None:
        if slow.is_set():
            slow.clear()
            time.sleep(2.5)
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", write_slowly)
    with Lease.acquire(str(tmp_path), "x", 1.0, 4.0) as lease:
        slow.set()  # a renewal that starts at 1 s arrives at 3.5 s, and at 3 s the holder stops counting itself as one
        wait_until(lambda: not holds(lease))
        wait_until(lambda: holds(lease))
        assert lease.generation == 2


@pytest.mark.s3
def test_a_holder_that_was_cut_off_does_not_take_back_what_another_took(
    faulty_s3: FaultyProxy, s3_root: str, s3_endpoint: str, start: Callable[..., Process]
) -> None:
    other = start("elsewhere", AWS_ENDPOINT_URL=s3_endpoint)  # whose connection is in order
    with acquire(s3_root) as lease:
        faulty_s3.refuse()
        assert other.ask("acquire", s3_root, RENEW, PATIENCE) == "done"
        assert not holds(lease)
        faulty_s3.clear()
        wait_until(lambda: "taken over" in lease._lost)
        with pytest.raises(LeaseLostError, match="was taken over by 'another run' on host elsewhere"):
            lease.check()
    assert other.ask("check") == "done"
