"""What a stream carries from frame to frame: a seed, a count and its noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["State", "draw_noise"]

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class State:
    """What a stream carries from frame to frame.

    ``noise`` [K, C, h, w]: the start noise, then one for every stochastic step; more than a frame needs does
    no harm. ``index``: frames done.
    """

    seed: int
    index: int
    noise: Array


def draw_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """Unit normal noise float32, the same for a seed on every machine and backend.

    Of a longer draw the first rows are those of a shorter one.
    """
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
