"""The pipeline's promises: batch, order and seed; what its settings mean; what it refuses and how it says so."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image

from ldbfr.config import SchedulerName
from ldbfr.errors import ConfigError, InputError
from ldbfr.images import to_float, to_uint8
from ldbfr.pipeline import LDBFRPipeline, match_color
from tests import tiny

FACES = tiny.blob_faces(5)
SCHEDULERS: list[SchedulerName] = ["dpm_solver", "ddim", "ddpm", "unipc"]


@pytest.fixture(scope="module")
def pipeline() -> LDBFRPipeline:
    return tiny.pipeline()


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference in grey levels."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# --------------------------------------------------------------------------------------------------- batch, order, seed


@pytest.mark.parametrize("start_step", [500, 1000])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_face_is_restored_the_same_alone_and_in_any_batch(
    pipeline: LDBFRPipeline, scheduler: SchedulerName, start_step: int
) -> None:
    settings: Any = {"scheduler": scheduler, "start_step": start_step, "seed": 3}
    together = pipeline(FACES, **settings).images
    for number in (0, 4):
        assert difference(pipeline(FACES[[number]], **settings).images[0], together[number]) <= 1
    order = [3, 0, 4, 1, 2]
    assert difference(pipeline(FACES[order], **settings).images, together[order]) <= 1


def test_the_result_depends_on_the_seed_and_on_nothing_outside(pipeline: LDBFRPipeline) -> None:
    first = pipeline(FACES[:2], seed=1).images
    torch.rand(7)  # somebody else draws from the global generator
    assert np.array_equal(pipeline(FACES[:2], seed=1).images, first)
    assert difference(pipeline(FACES[:2], seed=2).images, first) > 5


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_restores_and_reports_each_step(pipeline: LDBFRPipeline, scheduler: SchedulerName) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    output = pipeline(
        FACES[:2],
        scheduler=scheduler,
        num_inference_steps=3,
        start_step=300,
        callback_on_step_end=lambda step, timestep, latents: seen.append((step, timestep, tuple(latents.shape))),
    )
    assert output.images.shape == (2, 32, 32, 3)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    timesteps = [timestep for _, timestep, _ in seen]
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] <= 300
    assert {shape for _, _, shape in seen} == {(2, 3, 16, 16)}


def test_any_diffusers_scheduler_can_be_given_and_used_again(pipeline: LDBFRPipeline) -> None:
    scheduler = EulerDiscreteScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    settings: Any = {"scheduler": scheduler, "start_step": 1000}
    first = pipeline(FACES[:2], **settings).images
    assert np.array_equal(pipeline(FACES[:2], **settings).images, first)


# ----------------------------------------------------------------------------------------------------- what settings do


def test_no_steps_give_the_first_stage_s_own_image(pipeline: LDBFRPipeline) -> None:
    output = pipeline(FACES, num_inference_steps=0, return_first_stage=True)
    with torch.no_grad():
        features = pipeline.dc_vqr(to_float(FACES)).hq_features
        expected = to_uint8(pipeline.dc_vqr.decode(features))
    assert np.array_equal(output.images, expected)
    assert np.array_equal(output.first_stage, expected)


def test_the_first_stage_is_given_only_on_request_and_is_the_same_whatever_the_diffusion_does(
    pipeline: LDBFRPipeline,
) -> None:
    assert pipeline(FACES[:1]).first_stage is None
    one = pipeline(FACES[:1], seed=1, return_first_stage=True)
    other = pipeline(FACES[:1], seed=2, condition_scale=0.3, return_first_stage=True)
    assert np.array_equal(one.first_stage, other.first_stage)


def test_a_condition_scale_of_zero_paints_the_same_from_any_features(pipeline: LDBFRPipeline) -> None:
    """From pure noise and without f_HQ nothing of the input is left but the noise that its digest chose."""
    shifted = tiny.new_pipeline()
    with torch.no_grad():
        shifted.dc_vqr.quant_conv.bias.add_(1.0)
    settings: Any = {"start_step": 1000, "condition_scale": 0.0}
    assert np.array_equal(pipeline(FACES[:2], **settings).images, shifted(FACES[:2], **settings).images)
    settings["condition_scale"] = 1.0
    assert difference(pipeline(FACES[:2], **settings).images, shifted(FACES[:2], **settings).images) > 1


def test_what_is_left_out_is_the_preset_s(pipeline: LDBFRPipeline) -> None:
    sampling = pipeline.preset.sampling
    explicit = pipeline(
        FACES[:1],
        num_inference_steps=sampling.num_inference_steps,
        scheduler=sampling.scheduler,
        start_step=sampling.start_step,
        condition_scale=sampling.condition_scale,
    )
    assert np.array_equal(pipeline(FACES[:1]).images, explicit.images)


def test_uncertainty_is_the_standard_deviation_over_the_samples(pipeline: LDBFRPipeline) -> None:
    output = pipeline(FACES[:2], num_samples=3, output_type="pt")
    assert output.samples is not None
    assert output.uncertainty is not None
    assert len(output.samples) == 3
    assert torch.equal(output.images, output.samples[0])
    samples = np.stack([sample.numpy() for sample in output.samples])  # (N, B, 3, S, S)
    expected = samples.std(axis=0, ddof=1).mean(axis=1) / 2
    assert output.uncertainty.shape == (2, 32, 32)
    assert np.allclose(output.uncertainty, expected, atol=1e-5)
    assert 0 < output.uncertainty.max() <= 1


def test_more_samples_leave_the_first_one_as_it_was(pipeline: LDBFRPipeline) -> None:
    alone, many = pipeline(FACES[:2]), pipeline(FACES[:2], num_samples=3)
    assert alone.samples is None
    assert alone.uncertainty is None
    assert many.samples is not None
    assert np.array_equal(alone.images, many.images)
    assert difference(many.samples[0], many.samples[1]) > 1


def test_colour_correction_takes_the_low_frequencies_from_the_first_stage(pipeline: LDBFRPipeline) -> None:
    settings: Any = {"return_first_stage": True, "output_type": "pt"}
    plain = pipeline(FACES[:2], **settings)
    corrected = pipeline(FACES[:2], color_correction=True, **settings)
    assert torch.equal(corrected.first_stage, plain.first_stage)
    means = [images.mean(dim=(2, 3)) for images in (plain.images, corrected.images, plain.first_stage)]
    assert (means[0] - means[2]).abs().max() > 0.05
    assert (means[1] - means[2]).abs().max() < 0.02


def test_weights_say_whether_colours_are_corrected_by_default(pipeline: LDBFRPipeline) -> None:
    settings: Any = {"output_type": "pt"}
    plain, corrected = (pipeline(FACES[:2], color_correction=on, **settings).images for on in (False, True))
    assert torch.equal(pipeline(FACES[:2], **settings).images, plain)
    other = tiny.new_pipeline("sampling.color_correction=true")
    assert torch.equal(other(FACES[:2], **settings).images, other(FACES[:2], color_correction=True, **settings).images)
    assert not torch.equal(plain, corrected)


def test_colour_correction_splits_frequencies() -> None:
    """A constant offset is taken over whole, a checkerboard of one pixel not at all."""
    board = 0.2 * (torch.arange(32)[:, None] + torch.arange(32)[None]).remainder(2).mul(2).sub(1).float()
    images = board.expand(1, 3, 32, 32) + 0.1
    reference = torch.full((1, 3, 32, 32), -0.3)
    assert torch.allclose(match_color(images, reference), board - 0.3, atol=5e-3)


# ------------------------------------------------------------------------------------------------- inputs and outputs


def test_all_input_types_agree(pipeline: LDBFRPipeline) -> None:
    expected = pipeline(FACES[:2]).images
    assert np.array_equal(pipeline(to_float(FACES[:2])).images, expected)
    assert np.array_equal(pipeline([Image.fromarray(face) for face in FACES[:2]]).images, expected)
    assert np.array_equal(pipeline(np.asfortranarray(FACES[:2])).images, expected)


def test_a_grey_pil_image_is_its_rgb(pipeline: LDBFRPipeline) -> None:
    grey = Image.fromarray(FACES[0]).convert("L")
    expected = pipeline(np.asarray(grey.convert("RGB"))[None]).images
    assert np.array_equal(pipeline([grey]).images, expected)


def test_all_output_types_agree(pipeline: LDBFRPipeline) -> None:
    expected = pipeline(FACES[:2]).images
    assert (expected.dtype, expected.shape) == (np.uint8, (2, 32, 32, 3))
    tensors = pipeline(FACES[:2], output_type="pt").images
    assert (tensors.dtype, tuple(tensors.shape)) == (torch.float32, (2, 3, 32, 32))
    assert tensors.abs().max() <= 1
    assert np.array_equal(to_uint8(tensors), expected)
    pictures = pipeline(FACES[:2], output_type="pil").images
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), expected)


WRONG_INPUTS: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("another side", lambda: tiny.blob_faces(2, side=48), ["(2, 3, 48, 48)", "32×32"]),
    ("no square", lambda: np.zeros((1, 32, 16, 3), np.uint8), ["(1, 3, 32, 16)", "32×32"]),
    ("no batch", lambda: FACES[0], ["(32, 32, 3)", "uint8"]),
    ("no faces", lambda: FACES[:0], ["(0, 3, 32, 32)", "at least one"]),
    ("float array", lambda: FACES / 255, ["float64", "uint8"]),
    ("grey array", lambda: FACES[..., 0], ["(5, 32, 32)", "uint8"]),
    ("four channels", lambda: np.zeros((1, 32, 32, 4), np.uint8), ["(1, 32, 32, 4)", "uint8"]),
    ("tensor, no batch", lambda: to_float(FACES[0]), ["(3, 32, 32)", "32×32"]),
    ("tensor, channels last", lambda: to_float(FACES).movedim(1, -1), ["(5, 32, 32, 3)", "(B, 3, 32, 32)"]),
    ("tensor of bytes", lambda: torch.from_numpy(FACES).movedim(-1, 1), ["uint8"]),
    ("tensor of grey levels", lambda: torch.from_numpy(FACES).movedim(-1, 1).float(), ["[-1, 1]"]),
    ("tensor with NaN", lambda: torch.full((1, 3, 32, 32), float("nan")), ["NaN"]),
    ("no PIL images", list, ["at least one"]),
    ("PIL images of two sizes", lambda: [Image.new("RGB", (32, 32)), Image.new("RGB", (16, 16))], ["16", "32"]),
    ("arrays in a list", lambda: list(FACES), ["ndarray"]),
    ("a path", lambda: "face.png", ["str"]),
    ("one PIL image", lambda: Image.new("RGB", (32, 32)), ["list"]),
]


@pytest.mark.parametrize(("make", "texts"), [case[1:] for case in WRONG_INPUTS], ids=[case[0] for case in WRONG_INPUTS])
def test_images_that_cannot_be_restored_are_refused_by_shape_and_type(
    pipeline: LDBFRPipeline, make: Callable[[], Any], texts: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        pipeline(make())
    for text in texts:
        assert text in str(caught.value)


WRONG_SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_inference_steps": -1}, ["num_inference_steps -1", "between 0", "500"]),
    ({"num_inference_steps": 501}, ["num_inference_steps 501", "start_step 500"]),
    ({"start_step": 0}, ["start_step 0", "between 1 and 1000"]),
    ({"start_step": 1001}, ["start_step 1001", "between 1 and 1000"]),
    ({"condition_scale": -0.1}, ["condition_scale -0.1", "at least 0"]),
    ({"condition_scale": float("nan")}, ["condition_scale nan"]),
    ({"condition_scale": float("inf")}, ["condition_scale inf"]),
    ({"num_samples": 0}, ["num_samples 0", "at least 1"]),
    ({"scheduler": "euler"}, ["'euler'", "dpm_solver"]),
    ({"output_type": "latent"}, ["'latent'", "np"]),
]


@pytest.mark.parametrize(("settings", "texts"), WRONG_SETTINGS, ids=[str(settings) for settings, _ in WRONG_SETTINGS])
def test_settings_out_of_range_are_refused_by_value_and_range(
    pipeline: LDBFRPipeline, settings: dict[str, Any], texts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        pipeline(FACES[:1], **settings)
    for text in texts:
        assert text in str(caught.value)


def test_an_unknown_setting_is_no_silent_one(pipeline: LDBFRPipeline) -> None:
    with pytest.raises(TypeError, match="guidance"):
        pipeline(FACES[:1], guidance=3.0)  # type: ignore[call-arg]


def test_a_pipeline_without_its_preset_says_how_to_get_one(pipeline: LDBFRPipeline) -> None:
    with pytest.raises(ConfigError, match="from_pretrained"):
        LDBFRPipeline(pipeline.dc_vqr, pipeline.latent_vqgan, pipeline.unet)


def test_restoring_leaves_the_networks_as_they_were_and_without_gradients(pipeline: LDBFRPipeline) -> None:
    parts = (pipeline.dc_vqr, pipeline.latent_vqgan, pipeline.unet)
    before = [tiny.snapshot(part) for part in parts]
    images = pipeline(FACES[:1], output_type="pt").images
    assert [tiny.differing(old, tiny.snapshot(part)) for old, part in zip(before, parts, strict=True)] == [[], [], []]
    assert not images.requires_grad
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())
