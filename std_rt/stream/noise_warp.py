"""Noise that follows what moves, and stays unit normal and white.

Interpolated noise loses its variance, so noise is moved in whole cells of the latents: each cell reads the
cell its content came from, and how far that misses (up to half a cell and more) is carried along and
counted from there. No two cells read the same one; those left without take the noise that nobody reads,
nearest rows first. So every frame's noise is the first one in another order: as white, and no value is ever
lost or made up, whatever the flow says.

Why not finer: noise summed up from pixels, each moved on its own (as in arXiv 2504.03072 and 2501.08331),
follows smoothly, and changes by half its standard deviation for each pixel of motion. Measured on std-tiny
that flickers more than noise that stays in place (docs/lab-notes.md, 2026-11-21).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.stream.flow import Followed, unmoved

__all__ = ["MovingNoise"]

Array = NDArray[np.float32]

_MOST_OFF = 1.0  # cells by which noise may miss its content before it is let go
_TRUSTED = 0.5


class MovingNoise:
    """The noise of one stream, frame by frame."""

    def __init__(self, noise: Array) -> None:
        """``noise`` [K, C, h, w]: of the first frame."""
        self.noise = noise
        """That of the latest frame, [K, C, h, w]; the same array where no cell moved."""
        self._size = (noise.shape[2], noise.shape[3])
        self._off = np.zeros((*self._size, 2), np.float32)  # x, y in cells: where the noise is, less its cell

    def follow(self, motion: Followed) -> None:
        """Go on to the next frame."""
        way, trusted = _way_of_cells(motion, self._size)
        source = unmoved(self._size) + way
        came_from, off = self._nearest(source, trusted)
        miss = np.abs(off).max(-1).ravel() + ~trusted.ravel()  # whoever is sure goes first
        order = _one_each(came_from, miss)
        self._off = np.where((order == came_from).reshape(*self._size, 1), off, np.float32(0))
        if (order != np.arange(order.size)).any():
            moved = self.noise.reshape(*self.noise.shape[:2], -1)[:, :, order]
            self.noise = np.ascontiguousarray(moved.reshape(self.noise.shape))

    def _nearest(self, source: Array, trusted: NDArray[np.bool_]) -> tuple[NDArray[np.int64], Array]:
        """(cell whose noise lies nearest to each source, or -1; [h w]), (by how much it misses [h, w, 2])."""
        h, w = self._size
        last = np.array([w - 1, h - 1], np.float32)
        at = _cells(np.clip(np.rint(source), 0, last))
        near = np.rint(source - self._off[at[..., 1], at[..., 0]] * trusted[..., None])
        inside = ((near >= 0) & (near <= last)).all(-1)
        cell = _cells(np.clip(near, 0, last))
        off = near + self._off[cell[..., 1], cell[..., 0]] - source
        kept = inside & (np.abs(off).max(-1) <= _MOST_OFF)
        return np.where(kept, cell[..., 1] * w + cell[..., 0], -1).ravel(), off


def _way_of_cells(motion: Followed, size: tuple[int, int]) -> tuple[Array, NDArray[np.bool_]]:
    """Mean way of each cell's trusted pixels, in cells [h, w, 2]; (0, 0) where fewer than half are trusted."""
    h, w = size
    height, width = motion.trust.shape
    sure = (motion.trust > _TRUSTED).astype(np.float32)
    way = (motion.source - unmoved((height, width))) * sure[..., None]
    share = np.asarray(cv2.resize(sure, (w, h), interpolation=cv2.INTER_AREA), np.float32)
    mean = np.asarray(cv2.resize(way, (w, h), interpolation=cv2.INTER_AREA), np.float32)
    trusted = share > _TRUSTED
    mean *= trusted[..., None] / np.maximum(share, _TRUSTED)[..., None]
    return mean * np.array([w / width, h / height], np.float32), trusted


def _cells(at: Array) -> NDArray[np.int64]:
    return at.astype(np.int64)


def _one_each(wanted: NDArray[np.int64], miss: Array) -> NDArray[np.int64]:
    """A permutation near ``wanted`` (-1: anything): where several want one cell, who misses least gets it."""
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
