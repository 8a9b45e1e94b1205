"""The autoencoder of std-tiny: pixel-shuffle in front, two levels behind, 8x smaller, 8 channels.

Working at quarter resolution from the first layer on is what makes it fast on a CPU: a stack of
3x3 convolutions at full resolution (as in AutoencoderTiny) spends most of its time on the outermost,
least telling layer. The classes follow diffusers' conventions (``ModelMixin``, ``config.json`` and
``diffusion_pytorch_model.safetensors``), so that a folder written by ``save_pretrained`` has the
layout of any other VAE folder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class ResBlock(nn.Module):
    """``x + conv(silu(conv(x)))``; the second convolution starts at zero, so depth costs no stability."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


def make_encoder(latent_channels: int, channels: tuple[int, int], blocks: int) -> nn.Sequential:
    """Image ``[B, 3, H, W]`` -> latents ``[B, latent_channels, H/8, W/8]``."""
    narrow, wide = channels
    return nn.Sequential(
        nn.PixelUnshuffle(4),
        nn.Conv2d(48, narrow, 3, padding=1),
        *[ResBlock(narrow) for _ in range(blocks)],
        nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
        *[ResBlock(wide) for _ in range(blocks)],
        nn.SiLU(),
        nn.Conv2d(wide, latent_channels, 3, padding=1),
    )


def make_decoder(latent_channels: int, channels: tuple[int, int], blocks: int) -> nn.Sequential:
    """Latents ``[B, latent_channels, H/8, W/8]`` -> image ``[B, 3, H, W]``."""
    narrow, wide = channels
    return nn.Sequential(
        nn.Conv2d(latent_channels, wide, 3, padding=1),
        *[ResBlock(wide) for _ in range(blocks)],
        nn.Conv2d(wide, narrow * 4, 3, padding=1),
        nn.PixelShuffle(2),
        *[ResBlock(narrow) for _ in range(blocks)],
        nn.SiLU(),
        nn.Conv2d(narrow, 48, 3, padding=1),
        nn.PixelShuffle(4),
    )


class EncoderOutput(NamedTuple):
    """What ``encode`` returns; the field's name is diffusers'."""

    latents: Tensor


class DecoderOutput(NamedTuple):
    """What ``decode`` returns; the field's name is diffusers'."""

    sample: Tensor


class AutoencoderPixelShuffle(ModelMixin, ConfigMixin):
    """Deterministic autoencoder; images in [-1, 1], latents of about unit variance per channel.

    ``block_out_channels`` has four entries because diffusers' pipelines compute the scale factor (8)
    as ``2 ** (len - 1)``; the network itself has two levels, of the widths in ``channels``.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        channels: tuple[int, int] = (64, 128),
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
        block_out_channels: tuple[int, ...] = (48, 64, 64, 128),
    ) -> None:
        super().__init__()
        first, second = channels
        self.encoder = make_encoder(latent_channels, (first, second), encoder_blocks)
        self.decoder = make_decoder(latent_channels, (first, second), decoder_blocks)

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput:
        """Image ``[B, 3, H, W]`` in [-1, 1] -> latents ``[B, C, H/8, W/8]``; H and W divide by 8."""
        return EncoderOutput(self.encoder(x))

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput:
        """Latents ``[B, C, h, w]`` -> image ``[B, 3, 8h, 8w]``, not clamped."""
        return DecoderOutput(self.decoder(z))

    @torch.no_grad()
    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Fold the latents' per-channel mean and standard deviation into the outermost layers.

        Afterwards latents have zero mean and unit variance per channel over the data they were
        measured on, so scaling_factor stays 1 and the noise schedule means the same in each channel.
        """
        last, first = self.encoder[-1], self.decoder[0]
        assert isinstance(last, nn.Conv2d)
        assert isinstance(first, nn.Conv2d)
        assert last.bias is not None
        assert first.bias is not None
        last.bias.copy_((last.bias - mean) / std)
        last.weight.div_(std[:, None, None, None])
        # A border pixel of the decoder's first convolution sees zero padding, which used to mean
        # latent 0 and now means latent `mean`: equal up to that one border row.
        first.bias.add_((first.weight.sum((2, 3)) * mean).sum(1))
        first.weight.mul_(std[None, :, None, None])
