"""DC-VQR: dual cross-attention vector-quantised restoration (LD-BFR, section 3.1).

The first stage. x_LQ is encoded, every feature is replaced by its nearest high-quality code, and dual cross-attention
brings identity and colour of the input back into the codes.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ldbfr.config import DualCrossAttentionSettings
from ldbfr.models.vqgan import VQGAN, Codebook, make_decoder, make_encoder


class SpatialCrossAttention(nn.Module):
    """Spatial half of DCAM: Q from `lq_features`, K and V from `quantized`, over the h·w positions.

    It starts as a pass-through of the fetched codes: W_V is the identity and W_Q = W_K = gain · I, so that a position
    attends to the positions that hold its own code. Started at random, the fetched codes are lost and training does
    not recover (docs/training-log.md).

    Args:
        channels: C.
        gain: the initial diagonal of W_Q and W_K; see `pass_through_gain`.
    """

    def __init__(self, channels: int, gain: float) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.reset(gain)

    @torch.no_grad()
    def reset(self, gain: float) -> None:
        """Set the weights to the pass-through."""
        nn.init.eye_(self.to_v.weight)
        for projection in (self.to_q, self.to_k):
            nn.init.eye_(projection.weight)
            projection.weight.mul_(gain)

    def forward(self, lq_features: Tensor, quantized: Tensor) -> Tensor:
        """softmax(Q Kᵀ / √C) V: two maps (B, C, h, w) -> (B, C, h, w)."""
        batch, channels, height, width = lq_features.shape
        query = self.to_q(lq_features.flatten(2).transpose(1, 2))  # (B, h·w, C)
        codes = quantized.flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, self.to_k(codes), self.to_v(codes))
        return attended.transpose(1, 2).reshape(batch, channels, height, width)


def pass_through_gain(codes: Tensor, self_logit: float) -> float:
    """The gain g at which a code attends to itself with a mean logit g² |e|² / √C of `self_logit`.

    Args:
        codes: the codebook, (K, C).
        self_logit: 0 is the logit of an unrelated (orthogonal) code.
    """
    mean_square = codes.float().square().sum(dim=1).mean().item()
    return float((self_logit * codes.shape[1] ** 0.5 / mean_square) ** 0.5)


class ChannelCrossAttention(nn.Module):
    """Channel half of DCAM: a C×C matrix M_C made from `lq_features` alone mixes the channels of `quantized`.

    Its output is scaled by `scale`, a scalar that starts at zero, so that the codes come through unchanged at first.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))

    def channel_matrix(self, lq_features: Tensor) -> Tensor:
        """M_C: softmax over channels of the product of two projections of f_LQ over positions: -> (B, C, C)."""
        positions = lq_features.flatten(2).transpose(1, 2)  # (B, h·w, C)
        query, key = self.to_q(positions), self.to_k(positions)
        logits = query.transpose(1, 2) @ key / positions.shape[1] ** 0.5
        return logits.softmax(dim=-1)

    def forward(self, lq_features: Tensor, quantized: Tensor) -> Tensor:
        """scale · M_C · quantized: two maps (B, C, h, w) -> (B, C, h, w)."""
        mixed = self.channel_matrix(lq_features) @ quantized.flatten(2)
        return self.scale * mixed.view_as(quantized)


class DualCrossAttention(nn.Module):
    """DCAM: f_HQ = spatial + channel cross-attention between f_LQ and the fetched codes f'_HQ (equation (3)).

    With both halves off, f_HQ is the fetched codes themselves.

    Args:
        channels: C of all three maps.
        spatial, channel: which halves are present (the paper's ablation of DCAM).
        gain: see `SpatialCrossAttention`.
    """

    def __init__(self, channels: int, spatial: bool = True, channel: bool = True, gain: float = 3.5) -> None:
        super().__init__()
        self.spatial = SpatialCrossAttention(channels, gain) if spatial else None
        self.channel = ChannelCrossAttention(channels) if channel else None

    def forward(self, lq_features: Tensor, quantized: Tensor) -> Tensor:
        """`lq_features`, `quantized` (B, C, h, w) -> `hq_features` (B, C, h, w)."""
        hq_features = quantized if self.spatial is None else self.spatial(lq_features, quantized)
        if self.channel is not None:
            hq_features = hq_features + self.channel(lq_features, quantized)
        return hq_features


class DCVQROutput(NamedTuple):
    """Every feature map of the first stage, each (B, C, S/f, S/f) but for `code_indices` (B, S/f, S/f)."""

    hq_features: Tensor
    lq_features: Tensor
    quantized: Tensor
    code_indices: Tensor


class DCVQRModel(ModelMixin, ConfigMixin):
    """The first stage: LQ encoder, code lookup, dual cross-attention, and the HQ VQGAN's decoder.

    Args:
        block_out_channels … norm_num_groups: the HQ VQGAN's (see `VQGAN`).
        spatial_attention, channel_attention: the halves of DCAM that are present.
        attention_gain: initial diagonal of the spatial attention's projections.
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
        spatial_attention: bool = True,
        channel_attention: bool = True,
        attention_gain: float = 3.5,
    ) -> None:
        super().__init__()
        self.encoder = make_encoder(
            block_out_channels, layers_per_block, code_dim, level_attention, mid_attention, norm_num_groups
        )
        self.quant_conv = nn.Conv2d(code_dim, code_dim, 1)
        self.quantize = Codebook(num_codes, code_dim)
        self.attention = DualCrossAttention(code_dim, spatial_attention, channel_attention, attention_gain)
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 1)
        self.decoder = make_decoder(
            block_out_channels, layers_per_block, code_dim, level_attention, mid_attention, norm_num_groups
        )

    @classmethod
    def from_vqgan(cls, vqgan: VQGAN, settings: DualCrossAttentionSettings) -> DCVQRModel:
        """Start from an HQ VQGAN: its encoder becomes the LQ encoder; codebook and decoder are taken over.

        The attention's gain follows from the codes, so that the start does not depend on their scale or number of
        channels.
        """
        config = {key: value for key, value in vqgan.config.items() if not key.startswith("_")}
        config.pop("scaling_factor")
        model = cls(
            **config,
            spatial_attention=settings.spatial,
            channel_attention=settings.channel,
            attention_gain=pass_through_gain(vqgan.quantize.codes, settings.self_logit),
        )
        for name in ("encoder", "quant_conv", "quantize", "post_quant_conv", "decoder"):
            getattr(model, name).load_state_dict(getattr(vqgan, name).state_dict())
        return model

    @property
    def downsampling(self) -> int:
        """Image side over feature side, f."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def encode(self, lq: Tensor) -> Tensor:
        """f_LQ: (B, 3, S, S) in [-1, 1] -> (B, C, S/f, S/f)."""
        return cast(Tensor, self.quant_conv(self.encoder(lq)))

    def forward(self, lq: Tensor) -> DCVQROutput:
        """x_LQ -> f_HQ and what it is made of."""
        lq_features = self.encode(lq)
        quantized, code_indices = self.quantize(lq_features)
        return DCVQROutput(self.attention(lq_features, quantized), lq_features, quantized, code_indices)

    def decode(self, hq_features: Tensor) -> Tensor:
        """The first stage's own image: (B, C, S/f, S/f) -> (B, 3, S, S)."""
        return cast(Tensor, self.decoder(self.post_quant_conv(hq_features)))

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight."""
        return cast(nn.Parameter, self.decoder.conv_out.weight)
