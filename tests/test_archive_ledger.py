"""Resuming a run, as plain Python: whatever crash comes between whatever writes, each input ends with one row."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldbfr.archive.ledger import (
    Counts,
    Ledger,
    UnitDone,
    do_again,
    manifest_folder,
    manifest_rows,
    read_counts,
    write_record,
)
from ldbfr.archive.parts import Cutter, Parts, part_info, part_numbers, plan_folder, read_part
from ldbfr.archive.plan import Plan, UnitId, WorkItem
from ldbfr.archive.rounds import FAILED_IN_A_ROW, FRUITLESS_ROUNDS, Rounds, TooManyFailuresError, waves
from ldbfr.archive.rows import Picture, PlanRow, ResultRow
from ldbfr.archive.steps import UnitFailed, by_unit, settled
from ldbfr.errors import StorageError
from ldbfr.tables import from_table
from tests.bucket import Bucket, Crash

OUTPUT = "s3://bucket/out"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    bucket = Bucket()
    bucket.install(monkeypatch)
    return bucket


def plan_row(number: int) -> PlanRow:
    """An input; every seventh is no image, every fifth cannot be read, as its listing says."""
    name = f"s3://bucket/in/{number:05d}.png"
    row = PlanRow(f"{number:05d}.png", name, "file", name)
    if number % 7 == 3:
        return row._replace(status="skipped", reason="not an image: by its name")
    return row._replace(status="failed", reason="bad name: rename it") if number % 5 == 2 else row


def write_plan(rows: int, images: int, part_rows: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan of so many inputs, written into the bucket."""
    monkeypatch.setattr("ldbfr.archive.parts.ROWS_PER_PART", part_rows)
    parts = Parts(plan_folder(OUTPUT))
    cutter = Cutter(images, parts)
    for number in range(rows):
        cutter.add(plan_row(number))
        if parts.full:
            parts.write()
    cutter.end()
    parts.write()
    sizes = part_numbers(parts.folder)
    return Plan(tuple(part_info(parts.folder, number, size) for number, size in sizes.items()))


@dataclass
class Worker:
    """Does units as a worker does; `fails` are inputs that fail, `written` counts what was written for each."""

    fails: frozenset[str] = frozenset()
    order: random.Random = field(default_factory=lambda: random.Random(0))
    written: Counter[str] = field(default_factory=Counter)

    def __call__(self, items: Sequence[WorkItem]) -> Iterator[UnitDone | UnitFailed]:
        shuffled = list(items)
        self.order.shuffle(shuffled)
        for item in shuffled:
            for unit in item.units:
                yield self.unit(unit, item.mode)

    def unit(self, unit: UnitId, mode: str) -> UnitDone:
        rows = by_unit(read_part(plan_folder(OUTPUT), unit.part)[0])[unit.unit]
        prior = manifest_rows(OUTPUT, unit.part)[unit.unit] if mode != "new" else [None] * len(rows)
        results = []
        for row, before in zip(rows, prior, strict=True):
            if before is not None and (mode == "failed" and before.status != "failed"):
                results.append(before)
                continue
            results.append(self.one(row))
        pictures = [Picture(row.key, row.input, 1, 1.0, b"", b"") for row in results if row.status == "restored"][:2]
        done = UnitDone(unit, results, pictures)
        write_record(OUTPUT, done)
        return done

    def one(self, row: PlanRow) -> ResultRow:
        if row.status is not None:
            return settled(row)._replace(worker=None, finished=None)
        self.written[row.key] += 1
        if row.key in self.fails:
            return ResultRow(row.name, row.key, "failed", "broken", "damaged", seconds_read=0.1)
        return ResultRow(row.name, row.key, "restored", output=f"{OUTPUT}/{row.key}")


def go_on(plan: Plan, worker: Worker) -> Ledger:
    """The same command again."""
    ledger = Ledger.read(OUTPUT, plan)
    Rounds(ledger, worker, pause=lambda _: None)()
    return ledger


def manifest(bucket: Bucket) -> list[ResultRow]:
    """All rows, as somebody reads the folder."""
    names = sorted(name for name in bucket.objects if name.startswith(manifest_folder(OUTPUT)))
    return [
        row for name in names for row in from_table(pq.read_table(pa.BufferReader(bucket.objects[name])), ResultRow)
    ]


def leftovers(bucket: Bucket) -> list[str]:
    return [name for name in bucket.objects if "/units/" in name or "/again/" in name]


def check_complete(bucket: Bucket, ledger: Ledger, rows: int) -> None:
    """Every input has its row, the counts are those of the rows, and nothing else is left."""
    found = manifest(bucket)
    assert [row.key for row in found] == [f"{number:05d}.png" for number in range(rows)]
    assert ledger.done == Counts.of(found)
    assert not ledger.left()
    assert not leftovers(bucket)
    assert Ledger.read(OUTPUT, ledger.plan).done == ledger.done


# ---- crashes ----


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    images=st.integers(1, 5),
    part_rows=st.integers(1, 20),
    crashes=st.lists(st.integers(0, 40), max_size=8),
    seed=st.integers(0, 2**16),
)
def test_any_crashes_leave_one_row_for_every_input(
    rows: int, images: int, part_rows: int, crashes: list[int], seed: int
) -> None:
    bucket = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        bucket.install(patch)
        plan = write_plan(rows, images, part_rows, patch)
        fails = frozenset(f"{number:05d}.png" for number in range(0, rows, 4))
        worker = Worker(fails, random.Random(seed))
        for changes in crashes:
            bucket.changes_left = changes
            with suppress(Crash):
                go_on(plan, worker)
        bucket.changes_left = None
        ledger = go_on(plan, worker)

        check_complete(bucket, ledger, rows)
        assert (
            sum(worker.written.values())
            >= len(worker.written)
            == sum(p.rows - p.failed - p.skipped for p in plan.parts)
        )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    images=st.integers(1, 5),
    part_rows=st.integers(1, 20),
    crashes=st.lists(st.integers(0, 30), max_size=6),
    seed=st.integers(0, 2**16),
)
def test_a_retry_of_what_failed_may_crash_anywhere(
    rows: int, images: int, part_rows: int, crashes: list[int], seed: int
) -> None:
    bucket = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        bucket.install(patch)
        plan = write_plan(rows, images, part_rows, patch)
        fails = frozenset(f"{number:05d}.png" for number in range(0, rows, 4))
        first = Worker(fails)
        go_on(plan, first)
        before = {row.key: row for row in manifest(bucket)}
        again = Worker(order=random.Random(seed))
        asked = False
        for changes in crashes:
            bucket.changes_left = changes
            try:
                if not asked:
                    do_again(OUTPUT, "failed")
                    asked = True
                go_on(plan, again)
            except Crash:
                assert len(manifest(bucket)) == rows, "what was in the manifest stays there meanwhile"
        bucket.changes_left = None
        if not asked:
            do_again(OUTPUT, "failed")
        ledger = go_on(plan, again)

        check_complete(bucket, ledger, rows)
        after = {row.key: row for row in manifest(bucket)}
        assert all(after[key] == row for key, row in before.items() if row.status != "failed")
        assert {row.cause for row in after.values() if row.status == "failed"} <= {"bad name"}
        assert set(again.written) == {key for key in before if before[key].cause == "broken"}


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 80), images=st.integers(1, 5), part_rows=st.integers(1, 20), stop=st.integers(0, 60))
def test_what_is_done_is_not_read_again(rows: int, images: int, part_rows: int, stop: int) -> None:
    bucket = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        bucket.install(patch)
        plan = write_plan(rows, images, part_rows, patch)
        first, second = Worker(), Worker()
        bucket.changes_left = stop
        with suppress(Crash):
            go_on(plan, first)
        bucket.changes_left = None
        recorded = Ledger.read(OUTPUT, plan).done.restored
        go_on(plan, second)

        assert recorded + sum(second.written.values()) == sum(p.rows - p.failed - p.skipped for p in plan.parts)


def test_a_unit_that_comes_twice_counts_once(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(10, 2, 100, monkeypatch)
    ledger = Ledger.read(OUTPUT, plan)
    worker = Worker()
    done = worker.unit(UnitId(0, 0), "new")

    assert ledger.take(done)
    assert not ledger.take(done)
    assert ledger.done == Counts.of(done.rows)


def test_records_of_a_dead_worker_that_come_late_change_nothing(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(20, 2, 8, monkeypatch)
    ledger = go_on(plan, Worker(frozenset({"00000.png"})))
    before = manifest(bucket)
    Worker().unit(UnitId(1, 0), "new")

    again = Worker(frozenset({"00000.png"}))
    assert Ledger.read(OUTPUT, plan).done == ledger.done
    assert do_again(OUTPUT, "failed") == 1
    go_on(plan, again)
    assert manifest(bucket) == before
    assert not leftovers(bucket)


def test_nobody_writes_the_manifest_who_lost_the_lock(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(20, 2, 8, monkeypatch)

    def lost() -> None:
        raise StorageError("the lease was taken over")

    ledger = Ledger.read(OUTPUT, plan, lost)
    with pytest.raises(StorageError, match="taken over"):
        Rounds(ledger, Worker(), pause=lambda _: None)()
    assert not manifest(bucket)


def test_a_manifest_of_another_plan_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(write_plan(20, 2, 8, monkeypatch), Worker())
    plan = write_plan(20, 2, 100, monkeypatch)

    with pytest.raises(StorageError, match="is not of the plan in s3://bucket/out"):
        Ledger.read(OUTPUT, plan)


def test_rows_that_are_missing_stop_the_run(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(6, 3, 100, monkeypatch)
    ledger = Ledger.read(OUTPUT, plan)
    for number in range(plan.parts[0].units - 1):
        ledger.take(Worker().unit(UnitId(0, number), "new"))
    last = Worker().unit(UnitId(0, plan.parts[0].units - 1), "new")

    with pytest.raises(StorageError, match=r"has 6 inputs, but \d rows came of it"):
        ledger.take(last._replace(rows=last.rows[:-1]))


def test_counts_are_read_from_the_ends_of_the_files(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = go_on(write_plan(40, 3, 8, monkeypatch), Worker(frozenset({"00000.png"})))

    assert sum((Counts.of([row]).failed for row in manifest(bucket)), 0) == ledger.done.failed
    assert sum(counts.total for counts in read_counts(OUTPUT).values()) == 40


# ---- rounds ----


def test_units_that_the_storage_refuses_are_tried_again(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(60, 2, 8, monkeypatch)
    worker, pauses, refused = Worker(), [], Counter[UnitId]()

    def execute(items: Sequence[WorkItem]) -> Iterator[UnitDone | UnitFailed]:
        for item in items:
            for unit in item.units:
                refused[unit] += 1
                if refused[unit] <= unit.unit % 2:
                    yield UnitFailed(unit, "cannot read s3://bucket/in: SlowDown")
                else:
                    yield worker.unit(unit, item.mode)

    ledger = Ledger.read(OUTPUT, plan)
    Rounds(ledger, execute, pause=pauses.append)()

    check_complete(bucket, ledger, 60)
    assert len(pauses) == 1
    assert set(worker.written.values()) == {1}


def test_a_storage_that_stays_away_ends_the_run(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(200, 2, 100, monkeypatch)
    asked: list[UnitId] = []

    def execute(items: Sequence[WorkItem]) -> Iterator[UnitDone | UnitFailed]:
        for item in items:
            for unit in item.units:
                asked.append(unit)
                yield UnitFailed(unit, "cannot read s3://bucket/in: the endpoint cannot be reached")

    with pytest.raises(StorageError, match=r"cannot be reached \(200 inputs are left after 3 rounds"):
        Rounds(Ledger.read(OUTPUT, plan), execute, pause=lambda _: None)()
    assert len(asked) == FAILED_IN_A_ROW * FRUITLESS_ROUNDS


def test_a_place_that_fails_first_does_not_end_the_run_for_others(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(200, 2, 100, monkeypatch)
    worker, gone = Worker(), {UnitId(0, number) for number in range(FAILED_IN_A_ROW + 4)}

    def execute(items: Sequence[WorkItem]) -> Iterator[UnitDone | UnitFailed]:
        for item in items:
            for unit in item.units:
                yield UnitFailed(unit, "s3://other: down") if unit in gone else worker.unit(unit, item.mode)

    ledger = Ledger.read(OUTPUT, plan)
    with pytest.raises(StorageError, match="s3://other: down"):
        Rounds(ledger, execute, pause=lambda _: None)()

    assert {(part, unit) for part, (units, _) in ledger.left().items() for unit in units} == gone


def test_failures_of_unfinished_parts_can_be_tried_again(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(40, 2, 100, monkeypatch)
    ledger, broken = Ledger.read(OUTPUT, plan), Worker(frozenset({"00000.png", "00004.png"}))
    for number in range(6):
        ledger.take(broken.unit(UnitId(0, number), "new"))

    assert do_again(OUTPUT, "failed") == 2
    again = Worker()
    check_complete(bucket, go_on(plan, again), 40)
    assert {row.status for row in manifest(bucket) if row.cause != "bad name"} == {"restored", "skipped"}
    assert set(again.written) & {"00000.png", "00004.png"} == {"00000.png", "00004.png"}


def test_a_check_of_everything_takes_in_what_was_to_be_retried(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(20, 2, 8, monkeypatch)
    go_on(plan, Worker(frozenset({"00000.png"})))
    assert do_again(OUTPUT, "failed") == 1

    assert do_again(OUTPUT, "restore") == 20
    assert {mode for _, mode in Ledger.read(OUTPUT, plan).left().values()} == {"restore"}
    assert do_again(OUTPUT, "restore") == 0, "it is under way"


def test_an_output_that_fails_ends_the_run_at_once(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(200, 2, 100, monkeypatch)

    def execute(items: Sequence[WorkItem]) -> Iterator[UnitDone | UnitFailed]:
        yield Worker().unit(items[0].units[0], "new")
        yield UnitFailed(items[1].units[0], "cannot write /out/a.png: the disk is full; free some space", fatal=True)
        raise AssertionError("asked for more")

    ledger = Ledger.read(OUTPUT, plan)
    with pytest.raises(StorageError, match="the disk is full; free some space; then run the same command again"):
        Rounds(ledger, execute)()
    assert ledger.done.total > 0


def test_an_execution_that_gives_nothing_is_noticed(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: Sequence[WorkItem]) -> Iterator[UnitDone | UnitFailed]:
        yield from ()

    with pytest.raises(StorageError, match="came to no end and no error"):
        Rounds(Ledger.read(OUTPUT, write_plan(5, 2, 100, monkeypatch)), nothing)()


def test_too_many_failures_end_the_run_early(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(2000, 10, 500, monkeypatch)
    worker = Worker(frozenset(f"{number:05d}.png" for number in range(2000)))
    ledger = Ledger.read(OUTPUT, plan)

    with pytest.raises(TooManyFailuresError, match=r"inputs failed, 100\.0%: expected at most --max-failures 0\.25"):
        Rounds(ledger, worker, max_failures=0.25)()
    assert 100 <= ledger.done.restored + ledger.done.failed < 150


# ---- the work that is left ----


def test_items_follow_the_streams(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldbfr.archive.parts.ROWS_PER_PART", 8)
    parts = Parts(plan_folder(OUTPUT))
    cutter = Cutter(2, parts)
    infos = []
    for number in range(20):
        kind = "tar.gz" if 4 <= number < 16 else "file"
        if number in (4, 16):
            cutter.end()
            cutter.forward = number == 4
        cutter.add(plan_row(0)._replace(kind=kind, uri="s3://bucket/x.tar.gz"))
        if parts.full:
            infos.append(parts.write())
    infos.append(parts.write())
    plan = Plan(tuple(infos))

    everything = {number: (range(part.units), "new") for number, part in enumerate(plan.parts)}
    items = [item.units for item in plan.items(everything)]
    assert [len(units) for units in items] == [1, 1, 6, 1, 1]
    assert [unit for units in items for unit in units] == [
        UnitId(p, u) for p in range(3) for u in range(plan.parts[p].units)
    ]

    some = {0: ([2, 3], "new"), 1: ([1, 3], "new"), 2: ([1], "failed")}
    assert [item.units for item in plan.items(some)] == [
        (UnitId(0, 2), UnitId(0, 3), UnitId(1, 1), UnitId(1, 3)),
        (UnitId(2, 1),),
    ]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 50))
def test_waves_keep_order_and_items(lengths: list[int], most: int) -> None:
    items = [WorkItem(tuple(UnitId(n, u) for u in range(length))) for n, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldbfr.archive.rounds.UNITS_IN_A_WAVE", most)
        found = list(waves(items))

    assert [item for wave in found for item in wave] == items
    assert all(sum(len(item.units) for item in wave[:-1]) < most for wave in found)
