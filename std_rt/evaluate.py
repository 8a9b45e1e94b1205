"""How good is the picture? Weight-free measures, two baselines, and a sheet to look at.

For each (content, style) pair: the bundle's output beside Reinhard colour transfer and OpenCV's
``stylization`` filter, with three numbers.

* colour: sliced Wasserstein distance of the output's colours to the style's (0 = same palette)
* texture: the same of 5x5 patches less their local mean, at three scales (0 = same strokes and grain)
* structure: correlation of blurred gradient strength with the content (1 = same drawing)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.conditioning import square
from std_rt.errors import UsageError
from std_rt.media.image import read_picture, write_picture
from std_rt.media.sources import expand_inputs
from std_rt.stylizer import Stylizer

Frame = NDArray[np.uint8]
Array = NDArray[Any]


@dataclass(frozen=True)
class Score:
    """The three numbers of the module docstring."""

    colour: float
    texture: float
    structure: float


def sliced_wasserstein(x: Array, y: Array, directions: int = 64, points: int = 512) -> float:
    """Root mean squared distance of the sorted projections of two sets ``[N, D]`` and ``[M, D]``."""
    rng = np.random.default_rng(0)
    d = rng.standard_normal((x.shape[1], directions))
    d /= np.linalg.norm(d, axis=0)
    at = np.linspace(0, 1, points)
    a, b = (np.quantile(v @ d, at, axis=0) for v in (x, y))
    return float(np.sqrt(np.mean((a - b) ** 2)))


def _patches(frame: Frame, side: int = 5) -> Array:
    """All ``side`` x ``side`` patches less their mean colour, ``[N, side * side * 3]``, every third pixel."""
    x = frame.astype(np.float32) / 255
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(0, 1))[::3, ::3]
    flat = windows.transpose(0, 1, 3, 4, 2).reshape(-1, side * side, 3)
    return np.asarray((flat - flat.mean(1, keepdims=True)).reshape(len(flat), -1), np.float32)


def texture_distance(frame: Frame, style: Frame) -> float:
    """Mean over full, half and quarter size of the patches' sliced Wasserstein distance."""
    total = 0.0
    for _ in range(3):
        total += sliced_wasserstein(_patches(frame), _patches(style))
        frame, style = (_half(f) for f in (frame, style))
    return total / 3


def _half(frame: Frame) -> Frame:
    size = (frame.shape[1] // 2, frame.shape[0] // 2)
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)


def _gradient(frame: Frame) -> Array:
    grey = cv2.GaussianBlur(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 2)
    strength = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return np.asarray(cv2.GaussianBlur(strength, (0, 0), 2), np.float32)


def structure_agreement(frame: Frame, content: Frame) -> float:
    """Correlation of blurred gradient strength; frames of one size."""
    return float(np.corrcoef(_gradient(frame).ravel(), _gradient(content).ravel())[0, 1])


def score(frame: Frame, content: Frame, style: Frame) -> Score:
    """All three measures of one output."""
    ours, theirs = (f[::2, ::2].reshape(-1, 3).astype(np.float32) / 255 for f in (frame, style))
    return Score(
        sliced_wasserstein(ours, theirs), texture_distance(frame, style), structure_agreement(frame, content)
    )


def reinhard(content: Frame, style: Frame) -> Frame:
    """Mean and standard deviation per Lab channel (Reinhard et al. 2001)."""
    a, b = (cv2.cvtColor(f, cv2.COLOR_RGB2LAB).astype(np.float32) for f in (content, style))
    moved = (a - a.mean((0, 1))) / (a.std((0, 1)) + 1e-3) * b.std((0, 1)) + b.mean((0, 1))
    lab = np.clip(moved, 0, 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)


def _stylization(content: Frame) -> Frame:
    return np.asarray(cv2.stylization(content), np.uint8)


def draw_pairs(contents: Path, styles: Path, count: int, side_px: int) -> list[tuple[Frame, Frame]]:
    """``count`` pairs spread evenly over two folders, as centred squares."""
    a, b = expand_inputs([contents]), expand_inputs([styles])
    if count < 1:
        raise UsageError(f"--pairs must be at least 1, got {count}")
    # 7 is prime to most folder sizes, so that styles come round in another order than contents.
    chosen = [(a[i * len(a) // count], b[(7 * i + 1) % len(b)]) for i in range(count)]
    return [tuple(square(read_picture(p).frame, side_px) for p in pair) for pair in chosen]  # type: ignore[misc]


def _row(frames: list[Frame], gap_px: int = 4) -> Frame:
    return np.concatenate(
        [np.pad(f, ((0, gap_px), (0, gap_px), (0, 0)), constant_values=255) for f in frames], 1
    )


def evaluate(
    stylizer: Stylizer, pairs: list[tuple[Frame, Frame]], sheet: Path, columns: int = 2
) -> dict[str, dict[str, float]]:
    """Run all pairs, write the sheet (content, style, ours, Reinhard, cv2), return mean scores by method."""
    scores: dict[str, list[Score]] = {"std-rt": [], "reinhard": [], "cv2.stylization": []}
    rows = []
    for content, style in pairs:
        stylizer.set_style(style)
        ours = stylizer.stylize(content)
        if ours.shape != content.shape:  # the working size is a multiple, and never larger than asked
            size = (content.shape[1], content.shape[0])
            ours = np.asarray(cv2.resize(ours, size, interpolation=cv2.INTER_CUBIC), np.uint8)
        outputs = [ours, reinhard(content, style), _stylization(content)]
        for name, output in zip(scores, outputs, strict=True):
            scores[name].append(score(output, content, style))
        rows.append(_row([content, style, *outputs]))
    rows += [np.full_like(rows[0], 255)] * (-len(rows) % columns)
    grid = [np.concatenate(rows[i : i + columns], 1) for i in range(0, len(rows), columns)]
    write_picture(sheet, np.concatenate(grid, 0))
    return {
        name: {key: float(np.mean([asdict(s)[key] for s in each])) for key in asdict(each[0])}
        for name, each in scores.items()
    }
