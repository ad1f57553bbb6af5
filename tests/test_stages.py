"""The five stages: each learns one batch by heart, leaves what is frozen alone, and draws from the samples' seeds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldbfr.data.sampler import Batch, BatchSampler
from ldbfr.models.dc_vqr import DCVQRModel
from ldbfr.training.latents import encode_all
from ldbfr.training.losses import min_snr_weight
from ldbfr.training.stages import STAGE_NAMES, make_stage
from tests import tiny

NO_GAN = "training.hq_vqgan.reconstruction.adversarial=0"


def batch_of(name: str, size: int = 4) -> Batch:
    """A batch as the stage sees it."""
    stage = tiny.new_stage(name)
    profile = stage.settings.profile if stage.uses_lq else None
    return BatchSampler(tiny.face_images(), size, 0, name, True, profile).batch(0)


# fmt: off
OVERFIT = {
    # stage: steps, learning rate, which loss, how much of it may be left
    "hq_vqgan":     (60, 5e-3, "reconstruction", 0.5),
    "latent_vqgan": (60, 5e-3, "reconstruction", 0.5),
    "dc_vqr":       (40, 3e-3, "feature",        0.6),  # the frozen decoder is random, so pixels have a floor
    "prior":        (60, 5e-3, "loss",           0.6),
    "enhancer":     (60, 1e-2, "loss",           0.8),
}
# fmt: on


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_every_stage_learns_one_batch(tmp_path: Path, name: str) -> None:
    steps, rate, loss, share = OVERFIT[name]
    settings = [f"training.{name}.{key}" for key in (f"steps={steps}", f"learning_rate={rate}")]
    trainer = tiny.new_trainer(tmp_path, name, *settings, NO_GAN)
    batch, losses = batch_of(name), []
    for trainer.step in range(steps):
        losses.append(trainer.optimize(batch)[loss])
        trainer.stage.after_step(trainer.step)
    assert sum(losses[-5:]) / 5 < share * losses[0]


def test_the_discriminator_learns_to_tell_a_batch_from_its_reconstruction(tmp_path: Path) -> None:
    trainer = tiny.new_trainer(tmp_path, "hq_vqgan", "training.hq_vqgan.learning_rate=3e-3")
    batch, losses = batch_of("hq_vqgan"), []
    trainer.step = 2  # where the preset starts it
    for _ in range(30):
        losses.append(trainer.optimize(batch)["discriminator_loss"])
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_the_discriminator_waits_for_its_start(tmp_path: Path) -> None:
    trainer = tiny.new_trainer(tmp_path, "hq_vqgan")
    before = tiny.snapshot(trainer.stage.discriminator)  # type: ignore[arg-type]
    for trainer.step in (0, 1):
        assert "discriminator_loss" not in trainer.optimize(batch_of("hq_vqgan"))
    assert tiny.differing(before, tiny.snapshot(trainer.stage.discriminator)) == []  # type: ignore[arg-type]
    trainer.step = 2
    losses = trainer.optimize(batch_of("hq_vqgan"))
    assert {"adversarial", "discriminator_loss", "discriminator_gradient_norm"} <= set(losses)
    assert tiny.differing(before, tiny.snapshot(trainer.stage.discriminator)) != []  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- frozen


def parts_of(stage: Any, paths: list[str]) -> dict[str, nn.Module]:
    return {path: stage.get_submodule(path) for path in paths}


# fmt: off
FROZEN: list[tuple[str, list[str], list[str], list[str]]] = [
    # stage, overrides, what stays, what moves
    ("latent_vqgan", ["training.latent_vqgan.trains=decoder"],
     ["vqgan.encoder", "vqgan.quant_conv", "vqgan.quantize"], ["vqgan.decoder", "vqgan.post_quant_conv"]),
    ("hq_vqgan", [], [], ["vqgan.encoder", "vqgan.quantize", "vqgan.decoder"]),
    ("dc_vqr", [], ["hq_vqgan", "model.quantize", "model.post_quant_conv", "model.decoder"],
     ["model.encoder", "model.quant_conv", "model.attention.spatial", "model.attention.channel"]),
    ("dc_vqr", ["training.dc_vqr.train_codebook=true"],
     ["hq_vqgan", "model.post_quant_conv", "model.decoder"], ["model.encoder", "model.quantize"]),
    ("prior", [], ["latent_vqgan"], ["unet"]),
    ("enhancer", [], ["latent_vqgan", "dc_vqr", "dqe.unet"], ["dqe.down_injections", "dqe.up_injections"]),
    ("enhancer", ["training.enhancer.train_unet=true"],
     ["latent_vqgan", "dc_vqr"], ["dqe.unet", "dqe.up_injections"]),
]
# fmt: on


@pytest.mark.parametrize(
    ("name", "overrides", "frozen", "moving"), FROZEN, ids=[" ".join([case[0], *case[1]]) for case in FROZEN]
)
def test_what_is_frozen_stays_bit_for_bit_and_what_is_trained_moves(
    tmp_path: Path, name: str, overrides: list[str], frozen: list[str], moving: list[str]
) -> None:
    trainer = tiny.new_trainer(tmp_path, name, *overrides, f"training.{name}.weight_decay=0.1")
    stay, move = parts_of(trainer.stage, frozen), parts_of(trainer.stage, moving)
    before = {path: tiny.snapshot(part) for path, part in {**stay, **move}.items()}
    trainer.train()
    assert trainer.step == 4
    for path, part in stay.items():
        assert tiny.differing(before[path], tiny.snapshot(part)) == [], path
    for path, part in move.items():
        assert tiny.differing(before[path], tiny.snapshot(part)) != [], path


def test_dc_vqr_s_averaged_network_has_the_hq_vqgan_s_codebook_and_decoder(tmp_path: Path) -> None:
    trainer = tiny.new_trainer(tmp_path, "dc_vqr")
    checkpoint = Path(trainer.store.uri_of(trainer.train()))
    saved = DCVQRModel.from_pretrained(checkpoint / "ema", low_cpu_mem_usage=False)
    original = tiny.networks()["hq_vqgan"]
    for part in ("quantize", "post_quant_conv", "decoder"):
        own = tiny.snapshot(saved.get_submodule(part))
        assert tiny.differing(tiny.snapshot(original.get_submodule(part)), own) == []


# --------------------------------------------------------------------------------------------- gradients of a batch


def gradients(folder: Path, name: str, batch: Batch, parts: int) -> dict[str, Tensor]:
    """The gradient of the first objective on a batch in so many parts."""
    trainer = tiny.new_trainer(folder, name, NO_GAN)
    with torch.no_grad():  # zero projections would hide most of the injections' gradient
        for parameter in trainer.groups["generator"]:
            parameter.add_(0.02 * tiny.normal(*parameter.shape))
    for part in batch.split(parts):
        trainer.backward("generator", part, len(part) / len(batch), last=True)
    return {key: p.grad for key, p in trainer.stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_batch_in_any_parts_has_the_same_gradient(tmp_path: Path, name: str) -> None:
    """Four samples whole, in two halves, and unevenly in three parts."""
    batch = batch_of(name)
    whole = gradients(tmp_path, name, batch, 1)
    scale = max(gradient.abs().max() for gradient in whole.values())
    for parts in (2, 3):
        split = gradients(tmp_path, name, batch, parts)
        assert split.keys() == whole.keys()
        assert all((split[key] - whole[key]).abs().max() < 1e-5 * max(1, scale) for key in whole)


@pytest.mark.parametrize("parts", [2, 3])
def test_with_a_discriminator_too_the_losses_are_those_of_the_whole_batch(tmp_path: Path, parts: int) -> None:
    """The adaptive weight, and the features that revive dead codes, belong to the batch and not to its parts.

    At a small learning rate: where a gradient is 0, Adam's step is the rate with the sign of the rounding, and at the
    preset's such steps end up choosing another code for a feature.
    """
    histories = []
    settings = ("reconstruction.discriminator_start=0", "revive_every=1", "learning_rate=1e-6")
    for number in (1, parts):
        overrides = [f"training.hq_vqgan.{each}" for each in (*settings, f"gradient_accumulation={number}")]
        worker = tiny.Worker()
        tiny.new_trainer(tmp_path / str(number), "hq_vqgan", *overrides, runtime=worker).train()
        assert worker.reports[0]["revived_codes"] > 0
        histories.append(worker.reports)
    for one, other in zip(*histories, strict=True):
        assert one.keys() == other.keys()
        assert other["adversarial"] != 0
        assert all(other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5) for key in one)


def test_the_discriminator_has_its_own_rate(tmp_path: Path) -> None:
    """Adam's first step is the rate, whatever the gradient: the two networks move by 1 to 5."""
    overrides = ["training.hq_vqgan.warmup_steps=0", "training.hq_vqgan.learning_rate=1e-3"]
    overrides += [f"training.hq_vqgan.reconstruction.discriminator_{key}" for key in ("start=0", "rate=5")]
    trainer = tiny.new_trainer(tmp_path, "hq_vqgan", *overrides)
    before = {name: [p.detach().clone() for p in group] for name, group in trainer.groups.items()}
    trainer.set_learning_rate()
    trainer.optimize(batch_of("hq_vqgan"))
    moved = {
        name: max((p.detach() - old).abs().max().item() for p, old in zip(trainer.groups[name], group, strict=True))
        for name, group in before.items()
    }
    assert moved["generator"] == pytest.approx(1e-3, rel=0.05)
    assert moved["discriminator"] == pytest.approx(5e-3, rel=0.05)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_fresh_discriminator_learns_for_a_while_before_the_generator_hears_it(tmp_path: Path, parts: int) -> None:
    worker = tiny.Worker()
    terms = {"discriminator_start": 1, "discriminator_warmup": 2}
    overrides = [f"training.hq_vqgan.reconstruction.{key}={value}" for key, value in terms.items()]
    overrides += [f"training.hq_vqgan.gradient_accumulation={parts}", "training.hq_vqgan.steps=5"]
    tiny.new_trainer(tmp_path, "hq_vqgan", *overrides, runtime=worker).train()
    assert ["discriminator_loss" in report for report in worker.reports] == [False, True, True, True, True]
    assert ["adversarial" in report for report in worker.reports] == [False, False, False, True, True]


def test_accumulation_leads_to_the_same_weights(tmp_path: Path) -> None:
    """To 1e-5, but where a gradient is 0: there Adam's first step is the sign of the rounding."""
    ends = []
    for parts in (1, 2, 3):
        trainer = tiny.new_trainer(tmp_path / str(parts), "dc_vqr", f"training.dc_vqr.gradient_accumulation={parts}")
        losses = trainer.optimize(batch_of("dc_vqr"))
        ends.append((losses["loss"], torch.cat([p.detach().flatten() for p in trainer.groups["generator"]])))
    for loss, weights in ends[1:]:
        assert loss == pytest.approx(ends[0][0], rel=1e-5)
        far = (weights - ends[0][1]).abs() > 1e-5
        assert far.float().mean() < 1e-3


# --------------------------------------------------------------------------------------------------------- diffusion


def test_noise_and_timesteps_depend_on_the_samples_own_seeds_alone() -> None:
    stage, batch = tiny.new_stage("prior"), batch_of("prior")
    noisy, timesteps, noise = stage.noisy(batch)
    order = torch.tensor([2, 0])
    part = batch.take(order)
    torch.rand(5)  # somebody else draws from the global generator
    noisy_part, timesteps_part, noise_part = stage.noisy(part)
    assert torch.equal(timesteps_part, timesteps[order])
    assert torch.equal(noise_part, noise[order])
    assert torch.allclose(noisy_part, noisy[order], atol=1e-5)


def many_seeds(count: int) -> Batch:
    face = tiny.lq_batch(1).expand(count, 3, 32, 32)
    zeros = torch.zeros(count, dtype=torch.long)
    numbers = torch.arange(count)
    return Batch(face, None, None, zeros, zeros.bool(), numbers, numbers)


@pytest.mark.parametrize("power", [1, 2])
def test_timesteps_are_a_power_of_uniform_ones_over_the_whole_schedule(power: int) -> None:
    stage = tiny.new_stage("prior", f"training.prior.timestep_power={power}")
    stage._cache = torch.zeros(2, 1, 1, 1, 1)  # what is noised does not matter here
    timesteps = stage.noisy(many_seeds(4000))[1]
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    uniform = (timesteps.double() / 1000) ** (1 / power)
    quantiles = torch.quantile(uniform, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert torch.allclose(quantiles, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), atol=0.03)


def test_the_noise_is_standard_normal() -> None:
    stage = tiny.new_stage("prior")
    noise = stage.noisy(many_seeds(64))[2]
    assert noise.shape == (64, 3, 16, 16)
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_the_noise_error_is_the_mean_square_weighted_by_min_snr() -> None:
    noise, prediction = tiny.normal(4, 3, 4, 4), tiny.normal(4, 3, 4, 4, seed=1)
    timesteps = torch.tensor([0, 100, 500, 999])
    errors = (prediction - noise).square().mean(dim=(1, 2, 3))
    plain = tiny.new_stage("prior").noise_error(prediction, noise, timesteps)
    assert torch.allclose(plain["loss"], errors.mean())
    stage = tiny.new_stage("prior", "training.prior.min_snr_gamma=5")
    weighted = stage.noise_error(prediction, noise, timesteps)
    weights = min_snr_weight(stage.schedule.alphas_cumprod, timesteps, 5.0)
    assert torch.allclose(weighted["loss"], (weights * errors).mean())
    assert torch.allclose(weighted["noise_error"], errors.mean())


def test_a_perfect_prediction_gives_back_the_clean_image() -> None:
    stage, batch = tiny.new_stage("prior"), batch_of("prior")
    noisy, timesteps, noise = stage.noisy(batch)
    with torch.no_grad():
        expected = stage.latent_vqgan.from_latents(stage.latents(batch))
        found = stage.denoised(noisy, timesteps.clamp(max=500), noise)  # far out, ε hides z_0 from float32
    keep = timesteps <= 500
    assert keep.any()
    assert torch.allclose(found[keep], expected[keep], atol=1e-3)


def test_cached_latents_are_those_of_the_flipped_images() -> None:
    stage, batch = tiny.new_stage("prior"), batch_of("prior", 16)
    assert stage.settings.cache_latents
    direct = stage.latents(batch)
    latents = stage.prepare(tiny.face_images(), torch.device("cpu"), {})
    assert latents is not None
    assert batch.flips.any()
    cached = replace(batch, latents=torch.from_numpy(latents.read(batch.indices, batch.flips)))
    assert torch.allclose(stage.latents(cached), direct, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_the_condition_is_dropped_for_as_many_samples_as_asked(dropout: float) -> None:
    stage = tiny.new_stage("enhancer", f"training.enhancer.condition_dropout={dropout}")
    many = many_seeds(200)
    batch = replace(many, lq=many.hq)
    dropped = (stage.hq_features(batch) == 0).flatten(1).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(dropout, abs=0.12)
    alone = batch.take(torch.tensor([7]))
    assert (stage.hq_features(alone) == 0).all().item() == dropped[7].item()


def test_the_scaling_factor_gives_latents_of_deviation_one() -> None:
    stage, images = tiny.new_stage("latent_vqgan"), tiny.face_images()
    device = torch.device("cpu")
    for _ in range(2):  # measuring it again changes nothing
        stage.finish(images, device)
        assert encode_all(stage.vqgan, images, device, range(len(images))).std().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", STAGE_NAMES)
@torch.no_grad()
def test_every_stage_shows_pictures_of_the_batch(name: str) -> None:
    stage, batch = tiny.new_stage(name), batch_of(name)
    pictures = stage.preview(batch)
    assert len(pictures) >= 2
    assert all(images.shape == batch.hq.shape for images in pictures.values())
    assert torch.equal(pictures["HQ"], batch.hq)
    if stage.uses_lq:
        assert torch.equal(pictures["LQ"], batch.lq)


def test_a_fresh_stage_s_weights_follow_from_the_run_s_seed() -> None:
    """The same command twice makes the same run, whatever torch's own generator did before."""
    starts = []
    for noise, overrides in ((1, ()), (2, ()), (1, ("training.seed=1",))):
        with tiny.seeded(noise):
            starts.append(tiny.snapshot(make_stage("hq_vqgan", tiny.preset(*overrides), {})))
    assert tiny.differing(starts[0], starts[1]) == []
    assert tiny.differing(starts[0], starts[2]) != []
