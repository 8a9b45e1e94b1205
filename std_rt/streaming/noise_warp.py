"""Moving noise, which follows the content and stays white unit normal noise.

Interpolated noise loses variance, so noise moves in whole cells of the latents. Motion is summed up cell by
cell, and once more than half a cell has accumulated, the noise jumps by one. No two cells read the same
noise: a cell that would be left without one takes an unread one, that of content that went out of sight.
So the noise of every frame is a permutation of the first frame's, whatever the flow says.

Noise moves only where a whole region moves together: each jump changes a few strokes, and on something as
small and fast as a hand the eye could not follow them. Panning cameras benefit: strokes move along instead of
sticking to the glass.

Why not finer: noise summed up from pixels that move on their own (arXiv 2504.03072, 2501.08331) follows
smoothly, but changes by half its standard deviation for each pixel of motion. Measured on std-tiny, that
flickers more than noise that stays in place (docs/lab-notes.md, 2026-11-21).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.core.arrays import Array
from std_rt.streaming.optical_flow import Followed, read_at, unmoved

__all__ = ["MovingNoise"]


# Cells that must have come together before the noise jumps: at a half it would jump back and forth.
_ENOUGH = 0.65
_TRUSTED = 0.5
_REGION, _TOGETHER = (
    5,
    0.06,
)  # cells: a side, and the largest standard deviation within it of what counts as one motion


class MovingNoise:
    """The noise of one stream, frame by frame."""

    def __init__(self, noise: Array) -> None:
        """``noise`` [K, C, h, w]: of the first frame."""
        self.noise = noise
        """The noise of the latest frame, [K, C, h, w]; the same array if no cell moved."""
        self._size = (noise.shape[2], noise.shape[3])
        self._owed = np.zeros((*self._size, 2), np.float32)  # x, y in cells: motion not yet followed

    def follow(self, motion: Followed) -> None:
        """Move the noise to the next frame."""
        h, w = self._size
        moved_by, trusted = _motion_of_cells(motion, self._size)
        trusted &= _together(moved_by, trusted)
        moved_by = moved_by * trusted[..., None]
        came_from = unmoved(self._size) + moved_by
        owed = read_at(self._owed, came_from, cv2.INTER_NEAREST) * trusted[..., None] + moved_by
        jump = _in_step(np.where(np.abs(owed) > _ENOUGH, np.rint(owed), 0)) * trusted[..., None]
        self._owed = np.where(trusted[..., None], np.clip(owed - jump, -1, 1), self._owed)
        wanted = unmoved(self._size) + jump
        inside = ((wanted >= 0) & (wanted <= np.array([w - 1, h - 1]))).all(-1)
        cell = np.where(inside, wanted[..., 1] * w + wanted[..., 0], -1).astype(np.int64)
        order = _one_each(cell.ravel(), (np.abs(self._owed).max(-1) + ~trusted).ravel())
        if (order != np.arange(order.size)).any():
            moved = self.noise.reshape(*self.noise.shape[:2], -1)[:, :, order]
            self.noise = np.ascontiguousarray(moved.reshape(self.noise.shape))


def _motion_of_cells(motion: Followed, size: tuple[int, int]) -> tuple[Array, NDArray[np.bool_]]:
    """Mean motion of each cell's trusted pixels, in cells [h, w, 2], and where at least half are trusted."""
    h, w = size
    height, width = motion.trust.shape
    sure = (motion.trust > _TRUSTED).astype(np.float32)
    moved_by = (motion.source - unmoved((height, width))) * sure[..., None]
    share = np.asarray(cv2.resize(sure, (w, h), interpolation=cv2.INTER_AREA), np.float32)
    mean = np.asarray(cv2.resize(moved_by, (w, h), interpolation=cv2.INTER_AREA), np.float32)
    trusted = share > _TRUSTED
    mean *= trusted[..., None] / np.maximum(share, _TRUSTED)[..., None]
    return np.asarray(mean * np.array([w / width, h / height]), np.float32), trusted


def _together(moved_by: Array, trusted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Cells that move like the trusted ones around them, [h, w]."""
    weight = trusted.astype(np.float32)
    share = np.maximum(_around(weight), 1e-6)
    mean = [_around(moved_by[..., i] * weight) / share for i in (0, 1)]
    spread = [_around(moved_by[..., i] ** 2 * weight) / share - mean[i] ** 2 for i in (0, 1)]
    return np.asarray((np.maximum(*spread) < _TOGETHER**2) & (share > _TRUSTED))


def _around(values: Array) -> Array:
    mean = cv2.blur(np.ascontiguousarray(values), (_REGION, _REGION), borderType=cv2.BORDER_REPLICATE)
    return np.asarray(mean, np.float32)


def _in_step(jumps: Array) -> Array:
    """The jump most neighbours of each cell make: a cell that lags would lose its noise."""
    return np.stack(
        [cv2.medianBlur(np.ascontiguousarray(jumps[..., i], np.float32), _REGION) for i in (0, 1)], -1
    )


def _one_each(wanted: NDArray[np.int64], miss: Array) -> NDArray[np.int64]:
    """A permutation near ``wanted`` (-1: any): of cells that want the same, the nearest gets it."""
    count = wanted.size
    askers = np.flatnonzero(wanted >= 0)
    askers = askers[np.argsort(-miss[askers], kind="stable")]
    owner = np.full(count, -1, np.int64)
    owner[wanted[askers]] = askers  # the last one written stays
    order = np.full(count, -1, np.int64)
    given = np.flatnonzero(owner >= 0)
    order[owner[given]] = given
    order[order < 0] = np.flatnonzero(owner < 0)
    return order
