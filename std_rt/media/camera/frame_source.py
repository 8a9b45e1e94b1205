"""The frame source: the one interface of cameras and of files that stand in for one."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Captured", "Frame", "Pause", "Sleep", "Source", "after"]

Frame = NDArray[np.uint8]  # [H, W, 3] RGB, C-contiguous
Sleep = Callable[[float], object]

# An event wakes up to 16 ms late on Windows; time.sleep does not.
_COARSE_S = 0.02


@dataclass(frozen=True, eq=False)
class Captured:
    """One upright frame, which the reader may keep and change.

    at_s: when it was captured, in seconds of the source's clock; always later than the frame before.
    index: how many frames ``read()`` returned before this one.
    """

    frame: Frame
    at_s: float
    index: int


class Source(Protocol):
    """Frames as they come. ``read()`` from one thread, everything else from any."""

    @property
    def name(self) -> str:
        """What messages call it: "camera 0", "clip.mp4"."""

    @property
    def fps(self) -> float | None:
        """Nominal frames per second; None where unknown."""

    @property
    def status(self) -> str:
        """Empty while frames come, else one short line."""

    @property
    def faults(self) -> dict[str, int]:
        """How often each fault occurred; only those that did."""

    def read(self) -> Captured | None:
        """Wait for the next frame; None: there are no more (closed, or a clip that does not loop ended)."""

    def close(self) -> None:
        """End ``read()`` and release the device or file; returns at once. May be called again."""


class Pause:
    """A wait that ``end()`` cuts short. An injected ``sleep`` replaces real waiting."""

    def __init__(self, sleep: Sleep | None = None) -> None:
        self._sleep = sleep
        self._ended = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether ``end()`` was called."""
        return self._ended.is_set()

    def end(self) -> None:
        """No more waiting, now or later."""
        self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Wait that long; False if ``end()`` came first."""
        if self._sleep is not None:
            self._sleep(seconds)
        elif seconds <= _COARSE_S or not self._ended.wait(seconds - _COARSE_S):
            time.sleep(min(seconds, _COARSE_S))
        return not self.is_over


def after(at_s: float, last_s: float) -> float:
    """``at_s``, or the next float after ``last_s`` where a clock stood still or a time is repeated."""
    return max(at_s, math.nextafter(last_s, math.inf))
