"""CompVis's networks written down again, in plain torch and with CompVis's names: what the key maps are measured by.

Nothing here comes from diffusers or from ldbfr, so that a mistake in the maps, in an epsilon or in the order of heads
shows as another output. Names and shapes: taming-transformers and latent-diffusion, `diffusionmodules/model.py`,
`diffusionmodules/openaimodel.py`, `models/autoencoder.py`, `models/diffusion/ddpm.py`, `modules/ema.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


def conv(wide: int, out: int, kernel: int = 3, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(wide, out, kernel, stride, kernel // 2 if padding is None else padding)


def group(**children: nn.Module) -> nn.Module:
    """A module that only holds others by name."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


# ------------------------------------------------------------------------------------------------------------- VQGANs


class ResnetBlock(nn.Module):
    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, wide, eps=1e-6), conv(wide, out)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, out, eps=1e-6), conv(out, out)
        if wide != out:
            self.nin_shortcut = conv(wide, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """One head over all positions; the projections are 1×1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (projection(h).flatten(2) for projection in (self.q, self.k, self.v))  # (B, C, n)
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1]), dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Sampler(nn.Module):
    """Half or twice the side, by one convolution; the strided one sees a border of zeros right and below only."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = conv(channels, channels, 3, 2, 0) if down else conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, attention: Sequence[bool], z_channels: int) -> None:
        super().__init__()
        self.conv_in = conv(3, widths[0])
        self.down = nn.ModuleList()
        wide = widths[0]
        for level, out in enumerate(widths):
            block = nn.ModuleList(ResnetBlock(wide if number == 0 else out, out) for number in range(blocks))
            attn = nn.ModuleList(AttnBlock(out) for _ in range(blocks) if attention[level])
            stage = group(block=block, attn=attn)
            if level < len(widths) - 1:
                stage.add_module("downsample", Sampler(out, down=True))
            self.down.append(stage)
            wide = out
        self.mid = Middle(wide)
        self.norm_out, self.conv_out = nn.GroupNorm(GROUPS, wide, eps=1e-6), conv(wide, z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for number, block in enumerate(stage.block):
                h = block(h)
                h = stage.attn[number](h) if len(stage.attn) else h
            h = stage.downsample(h) if hasattr(stage, "downsample") else h
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, attention: Sequence[bool], z_channels: int) -> None:
        super().__init__()
        wide = widths[-1]
        self.conv_in, self.mid = conv(z_channels, wide), Middle(wide)
        stages = []
        for level in reversed(range(len(widths))):
            out = widths[level]
            block = nn.ModuleList(ResnetBlock(wide if number == 0 else out, out) for number in range(blocks + 1))
            attn = nn.ModuleList(AttnBlock(out) for _ in range(blocks + 1) if attention[level])
            stage = group(block=block, attn=attn)
            if level > 0:
                stage.add_module("upsample", Sampler(out, down=False))
            stages.append(stage)
            wide = out
        self.up = nn.ModuleList(stages[::-1])  # counted from the finest, run from the coarsest
        self.norm_out, self.conv_out = nn.GroupNorm(GROUPS, wide, eps=1e-6), conv(wide, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(list(self.up)):
            for number, block in enumerate(stage.block):
                h = block(h)
                h = stage.attn[number](h) if len(stage.attn) else h
            h = stage.upsample(h) if hasattr(stage, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))


class VQModel(nn.Module):
    """The VQGAN; with `loss`, what a checkpoint of its training holds besides."""

    def __init__(
        self,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        code_dim: int,
        num_codes: int,
        loss: bool = False,
        ema: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(widths, blocks, attention, code_dim)
        self.decoder = Decoder(widths, blocks, attention, code_dim)
        if loss:
            self.loss = group(perceptual_loss=lpips(), discriminator=group(main=patch_discriminator()))
        self.quantize = group(embedding=nn.Embedding(num_codes, code_dim))
        self.quant_conv, self.post_quant_conv = conv(code_dim, code_dim, 1), conv(code_dim, code_dim, 1)
        if ema:
            self.model_ema = moving_average(self)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def nearest(self, h: Tensor) -> Tensor:
        """Indices of the nearest codes, (B, h, w)."""
        return torch.cdist(h.flatten(2).mT, self.quantize.embedding.weight).argmin(2).view(len(h), *h.shape[2:])

    def decode(self, h: Tensor) -> Tensor:
        """Quantise and decode, as latent-diffusion does with what the diffusion gives."""
        codes = self.quantize.embedding(self.nearest(h)).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(codes))


def lpips() -> nn.Module:
    """The names and shapes of LPIPS on VGG16; it is never run here."""
    slices: dict[int, list[tuple[int, int, int]]] = {
        1: [(0, 3, 64), (2, 64, 64)],
        2: [(5, 64, 128), (7, 128, 128)],
        3: [(10, 128, 256), (12, 256, 256), (14, 256, 256)],
        4: [(17, 256, 512), (19, 512, 512), (21, 512, 512)],
        5: [(24, 512, 512), (26, 512, 512), (28, 512, 512)],
    }
    net = group(
        **{
            f"slice{number}": group(**{str(index): conv(wide, out) for index, wide, out in layers})
            for number, layers in slices.items()
        }
    )
    module = group(scaling_layer=nn.Module(), net=net)
    for name in ("shift", "scale"):
        module.get_submodule("scaling_layer").register_buffer(name, torch.zeros(1, 3, 1, 1))
    for number, channels in enumerate((64, 128, 256, 512, 512)):
        linear = nn.Conv2d(channels, 1, 1, bias=False)
        module.add_module(f"lin{number}", group(model=nn.Sequential(nn.Dropout(), linear)))
    return module.requires_grad_(False)


def patch_discriminator() -> nn.Sequential:
    def layer(wide: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(wide, out, 4, stride, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]

    first: list[nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
    middle = layer(64, 128, 2) + layer(128, 256, 2) + layer(256, 512, 1)
    return nn.Sequential(*first, *middle, nn.Conv2d(512, 1, 4, 1, 1))


# --------------------------------------------------------------------------------------------------------------- UNet


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """cos, then sin, of t · 10000^(-i / n), n = channels / 2, in float32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, wide: int, out: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, wide), nn.SiLU(), conv(wide, out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Dropout(0.0), conv(out, out))
        self.skip_connection = nn.Identity() if wide == out else conv(wide, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class AttentionBlock(nn.Module):
    """Heads of `head_dim` channels; `qkv` holds head after head, and of each its queries, keys and values."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        heads = []
        for rows in self.qkv(self.norm(flat)).split(3 * self.head_dim, dim=1):
            q, k, v = rows.split(self.head_dim, dim=1)  # (B, d, n)
            weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(self.head_dim), dim=2)
            heads.append(torch.einsum("bij,bcj->bci", weights, v))
        return (flat + self.proj_out(torch.cat(heads, dim=1))).view_as(x)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = conv(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class UNetModel(nn.Module):
    def __init__(
        self, channels: int, widths: Sequence[int], blocks: int, attention: Sequence[bool], head_dim: int
    ) -> None:
        super().__init__()
        base, embedding = widths[0], 4 * widths[0]
        self.time_embed = nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.input_blocks = nn.ModuleList([nn.Sequential(conv(channels, base))])
        wide, skips = base, [base]
        for level, out in enumerate(widths):
            for _ in range(blocks):
                layers: list[nn.Module] = [ResBlock(wide, out, embedding)]
                layers += [AttentionBlock(out, head_dim)] if attention[level] else []
                self.input_blocks.append(nn.Sequential(*layers))
                wide = out
                skips.append(wide)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.Sequential(Downsample(wide)))
                skips.append(wide)
        self.middle_block = nn.Sequential(
            ResBlock(wide, wide, embedding), AttentionBlock(wide, head_dim), ResBlock(wide, wide, embedding)
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for number in range(blocks + 1):
                layers = [ResBlock(wide + skips.pop(), widths[level], embedding)]
                wide = widths[level]
                layers += [AttentionBlock(wide, head_dim)] if attention[level] else []
                layers += [Sampler(wide, down=False)] if level and number == blocks else []
                self.output_blocks.append(nn.Sequential(*layers))
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, wide), nn.SiLU(), conv(wide, channels))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        embedding = self.time_embed(timestep_embedding(timesteps, self.time_embed[0].in_features).to(x))

        def run(layers: nn.Module, h: Tensor) -> Tensor:
            for layer in layers.children():
                h = layer(h, embedding) if isinstance(layer, ResBlock) else layer(h)
            return h

        h, skips = x, []
        for block in self.input_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=1))
        return self.out(h)


# --------------------------------------------------------------------------------------------------- whole checkpoints


def moving_average(module: nn.Module) -> nn.Module:
    """Copies of the trained parameters under names without dots, and the average's two counters."""
    average = nn.Module()
    average.register_buffer("decay", torch.tensor(0.9999))
    average.register_buffer("num_updates", torch.tensor(7, dtype=torch.int32))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            average.register_buffer(name.replace(".", ""), parameter.detach().clone())
    return average


class LatentDiffusion(nn.Module):
    """A diffusion model around its UNet and first stage; `average` is the UNet's average, where one is kept."""

    def __init__(
        self,
        unet: UNetModel,
        first_stage: VQModel,
        average: UNetModel | None,
        beta_start: float = 0.0015,
        beta_end: float = 0.0195,
    ) -> None:
        super().__init__()
        self.model = group(diffusion_model=unet)
        if average is not None:
            self.model_ema = moving_average(group(diffusion_model=average))
        self.first_stage_model = first_stage
        for name, values in schedule(beta_start, beta_end).items():
            self.register_buffer(name, values)


def schedule(beta_start: float, beta_end: float, steps: int = 1000) -> dict[str, Tensor]:
    """The buffers of the "linear" schedule (linear in the square root), in float32."""
    with torch.device("cpu"):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, 0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
        variance = betas * (1 - previous) / (1 - alphas)
    values = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alphas),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alphas),
    }
    return {name: value.float() for name, value in values.items()}


# ------------------------------------------------------------------------------------------- the published full sizes


def vq_f4(loss: bool = True, ema: bool = False) -> VQModel:
    """latent-diffusion's first stage: f = 4, 8,192 codes of 3 numbers, attention in the middle only."""
    return VQModel([128, 256, 512], 2, [False] * 3, 3, 8192, loss, ema)


def taming_faces(loss: bool = True) -> VQModel:
    """taming-transformers' faces: f = 16, 1,024 codes of 256 numbers, attention at the coarsest level too."""
    return VQModel([128, 128, 256, 256, 512], 2, [False] * 4 + [True], 256, 1024, loss)


def ldm_unet() -> UNetModel:
    """The UNet of celebahq-ldm-vq-4 and ffhq-ldm-vq-4."""
    return UNetModel(3, [224, 448, 672, 896], 2, [False, True, True, True], 32)


def ldm_vq_4() -> LatentDiffusion:
    """celebahq-ldm-vq-4 and ffhq-ldm-vq-4, with the moving average."""
    return LatentDiffusion(ldm_unet(), vq_f4(loss=False), ldm_unet())


Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def scramble(module: Module, seed: int) -> Module:
    """Random weights under which activations keep their size, so that every weight matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:  # biases, and the scales of the normalisations
            value.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
        elif name.endswith("embedding.weight"):
            value.copy_(noise)
        else:
            value.copy_(noise / value[0].numel() ** 0.5)
    return module
