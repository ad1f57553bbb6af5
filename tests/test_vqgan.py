"""The codebook against brute force, the VQGANs' shapes and parameters, the patch discriminator."""

from pathlib import Path

import pytest
import torch

import ldbfr.models.vqgan as vqgan_module
from ldbfr.config import load_preset
from ldbfr.models.vqgan import VQGAN, Codebook, PatchDiscriminator
from tests import tiny


def codebook(num_codes: int = 50, code_dim: int = 6) -> Codebook:
    book = Codebook(num_codes, code_dim)
    with torch.no_grad():
        book.embedding.weight.copy_(tiny.normal(num_codes, code_dim, seed=7))
    return book


def brute_force(features: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Index of the nearest row of `codes` at every position, in double precision."""
    flat = features.detach().double().permute(0, 2, 3, 1).flatten(0, 2)
    nearest = torch.cdist(flat, codes.detach().double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    return nearest.view(features.shape[0], *features.shape[2:])


@pytest.mark.parametrize("elements", [1 << 24, 50 * 7, 50, 1], ids=["whole", "7 at once", "1 at once", "too small"])
def test_the_nearest_code_is_that_of_a_brute_force_search_in_chunks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(vqgan_module, "LOOKUP_ELEMENTS", elements)
    book, features = codebook(), tiny.normal(3, 6, 5, 4)
    assert torch.equal(book.nearest(features), brute_force(features, book.codes))


def test_no_chunk_of_the_distance_matrix_exceeds_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqgan_module, "LOOKUP_ELEMENTS", 50 * 7)
    sizes: list[int] = []
    argmax = torch.Tensor.argmax

    def watched(self: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(self.numel())
        return argmax(self, dim=dim)

    monkeypatch.setattr(torch.Tensor, "argmax", watched)
    codebook().nearest(tiny.normal(3, 6, 5, 4))
    assert sum(sizes) == 60 * 50
    assert max(sizes) <= 50 * 7


def test_autocast_does_not_coarsen_the_search() -> None:
    """Codes 1/500 apart around 1 fall together in bfloat16, whose steps there are 1/128."""
    book = Codebook(64, 1)
    with torch.no_grad():
        book.embedding.weight.copy_(1 + torch.arange(64).view(-1, 1) / 500)
    features = 1 + torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.126
    with torch.autocast("cpu", torch.bfloat16):
        found = book.nearest(features)
    assert torch.equal(found, brute_force(features, book.codes))


def test_features_in_half_precision_are_searched_in_full() -> None:
    book, features = codebook(), tiny.normal(2, 6, 4, 4).bfloat16()
    assert torch.equal(book.nearest(features), brute_force(features, book.codes))


def test_quantised_features_are_the_chosen_codes() -> None:
    book, features = codebook(), tiny.normal(2, 6, 3, 5)
    quantized, indices = book(features)
    assert quantized.shape == features.shape
    assert indices.shape == (2, 3, 5)
    assert torch.allclose(quantized, book.codes[indices].movedim(-1, 1), atol=1e-6)
    assert torch.equal(book.lookup(indices), book.codes[indices].movedim(-1, 1))


def test_quantising_codes_gives_them_back() -> None:
    book = codebook()
    indices = torch.randint(50, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(book(book.lookup(indices)).code_indices, indices)


def test_the_straight_through_gradient_is_the_identity() -> None:
    book, features = codebook(), tiny.normal(2, 6, 3, 3).requires_grad_()
    upstream = tiny.normal(2, 6, 3, 3, seed=1)
    book(features).quantized.backward(upstream)
    assert features.grad is not None
    assert torch.equal(features.grad, upstream)
    assert book.embedding.weight.grad is None


def test_codebook_and_commitment_loss_are_the_mean_square_distance_each_moving_its_own_side() -> None:
    book, features = codebook(), tiny.normal(2, 6, 3, 3).requires_grad_()
    indices = book.nearest(features)
    distance = book.codes[indices].movedim(-1, 1) - features
    codebook_loss, commitment = book.losses(features, indices)
    expected = distance.square().mean()
    assert torch.allclose(codebook_loss, expected)
    assert torch.allclose(commitment, expected)

    codebook_loss.backward()
    assert features.grad is None
    gradient = torch.zeros_like(book.codes)
    gradient.index_add_(0, indices.flatten(), (2 * distance / distance.numel()).movedim(1, -1).flatten(0, 2).detach())
    assert torch.allclose(book.embedding.weight.grad, gradient, atol=1e-7)

    book.embedding.weight.grad = None
    commitment.backward()
    assert book.embedding.weight.grad is None
    assert torch.allclose(features.grad, -2 * distance.detach() / distance.numel(), atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ networks


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("key", "millions", "latents"),
    [("hq_vqgan", 72.1, (256, 32, 32)), ("latent_vqgan", 55.3, (3, 128, 128))],
)
def test_the_paper_s_vqgans_have_its_parameters_and_shapes(key: str, millions: float, latents: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = VQGAN.from_settings(getattr(load_preset("paper_512"), key))
        images, features, indices = network(torch.zeros(2, 3, 512, 512))
    assert round(count(network) / 1e6, 1) == millions
    assert images.shape == (2, 3, 512, 512)
    assert features.shape == (2, *latents)
    assert indices.shape == (2, *latents[1:])
    assert network.downsampling == 512 // latents[-1]


def test_the_shares_of_the_paper_s_hq_vqgan_are_taming_s() -> None:
    """Encoder, decoder, codebook and the two 1x1 convolutions of taming's faces-HQ configuration."""
    with torch.device("meta"):
        network = VQGAN.from_settings(load_preset("paper_512").hq_vqgan)
    parts = {name: count(part) for name, part in network.named_children()}
    assert parts["quantize"] == 1024 * 256
    assert parts["quant_conv"] == parts["post_quant_conv"] == 256 * 256 + 256
    assert parts["decoder"] > parts["encoder"]
    assert sum(parts.values()) == count(network)


def test_latents_are_scaled_features_and_come_back_through_the_codebook() -> None:
    network = tiny.networks()["latent_vqgan"]
    network.register_to_config(scaling_factor=1.7)
    images = tiny.lq_batch()
    with torch.no_grad():
        latents = network.to_latents(images)
        reconstruction, features, _ = network(images)
        assert torch.equal(latents, features * 1.7)
        assert torch.allclose(network.from_latents(latents), reconstruction, atol=1e-5)


def test_a_vqgan_that_was_saved_is_the_same_when_loaded(tmp_path: Path) -> None:
    network = tiny.networks()["hq_vqgan"]
    network.register_to_config(scaling_factor=0.25)
    network.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = VQGAN.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert tiny.differing(tiny.snapshot(network), tiny.snapshot(loaded)) == []
    assert loaded.config["scaling_factor"] == 0.25


def test_the_last_layer_is_what_the_image_comes_out_of() -> None:
    network = tiny.networks()["hq_vqgan"]
    image = network(tiny.lq_batch(1))[0]
    assert network.last_layer.shape[0] == 3
    (gradient,) = torch.autograd.grad(image.sum(), network.last_layer)
    assert gradient.abs().sum() > 0


# -------------------------------------------------------------------------------------------------------- discriminator


def patch_size(num_layers: int) -> int:
    """Receptive field of a score: 4x4 kernels, strides 2 for `num_layers` layers, then twice 1."""
    field, jump = 1, 1
    for stride in [2] * num_layers + [1, 1]:
        field, jump = field + 3 * jump, jump * stride
    return field


def test_a_score_of_the_default_discriminator_sees_patches_of_70_px() -> None:
    assert patch_size(3) == 70


def test_a_score_depends_on_its_patch_alone() -> None:
    """Normalisation couples all positions, so it is taken out; then the gradient's extent is the patch."""
    discriminator = PatchDiscriminator(4, 2)
    for number, layer in enumerate(discriminator.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            discriminator.layers[number] = torch.nn.Identity()
    images = tiny.normal(1, 3, 64, 64).requires_grad_()
    scores = discriminator(images)
    assert scores.shape[:2] == (1, 1)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    assert images.grad is not None
    touched = images.grad.abs().sum(dim=(0, 1)) > 0
    rows, columns = touched.any(dim=1).sum().item(), touched.any(dim=0).sum().item()
    assert rows == columns == patch_size(2)


def test_a_discriminator_s_score_does_not_depend_on_the_rest_of_the_batch() -> None:
    with tiny.seeded():
        discriminator = PatchDiscriminator(4, 2).train()
    images = tiny.lq_batch(3)
    with torch.no_grad():
        alone, together = discriminator(images[:1]), discriminator(images)[:1]
    assert torch.allclose(alone, together, atol=1e-5)
