"""Perceptual measures: VGG-19 and SqueezeNet features, style and content distances between pictures.

Weights are files the user brings (safetensors, see docs/training.md); none are part of the repository.
Pictures are ``[B, 3, H, W]`` RGB in [-1, 1]. The style distance compares normalised Gram matrices after
Gatys et al. (arXiv 1508.06576), relative to the larger of the two, so that every layer counts alike; the
content distance compares relu4_1 after instance normalisation, so that a change of palette alone costs
little.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from std_rt.core.errors import RecipeError, one_line

_MEAN_BGR = (103.939, 116.779, 123.68)  # of ImageNet, subtracted from 0..255
# (name in the weight file, input channels, output channels); a pool follows where the number is in _POOLED
_VGG = (
    ("00.block1_conv1", 3, 64),
    ("01.block1_conv2", 64, 64),
    ("02.block2_conv1", 64, 128),
    ("03.block2_conv2", 128, 128),
    ("04.block3_conv1", 128, 256),
    ("05.block3_conv2", 256, 256),
    ("06.block3_conv3", 256, 256),
    ("07.block3_conv4", 256, 256),
    ("08.output", 256, 512),
)
_POOLED = (1, 3, 7)
_TAPPED = (0, 2, 4, 8)  # relu1_1, 2_1, 3_1, 4_1
# (squeeze, each expand) of fire2 to fire7; a pool stands before fire2, fire4 and fire6
_FIRES = {2: (16, 64), 3: (16, 64), 4: (32, 128), 5: (32, 128), 6: (48, 192), 7: (48, 192)}


def _fold_input(conv: nn.Conv2d) -> None:
    """Let a first layer made for BGR in 0..255 less the mean take RGB in [-1, 1]."""
    assert conv.bias is not None
    with torch.no_grad():
        shift = 127.5 - torch.tensor(_MEAN_BGR)
        conv.bias.add_((conv.weight.sum((2, 3)) * shift).sum(1))
        conv.weight.copy_(conv.weight.flip(1) * 127.5)


class Vgg(nn.Module):
    """VGG-19 as far as relu4_1 (Simonyan and Zisserman), 2x2 maximum pooling.

    ``reflect``: pads by reflection, as in the AdaIN release; otherwise with zeros, which is several times
    faster in 16 bits.
    """

    def __init__(self, state: dict[str, Tensor], reflect: bool = True) -> None:
        super().__init__()
        self.reflect = reflect
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=0 if reflect else 1) for _, a, b in _VGG)
        for conv, (name, _, _) in zip(self.convs, _VGG, strict=True):
            _fill(conv, state, f"vgg.{name}")
        first = self.convs[0]
        assert isinstance(first, nn.Conv2d)
        _fold_input(first)

    def forward(self, images: Tensor, levels: int = 4) -> list[Tensor]:
        """relu1_1, 2_1, 3_1 and 4_1, or the first ``levels`` of them."""
        x, taps = images, []
        for i, conv in enumerate(self.convs[: _TAPPED[levels - 1] + 1]):
            x = F.relu(conv(F.pad(x, (1, 1, 1, 1), mode="reflect") if self.reflect else x))
            if i in _TAPPED:
                taps.append(x)
            if i in _POOLED:
                x = F.max_pool2d(x, 2)
        return taps


class _Fire(nn.Module):
    """1x1 convolution to few channels, then 1x1 and 3x3 side by side."""

    def __init__(self, channels: int, number: int, state: dict[str, Tensor]) -> None:
        super().__init__()
        few, many = _FIRES[number]
        self.squeeze = nn.Conv2d(channels, few, 1)
        self.narrow, self.wide = nn.Conv2d(few, many, 1), nn.Conv2d(few, many, 3, padding=1)
        for conv, name in (
            (self.squeeze, "squeeze1x1"),
            (self.narrow, "expand1x1"),
            (self.wide, "expand3x3"),
        ):
            _fill(conv, state, f"fire{number}.{name}.fire{number}")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.narrow(x), self.wide(x)], 1))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 as far as fire7 (Iandola et al.): about a tenth of VGG's arithmetic."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, stride=2)
        _fill(self.stem, state, "conv1")
        _fold_input(self.stem)
        widths = [64, *(2 * many for _, many in _FIRES.values())]
        self.fires = nn.ModuleList(_Fire(width, n, state) for width, n in zip(widths, _FIRES, strict=False))

    def forward(self, images: Tensor, levels: int = 4) -> list[Tensor]:
        """The stem, fire3, fire5 and fire7, or the first ``levels`` of them."""
        x = F.relu(self.stem(images))
        taps = [x]
        for i, fire in enumerate(self.fires[: 2 * (levels - 1)]):
            x = fire(F.max_pool2d(x, 3, 2, ceil_mode=True) if i % 2 == 0 else x)
            if i % 2 == 1:
                taps.append(x)
        return taps


def _fill(conv: nn.Module, state: dict[str, Tensor], name: str) -> None:
    conv.load_state_dict({key: state[f"{name}.{key}"].float() for key in ("weight", "bias")})


def load_perceptual(path: str | Path, reflect: bool = True) -> Vgg | SqueezeNet:
    """The network of a weight file, frozen; RecipeError where it is neither of the two.

    ``reflect``: how VGG pads.
    """
    try:
        state = load_file(path)
        network = Vgg(state, reflect) if any(key.startswith("vgg.") for key in state) else SqueezeNet(state)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        reason = one_line(error, 200)
        raise RecipeError(
            f"{path} does not hold VGG-19 or SqueezeNet 1.1 weights ({reason}); see docs/training.md"
        ) from None
    return network.requires_grad_(False).eval()


def gram(features: Tensor) -> Tensor:
    """``[B, C, h, w]`` -> ``[B, C, C]``: mean product of each two channels over all positions."""
    if features.is_contiguous(memory_format=torch.channels_last):  # a view, where the other would copy
        rows = features.permute(0, 2, 3, 1).flatten(1, 2)
        return rows.transpose(1, 2) @ rows / rows.shape[1]
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[-1]


def style_distance(x: Sequence[Tensor], style: Sequence[Tensor]) -> Tensor:
    """Per-sample distance ``[B]`` of two lists of features, which may differ in size; 0 = same statistics.

    That of their Gram matrices by `relative_norm`.
    """
    return relative_norm(*([gram(f.float()) for f in features] for features in (x, style)))


def content_distance(x: Tensor, photo: Tensor) -> Tensor:
    """Per-sample mean squared difference ``[B]`` of two feature maps, each normalised per channel."""
    return (F.instance_norm(x.float()) - F.instance_norm(photo.float())).square().mean((1, 2, 3))


def feature_distance(x: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the L1 of features relative to the target's mean size, a scalar."""
    total = x[0].new_zeros(())
    for a, b in zip(x, target, strict=True):
        size = b.abs().float().mean().clamp_min(1e-8)
        total = total + (a - b).abs().float().mean() / size
    return total / len(x)


def gram_distance(x: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean over layers and samples of the L1 of Gram matrices relative to the target's, a scalar.

    L1, not the norm of ``style_distance``: its gradient does not leave the many weak channels, in which fine
    strokes live, to a few strong ones.
    """
    return relative_l1([gram(a) for a in x], [gram(b) for b in target])


def relative_norm(x: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean over lists of matrices ``[B, C, C]`` of the norm of their difference, per sample ``[B]``.

    Relative to the larger of their norms (a constant to the gradient): relative to the target's alone, a dark
    style under a bright photo would outweigh all others in a mean.
    """
    total = x[0].new_zeros(len(x[0]))
    for ours, wanted in zip(x, target, strict=True):
        norms = torch.linalg.matrix_norm(ours.detach()), torch.linalg.matrix_norm(wanted)
        total = total + torch.linalg.matrix_norm(ours - wanted) / torch.maximum(*norms).clamp_min(1e-8)
    return total / len(x)


def relative_l1(x: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean over lists of matrices ``[B, C, C]`` and samples of their L1 distance, a scalar.

    Relative to the larger of the two (a constant to the gradient): relative to the target alone, one
    dark style outweighs a whole batch.
    """
    total = x[0].new_zeros(())
    for ours, wanted in zip(x, target, strict=True):
        size = torch.maximum(ours.detach().abs().sum((1, 2)), wanted.abs().sum((1, 2))).clamp_min(1e-8)
        total = total + ((ours - wanted).abs().sum((1, 2)) / size).mean()
    return total / len(x)


def quantile_gaps(x: Tensor, y: Tensor, filters: Tensor, count: int) -> Tensor:
    """What sliced Wasserstein distances are made of (Bonneel et al. 2015): gaps of sorted projections.

    ``x [B, C, h, w]`` and ``y [B, C, H, W]`` may differ in size; ``filters [K, C, s, s]``, of unit length,
    are the directions in the space of their ``s`` x ``s`` patches. Returns ``[B, K, count]``: the difference
    of ``count`` evenly spaced quantiles, differentiable.
    """
    a, b = (_quantiles(F.conv2d(p, filters).flatten(2), count) for p in (x, y))
    return a - b


def _quantiles(values: Tensor, count: int) -> Tensor:
    """Sorted ``values [B, K, N]`` resampled to ``count`` evenly spaced quantiles."""
    ordered = values.sort(-1).values
    at = torch.linspace(0, values.shape[-1] - 1, count, device=values.device)
    low = at.floor().long()
    high = (low + 1).clamp(max=values.shape[-1] - 1)
    return torch.lerp(ordered[..., low], ordered[..., high], at - low)


def colour_distance(x: Tensor, style: Tensor, generator: torch.Generator, directions: int = 16) -> Tensor:
    """Sliced Wasserstein-1 distance of the colours of two batches ``[B, 3, H, W]``, a scalar; 0 = same.

    Of the pictures at a quarter of their size, in units of their range; differentiable in ``x``.
    """
    axes = F.normalize(torch.randn(directions, 3, generator=generator)).to(x.device)
    small = F.avg_pool2d(x, 4), F.avg_pool2d(style, 4)
    return quantile_gaps(*small, axes[:, :, None, None], 256).abs().mean()


def lattice(images: Tensor, period: int = 8) -> Tensor:
    """Per-sample strength ``[B]`` of a pattern that repeats every ``period`` px in the fine detail.

    Relative to that detail (what a blur of 9 px takes away): the mean absolute value of its mean over all
    periods, and the spread of its size between places in the period. A decoder that upsamples by ``period``
    leaves such a pattern on flat ground; pictures of 256 px have about .1 by chance. ``images [B, 3, H, W]``,
    H, W >= 2 x period; differentiable.
    """
    fine = images - F.avg_pool2d(F.pad(images, (4,) * 4, mode="reflect"), 9, 1)
    rows, columns = (side // period * period for side in images.shape[2:])
    cells = fine[..., :rows, :columns].unflatten(2, (-1, period)).unflatten(4, (-1, period))
    size = cells.abs().mean((2, 4))
    whole = size.mean((1, 2, 3)).detach().clamp_min(1e-4)
    spread = (size - size.mean((2, 3), keepdim=True)).abs().mean((1, 2, 3))
    return (cells.mean((2, 4)).abs().mean((1, 2, 3)) + spread) / whole
