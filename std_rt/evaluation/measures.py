"""Network-free metrics: palette, texture, structure and temporal stability.

For one output, compared with its content and style (frames uint8 [H, W, 3] in RGB):

* colour: sliced Wasserstein distance of the output's colours to the style's, 0..1 (0 = same palette)
* texture: the same of 5x5 patches less their local mean, at three scales (0 = same strokes and grain)
* structure: correlation of blurred gradient strength with the content, -1..1 (1 = same drawing)
* ssim: structural similarity of the grey picture to the content's, -1..1 (1 = same picture)
* lattice: pattern with the period of the decoder in fine detail, 0.. (pictures of 256 px have 0.04 to 0.3)

With a mask (bool [H, W], True = judged) each looks only at the output's pixels inside.
For clips, `WarpingError` follows the content's optical flow from frame to frame. A blurred or pale output
hardly flickers, so `sharpness` (gradient strength relative to the content) is reported beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Flow",
    "Frame",
    "Mask",
    "Score",
    "WarpingError",
    "lattice",
    "means",
    "reinhard",
    "score",
    "sharpness",
    "sliced_wasserstein",
    "ssim",
    "structure_agreement",
    "texture_distance",
    "warp",
]

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Array = NDArray[Any]

_PATCH_PX = 5
_PATCH_STRIDE = 3
# At a scene cut little can be followed (0.01 to 0.05 of the pixels, against 0.8 and more within a scene), or
# what seems to be followed looks different (0.15 and more, against 0.02); cuts say nothing about flicker.
_FEWEST_FOLLOWED = 0.15
_CUT_ERROR = 0.1


@dataclass(frozen=True)
class Score:
    """The numbers of the module docstring."""

    colour: float
    texture: float
    structure: float
    ssim: float
    lattice: float


def score(frame: Frame, content: Frame, style: Frame, mask: Mask | None = None) -> Score:
    """All of one output; ``content`` [H, W, 3] and ``mask`` [H, W] have its size, ``style`` any."""
    return Score(
        _colour_distance(frame, style, mask),
        texture_distance(frame, style, mask),
        structure_agreement(frame, content, mask),
        ssim(frame, content, mask),
        lattice(frame, mask),
    )


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number over rows of the same names."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def sliced_wasserstein(x: Array, y: Array, directions: int = 64, points: int = 512) -> float:
    """Root mean squared distance of the sorted projections of two sets ``[N, D]`` and ``[M, D]``."""
    d = np.random.default_rng(0).standard_normal((x.shape[1], directions))
    d /= np.linalg.norm(d, axis=0)
    a, b = (_quantiles(v @ d.astype(np.float32), points) for v in (x, y))
    return float(np.sqrt(np.mean((a - b) ** 2)))


def _quantiles(values: Array, points: int) -> Array:
    """``points`` quantiles of each column of ``[N, K]``, evenly from least to largest: ``[K, points]``."""
    ranked = np.sort(np.ascontiguousarray(values.T), axis=1)
    at = np.linspace(0, ranked.shape[1] - 1, points)
    low = np.minimum(at.astype(np.int64), max(0, ranked.shape[1] - 2))
    share = (at - low).astype(np.float32)
    high = np.minimum(low + 1, ranked.shape[1] - 1)
    return np.asarray(ranked[:, low] * (1 - share) + ranked[:, high] * share)


def _colour_distance(frame: Frame, style: Frame, mask: Mask | None) -> float:
    x, y = (f[::2, ::2].reshape(-1, 3).astype(np.float32) / 255 for f in (frame, style))
    return sliced_wasserstein(x if mask is None else _inside(x, mask[::2, ::2]), y)


def _inside(rows: Array, mask: Mask) -> Array:
    """The rows of a raster-ordered ``[H W, D]`` that the mask holds; all if it is too thin to contain any."""
    kept = rows[mask.ravel()]
    return kept if len(kept) else rows


def _patches(frame: Frame, mask: Mask | None = None) -> Array:
    """Patches of 5x5 less their mean colour, ``[N, 75]``, every third pixel; those wholly inside the mask."""
    x = frame.astype(np.float32) / 255
    side, stride = _PATCH_PX, _PATCH_STRIDE
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(0, 1))[::stride, ::stride]
    flat = windows.transpose(0, 1, 3, 4, 2).reshape(-1, side * side, 3)
    rows = np.asarray((flat - flat.mean(1, keepdims=True)).reshape(len(flat), -1), np.float32)
    if mask is None:
        return rows
    edge = side // 2
    mask = cv2.erode(mask.astype(np.uint8), np.ones((side, side), np.uint8)) > 0
    return _inside(rows, mask[edge : len(mask) - edge : stride, edge : mask.shape[1] - edge : stride])


def texture_distance(frame: Frame, style: Frame, mask: Mask | None = None) -> float:
    """Sliced Wasserstein distance of the patches, 0 and up: the mean over full, half and quarter size."""
    total = 0.0
    for _ in range(3):
        total += sliced_wasserstein(_patches(frame, mask), _patches(style))
        frame, style = _half(frame), _half(style)
        mask = None if mask is None else _half(mask.astype(np.uint8) * 255) == 255
    return total / 3


def _half(frame: Frame) -> Frame:
    size = (frame.shape[1] // 2, frame.shape[0] // 2)
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)


def _grey(frame: Frame) -> Array:
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.float32)


def _gradient(frame: Frame) -> Array:
    grey = cv2.GaussianBlur(_grey(frame), (0, 0), 2)
    strength = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return np.asarray(cv2.GaussianBlur(strength, (0, 0), 2), np.float32)


def structure_agreement(frame: Frame, content: Frame, mask: Mask | None = None) -> float:
    """Correlation of blurred gradient strength, -1..1; 0 if one of the two is flat."""
    a, b = (_gradient(f) for f in (frame, content))
    if mask is not None and mask.any():
        a, b = a[mask], b[mask]
    if min(a.std(), b.std()) < 1e-6:  # no gradient to correlate with
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def sharpness(outputs: Sequence[Frame], contents: Sequence[Frame], mask: Mask | None = None) -> float:
    """Strength of the outputs' gradients relative to their contents': 1 = as sharp, 0 = flat; strokes add.

    Root of the mean squared Sobel gradient of the grey pictures (Tenengrad: Krotkov 1988), over all pixels
    of all frames. Like a difference between frames, it is in proportion to contrast and falls with blur. A
    flat content counts as having one grey level of gradient.
    """
    ours, theirs = (
        float(np.mean([_gradient_energy(frame, mask) for frame in frames])) for frames in (outputs, contents)
    )
    return float(np.sqrt(ours / max(theirs, 1.0)))


def _gradient_energy(frame: Frame, mask: Mask | None) -> float:
    """Mean squared gradient, in grey levels per pixel."""
    grey = _grey(frame)
    x, y = (cv2.Sobel(grey, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1)))
    energy = np.square(x) + np.square(y)
    return float((energy if mask is None or not mask.any() else energy[mask]).mean())


def lattice(frame: Frame, mask: Mask | None = None, period: int = 8) -> float:
    """Strength of a pattern that repeats every ``period`` px, relative to the fine detail it is part of.

    Fine detail is what a blur of 9 px takes away. Two things are added: the mean absolute value of its mean
    over all periods, and the mean deviation of its size between places in a period. Decoders that upsample
    by ``period`` leave such patterns on flat ground. The loss is `std_rt.models.perceptual.lattice`.
    """
    image = frame.astype(np.float32) / 255
    fine = image - cv2.blur(image, (9, 9), borderType=cv2.BORDER_REFLECT_101)
    rows, columns = (side // period * period for side in frame.shape[:2])
    kept = np.ones(frame.shape[:2], bool) if mask is None or not mask.any() else mask

    def per_place(values: Array) -> Array:
        cells = values[:rows, :columns].reshape(rows // period, period, columns // period, period, -1)
        return np.asarray(cells.sum((0, 2), dtype=np.float64))

    count = per_place(kept[..., None]).clip(1)
    fine = fine * kept[..., None]
    signed, size = per_place(fine) / count, per_place(np.abs(fine)) / count
    spread = np.abs(size - size.mean((0, 1))).mean()
    return float((np.abs(signed).mean() + spread) / max(size.mean(), 1e-4))


def ssim(frame: Frame, content: Frame, mask: Mask | None = None) -> float:
    """Structural similarity of the grey pictures, -1..1 (Wang et al. 2004: 11x11 Gaussian window, sigma 1.5).

    As in the paper, only windows wholly inside the picture count; sides must be at least 11 px.
    """
    if min(frame.shape[:2]) < 11:
        raise ValueError(f"SSIM needs sides of at least 11 px, got {frame.shape[1]} x {frame.shape[0]}")
    x, y = _grey(frame).astype(np.float64), _grey(content).astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    var_x, var_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    shared = _window(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * shared + c2)
    local = similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    if mask is not None and mask[5:-5, 5:-5].any():
        local = local[mask[5:-5, 5:-5]]
    return float(local.mean())


def _window(x: Array) -> Array:
    """Gaussian mean around each pixel; ``[H - 10, W - 10]``."""
    return np.asarray(cv2.GaussianBlur(x, (11, 11), 1.5)[5:-5, 5:-5])


def reinhard(content: Frame, style: Frame) -> Frame:
    """A baseline: ``content`` with the style's mean and deviation per Lab channel (Reinhard et al. 2001)."""
    a, b = (cv2.cvtColor(f, cv2.COLOR_RGB2LAB).astype(np.float32) for f in (content, style))
    moved = (a - a.mean((0, 1))) / (a.std((0, 1)) + 1e-3) * b.std((0, 1)) + b.mean((0, 1))
    lab = np.clip(moved, 0, 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)


@dataclass(frozen=True, eq=False)
class Flow:
    """Where each pixel of a frame was in the one before.

    ``source`` [H, W, 2] float32: x, y in the earlier frame; ``followed`` [H, W]: the two directions agree.
    """

    source: Array
    followed: Mask

    @classmethod
    def between(cls, before: Frame, after: Frame) -> Flow:
        """Dense inverse search (Kroeger et al. 2016) in both directions; frames of one size."""
        dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        a, b = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (before, after))
        h, w = a.shape
        back, forth = (dis.calc(*pair, np.zeros((h, w, 2), np.float32)) for pair in ((b, a), (a, b)))
        source = back + np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32)
        inside = ((source >= 0) & (source <= np.array([w - 1, h - 1]))).all(-1)
        return cls(source, inside & _agree(back, warp(forth, source)))

    def difference(self, before: Frame, after: Frame) -> float:
        """Mean absolute difference, 0..1, of ``after`` from ``before`` carried along, where it is followed.

        The frames are those the flow was found on, or stylized ones of their size. nan if nothing is
        followed.
        """
        if not self.followed.any():
            return float("nan")
        return float(np.abs(warp(before, self.source) - after)[self.followed].mean() / 255)

    def is_cut(self, before: Frame, after: Frame) -> bool:
        """A new scene begins between the two frames that the flow was found on."""
        return bool(self.followed.mean() < _FEWEST_FOLLOWED) or self.difference(before, after) > _CUT_ERROR


def _agree(back: Array, forth: Array) -> Mask:
    """Forward and backward flow cancel (the occlusion test of Sundaram et al. 2010)."""
    off = np.square(back + forth).sum(-1)
    length = np.square(back).sum(-1) + np.square(forth).sum(-1)
    return np.asarray(off < 0.01 * length + 0.5)


def warp(before: Array, source: Array) -> Array:
    """``before`` [H, W, C] read at ``source`` [H, W, 2] (x, y), bilinear, as float32."""
    x, y = (np.ascontiguousarray(source[..., i]) for i in (0, 1))
    pixels = before.astype(np.float32)
    return np.asarray(cv2.remap(pixels, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


class WarpingError:
    """Flicker over a clip: the part of an output that does not move with its content.

    Mean absolute difference (0..1) between an output and the one before it, carried along the flow of the
    *content*, where that flow holds in both directions. The content's own value is the floor: its noise and
    the flow's errors, below which no output can be expected to come.
    """

    def __init__(self, contents: Sequence[Frame]) -> None:
        """``contents``: neighbouring frames of one size. Pairs across a cut are left out."""
        self._contents = contents
        neighbours = pairwise(contents)
        flows = [(i, Flow.between(*pair)) for i, pair in enumerate(neighbours, 1)]
        self._flows = [(i, flow) for i, flow in flows if not flow.is_cut(contents[i - 1], contents[i])]
        self.pairs = len(self._flows)
        self.floor = self.of(contents)

    def of(self, outputs: Sequence[Frame]) -> float | None:
        """Mean over the pairs; ``outputs`` are those of the contents. None if no pair is followed."""
        off = [flow.difference(outputs[i - 1], outputs[i]) for i, flow in self._flows]
        return float(np.mean(off)) if off else None

    def judge(self, outputs: Sequence[Frame]) -> dict[str, float]:
        """`of` as ``warping``, with `sharpness` beside it; {} if no pair is followed."""
        error = self.of(outputs)
        return {} if error is None else {"warping": error, "sharpness": sharpness(outputs, self._contents)}
