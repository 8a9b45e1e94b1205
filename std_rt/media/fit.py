"""Sizes: the working size a model sees, the way there and back, and turning things upright."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["Turn", "from_working", "result_size", "to_working", "working_size"]

Frame = NDArray[np.uint8]


def working_size(
    h: int, w: int, target: tuple[int, int] | int, multiple: int, min_px: int = 0, max_px: int | None = None
) -> tuple[int, int]:
    """Size (H, W) at which a picture of ``h`` x ``w`` px is processed; both divide by ``multiple``.

    Keeps the aspect, with the area of ``target`` (a side for a square, or (H, W)). A picture with less
    area than that is processed at its own size rounded up to ``multiple``. No side is below ``min_px`` or
    above ``max_px`` (rounded up and down to ``multiple``). For extreme aspects these limits and the area
    win over the aspect; :func:`result_size` gives it back.
    """
    if min(h, w, multiple) < 1:
        raise ValueError(f"sizes and multiple must be positive, got {h} x {w}, multiple {multiple}")
    area = target * target if isinstance(target, int) else target[0] * target[1]
    low = max(1, ceil(min_px / multiple)) * multiple
    high = max(low, (max_px or 1 << 30) // multiple * multiple)
    short, long = _near_aspect(min(h, w), max(h, w), area, multiple)
    short = min(max(short, low), high)
    # A short side lifted to its minimum must not blow up the area: the long side gives way.
    room = max(area // short // multiple, 1) * multiple
    long = min(max(min(long, max(room, _up(area // short, multiple))), low), high)
    return (short, long) if h <= w else (long, short)


def _near_aspect(short: int, long: int, area: int, multiple: int) -> tuple[int, int]:
    """Both sides at about ``area``, or at their own size rounded up where the picture is smaller."""
    if short * long <= area:
        return _up(short, multiple), _up(long, multiple)
    scale = sqrt(area / (short * long))
    return _nearest(short * scale, multiple), _nearest(long * scale, multiple)


def _up(side: int, multiple: int) -> int:
    return max(1, ceil(side / multiple)) * multiple


def _nearest(side: float, multiple: int) -> int:
    return max(1, int(side / multiple + 0.5)) * multiple


def result_size(input_hw: tuple[int, int], working_hw: tuple[int, int]) -> tuple[int, int]:
    """Size (h, w) of the result: the input's aspect, inside the working size, never above the input."""
    (h, w), (work_h, work_w) = input_hw, working_hw
    scale = min(1.0, work_h / h, work_w / w)
    return max(1, round(h * scale)), max(1, round(w * scale))


def to_working(frame: Frame, size: tuple[int, int]) -> Frame:
    """``frame`` (uint8 [h, w, 3] or [h, w]) resized to ``size`` = (H, W): area down, cubic up."""
    return _resize(frame, size)


def from_working(frame: Frame, size: tuple[int, int]) -> Frame:
    """A working frame brought to ``size`` = (h, w), as :func:`result_size` gives it; uint8 like the input."""
    return _resize(frame, size)


def _resize(frame: Frame, size: tuple[int, int]) -> Frame:
    h, w = size
    if frame.shape[:2] == (h, w):
        return np.ascontiguousarray(frame)
    shrinks = h * w < frame.shape[0] * frame.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    resized = cv2.resize(np.ascontiguousarray(frame), (w, h), interpolation=method)
    return np.asarray(resized, dtype=np.uint8)


@dataclass(frozen=True)
class Turn:
    """One of the eight ways a camera can lie: transpose first, then flip rows and columns."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def degrees(self) -> int:
        """Clockwise degrees of the turn (0, 90, 180, 270), mirroring aside."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows else 0

    def apply(self, array: Frame) -> Frame:
        """The array ([H, W] or [H, W, C]) turned upright, contiguous."""
        turned = array.swapaxes(0, 1) if self.transpose else array
        turned = turned[::-1] if self.flip_rows else turned
        turned = turned[:, ::-1] if self.flip_columns else turned
        return np.ascontiguousarray(turned)

    @staticmethod
    def from_exif(orientation: int) -> Turn:
        """The turn for an EXIF orientation 1..8; anything else is upright."""
        flips = {2: "c", 3: "rc", 4: "r", 5: "t", 6: "tc", 7: "trc", 8: "tr"}.get(orientation, "")
        return Turn("t" in flips, "r" in flips, "c" in flips)

    @staticmethod
    def from_matrix(a: int, b: int, c: int, d: int) -> Turn:
        """The turn of a display matrix: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
        if abs(b) + abs(c) > abs(a) + abs(d):
            return Turn(True, flip_rows=b < 0, flip_columns=c < 0)
        return Turn(False, flip_rows=d < 0, flip_columns=a < 0)
