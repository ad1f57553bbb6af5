"""The noise schedule against its closed form; samplers on Gaussian data, whose noise predictor is known exactly.

For z_0 ~ N(m, s²) the marginal at step t is N(√ᾱ m, ᾱ s² + 1 - ᾱ), so that
    ε*(z, t) = √(1 - ᾱ) (z - √ᾱ m) / (ᾱ s² + 1 - ᾱ),
and the probability-flow ODE keeps the standardised value: z_0 = m + s (z_T - √ᾱ_T m) / √(ᾱ_T s² + 1 - ᾱ_T).
"""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldbfr.config import DiffusionSettings, SchedulerName
from ldbfr.errors import ConfigError
from ldbfr.models.dc_vqr import DCVQRModel
from ldbfr.pipeline import LDBFRPipeline, Sampler
from ldbfr.schedules import make_sampler, noise_schedule
from tests import tiny

MEAN, STD = 0.4, 0.7
SETTINGS = DiffusionSettings()
ODE_SAMPLERS: list[SchedulerName] = ["dpm_solver", "ddim", "unipc"]


def alphas_cumprod(settings: DiffusionSettings = SETTINGS) -> np.ndarray:
    """ᾱ of CompVis's "linear" schedule: the square roots of β are evenly spaced; in double precision."""
    count = settings.num_train_timesteps
    betas = np.linspace(settings.beta_start**0.5, settings.beta_end**0.5, count, dtype=np.float64) ** 2
    return np.asarray(np.cumprod(1 - betas))


class GaussianUNet(nn.Module):
    """The exact noise predictor for z_0 ~ N(m, s²) in every element, with the conditioned UNet's signature."""

    def __init__(self, mean: float = MEAN, std: float = STD) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.calls: list[int] = []

    def forward(self, z: Tensor, timesteps: Tensor, hq_features: Tensor | None, condition_scale: float = 1.0) -> Tensor:
        self.calls.append(int(timesteps[0]))
        kept = torch.tensor(alphas_cumprod())[timesteps].view(-1, 1, 1, 1)
        variance = kept * self.std**2 + 1 - kept
        return ((1 - kept).sqrt() * (z.double() - kept.sqrt() * self.mean) / variance).to(z.dtype)


def ode_solution(z: Tensor, timestep: int, to_alpha: float = 1.0, mean: float = MEAN, std: float = STD) -> Tensor:
    """Where the probability-flow ODE takes z from a step to the noise level ᾱ = `to_alpha`."""
    kept = alphas_cumprod()[timestep]
    standard = (z.double() - math.sqrt(kept) * mean) / math.sqrt(kept * std**2 + 1 - kept)
    return math.sqrt(to_alpha) * mean + math.sqrt(to_alpha * std**2 + 1 - to_alpha) * standard


def solve(name: SchedulerName, steps: int, z: Tensor, unet: GaussianUNet, **extra: Any) -> Tensor:
    """Denoise z from pure noise in `steps` steps."""
    scheduler: Any = make_sampler(name, SETTINGS)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        prediction = unet(z, timestep.long().expand(len(z)), None)
        z = scheduler.step(prediction, timestep, z, **extra).prev_sample
    return z


# --------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    "settings", [SETTINGS, DiffusionSettings(num_train_timesteps=50, beta_start=1e-3, beta_end=0.3)]
)
def test_the_noise_schedule_is_the_closed_form(settings: DiffusionSettings) -> None:
    schedule = noise_schedule(settings)
    assert np.allclose(schedule.alphas_cumprod.numpy(), alphas_cumprod(settings), rtol=2e-5)


def test_ldm_s_schedule_ends_in_almost_pure_noise() -> None:
    assert alphas_cumprod()[-1] < 0.01
    assert alphas_cumprod()[0] == pytest.approx(1 - 0.0015)


def test_the_forward_process_is_the_weighted_sum() -> None:
    z, noise, timesteps = tiny.normal(3, 2, 4, 4), tiny.normal(3, 2, 4, 4, seed=1), torch.tensor([0, 300, 999])
    kept = torch.tensor(alphas_cumprod())[timesteps].view(-1, 1, 1, 1)
    expected = kept.sqrt() * z + (1 - kept).sqrt() * noise
    assert torch.allclose(noise_schedule(SETTINGS).add_noise(z, noise, timesteps).double(), expected, atol=1e-4)


def test_an_unknown_scheduler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'euler'.*dpm_solver, ddim, ddpm or unipc"):
        make_sampler("euler", SETTINGS)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- samplers, Gaussian data


DATA = [(MEAN, STD), (-1.0, 0.5), (0.0, 1.0)]


def errors(name: SchedulerName, counts: list[int], mean: float = MEAN, std: float = STD) -> np.ndarray:
    """Root mean square distance from the ODE's solution at step 199, which every multiple of 5 steps visits."""
    start = torch.linspace(-2.5, 2.5, 64, dtype=torch.float64).view(1, 1, 8, 8)
    exact = ode_solution(start, 999, float(alphas_cumprod()[199]), mean, std)
    found = []
    for count in counts:
        z, unet, scheduler = start, GaussianUNet(mean, std), cast(Any, make_sampler(name, SETTINGS))
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps.tolist()
        assert (timesteps[0], timesteps.count(199)) == (999, 1)
        for timestep in scheduler.timesteps[: timesteps.index(199)]:
            z = scheduler.step(unet(z, timestep.long().expand(1), None), timestep, z).prev_sample
        found.append((z - exact).square().mean().sqrt().item())
    return np.array(found)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_solver", 2), ("unipc", 3)])
@pytest.mark.parametrize(("mean", "std"), DATA)
def test_a_deterministic_sampler_converges_to_the_ode_with_its_order(
    name: SchedulerName, order: int, mean: float, std: float
) -> None:
    """Halving the step divides the error by 2^order; UniPC's corrector gains one order on its predictor's two."""
    found = errors(name, [20, 40], mean, std)
    assert found[1] < (0.03 if order == 1 else 1e-3)
    assert np.log2(found[0] / found[1]) == pytest.approx(order, abs=0.3 if order < 3 else 1.3)


def test_in_the_same_number_of_steps_dpm_solver_is_far_closer_than_ddim() -> None:
    assert (errors("dpm_solver", [10, 20, 40]) * 3 < errors("ddim", [10, 20, 40])).all()


@pytest.mark.parametrize("name", ODE_SAMPLERS)
@pytest.mark.parametrize(("mean", "std"), DATA)
def test_the_last_step_ends_at_the_clean_latents_that_it_expects(name: SchedulerName, mean: float, std: float) -> None:
    """From the last timestep on one step remains, to no noise: it gives E[z_0 | z_t], which is known in closed form."""
    z = torch.linspace(-2.5, 2.5, 64).view(1, 1, 8, 8)
    end, last = solve(name, 50, z, GaussianUNet(mean, std)), 19
    kept = float(alphas_cumprod()[last])
    before = ode_solution(z, 999, kept, mean, std)
    expected = mean + math.sqrt(kept) * std**2 / (kept * std**2 + 1 - kept) * (before - math.sqrt(kept) * mean)
    assert (end - expected).abs().max() < (0.08 if name == "ddim" else 0.03)


def test_ddpm_draws_from_the_data_s_distribution() -> None:
    """Equation (1) with all 1,000 steps: 16,384 independent draws have the data's mean, deviation and shape."""
    z = tiny.normal(1, 1, 128, 128)
    end = solve("ddpm", 1000, z, GaussianUNet(), generator=torch.Generator().manual_seed(5))
    standard = ((end - MEAN) / STD).flatten()
    assert standard.mean().abs() < 4 / 128
    assert standard.std().item() == pytest.approx(1, abs=4 / (128 * 2**0.5) + 0.01)
    assert standard.pow(3).mean().abs() < 0.1
    assert standard.pow(4).mean().item() == pytest.approx(3, abs=0.25)
    assert torch.corrcoef(torch.stack([standard, z.flatten()]))[0, 1].abs() < 0.05  # the start is forgotten


@pytest.mark.parametrize("timestep", [999, 500, 20])
def test_an_ancestral_step_has_the_posterior_s_mean_and_variance(timestep: int) -> None:
    """q(z_{t-1} | z_t, z_0) of DDPM, equation (7) of Ho et al. 2020, for a known z_0."""
    scheduler: Any = make_sampler("ddpm", SETTINGS)
    scheduler.set_timesteps(1000)
    kept, before = alphas_cumprod()[timestep], alphas_cumprod()[timestep - 1]
    beta = 1 - kept / before
    clean, noise = 0.3, -1.2
    z = torch.full((1, 1, 200, 200), math.sqrt(kept) * clean + math.sqrt(1 - kept) * noise)
    stepped = scheduler.step(torch.full_like(z, noise), timestep, z, generator=torch.Generator().manual_seed(0))
    mean = (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * z[0, 0, 0, 0].item()) / (1 - kept)
    variance = (1 - before) / (1 - kept) * beta
    assert stepped.prev_sample.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance) / 200 + 1e-4)
    assert stepped.prev_sample.var().item() == pytest.approx(variance, rel=0.03)


# ------------------------------------------------------------------------------------------- the pipeline's own sampler


def gaussian_pipeline(std: float = STD) -> tuple[LDBFRPipeline, GaussianUNet]:
    """A pipeline whose UNet is the exact predictor."""
    parts = tiny.networks()
    unet = GaussianUNet(std=std)
    pipeline = LDBFRPipeline(parts["dc_vqr"], parts["latent_vqgan"], parts["enhancer"], tiny.preset())
    pipeline.unet = unet
    return pipeline, unet


def draw(
    name: SchedulerName, steps: int, start: int, initial: Tensor | None, num: int, std: float = STD
) -> tuple[Tensor, GaussianUNet]:
    """`num` images' latents from the pipeline's sampler."""
    pipeline, unet = gaussian_pipeline(std)
    sampler = Sampler(pipeline, steps, start, 1.0, name, None)
    keys = [(0, bytes([number % 256, number // 256]), 0) for number in range(num)]
    return sampler.sample(torch.zeros(num, 16, 8, 8), initial, keys), unet


@pytest.mark.parametrize(("name", "steps"), [("dpm_solver", 100), ("ddim", 250), ("unipc", 100), ("ddpm", 1000)])
def test_the_pipeline_s_sampler_draws_the_data_s_distribution_from_pure_noise(name: SchedulerName, steps: int) -> None:
    latents, unet = draw(name, steps, 1000, None, 8)
    assert unet.calls[0] == 999
    assert len(unet.calls) == steps
    assert unet.calls == sorted(unet.calls, reverse=True)
    assert latents.shape == (8, 3, 16, 16)
    tolerance = 4 * STD / math.sqrt(latents.numel()) + 0.02
    assert latents.mean().item() == pytest.approx(MEAN, abs=tolerance)
    assert latents.std().item() == pytest.approx(STD, abs=tolerance)


@pytest.mark.parametrize("name", [*ODE_SAMPLERS, "ddpm"])
@pytest.mark.parametrize(("steps", "start"), [(8, 400), (16, 400), (5, 333), (4, 500), (1, 100), (40, 40)])
def test_a_start_in_between_runs_the_asked_steps_from_there(name: SchedulerName, steps: int, start: int) -> None:
    _, unet = draw(name, steps, start, torch.zeros(1, 3, 16, 16), 1)
    assert len(unet.calls) == steps
    assert len(set(unet.calls)) == steps
    assert unet.calls == sorted(unet.calls, reverse=True)
    assert start - 1000 / steps - 1 <= unet.calls[0] < start + 1


@pytest.mark.parametrize(("name", "steps"), [("dpm_solver", 16), ("ddim", 100), ("unipc", 16), ("ddpm", 400)])
def test_data_noised_to_a_step_in_between_comes_back_with_its_distribution(name: SchedulerName, steps: int) -> None:
    """Latents of the data's own distribution, noised and denoised, have that distribution again."""
    initial = MEAN + STD * tiny.normal(8, 3, 16, 16, seed=3)
    latents, unet = draw(name, steps, 400, initial, 8)
    assert unet.calls[0] == pytest.approx(400, abs=3)
    tolerance = 4 * STD / math.sqrt(latents.numel()) + 0.02
    assert latents.mean().item() == pytest.approx(MEAN, abs=tolerance)
    assert latents.std().item() == pytest.approx(STD, abs=tolerance)
    assert 0.1 < torch.corrcoef(torch.stack([latents.flatten(), initial.flatten()]))[0, 1] < 0.95


@pytest.mark.parametrize("name", [*ODE_SAMPLERS, "ddpm"])
def test_a_number_of_steps_that_does_not_divide_the_schedule_gives_the_distribution_too(name: SchedulerName) -> None:
    """200 steps from 300: one step is 1.5 timesteps."""
    initial = MEAN + STD * tiny.normal(8, 3, 16, 16, seed=3)
    latents, _ = draw(name, 200, 300, initial, 8)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert latents.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("name", ODE_SAMPLERS)
def test_a_start_in_between_follows_the_ode_from_the_noised_latents(name: SchedulerName) -> None:
    """The noised latents are read off the first call, the end is compared with the closed form."""
    pipeline, unet = gaussian_pipeline()
    seen: list[Tensor] = []
    unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    initial = torch.full((1, 3, 16, 16), 0.9)
    sampler = Sampler(pipeline, 60, 600, 1.0, name, None)
    end = sampler.sample(torch.zeros(1, 16, 8, 8), initial, [(0, b"face", 0)])
    expected = ode_solution(seen[0], unet.calls[0])
    assert (end - expected).abs().max() < (0.1 if name == "ddim" else 0.05)
    kept = alphas_cumprod()[unet.calls[0]]
    noise = (seen[0] - math.sqrt(kept) * 0.9) / math.sqrt(1 - kept)
    assert noise.mean().abs() < 4 / math.sqrt(noise.numel())
    assert noise.std().item() == pytest.approx(1, abs=0.1)


def test_data_without_spread_is_found_exactly_from_anywhere() -> None:
    """s → 0: every path ends at the mean, and no noise is left."""
    for name in ODE_SAMPLERS:
        latents, _ = draw(name, 12, 500, torch.full((2, 3, 16, 16), -3.0), 2, std=1e-3)
        assert (latents - MEAN).abs().max() < 0.01


def test_the_networks_are_those_of_the_pipeline() -> None:
    pipeline, unet = gaussian_pipeline()
    assert pipeline.unet is unet
    assert isinstance(pipeline.dc_vqr, DCVQRModel)
