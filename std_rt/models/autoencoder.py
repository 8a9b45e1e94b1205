"""The autoencoder of std-tiny: pixel-shuffle in front, two levels behind, 8x smaller, 8 or 16 channels.

Working at quarter resolution from the first layer on is what makes it fast on a CPU: a stack of
3x3 convolutions at full resolution (as in AutoencoderTiny) spends most of its time on the outermost,
least telling layer. The classes follow diffusers' conventions (``ModelMixin``, ``config.json`` and
``diffusion_pytorch_model.safetensors``), so that a folder written by ``save_pretrained`` has the
layout of any other VAE folder.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _per_level(blocks: int | Sequence[int]) -> tuple[int, int]:
    """Blocks at a quarter and at an eighth of the picture's size; one number means both."""
    narrow, wide = (blocks, blocks) if isinstance(blocks, int) else blocks
    return narrow, wide


class Shortcut(nn.Module):
    """``body(x) + linear(x)``: a linear code of 8x8 patches carries detail, the body what is left.

    After the residual autoencoding of DC-AE (arXiv 2410.10733). It costs next to nothing: the plain principal
    components of patches keep as much of a picture as a small network needs thousands of steps to learn.
    """

    def __init__(self, body: nn.Sequential, linear: nn.Sequential) -> None:
        super().__init__()
        self.body, self.linear = body, linear
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.linear(x)


def body_of(network: nn.Module) -> nn.Sequential:
    """The convolutional stack of an encoder or decoder, with a shortcut or without."""
    body = network.body if isinstance(network, Shortcut) else network
    assert isinstance(body, nn.Sequential)
    return body


def make_encoder(
    latent_channels: int, channels: tuple[int, int], blocks: int | Sequence[int], shortcut: bool = False
) -> nn.Sequential | Shortcut:
    """Image ``[B, 3, H, W]`` -> latents ``[B, latent_channels, H/8, W/8]``."""
    (narrow, wide), (shallow, deep) = channels, _per_level(blocks)
    body = nn.Sequential(
        nn.PixelUnshuffle(4),
        nn.Conv2d(48, narrow, 3, padding=1),
        *[ResBlock(narrow) for _ in range(shallow)],
        nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
        *[ResBlock(wide) for _ in range(deep)],
        nn.SiLU(),
        nn.Conv2d(wide, latent_channels, 3, padding=1),
    )
    if not shortcut:
        return body
    return Shortcut(body, nn.Sequential(nn.PixelUnshuffle(8), nn.Conv2d(192, latent_channels, 1)))


def make_decoder(
    latent_channels: int, channels: tuple[int, int], blocks: int | Sequence[int], shortcut: bool = False
) -> nn.Sequential | Shortcut:
    """Latents ``[B, latent_channels, H/8, W/8]`` -> image ``[B, 3, H, W]``."""
    (narrow, wide), (shallow, deep) = channels, _per_level(blocks)
    body = nn.Sequential(
        nn.Conv2d(latent_channels, wide, 3, padding=1),
        *[ResBlock(wide) for _ in range(deep)],
        nn.Conv2d(wide, narrow * 4, 3, padding=1),
        nn.PixelShuffle(2),
        *[ResBlock(narrow) for _ in range(shallow)],
        nn.SiLU(),
        nn.Conv2d(narrow, 48, 3, padding=1),
        nn.PixelShuffle(4),
    )
    if not shortcut:
        return body
    return Shortcut(body, nn.Sequential(nn.Conv2d(latent_channels, 192, 1), nn.PixelShuffle(8)))


class EncoderOutput(NamedTuple):
    """What ``encode`` returns; the field's name is diffusers'."""

    latents: Tensor


class DecoderOutput(NamedTuple):
    """What ``decode`` returns; the field's name is diffusers'."""

    sample: Tensor


class AutoencoderPixelShuffle(ModelMixin, ConfigMixin):
    """Deterministic autoencoder; images in [-1, 1], latents of about unit variance per channel.

    ``block_out_channels`` has four entries because diffusers' pipelines compute the scale factor (8)
    as ``2 ** (len - 1)``; the network itself has two levels, of the widths in ``channels``. The encoder may
    be thinner (``encoder_channels``; None: the same), and the numbers of blocks may differ by level.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        channels: tuple[int, int] = (64, 128),
        encoder_blocks: int | Sequence[int] = 2,
        decoder_blocks: int | Sequence[int] = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
        block_out_channels: tuple[int, ...] = (48, 64, 64, 128),
        encoder_channels: tuple[int, int] | None = None,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        first, second = channels
        thin, wide = encoder_channels or channels
        self.encoder = make_encoder(latent_channels, (thin, wide), encoder_blocks, shortcut)
        self.decoder = make_decoder(latent_channels, (first, second), decoder_blocks, shortcut)

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
        last, first = body_of(self.encoder)[-1], body_of(self.decoder)[0]
        _scale_outputs(last, mean, std)
        # A border pixel of the decoder's first convolution sees zero padding, which used to mean
        # latent 0 and now means latent `mean`: equal up to that one border row.
        _scale_inputs(first, mean, std)
        if isinstance(self.encoder, Shortcut) and isinstance(self.decoder, Shortcut):
            _scale_outputs(self.encoder.linear[1], torch.zeros_like(mean), std)
            _scale_inputs(self.decoder.linear[0], mean, std)


def _scale_outputs(conv: nn.Module, mean: Tensor, std: Tensor) -> None:
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    conv.bias.copy_((conv.bias - mean) / std)
    conv.weight.div_(std[:, None, None, None])


def _scale_inputs(conv: nn.Module, mean: Tensor, std: Tensor) -> None:
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    conv.bias.add_((conv.weight.sum((2, 3)) * mean).sum(1))
    conv.weight.mul_(std[None, :, None, None])
