"""N steps of N consecutive frames in one call of the UNet: more frames a second, N - 1 frames later.

    batch = stylizer.stream_batch((256, 256))
    for frame in frames:
        styled = batch.push(stylizer.fit(frame), state)  # None while it fills
    for styled in batch.flush():  # the frames still inside
        ...

A frame keeps the style and the noise that it entered with, through all its steps, so each comes out as it
does one by one. See `stream_program`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import UsageError
from std_rt.engines.program import Mark, no_mark
from std_rt.pipeline.conditioning import Conditioning
from std_rt.pipeline.runner_cache import CachedRunner
from std_rt.pipeline.state import State

__all__ = ["StreamBatch"]

Frame = NDArray[np.uint8]
Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Inside:
    """What a frame entered with."""

    told: Conditioning
    noise: Array


class StreamBatch:
    """Frames of one size on their way through the slots. One thread at a time."""

    def __init__(
        self,
        steps: int,
        get: Callable[[], CachedRunner],
        told: Callable[[], Conditioning],
        check: Callable[[Frame, State, CachedRunner], None],
    ) -> None:
        """Most callers want `Stylizer.stream_batch`.

        ``get`` gives the runner (the same one as long as it stays open), ``told`` what a frame that enters
        now is told; ``check`` raises UsageError where frame and state do not fit the runner.
        """
        self._steps, self._get, self._told, self._check = steps, get, told, check
        self._slots: list[_Inside | None] = [None] * (steps - 1)  # before a run: slot 1 and up
        self._newest: _Inside | None = None
        self._last: Frame | None = None

    @property
    def latency_frames(self) -> int:
        """Frames that enter before the result of one comes out."""
        return self._steps - 1

    @property
    def inside(self) -> int:
        """Frames that have entered and not come out."""
        return sum(one is not None for one in self._slots)

    def push(self, working: Frame, state: State, mark: Mark = no_mark) -> Frame | None:
        """A frame uint8 [H, W, 3] of the working size in; the result of the frame N - 1 pushes ago.

        None while fewer have entered. Style and noise are those of this moment. Raises UsageError where frame
        or state are of another size. After an error of the engines, the frames inside are lost.
        """
        opened = self._get()
        self._check(working, state, opened)
        self._claim(opened)
        self._last = working
        self._newest = _Inside(self._told(), state.noise)
        return self._advance(opened, self._newest, mark)

    def flush(self, mark: Mark = no_mark) -> Iterator[Frame]:
        """The results of the frames still inside, in order; then it is empty and can be used again."""
        while any(self._slots):
            opened = self._get()
            self._claim(opened)
            styled = self._advance(opened, None, mark)
            if styled is not None:
                yield styled

    def _advance(self, opened: CachedRunner, entering: _Inside | None, mark: Mark) -> Frame | None:
        """One run. A slot without a frame is told what the newest one is: so nothing is fed for it."""
        slots = [entering, *self._slots]
        assert self._newest is not None
        assert self._last is not None
        rows = [slot or self._newest for slot in slots]
        self._slots = [None] * self.latency_frames
        styled = opened.run(self._last[None], [row.told for row in rows], [row.noise for row in rows], mark)
        self._slots = slots[:-1]
        return styled[0] if slots[-1] is not None else None

    def _claim(self, opened: CachedRunner) -> None:
        """The runner's slots are this batch's from now on; UsageError where its frames were lost."""
        if opened.user is self:
            return
        lost = self.inside
        self._slots = [None] * self.latency_frames
        if lost:
            raise UsageError(
                f"{lost} frames inside the stream batch are lost: its engines were closed, or another stream "
                "batch of the same level was begun; flush() it before that"
            )
        opened.user = self
