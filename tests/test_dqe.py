"""The conditioned UNet: the prior's output bit for bit at the start and at scale 0, shapes at every level, sizes."""

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from ldbfr.config import Preset, load_preset, preset_names
from ldbfr.models.dc_vqr import DCVQRModel
from ldbfr.models.dqe import DQEUNet2DModel, make_unet
from ldbfr.models.hq_injection import Injection
from ldbfr.models.vqgan import VQGAN
from tests import tiny

TIMESTEPS = torch.tensor([3, 700])


def inputs(preset: Preset, batch: int = 2) -> tuple[Tensor, Tensor]:
    """z_t and f_HQ."""
    side, features = preset.latent_side, preset.feature_side
    return (
        tiny.normal(batch, preset.latent_vqgan.code_dim, side, side),
        tiny.normal(batch, preset.hq_vqgan.code_dim, features, features, seed=1),
    )


def build(*overrides: str) -> tuple[Preset, UNet2DModel, DQEUNet2DModel]:
    parts = tiny.networks(*overrides)
    return tiny.preset(*overrides), parts["prior"], parts["enhancer"]


@pytest.mark.parametrize("everywhere", ["true", "false"])
@pytest.mark.parametrize("ablation", ["A", "B", "C", "D"])
@torch.no_grad()
def test_untrained_injections_leave_the_unet_s_output_bit_for_bit_unchanged(ablation: str, everywhere: str) -> None:
    preset, prior, dqe = build(f"injection.ablation={ablation}", f"injection.at_full_resolution={everywhere}")
    noisy_latents, hq_features = inputs(preset)
    expected = prior(noisy_latents, TIMESTEPS).sample
    assert torch.equal(dqe(noisy_latents, TIMESTEPS, hq_features), expected)
    assert torch.equal(dqe(noisy_latents, TIMESTEPS, None), expected)


@pytest.mark.parametrize("ablation", ["A", "B", "C", "D"])
@torch.no_grad()
def test_awake_injections_make_the_condition_matter_until_its_scale_is_zero(ablation: str) -> None:
    preset, prior, dqe = build(f"injection.ablation={ablation}")
    noisy_latents, hq_features = inputs(preset)
    expected = prior(noisy_latents, TIMESTEPS).sample
    tiny.wake_injections(dqe)
    conditioned = dqe(noisy_latents, TIMESTEPS, hq_features)
    assert (conditioned - expected).abs().max() > 1e-3
    assert (conditioned - dqe(noisy_latents, TIMESTEPS, hq_features.flip(0))).abs().max() > 1e-3
    assert (conditioned - dqe(noisy_latents, TIMESTEPS, hq_features, 0.5)).abs().max() > 1e-3
    assert torch.equal(dqe(noisy_latents, TIMESTEPS, hq_features, 0.0), expected)
    assert torch.equal(dqe(noisy_latents, TIMESTEPS, None), expected)


@torch.no_grad()
def test_every_single_injection_reaches_the_output() -> None:
    preset, prior, dqe = build()
    noisy_latents, hq_features = inputs(preset)
    expected = prior(noisy_latents, TIMESTEPS).sample
    for injection in tiny.injections(dqe):
        weight = injection.projection.weight
        weight.copy_(tiny.normal(*weight.shape))
        assert (dqe(noisy_latents, TIMESTEPS, hq_features) - expected).abs().max() > 1e-4
        weight.zero_()
    assert torch.equal(dqe(noisy_latents, TIMESTEPS, hq_features), expected)


@pytest.mark.parametrize(("everywhere", "levels"), [("true", [True, True]), ("false", [False, True])])
def test_the_setting_decides_whether_the_finest_level_has_injections(everywhere: str, levels: list[bool]) -> None:
    _, _, dqe = build(f"injection.at_full_resolution={everywhere}")
    assert [isinstance(module, Injection) for module in dqe.down_injections] == levels
    assert [isinstance(module, Injection) for module in dqe.up_injections] == levels[::-1]


def test_the_first_step_trains_every_projection() -> None:
    preset, _, dqe = build()
    noisy_latents, hq_features = inputs(preset)
    dqe(noisy_latents, TIMESTEPS, hq_features).square().mean().backward()
    for injection in tiny.injections(dqe):
        assert injection.projection.weight.grad is not None
        assert injection.projection.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch() -> None:
    preset, _, dqe = build()
    tiny.wake_injections(dqe)
    noisy_latents, hq_features = inputs(preset)
    together = dqe(noisy_latents, TIMESTEPS, hq_features)
    alone = torch.cat([dqe(noisy_latents[[i]], TIMESTEPS[[i]], hq_features[[i]]) for i in range(2)])
    assert torch.allclose(together, alone, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- sizes


def watch_injections(dqe: DQEUNet2DModel) -> list[tuple[int, ...]]:
    """The shapes of f_HQ and of the features that reach every injection, in order, once the UNet is run."""
    shapes: list[tuple[int, ...]] = []
    for injection in tiny.injections(dqe):
        injection.body.register_forward_pre_hook(
            lambda _, given: shapes.append((*given[0].shape[1:], given[1].shape[1]))
        )
    return shapes


def test_the_paper_s_unet_has_its_parameters_and_shapes_at_every_level() -> None:
    preset = load_preset("paper_512")
    with torch.device("meta"):
        prior = make_unet(preset.unet, 3, preset.latent_side)
        dqe = DQEUNet2DModel.from_unet(prior, preset.injection, 256, preset.feature_side)
        shapes = watch_injections(dqe)
        output = dqe(torch.zeros(1, 3, 128, 128), torch.zeros(1, dtype=torch.long), torch.zeros(1, 256, 32, 32))
    assert round(sum(p.numel() for p in prior.parameters()) / 1e6, 2) == 274.06
    assert output.shape == (1, 3, 128, 128)
    down = [(448, 64, 64, 64), (672, 32, 32, 256), (896, 16, 16, 1024)]  # (C, h, w, channels of f_HQ there)
    assert shapes == [*down, *reversed(down)]


@pytest.mark.parametrize("name", preset_names())
def test_the_networks_of_every_preset_fit_together(name: str) -> None:
    preset = load_preset(name)
    with torch.device("meta"):
        dc_vqr = DCVQRModel(**preset.hq_vqgan.model_dump())
        latent_vqgan = VQGAN.from_settings(preset.latent_vqgan)
        prior = make_unet(preset.unet, preset.latent_vqgan.code_dim, preset.latent_side)
        dqe = DQEUNet2DModel.from_unet(prior, preset.injection, preset.hq_vqgan.code_dim, preset.feature_side)
        faces = torch.zeros(1, 3, preset.side, preset.side)
        latents = latent_vqgan.to_latents(faces)
        noise = dqe(latents, torch.zeros(1, dtype=torch.long), dc_vqr(faces).hq_features)
        image = latent_vqgan.from_latents(noise)
    assert latents.shape == noise.shape
    assert latents.shape[-1] == preset.latent_side
    assert image.shape == faces.shape


def test_the_starter_fits_24_mb_in_half_precision() -> None:
    preset = load_preset("faces_64")
    with torch.device("meta"):
        prior = make_unet(preset.unet, preset.latent_vqgan.code_dim, preset.latent_side)
        parts = (
            DCVQRModel(**preset.hq_vqgan.model_dump()),
            VQGAN.from_settings(preset.latent_vqgan),
            DQEUNet2DModel.from_unet(prior, preset.injection, preset.hq_vqgan.code_dim, preset.feature_side),
        )
    assert sum(p.numel() for part in parts for p in part.parameters()) * 2 <= 24e6
