"""The two networks of ArtFID: an Inception v3 trained on art, and LPIPS over AlexNet.

Wright and Ommer, "ArtFID: Quantitative Evaluation of Neural Style Transfer" (arXiv 2207.12280): the product
``(1 + LPIPS(content, output)) * (1 + FID(styles, outputs))``. Weights are the published files, in a folder of
the user's: ``art_inception.pth`` (the authors'), ``alexnet-owt-7be5be79.pth`` (torchvision's) and LPIPS'
``alex.pth`` (version 0.1). Pictures are ``[B, 3, H, W]`` RGB in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]

SMALLEST_PX = 75  # below it, nothing is left before Inception's last blocks
_BATCH_NORM_EPS = 1e-3
# A block's branches beside the pool: the name, and how many convolutions one after the other it holds.
_A = (("branch1x1", 1), ("branch5x5", 2), ("branch3x3dbl", 3))
_C = (("branch1x1", 1), ("branch7x7", 3), ("branch7x7dbl", 5))
_BLOCKS = {**dict.fromkeys(("5b", "5c", "5d"), _A), **dict.fromkeys(("6b", "6c", "6d", "6e"), _C)}
_HALVING = {
    "6a": (("branch3x3", 1), ("branch3x3dbl", 3)),
    "7a": (("branch3x3", 2), ("branch7x7x3", 4)),
}
_ORDER = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


class ArtInception:
    """Pictures -> pooled features ``[B, 2048]`` (Szegedy et al., arXiv 1512.00567), batch norm folded in.

    As in the authors' program, pictures are seen at their own size and in 0..1, without normalisation.
    Raises KeyError where ``state`` is something else.
    """

    def __init__(self, state: State) -> None:
        names = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
        self._convs = {name: _folded(state, name) for name in names}
        _ = self._convs["Mixed_7c.branch_pool"]

    def to(self, device: str) -> ArtInception:
        """Move the weights."""
        self._convs = {name: (w.to(device), b.to(device)) for name, (w, b) in self._convs.items()}
        return self

    def __call__(self, images: Tensor) -> Tensor:
        x = (images + 1) / 2
        x = self._conv(x, "Conv2d_1a_3x3", stride=2, padded=False)
        x = self._conv(self._conv(x, "Conv2d_2a_3x3", padded=False), "Conv2d_2b_3x3")
        x = self._conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
        x = F.max_pool2d(self._conv(x, "Conv2d_4a_3x3", padded=False), 3, 2)
        for block in _ORDER:
            x = torch.cat(self._branches(x, block), 1)
        return x.mean((2, 3))

    def _branches(self, x: Tensor, block: str) -> list[Tensor]:
        name = f"Mixed_{block}"
        if block in _HALVING:
            halved = [self._chain(x, f"{name}.{b}", n, halving=True) for b, n in _HALVING[block]]
            return [*halved, F.max_pool2d(x, 3, 2)]
        pooled = self._conv(F.avg_pool2d(x, 3, 1, 1), f"{name}.branch_pool")
        if block in _BLOCKS:
            return [*(self._chain(x, f"{name}.{b}", n) for b, n in _BLOCKS[block]), pooled]
        wide = self._conv(x, f"{name}.branch3x3_1")
        deep = self._chain(x, f"{name}.branch3x3dbl", 2)
        split = [self._conv(wide, f"{name}.branch3x3_2{side}") for side in "ab"]
        split += [self._conv(deep, f"{name}.branch3x3dbl_3{side}") for side in "ab"]
        return [self._conv(x, f"{name}.branch1x1"), *split, pooled]

    def _chain(self, x: Tensor, name: str, count: int, halving: bool = False) -> Tensor:
        """Convolutions ``name_1`` to ``name_count``; ``halving``: the last has stride 2 and no padding."""
        for i in range(1, count + 1):
            last = halving and i == count
            single = name if count == 1 else f"{name}_{i}"
            x = self._conv(x, single, stride=2 if last else 1, padded=not last)
        return x

    def _conv(self, x: Tensor, name: str, stride: int = 1, padded: bool = True) -> Tensor:
        weight, bias = self._convs[name]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if padded else 0
        return F.relu(F.conv2d(x, weight, bias, stride, padding))


def _folded(state: State, name: str) -> tuple[Tensor, Tensor]:
    """A convolution and the batch norm behind it as one: weight and bias."""
    norm = {
        key: state[f"{name}.bn.{key}"].float() for key in ("weight", "bias", "running_mean", "running_var")
    }
    scale = norm["weight"] / (norm["running_var"] + _BATCH_NORM_EPS).sqrt()
    weight = state[f"{name}.conv.weight"].float() * scale[:, None, None, None]
    return weight, norm["bias"] - norm["running_mean"] * scale


# Number in AlexNet's ``features``, stride, padding; a 3x3 pool of stride 2 follows the first two.
_ALEXNET = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))
_POOLED = (0, 3)
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips:
    """LPIPS 0.1 over AlexNet (Zhang et al., arXiv 1801.03924): distance of two batches, ``[B]``; 0 = same.

    Features of each of five layers as unit vectors, their squared difference weighted by channel, averaged
    over positions, summed over layers. Raises KeyError where a state is something else.
    """

    def __init__(self, alexnet: State, linear: State) -> None:
        self._convs = [
            (alexnet[f"features.{n}.weight"].float(), alexnet[f"features.{n}.bias"].float())
            for n, _, _ in _ALEXNET
        ]
        self._weights = [linear[f"lin{i}.model.1.weight"].float() for i in range(len(_ALEXNET))]
        self._shift, self._scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (_LPIPS_SHIFT, _LPIPS_SCALE))

    def to(self, device: str) -> Lpips:
        """Move the weights."""
        self._convs = [(w.to(device), b.to(device)) for w, b in self._convs]
        self._weights = [w.to(device) for w in self._weights]
        self._shift, self._scale = self._shift.to(device), self._scale.to(device)
        return self

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(len(x), device=x.device)
        for a, b, weight in zip(self._features(x), self._features(y), self._weights, strict=True):
            total = total + F.conv2d((a - b).square(), weight).mean((1, 2, 3))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self._shift) / self._scale, []
        for (number, stride, padding), (weight, bias) in zip(_ALEXNET, self._convs, strict=True):
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
            if number in _POOLED:
                x = F.max_pool2d(x, 3, 2)
        return found
