"""Training objectives against brute force and their formulas."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import laplace
from torch import nn

from ldbfr.config import ReconstructionSettings
from ldbfr.errors import WeightsError
from ldbfr.schedules import noise_schedule
from ldbfr.training.losses import (
    PerceptualLoss,
    ReconstructionLoss,
    adaptive_weight,
    energy_difference,
    gradient_difference,
    hinge_discriminator_loss,
    laplacian,
    last_layer_gradients,
    min_snr_weight,
)
from tests import tiny


def test_the_gradient_difference_is_the_mean_over_all_neighbours() -> None:
    images, target = tiny.normal(2, 3, 4, 5), tiny.normal(2, 3, 4, 5, seed=1)
    across, down = [], []
    for b in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(5):
                    error = images[b, c] - target[b, c]
                    if x:
                        across.append(abs(error[y, x] - error[y, x - 1]).item())
                    if y:
                        down.append(abs(error[y, x] - error[y - 1, x]).item())
    expected = (sum(across) / len(across) + sum(down) / len(down)) / 2
    assert gradient_difference(images, target).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_difference_ignores_a_constant_offset() -> None:
    images = tiny.lq_batch()
    assert gradient_difference(images + 0.3, images).item() == pytest.approx(0, abs=1e-6)


def test_the_laplacian_is_scipy_s() -> None:
    images = tiny.normal(2, 3, 6, 7)
    expected = [[laplace(channel.numpy(), mode="nearest") for channel in image] for image in images]
    assert torch.allclose(laplacian(images), torch.tensor(np.array(expected)), atol=1e-5)


def test_the_energy_difference_asks_for_as_much_detail_not_for_the_same() -> None:
    board = (torch.arange(32)[:, None] + torch.arange(32)[None]).remainder(2).mul(2).sub(1).float().expand(1, 3, 32, 32)
    inner = (slice(None), slice(None), slice(8, 24), slice(8, 24))  # the border sees itself
    one, other = 0.1 * board, -0.1 * board
    assert energy_difference(one[inner], other[inner]).item() == pytest.approx(0, abs=1e-6)
    assert (one - other).abs().mean() > 0.1
    # |Laplacian| of ±a is 8a inside: a blurred board of half the contrast lacks half of it
    middle = energy_difference(one, 0.5 * one, window=1)
    assert middle.item() == pytest.approx(laplacian(0.5 * one).abs().mean().item(), rel=1e-6)
    assert laplacian(one)[inner].abs().mean().item() == pytest.approx(0.8, rel=1e-5)


@pytest.mark.parametrize(
    ("real", "fake", "expected"),
    [([2.0, 1.0], [-1.0, -5.0], 0.0), ([0.0], [0.0], 1.0), ([-1.0], [1.0], 2.0), ([0.5, 2.0], [-0.5, -2.0], 0.25)],
)
def test_the_hinge_loss_is_zero_beyond_the_margin_and_linear_before(
    real: list[float], fake: list[float], expected: float
) -> None:
    assert hinge_discriminator_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(expected)


def test_the_adaptive_weight_is_the_ratio_of_the_gradient_norms() -> None:
    layer = nn.Parameter(tiny.normal(4, 3))
    inputs, target = tiny.normal(3, 10, seed=1), tiny.normal(4, 10, seed=2)
    reconstruction = (layer @ inputs - target).square().mean()
    adversarial = -(layer @ inputs).mean()
    residual = (layer @ inputs - target).detach()
    rec = (2 * residual @ inputs.T / residual.numel()).norm()
    adv = (torch.full((4, 10), -1 / 40) @ inputs.T).norm()
    weight = adaptive_weight(last_layer_gradients(reconstruction, adversarial, layer))
    assert weight.item() == pytest.approx((rec / (adv + 1e-4)).item(), rel=1e-4)
    assert not weight.requires_grad
    (reconstruction + weight * adversarial).backward()  # both graphs are still there


def test_the_adaptive_weight_is_bounded_where_the_adversarial_gradient_vanishes() -> None:
    layer = nn.Parameter(torch.ones(1))
    gradients = last_layer_gradients(1e9 * layer.sum(), 0 * layer.sum(), layer)
    assert adaptive_weight(gradients).item() == 1e4


def test_the_min_snr_weight_is_its_formula() -> None:
    """min(SNR, γ) / SNR: 1 where there is much noise, γ / SNR where there is little."""
    alphas = noise_schedule(tiny.preset().diffusion).alphas_cumprod
    timesteps = torch.arange(0, 1000, 37)
    weights = min_snr_weight(alphas, timesteps, 5.0)
    for timestep, weight in zip(timesteps.tolist(), weights.tolist(), strict=True):
        snr = alphas[timestep].item() / (1 - alphas[timestep].item())
        assert weight == pytest.approx(min(snr, 5.0) / snr, rel=1e-4)
    assert weights[0] < 0.01
    assert weights[-1] == 1
    assert (weights.diff() >= 0).all()


def test_the_reconstruction_loss_is_the_weighted_sum_of_its_terms() -> None:
    images, target = tiny.lq_batch(), tiny.lq_batch(seed=1)
    loss = ReconstructionLoss(ReconstructionSettings(l1=0.5, l2=2.0, gradient=3.0, energy=4.0))
    difference = images - target
    expected = 0.5 * difference.abs().mean() + 2 * difference.square().mean()
    expected = expected + 3 * gradient_difference(images, target) + 4 * energy_difference(images, target)
    assert loss(images, target).item() == pytest.approx(expected.item(), rel=1e-5)
    assert ReconstructionLoss(ReconstructionSettings())(images, images).item() == 0


def test_half_precision_images_are_compared_in_full() -> None:
    loss = ReconstructionLoss(ReconstructionSettings(l2=1.0))
    assert loss(tiny.lq_batch().bfloat16(), tiny.lq_batch(seed=1)).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- perceptual


@pytest.fixture(scope="module")
def random_backbone() -> PerceptualLoss:
    pytest.importorskip("lpips")
    with tiny.seeded():
        return PerceptualLoss("random")


def test_the_untrained_backbone_measures_a_distance(random_backbone: PerceptualLoss) -> None:
    images, target = tiny.lq_batch(2), tiny.lq_batch(2, seed=1)
    assert random_backbone(images, images).item() == pytest.approx(0, abs=1e-6)
    far, near = random_backbone(images, target), random_backbone(images, 0.9 * images + 0.1 * target)
    assert far > near > 0
    assert random_backbone(target, images).item() == pytest.approx(far.item(), rel=1e-4)


def test_the_perceptual_loss_moves_images_and_not_itself(random_backbone: PerceptualLoss) -> None:
    images = tiny.lq_batch(1).requires_grad_()
    random_backbone(images, tiny.lq_batch(1, seed=1)).backward()
    assert images.grad is not None
    assert math.isfinite(images.grad.norm().item())
    assert images.grad.norm() > 0
    assert not any(parameter.requires_grad for parameter in random_backbone.parameters())


def test_the_trained_backbone_is_never_downloaded_but_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lpips")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        PerceptualLoss("vgg")
    for text in ("vgg16-397923af.pth", str(tmp_path), 'perceptual_backbone="random"', "perceptual=0"):
        assert text in str(caught.value)
    assert list(tmp_path.rglob("*.pth")) == []
