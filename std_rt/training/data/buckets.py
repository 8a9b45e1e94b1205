"""Sizes by aspect ratio, and how a picture is brought to one: resize to cover, crop, maybe mirror.

As in SDXL's training (arXiv 2307.01952, section 2.2 and appendix I): all sizes have about the same area,
and the UNet is conditioned on the picture's own size, the crop's place in the resized picture and the crop's
size. All sizes here are (height, width) in px.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import cv2
import numpy as np

from std_rt.core.arrays import Size
from std_rt.core.errors import RecipeError
from std_rt.training.data.picture_set import Frame

__all__ = ["Placement", "bucket_sizes", "nearest_bucket", "place"]

MAX_ASPECT = 2
MIN_AREA = 0.85  # of the square's


def bucket_sizes(resolution_px: int, multiple: int, by_aspect: bool = True) -> list[Size]:
    """Sizes of at most ``resolution_px ** 2`` px area whose sides divide by ``multiple``, tallest last.

    From 2:1 to 1:2; only the square without ``by_aspect``. Raises RecipeError if the square itself
    does not divide.
    """
    if resolution_px < multiple or resolution_px % multiple:
        nearest = max(1, round(resolution_px / multiple)) * multiple
        raise RecipeError(
            f"pictures.resolution_px = {resolution_px} is not a multiple of {multiple}, as this base "
            f"needs; set it to {nearest}"
        )
    square = (resolution_px, resolution_px)
    if not by_aspect:
        return [square]
    step, area = _step(resolution_px, multiple), resolution_px**2
    wide = [(h, min(area // h // step * step, MAX_ASPECT * h)) for h in range(step, resolution_px, step)]
    wide = [(h, w) for h, w in wide if h * w >= MIN_AREA * area]
    return [*wide, square, *((w, h) for h, w in reversed(wide))]


def _step(resolution_px: int, multiple: int) -> int:
    """Difference between sides, px: SDXL's 64 at 1024, in proportion at others, and a divisor of the side.

    Without it small multiples would make dozens of sizes with a handful of pictures each.
    """
    units = resolution_px // multiple
    fitting = [d for d in range(1, units + 1) if units % d == 0 and 16 * d * multiple <= resolution_px]
    return multiple * max(fitting, default=1)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of ``size``, on a log scale; the first of equals."""
    aspect = log(size[0] / size[1])
    return min(buckets, key=lambda b: abs(log(b[0] / b[1]) - aspect))


@dataclass(frozen=True)
class Placement:
    """How one picture becomes one bucket: resized, mirrored or not, then cropped."""

    original: Size  # of the picture
    resized: Size  # covers the bucket
    top: int  # where the crop starts in the resized (and mirrored) picture, px
    left: int
    bucket: Size
    flip: bool = False

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's sizes: original height and width, crop top and left, target height and width."""
        return (*self.original, self.top, self.left, *self.bucket)

    def apply(self, frame: Frame) -> Frame:
        """``frame`` (uint8 ``[H, W, 3]`` of the original size) -> uint8 ``[bucket height, width, 3]``."""
        h, w = self.resized
        if frame.shape[:2] != (h, w):
            shrinks = h * w < frame.shape[0] * frame.shape[1]
            frame = cv2.resize(frame, (w, h), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        if self.flip:
            frame = frame[:, ::-1]
        crop = frame[self.top : self.top + self.bucket[0], self.left : self.left + self.bucket[1]]
        return np.ascontiguousarray(crop)


def _covering(size: Size, bucket: Size) -> Size:
    """The smallest size of about the same aspect that covers the bucket; one side is the bucket's."""
    (h, w), (bucket_h, bucket_w) = size, bucket
    if h * bucket_w > bucket_h * w:
        return max(bucket_h, round(h * bucket_w / w)), bucket_w
    return bucket_h, max(bucket_w, round(w * bucket_h / h))


def place(size: Size, bucket: Size, rng: np.random.Generator | None = None, flip: bool = False) -> Placement:
    """Where a picture of ``size`` is cropped for ``bucket``: anywhere by ``rng``, centred without one.

    The window is drawn in the picture as it is; mirrored, it shows the same part, so that ``left`` is
    counted from the other side.
    """
    resized = _covering(size, bucket)
    room = resized[0] - bucket[0], resized[1] - bucket[1]
    if rng is None:
        top, left = room[0] // 2, room[1] // 2
    else:
        top, left = int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1))
    return Placement(size, resized, top, room[1] - left if flip else left, bucket, flip)
