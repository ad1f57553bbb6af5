"""Validation: the same faces every time, numbers that agree with the reference libraries, and results that are kept."""

import json
import logging
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldbfr import storage
from ldbfr.config import Preset, ValidationSettings
from ldbfr.data.index import FaceImages, Latents
from ldbfr.errors import InputError, WeightsError
from ldbfr.evaluation.metrics import IdentityModel, psnr, ssim
from ldbfr.images import decode_image, to_uint8
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.training.base import Stage
from ldbfr.training.checkpoint import CheckpointStore
from ldbfr.training.scores import best_step, read_validations
from ldbfr.training.stages import STAGE_NAMES, STAGES
from ldbfr.training.validation import (
    Measured,
    ValidationQueue,
    fixed_batches,
    make_producer,
    measure,
    validate_checkpoint,
)
from tests import tiny

CPU = torch.device("cpu")
SETTINGS = ValidationSettings(num_images=6, num_shown=2, batch_size=4)
LOSSES = {
    "hq_vqgan": {"loss", "reconstruction", "codebook", "codebook_perplexity"},
    "latent_vqgan": {"loss", "reconstruction", "codebook", "codebook_perplexity"},
    "dc_vqr": {"loss", "feature", "pixel", "anchor", "codebook_perplexity"},
    "prior": {"loss", "noise_error"},
    "enhancer": {"loss", "noise_error"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower with more, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def without_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests go without the slowest of the metrics."""
    monkeypatch.setitem(sys.modules, "dlib", None)


@pytest.fixture
def identity(without_identity: None, monkeypatch: pytest.MonkeyPatch) -> IdentityModel:
    """Identity distances are measured after all."""
    monkeypatch.delitem(sys.modules, "dlib")
    pytest.importorskip("dlib", reason="the extra identity is not installed")
    return IdentityModel()


def measured(name: str, *overrides: str, settings: ValidationSettings = SETTINGS, **kwargs: Any) -> Measured:
    return measure(tiny.new_stage(name, *overrides, **kwargs), tiny.face_images(8, seed=5), settings, CPU)


def originals_and_images(stage: Stage, faces: FaceImages) -> list[tuple[np.ndarray, np.ndarray]]:
    """What a stage is measured on, as 8-bit pictures."""
    pairs = []
    with torch.no_grad():
        stage.eval()
        produce = make_producer(stage)
        for batch in fixed_batches(stage, faces, SETTINGS):
            pairs += zip(to_uint8(batch.hq), to_uint8(produce(batch).images), strict=True)
    return pairs


def train(stage: Stage, steps: int, learning_rate: float = 3e-3) -> None:
    """Some steps on other faces than those of the validation."""
    faces = tiny.face_images(24, seed=9)
    optimizer = torch.optim.Adam(stage.trainable()["generator"], learning_rate)
    for step in range(steps):
        settings = ValidationSettings(num_images=8, batch_size=8)
        rows = np.random.default_rng(step).permutation(24)
        shuffled = FaceImages(faces.pixels[rows], faces.names)
        (batch,) = fixed_batches(stage, shuffled, settings)
        optimizer.zero_grad()
        stage.before_step([batch], -1)
        stage("generator", batch, -1)["loss"].backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------- the metrics


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_metrics_and_the_one_it_is_judged_by(stage: type[Stage], identity: IdentityModel) -> None:
    result = measured(stage.name)
    assert set(result.metrics) == {"psnr", "ssim", "identity"} | LOSSES[stage.name]
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert result.missing == {}
    assert stage.score[0] in result.metrics
    assert len(result.columns) >= 2
    for pictures in result.columns.values():
        assert pictures.shape == (2, tiny.SIDE, tiny.SIDE, 3)
        assert pictures.dtype == np.uint8


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_the_numbers_and_pictures_are_the_same_every_time(name: str) -> None:
    first = measured(name)
    torch.rand(3)  # somebody else draws from the global generator
    second = measured(name)
    assert first.metrics == second.metrics
    assert all(np.array_equal(first.columns[title], second.columns[title]) for title in first.columns)


class OnDisk:
    """Faces that are read when they are asked for, as sharded ones are."""

    def __init__(self, faces: FaceImages, folder: Path) -> None:
        self.side, self.names, self.digest, self.folder = faces.side, faces.names, faces.digest, folder
        for name, pixels in zip(faces.names, faces.pixels, strict=True):
            np.save(folder / f"{name}.npy", pixels)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.stack([np.load(self.folder / f"{self.names[index]}.npy") for index in indices])

    def latents(self, vqgan_digest: str) -> Latents | None:
        return None


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_the_batch_size_and_the_kind_of_data_set_do_not_matter(name: str, tmp_path: Path) -> None:
    expected = measured(name)
    disk = OnDisk(tiny.face_images(8, seed=5), tmp_path)
    for batch_size in (1, 5, 64):
        settings = ValidationSettings(num_images=6, num_shown=2, batch_size=batch_size)
        found = measure(tiny.new_stage(name), disk, settings, CPU)
        assert found.metrics == pytest.approx(expected.metrics, rel=2e-3)
        for title, pictures in expected.columns.items():
            assert np.abs(found.columns[title].astype(int) - pictures).mean() < 0.5


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_stage_in_training_is_left_as_it_was(name: str) -> None:
    stage = tiny.new_stage(name)
    stage.train()
    if name == "hq_vqgan":
        stage.health.observe(torch.zeros(1, 2, 2, dtype=torch.long))
        stage.health.settle(lambda values: values)
        stage.health.observe(torch.ones(1, 2, 2, dtype=torch.long))
    modes = {key: module.training for key, module in stage.named_modules()}
    flags = {key: parameter.requires_grad for key, parameter in stage.named_parameters()}
    before = {**tiny.snapshot(stage), **{key: buffer.clone() for key, buffer in stage.named_buffers()}}
    measure(stage, tiny.face_images(3), SETTINGS, CPU)
    after = {**tiny.snapshot(stage), **dict(stage.named_buffers())}
    assert tiny.differing(before, after) == []
    assert {key: module.training for key, module in stage.named_modules()} == modes
    assert {key: parameter.requires_grad for key, parameter in stage.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in stage.parameters())


@pytest.mark.parametrize("name", ["latent_vqgan", "enhancer"])
def test_psnr_ssim_and_identity_are_the_reference_libraries_means_over_the_faces(
    name: str, identity: IdentityModel
) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    faces, stage = tiny.face_images(8, seed=5), tiny.new_stage(name)
    pairs = originals_and_images(stage, faces)
    assert len(pairs) == 6
    found = measured(name).metrics
    reference = [metrics.peak_signal_noise_ratio(original, image) for original, image in pairs]
    assert found["psnr"] == pytest.approx(np.mean(reference), rel=1e-6)
    reference = [
        metrics.structural_similarity(
            original, image, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for original, image in pairs
    ]
    assert found["ssim"] == pytest.approx(np.mean(reference), rel=1e-6)
    assert found["identity"] == pytest.approx(np.mean([identity.distance(image, face) for face, image in pairs]))


def ssim_by_brute_force(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004, equation (13), window by window."""
    axis = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / axis.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(one.shape[0] - 10):
        for left in range(one.shape[1] - 10):
            for channel in range(3):
                x, y = (image[top : top + 11, left : left + 11, channel].astype(float) for image in (one, other))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_is_that_of_wang_et_al(rng: np.random.Generator) -> None:
    pytest.importorskip("skimage")
    face = tiny.blob_faces(1, 17)[0]
    noisy = np.clip(face + rng.normal(0, 20, face.shape), 0, 255).astype(np.uint8)
    assert ssim(noisy, face) == pytest.approx(ssim_by_brute_force(noisy, face), abs=1e-9)
    assert ssim(noisy, face) == pytest.approx(ssim(face, noisy), abs=1e-12)
    assert ssim(face, face) == 1
    with pytest.raises(InputError, match=r"\(10, 32, 3\): SSIM needs sides of at least 11 px"):
        ssim(np.zeros((10, 32, 3), np.uint8), np.zeros((10, 32, 3), np.uint8))


def test_the_perplexity_is_that_of_the_whole_set_not_of_its_batches() -> None:
    stage, faces = tiny.new_stage("hq_vqgan"), tiny.face_images(8, seed=5)
    with torch.no_grad():
        batches = list(fixed_batches(stage, faces, SETTINGS))
        codes = torch.cat([stage.vqgan(batch.hq)[2].flatten() for batch in batches])
    share = np.bincount(codes.numpy()) / len(codes)
    entropy = -sum(p * math.log(p) for p in share if p)
    found = measure(stage, faces, SETTINGS, CPU).metrics["codebook_perplexity"]
    assert found == pytest.approx(math.exp(entropy), rel=1e-6)


def test_the_loss_is_without_the_discriminator_which_a_checkpoint_s_average_lacks() -> None:
    overrides = "training.hq_vqgan.reconstruction.adversarial=100", "training.hq_vqgan.reconstruction"
    with_one = measured("hq_vqgan", overrides[0], f"{overrides[1]}.discriminator_start=0")
    without = measured("hq_vqgan", "training.hq_vqgan.reconstruction.adversarial=0")
    assert with_one.metrics == without.metrics


def test_the_enhancer_is_measured_on_what_users_get() -> None:
    stage, faces = tiny.new_stage("enhancer"), tiny.face_images(8, seed=5)
    tiny.wake_injections(stage.dqe)
    found = measure(stage, faces, SETTINGS, CPU)
    pipeline = LDBFRPipeline(stage.dc_vqr, stage.latent_vqgan, stage.dqe, preset=stage.preset)
    values = []
    for batch in fixed_batches(stage, faces, SETTINGS):
        images = pipeline(to_uint8(batch.lq)).images
        values += [psnr(image, face) for image, face in zip(images, to_uint8(batch.hq), strict=True)]
    assert found.metrics["psnr"] == pytest.approx(np.mean(values), abs=1e-3)
    assert list(found.columns) == ["LQ", "first stage", "restored", "HQ"]


def test_degradations_differ_between_faces_but_not_between_validations() -> None:
    stage, faces = tiny.new_stage("dc_vqr"), FaceImages(np.repeat(tiny.blob_faces(1), 4, axis=0), list("abcd"))
    first, second = (torch.cat([batch.lq for batch in fixed_batches(stage, faces, SETTINGS)]) for _ in range(2))
    assert torch.equal(first, second)
    assert len({image.numpy().tobytes() for image in first}) == 4


@pytest.mark.parametrize("name", ["hq_vqgan", "prior"])
def test_training_makes_the_score_better_and_noise_on_the_weights_makes_it_worse(name: str) -> None:
    stage, faces = tiny.new_stage(name), tiny.face_images(8, seed=5)
    metric, direction = stage.score
    sign = 1 if direction == "max" else -1

    def score() -> float:
        return sign * measure(stage, faces, SETTINGS, CPU).metrics[metric]

    untrained = score()
    train(stage, 30)
    scores, weights = [score()], tiny.snapshot(stage.network)
    for scale in (0.02, 0.1, 0.5):
        noise = {key: scale * tiny.normal(*value.shape, seed=3) for key, value in weights.items()}
        stage.network.load_state_dict({key: value + noise[key] for key, value in weights.items()})
        scores.append(score())
    assert scores[0] > untrained
    assert scores == sorted(scores, reverse=True)


def test_what_is_not_installed_is_listed_and_never_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    result = measured("latent_vqgan")
    assert set(result.metrics) == {"psnr"} | LOSSES["latent_vqgan"]
    assert set(result.missing) == {"ssim", "identity"}
    assert "pip install 'ldbfr[identity]'" in result.missing["identity"]
    assert "pip install 'ldbfr[metrics]'" in result.missing["ssim"]


def test_a_number_that_is_none_is_listed_too() -> None:
    result = measured("hq_vqgan", "training.hq_vqgan.codebook=1e300")
    assert "loss" not in result.metrics
    assert result.missing["loss"] == "it is inf"
    assert "reconstruction" in result.metrics


def test_an_empty_validation_set_is_refused() -> None:
    empty = FaceImages(np.zeros((0, 32, 32, 3), np.uint8), [])
    with pytest.raises(InputError, match="the validation set is empty"):
        measure(tiny.new_stage("prior"), empty, SETTINGS, CPU)


# --------------------------------------------------------------------------------------------------------- checkpoints


def save(run: str, name: str, step: int, network: Any) -> None:
    """A checkpoint with what a validation reads of it."""

    def write(folder: Path) -> None:
        network.save_pretrained(folder / "ema")
        (folder / "training.pt").write_bytes(b"optimisers")
        (folder / "state.json").write_text(json.dumps({"step": step, "stage": name}))

    CheckpointStore(storage.join(run, name)).save(step, write)


def finished_run(run: str, preset: Preset, *names: str) -> str:
    """A run with finished checkpoints of these stages."""
    for name in names:
        save(run, name, getattr(preset.training, name).steps, tiny.networks()[name])
    return run


SMALL = ("training.validation.num_images=4", "training.validation.num_shown=2", "training.validation.batch_size=3")


def validate(run: str, name: str, step: int) -> dict[str, float] | None:
    return validate_checkpoint(tiny.preset(*SMALL), name, run, step, tiny.face_images(8, seed=5), CPU)


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_checkpoint_s_averaged_network_is_measured_and_the_result_kept(tmp_path: Path, name: str) -> None:
    run = finished_run(str(tmp_path / "run"), tiny.preset(), *STAGE_NAMES)
    found = validate(run, name, 4)
    stage = tiny.new_stage(name)
    stage.start_from(tiny.networks()[name])
    direct = measure(stage, tiny.face_images(8, seed=5), tiny.preset(*SMALL).training.validation, CPU)
    assert found == pytest.approx(direct.metrics)
    folder = tmp_path / "run" / name / "validation"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004.json", "step-00000004.png"]
    kept = json.loads((folder / "step-00000004.json").read_text())
    assert kept["metrics"] == found
    assert kept["step"] == 4
    assert list(kept["missing"]) == ["identity"]
    assert len(kept["network"]) == 64
    assert kept["seconds"] > 0
    sheet = decode_image((folder / "step-00000004.png").read_bytes(), name="grid")
    assert min(sheet.shape[:2]) > 256
    events = EventAccumulator(str(tmp_path / "run" / name / "tensorboard/validation")).Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == pytest.approx(
        {f"{name}/{metric}": value for metric, value in found.items()}, rel=1e-6
    )
    (image,) = events.Images(f"{name}/faces")
    assert np.array_equal(decode_image(image.encoded_image_string, name="event"), sheet)
    assert read_validations(str(tmp_path / "run" / name)) == {4: found}


@pytest.mark.s3
def test_a_run_in_a_bucket_is_validated_there(s3_root: str, tmp_path: Path) -> None:
    runs = [finished_run(run, tiny.preset(), "latent_vqgan", "prior") for run in (f"{s3_root}/run", str(tmp_path))]
    results = [validate(run, "prior", 4) for run in runs]
    assert results[0] == results[1]
    assert read_validations(f"{s3_root}/run/prior") == {4: results[0]}
    assert best_step(f"{s3_root}/run/prior", ("noise_error", "min")) == 4
    kept = {entry.key.split("/")[0] for entry in storage.list_objects(f"{s3_root}/run/prior")}
    assert kept == {"checkpoints", "tensorboard", "validation"}


def test_a_checkpoint_that_was_deleted_meanwhile_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = finished_run(str(tmp_path), tiny.preset(), "latent_vqgan", "prior")
    with caplog.at_level(logging.INFO):
        assert validate(run, "prior", 2) is None
    assert "no validation of prior at step 2: its checkpoint is gone" in caplog.text
    assert read_validations(f"{run}/prior") == {}


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = finished_run(str(tmp_path), tiny.preset(), "latent_vqgan", "prior")
    (file,) = (tmp_path / "prior").rglob("ema/*.safetensors")
    tiny.flip_byte(file, 500)
    with pytest.raises(WeightsError, match=str(file)):
        validate(run, "prior", 4)


def test_a_stage_before_it_that_is_not_finished_is_named(tmp_path: Path) -> None:
    run = finished_run(str(tmp_path), tiny.preset(), "prior")
    with pytest.raises(WeightsError, match=r"stage latent_vqgan in .* has 0 of 4 steps"):
        validate(run, "prior", 4)


def test_a_step_that_is_validated_again_replaces_its_values(tmp_path: Path) -> None:
    run = finished_run(str(tmp_path), tiny.preset(), "latent_vqgan")
    first = validate(run, "latent_vqgan", 4)
    save(run, "latent_vqgan", 4, tiny.networks(seed=1)["latent_vqgan"])
    second = validate(run, "latent_vqgan", 4)
    assert first != second
    assert read_validations(f"{run}/latent_vqgan") == {4: second}


# -------------------------------------------------------------------------------------------------------------- scores


def write_result(folder: Path, step: int, **metrics: float) -> None:
    content = {"step": step, "metrics": metrics, "missing": {}}
    storage.write_bytes(str(folder / "validation" / f"step-{step:08d}.json"), json.dumps(content).encode())


def test_the_best_step_is_the_highest_or_the_lowest_and_of_equal_ones_the_latest(tmp_path: Path) -> None:
    for step, value in ((100, 20.0), (200, 22.5), (300, 22.5), (1000, 21.0)):
        write_result(tmp_path, step, psnr=value, noise_error=value)
    assert best_step(str(tmp_path), ("psnr", "max")) == 300
    assert best_step(str(tmp_path), ("noise_error", "min")) == 100
    assert best_step(str(tmp_path), ("identity", "min")) is None
    assert list(read_validations(str(tmp_path))) == [100, 200, 300, 1000]


def test_a_step_without_the_metric_is_not_the_best(tmp_path: Path) -> None:
    write_result(tmp_path, 1, psnr=20.0)
    write_result(tmp_path, 2, ssim=0.5)
    write_result(tmp_path, 3, psnr=float("nan"))
    assert best_step(str(tmp_path), ("psnr", "max")) == 1


def test_where_nothing_was_validated_there_is_no_best(tmp_path: Path) -> None:
    assert read_validations(str(tmp_path / "nothing")) == {}
    assert best_step(str(tmp_path / "nothing"), ("psnr", "max")) is None


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"step": 2, "metrics": {"psnr": 99}}', '{"step": 7, "metrics": {"psnr": "x"}}']
)
def test_a_damaged_result_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    write_result(tmp_path, 1, psnr=20.0)
    (tmp_path / "validation/step-00000007.json").write_text(damage)
    (tmp_path / "validation/notes.txt").write_text("not ours")
    assert best_step(str(tmp_path), ("psnr", "max")) == 1
    (record,) = caplog.records
    assert "step-00000007.json is damaged" in record.getMessage()


# --------------------------------------------------------------------------------------------------------------- queue


class Gate:
    """A validation that takes as long as the test wants."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.started, self.go = threading.Event(), threading.Event()

    def __call__(self, step: int) -> None:
        self.started.set()
        assert self.go.wait(10)
        if step % 10:
            raise WeightsError(f"step {step} cannot be measured")
        self.done.append(step)


def test_the_queue_takes_the_newest_and_says_which_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    queue = ValidationQueue(gate)
    with caplog.at_level(logging.INFO):
        queue.submit(10)
        assert gate.started.wait(10)
        for step in (20, 40, 30):
            queue.submit(step)
        gate.go.set()
        assert queue.drain() == []
    assert gate.done == [10, 40]
    assert [text for text in caplog.messages if text.startswith("no validation")] == [
        "no validation at step 20: step 40 is newer",
        "no validation at step 30: step 40 is newer",
    ]


def test_a_failing_validation_is_kept_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    gate.go.set()
    queue = ValidationQueue(gate)
    queue.submit(15)
    (error,) = queue.drain()
    assert str(error) == "step 15 cannot be measured"
    assert error.__notes__ == ["in the validation at step 15"]
    assert "the validation at step 15 failed: step 15 cannot be measured" in caplog.text
    queue.submit(20)
    assert queue.drain() == []
    assert gate.done == [20]


def test_draining_a_queue_that_never_had_anything_returns_at_once() -> None:
    assert ValidationQueue(Gate()).drain() == []


def test_many_threads_submit_and_the_newest_is_always_measured() -> None:
    done: list[int] = []
    queue = ValidationQueue(done.append)
    threads = [threading.Thread(target=lambda n=n: [queue.submit(step) for step in range(n, 401, 4)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue.drain() == []
    assert 400 in done
    assert len(set(done)) == len(done)
