"""ArtFID's networks a second way, with random weights in the layout of the published files.

Inception v3 as a table of its convolutions with their sources; batch norm is not folded in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# name, source, output channels, kernel (height, width), stride, padding; "in" is the block's input
Row = tuple[str, str, int, tuple[int, int], int, tuple[int, int]]
STEM = (  # name, output channels, kernel, stride, padding
    ("1a_3x3", 32, 3, 2, 0), ("2a_3x3", 32, 3, 1, 0), ("2b_3x3", 64, 3, 1, 1), ("3b_1x1", 80, 1, 1, 0),
    ("4a_3x3", 192, 3, 1, 0),
)  # fmt: skip
ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)
FLAT, TALL = (1, 7), (7, 1)


def _same(name: str, source: str, channels: int, kernel: tuple[int, int]) -> Row:
    return name, source, channels, kernel, 1, (kernel[0] // 2, kernel[1] // 2)


def _path(stem: str, *convs: tuple[int, tuple[int, int]]) -> list[Row]:
    names = [f"{stem}_{i}" for i in range(1, len(convs) + 1)]
    sources = ["in", *names]
    return [_same(n, s, *conv) for n, s, conv in zip(names, sources, convs, strict=False)]


def _block_a(pool: int) -> tuple[list[Row], list[str]]:
    rows = [_same("branch1x1", "in", 64, ONE), *_path("branch5x5", (48, ONE), (64, FIVE))]
    rows += [
        *_path("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)),
        _same("branch_pool", "avg", pool, ONE),
    ]
    return rows, ["branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"]


def _block_b() -> tuple[list[Row], list[str]]:
    rows: list[Row] = [
        ("branch3x3", "in", 384, THREE, 2, (0, 0)),
        *_path("branch3x3dbl", (64, ONE), (96, THREE)),
    ]
    rows.append(("branch3x3dbl_3", "branch3x3dbl_2", 96, THREE, 2, (0, 0)))
    return rows, ["branch3x3", "branch3x3dbl_3", "max"]


def _block_c(c: int) -> tuple[list[Row], list[str]]:
    rows = [_same("branch1x1", "in", 192, ONE), *_path("branch7x7", (c, ONE), (c, FLAT), (192, TALL))]
    rows += _path("branch7x7dbl", (c, ONE), (c, TALL), (c, FLAT), (c, TALL), (192, FLAT))
    rows.append(_same("branch_pool", "avg", 192, ONE))
    return rows, ["branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"]


def _block_d() -> tuple[list[Row], list[str]]:
    rows = [*_path("branch3x3", (192, ONE)), ("branch3x3_2", "branch3x3_1", 320, THREE, 2, (0, 0))]
    rows += _path("branch7x7x3", (192, ONE), (192, FLAT), (192, TALL))
    rows.append(("branch7x7x3_4", "branch7x7x3_3", 192, THREE, 2, (0, 0)))
    return rows, ["branch3x3_2", "branch7x7x3_4", "max"]


def _block_e() -> tuple[list[Row], list[str]]:
    rows = [_same("branch1x1", "in", 320, ONE), *_path("branch3x3", (384, ONE))]
    rows += [
        _same("branch3x3_2a", "branch3x3_1", 384, (1, 3)),
        _same("branch3x3_2b", "branch3x3_1", 384, (3, 1)),
    ]
    rows += _path("branch3x3dbl", (448, ONE), (384, THREE))
    rows += [
        _same("branch3x3dbl_3a", "branch3x3dbl_2", 384, (1, 3)),
        _same("branch3x3dbl_3b", "branch3x3dbl_2", 384, (3, 1)),
        _same("branch_pool", "avg", 192, ONE),
    ]
    ends = ["branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool"]
    return rows, ends


BLOCKS = {
    "5b": _block_a(32), "5c": _block_a(64), "5d": _block_a(64), "6a": _block_b(), "6b": _block_c(128),
    "6c": _block_c(160), "6d": _block_c(160), "6e": _block_c(192), "7a": _block_d(), "7b": _block_e(),
    "7c": _block_e(),
}  # fmt: skip


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every convolution and the shape of its weight."""
    width = 3
    for name, channels, side, _, _ in STEM:
        yield f"Conv2d_{name}", (channels, width, side, side)
        width = channels
    for block, (rows, ends) in BLOCKS.items():
        widths = {"in": width, "avg": width, "max": width}
        for name, source, channels, kernel, _, _ in rows:
            yield f"Mixed_{block}.{name}", (channels, widths[source], *kernel)
            widths[name] = channels
        width = sum(widths[end] for end in ends)


def random_inception(seed: int = 0) -> dict[str, Tensor]:
    """As in ``art_inception.pth``, in half precision; without the heads, which nothing here reads."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in _shapes():
        inputs = shape[1] * shape[2] * shape[3]
        state[f"{name}.conv.weight"] = (torch.randn(shape) * (2 / inputs) ** 0.5).half()
        for key, low, high in (("weight", 0.8, 1.2), ("bias", -0.1, 0.1), ("running_mean", -0.1, 0.1)):
            state[f"{name}.bn.{key}"] = torch.empty(shape[0]).uniform_(low, high)
        state[f"{name}.bn.running_var"] = torch.empty(shape[0]).uniform_(0.8, 1.2)
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(1)
    return state


def inception_features(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in 0..1 -> ``[B, 2048]``."""

    def conv(x: Tensor, name: str, stride: int, padding: int | tuple[int, int]) -> Tensor:
        x = F.conv2d(x, state[f"{name}.conv.weight"].float(), None, stride, padding)
        norm = [state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm, eps=0.001).relu()

    x = images
    for name, _, _, stride, padding in STEM:
        x = conv(x, f"Conv2d_{name}", stride, padding)
        x = F.max_pool2d(x, 3, 2) if name in ("2b_3x3", "4a_3x3") else x
    for block, (rows, ends) in BLOCKS.items():
        known = {"in": x, "avg": F.avg_pool2d(x, 3, 1, 1)}
        known |= {"max": F.max_pool2d(x, 3, 2)} if "max" in ends else {}
        for name, source, _, _, stride, padding in rows:
            known[name] = conv(known[source], f"Mixed_{block}.{name}", stride, padding)
        x = torch.cat([known[end] for end in ends], 1)
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def random_lpips(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """AlexNet's features as torchvision names them, and the weights of LPIPS."""
    torch.manual_seed(seed)
    convs = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    alexnet: dict[str, Tensor] = {}
    for n, (outputs, inputs, side) in convs.items():
        alexnet[f"features.{n}.weight"] = (
            torch.randn(outputs, inputs, side, side) * (2 / inputs) ** 0.5 / side
        )
        alexnet[f"features.{n}.bias"] = torch.randn(outputs) * 0.1
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c[0], 1, 1) for i, c in enumerate(convs.values())}
    return alexnet, linear


def write_artfid(folder: Path, seed: int = 0) -> Path:
    """The three files by their published names."""
    folder.mkdir(parents=True, exist_ok=True)
    alexnet, linear = random_lpips(seed)
    files = {
        "art_inception.pth": random_inception(seed), "alexnet-owt-7be5be79.pth": alexnet, "alex.pth": linear,
    }  # fmt: skip
    for name, state in files.items():
        torch.save(state, folder / name)
    return folder
