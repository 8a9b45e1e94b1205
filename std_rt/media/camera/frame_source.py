"""The frame source: the interface that cameras, and files played as cameras, implement for a live session."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from std_rt.core.arrays import Frame

__all__ = ["Captured", "Pause", "Sleep", "Source", "after"]

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
    """Frames as they come. ``read()`` is called from one thread, everything else from any.

    A new kind of camera implements this and gets a branch in `camera.open_source`, nothing else.
    """

    @property
    def name(self) -> str:
        """What messages call it: "camera 0", "clip.mp4"."""

    @property
    def is_camera(self) -> bool:
        """True: takes a requested size and rate, and is mirrored by default. False for files."""

    @property
    def fps(self) -> float | None:
        """Nominal frames per second; None if unknown."""

    @property
    def status(self) -> str:
        """Empty while frames come, else one short line."""

    @property
    def faults(self) -> dict[str, int]:
        """How often each fault occurred; only those that did."""

    def first_frame(self) -> Frame | None:
        """Wait for a first frame, before the first ``read()``; None if there is none. Starts no playback."""

    def read(self) -> Captured | None:
        """Wait for the next frame. None: there are no more (closed, or a clip that does not loop ended)."""

    def close(self) -> None:
        """End ``read()`` and release the device or file; returns at once. May be called again."""


class Pause:
    """A wait that ``end()`` cuts short. An injected ``sleep`` replaces real waiting."""

    RETRY_S, LONGEST_RETRY_S = 0.2, 2.0

    def __init__(self, sleep: Sleep | None = None) -> None:
        self._sleep = sleep
        self._ended = threading.Event()
        self._retry_s = self.RETRY_S

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

    def before_retry(self, *, first: bool) -> None:
        """Wait before opening a source again; each wait is twice the one before, up to a limit."""
        self._retry_s = self.RETRY_S if first else min(2 * self._retry_s, self.LONGEST_RETRY_S)
        self.wait(self._retry_s)


def after(at_s: float, last_s: float) -> float:
    """``at_s``, or the next float after ``last_s`` if a clock stood still or a time is repeated."""
    return max(at_s, math.nextafter(last_s, math.inf))
