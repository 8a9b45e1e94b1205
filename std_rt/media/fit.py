"""Frame sizes: the model's working size, resizing to it and back; and compositing over white."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import ceil, sqrt
from typing import Any

import cv2
import numpy as np

from std_rt.core.arrays import Frame
from std_rt.core.errors import UsageError

__all__ = [
    "check_frame",
    "over_white",
    "resize",
    "result_size",
    "spread",
    "upscale",
    "upscaling",
    "working_size",
]

_WINDOW = (7, 7)  # px of the small picture, over which a result is compared with the luma of its input
_NOISE = 5.0**2  # variance of luma (0..255) below which a window counts as flat

_SPREAD_PX = 2048 * 2048  # more than any bundle works at
_SPREAD_CELLS = 128  # along the longer side: colours reach about one of them beyond their edge
_SPREAD_FULL = 16  # mean alpha of a neighbourhood from which on it lends its colour in full


def working_size(
    h: int, w: int, target: tuple[int, int] | int, multiple: int, min_px: int = 0, max_px: int | None = None
) -> tuple[int, int]:
    """Size (H, W) at which a picture of ``h`` x ``w`` px is processed; both divide by ``multiple``.

    Keeps the aspect, with the area of ``target`` (a side for a square, or (H, W)). A picture with less
    area than that is processed at its own size rounded up to ``multiple``. No side is below ``min_px`` or
    above ``max_px`` (rounded up and down to ``multiple``). For extreme aspects these limits and the area
    win over the aspect; :func:`result_size` restores it.
    """
    if min(h, w, multiple) < 1:
        raise ValueError(f"sizes and multiple must be positive, got {h} x {w}, multiple {multiple}")
    area = target * target if isinstance(target, int) else target[0] * target[1]
    low = max(1, ceil(min_px / multiple)) * multiple
    high = max(low, (max_px or 1 << 30) // multiple * multiple)
    short, long = min(h, w), max(h, w)
    if short * long <= area:
        short, long = _up(short, multiple), _up(long, multiple)
    else:
        scale = sqrt(area / (short * long))
        short, long = _nearest(short * scale, multiple), _nearest(long * scale, multiple)
    short = min(max(short, low), high)
    # A short side raised to its minimum must not blow up the area: the long side gives way.
    room = max(area // short // multiple, 1) * multiple
    long = min(max(min(long, max(room, _up(area // short, multiple))), low), high)
    return (short, long) if h <= w else (long, short)


def _up(side: int, multiple: int) -> int:
    return max(1, ceil(side / multiple)) * multiple


def _nearest(side: float, multiple: int) -> int:
    return max(1, int(side / multiple + 0.5)) * multiple


def result_size(input_hw: tuple[int, int], working_hw: tuple[int, int]) -> tuple[int, int]:
    """Size (h, w) of the result: the input's aspect, within the working size, never above the input."""
    (h, w), (work_h, work_w) = input_hw, working_hw
    scale = min(1.0, work_h / h, work_w / w)
    return max(1, round(h * scale)), max(1, round(w * scale))


def check_frame(frame: Any) -> Frame:
    """``frame`` itself. Raises UsageError unless it is a uint8 array [H, W, 3] with pixels."""
    right = isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3
    if right and frame.shape[2] == 3 and frame.size:
        return np.asarray(frame, np.uint8)
    found = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
    raise UsageError(f"a frame must be a uint8 array [H, W, 3] in RGB, got {found}")


def resize(frame: Frame, size: tuple[int, int]) -> Frame:
    """``frame`` (uint8 [h, w, 3] or [h, w]) at ``size`` = (H, W), contiguous: area down, cubic up."""
    h, w = size
    frame = np.ascontiguousarray(frame)
    if frame.shape[:2] == (h, w):
        return frame
    shrinks = h * w < frame.shape[0] * frame.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(frame, (w, h), interpolation=method), dtype=np.uint8)


def upscale(styled: Frame, guide: Frame) -> Frame:
    """``styled`` (uint8 [h, w, 3]) at the size of its input ``guide`` (uint8 [H, W, 3]), along its edges.

    Lanczos, plus the detail that the guide's luma has lost at [h, w], in proportion to how far the result
    follows that luma around each pixel: the slope of a guided filter (He et al., "Guided Image Filtering",
    2013). Where the painting has left the picture's drawing, that is nothing.
    """
    h, w = styled.shape[:2]
    size = guide.shape[1], guide.shape[0]
    if (w, h) == size:
        return styled
    luma = cv2.cvtColor(guide, cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(luma, (w, h), interpolation=cv2.INTER_AREA)
    detail = luma - cv2.resize(small, size, interpolation=cv2.INTER_LANCZOS4)
    mean = cv2.blur(small, _WINDOW)
    variance = cv2.blur(small * small, _WINDOW) - mean * mean
    large = cv2.resize(styled, size, interpolation=cv2.INTER_LANCZOS4)
    for channel in range(3):
        values = styled[:, :, channel].astype(np.float32)
        slope = (cv2.blur(small * values, _WINDOW) - mean * cv2.blur(values, _WINDOW)) / (variance + _NOISE)
        gain = cv2.resize(cv2.blur(slope, _WINDOW), size, interpolation=cv2.INTER_LINEAR)
        large[:, :, channel] = np.clip(np.rint(large[:, :, channel] + gain * detail), 0, 255)
    return np.asarray(large, np.uint8)


def upscaling(
    stream: Callable[[Iterator[Frame]], Iterator[Frame]],
) -> Callable[[Iterator[Frame]], Iterator[Frame]]:
    """``stream`` (frames in, as many results out, in order), with `upscale` behind it."""

    def run(frames: Iterator[Frame]) -> Iterator[Frame]:
        inside: deque[Frame] = deque()

        def kept() -> Iterator[Frame]:
            for frame in frames:
                inside.append(frame)
                yield frame

        for styled in stream(kept()):
            yield upscale(styled, inside.popleft())

    return run


def over_white(rgb: Frame, alpha: Frame) -> Frame:
    """``rgb`` (uint8 [H, W, 3], not premultiplied) laid over white by ``alpha`` (uint8 [H, W])."""
    a = alpha[:, :, None].astype(np.uint16)
    return ((rgb * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


def spread(frame: Frame, alpha: Frame) -> Frame:
    """``frame``, laid over white by ``alpha`` (uint8 [H, W]), with colours that reach beyond their edge.

    The white in what is partly transparent gives way to the colours next to it, and so does the white near
    it: a cut-out stylized with this and given its alpha again has no white rim. Far from all colours it
    stays white. More than 4 megapixels are scaled down to that, for the sake of time.
    """
    h, w = alpha.shape
    if h * w > _SPREAD_PX:
        h, w = (max(1, int(side * sqrt(_SPREAD_PX / (h * w)))) for side in (h, w))
        frame, alpha = resize(frame, (h, w)), resize(alpha, (h, w))
    visible = np.dstack([frame.astype(np.float32) + alpha[:, :, None] - 255, alpha])  # premultiplied
    scale = min(1.0, _SPREAD_CELLS / max(h, w))
    cells = (max(1, round(w * scale)), max(1, round(h * scale)))
    near = cv2.blur(cv2.resize(visible, cells, interpolation=cv2.INTER_AREA), (3, 3))
    near = cv2.resize(near, (w, h), interpolation=cv2.INTER_LINEAR)
    share = near[:, :, 3:]
    fading = np.minimum(1, share / _SPREAD_FULL)
    behind = near[:, :, :3] / np.maximum(share, 1e-3) * 255 * fading + 255 * (1 - fading)
    filled = visible[:, :, :3] + (1 - visible[:, :, 3:] / 255) * behind
    return np.asarray(np.clip(np.rint(filled), 0, 255), dtype=np.uint8)
