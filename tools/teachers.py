"""Pretrained style transfer networks that make training triplets; weights are files the user brings.

Every teacher takes a photo and a style picture, ``[1, 3, H, W]`` RGB in [0, 1] (sizes may differ), and
returns the stylized photo at the photo's size. The definitions follow the papers and the tensors' shapes:

* MicroAST: Wang et al., AAAI 2023 (arXiv 2211.15313)
* AdaIN: Huang and Belongie, ICCV 2017 (arXiv 1703.06868), and its mix with style swap, Chen and Schmidt,
  2016 (arXiv 1612.04337)
* CD-WCT: collaborative distillation, Wang et al., CVPR 2020 (arXiv 2003.08436), of WCT (arXiv 1705.08086)
* Fixed: five feed-forward networks of one style each, Johnson et al., ECCV 2016 (arXiv 1603.08155)
* Magenta: arbitrary stylization, Ghiasi et al., BMVC 2017 (arXiv 1705.06830), as two ONNX files
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from std_rt.models.perceptual import Vgg

State = dict[str, Tensor]
Teacher = Callable[[Tensor, Tensor], Tensor]


def read_weights(path: str | Path) -> State:
    """Weights of a file in fp32."""
    return {name: value.float() for name, value in load_file(path).items()}


def conv(x: Tensor, state: State, name: str, stride: int = 1, padding: int | None = None) -> Tensor:
    """Convolution with reflect padding ('same' unless given); the groups follow from the shapes."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    pad = weight.shape[-1] // 2 if padding is None else padding
    x = F.pad(x, (pad,) * 4, mode="reflect") if pad else x
    return F.conv2d(x, weight, bias, stride, groups=x.shape[1] // weight.shape[1])


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, ``[B, C, 1, 1]``."""
    return x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-5).sqrt()


def adain(x: Tensor, style: Tensor) -> Tensor:
    """``x`` with the style's channel moments."""
    (mean, std), (style_mean, style_std) = moments(x), moments(style)
    return (x - mean) / std * style_std + style_mean


def fit(x: Tensor, photo: Tensor) -> Tensor:
    """Clamped to [0, 1], at the photo's size: strides may have rounded the sides up."""
    return x[:, :, : photo.shape[2], : photo.shape[3]].clamp(0, 1)


def padded(photo: Tensor, multiple: int = 8) -> Tensor:
    """The photo with its sides rounded up to a multiple, by reflection."""
    h, w = photo.shape[-2:]
    return F.pad(photo, (0, -w % multiple, 0, -h % multiple), mode="reflect")


class MicroAst:
    """Two small encoders, features matched at two levels, convolutions modulated by the style."""

    def __init__(self, path: str | Path) -> None:
        self.state = read_weights(path)

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        return conv(x, self.state, f"{name}.conv_layer", stride)

    def _residual(self, x: Tensor, name: str, modulation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        def convolve(x: Tensor, number: int) -> Tensor:
            y = self._conv(x, f"{name}.conv{number}")
            return y if modulation is None else modulation[0] * y + modulation[1] * x

        y = F.relu(convolve(x, 1))
        return x + convolve(y, 2)

    def _encode(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        x = F.relu(self._conv(x, f"{name}.enc1.0"))
        for number, stride in ((2, 2), (4, 1), (6, 2), (8, 1)):
            x = F.relu(self._conv(x, f"{name}.enc1.{number}", stride))
        first = self._residual(x, f"{name}.enc1.10")
        return first, self._residual(first, f"{name}.enc2.0")

    def _modulation(self, style: Tensor, level: int) -> tuple[Tensor, Tensor]:
        weight, bias = (
            self._conv(style, f"modulator.{kind}{level}.0").mean((2, 3), keepdim=True)
            for kind in ("weight", "bias")
        )
        return weight, bias

    def __call__(self, photo: Tensor, style: Tensor) -> Tensor:
        _, x = self._encode(padded(photo), "content_encoder")
        s1, s2 = self._encode(style, "style_encoder")
        x = self._residual(adain(x, s2), "decoder.dec1", self._modulation(s2, 2))
        x = self._residual(adain(x, s1), "decoder.dec2", self._modulation(s1, 1))
        for depthwise, pointwise in ((1, 3), (6, 8)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = F.relu(self._conv(x, f"decoder.dec3.{depthwise}"))
            x = F.relu(self._conv(x, f"decoder.dec3.{pointwise}"))
        return fit(self._conv(x, "decoder.dec3.10"), photo)


def style_swap(content: Tensor, style: Tensor, stride: int = 1) -> Tensor:
    """Each 3x3 patch of ``content`` replaced by the ``style`` patch most like it, overlaps averaged."""
    channels = style.shape[1]
    patches = F.unfold(style, 3, stride=stride)[0].T.reshape(-1, channels, 3, 3)
    unit = patches / patches.flatten(1).norm(dim=1).clamp_min(1e-6)[:, None, None, None]
    best = F.conv2d(content, unit).argmax(1)[0]
    chosen = patches[best.flatten()].flatten(1).T[None]
    size = (content.shape[2], content.shape[3])
    count = F.fold(torch.ones_like(chosen), size, 3)
    return F.fold(chosen, size, 3) / count


class AdaIn:
    """Moments of relu4_1 matched; with ``swap`` above 0, that share of patch swap mixed in."""

    def __init__(self, path: str | Path, swap: float = 0.0) -> None:
        state = load_file(path)
        self.vgg = Vgg(state)
        self.layers = sorted({name.rsplit(".", 1)[0] for name in state if name.startswith("decoder.")})
        self.state = {name: value.float() for name, value in state.items() if name.startswith("decoder.")}
        self.swap = swap

    def _decode(self, x: Tensor) -> Tensor:
        for name in self.layers:
            x = conv(x, self.state, name)
            if name == self.layers[-1]:
                return x
            x = F.relu(x)
            if name.endswith(("block4_conv1_decode", "block3_conv4_decode", "block2_conv2_decode")):
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def __call__(self, photo: Tensor, style: Tensor) -> Tensor:
        c, s = (self.vgg(x * 2 - 1)[-1] for x in (padded(photo), style))
        mixed = adain(c, s)
        if self.swap:
            # Matched with both at zero mean and unit variance: else overall hue decides which patch fits.
            (mean, std), (s_mean, s_std) = moments(c), moments(s)
            swapped = style_swap((c - mean) / std, (s - s_mean) / s_std, 1 + (s.shape[2] * s.shape[3] > 1600))
            mixed = self.swap * (swapped * s_std + s_mean) + (1 - self.swap) * mixed
        return fit(self._decode(mixed), photo)


def whiten_and_colour(x: Tensor, style: Tensor, alpha: float) -> Tensor:
    """``x`` (a batch of one) with the style's channel covariance; ``alpha`` of that, the rest ``x``."""
    flat, target = x[0].flatten(1).double(), style[0].flatten(1).double()
    mean, target_mean = flat.mean(1, keepdim=True), target.mean(1, keepdim=True)
    y = _covariance_power(flat - mean, -0.5) @ (flat - mean)
    y = _covariance_power(target - target_mean, 0.5) @ y + target_mean
    return alpha * y.float().view_as(x) + (1 - alpha) * x


def _covariance_power(centred: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(centred @ centred.T / (centred.shape[1] - 1))
    kept = values > 1e-5
    return (vectors[:, kept] * values[kept] ** power) @ vectors[:, kept].T


_CD_LAYERS = ("11", "12", "21", "22", "31", "32", "33", "34", "41")
_CD_POOLED = ("12", "22", "34")
_CD_LAST = {1: "11", 2: "21", 3: "31", 4: "41"}


class CdWct:
    """Whitening and colouring at relu4_1, 3_1, 2_1, 1_1 in turn, through pruned encoders and decoders."""

    def __init__(self, path: str | Path, alpha: float = 0.8) -> None:
        self.state, self.alpha = read_weights(path), alpha

    def _encode(self, x: Tensor, level: int) -> Tensor:
        x = conv(x, self.state, f"encoder{level}.conv0")
        for name in _CD_LAYERS[: _CD_LAYERS.index(_CD_LAST[level]) + 1]:
            x = F.relu(conv(x, self.state, f"encoder{level}.conv{name}"))
            if name in _CD_POOLED:
                x = F.max_pool2d(x, 2)
        return x

    def _decode(self, x: Tensor, level: int) -> Tensor:
        names = _CD_LAYERS[: _CD_LAYERS.index(_CD_LAST[level]) + 1]
        for name in reversed(names):
            if name in _CD_POOLED:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = conv(x, self.state, f"decoder{level}.conv{name}")
            x = x if name == "11" else F.relu(x)
        return x

    def __call__(self, photo: Tensor, style: Tensor) -> Tensor:
        x = padded(photo)
        for level in (4, 3, 2, 1):
            mixed = whiten_and_colour(self._encode(x, level), self._encode(style, level), self.alpha)
            x = self._decode(mixed, level).clamp(0, 1)
        return fit(x, photo)


class FixedStyle:
    """A network of one style, which ignores the style picture."""

    def __init__(self, state: State, name: str) -> None:
        self.state, self.name = state, name

    def _layer(self, x: Tensor, number: int, stride: int = 1) -> Tensor:
        name = f"{self.name}.conv{number:02d}"
        x = conv(x, self.state, name, stride)
        gain, shift = (self.state[f"{self.name}.norm{number:02d}.{k}"] for k in ("weight", "bias"))
        return F.instance_norm(x, weight=gain, bias=shift)

    def __call__(self, photo: Tensor, style: Tensor) -> Tensor:
        x = padded(photo) * 255
        for number, stride in ((0, 1), (1, 2), (2, 2)):
            x = F.relu(self._layer(x, number, stride))
        for number in range(3, 13, 2):
            x = x + self._layer(F.relu(self._layer(x, number)), number + 1)
        for number in (13, 14):
            x = F.relu(self._layer(F.interpolate(x, scale_factor=2, mode="nearest"), number))
        return fit(conv(x, self.state, f"{self.name}.conv15") / 255, photo)


def load_fixed(path: str | Path) -> dict[str, FixedStyle]:
    """All fixed styles of a file, by name."""
    state = read_weights(path)
    names = sorted({name.split(".", 1)[0] for name in state})
    return {name: FixedStyle(state, name) for name in names}


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", antialias=True)


class Magenta:
    """A predictor (style picture -> 100 numbers) and a transformer, from a folder with both ONNX files."""

    def __init__(self, folder: str | Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        files = [next(Path(folder).glob(f"*{kind}*.onnx")) for kind in ("predict", "transform")]
        self.transformer = files[1]
        self.predict, self.transform = (onnxruntime.InferenceSession(file, options) for file in files)
        sides = next(i.shape[1:3] for i in self.transform.get_inputs() if i.shape[-1] == 3)
        self.size = tuple(sides) if all(isinstance(s, int) for s in sides) else None

    @staticmethod
    def _run(session: Any, *values: np.ndarray) -> np.ndarray:
        # The picture first, the code (100 numbers) second.
        names = [i.name for i in sorted(session.get_inputs(), key=lambda i: i.shape[-1] == 100)]
        return session.run(None, dict(zip(names, values, strict=True)))[0]

    def __call__(self, photo: Tensor, style: Tensor) -> Tensor:
        size = (photo.shape[2], photo.shape[3])
        code = self._run(self.predict, _resized(style, (256, 256)).permute(0, 2, 3, 1).numpy())
        # The published transformer has a fixed input size.
        x = _resized(photo, self.size) if self.size else padded(photo)
        out = self._run(self.transform, x.permute(0, 2, 3, 1).numpy(), code)
        y = torch.from_numpy(out).permute(0, 3, 1, 2)
        return fit(_resized(y, size) if self.size else y, photo)
