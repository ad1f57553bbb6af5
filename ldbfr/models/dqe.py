"""DQE: the diffusion-based quality enhancer, a UNet2DModel conditioned on f_HQ (LD-BFR, section 3.2).

The UNet itself is diffusers' and stays frozen in training, unless `train_unet` is set as in `faces_64`; the injections
learn. Both are kept in one network so that one folder holds the whole second stage.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from ldbfr.config import Ablation, InjectionSettings, UNetSettings
from ldbfr.models.hq_injection import make_injection, matched_channels


def make_unet(settings: UNetSettings, latent_channels: int, latent_side: int) -> UNet2DModel:
    """LDM's unconditional UNet as diffusers has it (Rombach et al. 2022, table 12; `CompVis/ldm-celebahq-256`).

    Args:
        settings: channels, layers and attention of every level.
        latent_channels, latent_side: c and S/F of the latents.
    """
    attention = settings.attention_levels
    return UNet2DModel(
        sample_size=latent_side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
        attention_head_dim=settings.attention_head_dim,
        norm_num_groups=settings.norm_num_groups,
    )


class DQEUNet2DModel(ModelMixin, ConfigMixin):
    """The conditioned UNet: noise prediction ε(z_t, t, f_HQ) (equation (6)).

    Level i works at 1/2^i of the latents' side. An injection stands after the residual and attention blocks of a
    level, before its down- or upsampler; what it gives goes on and, in the down path, into the last skip connection.

    Args:
        unet_config: configuration of the diffusers `UNet2DModel`.
        condition_channels, condition_side: C and S/f of f_HQ.
        ablation: which injections, by the letters of figure 9.
        at_full_resolution: inject at the latents' own resolution too, not only at half of it and below.
        kernel_size: of the injections' convolutions.
        head_dim: channels of an attention head in the injections.
    """

    @register_to_config
    def __init__(
        self,
        unet_config: dict[str, Any],
        condition_channels: int,
        condition_side: int,
        ablation: Ablation = "D",
        at_full_resolution: bool = False,
        kernel_size: int = 3,
        head_dim: int = 32,
    ) -> None:
        super().__init__()
        self.unet = UNet2DModel.from_config(unet_config)
        widths: tuple[int, ...] = tuple(self.unet.config["block_out_channels"])
        latent_side: int = self.unet.config["sample_size"]

        def injection(path: str, level: int) -> nn.Module:
            if level == 0 and not at_full_resolution:
                return nn.Identity()
            condition = matched_channels(condition_channels, condition_side, latent_side // 2**level)
            return make_injection(ablation, path, widths[level], condition, kernel_size, head_dim)

        self.down_injections = nn.ModuleList(injection("down", level) for level in range(len(widths)))
        self.up_injections = nn.ModuleList(injection("up", level) for level in reversed(range(len(widths))))

    @classmethod
    def from_unet(
        cls, unet: UNet2DModel, settings: InjectionSettings, condition_channels: int, condition_side: int
    ) -> DQEUNet2DModel:
        """Put fresh injections into a trained prior; until they are trained, the output is the prior's own."""
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        model = cls(config, condition_channels, condition_side, **settings.model_dump())
        model.unet.load_state_dict(unet.state_dict())
        return model

    def forward(
        self, noisy_latents: Tensor, timesteps: Tensor, hq_features: Tensor | None, condition_scale: float = 1.0
    ) -> Tensor:
        """Predict the noise ε.

        Args:
            noisy_latents: z_t, (B, c, S/F, S/F).
            timesteps: t, (B,) int64.
            hq_features: f_HQ, (B, C, S/f, S/f); None gives the unconditional prior.
            condition_scale: factor on what the injections add; 0 gives the prior too.

        Returns:
            (B, c, S/F, S/F).
        """
        unet = self.unet
        embedding = unet.time_embedding(unet.time_proj(timesteps).to(self.dtype))
        x = unet.conv_in(noisy_latents)
        skips = [x]

        for block, inject in zip(unet.down_blocks, self.down_injections, strict=True):
            for resnet, attention in blocks_of(block):
                x = attention(resnet(x, embedding))
                skips.append(x)
            x = skips[-1] = apply_injection(inject, x, hq_features, condition_scale)
            for downsampler in block.downsamplers or ():
                x = downsampler(x)
                skips.append(x)

        x = unet.mid_block(x, embedding)

        for block, inject in zip(unet.up_blocks, self.up_injections, strict=True):
            for resnet, attention in blocks_of(block):
                x = attention(resnet(torch.cat([x, skips.pop()], dim=1), embedding))
            x = apply_injection(inject, x, hq_features, condition_scale)
            for upsampler in block.upsamplers or ():
                x = upsampler(x)

        return cast(Tensor, unet.conv_out(unet.conv_act(unet.conv_norm_out(x))))


def apply_injection(inject: nn.Module, x: Tensor, hq_features: Tensor | None, condition_scale: float) -> Tensor:
    """The level's injection, or x as it is where the level or the call has none."""
    if hq_features is None or isinstance(inject, nn.Identity):
        return x
    return cast(Tensor, inject(x, hq_features, condition_scale))


def blocks_of(block: Any) -> list[tuple[nn.Module, nn.Module]]:
    """The (residual block, attention) pairs of a UNet level; the attention is an identity where the level has none."""
    attentions = getattr(block, "attentions", None) or [nn.Identity()] * len(block.resnets)
    return list(zip(block.resnets, attentions, strict=True))
