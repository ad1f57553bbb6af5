"""The plan of a training run: counts that are known, estimates held against real runs, arithmetic, texts."""

import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ldbfr.config import Preset, load_preset, preset_names
from ldbfr.errors import ConfigError
from ldbfr.training.losses import VGG16_FILE
from ldbfr.training.plan import (
    DEFAULT_TFLOPS,
    RunPlan,
    StagePlan,
    checkpoint_bytes,
    count_parameters,
    held_bytes,
    plan_run,
    plan_stage,
)
from ldbfr.training.plan_table import GIB, gpu_size, hours_on_a_network
from ldbfr.training.stages import STAGE_NAMES, make_stage, stage_class
from ldbfr.training.step_cost import (
    LikeOnAGPU,
    SavedBytes,
    autocast_of,
    example_batch,
    fused_attention,
    measure_flops,
    measure_memory,
    meta_stage,
    own_tensors,
    without_downloads,
)
from tests import tiny

PERCEPTUAL = "training.dc_vqr.reconstruction.perceptual=0.5"
BF16 = tuple(f"training.{name}.precision=bf16" for name in STAGE_NAMES)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and no file of a trained backbone on this machine."""

    def refuse(*_: object) -> None:
        raise AssertionError("the plan must not need the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))


@pytest.fixture(scope="module")
def paper() -> RunPlan:
    """The plan of all of `paper_512` on one to eight workers; with what it took out of this process's memory."""
    pytest.importorskip("lpips")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_run(load_preset("paper_512"), STAGE_NAMES, (1, 8), num_images=70_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB; one stage's weights are 1.2 GiB
    return plan


def plan(stage: str, *overrides: str, workers: tuple[int, int] = (1, 1), **more: Any) -> StagePlan:
    """The plan of a stage of the preset `tiny`."""
    return plan_stage(tiny.preset(*overrides), stage, workers, **more)


def real_stage(name: str, preset: Preset) -> Any:
    """A stage with weights, on the CPU."""
    needed = {stage: real_stage(stage, preset).network for stage in stage_class(name).upstream}
    return make_stage(name, without_downloads(preset), needed)


# ---------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(("name", "millions"), [("hq_vqgan", 72.14), ("latent_vqgan", 55.32), ("prior", 274.06)])
def test_the_paper_s_networks_have_the_known_sizes(name: str, millions: float) -> None:
    assert round(count_parameters(meta_stage(load_preset("paper_512"), name)).network / 1e6, 2) == millions


def test_every_parameter_is_counted_once_and_by_what_becomes_of_it(paper: RunPlan) -> None:
    hq_vqgan, latent_vqgan, dc_vqr, prior, enhancer = (stage.parameters for stage in paper.stages)
    assert hq_vqgan.trainable == hq_vqgan.network
    assert hq_vqgan.frozen == 14_714_688 + 64 + 128 + 256 + 512 + 512  # VGG-16's convolutions, LPIPS's weights
    assert hq_vqgan.discriminator == latent_vqgan.discriminator > 2_700_000
    assert 0 < latent_vqgan.trainable < latent_vqgan.network  # the decoder alone
    assert dc_vqr.discriminator == prior.discriminator == 0
    assert prior.trainable == prior.network
    assert prior.frozen == latent_vqgan.network
    assert enhancer.trainable == enhancer.network - prior.network
    assert enhancer.frozen == prior.network + latent_vqgan.network + dc_vqr.network


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_counts_and_checkpoints_are_those_of_a_real_run(tmp_path: Path, name: str) -> None:
    trainer = tiny.new_trainer(tmp_path, name)
    trainer.train()
    stage = meta_stage(tiny.preset(), name)
    assert count_parameters(stage) == count_parameters(trainer.stage)
    assert held_bytes(stage) == held_bytes(trainer.stage)
    folder = max((tmp_path / name / "checkpoints").glob("step-*"))
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".pt"))
    tensors = sum(len(list(module.state_dict())) for module in (stage.network, *stage.extras().values()))
    assert 0 < on_disk - checkpoint_bytes(stage) < 4_000 + 1_500 * tensors  # names, shapes and padding beside them


# ------------------------------------------------------------------------------------------ estimates against real runs


class OneLayout(TorchFunctionMode):
    """Keeps tensors in the layout that meta gives them: copies that change the layout are not part of the estimate."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.contiguous() if getattr(func, "__name__", "") in ("conv2d", "pixel_shuffle") else result


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_bytes_and_flops_equal_those_of_a_real_step_on_the_cpu(name: str) -> None:
    preset = tiny.preset()
    if name == "dc_vqr":
        pytest.importorskip("lpips")
        preset = tiny.preset(PERCEPTUAL)
    stage, real = meta_stage(preset, name), real_stage(name, preset)
    with OneLayout():
        estimate, truth = measure_memory(stage, 3), measure_memory(real, 3)
    assert estimate.saved == truth.saved
    assert estimate.peak == pytest.approx(truth.peak, rel=0.005)
    assert measure_flops(stage) == measure_flops(real)


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_copies_that_change_the_layout_stay_small(name: str) -> None:
    real = real_stage(name, tiny.preset()).to(memory_format=torch.channels_last)
    estimate, truth = measure_memory(meta_stage(tiny.preset(), name), 4), measure_memory(real, 4)
    assert estimate.peak <= truth.peak <= 1.1 * estimate.peak


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_the_casts_are_those_of_autocast_on_a_gpu(name: str) -> None:
    """torch's own autocast, on tensors that say they are on a GPU and have no data."""
    preset = tiny.preset(*BF16, "training.hq_vqgan.reconstruction.adversarial=0")
    expected = saved_by_forward(meta_stage(preset, name))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert saved_by_forward(fake_gpu_stage(preset, name)) == expected


class OnAFakeGPU(LikeOnAGPU):
    """What a GPU that is not there cannot answer, and nothing else: no casts but those of attention's inputs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__int__":
            return 1
        if name == "scaled_dot_product_attention" and torch.is_autocast_enabled("cuda"):
            return fused_attention(*(tensor.bfloat16() for tensor in args))
        return super().__torch_function__(func, types, args, kwargs)


def fake_gpu_stage(preset: Preset, name: str) -> Any:
    """A stage whose tensors say that they are on a GPU."""
    with torch.device("cuda"), OnAFakeGPU(bf16=False):
        needed = {stage: fake_gpu_stage(preset, stage).network for stage in stage_class(name).upstream}
        return make_stage(name, without_downloads(preset), needed)


def saved_by_forward(stage: Any) -> int:
    """Bytes that a forward pass in bf16 keeps, on the meta device or a GPU that is not there."""
    fake = next(stage.parameters()).device.type == "cuda"
    stage.network.train()
    saved = SavedBytes(own_tensors(stage))
    with OnAFakeGPU(bf16=False) if fake else autocast_of(stage, bf16=True):
        batch = example_batch(stage, 2)
        try:
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.set_autocast_enabled("cuda", fake)  # `torch.autocast` itself refuses where there is no GPU
            with saved:
                stage("generator", batch, 0)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    return saved.most


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("overrides", [(), BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", STAGE_NAMES)
def test_memory_is_linear_in_the_micro_batch(name: str, overrides: tuple[str, ...]) -> None:
    stage = meta_stage(tiny.preset(*overrides), name)
    two, four, eight = (measure_memory(stage, size) for size in (2, 4, 8))
    for least, middle, most in ((two.saved, four.saved, eight.saved), (two.peak, four.peak, eight.peak)):
        assert most - middle == pytest.approx(2 * (middle - least), rel=0.01)


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_accumulation_and_workers_both_divide_the_activations(name: str) -> None:
    whole, halves = (plan(name, f"training.{name}.gradient_accumulation={parts}", workers=(1, 2)) for parts in (1, 2))
    assert [part.micro_batch for part in (*whole.workers, *halves.workers)] == [4, 2, 2, 1]
    one, two = (part.memory for part in whole.workers)
    assert two.activations == pytest.approx(one.activations / 2, rel=0.02)
    assert halves.workers[0].memory.activations == two.activations
    assert (one.weights, one.gradients, one.adam, one.ema) == (two.weights, two.gradients, two.adam, two.ema)


def test_the_total_is_the_sum_and_adam_is_twice_the_gradients(paper: RunPlan) -> None:
    for stage in paper.stages:
        learns = 4 * (stage.parameters.trainable + stage.parameters.discriminator)
        for workers in stage.workers:
            parts = workers.memory.model_dump()
            assert parts.pop("total") == sum(parts.values())
            assert (parts["gradients"], parts["adam"], parts["ema"]) == (
                learns, 2 * learns, 4 * stage.parameters.trainable
            )  # fmt: skip


def test_mixed_precision_keeps_less_of_the_paper_s_networks_than_full() -> None:
    mixed, full = (
        measure_memory(meta_stage(load_preset("paper_512", [f"training.hq_vqgan.precision={kind}"]), "hq_vqgan"), 2)
        for kind in ("bf16", "fp32")
    )
    assert 0.5 * full.saved < mixed.saved < full.saved  # normalisation stays in float32 on GPUs


def test_prepared_latents_save_the_encoder() -> None:
    stage = meta_stage(tiny.preset(), "prior")
    fresh, cached = measure_flops(stage), measure_flops(stage, cached_latents=True)
    assert fresh.total - cached.total == fresh.forward - cached.forward > 0
    assert plan("prior", "training.prior.cache_latents=false", cached_latents=True) == plan("prior")
    assert "latents that are prepared" in plan("prior", "training.prior.cache_latents=false").notes[0]
    assert plan("prior").notes == ()


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_hours_follow_from_flops_speed_and_the_largest_part() -> None:
    stage = plan("prior", workers=(1, 3), num_images=8, tflops=2.0)
    one, three = stage.workers
    assert (one.least_images, one.most_images, three.least_images, three.most_images) == (4, 4, 1, 2)
    assert one.step_seconds == pytest.approx(4 * stage.flops_per_image / 2e12)
    assert three.step_seconds == pytest.approx(one.step_seconds / 2)  # the others wait for the worker with two
    assert three.images_per_second == pytest.approx(4 / three.step_seconds)
    assert one.hours == pytest.approx(stage.steps * one.step_seconds / 3600)
    assert (stage.num_images, stage.epochs) == (16, 2.0)
    gradients = three.memory.gradients
    assert (one.exchange_bytes, three.exchange_bytes) == (0, 4 * gradients // 3)


def test_a_network_that_is_slower_than_the_flops_sets_the_hours() -> None:
    whole = plan_run(tiny.preset(), ["prior"], (1, 4), tflops=1e-3)
    workers = whole.stages[0].workers[1]
    assert hours_on_a_network(whole, speed=1e15) == workers.hours
    needed = workers.exchange_bytes / workers.step_seconds
    assert hours_on_a_network(whole, speed=needed / 10) == pytest.approx(10 * workers.hours)


def test_what_is_done_is_not_counted_again() -> None:
    fresh, half, finished = (plan("prior", done=done).workers[0].hours for done in (0, 2, 4))
    assert (half, finished) == (pytest.approx(fresh / 2), 0)


def test_the_disk_has_room_for_all_kept_checkpoints_and_one_more() -> None:
    whole = plan_run(tiny.preset("training.prior.keep_checkpoints=5"), ["latent_vqgan", "prior"], (1, 1))
    latent_vqgan, prior = (stage.checkpoint_bytes for stage in whole.stages)
    assert [stage.kept_checkpoints for stage in whole.stages] == [2 + 1, 5 + 1]
    assert whole.disk_bytes == 3 * latent_vqgan + 6 * prior + max(latent_vqgan, prior)


def test_a_stage_misses_what_is_neither_finished_nor_planned_before_it() -> None:
    def missing(stages: list[str], **done: int) -> tuple[str, ...]:
        return plan_run(tiny.preset(), stages, (1, 1), done=done).stages[-1].missing

    assert missing(["enhancer"]) == ("latent_vqgan", "dc_vqr", "prior")
    assert missing(["dc_vqr", "enhancer"], latent_vqgan=4, prior=3) == ("prior",)


# ---------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_planned_offline_and_the_table_fits(name: str, request: pytest.FixtureRequest) -> None:
    state = torch.get_rng_state()
    if name == "paper_512":
        whole: RunPlan = request.getfixturevalue("paper")
    else:
        whole = plan_run(load_preset(name), STAGE_NAMES, (3, 3), num_images=1000)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(stage.missing for stage in whole.stages)
    text = whole.describe()
    assert max(map(len, text.splitlines())) <= 120
    for stage in STAGE_NAMES:
        assert len([line for line in text.splitlines() if line.startswith(stage)]) == 4
    assert RunPlan.model_validate_json(whole.model_dump_json()) == whole


def test_the_text_says_what_to_rent_and_what_is_needed(paper: RunPlan) -> None:
    text = paper.describe()
    flat = " ".join(text.split())
    assert f"{DEFAULT_TFLOPS:g} TFLOP/s is a guess" in flat
    assert "1 worker: 80 GB, 8 workers: 12 GB" in flat
    assert f"every worker needs {VGG16_FILE}: hq_vqgan, latent_vqgan, dc_vqr." in flat
    assert "latent_vqgan trains the decoder alone, so it must start from trained weights: --init" in flat
    assert "joined by 10 Gbit/s, 8 workers take" in flat
    assert "72.14 M" in text
    assert "274.06 M" in text


def test_the_text_says_where_a_run_continues() -> None:
    done = {"hq_vqgan": 4, "dc_vqr": 2}
    text = plan_run(tiny.preset(), ["hq_vqgan", "dc_vqr", "prior"], (3, 4), done=done, tflops=7.0).describe()
    assert "hq_vqgan is finished and will be passed by." in text
    assert "dc_vqr goes on at step 2 of 4." in text
    assert "prior needs latent_vqgan, to be trained to the end in this run before it." in text
    assert "on a data set of unknown size; 7 TFLOP/s sustained a worker are assumed" in text
    assert "is a guess" not in text
    assert any(line.split()[1:4] == ["3", "1-2", "2"] for line in text.splitlines() if line.startswith("prior"))


def test_a_gpu_is_large_enough_only_with_room_to_spare() -> None:
    assert gpu_size(20 * GIB) == 24
    assert gpu_size(21 * GIB) == 32
    assert gpu_size(1000 * GIB) is None


# fmt: off
BAD: list[tuple[dict[str, Any], str]] = [
    ({"stages": ["vqgan"]},      r"no stage 'vqgan': give one of hq_vqgan, latent_vqgan"),
    ({"stages": []},             r"no stage to plan: give one of"),
    ({"done": {"vqgan": 3}},     r"no stage 'vqgan'"),
    ({"workers": (1, 5)},        r"training.prior.batch_size 4 is less than one image for each of the 5 workers"),
    ({"workers": (0, 2)},        r"0 to 2 workers: expected at least 1"),
    ({"workers": (3, 2)},        r"3 to 2 workers"),
    ({"num_images": 0},          r"a data set of 0 images: expected at least one"),
    ({"tflops": 0.0},            r"0.0 TFLOP/s of a worker: expected a number above 0"),
    ({"tflops": float("nan")},   r"nan TFLOP/s"),
]
# fmt: on


@pytest.mark.parametrize(("changed", "text"), BAD, ids=[str(changed) for changed, _ in BAD])
def test_numbers_that_no_run_could_have_are_refused(changed: dict[str, Any], text: str) -> None:
    request: dict[str, Any] = {"stages": ["prior"], "workers": (1, 1)} | changed
    with pytest.raises(ConfigError, match=text):
        plan_run(tiny.preset(), **request)
