"""The objectives of the training stages as functions and small modules.

Sources: LD-BFR equations (2) to (6); Esser et al. 2021 (Taming Transformers), section 3.1; Hang et al. 2023, "Min-SNR"
(https://arxiv.org/abs/2303.09556), equation (7).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldbfr.config import ReconstructionSettings
from ldbfr.errors import WeightsError

VGG16_FILE = "vgg16-397923af.pth"


def gradient_difference(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical image gradients (Mathieu et al. 2016, section 3.2)."""
    error = images - target
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


def energy_difference(images: Tensor, target: Tensor, window: int = 8) -> Tensor:
    """Mean absolute difference of the mean absolute Laplacians in windows, per channel: two (B, 3, S, S) -> scalar.

    Our own, for sharpness without a discriminator: it asks for as much detail as the target has, not for the same.
    """
    own, wanted = (F.avg_pool2d(laplacian(each).abs(), window) for each in (images, target))
    return F.l1_loss(own, wanted)


def laplacian(images: Tensor) -> Tensor:
    """Sum of the four neighbours' differences, mirrored at the border: (B, C, S, S) -> (B, C, S, S)."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    around = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    return around - 4 * images


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (E[max(0, 1 - D(x))] + E[max(0, 1 + D(x̂))]) (Lim and Ye 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def last_layer_gradients(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """∇ reconstruction and ∇ adversarial at the decoder's last layer, flat: (2, number of its weights)."""
    gradients = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].flatten() for loss in (reconstruction, adversarial)
    ]
    return torch.stack(gradients).detach()


def adaptive_weight(gradients: Tensor) -> Tensor:
    """|∇ reconstruction| / |∇ adversarial| (Taming Transformers, equation (7)), ≤ 10⁴, see `last_layer_gradients`."""
    reconstruction, adversarial = gradients.norm(dim=1)
    return (reconstruction / (adversarial + 1e-4)).clamp(0, 1e4)


def min_snr_weight(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float) -> Tensor:
    """min(SNR(t), γ) / SNR(t), the weight of a sample's noise error for ε-prediction: (B,) -> (B,)."""
    kept = alphas_cumprod[timesteps]
    snr = kept / (1 - kept)
    return snr.clamp(max=gamma) / snr


class PerceptualLoss(nn.Module):
    """LPIPS distance of images in [-1, 1] (Zhang et al. 2018, https://arxiv.org/abs/1801.03924).

    Args:
        backbone: "vgg" is the trained VGG-16 and needs torchvision's file; "random" is the same network untrained.

    Raises:
        WeightsError: the backbone's file is not there; it is never downloaded behind the user's back.
    """

    def __init__(self, backbone: Literal["vgg", "random"]) -> None:
        super().__init__()
        import lpips

        folder = Path(torch.hub.get_dir()) / "checkpoints"
        if backbone == "vgg" and not (folder / VGG16_FILE).is_file():
            raise WeightsError(
                f"the perceptual loss needs {VGG16_FILE} of torchvision in {folder}: put it there, or set "
                f'perceptual_backbone="random", or perceptual=0'
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's own deprecations inside lpips
            try:
                self.net = lpips.LPIPS(net="vgg", pnet_rand=backbone == "random", verbose=False)
            except (RuntimeError, EOFError, UnpicklingError) as error:
                raise WeightsError(f"{folder / VGG16_FILE} is damaged ({error}); copy it again") from error
        self.requires_grad_(False)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Mean distance: two batches (B, 3, S, S) -> scalar."""
        return cast(Tensor, self.net(images, target).mean())


class ReconstructionLoss(nn.Module):
    """The weighted terms between images and their reconstruction, without the adversarial one."""

    def __init__(self, settings: ReconstructionSettings) -> None:
        super().__init__()
        self.settings = settings
        self.perceptual = PerceptualLoss(settings.perceptual_backbone) if settings.perceptual else None

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Two batches (B, 3, S, S) in [-1, 1] -> scalar."""
        images, weights = images.float(), self.settings
        loss = weights.l1 * F.l1_loss(images, target)
        if weights.l2:
            loss = loss + weights.l2 * F.mse_loss(images, target)
        if weights.gradient:
            loss = loss + weights.gradient * gradient_difference(images, target)
        if weights.energy:
            loss = loss + weights.energy * energy_difference(images, target)
        if self.perceptual is not None:
            loss = loss + weights.perceptual * self.perceptual(images, target)
        return loss
