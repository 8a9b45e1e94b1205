"""Optical flow with trust: where each pixel was in the previous frame, with a confidence.

Two dense inverse searches (DIS, Kroeger et al. 2016), a fine one backwards and a coarse one forwards, on
frames that are reduced if they are large. A pixel is trusted if

* both directions agree (Sundaram et al. 2010), or it may just as well not have moved, and
* the warped picture looks like the new frame. Not the previous frame is warped but a history of the
  content, mixed with the same weights as the styled frames: where it has a ghost, so does the styled history,
  and neither is trusted any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.core.arrays import Array, Frame, Size

__all__ = ["SMALLEST_PX", "Followed", "Follower", "enlarged", "read_at", "reduced", "unmoved"]


# 256 px of any aspect is followed at its own size, 512 px at half. Noise moves by cells and needs less.
_MOST_PX, _MOST_PX_COARSE = 120_000, 30_000
SMALLEST_PX = 12  # a side below it is too short for the search

_SAME_SIDE = 5  # px: what "looks the same" is averaged over

# Measured on the clips of docs/lab-notes.md (2026-11-21): twice as strict costs a tenth of the steadiness.
_LEVELS = 25.0  # difference (of 255) at which half of the trust is gone
_OFF_PX2 = 1.5  # squared distance by which the two directions may miss each other
_OFF_SHARE = 0.02  # and of the squared length of the motion
_STAYED_LEVELS = 0.5  # staying is believed even if it looks this much worse than moving
_STAYED_PX = 1.5  # a longer motion on which both directions agree is believed

_ERODED = np.ones((3, 3), np.uint8)  # trust ends one pixel before untrusted ones

# The rule of `evaluation.measures` for a cut: little can be followed, or what is followed looks different.
_FEWEST_FOLLOWED = 0.15
_CUT_LEVELS = 25.5


@dataclass(frozen=True, eq=False)
class Followed:
    """``source`` [H, W, 2]: x, y of each pixel in the frame before; ``trust`` [H, W] in 0..1; float32."""

    source: Array
    trust: Array


class Follower:
    """Follows the frames of one stream, in order."""

    def __init__(self, *, fine: bool, weight: float) -> None:
        """``fine``: to about a tenth of a pixel, at four times the cost, as blending pixels needs.

        ``weight`` 0..1: the share of a trusted history in the next picture.
        """
        self._back = _fine()
        self._forth = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._most_px = _MOST_PX if fine else _MOST_PX_COARSE
        self._weight = np.float32(weight)
        self._grey: Frame | None = None
        self._history: Array = np.empty(0, np.float32)

    def reset(self) -> None:
        """Forget the frames."""
        self._grey = None

    def follow(self, frame: Frame) -> Followed | None:
        """The motion from the last frame to ``frame``; None for the first frame and after a cut.

        The size must not change until `reset`; sides are at least `SMALLEST_PX`.
        """
        small = reduced(frame, self._most_px)
        before, grey = self._grey, np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)
        self._grey = grey
        found = None if before is None else self._search(before, grey, small)
        if found is None:
            self._history = small.astype(np.float32)
            return None
        source, trust = found
        return enlarged(source, trust, (frame.shape[0], frame.shape[1]))

    def _search(self, before: Frame, grey: Frame, small: Frame) -> tuple[Array, Array] | None:
        """(source, trust) at the reduced size, and the history warped to this frame; None for a cut."""
        back = np.asarray(self._back.calc(grey, before, None), np.float32)  # type: ignore[call-overload]
        forth = np.asarray(self._forth.calc(before, grey, None), np.float32)  # type: ignore[call-overload]
        source = unmoved(grey.shape) + back
        agreed = _agreement(back, read_at(forth, source))
        new = small.astype(np.float32)
        carried = read_at(self._history, source)
        moved_off, stayed_off = _unlike(carried, new), _unlike(self._history, new)
        short = cv2.magnitude(*cv2.split(back)) < _STAYED_PX
        stayed = (stayed_off <= moved_off + _STAYED_LEVELS) & (short | (agreed < 0.5))
        mask = stayed.view(np.uint8)
        for kept, into in ((unmoved(grey.shape), source), (self._history, carried), (stayed_off, moved_off)):
            cv2.copyTo(kept, mask, into)
        agreed[stayed] = 1
        if _is_cut(agreed, moved_off):
            return None
        alike = np.clip(1.5 - moved_off / _LEVELS, 0, 1)
        trust = np.asarray(cv2.erode(agreed * _inside(source) * alike, _ERODED), np.float32)
        self._history = new + (self._weight * trust)[..., None] * (carried - new)
        return source, trust


def reduced(frame: Frame, most_px: int = _MOST_PX) -> Frame:
    """``frame`` at 1/2, 1/3 ... of its size if it has more than ``most_px`` pixels."""
    h, w = frame.shape[:2]
    parts = 1
    while (h // parts) * (w // parts) > most_px and min(h, w) // (parts + 1) >= SMALLEST_PX:
        parts += 1
    if parts == 1:
        return frame
    return np.asarray(cv2.resize(frame, (w // parts, h // parts), interpolation=cv2.INTER_AREA), np.uint8)


def enlarged(source: Array, trust: Array, size: Size) -> Followed:
    """Flow found at a reduced size, scaled to frames of ``size``."""
    h, w = source.shape[:2]
    if (h, w) == size:
        return Followed(source, trust)
    motion = source - unmoved((h, w))
    motion *= np.array([size[1] / w, size[0] / h], np.float32)
    full = (size[1], size[0])
    larger = np.asarray(cv2.resize(motion, full, interpolation=cv2.INTER_LINEAR), np.float32)
    wide = np.asarray(cv2.resize(trust, full, interpolation=cv2.INTER_LINEAR), np.float32)
    return Followed(larger + unmoved(size), wide)


@lru_cache(maxsize=8)  # grids of the sizes in use
def unmoved(size: Size) -> Array:
    """The source of a frame in which nothing moved: x and y of each pixel, [H, W, 2]. Read-only."""
    h, w = size
    grid = np.ascontiguousarray(np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1), np.float32)
    grid.flags.writeable = False
    return grid


def read_at(picture: Array, source: Array, interpolation: int = cv2.INTER_LINEAR) -> Array:
    """``picture`` [H, W, C] float32 at the places ``source`` [H, W, 2]; beyond the edge, the edge."""
    read = cv2.remap(picture, source, None, interpolation, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
    return np.asarray(read, np.float32)


def _fine() -> cv2.DISOpticalFlow:
    """Half the frame's resolution; with fewer rounds than the preset has, at two thirds of its time."""
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    search.setFinestScale(1)
    search.setGradientDescentIterations(8)
    search.setVariationalRefinementIterations(3)
    search.setPatchStride(5)
    return search


def _agreement(back: Array, forth: Array) -> Array:
    """1 where backward and forward flow cancel, 0 where they do not; [H, W]."""
    off_x, off_y = cv2.split(back + forth)
    x, y = cv2.split(back)
    off = off_x * off_x + off_y * off_y
    allowed = _OFF_PX2 + _OFF_SHARE * (x * x + y * y)
    return np.asarray(np.clip(1.5 - off / allowed, 0, 1), np.float32)


def _unlike(a: Array, b: Array) -> Array:
    """The channel that differs most, in levels, averaged over a few pixels around each: [H, W]."""
    red, green, blue = cv2.split(cv2.absdiff(a, b))
    most = cv2.max(cv2.max(red, green), blue)
    return np.asarray(cv2.boxFilter(most, -1, (_SAME_SIDE, _SAME_SIDE)), np.float32)


def _inside(source: Array) -> NDArray[np.bool_]:
    h, w = source.shape[:2]
    x, y = cv2.split(source)
    return np.asarray((x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1))


def _is_cut(agreed: Array, unlike: Array) -> bool:
    followed = agreed >= 0.5
    return bool(followed.mean() < _FEWEST_FOLLOWED) or float(unlike[followed].mean()) > _CUT_LEVELS
