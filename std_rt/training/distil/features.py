"""Frozen features that the discriminator's heads read: of DINOv2, a perceptual network or the style encoder.

A projected discriminator (Sauer et al., "Projected GANs Converge Faster", arXiv 2111.01007; with a ViT:
StyleGAN-T, arXiv 2301.09515) trains small heads on a frozen network. Gradients pass through to the
latents, so that the student learns from them; nothing here is ever updated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from std_rt.core.errors import RecipeError, one_line
from std_rt.models.perceptual import SqueezeNet, Vgg
from std_rt.models.style_encoder import StyleEncoder

__all__ = ["DinoFeatures", "Features", "PerceptualFeatures", "StyleFeatures", "load_dino"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINO_KINDS = ("dinov2", "dinov2_with_registers")
# Used in pretraining only: a checkpoint may lack it.
SPARE = {"embeddings.mask_token"}


class Features(Protocol):
    """Latents -> maps at several depths; frozen, and differentiable with respect to the latents."""

    channels: list[int]

    def __call__(self, latents: Tensor) -> list[Tensor]:
        """``[B, C, h, w]`` -> one ``[B, channels[i], fh, fw]`` a map, fp32."""

    def to(self, device: torch.device | str) -> object:
        """Move in place."""


def fit_patches(height: int, width: int, size_px: int, patch_px: int) -> tuple[int, int]:
    """The size nearest to the same aspect ratio with a short side near ``size_px``, in whole patches."""
    short = max(1, round(size_px / patch_px))
    scale = short / min(height, width)
    return max(short, round(height * scale)) * patch_px, max(short, round(width * scale)) * patch_px


class DinoFeatures:
    """Decoded latents seen by blocks of a frozen DINOv2 (Oquab et al., arXiv 2304.07193).

    ``decode`` maps latents to images in [-1, 1] and lets gradients through. Raises
    RecipeError if the model lacks one of ``blocks`` (counted from 0).
    """

    def __init__(
        self,
        model: Any,
        decode: Callable[[Tensor], Tensor],
        blocks: Sequence[int] = (2, 5, 8, 11),
        size_px: int = 224,
    ) -> None:
        depth = int(model.config.num_hidden_layers)
        lacking = [b for b in blocks if not 0 <= b < depth]
        if lacking or not blocks:
            raise RecipeError(
                f"adversarial.blocks = {list(blocks)}, but this DINO has blocks 0 to {depth - 1}; "
                "name one or more of them"
            )
        self.model = model.eval().requires_grad_(False)
        self.decode = decode
        self.blocks = tuple(blocks)
        self.size_px = size_px
        self.channels = [int(model.config.hidden_size)] * len(self.blocks)
        # Made once: at each call they would wait for a copy from the host.
        self._mean = torch.tensor(IMAGENET_MEAN, device=model.device).view(1, 3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=model.device).view(1, 3, 1, 1)

    def to(self, device: torch.device | str) -> Self:
        """Move the model in place; the networks behind ``decode`` are the caller's."""
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def pixels(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] -> what DINO takes: whole patches, ImageNet's statistics."""
        size = fit_patches(images.shape[2], images.shape[3], self.size_px, int(self.model.config.patch_size))
        # Not clamped: where an image leaves the range, that would stop the gradient that brings it back.
        image = images.float()
        if image.shape[2:] != size:
            image = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
        return ((image + 1) / 2 - self._mean) / self._std

    def __call__(self, latents: Tensor) -> list[Tensor]:
        pixels = self.pixels(self.decode(latents))
        states = self.model(pixels, output_hidden_states=True).hidden_states
        # Entry 0 is what enters the first block.
        return [self._map(states[block + 1], pixels) for block in self.blocks]

    def _map(self, state: Tensor, pixels: Tensor) -> Tensor:
        """Tokens ``[B, 1 + registers + fh * fw, D]`` -> the patches' map ``[B, D, fh, fw]``."""
        config = self.model.config
        rows = pixels.shape[2] // int(config.patch_size)
        patches = state[:, 1 + getattr(config, "num_register_tokens", 0) :]
        return patches.transpose(1, 2).unflatten(2, (rows, -1)).float()


class PerceptualFeatures:
    """Decoded latents seen by a perceptual network at their own size; ``decode`` as in `DinoFeatures`."""

    def __init__(self, network: Vgg | SqueezeNet, decode: Callable[[Tensor], Tensor]) -> None:
        self.network, self.decode = network, decode
        with torch.no_grad():
            self.channels = [int(tap.shape[1]) for tap in network(torch.zeros(1, 3, 64, 64))]

    def to(self, device: torch.device | str) -> Self:
        """Move the network in place; the networks behind ``decode`` are the caller's."""
        self.network.to(device)
        return self

    def __call__(self, latents: Tensor) -> list[Tensor]:
        return [tap.float() for tap in self.network(self.decode(latents))]


class StyleFeatures:
    """Latents themselves, and each stage of std-tiny's style encoder: needs no decoding and no download.

    Raises RecipeError if the base has no such encoder.
    """

    def __init__(self, style_encoder: object) -> None:
        if not isinstance(style_encoder, StyleEncoder):
            raise RecipeError(
                'adversarial.features = "style" reads std-tiny\'s style encoder, which this base lacks; '
                'set adversarial.features = "dinov2"'
            )
        self.encoder = style_encoder.eval().requires_grad_(False)
        config: Any = style_encoder.config
        self.channels = [int(config.latent_channels), *map(int, config.widths)]

    def __call__(self, latents: Tensor) -> list[Tensor]:
        maps = [latents]
        for stage in self.encoder.stages:
            maps.append(stage(maps[-1]))
        return [m.float() for m in maps]

    def to(self, device: torch.device | str) -> Self:
        """The encoder, which is the base's own."""
        self.encoder.to(device)
        return self


def load_dino(source: str | Path) -> Any:
    """A DINOv2 (``Dinov2Model``, with registers or without) from a hub id or a folder; fp32, eval, frozen.

    Raises RecipeError if it is missing, cannot be reached, is another kind of model or incomplete.
    """
    # Not at the top: std-tiny trains without transformers.
    from transformers import AutoConfig, AutoModel

    remedy = "give a DINOv2 folder with adversarial.dino=FOLDER, or set adversarial.weight=0"
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in DINO_KINDS:
            raise ValueError(f"it is a {kind!r} model")
        # Safetensors only: the other format is pickle.
        model, found = AutoModel.from_pretrained(
            source, use_safetensors=True, attn_implementation="sdpa", output_loading_info=True
        )
        lacking = sorted(set(found["missing_keys"]) - SPARE)
        if lacking:
            raise ValueError(f"it lacks {len(lacking)} weights, {lacking[0]!r} the first")
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with the files
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = one_line(error, 200)
        raise RecipeError(
            f"adversarial.dino = {str(source)!r} cannot be loaded ({reason}); {remedy}"
        ) from None
    return model.float().eval().requires_grad_(False)
