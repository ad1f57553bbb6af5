"""HQI: the modules that inject f_HQ into the levels of the diffusion UNet (LD-BFR, section 3.2 and figure 9).

Every kind has the same shape, f + projection(body(f, f_HQ)), and the projection starts at zero: at step 0 the UNet's
output is that of the UNet alone, bit for bit.

| figure 9 | down path | up path |
|---|---|---|
| A | `ConcatInjection` | `ConcatInjection` |
| B | `EncoderHQInjection` | `EncoderHQInjection` |
| C | `DecoderHQInjection` | `DecoderHQInjection` |
| D (LD-BFR) | `EncoderHQInjection` | `DecoderHQInjection` |
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldbfr.config import Ablation


def match_resolution(hq_features: Tensor, side: int) -> Tensor:
    """Bring f_HQ to a level's side without losing a number: pixel-unshuffle where it is larger, -shuffle where smaller.

    Args:
        hq_features: (B, C, h, h).
        side: the level's side; h / side or side / h must be a whole number r.

    Returns:
        (B, C·r², side, side) when h ≥ side, else (B, C/r², side, side).
    """
    own = hq_features.shape[-1]
    if own >= side:
        return F.pixel_unshuffle(hq_features, own // side)
    return F.pixel_shuffle(hq_features, side // own)


def matched_channels(channels: int, own_side: int, side: int) -> int:
    """Channels of `match_resolution`'s result for C = `channels`, h = `own_side`."""
    return channels * own_side**2 // side**2


class TokenAttention(nn.Module):
    """x + softmax(Q Kᵀ / √d) V over positions, many heads; Q from x, K and V from `context` (x itself when left out).

    Args:
        channels: channels of x, a multiple of `head_dim`.
        context_channels: channels of the context.
        head_dim: channels of one head, d.
    """

    def __init__(self, channels: int, context_channels: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = channels // head_dim
        self.norm = nn.LayerNorm(channels)
        self.context_norm = nn.LayerNorm(context_channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(context_channels, 2 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, M, D) -> (B, N, C)."""
        query = self.to_q(self.norm(x))
        key, value = self.to_kv(self.context_norm(context)).chunk(2, dim=-1)
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads)  # (B, heads, N, d)
        return cast(Tensor, x + self.to_out(attended.transpose(1, 2).flatten(2)))


def to_tokens(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h·w, C)."""
    return features.flatten(2).transpose(1, 2)


class Injection(nn.Module):
    """One level's injection: f + scale · projection(body(f, f_HQ)), with a projection that starts at zero.

    Args:
        body: (f, f_HQ at f's resolution) -> (B, C, h, w).
        channels: C of f.
    """

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.projection = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(cast(Tensor, self.projection.bias))

    def forward(self, features: Tensor, hq_features: Tensor, scale: float = 1.0) -> Tensor:
        """`features` (B, C, h, w), `hq_features` at its own resolution -> injected features (B, C, h, w)."""
        matched = match_resolution(hq_features, features.shape[-1])
        return features + scale * self.projection(self.body(features, matched))


class ConcatInjection(nn.Module):
    """Figure 9 A: Conv(Concat(f, f_HQ)).

    Args:
        channels, condition_channels: of f and of f_HQ at f's resolution.
        kernel_size: of the convolution.
    """

    def __init__(self, channels: int, condition_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + condition_channels, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """(B, C, h, w), (B, D, h, w) -> (B, C, h, w)."""
        return F.silu(self.conv(torch.cat([features, condition], dim=1)))


class EncoderHQInjection(nn.Module):
    """E-HQI: SA(Conv(Concat(f, PixUS(f_HQ)))), LD-BFR section 3.2.

    Args:
        channels, condition_channels: of f and of f_HQ at f's resolution.
        kernel_size: of the convolution.
        head_dim: channels of an attention head.
    """

    def __init__(self, channels: int, condition_channels: int, kernel_size: int, head_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + condition_channels, channels, kernel_size, padding=kernel_size // 2)
        self.attention = TokenAttention(channels, channels, head_dim)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """(B, C, h, w), (B, D, h, w) -> (B, C, h, w)."""
        mixed = to_tokens(self.conv(torch.cat([features, condition], dim=1)))
        return self.attention(mixed, mixed).transpose(1, 2).reshape(features.shape)


class DecoderHQInjection(nn.Module):
    """D-HQI: CA(AdaLN(f, MLP(f_HQ)), f_HQ), LD-BFR section 3.2.

    The MLP acts on every position, so that the scale and the shift of the adaptive layer norm follow the face.

    Args:
        channels, condition_channels: of f and of f_HQ at f's resolution.
        head_dim: channels of an attention head.
    """

    def __init__(self, channels: int, condition_channels: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(condition_channels, channels), nn.SiLU(), nn.Linear(channels, 2 * channels))
        self.attention = TokenAttention(channels, condition_channels, head_dim)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """(B, C, h, w), (B, D, h, w) -> (B, C, h, w)."""
        tokens = to_tokens(condition)  # (B, h·w, D)
        shift, scale = self.mlp(tokens).chunk(2, dim=-1)
        modulated = self.norm(to_tokens(features)) * (1 + scale) + shift
        return self.attention(modulated, tokens).transpose(1, 2).reshape(features.shape)


def make_injection(
    ablation: Ablation, path: str, channels: int, condition_channels: int, kernel_size: int, head_dim: int
) -> Injection:
    """The injection of one level, by the letters of figure 9.

    Args:
        ablation: "A", "B", "C" or "D".
        path: "down" (the UNet's encoder) or "up" (its decoder).
        channels, condition_channels: of f and of f_HQ at f's resolution.
        kernel_size: of the convolutions in A and E-HQI.
        head_dim: channels of an attention head.
    """
    body: nn.Module
    if ablation == "A":
        body = ConcatInjection(channels, condition_channels, kernel_size)
    elif ablation == "B" or (ablation == "D" and path == "down"):
        body = EncoderHQInjection(channels, condition_channels, kernel_size, head_dim)
    else:
        body = DecoderHQInjection(channels, condition_channels, head_dim)
    return Injection(body, channels)
