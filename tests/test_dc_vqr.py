"""Dual cross-attention against explicit formulas, its start, its ablations, and the first stage around it."""

from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from ldbfr.config import DualCrossAttentionSettings, load_preset
from ldbfr.models.dc_vqr import (
    ChannelCrossAttention,
    DCVQRModel,
    DualCrossAttention,
    SpatialCrossAttention,
    pass_through_gain,
)
from ldbfr.models.vqgan import VQGAN
from tests import tiny

B, C, H, W = 2, 6, 3, 5

Module = TypeVar("Module", bound=nn.Module)


def maps(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Some f_LQ and f'_HQ."""
    return tiny.normal(B, C, H, W, seed=seed), tiny.normal(B, C, H, W, seed=seed + 1)


def random_weights(module: Module, seed: int = 3) -> Module:
    """The module with every parameter drawn anew, zeros included."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * tiny.normal(*parameter.shape, seed=seed + number))
    return module


def separate_codes(num_codes: int, dim: int) -> Tensor:
    """Codes of root mean square 1 that do not resemble one another, (K, C)."""
    return tiny.normal(num_codes, dim, seed=11)


# ------------------------------------------------------------------------------------------------------------- spatial


def test_spatial_attention_is_the_explicit_softmax_over_positions() -> None:
    attention = random_weights(SpatialCrossAttention(C, 1.0))
    lq_features, quantized = maps()
    w_q, w_k, w_v = (p.weight.double() for p in (attention.to_q, attention.to_k, attention.to_v))
    expected = torch.empty(B, C, H, W, dtype=torch.float64)
    for b in range(B):
        for i in range(H):
            for j in range(W):
                query = w_q @ lq_features[b, :, i, j].double()
                keys = torch.einsum("dc,chw->dhw", w_k, quantized[b].double())
                weights = (torch.einsum("d,dhw->hw", query, keys) / C**0.5).flatten().softmax(0).view(H, W)
                values = torch.einsum("dc,chw->dhw", w_v, quantized[b].double())
                expected[b, :, i, j] = (weights * values).sum(dim=(1, 2))
    assert torch.allclose(attention(lq_features, quantized).double(), expected, atol=1e-5)


def test_keys_and_values_come_from_the_codes_and_queries_from_the_features() -> None:
    """No query tells positions apart when all codes are the same: the output is the value, whatever f_LQ."""
    attention = random_weights(SpatialCrossAttention(C, 1.0))
    lq_features, quantized = maps()
    same = quantized[:, :, :1, :1].expand(B, C, H, W)
    value = torch.einsum("dc,bchw->bdhw", attention.to_v.weight, same)
    assert torch.allclose(attention(lq_features, same), value, atol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_spatial_attention_starts_as_a_pass_through_of_the_codes_at_any_scale(scale: float) -> None:
    """f_LQ = code at every position, codes well apart; the gain is the one that `from_vqgan` sets."""
    dim = 64
    codes = separate_codes(20, dim) * scale
    indices = torch.randint(20, (B, 8, 8), generator=torch.Generator().manual_seed(0))
    quantized = codes[indices].movedim(-1, 1)
    attention = SpatialCrossAttention(dim, pass_through_gain(codes, 16.0))
    output = attention(quantized, quantized)
    assert (output - quantized).abs().max() < 0.01 * scale  # e^-16 of every other position leaks in


@pytest.mark.parametrize("dim", [16, 256])
def test_a_code_s_mean_logit_with_itself_is_the_setting(dim: int) -> None:
    codes = torch.randn(50, dim, generator=torch.Generator().manual_seed(0))
    attention = SpatialCrossAttention(dim, pass_through_gain(codes, 16.0))
    logits = (attention.to_q(codes) * attention.to_k(codes)).sum(dim=1) / dim**0.5
    assert logits.mean().item() == pytest.approx(16.0, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- channel


def test_the_channel_matrix_is_the_explicit_softmax_over_channels() -> None:
    attention = random_weights(ChannelCrossAttention(C))
    lq_features, _ = maps()
    matrix = attention.channel_matrix(lq_features)
    assert matrix.shape == (B, C, C)
    assert torch.allclose(matrix.sum(dim=-1), torch.ones(B, C), atol=1e-6)
    for b in range(B):
        positions = lq_features[b].flatten(1).double()  # (C, h·w)
        query, key = attention.to_q.weight.double() @ positions, attention.to_k.weight.double() @ positions
        expected = ((query @ key.T) / (H * W) ** 0.5).softmax(dim=-1)
        assert torch.allclose(matrix[b].double(), expected, atol=1e-5)


def test_the_channel_path_is_scale_times_matrix_times_codes() -> None:
    attention = random_weights(ChannelCrossAttention(C))
    lq_features, quantized = maps()
    matrix = attention.channel_matrix(lq_features)
    expected = attention.scale * torch.einsum("bcd,bdhw->bchw", matrix, quantized)
    assert torch.allclose(attention(lq_features, quantized), expected, atol=1e-6)


def test_the_channel_matrix_is_made_from_the_features_alone() -> None:
    """The channel path is linear in the codes: were M_C to depend on them, doubling them would not double it."""
    attention = random_weights(ChannelCrossAttention(C))
    lq_features, quantized = maps()
    other = tiny.normal(B, C, H, W, seed=9)
    combined = attention(lq_features, 2 * quantized - 3 * other)
    expected = 2 * attention(lq_features, quantized) - 3 * attention(lq_features, other)
    assert torch.allclose(combined, expected, atol=1e-5)
    lq_features.requires_grad_()
    attention(lq_features, quantized).sum().backward()
    assert lq_features.grad is not None
    assert lq_features.grad.abs().sum() > 0


def test_the_channel_path_starts_at_zero_and_can_leave_it() -> None:
    attention = ChannelCrossAttention(C)
    lq_features, quantized = maps()
    output = attention(lq_features, quantized)
    assert torch.equal(output, torch.zeros_like(quantized))
    (output - quantized).square().sum().backward()
    assert attention.scale.grad is not None
    assert attention.scale.grad.abs() > 0


# ---------------------------------------------------------------------------------------------------------------- DCAM


@pytest.mark.parametrize(("spatial", "channel"), [(True, True), (True, False), (False, True), (False, False)])
def test_dcam_is_the_sum_of_its_halves_whichever_are_present(spatial: bool, channel: bool) -> None:
    dcam = random_weights(DualCrossAttention(C, spatial, channel))
    lq_features, quantized = maps()
    expected = quantized if dcam.spatial is None else dcam.spatial(lq_features, quantized)
    if dcam.channel is not None:
        expected = expected + dcam.channel(lq_features, quantized)
    assert (dcam.spatial is not None, dcam.channel is not None) == (spatial, channel)
    assert torch.equal(dcam(lq_features, quantized), expected)


def test_without_both_halves_the_codes_themselves_come_out() -> None:
    dcam = DualCrossAttention(C, spatial=False, channel=False)
    lq_features, quantized = maps()
    assert dcam(lq_features, quantized) is quantized
    assert list(dcam.parameters()) == []


# --------------------------------------------------------------------------------------------------------- first stage


def test_the_first_stage_starts_as_the_hq_vqgan_s_own_reconstruction_where_attention_is_off() -> None:
    vqgan: VQGAN = tiny.networks()["hq_vqgan"]
    model = DCVQRModel.from_vqgan(vqgan, DualCrossAttentionSettings(spatial=False, channel=False))
    images = tiny.lq_batch()
    with torch.no_grad():
        output = model(images)
        reconstruction, features, indices = vqgan(images)
        assert torch.equal(output.lq_features, features)
        assert torch.equal(output.code_indices, indices)
        assert torch.equal(output.hq_features, output.quantized)
        assert torch.equal(model.decode(output.hq_features), reconstruction)


def test_every_part_of_the_hq_vqgan_is_taken_over_and_none_is_shared() -> None:
    vqgan: VQGAN = tiny.networks()["hq_vqgan"]
    model = DCVQRModel.from_vqgan(vqgan, DualCrossAttentionSettings())
    own = {name: value for name, value in tiny.snapshot(model).items() if not name.startswith("attention.")}
    assert tiny.differing(tiny.snapshot(vqgan), own) == []
    assert {p.data_ptr() for p in vqgan.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


def test_the_gain_follows_the_scale_of_the_codes() -> None:
    vqgan: VQGAN = tiny.networks()["hq_vqgan"]
    model = DCVQRModel.from_vqgan(vqgan, DualCrossAttentionSettings(self_logit=9.0))
    diagonal = torch.eye(vqgan.config["code_dim"]) * pass_through_gain(vqgan.quantize.codes, 9.0)
    assert torch.allclose(model.attention.spatial.to_q.weight, diagonal)
    assert torch.allclose(model.attention.spatial.to_k.weight, diagonal)
    assert torch.equal(model.attention.spatial.to_v.weight, torch.eye(vqgan.config["code_dim"]))


def test_gradients_reach_the_lq_encoder_through_lookup_and_attention() -> None:
    model: DCVQRModel = tiny.networks()["dc_vqr"]
    model(tiny.lq_batch()).hq_features.square().mean().backward()
    assert model.encoder.conv_in.weight.grad is not None
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.embedding.weight.grad is None


def test_the_paper_s_first_stage_has_its_shapes() -> None:
    settings = load_preset("paper_512").hq_vqgan
    with torch.device("meta"):
        model = DCVQRModel(**settings.model_dump())
        output = model(torch.zeros(2, 3, 512, 512))
        image = model.decode(output.hq_features)
    for features in (output.hq_features, output.lq_features, output.quantized):
        assert features.shape == (2, 256, 32, 32)
    assert output.code_indices.shape == (2, 32, 32)
    assert image.shape == (2, 3, 512, 512)
    assert model.downsampling == 16


def test_a_face_s_features_do_not_depend_on_the_rest_of_the_batch() -> None:
    model = tiny.networks()["dc_vqr"].eval()
    faces = tiny.lq_batch(4)
    with torch.no_grad():
        together = model(faces).hq_features
        alone = torch.cat([model(face[None]).hq_features for face in faces])
    assert torch.allclose(together, alone, atol=1e-4)
