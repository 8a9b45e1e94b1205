"""The style encoder of std-tiny: a style picture -> style tokens and a pooled style vector.

It reads the autoencoder's latents (its own frozen copy of the encoder), because their statistics carry
palette and texture energy directly. Half of the tokens come from channel means and standard deviations at
three depths, half from a resampler over positions (as in IP-Adapter Plus). The pooled vector enters the UNet
where SDXL's pooled text embedding does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from std_rt.models import STYLE_HEADS
from std_rt.models.autoencoder import ResBlock, make_encoder


def _statistics(x: Tensor) -> Tensor:
    """``[B, C, h, w]`` -> ``[B, 2C]``: mean and standard deviation over positions."""
    mean = x.mean((2, 3))
    variance = (x - mean[:, :, None, None]).square().mean((2, 3))
    return torch.cat([mean, (variance + 1e-5).sqrt()], 1)


def _covariance(x: Tensor) -> Tensor:
    """``[B, C, h, w]`` -> ``[B, C * C]``: covariance of channels over positions."""
    flat = (x - x.mean((2, 3), keepdim=True)).flatten(2)
    return (flat @ flat.transpose(1, 2) / flat.shape[2]).flatten(1)


class Resampler(nn.Module):
    """Learned queries attend to positions ``[B, L, C]`` -> ``[B, queries, dim]``."""

    def __init__(self, queries: int, channels: int, dim: int, heads: int = STYLE_HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(1, queries, dim) * 0.5)
        self.norm = nn.LayerNorm(channels)
        self.to_k = nn.Linear(channels, dim, bias=False)
        self.to_v = nn.Linear(channels, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q = self.queries.expand(x.shape[0], -1, -1)
        y = F.scaled_dot_product_attention(
            self._split(q), self._split(self.to_k(x)), self._split(self.to_v(x))
        )
        y = q + self.to_out(y.transpose(1, 2).flatten(2))
        return y + self.feed_forward(y)


class StyleEncoder(ModelMixin, ConfigMixin):
    """``style_image [B, 3, S, S]`` in [-1, 1] -> ``(style_tokens [B, T, D], text_embeds [B, P])``."""

    @register_to_config
    def __init__(
        self,
        image_px: int = 256,
        latent_channels: int = 8,
        patchify_channels: tuple[int, int] = (64, 128),
        patchify_blocks: int | Sequence[int] = 2,
        widths: tuple[int, int, int] = (96, 128, 192),
        tokens: int = 16,
        dim: int = 192,
        pooled_dim: int = 256,
        patchify_shortcut: bool = False,
    ) -> None:
        super().__init__()
        patchify = make_encoder(latent_channels, patchify_channels, patchify_blocks, patchify_shortcut)
        self.patchify = patchify.requires_grad_(False)
        self.stages = nn.ModuleList()
        before = latent_channels
        for i, width in enumerate(widths):
            stride = 1 if i == 0 else 2
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 3, stride, 1), ResBlock(width), ResBlock(width), nn.SiLU()
                )
            )
            before = width
        known = 2 * (latent_channels + sum(widths)) + latent_channels**2
        self.pooled = nn.Sequential(
            nn.LayerNorm(known), nn.Linear(known, 512), nn.SiLU(), nn.Linear(512, pooled_dim)
        )
        self.global_tokens = nn.Linear(pooled_dim, tokens // 2 * dim)
        self.resampler = Resampler(tokens - tokens // 2, widths[-1], dim)
        self.norm = nn.LayerNorm(dim)

    def encode_latents(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[B, C, h, w]`` of a style picture -> ``(style_tokens, text_embeds)``."""
        known = [_statistics(z), _covariance(z)]
        x = z
        for stage in self.stages:
            x = stage(x)
            known.append(_statistics(x))
        pooled = self.pooled(torch.cat(known, 1))
        globally = self.global_tokens(pooled).unflatten(1, (-1, self.config.dim))
        locally = self.resampler(x.flatten(2).transpose(1, 2))
        return self.norm(torch.cat([globally, locally], 1)), pooled

    @property
    def image_px(self) -> int:
        """Side of the style image."""
        return int(self.config.image_px)

    def negative(self) -> Tensor:
        """Style tokens of no style ``[1, T, D]``: zeros, as its training drops a style."""
        return torch.zeros(1, self.config.tokens, self.config.dim)

    def forward(self, style_image: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_latents(self.patchify(style_image))
