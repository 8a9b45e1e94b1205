"""Texture statistics as a loss: sliced Wasserstein distance between patches of latents.

The squared error of the base stage asks for the mean of all plausible pictures, which is smooth. A
style's medium lives in the distribution of its small patches, and that can be compared with no
feature network: project all patches on random directions, sort, and compare the sorted values
(sliced Wasserstein; for textures: Heitz et al., arXiv 2006.07229). Differentiable, per sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _quantiles(values: Tensor, count: int) -> Tensor:
    """Sorted ``values [B, D, N]`` resampled to ``count`` evenly spaced quantiles."""
    ordered = values.sort(-1).values
    at = torch.linspace(0, values.shape[-1] - 1, count)
    low = at.floor().long()
    high = (low + 1).clamp(max=values.shape[-1] - 1)
    return torch.lerp(ordered[..., low], ordered[..., high], at - low)


def sliced_wasserstein(
    x: Tensor, y: Tensor, generator: torch.Generator, side: int, directions: int = 48
) -> Tensor:
    """Per-sample squared distance ``[B]`` of the ``side`` x ``side`` patch distributions of x and y.

    ``x [B, C, h, w]`` and ``y [B, C, H, W]`` may differ in size. Directions have unit length, so the
    value is in squared latent units.
    """
    filters = torch.randn((directions, x.shape[1], side, side), generator=generator)
    filters = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
    a, b = F.conv2d(x, filters).flatten(2), F.conv2d(y, filters).flatten(2)
    count = min(a.shape[-1], b.shape[-1])
    return (_quantiles(a, count) - _quantiles(b, count)).square().mean((1, 2))


def texture_distance(x: Tensor, style: Tensor, generator: torch.Generator) -> Tensor:
    """Per-sample distance ``[B]``: single latent pixels, 3x3 patches, and 3x3 patches at half size."""
    total = sliced_wasserstein(x, style, generator, 1) + sliced_wasserstein(x, style, generator, 3)
    return total + sliced_wasserstein(F.avg_pool2d(x, 2), F.avg_pool2d(style, 2), generator, 3)


def detail_distance(x: Tensor, style: Tensor, generator: torch.Generator) -> Tensor:
    """As ``texture_distance`` but of what a 5x5 blur removes, so that large areas of colour do not count."""

    def detail(z: Tensor) -> Tensor:
        return z - F.avg_pool2d(z, 5, 1, 2, count_include_pad=False)

    return sliced_wasserstein(detail(x), detail(style), generator, 1) + sliced_wasserstein(
        detail(x), detail(style), generator, 3
    )
