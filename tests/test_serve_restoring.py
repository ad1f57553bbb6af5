"""The endpoint's restoring side without Ray: the command line's own bytes, batches, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import io
import pickle
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldbfr.cli import main
from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.evaluation.metrics import IdentityModel
from ldbfr.faces import DETECTOR_FILE
from ldbfr.faces.face import Face
from ldbfr.faces.selection import face_of_box
from ldbfr.images import Pixels, decode_image, encode_image
from ldbfr.pipeline import LDBFRPipeline
from serve.batching import Line, Pace, Sampling, Waiting
from serve.model import MARGIN, LocalFaceModel
from serve.model_info import describe, license_of
from serve.protocol import (
    DeadlineExceeded,
    FaceJob,
    FacePreview,
    FaceResult,
    ModelInfo,
    OtherModelError,
    Overloaded,
    Preview,
    RestorationOptions,
    Restored,
)
from serve.restoring import PhotoService, Threads
from tests import tiny
from tests.test_metadata import saved

DEFAULTS = {
    "steps": 4,
    "condition_scale": 1.0,
    "start_step": 1000,
    "scheduler": "dpm_solver",
    "color_correction": False,
}
INFO = ModelInfo("tiny", tiny.SIDE, "ffhq", "", DEFAULTS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are faster so, and give the same bits in any batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def without_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """dlib's embeddings, which no byte of a result depends on, would take most of the time."""
    monkeypatch.setattr(IdentityModel, "is_installed", lambda: False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny.new_pipeline().save_pretrained(folder)
    return folder


class Slow:
    """The tiny pipeline: how many faces each call had, and, between two steps, whatever a test wants to happen."""

    def __init__(self, between: Callable[[int], None] = lambda step: None) -> None:
        self.real = tiny.pipeline()
        self.preset, self.side, self.dtype = self.real.preset, self.real.side, self.real.dtype
        self.latent_vqgan, self.check_settings = self.real.latent_vqgan, self.real.check_settings
        self.sizes: list[int] = []
        self.steps: list[int] = []
        self.between = between

    def __call__(self, faces: np.ndarray, *, callback_on_step_end: Any = None, **options: Any) -> Any:
        self.sizes.append(len(faces))

        def after(step: int, timestep: int, latents: torch.Tensor) -> None:
            self.steps.append(step)
            self.between(step)
            if callback_on_step_end is not None:
                callback_on_step_end(step, timestep, latents)

        return self.real(faces, callback_on_step_end=after, **options)


class Held(Slow):
    """Says when it has begun, and goes no further than the first step until it is told."""

    def __init__(self) -> None:
        super().__init__(self.hold)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def hold(self, step: int) -> None:
        """Between two steps."""
        self.begun.set()
        self.go_on.wait(10)


def local(pipeline: Any = None, **options: Any) -> LocalFaceModel:
    """A model over the tiny pipeline."""
    return LocalFaceModel(pipeline or tiny.pipeline(), INFO, **options)


def job(count: int = 1, seed: int = 0, faces: int = 0, **options: Any) -> FaceJob:
    """Some faces; `faces` draws others."""
    return FaceJob(tiny.blob_faces(count, seed=faces), "ffhq", steps=options.pop("steps", 2), seed=seed, **options)


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def run(work: Awaitable[Any]) -> Any:
    async def wrapped() -> Any:
        return await work

    return asyncio.run(wrapped())


async def collected(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


# ---- the same bytes as the command line ----

UPLOADS: dict[str, bytes] = {
    "a.png": encode_image(tiny.blob_faces(1, side=70)[0], "png"),
    "wide.jpg": saved(Image.fromarray(tiny.blob_faces(1, side=90, seed=3)[0][20:70]), "JPEG", quality=90),
    "grey.webp": saved(Image.fromarray(tiny.blob_faces(1, side=48, seed=4)[0]).convert("L"), "WEBP"),
    "clear.png": saved(Image.fromarray(tiny.blob_faces(1, seed=5)[0]).convert("RGBA"), "PNG"),
    "scan.bmp": saved(Image.fromarray(tiny.blob_faces(1, side=40, seed=6)[0]), "BMP"),
}


def ldbfr_restore(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["ldbfr", "restore", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code, caught.value.code


def service_of(weights: Path, **options: Any) -> PhotoService:
    """The real service over weights from a folder."""
    pipeline: LDBFRPipeline = LDBFRPipeline.from_pretrained(weights)
    info = describe(pipeline.preset, pipeline.weights_digest, str(weights))
    return PhotoService(LocalFaceModel(pipeline, info), **options)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, ()),
        ({"steps": 0}, ("--steps", "0")),
        ({"steps": 3, "seed": 7, "condition_scale": 0.5}, ("--steps", "3", "--seed", "7", "--condition-scale", "0.5")),
        ({"format": "jpeg", "quality": 80, "samples": 2}, ("--format", "jpeg", "--quality", "80", "--samples", "2")),
    ],
)
def test_aligned_faces_are_the_command_lines_own(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    for name, data in UPLOADS.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    own = ("--weights", weights, "--faces", "none", "--batch-size", "1")
    ldbfr_restore(monkeypatch, tmp_path / "in", "-o", tmp_path / "out", *own, *arguments)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(written) == len(UPLOADS)

    async def restored() -> dict[str, Restored]:
        service, asked = service_of(weights), RestorationOptions(mode="aligned", **options)
        return {name: await service.restore(data, asked, soon()) for name, data in UPLOADS.items()}

    results = run(restored())
    for name, result in results.items():
        (key,) = [key for key in written if key.startswith(name.partition(".")[0])]
        assert result.image == written[key], name
        assert (result.width, result.height) == (tiny.SIDE, tiny.SIDE)
        assert set(result.timings) == {"decode", "queue", "model", "encode"}
        assert len(result.samples) == (options.get("samples", 0))
        if result.samples:
            assert result.samples[0] == result.image
            assert result.samples[0] != result.samples[1]
            assert result.uncertainty is not None
            assert Image.open(io.BytesIO(result.uncertainty)).size == (tiny.SIDE, tiny.SIDE)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, ()),
        ({"strength": 0.4, "seed": 3, "format": "webp"}, ("--strength", "0.4", "--seed", "3", "--format", "webp")),
        ({"samples": 2, "format": "png"}, ("--samples", "2", "--format", "png")),
        ({"boxes": ((46, 54, 23, 30),)}, ("--box", "46,54,23,30")),
    ],
)
def test_photos_are_the_command_lines_own(
    weights: Path,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.setenv(DETECTOR_FILE.variable, str(shared_data / "weights" / DETECTOR_FILE.name))
    original = Image.open(shared_data / "real-lq" / "photos" / "01.jpg")
    source = tmp_path / "photo.jpg"
    source.write_bytes(saved(original.resize((original.width // 2, original.height // 2)), "JPEG", quality=90))
    own = ("--weights", weights, "--steps", "2")
    ldbfr_restore(monkeypatch, source, "-o", tmp_path / "out", *own, *arguments)
    (written,) = (tmp_path / "out").iterdir()

    asked = RestorationOptions(steps=2, **options)
    result: Restored = run(service_of(weights).restore(source.read_bytes(), asked, soon()))

    assert result.image == written.read_bytes()
    size = decode_image(result.image, name="result").shape
    assert (result.height, result.width) == size[:2]
    outcomes = [face["outcome"] for face in result.faces]
    assert outcomes.count("restored") == len(options.get("boxes", range(4)))
    assert len(outcomes) == 4
    assert set(result.timings) == {"decode", "detect", "queue", "model", "paste", "encode"}
    if options.get("samples"):
        assert result.uncertainty is not None
        grey = np.asarray(Image.open(io.BytesIO(result.uncertainty)))
        assert grey.shape == size[:2]
        assert 0 < np.count_nonzero(grey) < grey.size, "only where faces are"
        assert result.samples == ()


# ---- photos with given faces ----

FACES = [face_of_box((10, 10, 40, 50)), face_of_box((60, 20, 30, 40))]


def photo(seed: int = 0) -> bytes:
    return encode_image(tiny.blob_faces(1, side=120, seed=seed)[0], "png")


def found(pixels: Pixels) -> list[Face]:
    return list(FACES)


def test_the_faces_of_a_photo_are_told_without_restoring_any() -> None:
    pipeline = Slow()
    result = run(PhotoService(local(pipeline), detector=found).find(photo(), soon()))

    assert (result.width, result.height) == (120, 120)
    assert [face["box"] for face in result.faces] == [[10, 10, 40, 50], [60, 20, 30, 40]]
    assert all(len(face["landmarks"]) == 5 for face in result.faces)
    assert pipeline.sizes == []


def test_a_photo_without_faces_comes_back_as_it_was() -> None:
    data = photo()
    result = run(PhotoService(local(), detector=lambda _: []).restore(data, RestorationOptions(), soon()))

    assert result.image == data
    assert result.notes == "no face found"
    assert result.faces == []


def test_previews_come_first_then_the_very_result() -> None:
    async def both() -> tuple[list[Any], Restored]:
        service, options = PhotoService(local(), detector=found), RestorationOptions(steps=4)
        return await collected(service.stream(photo(), options, soon())), await service.restore(
            photo(), options, soon()
        )

    events, alone = run(both())
    *previews, result = events
    assert isinstance(result, Restored)
    assert result.image == alone.image
    assert previews, "at least the first stage"
    assert all(isinstance(preview, Preview) and preview.steps == 4 for preview in previews)
    steps = [preview.step for preview in previews]
    assert steps[0] == 0
    assert steps == sorted(set(steps))
    assert steps[-1] < 4
    shown = decode_image(previews[0].image, name="preview")
    before = decode_image(photo(), name="photo")
    changed = np.abs(shown.astype(int) - before).max(axis=2) > 40
    assert changed.any()
    assert not changed[100:, :8].any(), "only faces change"


def test_previews_of_a_large_photo_are_small() -> None:
    data = encode_image(tiny.blob_faces(1, side=1_500)[0], "jpeg")
    service = PhotoService(local(), detector=lambda _: [face_of_box((200, 200, 400, 500))])
    *previews, _ = run(collected(service.stream(data, RestorationOptions(steps=1), soon())))
    assert decode_image(previews[0].image, name="preview").shape == (1_024, 1_024, 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "aligned", "boxes": ((1, 2, 30, 40),)}, "boxes with mode aligned"),
        ({"mode": "aligned", "strength": 0.5}, r"strength 0\.5 with mode aligned"),
        ({"steps": 0, "samples": 2}, "samples 2 with steps 0"),
        ({"boxes": ((1, 2, 0, 40),)}, r"box \(1\.0, 2\.0, 0\.0, 40\.0\): expected left, top, width, height"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], text: str) -> None:
    service = PhotoService(local(), detector=found)
    with pytest.raises(ConfigError, match=text):
        run(service.restore(photo(), RestorationOptions(**options), soon()))


def test_an_upload_that_is_no_image() -> None:
    service = PhotoService(local(), detector=found)
    for mode in ("photo", "aligned"):
        with pytest.raises(InputError, match="the image: not a supported image"):
            run(service.restore(b"GIF89a....", RestorationOptions(mode=mode), soon()))


def test_without_a_detector_aligned_faces_are_restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DETECTOR_FILE.variable, str(tmp_path / "missing.onnx"))

    async def tried() -> None:
        service = PhotoService(local())
        assert await service.ready()
        for work in (service.find(photo(), soon()), service.restore(photo(), RestorationOptions(), soon())):
            with pytest.raises(ConfigError, match="ask for mode aligned") as caught:
                await work
            assert str(tmp_path) not in str(caught.value), "no path of the machine goes to clients"
        aligned = RestorationOptions(mode="aligned", steps=1)
        assert (await service.restore(photo(), aligned, soon())).width == tiny.SIDE

    run(tried())


def test_the_detector_is_looked_for_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its file may be missing then, and come later: it is looked for again, but not at every request."""
    monkeypatch.setenv(DETECTOR_FILE.variable, str(tmp_path / "missing.onnx"))
    looked = []

    def load(service: PhotoService) -> None:
        looked.append(service)
        if len(looked) == 1:
            raise WeightsError("not there yet")
        service._detector = found

    async def tried() -> None:
        service = PhotoService(local())
        service.start()
        for _ in range(3):
            with pytest.raises(ConfigError, match="ask for mode aligned"):
                await service.find(photo(), soon())
        assert len(looked) == 1
        monkeypatch.setattr("serve.restoring.LOOK_AGAIN_SECONDS", 0.0)
        results = await asyncio.gather(*(service.find(photo(), soon()) for _ in range(3)))
        assert len(looked) == 2
        assert all(len(result.faces) == 2 for result in results)
        await service.close()

    monkeypatch.setattr(PhotoService, "load_detector", load)
    run(tried())


def test_yunet_is_never_run_by_two_threads_at_once(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DETECTOR_FILE.variable, str(shared_data / "weights" / DETECTOR_FILE.name))
    data = (shared_data / "real-lq" / "photos" / "03.jpg").read_bytes()

    async def many() -> list[Any]:
        services = [PhotoService(local()) for _ in range(3)]
        return await asyncio.gather(*(service.find(data, soon()) for service in services for _ in range(3)))

    first, *rest = run(many())
    assert first.faces
    assert all(one.faces == first.faces for one in rest)


# ---- batches ----


def test_requests_share_batches_and_get_what_they_get_alone() -> None:
    async def together() -> list[FaceResult]:
        model = local(pipeline, batch_faces=8, batch_wait=0.2)
        return await asyncio.gather(*(model.restore(job(faces=number), soon()) for number in range(8)))

    pipeline = Slow()
    results = run(together())
    assert pipeline.sizes == [8]
    for number, result in enumerate(results):
        alone = tiny.pipeline()(tiny.blob_faces(1, seed=number), num_inference_steps=2).images
        assert np.abs(result.images.astype(int) - alone).max() <= 1
        assert (result.batch_faces, result.images.shape) == (8, alone.shape)


def test_only_like_requests_share_a_batch_and_none_waits_for_ever() -> None:
    async def together() -> list[FaceResult]:
        model = local(pipeline, batch_faces=4, batch_wait=0.1)
        jobs = [job(seed=number % 2, samples=1 + (number == 5)) for number in range(6)]
        return await asyncio.gather(*(model.restore(one, soon()) for one in jobs))

    pipeline = Slow()
    results = run(together())
    assert [result.batch_faces for result in results] == [3, 2, 3, 2, 3, 1]
    assert results[5].samples is not None
    assert results[5].samples.shape == (2, 1, tiny.SIDE, tiny.SIDE, 3)
    assert results[0].samples is None


def test_a_crowd_goes_through_in_parts() -> None:
    async def crowd() -> tuple[FaceResult, list[Any]]:
        model = local(pipeline, batch_faces=4)
        one = job(10, samples=2)
        return await model.restore(one, soon()), await collected(model.stream(one, soon()))

    pipeline = Slow()
    result, events = run(crowd())
    assert pipeline.sizes[:3] == [4, 4, 2]
    alone = tiny.pipeline()(tiny.blob_faces(10), num_inference_steps=2, num_samples=2)
    assert np.abs(result.images.astype(int) - alone.images).max() <= 1
    assert result.samples is not None
    assert result.samples.shape == (2, 10, tiny.SIDE, tiny.SIDE, 3)
    assert result.uncertainty.shape == (10, tiny.SIDE, tiny.SIDE)
    *previews, last = events
    assert np.array_equal(last.images, result.images)
    steps = [preview.step for preview in previews]
    assert steps == sorted(steps)
    assert all(preview.steps == 6 and preview.images.shape == (10, 32, 32, 3) for preview in previews)


def line_of(*entries: tuple[int, int]) -> Line:
    """A line of (faces, seed)."""
    line = Line()
    for count, seed in entries:
        faces = np.zeros((count, 4, 4, 3), np.uint8)
        answer: asyncio.Future[FaceResult] = asyncio.get_running_loop().create_future()
        line.add(Waiting(faces, Sampling(2, seed, 1.0, 1), soon(), answer))
    return line


def test_the_line_is_first_come_first_served() -> None:
    async def served() -> None:
        line = line_of((2, 0), (3, 1), (3, 0), (2, 0), (4, 1))
        assert [len(one.faces) for one in line.take(4)] == [2, 2], "the 3 do not fit, the next 2 do"
        assert [len(one.faces) for one in line.take(4)] == [3], "the first of those left, whatever its seed"
        assert [len(one.faces) for one in line.take(4)] == [3]
        assert [len(one.faces) for one in line.take(4)] == [4]
        assert line.take(4) == []

    run(served())


def test_the_model_says_when_faces_are_not_its_own() -> None:
    wrong = [FaceJob(tiny.blob_faces(1, side=64), "ffhq"), FaceJob(tiny.blob_faces(1), "tight")]
    for one in wrong:
        with pytest.raises(OtherModelError, match="faces of 32 px in the ffhq frame, which tiny takes") as caught:
            run(local().restore(one, soon()))
        assert pickle.loads(pickle.dumps(caught.value)).model == INFO
    refused = pickle.loads(pickle.dumps(Overloaded("full", 7.0)))
    assert (str(refused), refused.retry_after) == ("full", 7.0)


def test_faces_are_cut_out_again_for_weights_that_came_in_between() -> None:
    """While weights are replaced the service believes in the old ones; the answer names those that made it."""

    async def replaced() -> Restored:
        model = local()
        service = PhotoService(model, detector=found)
        service._info = ModelInfo("old", 64, "tight", "old", INFO.defaults)
        return await service.restore(photo(), RestorationOptions(steps=1), soon())

    fresh = run(PhotoService(local(), detector=found).restore(photo(), RestorationOptions(steps=1), soon()))
    assert run(replaced()).image == fresh.image


# ---- deadlines, cancellation, overload ----


def test_what_nobody_waits_for_stops_between_two_steps() -> None:
    async def given_up() -> None:
        model = local(pipeline)
        task = asyncio.create_task(model.restore(job(steps=30), soon()))
        await asyncio.to_thread(pipeline.begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pipeline.go_on.set()
        assert len((await model.restore(job(steps=1), soon())).images) == 1, "the model goes on with others"

    pipeline = Held()
    run(given_up())
    assert len(pipeline.steps) == 1 + 1, "a step of the first, and the second request's"


def test_one_of_a_batch_may_go_without_harm_to_the_others() -> None:
    async def given_up() -> FaceResult:
        model = local(pipeline, batch_wait=0.05)
        goes, stays = (asyncio.create_task(model.restore(job(faces=number), soon())) for number in range(2))
        await asyncio.to_thread(begun.wait)
        goes.cancel()
        return await stays

    begun = threading.Event()
    pipeline = Slow(lambda step: begun.set())
    assert run(given_up()).batch_faces == 2


def test_a_closed_stream_stops_the_model() -> None:
    async def closed() -> None:
        model = local(pipeline)
        async with aclosing(model.stream(job(steps=40), soon())) as events:
            async for _ in events:
                break
        await model.restore(job(steps=1), soon())

    pipeline = Slow(lambda step: time.sleep(0.01))
    run(closed())
    assert len(pipeline.steps) < 20


def test_a_request_whose_time_is_up_is_answered_at_once_and_not_restored() -> None:
    async def late() -> None:
        model = local(pipeline)
        with pytest.raises(DeadlineExceeded, match="the time for this request ran out"):
            await model.restore(job(), time.monotonic() - 1)
        with pytest.raises(DeadlineExceeded):
            await collected(model.stream(job(), time.monotonic() - 1))
        first = asyncio.create_task(model.restore(job(), soon()))
        await asyncio.to_thread(pipeline.begun.wait)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):  # it waits in line, and its time runs out there
            await model.restore(job(seed=1), soon(0.2))
        assert time.monotonic() - started < 1
        pipeline.go_on.set()
        await first
        await model.restore(job(seed=2), soon())

    pipeline = Held()
    run(late())
    assert pipeline.sizes == [1, 1]


def test_what_could_not_be_done_in_time_is_refused_at_once() -> None:
    async def crowded() -> None:
        model = local(pipeline, batch_faces=1)
        model.pace.learn(job().steps or 0, 2.0)  # a second a step
        with pytest.raises(DeadlineExceeded, match="1 faces in 40 steps, 2 times, would take about 82 s, of which 10"):
            await model.restore(job(steps=40, samples=2), soon(10.5))
        first = asyncio.create_task(model.restore(job(), soon()))
        await asyncio.to_thread(pipeline.begun.wait)
        second = asyncio.create_task(model.restore(job(), soon(20)))
        await asyncio.sleep(0)
        started = time.monotonic()
        with pytest.raises(Overloaded, match=r"the model has \d+ s of work before this request, which has 5 s") as busy:
            await model.restore(job(), soon(5.5))
        assert time.monotonic() - started < 0.5
        promised = 3 * 4 * MARGIN  # three faces of four seconds, with what an estimate may be off
        assert busy.value.retry_after == pytest.approx(promised - 5.5, abs=0.6)
        pipeline.go_on.set()
        await asyncio.gather(first, second)

    pipeline = Held()
    run(crowded())


def test_in_a_busy_time_a_request_is_told_by_the_batch_that_others_fill() -> None:
    """One face would be out after 8 s, but the batch that it is in has room for four, and comes in a busy time full."""

    async def crowded() -> None:
        model = local(pipeline, batch_faces=4)
        model.pace.learn(job().steps or 0, 2.0)  # four seconds a face
        first = asyncio.create_task(model.restore(job(), soon()))
        await asyncio.to_thread(pipeline.begun.wait)
        full = (4 + 4 * 4) * MARGIN
        with pytest.raises(Overloaded, match=r"left and may be through after \d+ s with others in its batch; ask"):
            await model.restore(job(), soon(full - 0.5))
        second = asyncio.create_task(model.restore(job(), soon(full + 2)))
        await asyncio.sleep(0)
        pipeline.go_on.set()
        await asyncio.gather(first, second)

    pipeline = Held()
    run(crowded())


def test_in_a_busy_time_a_request_of_another_kind_is_told_by_its_own_batch() -> None:
    """Nobody shares it, so it is not made to wait for what a full one takes, which would be never."""

    async def crowded() -> None:
        model = local(pipeline, batch_faces=4)
        model.pace.learn(job().steps or 0, 2.0)  # a second a step: four seconds a face
        first = asyncio.create_task(model.restore(job(), soon()))
        await asyncio.to_thread(pipeline.begun.wait)
        long = job(steps=4, samples=2)  # ten seconds; four of them take forty
        promised = (4 + 10) * MARGIN
        with pytest.raises(Overloaded, match=r"s left and may be through after \d+ s; ask again"):
            await model.restore(long, soon(promised - 2))
        second = asyncio.create_task(model.restore(long, soon(promised + 2)))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="with others in its batch"):
            await model.restore(long, soon(promised + 15))
        pipeline.go_on.set()
        await asyncio.gather(first, second)

    pipeline = Held()
    run(crowded())


def test_the_line_has_an_end() -> None:
    async def crowded() -> None:
        model = local(pipeline, batch_faces=2, most_waiting=4)
        tasks = [asyncio.create_task(model.restore(job(2), soon()))]
        await asyncio.to_thread(pipeline.begun.wait)
        tasks += [asyncio.create_task(model.restore(job(2), soon())) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="4 faces wait for the model already"):
            await model.restore(job(2), soon())
        pipeline.go_on.set()
        await asyncio.gather(*tasks)

    pipeline = Held()
    run(crowded())


def test_threads_are_bounded_and_so_are_those_who_wait() -> None:
    async def crowded() -> None:
        threads = Threads("a clerk", 2, most_waiting=3)
        busy, most = 0, 0
        lock = threading.Lock()

        def step() -> int:
            nonlocal busy, most
            with lock:
                busy += 1
                most = max(most, busy)
            time.sleep(0.05)
            with lock:
                busy -= 1
            return 1

        tasks = [asyncio.create_task(threads.run(soon(), step)) for _ in range(5)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="3 images wait for a clerk already"):
            await threads.run(soon(), step)
        tasks[-1].cancel()
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await threads.run(soon(0.001), step)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[:4] == [1] * 4
        assert isinstance(results[4], asyncio.CancelledError)
        assert most == 2

    run(crowded())


# ---- failures ----


class Tight(Slow):
    """Runs out of memory above a number of faces."""

    def __init__(self, most: int, error: Exception | None = None) -> None:
        super().__init__()
        self.most, self.error = most, error or torch.OutOfMemoryError("CUDA out of memory")

    def __call__(self, faces: np.ndarray, **options: Any) -> Any:
        if len(faces) > self.most:
            raise self.error
        return super().__call__(faces, **options)


class Refusing(Tight):
    """Fails on faces of one colour too."""

    def __call__(self, faces: np.ndarray, **options: Any) -> Any:
        if len(faces) <= self.most and any(np.ptp(face) == 0 for face in faces):
            raise RuntimeError("refused")
        return super().__call__(faces, **options)


def test_a_face_that_the_model_refuses_fails_alone() -> None:
    async def mixed() -> list[Any]:
        model = local(pipeline, batch_faces=8, batch_wait=0.1)
        bad = FaceJob(np.zeros((1, 32, 32, 3), np.uint8), "ffhq", steps=2)
        jobs = [job(), bad, job(2, faces=3)]
        return await asyncio.gather(*(model.restore(one, soon()) for one in jobs), return_exceptions=True)

    pipeline = Refusing(most=8)
    good, bad, other = run(mixed())
    assert (len(good.images), len(other.images)) == (1, 2)
    assert isinstance(bad, RuntimeError)


def test_batches_become_smaller_where_the_memory_does_not_suffice() -> None:
    async def large() -> tuple[FaceResult, int]:
        model = local(pipeline, batch_faces=8)
        result = await model.restore(job(8, samples=2), soon())
        await model.restore(job(8), soon())
        return result, model.runner.most

    pipeline = Refusing(most=3)
    result, most = run(large())
    assert most == 2
    assert pipeline.sizes == [2] * 8
    alone = tiny.pipeline()(tiny.blob_faces(8), num_inference_steps=2, num_samples=2)
    assert np.abs(result.images.astype(int) - alone.images).max() <= 1
    assert result.samples is not None
    assert result.samples.shape == (2, 8, 32, 32, 3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_batch_that_is_too_large_is_found_out_at_the_start(error: Exception) -> None:
    pipeline = Tight(3, error)
    model = local(pipeline, batch_faces=16)
    model.warm_up()
    assert model.runner.most == 2
    assert pipeline.sizes == [1, 1, 2, 2]
    assert model.pace.estimate(1) > 0


def test_previews_too_become_smaller_where_the_memory_does_not_suffice() -> None:
    model = local(Tight(3), batch_faces=8)
    first, *_, result = run(collected(model.stream(job(8), soon())))
    alone = tiny.pipeline()(tiny.blob_faces(8), num_inference_steps=0).images
    assert np.abs(first.images.astype(int) - alone).max() <= 1
    assert len(result.images) == 8
    assert model.runner.most == 2


def test_a_broken_device_is_not_asked_again() -> None:
    def broken(step: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    async def tried() -> None:
        model = local(Slow(broken))
        for text in ("the model's device failed", "the model is being started again"):
            with pytest.raises(Overloaded, match=text):
                await model.restore(job(), soon())
        with pytest.raises(RuntimeError, match="device-side assert"):
            await model.check(10)

    run(tried())


def test_health_is_what_the_model_did_lately_or_one_face_in_one_step() -> None:
    async def checked() -> None:
        model = local(pipeline)
        await model.check(10)
        assert pipeline.sizes == [1]
        await model.check(10)
        assert pipeline.sizes == [1], "it worked a moment ago"
        await model.check(0)
        assert pipeline.sizes == [1, 1]
        assert pipeline.steps == [0, 0]

    pipeline = Slow()
    run(checked())


def test_a_closed_model_refuses_what_waits() -> None:
    async def closed() -> None:
        model = local(pipeline, batch_faces=1)
        first, second = (asyncio.create_task(model.restore(job(), soon())) for _ in range(2))
        await asyncio.to_thread(pipeline.begun.wait)
        await model.close()
        with pytest.raises(Overloaded, match="shut down"):
            await second
        first.cancel()
        pipeline.go_on.set()

    pipeline = Held()
    run(closed())


# ---- loading ----


def test_loaded_weights_are_warm_and_described(weights: Path) -> None:
    model = LocalFaceModel.load(str(weights), device="cpu", batch_faces=4, batch_wait=0.01)
    info = run(model.info())
    assert (info.name, info.side, info.license) == ("tiny", tiny.SIDE, "")
    assert len(info.weights_digest) == 64
    assert info.defaults["steps"] == tiny.preset().sampling.num_inference_steps
    assert model.pace.estimate(1) > 0
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device cuda: torch sees no GPU"):
            LocalFaceModel.load(str(weights), device="cuda", batch_faces=4, batch_wait=0.01)


def test_the_licence_is_read_from_the_readme_beside_the_weights(tmp_path: Path) -> None:
    assert license_of(tmp_path) == ""
    (tmp_path / "README.md").write_text("# A\n\n## Licence\n\n**Non-commercial research only.** More.\n", "utf-8")
    assert license_of(tmp_path) == "Non-commercial research only"
    (tmp_path / "README.md").write_text("## License\nCC0 1.0\n\nmore", "utf-8")
    assert license_of(tmp_path) == "CC0 1.0"


def test_the_pace_follows_what_is_measured() -> None:
    pace = Pace()
    assert pace.estimate(100) == 0
    for _ in range(20):
        pace.learn(10, 5.0)
    assert pace.estimate(4) == pytest.approx(2.0)
    pace.learn(1, 5.0, is_full=False)
    assert pace.estimate(4) == pytest.approx(2.0), "small batches are slower for each face"
    for _ in range(20):
        pace.learn(1, 0.1, is_full=False)
    assert pace.estimate(1) == pytest.approx(0.1, rel=0.01), "but one that is faster proves that times are better"


def test_a_slow_start_does_not_keep_requests_out_for_ever() -> None:
    async def recovered() -> None:
        model = local(batch_faces=16)
        model.pace.learn(1, 1.0)  # as if measured on a machine that was busy with something else
        refused = 0
        for _ in range(30):
            answers = await asyncio.gather(
                *(model.restore(job(steps=1), soon(5)) for _ in range(4)), return_exceptions=True
            )
            refused = sum(isinstance(answer, Overloaded) for answer in answers)
        assert refused == 0

    run(recovered())


def test_previews_are_the_first_samples_own_steps() -> None:
    async def streamed() -> list[Any]:
        return await collected(local(Slow(lambda step: time.sleep(0.05))).stream(job(steps=3, samples=2), soon()))

    *previews, result = run(streamed())
    assert [(preview.step, preview.steps) for preview in previews] == [(0, 3), (1, 3), (2, 3)]
    assert isinstance(result, FaceResult)
    assert all(isinstance(preview, FacePreview) for preview in previews)
    first_stage = tiny.pipeline()(tiny.blob_faces(1), num_inference_steps=0).images
    assert np.array_equal(previews[0].images, first_stage)
