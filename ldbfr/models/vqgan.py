"""The vector-quantised autoencoders: HQ VQGAN and latent VQGAN, their codebook, and the patch discriminator.

Both VQGANs are one class at two sizes. It is made of the encoder and decoder blocks of diffusers' `VQModel`, with the
same parameter names, so that folders in that layout load as they are.

Sources: Esser et al. 2021, "Taming Transformers" (https://arxiv.org/abs/2012.09841), sections 3.1 and A.4; Rombach et
al. 2022, "Latent Diffusion Models" (https://arxiv.org/abs/2112.10752), table 8 (VQ-f4); LD-BFR, sections 3.1 and 3.2.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ldbfr.config import VQGANSettings

LOOKUP_ELEMENTS = 1 << 24
"""Largest slice of the distance matrix held at once while codes are looked up: 2**24 floats, 64 MiB.

Whole, it would take 512 MiB for one 512 px image of the latent VQGAN (16,384 positions, 8,192 codes)."""


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off; meta tensors, which only carry shapes, know no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Quantized(NamedTuple):
    """What the codebook gives back for a feature map.

    `quantized` (B, C, h, w): nearest codes, with the straight-through gradient of the input;
    `code_indices` (B, h, w): which codes, int64.
    """

    quantized: Tensor
    code_indices: Tensor


class Codebook(nn.Module):
    """The codebook of high-quality features and the nearest-code lookup (LD-BFR equation (2)).

    Args:
        num_codes: how many codes K.
        code_dim: the length C of a code.
    """

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    @property
    def codes(self) -> Tensor:
        """All codes, (K, C)."""
        return self.embedding.weight

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """Index of the nearest code (squared Euclidean distance) of every position: (B, C, h, w) -> (B, h, w) int64.

        Computed in float32, in chunks of at most `LOOKUP_ELEMENTS` distances, whatever the batch.
        """
        batch, channels, height, width = features.shape
        flat = features.float().permute(0, 2, 3, 1).reshape(-1, channels)  # (B·h·w, C)
        codes = self.codes.float()
        half_norms = codes.square().sum(dim=1) / 2  # |f - e|² = |f|² - 2 (f·e - |e|²/2)
        chunk = max(1, LOOKUP_ELEMENTS // len(codes))
        with full_precision(features.device):
            indices = [(part @ codes.T - half_norms).argmax(dim=1) for part in flat.split(chunk)]
        return torch.cat(indices).view(batch, height, width)

    def lookup(self, code_indices: Tensor) -> Tensor:
        """The codes at the given indices: (B, h, w) -> (B, C, h, w)."""
        codes = cast(Tensor, self.embedding(code_indices))
        return codes.permute(0, 3, 1, 2).contiguous()

    def forward(self, features: Tensor) -> Quantized:
        """Replace every position by its nearest code; the gradient passes straight through to `features`."""
        code_indices = self.nearest(features)
        codes = self.lookup(code_indices)
        return Quantized(features + (codes - features).detach(), code_indices)

    def losses(self, features: Tensor, code_indices: Tensor) -> tuple[Tensor, Tensor]:
        """The codebook and the commitment loss (Taming Transformers, equation (4)), each a mean over elements.

        The first moves codes to the features that chose them, the second keeps features near their codes.
        """
        codes = self.lookup(code_indices)
        codebook = (codes - features.detach()).square().mean()
        commitment = (features - codes.detach()).square().mean()
        return codebook, commitment


class VQGAN(ModelMixin, ConfigMixin):
    """A VQGAN: encoder, codebook, decoder.

    As *HQ VQGAN* its encoder gives the target features f̂_HQ, and its codebook and decoder serve DC-VQR. As *latent
    VQGAN* it gives the space in which the diffusion runs: latents z_0 are the encoder's output before quantisation,
    times `scaling_factor`.

    Args:
        block_out_channels: channels of every level, finest first; each level after the first halves the resolution.
        layers_per_block: residual blocks of a level (one more in the decoder).
        code_dim: channels of a latent and of a code.
        num_codes: size of the codebook.
        level_attention: self-attention in the coarsest level too (taming's shape), besides the middle block.
        mid_attention: self-attention in the middle block.
        norm_num_groups: groups of the group normalisation.
        scaling_factor: 1 / standard deviation of the latents; 1.0 for CompVis's weights.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (32, 64),
        layers_per_block: int = 1,
        code_dim: int = 8,
        num_codes: int = 64,
        level_attention: bool = False,
        mid_attention: bool = True,
        norm_num_groups: int = 32,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder = make_encoder(
            block_out_channels, layers_per_block, code_dim, level_attention, mid_attention, norm_num_groups
        )
        self.quant_conv = nn.Conv2d(code_dim, code_dim, 1)
        self.quantize = Codebook(num_codes, code_dim)
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 1)
        self.decoder = make_decoder(
            block_out_channels, layers_per_block, code_dim, level_attention, mid_attention, norm_num_groups
        )

    @classmethod
    def from_settings(cls, settings: VQGANSettings) -> VQGAN:
        """A freshly initialised network with the preset's numbers."""
        return cls(**settings.model_dump())

    @property
    def downsampling(self) -> int:
        """Image side over latent side, f."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def encode(self, images: Tensor) -> Tensor:
        """Features before quantisation, unscaled: (B, 3, S, S) in [-1, 1] -> (B, C, S/f, S/f)."""
        return cast(Tensor, self.quant_conv(self.encoder(images)))

    def decode(self, quantized: Tensor) -> Tensor:
        """Images from quantised features: (B, C, S/f, S/f) -> (B, 3, S, S)."""
        return cast(Tensor, self.decoder(self.post_quant_conv(quantized)))

    def to_latents(self, images: Tensor) -> Tensor:
        """z_0, what the diffusion works on: `encode` times the scaling factor."""
        return self.encode(images) * self.config["scaling_factor"]

    def from_latents(self, latents: Tensor) -> Tensor:
        """Images from z_0: unscaled, quantised again, decoded (latent diffusion, section 3.1)."""
        features = latents / self.config["scaling_factor"]
        return self.decode(self.quantize(features).quantized)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct: images -> (reconstruction, features before quantisation, code indices)."""
        features = self.encode(images)
        quantized, code_indices = self.quantize(features)
        return self.decode(quantized), features, code_indices

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive GAN weight is measured (Taming Transformers, equation (7))."""
        return cast(nn.Parameter, self.decoder.conv_out.weight)


def make_encoder(
    channels: tuple[int, ...], layers: int, out_channels: int, level_attention: bool, mid_attention: bool, groups: int
) -> Encoder:
    """The VQGAN encoder: (B, 3, S, S) -> (B, out_channels, S/f, S/f) with f = 2^(levels - 1)."""
    coarsest = "AttnDownEncoderBlock2D" if level_attention else "DownEncoderBlock2D"
    return Encoder(
        in_channels=3,
        out_channels=out_channels,
        down_block_types=("DownEncoderBlock2D",) * (len(channels) - 1) + (coarsest,),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        double_z=False,
        mid_block_add_attention=mid_attention,
    )


def make_decoder(
    channels: tuple[int, ...], layers: int, in_channels: int, level_attention: bool, mid_attention: bool, groups: int
) -> Decoder:
    """The VQGAN decoder: (B, in_channels, S/f, S/f) -> (B, 3, S, S)."""
    coarsest = "AttnUpDecoderBlock2D" if level_attention else "UpDecoderBlock2D"
    return Decoder(
        in_channels=in_channels,
        out_channels=3,
        up_block_types=(coarsest,) + ("UpDecoderBlock2D",) * (len(channels) - 1),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        mid_block_add_attention=mid_attention,
    )


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """PatchGAN discriminator: one realness score for every patch (Isola et al. 2017, section 3.2.2).

    Args:
        channels: channels of the first layer; each of the `num_layers` strided layers doubles them, up to 8 times.
        num_layers: strided layers; 3 sees patches of 70 px.
    """

    @register_to_config
    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, num_layers + 1):
            wider = channels * min(2**level, 8)
            stride = 2 if level < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(1, wider),  # batch norm would make a worker's score depend on its share of the batch
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, positive for real: (B, 3, S, S) -> (B, 1, s, s)."""
        return cast(Tensor, self.layers(images))
