"""The engine lane: shots in, painted shots out, in order.

    painter = FrameStream(stylizer, deck.at, steadier=TemporalFilter("full"))
    for shot in painter.paint(shots):
        show(shot.styled)

What is painted together differs, the result does not: frames one by one (lowest latency), N steps of N
consecutive frames in one call of the UNet (stream batch: more frames a second, N - 1 frames later), or
several whole frames in one call of each graph (files).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from std_rt.engines.program import Mark, no_mark
from std_rt.pipeline.conditioning import EncodedStyle
from std_rt.pipeline.stylizer import Quality, State, Stylizer
from std_rt.streaming.frame_packet import FramePacket
from std_rt.streaming.similarity import SimilarityFilter
from std_rt.streaming.temporal import Motion, TemporalFilter

__all__ = ["GROUPED", "ONE_BY_ONE", "STREAM_BATCH", "WAYS", "FrameStream", "StyleAt"]

Frame = NDArray[np.uint8]
Size = tuple[int, int]  # (H, W) in pixels
StyleAt = Callable[[float], tuple[EncodedStyle, float]]  # time -> style and strength of that instant

ONE_BY_ONE, STREAM_BATCH, GROUPED = "one by one", "stream batch", "grouped"
WAYS = (ONE_BY_ONE, STREAM_BATCH, GROUPED)


@dataclass(eq=False, slots=True)
class _Job:
    """A shot inside the engines, with what is needed when it comes out."""

    shot: FramePacket
    motion: Motion
    changing: bool  # its style is not that of the frame before


class _Way(Protocol):
    """How frames of one size go through the engines; results in the order of `push`."""

    @property
    def inside(self) -> int:
        """Frames taken and not given."""

    def push(self, job: _Job, working: Frame, state: State, mark: Mark) -> Iterator[tuple[_Job, Frame]]:
        """Take one frame, give those that are finished."""

    def drain(self, mark: Mark) -> Iterator[tuple[_Job, Frame]]:
        """Give all that were taken and not given."""


class FrameStream:
    """Frames of one stream. One thread at a time."""

    def __init__(
        self,
        stylizer: Stylizer,
        style_at: StyleAt | None = None,
        *,
        way: str = ONE_BY_ONE,
        steadier: TemporalFilter | None = None,
        similar: SimilarityFilter | None = None,
        seed: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``style_at`` None: the style that the stylizer has. ``way``: one of the module's three.

        ``similar`` leaves out frames that hardly differ from the one before: they get its result.
        """
        if way not in WAYS:
            raise ValueError(f"there is no way {way!r}; there are {', '.join(WAYS)}")
        if similar is not None and way != ONE_BY_ONE:
            raise ValueError(f"similar frames are left out one by one, not {way}: others are still inside")
        self._stylizer, self._style_at, self._kind = stylizer, style_at, way
        self._steadier = steadier or TemporalFilter("off")
        self._similar, self._seed, self._now = similar, seed, now
        self._shape: Size | None = None  # of the frames
        self._usual: Quality | None = None  # of frames of that shape
        self._level: Quality | None = None
        self._way: _Way = _OneByOne(stylizer, None)
        self._state: State | None = None
        self._style: tuple[EncodedStyle, float] | None = None
        self._last: Frame | None = None

    @property
    def level(self) -> Quality | None:
        """Size and steps that frames are painted at; None before the first."""
        return self._level

    def go_to(self, level: Quality) -> Iterator[FramePacket]:
        """Paint at another level from the next frame on; the shots still inside come out of the old one."""
        if level != self._level:
            yield from self._drain()
            self._begin(level)

    def forget(self) -> int:
        """Give up the shots inside, as after a pause: nobody wants to see them. Returns their number."""
        lost = self._way.inside
        if self._level is not None:
            self._begin(self._level)
        return lost

    def paint(self, shots: Iterable[FramePacket]) -> Iterator[FramePacket]:
        """Every shot with its result, in order. Between two of them `go_to` and `forget` may be called."""
        for shot in shots:
            yield from self._take(shot)
        yield from self._drain()

    def frames(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """`paint` for frames that are nothing but frames."""
        for shot in self.paint(FramePacket(frame) for frame in frames):
            assert shot.styled is not None
            yield shot.styled

    def _take(self, shot: FramePacket) -> Iterator[FramePacket]:
        mark = _watch(shot, self._now)
        shape = (shot.frame.shape[0], shot.frame.shape[1])
        if shape != self._shape:
            self._shape = shape
            before, self._usual = self._usual, self._stylizer.level(*shape)
            if self._usual != before:
                yield from self.go_to(self._usual)
        working = self._stylizer.fit(shot.frame, self._level)
        mark("convert")
        changing = self._look_up_style(shot)
        if changing and self._kind == GROUPED:  # a group is painted in one style
            yield from self._drain()
        if self._style is not None:
            self._stylizer.use_style(*self._style)
        if self._hardly_differs(working, changing):
            shot.styled, shot.skipped = self._last, True
            yield shot
            return
        motion = self._steadier.follow(working)
        assert self._state is not None
        state = self._steadier.noise(self._state, motion)
        mark("follow")
        for job, styled in self._way.push(_Job(shot, motion, changing), working, state, mark):
            yield self._finish(job, styled)

    def _begin(self, level: Quality) -> None:
        """A stream at this level starts."""
        self._level, self._last = level, None
        self._state = self._stylizer.state_for(level, seed=self._seed)
        self._steadier.reset()
        ways: dict[str, Callable[[Stylizer, Quality], _Way]] = {
            ONE_BY_ONE: _OneByOne,
            STREAM_BATCH: _StreamBatched,
            GROUPED: _Grouped,
        }
        self._way = ways[self._kind](self._stylizer, level)

    def _look_up_style(self, shot: FramePacket) -> bool:
        """Note the style of this instant; True where it is not that of the frame before."""
        shot.painted_s = self._now()
        if self._style_at is None:
            return False
        style = self._style_at(shot.painted_s)
        before, self._style = self._style, style
        return before is not None and (style[0] is not before[0] or style[1] != before[1])

    def _hardly_differs(self, working: Frame, changing: bool) -> bool:
        if self._similar is None:
            return False
        if changing or self._last is None:
            self._similar.force()
        return self._similar.skip(working)

    def _finish(self, job: _Job, styled: Frame) -> FramePacket:
        shot = job.shot
        mark = _watch(shot, self._now)
        settled = self._steadier.settle(styled, job.motion, changing=job.changing)
        mark("settle")
        shot.styled = self._last = self._stylizer.unfit(settled, (shot.frame.shape[0], shot.frame.shape[1]))
        mark("convert")
        return shot

    def _drain(self) -> Iterator[FramePacket]:
        for job, styled in self._way.drain(no_mark):
            yield self._finish(job, styled)


def _watch(shot: FramePacket, now: Callable[[], float]) -> Mark:
    """Adds the time since the last call to the shot's stage."""
    last = now()

    def mark(stage: str) -> None:
        nonlocal last
        at = now()
        shot.stages_ms[stage] = shot.stages_ms.get(stage, 0.0) + (at - last) * 1000
        last = at

    return mark


class _OneByOne:
    """Lowest latency: a frame is out before the next one is looked at."""

    def __init__(self, stylizer: Stylizer, level: Quality | None) -> None:
        self._stylizer, self._level, self.inside = stylizer, level, 0

    def push(self, job: _Job, working: Frame, state: State, mark: Mark) -> Iterator[tuple[_Job, Frame]]:
        yield job, self._stylizer.run(working, state, mark, level=self._level)

    def drain(self, mark: Mark) -> Iterator[tuple[_Job, Frame]]:
        return iter(())


class _StreamBatched:
    """N steps of N consecutive frames in one call of the UNet."""

    def __init__(self, stylizer: Stylizer, level: Quality) -> None:
        self._batch = stylizer.stream_batch(level)
        self._inside: deque[_Job] = deque()

    @property
    def inside(self) -> int:
        return len(self._inside)

    def push(self, job: _Job, working: Frame, state: State, mark: Mark) -> Iterator[tuple[_Job, Frame]]:
        self._inside.append(job)
        styled = self._batch.push(working, state, mark)
        if styled is not None:
            first = self._inside.popleft()
            first.shot.stages_ms = job.shot.stages_ms  # of the call that it came out of
            yield first, styled

    def drain(self, mark: Mark) -> Iterator[tuple[_Job, Frame]]:
        for styled in self._batch.flush(mark):
            yield self._inside.popleft(), styled


class _Grouped:
    """Several whole frames in one call of each graph."""

    def __init__(self, stylizer: Stylizer, level: Quality) -> None:
        self._stylizer, self._level = stylizer, level
        self._room = stylizer.frames_per_call(level.size)
        self._inside: list[tuple[_Job, Frame, State]] = []

    @property
    def inside(self) -> int:
        return len(self._inside)

    def push(self, job: _Job, working: Frame, state: State, mark: Mark) -> Iterator[tuple[_Job, Frame]]:
        self._inside.append((job, working, state))
        if len(self._inside) == self._room:
            yield from self.drain(mark)

    def drain(self, mark: Mark) -> Iterator[tuple[_Job, Frame]]:
        group, self._inside = self._inside, []
        if group:
            jobs, frames, states = zip(*group, strict=True)
            styled = self._stylizer.run_many(frames, states, mark, level=self._level, frames=self._room)
            yield from zip(jobs, styled, strict=True)
