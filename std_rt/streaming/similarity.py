"""The similarity filter: skips the engines for frames that hardly differ from the last processed one.

As the stochastic similarity filter of StreamDiffusion (arXiv 2312.12491, section 3.4), the probability of a
skip rises from 0 at the threshold to 1 at similarity 1. The measure differs. The cosine similarity of whole
frames is above 0.999 for a moving hand and for a still picture with sensor noise alike; so are means over the
picture, in which a hand is small. Here a frame is a grid of 32 cells along its long side, and the measure is
the mean difference of the 1 % of cells that changed most: averaging within a cell removes the noise, looking
at the most changed cells keeps the hand.
"""

from __future__ import annotations

import random

import cv2
import numpy as np

from std_rt.core.arrays import Frame
from std_rt.core.errors import UsageError

__all__ = ["SimilarityFilter", "similarity", "thumbnail"]


_CELLS = 32  # along the long side
_SAMPLES = 8  # pixels per cell side that are averaged
_MOST_CHANGED = 0.01  # share of the cells


class SimilarityFilter:
    """For one stream in one thread. The same frames and seed give the same decisions."""

    def __init__(self, threshold: float = 0.98, max_skip: int = 10, seed: int = 0) -> None:
        """``threshold`` 0..1: frames less similar are never skipped. ``max_skip``: skips in a row.

        Raises UsageError for a threshold outside 0 <= threshold < 1 or a ``max_skip`` below 1.
        """
        if not 0 <= threshold < 1:
            raise UsageError(f"the similarity threshold must be at least 0 and below 1, got {threshold:g}")
        if max_skip < 1:
            raise UsageError(f"frames to skip in a row must be 1 or more, got {max_skip}")
        self.threshold, self.max_skip = threshold, max_skip
        self._random = random.Random(seed)
        self._processed: Frame | None = None
        self._in_a_row = 0

    def skip(self, frame: Frame) -> bool:
        """Whether this frame uint8 [H, W, 3] can be shown with the last processed frame's result."""
        small = thumbnail(frame)
        alike = 0.0
        if self._processed is not None and self._processed.shape == small.shape:
            alike = similarity(self._processed, small)
        chance = (alike - self.threshold) / (1 - self.threshold)  # equation 6 of the paper
        if chance <= 0 or self._in_a_row >= self.max_skip or self._random.random() >= chance:
            self._processed, self._in_a_row = small, 0
            return False
        self._in_a_row += 1
        return True

    def force(self) -> None:
        """Process the next frame whatever it looks like, e.g. after a change of style."""
        self._processed = None


def thumbnail(frame: Frame) -> Frame:
    """Means of the cells of a frame uint8 [H, W, 3]: uint8 [h, w, 3], the longer of h and w being 32.

    Of a large frame 8 x 8 pixels per cell are sampled, so that the cost (0.1 ms) does not grow with its size.
    """
    scale = _CELLS / max(frame.shape[:2])
    h, w = (max(1, round(side * scale)) for side in frame.shape[:2])
    if h * _SAMPLES < frame.shape[0] and w * _SAMPLES < frame.shape[1]:
        frame = np.asarray(
            cv2.resize(frame, (w * _SAMPLES, h * _SAMPLES), interpolation=cv2.INTER_NEAREST), np.uint8
        )
    return np.asarray(cv2.resize(frame, (w, h), interpolation=cv2.INTER_AREA), np.uint8)


def similarity(a: Frame, b: Frame) -> float:
    """1 for equal thumbnails, 0 for black and white: 1 - mean difference of the most changed cells / 255."""
    changed = cv2.absdiff(a, b).sum(-1, dtype=np.int32).ravel()
    count = max(1, round(changed.size * _MOST_CHANGED))
    most = np.partition(changed, changed.size - count)[-count:]
    return 1 - float(most.mean()) / (3 * 255)
