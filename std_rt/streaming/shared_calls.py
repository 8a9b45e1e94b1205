"""Frames of several streams in one call of the engines, where that is faster than one after the other.

    calls = SharedCalls(stylizer)
    stream.calls = calls                # of each `FrameStream`; they run in threads of their own

Whose turn it is at the engines takes along the frames of those who wait behind it with the same quality, if
they fill a call (`Stylizer.frames_per_call`) whose engines are open. Nobody waits for others to come, so a
stream is never later for it than by the call that its frame is in.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from std_rt.core.arrays import Frame
from std_rt.core.errors import StdRtError
from std_rt.engines.program import Mark
from std_rt.engines.registry import GPU_BACKENDS
from std_rt.pipeline.conditioning import EncodedStyle
from std_rt.pipeline.runner_cache import RunnerKey
from std_rt.pipeline.stylizer import Quality, State, Stylizer

__all__ = ["SharedCalls"]


@dataclass(eq=False)
class _Asked:
    """A frame that waits for the engines, and its result."""

    working: Frame
    state: State
    style: tuple[EncodedStyle, float]
    quality: Quality
    styled: Frame | None = None
    error: Exception | None = None


class SharedCalls:
    """The waiting frames of the streams that share a stylizer. Any thread may call `run`."""

    def __init__(self, stylizer: Stylizer) -> None:
        self._stylizer = stylizer
        # A GPU has the next frame of a stream made ready meanwhile instead.
        self._apart = stylizer.backend in GPU_BACKENDS
        self._waiting: list[_Asked] = []
        self._lock = Lock()
        self._opened: set[RunnerKey] = set()  # asked for once: what was closed for want of room stays closed
        self.sizes: Counter[int] = Counter()
        """Number of calls by the frames in them."""

    def applies(self, style: tuple[EncodedStyle, float] | None) -> bool:
        """Whether frames in this style may go through `run`."""
        return style is not None and not self._apart

    def run(
        self, working: Frame, state: State, style: tuple[EncodedStyle, float], quality: Quality, mark: Mark
    ) -> Frame:
        """One frame of a working size, as `Stylizer.run` paints it; shared, up to one level of 255."""
        mine = _Asked(working, state, style, quality)
        with self._lock:
            self._waiting.append(mine)
        with self._stylizer.lock:
            if mine.styled is None and mine.error is None:
                self._paint(self._group(mine), mark)
        if mine.error is not None:
            raise mine.error
        assert mine.styled is not None
        return mine.styled

    def _group(self, mine: _Asked) -> list[_Asked]:
        """The frames of the next call, ``mine`` first: a full call, or that one alone."""
        room = self._stylizer.frames_per_call(mine.quality.size)
        with self._lock:
            alike = [each for each in self._waiting if each.quality == mine.quality and each is not mine]
            group = [mine, *alike[: room - 1]]
            if room == 1 or len(group) < room or not self._is_open(RunnerKey(mine.quality, room)):
                group = [mine]
            self._waiting = [each for each in self._waiting if each not in group]
        return group

    def _is_open(self, key: RunnerKey) -> bool:
        """Whether a full call would not wait; its engines begin to open when it is first wanted."""
        with suppress(StdRtError):  # what cannot be opened for several is still there for one
            if key not in self._opened:
                self._opened.add(key)
                self._stylizer.runner(key)
            return self._stylizer.ready(key.quality, frames=key.frames)
        return False

    def _paint(self, group: list[_Asked], mark: Mark) -> None:
        try:
            styled = self._stylizer.run_many(
                [each.working for each in group],
                [each.state for each in group],
                mark,
                quality=group[0].quality,
                frames=len(group),
                styles=[each.style for each in group],
            )
        except Exception as error:  # noqa: BLE001 (raised by each of them)
            for each in group:
                each.error = error
            return
        self.sizes[len(group)] += 1
        for each, result in zip(group, styled, strict=True):
            each.styled = result
