"""How f_HQ meets a level, and what the injections do with it, against explicit formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldbfr.models.hq_injection import (
    ConcatInjection,
    DecoderHQInjection,
    EncoderHQInjection,
    Injection,
    TokenAttention,
    make_injection,
    match_resolution,
    matched_channels,
    to_tokens,
)
from tests import tiny

KINDS = [(ablation, path) for ablation in "ABCD" for path in ("down", "up")]


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_matching_a_resolution_loses_no_number(side: int) -> None:
    hq_features = tiny.normal(2, 64, 8, 8)
    matched = match_resolution(hq_features, side)
    assert matched.shape == (2, matched_channels(64, 8, side), side, side)
    assert matched.numel() == hq_features.numel()
    back = F.pixel_shuffle(matched, 8 // side) if side <= 8 else F.pixel_unshuffle(matched, side // 8)
    assert torch.equal(back, hq_features)
    assert torch.equal(match_resolution(matched, 8), hq_features)


def test_pixel_unshuffle_keeps_every_number_at_its_place_in_the_picture() -> None:
    hq_features = tiny.normal(1, 3, 8, 8)
    matched = match_resolution(hq_features, 4)
    for i in range(4):
        for j in range(4):
            block = hq_features[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(matched[0, :, i, j].sort().values, block.flatten().sort().values)


def explicit_attention(attention: TokenAttention, x: Tensor, context: Tensor) -> Tensor:
    """x + W_O softmax(Q Kᵀ / √d) V, head by head and token by token."""
    channels, head_dim = x.shape[-1], x.shape[-1] // attention.num_heads
    query = F.linear(F.layer_norm(x, (channels,), attention.norm.weight, attention.norm.bias), attention.to_q.weight)
    norm = attention.context_norm
    tokens = F.layer_norm(context, (context.shape[-1],), norm.weight, norm.bias)
    key, value = (F.linear(tokens, weight) for weight in attention.to_kv.weight.split(channels))
    attended = torch.empty_like(x)
    for b in range(len(x)):
        for head in range(attention.num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            for n in range(x.shape[1]):
                weights = (key[b, :, part] @ query[b, n, part] / head_dim**0.5).softmax(dim=0)
                attended[b, n, part] = weights @ value[b, :, part]
    return x + F.linear(attended, attention.to_out.weight, attention.to_out.bias)


@pytest.mark.parametrize("context_channels", [12, 5])
@torch.no_grad()
def test_token_attention_is_the_explicit_softmax(context_channels: int) -> None:
    with tiny.seeded():
        attention = TokenAttention(12, context_channels, head_dim=4)
        nn.init.normal_(attention.norm.weight)
        nn.init.normal_(attention.context_norm.bias)
    x, context = tiny.normal(2, 7, 12), tiny.normal(2, 4, context_channels, seed=1)
    assert attention.num_heads == 3
    assert torch.allclose(attention(x, context), explicit_attention(attention, x, context), atol=1e-5)


@torch.no_grad()
def test_e_hqi_is_attention_over_the_convolved_concatenation() -> None:
    """SA(Conv(Concat(f, f_HQ))), section 3.2."""
    with tiny.seeded():
        body = EncoderHQInjection(8, 5, kernel_size=3, head_dim=4)
    features, condition = tiny.normal(2, 8, 3, 3), tiny.normal(2, 5, 3, 3, seed=1)
    mixed = F.conv2d(torch.cat([features, condition], 1), body.conv.weight, body.conv.bias, padding=1)
    tokens = to_tokens(mixed)
    expected = explicit_attention(body.attention, tokens, tokens).transpose(1, 2).reshape(features.shape)
    assert torch.allclose(body(features, condition), expected, atol=1e-5)


@torch.no_grad()
def test_d_hqi_is_adaptive_layer_norm_then_cross_attention() -> None:
    """CA(AdaLN(f, MLP(f_HQ)), f_HQ): every token is standardised over its channels, then scaled and shifted."""
    with tiny.seeded():
        body = DecoderHQInjection(8, 5, head_dim=4)
    features, condition = 3 + 2 * tiny.normal(2, 8, 3, 3), tiny.normal(2, 5, 3, 3, seed=1)
    tokens, context = to_tokens(features), to_tokens(condition)
    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, keepdim=True, unbiased=False)
    first, last = body.mlp[0], body.mlp[2]
    hidden = F.silu(context @ first.weight.T + first.bias)
    shift, scale = (hidden @ last.weight.T + last.bias).split(8, dim=-1)
    modulated = (tokens - mean) / (variance + 1e-5).sqrt() * (1 + scale) + shift
    expected = explicit_attention(body.attention, modulated, context).transpose(1, 2).reshape(features.shape)
    assert torch.allclose(body(features, condition), expected, atol=1e-5)


@pytest.mark.parametrize(("ablation", "path"), KINDS)
def test_figure_9_s_letters_name_the_kinds_of_the_paths(ablation: str, path: str) -> None:
    kinds = {
        "A": (ConcatInjection, ConcatInjection),
        "B": (EncoderHQInjection, EncoderHQInjection),
        "C": (DecoderHQInjection, DecoderHQInjection),
        "D": (EncoderHQInjection, DecoderHQInjection),
    }
    injection = make_injection(ablation, path, 8, 4, 3, 4)  # type: ignore[arg-type]
    assert type(injection.body) is kinds[ablation][path == "up"]


def fresh(ablation: str, path: str, kernel_size: int = 3) -> tuple[Injection, Tensor, Tensor]:
    """An injection at a level of 4 px, its features, and f_HQ of 8 px."""
    with tiny.seeded():
        injection = make_injection(ablation, path, 8, matched_channels(5, 8, 4), kernel_size, 4)  # type: ignore[arg-type]
    return injection, tiny.normal(2, 8, 4, 4), tiny.normal(2, 5, 8, 8, seed=1)


@pytest.mark.parametrize(("ablation", "path"), KINDS)
def test_every_injection_starts_as_the_identity_bit_for_bit(ablation: str, path: str) -> None:
    injection, features, hq_features = fresh(ablation, path)
    assert torch.equal(injection(features, hq_features), features)


@pytest.mark.parametrize(("ablation", "path"), KINDS)
def test_every_injection_can_leave_its_start(ablation: str, path: str) -> None:
    """The zero projection has a gradient, so the first step moves it; then the rest has one too."""
    injection, features, hq_features = fresh(ablation, path)
    (injection(features, hq_features) - 1).square().mean().backward()
    assert injection.projection.weight.grad is not None
    assert injection.projection.weight.grad.abs().sum() > 0
    with torch.no_grad():
        injection.projection.weight.copy_(tiny.normal(*injection.projection.weight.shape))
    (injection(features, hq_features) - 1).square().mean().backward()
    still = [name for name, p in injection.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize(("ablation", "path"), KINDS)
@torch.no_grad()
def test_once_awake_an_injection_depends_on_f_hq_and_linearly_on_the_scale(ablation: str, path: str) -> None:
    injection, features, hq_features = fresh(ablation, path)
    injection.projection.weight.copy_(tiny.normal(*injection.projection.weight.shape))
    full = injection(features, hq_features)
    assert (full - injection(features, hq_features.flip(0))).abs().max() > 1e-3
    assert torch.allclose(injection(features, hq_features, 0.25), features + 0.25 * (full - features), atol=1e-5)
    assert torch.equal(injection(features, hq_features, 0.0), features)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("ablation", ["A", "B"])
def test_a_kernel_of_any_size_keeps_the_level_s_shape(ablation: str, kernel_size: int) -> None:
    injection, features, hq_features = fresh(ablation, "down", kernel_size)
    assert injection.body.conv.kernel_size == (kernel_size, kernel_size)
    assert injection(features, hq_features).shape == features.shape
