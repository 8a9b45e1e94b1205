"""Random weights in the layouts of published files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VGG = (
    "00.block1_conv1 3 64,01.block1_conv2 64 64,02.block2_conv1 64 128,03.block2_conv2 128 128,"
    "04.block3_conv1 128 256,05.block3_conv2 256 256,06.block3_conv3 256 256,07.block3_conv4 256 256,"
    "08.output 256 512"
)
FIRES = "2 64 16 64,3 128 16 64,4 128 32 128,5 256 32 128,6 256 48 192,7 384 48 192"


def random_conv(state: dict[str, Tensor], name: str, inputs: int, outputs: int, side: int) -> None:
    """A random convolution under ``name``, as weight files hold it: fp16 weight, fp32 bias."""
    scale = (inputs * side * side) ** -0.5
    state[f"{name}.weight"] = (torch.randn(outputs, inputs, side, side) * scale).half()
    state[f"{name}.bias"] = torch.randn(outputs) * 0.1


def write_vgg(path: Path) -> Path:
    """VGG-19 as far as relu4_1."""
    state: dict[str, Tensor] = {}
    for line in VGG.split(","):
        name, inputs, outputs = line.split()
        random_conv(state, f"vgg.{name}", int(inputs), int(outputs), 3)
    save_file(state, path)
    return path


def write_squeezenet(path: Path) -> Path:
    """SqueezeNet 1.1 as far as fire7."""
    state: dict[str, Tensor] = {}
    random_conv(state, "conv1", 3, 64, 3)
    for line in FIRES.split(","):
        n, inputs, few, many = map(int, line.split())
        random_conv(state, f"fire{n}.squeeze1x1.fire{n}", inputs, few, 1)
        random_conv(state, f"fire{n}.expand1x1.fire{n}", few, many, 1)
        random_conv(state, f"fire{n}.expand3x3.fire{n}", few, many, 3)
    save_file(state, path)
    return path
