"""Reading, restoring and writing units, in this process, with the real model at tiny size."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image

from ldbfr import storage
from ldbfr.archive.faults import scope
from ldbfr.archive.ledger import do_again
from ldbfr.archive.naming import output_key
from ldbfr.archive.outputs import read_shard
from ldbfr.archive.plan import UnitId
from ldbfr.archive.rows import ResultRow
from ldbfr.archive.settings import RunSettings
from ldbfr.archive.steps import UnitRestorer, UnitWork, describe_fit
from ldbfr.errors import StorageError
from ldbfr.images import decode_image, encode_image, fit_to_side
from ldbfr.inputs import reading
from ldbfr.metadata import Metadata, read_provenance
from tests import tiny
from tests.archiving import (
    LocalExecution,
    folder,
    input_files,
    manifest,
    outputs,
    pipeline,
    png,
    put_files,
    restore_here,
    run_settings,
)

BAD = {
    "empty.png": ("broken", "the file is empty (0 bytes)"),
    "huge.png": ("broken", "30000 x 30000 pixels"),
    "nested/text.png": ("broken", "not a supported image"),
    "truncated.jpg": ("broken", "damaged or truncated"),
    "blocked.png": ("not written", "this is a folder, expected a file"),
}
"""Inputs that must fail: the cause, and what the reason says."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSettings]:
    """A run over every kind of file, with everything that can be kept."""
    path = tmp_path_factory.mktemp("run #1 50%")
    source = folder(path / "in", input_files())
    (path / "out" / "blocked.png").mkdir(parents=True)
    settings = run_settings(source, first_stage=True, side_by_side=True, seed=7)
    restore_here(str(path / "out"), settings)
    return path, settings


def test_every_input_has_one_row_and_a_reason(finished: tuple[Path, RunSettings]) -> None:
    path, _ = finished
    rows = manifest(str(path / "out"))

    assert set(rows) == set(input_files())
    assert {key: row.cause for key, row in rows.items() if row.status == "failed"} == {k: v[0] for k, v in BAD.items()}
    for key, (_, text) in BAD.items():
        assert text in str(rows[key].reason), key
        assert rows[key].output is None
    assert (rows["notes.txt"].status, rows["notes.txt"].cause) == ("skipped", "not an image")


def test_results_are_what_the_pipeline_gives(finished: tuple[Path, RunSettings]) -> None:
    path, settings = finished
    for key, row in manifest(str(path / "out")).items():
        if row.status != "restored" or not str(row.output).endswith(".png"):
            continue
        face = fit_to_side(decode_image((path / "in" / key).read_bytes(), name=key), tiny.SIDE)
        direct = pipeline()(face[None], seed=7, return_first_stage=True, num_inference_steps=settings.restore.steps)
        assert row.output == str(path / "out" / output_key(key, "same"))
        for uri, expected in ((row.output, direct.images[0]), (row.first_stage, direct.first_stage[0])):
            written = decode_image(Path(str(uri)).read_bytes(), name=key)
            assert np.abs(written.astype(int) - expected).max() <= 1, key
        both = decode_image(Path(str(row.side_by_side)).read_bytes(), name=key)
        assert np.array_equal(both[:, : tiny.SIDE], face), key


def test_a_row_says_what_was_done(finished: tuple[Path, RunSettings]) -> None:
    path, settings = finished
    for key, row in manifest(str(path / "out")).items():
        data = (path / "in" / key).read_bytes()
        if row.status == "skipped" or key == "blocked.png":
            continue
        assert row.digest == hashlib.sha256(data).hexdigest()
        assert row.size == len(data)
        if row.status == "restored":
            assert (row.seed, row.weights, row.settings) == (7, settings.weights, settings.restore.digest())
            assert (row.faces, row.member) == (1, None)
            assert min(row.seconds_read or 0, row.seconds_model or 0, row.seconds_write or 0) > 0
            assert row.sharpness is not None
            assert str(os.getpid()) in str(row.worker)


def test_metadata_and_provenance_travel(finished: tuple[Path, RunSettings]) -> None:
    path, settings = finished
    rows = manifest(str(path / "out"))
    data = Path(str(rows["rotated.jpg"].output)).read_bytes()
    exif = Image.open(io.BytesIO(data)).getexif()

    assert exif[ExifTags.Base.Make] == "Kodak"
    assert exif[ExifTags.Base.Orientation] == 1
    assert (rows["rotated.jpg"].width, rows["rotated.jpg"].height) == (32, 48)
    for row in rows.values():
        if row.status == "restored":
            about = read_provenance(Path(str(row.output)).read_bytes(), name=row.key)
            assert about is not None
            assert (about["weights"], about["settings"], about["seed"]) == (row.weights, settings.restore.digest(), 7)
            assert about["input_sha256"] == row.digest


def test_metadata_may_be_left_behind(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"rotated.jpg": input_files()["rotated.jpg"]})
    restore_here(str(tmp_path / "out"), run_settings(source, keep_metadata=False))

    exif = Image.open(io.BytesIO((tmp_path / "out" / "rotated.jpg").read_bytes())).getexif()
    assert ExifTags.Base.Make not in exif


def test_a_second_run_writes_the_same_bytes(finished: tuple[Path, RunSettings], tmp_path: Path) -> None:
    path, settings = finished
    restore_here(str(tmp_path), settings)

    first = outputs(str(path / "out"))
    assert {key: data for key, data in outputs(str(tmp_path)).items() if "blocked" not in key} == {
        key: data for key, data in first.items() if "blocked" not in key
    }


@pytest.mark.parametrize(
    ("height", "width", "note"),
    [
        (32, 32, None),
        (40, 32, "cropped to its central 32 px square"),
        (48, 48, "resized from 48 to 32 px"),
        (40, 100, "cropped to its central 40 px square, resized from 40 to 32 px"),
    ],
)
def test_notes(height: int, width: int, note: str | None) -> None:
    assert describe_fit(np.zeros((height, width, 3), np.uint8), 32) == note


# ---- layouts ----


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_shards_hold_what_files_would(layout: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n % 3}/{n:02d}.png": png(n) for n in range(10)} | {"bad.png": b"x"})
    options: dict[str, Any] = {"first_stage": True, "side_by_side": True}
    restore_here(str(tmp_path / "files"), run_settings(source, **options))
    restore_here(str(tmp_path / "shards"), run_settings(source, layout=layout, **options))

    files = outputs(str(tmp_path / "files"))
    rows = manifest(str(tmp_path / "shards"))
    assert set(outputs(str(tmp_path / "shards"))) == {f"shards/000000-{n:06d}.{layout}" for n in range(3)}
    for key, row in rows.items():
        if row.status == "restored":
            (shown,) = [one for one in read_shard(str(row.output)) if one.key == row.member]
            assert shown.files == {
                "": files[key],
                "_first-stage": files[f"_first-stage/{key}"],
                "_side-by-side": files[f"_side-by-side/{key}"],
            }
    assert rows["bad.png"].status == "failed"


def test_tar_shards_are_tars_and_parquet_shards_tables(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n}.png": png(n) for n in range(3)})
    restore_here(str(tmp_path / "tar"), run_settings(source, layout="tar"))
    restore_here(str(tmp_path / "parquet"), run_settings(source, layout="parquet"))

    with tarfile.open(tmp_path / "tar" / "shards" / "000000-000000.tar") as archive:
        assert archive.getnames() == ["0.png", "1.png", "2.png"]
    table = pq.read_table(tmp_path / "parquet" / "shards" / "000000-000000.parquet")
    assert table["key"].to_pylist() == ["0.png", "1.png", "2.png"]
    assert decode_image(table["image"][0].as_py(), name="0").shape == (tiny.SIDE, tiny.SIDE, 3)


@pytest.mark.parametrize("layout", ["files", "tar", "parquet"])
def test_a_retry_leaves_what_was_restored(layout: str, tmp_path: Path) -> None:
    files = {f"{n}.png": png(n) for n in range(9)}
    source = folder(tmp_path / "in", files | {"4.png": b"", "7.png": b"x"})
    settings = run_settings(source, layout=layout)
    output = str(tmp_path / "out")
    restore_here(output, settings)
    before = manifest(output)
    put_files(source, {"4.png": files["4.png"]})

    assert do_again(output, "failed") == 2
    execution = LocalExecution(output, settings)
    ledger = restore_here(output, settings, execution)

    after = manifest(output)
    assert execution.read == ["4.png"]
    assert {key for key in after if after[key].status == "failed"} == {"7.png"}
    assert all(after[key] == row for key, row in before.items() if row.status == "restored")
    assert ledger.done.total == 9
    put_files(source, {"7.png": files["7.png"]})
    do_again(output, "failed")
    restore_here(output, settings)
    whole = str(tmp_path / "whole")
    restore_here(whole, settings)
    assert outputs(output) == outputs(whole)


# ---- what changed ----


@pytest.mark.parametrize("on_change", ["restore", "fail"])
def test_inputs_whose_bytes_changed(on_change: Any, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n}.png": png(n) for n in range(6)})
    settings, output = run_settings(source), str(tmp_path / "out")
    restore_here(output, settings)
    before, files = manifest(output), outputs(output)
    put_files(source, {"2.png": png(20)})
    Path(source, "5.png").unlink()

    execution = LocalExecution(output, settings)
    do_again(output, on_change)
    restore_here(output, settings, execution)

    after = manifest(output)
    assert {key for key in after if after[key] != before[key]} == {"2.png"}
    if on_change == "restore":
        assert execution.read == ["2.png"]
        assert after["2.png"].digest == hashlib.sha256(png(20)).hexdigest()
        assert outputs(output)["2.png"] != files["2.png"]
    else:
        assert execution.read == []
        assert (after["2.png"].status, after["2.png"].cause) == ("failed", "changed")
        assert "--on-change restore" in str(after["2.png"].reason)
        assert outputs(output) == files


def test_what_failed_for_its_change_stays_so_until_it_may_be_restored(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n}.png": png(n) for n in range(6)})
    settings, output = run_settings(source), str(tmp_path / "out")
    restore_here(output, settings)
    first, files = manifest(output), outputs(output)
    put_files(source, {"2.png": png(20)})

    for _ in range(2):
        do_again(output, "fail")
        restore_here(output, settings)
        row = manifest(output)["2.png"]
        assert (row.cause, row.digest, row.output) == ("changed", first["2.png"].digest, first["2.png"].output)
        assert outputs(output) == files
    assert do_again(output, "failed") == 0, "nothing is wrong with it"
    put_files(source, {"2.png": png(2)})
    do_again(output, "fail")
    restore_here(output, settings)
    assert manifest(output)["2.png"].status == "restored"
    put_files(source, {"2.png": b"broken"})
    do_again(output, "restore")
    restore_here(output, settings)
    row = manifest(output)["2.png"]
    assert (row.status, row.cause, row.output) == ("failed", "broken", first["2.png"].output)
    assert outputs(output) == files, "the old result stays, and the row says where"


def test_a_check_that_breaks_off_goes_on_by_the_plain_command(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n:02d}.png": png(n) for n in range(12)})
    settings, output = run_settings(source), str(tmp_path / "out")
    restore_here(output, settings)
    put_files(source, {"11.png": png(20)})

    class Stopped(LocalExecution):
        def __call__(self, items: Any) -> Any:
            yield from list(super().__call__(items[:1]))
            raise KeyboardInterrupt

    do_again(output, "restore")
    with pytest.raises(KeyboardInterrupt):
        restore_here(output, settings, Stopped(output, settings))
    execution = LocalExecution(output, settings)
    restore_here(output, settings, execution)

    assert execution.read == ["11.png"]
    assert manifest(output)["11.png"].digest == hashlib.sha256(png(20)).hexdigest()


def test_what_is_done_is_not_read_again(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n}.png": png(n) for n in range(6)})
    settings, output = run_settings(source), str(tmp_path / "out")
    restore_here(output, settings)
    for name in os.listdir(source):
        Path(source, name).unlink()

    execution = LocalExecution(output, settings)
    ledger = restore_here(output, settings, execution)

    assert execution.read == []
    assert ledger.done == (6, 0, 0)


# ---- inputs ----


def test_members_of_archives_mirror_their_places(tmp_path: Path) -> None:
    source = tmp_path / "in"
    files = {f"{n}/a.png": png(n) for n in range(5)}
    source.mkdir()
    for name, mode in (("one.tar", "w"), ("two.tar.gz", "w:gz")):
        with tarfile.open(source / name, mode) as archive:  # type: ignore[call-overload]
            for key, data in files.items():
                info = tarfile.TarInfo(key)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    with zipfile.ZipFile(source / "x.zip", "w") as packed:
        for key, data in files.items():
            packed.writestr(key, data)
    put_files(str(source), files)

    restore_here(str(tmp_path / "out"), run_settings(str(source), shard_images=3))

    found = outputs(str(tmp_path / "out"))
    places, rows = ("", "one.tar/", "two.tar.gz/", "x.zip/"), manifest(str(tmp_path / "out"))
    assert set(found) == {f"{place}{key}" for place in places for key in files}
    for key in files:
        digests = {rows[f"{place}{key}"].digest for place in places}
        assert digests == {hashlib.sha256(files[key]).hexdigest()}
        pixels = [decode_image(found[f"{place}{key}"], name=key).astype(int) for place in places]
        assert max(np.abs(one - pixels[0]).max() for one in pixels) <= 1


def test_a_stream_with_notes_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "x.tar.gz", "w:gz") as archive:
        for number in range(60):
            data, name = (png(number), f"{number:02d}.png") if number % 12 == 5 else (b"{}", f"{number:02d}.json")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    opened = []
    streams = reading.tar_values
    monkeypatch.setattr(reading, "tar_values", lambda container: opened.append(container.uri) or streams(container))
    ledger = restore_here(str(tmp_path / "out"), run_settings(str(tmp_path / "in"), shard_images=1))

    assert sum(part.units for part in ledger.plan.parts) > 5
    assert ledger.done == (5, 0, 55)
    assert len(opened) == 1


def test_a_table_that_names_the_web_fails_by_the_row(tmp_path: Path) -> None:
    folder(tmp_path / "in", {"x.png": png()})
    pq.write_table(pa.table({"url": ["x.png", "http://h/a.png"]}), tmp_path / "in" / "t.parquet")
    restore_here(str(tmp_path / "out"), run_settings(str(tmp_path / "in" / "t.parquet")))

    rows = manifest(str(tmp_path / "out"))
    assert [row.status for row in rows.values()] == ["restored", "failed"]
    assert "http:// cannot be read" in str(rows["http://h/a.png"].reason)


def test_a_name_of_any_bytes_may_fail_too(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"a.png": png()})
    os.symlink("nowhere", os.path.join(source, os.fsdecode(b"x\xff.png")))
    restore_here(str(tmp_path / "out"), run_settings(source))

    (row,) = (row for row in manifest(str(tmp_path / "out")).values() if row.status == "failed")
    assert (row.key, row.cause) == ("x%FF.png", "unreadable")


def test_several_sources_stay_apart(tmp_path: Path) -> None:
    one, two = (folder(tmp_path / name, {"a.png": png(n), "sub/b.png": png(n + 1)}) for n, name in enumerate("xy"))
    restore_here(str(tmp_path / "out"), run_settings(one, two))

    assert set(outputs(str(tmp_path / "out"))) == {f"{s}/{k}" for s in "xy" for k in ("a.png", "sub/b.png")}


def test_an_output_below_the_input_is_no_input(tmp_path: Path) -> None:
    source = folder(tmp_path, {"a.png": png(), "out/old.png": png(1), "outside/b.png": png(2)})
    restore_here(str(tmp_path / "out"), run_settings(source))

    assert set(manifest(str(tmp_path / "out"))) == {"a.png", "outside/b.png"}


def test_an_input_that_goes_between_plan_and_read(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n}.png": png(n) for n in range(4)})
    settings, output = run_settings(source), str(tmp_path / "out")

    class Late(LocalExecution):
        def __call__(self, items: Any) -> Any:
            Path(source, "2.png").unlink(missing_ok=True)
            yield from super().__call__(items)

    restore_here(output, settings, Late(output, settings))

    row = manifest(output)["2.png"]
    assert (row.status, row.cause) == ("failed", "unreadable")
    assert "there is no such file" in str(row.reason)


# ---- the model ----


def unit_of(count: int) -> UnitWork:
    faces = tiny.blob_faces(count)
    rows = [ResultRow(f"/in/{n}.png", f"{n}.png", "failed", "unfinished") for n in range(count)]
    return UnitWork(UnitId(0, 0), rows, list(range(count)), faces, [Metadata()] * count)


class Broken:
    """A pipeline that fails on some faces, or on too many at a time."""

    def __init__(self, most: int = 100, bad: tuple[int, ...] = ()) -> None:
        self.most, self.bad, self.sizes = most, [tiny.blob_faces(10)[n].tobytes() for n in bad], []

    def __call__(self, faces: np.ndarray, **options: Any) -> Any:
        self.sizes.append(len(faces))
        if len(faces) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if any(face.tobytes() in self.bad for face in faces):
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")
        return pipeline()(faces, **options)


def restorer(model: Any, batch_size: int = 8) -> UnitRestorer:
    return UnitRestorer(model, run_settings("/in").restore, batch_size)


def test_memory_that_does_not_suffice_halves_the_batch_for_good() -> None:
    model = Broken(most=2)
    restore = restorer(model)

    done = restore(unit_of(10))

    assert model.sizes == [8, 4, 2, 2, 2, 2, 2]
    assert restore.batch_size == 2
    assert done.restored is not None
    plain = restorer(pipeline(), 2)(unit_of(10))
    assert plain.restored is not None
    assert np.array_equal(done.restored, plain.restored)


def test_a_face_that_the_model_refuses_fails_alone() -> None:
    done = restorer(Broken(bad=(3, 7)), 4)(unit_of(10))

    assert [row.key for row in done.rows if row.cause == "model"] == ["3.png", "7.png"]
    assert "CUDNN_STATUS_EXECUTION_FAILED" in str(done.rows[3].reason)
    assert done.places == [0, 1, 2, 4, 5, 6, 8, 9]
    assert done.faces is not None
    assert np.array_equal(done.faces, tiny.blob_faces(10)[done.places])


def test_one_face_that_does_not_fit_fails() -> None:
    done = restorer(Broken(most=0), 4)(unit_of(2))

    assert {row.cause for row in done.rows} == {"model"}
    assert done.faces is None
    assert done.restored is None


def test_micro_batches_fill_across_files(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n}.png": b"" if n in (1, 2, 5) else png(n) for n in range(10)})
    settings, model = run_settings(source, shard_images=10, batch_size=3), Broken()
    execution = LocalExecution(str(tmp_path / "out"), settings, restore=restorer(model, 3))
    restore_here(str(tmp_path / "out"), settings, execution)

    assert model.sizes == [3, 3, 1]


# ---- faults of the output ----


def caused(cause: BaseException | None) -> StorageError:
    error = StorageError("cannot write")
    error.__cause__ = cause
    return error


def client_error(code: str, status: int) -> Exception:
    from botocore.exceptions import ClientError

    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: OSError(errno.EISDIR, ""), "one"),
        (lambda: OSError(errno.ENAMETOOLONG, ""), "one"),
        (lambda: OSError(errno.ENOSPC, ""), "all"),
        (lambda: OSError(errno.EROFS, ""), "all"),
        (lambda: OSError(errno.EACCES, ""), "all"),
        (lambda: client_error("KeyTooLongError", 400), "one"),
        (lambda: client_error("AccessDenied", 403), "all"),
        (lambda: client_error("NoSuchBucket", 404), "all"),
        (lambda: client_error("SlowDown", 503), "later"),
        (lambda: client_error("InternalError", 500), "later"),
        (lambda: client_error("TooManyRequests", 429), "later"),
        (lambda: None, "one"),
    ],
)
def test_what_a_failed_write_says_of_the_others(make: Callable[[], Any], expected: str) -> None:
    assert scope(caused(make())) == expected


def test_a_full_disk_ends_the_run_and_the_rest_follows_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", {f"{n}.png": png(n) for n in range(12)})
    settings, output = run_settings(source), str(tmp_path / "out")
    write, room = storage.write_bytes, [6]

    def full(uri: str, data: bytes) -> None:
        if uri.endswith(".png"):
            room[0] -= 1
            if room[0] < 0:
                raise caused(OSError(errno.ENOSPC, "")) from OSError(errno.ENOSPC, "")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(StorageError, match="then run the same command again"):
        restore_here(output, settings)
    assert len(manifest(output)) == 0
    monkeypatch.setattr(storage, "write_bytes", write)
    execution = LocalExecution(output, settings)
    restore_here(output, settings, execution)

    assert len(execution.read) == 8, "the four of the unit that was recorded are not done again"
    restore_here(str(tmp_path / "whole"), settings)
    assert outputs(output) == outputs(str(tmp_path / "whole"))


def test_keys_of_outputs_are_safe(tmp_path: Path) -> None:
    names = ["a b.png", "ü.png", "%41.png", "a\nb.png", "#?&.png", "..png", "x" * 120 + ".png"]
    source = folder(tmp_path / "in", {name: png() for name in names})
    (Path(source) / os.fsdecode(b"\xff\xfe.png")).write_bytes(png())
    restore_here(str(tmp_path / "out"), run_settings(source))

    rows = manifest(str(tmp_path / "out"))
    assert {row.status for row in rows.values()} == {"restored"}
    assert len(outputs(str(tmp_path / "out"))) == len(names) + 1
    assert all(re.fullmatch(r"[^\x00-\x1f]+", key) for key in rows)
    assert {"a b.png", "ü.png", "#?&.png"} <= set(rows)


def test_an_encoded_result_has_the_settings_quality(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"a.png": encode_image(tiny.blob_faces(1, side=64)[0], "png")})
    sizes = []
    for quality in (30, 95):
        output = str(tmp_path / str(quality))
        restore_here(output, run_settings(source, format="jpeg", quality=quality))
        (data,) = outputs(output).values()
        sizes.append(len(data))
    assert sizes[0] < sizes[1]
