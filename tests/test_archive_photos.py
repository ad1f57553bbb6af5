"""Archives of whole photos, and files of photos, with the real model at tiny size and a detector that sees marks."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldbfr.archive.files import FileRestorer, details_file, plan_files
from ldbfr.archive.settings import RestoreSettings, RunSettings
from ldbfr.archive.steps import UnitRestorer
from ldbfr.errors import ConfigError, InputError, LDBFRError, StorageError
from ldbfr.faces import Face
from ldbfr.images import Pixels, decode_image, encode_image
from ldbfr.metadata import read_provenance
from ldbfr.photos import FaceFinder, PhotoRestorer, PhotoSettings
from tests import tiny
from tests.archiving import LocalExecution, folder, manifest, outputs, pipeline, restore_here, run_settings

SHIFTS = ((12, 12), (22, 12), (17, 17), (13, 22), (21, 22))
"""Landmarks of a face, from its box's corner."""
BOX = 34


def seen(photo: Pixels) -> list[Face]:
    """A face wherever the top row of the photo is white: the faces lie side by side below."""
    lefts = [left for left in range(0, photo.shape[1] - BOX, BOX) if (photo[0, left] == 255).all()]
    return [Face((left, 4, BOX, BOX), tuple((left + x, 4 + y) for x, y in SHIFTS), 0.9) for left in lefts]


def photo(faces: int, number: int = 0) -> bytes:
    """A photo with so many faces, 44 px high."""
    width = max(1, faces) * BOX + 10
    pixels = np.random.default_rng(number).integers(90, 120, (44, width, 3), dtype=np.uint8)
    for face in range(faces):
        pixels[4 : 4 + 32, face * BOX : face * BOX + 32] = tiny.blob_faces(1, side=32, seed=10 * number + face)[0]
        pixels[0, face * BOX] = 255
    return encode_image(pixels, "png")


PHOTOS = {"none.png": photo(0), "one.png": photo(1), "sub/three.png": photo(3, 1), "two.png": photo(2, 2)}
FACES = {"none.png": 0, "one.png": 1, "sub/three.png": 3, "two.png": 2}


def settings_for(*inputs: str, photos: PhotoSettings | None = None, **options: Any) -> RunSettings:
    """Of a run over photos."""
    wanted = photos or PhotoSettings(sharp_faces="restore")
    return run_settings(*inputs, photos=wanted, shard_images=10, batch_size=4, **options)


def run(output: Path, settings: RunSettings, model: Any = None) -> LocalExecution:
    """Restore an archive of photos in this process."""
    photos = settings.restore.photos
    assert photos is not None
    finder = FaceFinder(seen, photos, "tight", tiny.SIDE)
    restorer = UnitRestorer(model or pipeline(), settings.restore, settings.batch_size)
    execution = LocalExecution(str(output), settings, restorer, finder)
    restore_here(str(output), settings, execution)
    return execution


class Counting:
    """The pipeline, which notes its batches; it refuses some faces."""

    def __init__(self, bad: bytes = b"") -> None:
        self.sizes: list[int] = []
        self.bad = bad

    def __call__(self, faces: np.ndarray, **options: Any) -> Any:
        self.sizes.append(len(faces))
        if self.bad and any(face.tobytes() == self.bad for face in faces):
            raise RuntimeError("the network refuses")
        return pipeline()(faces, **options)


def test_every_photo_has_its_row_and_its_faces(tmp_path: Path) -> None:
    settings = settings_for(folder(tmp_path / "in", PHOTOS), first_stage=True, side_by_side=True, num_samples=2)
    run(tmp_path / "out", settings)
    rows = manifest(str(tmp_path / "out"))

    assert {key: row.status for key, row in rows.items()} == dict.fromkeys(PHOTOS, "restored")
    assert {key: row.faces for key, row in rows.items()} == FACES
    assert rows["none.png"].note == "no face found"
    for key, row in rows.items():
        details = json.loads(str(row.face_details))
        assert len(details) == FACES[key]
        assert all(face["outcome"] == "restored" and face["uncertainty"] > 0 for face in details)
        assert (row.width, row.height) == decode_image(PHOTOS[key], name=key).shape[1::-1]
    written = outputs(str(tmp_path / "out"))
    assert set(written) == {f"{place}{key}" for key in PHOTOS for place in ("", "_first-stage/", "_side-by-side/")}
    both = decode_image(written["_side-by-side/two.png"], name="both")
    assert np.array_equal(both[:, : both.shape[1] // 2], decode_image(PHOTOS["two.png"], name="two"))


def test_around_the_faces_nothing_changes_and_in_them_something_does(tmp_path: Path) -> None:
    run(tmp_path / "out", settings_for(folder(tmp_path / "in", PHOTOS)))
    written = outputs(str(tmp_path / "out"))

    assert written["none.png"] == PHOTOS["none.png"], "a photo without faces is copied byte for byte"
    for key, count in FACES.items():
        before, after = (decode_image(files[key], name=key) for files in (PHOTOS, written))
        changed = (before != after).any(axis=2)
        assert not changed[0].any()
        assert not changed[:, count * BOX + 6 :].any()
        assert changed.any() == bool(count)


def test_faces_of_all_photos_share_micro_batches(tmp_path: Path) -> None:
    model = Counting()
    run(tmp_path / "out", settings_for(folder(tmp_path / "in", PHOTOS)), model)

    assert model.sizes == [4, 2]


def test_a_photo_with_a_face_that_the_model_refuses_fails_alone(tmp_path: Path) -> None:
    settings = settings_for(folder(tmp_path / "in", PHOTOS))
    assert settings.restore.photos is not None
    finder = FaceFinder(seen, settings.restore.photos, "tight", tiny.SIDE)
    from ldbfr.photos import decode_photo

    bad = finder(decode_photo(PHOTOS["sub/three.png"], name="three")).chosen()[1]
    run(tmp_path / "out", settings, Counting(bad.tobytes()))
    rows = manifest(str(tmp_path / "out"))

    assert {key for key, row in rows.items() if row.status == "failed"} == {"sub/three.png"}
    assert rows["sub/three.png"].cause == "model"
    assert "the network refuses" in str(rows["sub/three.png"].reason)
    assert not (tmp_path / "out" / "sub").exists()


def test_a_photo_without_faces_may_be_a_failure(tmp_path: Path) -> None:
    photos = PhotoSettings(no_face="failure", sharp_faces="restore")
    run(tmp_path / "out", settings_for(folder(tmp_path / "in", PHOTOS), photos=photos))
    row = manifest(str(tmp_path / "out"))["none.png"]

    assert (row.status, row.cause, row.output) == ("failed", "no face", None)
    assert "give its box" in str(row.reason)


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_shards_of_photos_are_written_twice_alike(tmp_path: Path, layout: str) -> None:
    source = folder(tmp_path / "in", PHOTOS)
    for name in ("a", "b"):
        run(tmp_path / name, settings_for(source, layout=layout))

    assert outputs(str(tmp_path / "a")) == outputs(str(tmp_path / "b"))


# ---- files, without an archive ----


def restorer_of(photos: PhotoSettings | None, details: StringIO | None = None, **options: Any) -> FileRestorer:
    """Of files, with the tiny model."""
    overwrite = options.pop("overwrite", False)
    settings = RestoreSettings.resolve(tiny.preset(), **{"steps": 2, "photos": photos, **options})
    model = pipeline()
    restore = (
        PhotoRestorer(model, photos, detector=seen, batch_size=4, **settings.pipeline_options()) if photos else None
    )
    return FileRestorer(model, settings, restore, 4, overwrite, details)


def files_of(path: Path) -> dict[str, bytes]:
    """A folder's files."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


RESTORE = PhotoSettings(sharp_faces="restore")


def test_files_become_what_the_archive_job_makes_of_them(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", PHOTOS)
    settings = settings_for(source)
    run(tmp_path / "job", settings)
    work = restorer_of(RESTORE)
    work.pipeline = _with_digest(settings.weights)
    tally = work(plan_files([Path(source)], tmp_path / "out", "same", side_by_side=False))

    assert (tally.restored, tally.failed) == (4, 0)
    assert files_of(tmp_path / "out") == outputs(str(tmp_path / "job"))


def _with_digest(digest: str) -> Any:
    """The tiny pipeline, under the name that the archive's settings give it."""
    model = tiny.new_pipeline()
    model.weights_digest = digest
    return model


def test_what_is_done_is_passed_by_and_what_is_something_else_is_kept(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", PHOTOS | {"broken.png": b"nothing"})
    jobs = plan_files([Path(source)], tmp_path / "out", "same", side_by_side=False)
    first = restorer_of(RESTORE)(jobs)
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / "one.png").write_bytes(b"my own file")

    again = restorer_of(RESTORE)(jobs)

    assert (first.restored, first.failed, first.skipped) == (4, 1, 0)
    assert (again.restored, again.failed, again.skipped) == (1, 2, 2), "a copy is looked at again"
    assert any("one.png is there already" in line and "--overwrite" in line for line in again.failures)
    assert (tmp_path / "out" / "one.png").read_bytes() == b"my own file"
    assert restorer_of(RESTORE, overwrite=True)(jobs).restored == 4
    assert files_of(tmp_path / "out") == before
    other = restorer_of(RESTORE, seed=3)(jobs)
    assert (other.restored, other.skipped, other.failed) == (1, 0, 4)


def test_results_say_where_they_come_from(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", PHOTOS)
    lines = StringIO()
    work = restorer_of(RESTORE, lines)
    work(plan_files([Path(source)], tmp_path / "out", "png", side_by_side=True))

    told = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [len(line["faces"]) for line in told] == list(FACES.values())
    assert f"  {source}/none.png: no face found" in work.summary()
    assert "  1 of the restored had nothing to restore, and are as they were" in work.summary()
    provenance = read_provenance((tmp_path / "out" / "one.png").read_bytes(), name="one")
    assert provenance == work.about(PHOTOS["one.png"])
    assert set(files_of(tmp_path / "out" / "_side-by-side")) == set(PHOTOS)


def test_aligned_faces_are_restored_as_a_whole(tmp_path: Path) -> None:
    faces = {f"{n}.png": encode_image(face, "png") for n, face in enumerate(tiny.blob_faces(6))}
    source = folder(tmp_path / "in", faces | {"5.png": b"nothing"})
    tally = restorer_of(None)(plan_files([Path(source)], tmp_path / "out", "same", side_by_side=False))

    assert (tally.restored, tally.failed) == (5, 1)
    expected = pipeline()(tiny.blob_faces(6)[:4], num_inference_steps=2).images
    for number in range(4):
        written = decode_image((tmp_path / "out" / f"{number}.png").read_bytes(), name="face")
        assert np.abs(written.astype(int) - expected[number]).max() <= 1


def test_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = Path(folder(tmp_path / "in", PHOTOS))
    one = source / "one.png"
    beside = source / "x-side-by-side.png"
    beside.write_bytes(PHOTOS["one.png"])
    (tmp_path / "empty").mkdir()
    for inputs, output, error, text in (
        ([tmp_path / "missing.png"], tmp_path / "out", InputError, "missing.png: no such file or folder"),
        ([tmp_path / "empty"], tmp_path / "out", InputError, "no images in it"),
        ([source], tmp_path / "out.png", ConfigError, "name of an image is for one input file"),
        ([one], one, ConfigError, "is the input, and would be overwritten"),
        ([source], source, ConfigError, "is an input, and would be overwritten"),
        ([beside], source / "x.png", ConfigError, "is the input, and would be overwritten"),
        ([one, one], tmp_path / "out", ConfigError, "would both become"),
        ([source, one], tmp_path / "out", ConfigError, "would both become"),
    ):
        with pytest.raises(error, match=text.replace("(", r"\(")):
            plan_files(inputs, output, "same", side_by_side=True)
    with pytest.raises(ConfigError, match="is named as jpeg"):
        plan_files([one], tmp_path / "out.jpg", "png", side_by_side=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="it is a file, expected a folder"):
        plan_files([source], tmp_path / "file", "same", side_by_side=False)
    with pytest.raises(StorageError, match="--details"), details_file(tmp_path / "file" / "below"):
        pass
    assert plan_files([one], tmp_path / "out.jpg", "same", side_by_side=True)[0].side_by_side == (
        tmp_path / "out-side-by-side.jpg"
    )


def test_an_output_below_the_input_is_no_input(tmp_path: Path) -> None:
    source = Path(folder(tmp_path / "in", PHOTOS))
    for _ in range(2):
        jobs = plan_files([source], source / "restored", "same", side_by_side=True)
        assert sorted(job.source.name for job in jobs) == ["none.png", "one.png", "three.png", "two.png"]
        restorer_of(RESTORE)(jobs)


def test_a_folder_that_cannot_be_written_ends_it(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", PHOTOS)
    jobs = plan_files([Path(source)], tmp_path / "out", "same", side_by_side=False)
    (tmp_path / "out").write_bytes(b"a file where the folder should be")
    with pytest.raises(LDBFRError):
        restorer_of(RESTORE)(jobs)


def test_other_settings_look_again_at_what_was_copied(tmp_path: Path) -> None:
    """A photo of sharp faces is copied; asked to restore them all the same, it is."""
    source = Path(folder(tmp_path / "in", {"one.png": PHOTOS["one.png"]}))
    jobs = plan_files([source], tmp_path / "out", "same", side_by_side=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "one.png").write_bytes(PHOTOS["one.png"])

    assert restorer_of(RESTORE)(jobs).restored == 1
    assert (tmp_path / "out" / "one.png").read_bytes() != PHOTOS["one.png"]


def test_a_picture_side_by_side_is_not_put_over_another_file(tmp_path: Path) -> None:
    source = Path(folder(tmp_path / "in", {"one.png": PHOTOS["one.png"]}))
    mine = tmp_path / "out" / "_side-by-side" / "one.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    tally = restorer_of(RESTORE)(plan_files([source], tmp_path / "out", "same", side_by_side=True))

    assert tally.failed == 1
    assert mine.read_bytes() == b"mine"


def test_what_was_told_stays_when_the_command_goes_on(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with details_file(tmp_path / "d.jsonl") as file:
            assert file is not None
            file.write(text + "\n")
    assert (tmp_path / "d.jsonl").read_text() == "first\nsecond\n"
