"""The single code path for stylizing frame streams: packets in, styled packets out, in order.

    stream = FrameStream(stylizer, mixer.at, temporal=TemporalFilter("full"))
    for packet in stream.run(packets):
        show(packet.styled)

`stylize`, `live`, `evaluate` and `bench` all use it. For each frame: fit it to the working size, look up the
current style, follow the motion, run the engines, settle, bring the result back to the frame's aspect, and
keep the frame's colours if the stylizer is told to. How frames share calls of the engines (the batching mode)
changes the speed, not the result.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from std_rt.core.arrays import Frame, Size
from std_rt.core.bundle import Bundle
from std_rt.core.errors import UsageError
from std_rt.engines.program import Mark, no_mark
from std_rt.media import chroma, fit
from std_rt.pipeline.conditioning import EncodedStyle
from std_rt.pipeline.mask import Mask, unless_whole
from std_rt.pipeline.runner_cache import Submitted
from std_rt.pipeline.stylizer import Quality, State, Stylizer
from std_rt.streaming.optical_flow import SMALLEST_PX, Follower
from std_rt.streaming.shared_calls import SharedCalls
from std_rt.streaming.similarity import SimilarityFilter
from std_rt.streaming.stream_batch import StreamBatch
from std_rt.streaming.temporal import Motion, TemporalFilter

__all__ = [
    "CARRIED",
    "GROUPED",
    "ONE_BY_ONE",
    "STREAM_BATCH",
    "WINDOWS",
    "FramePacket",
    "FrameStream",
    "StyleAt",
]

StyleAt = Callable[[float], tuple[EncodedStyle, float]]  # time in s -> style and strength at that instant

# Batching modes: lowest latency; N steps of N consecutive frames in one call of the UNet (more frames
# per second, N - 1 frames later); several whole frames in one call of each graph (for files).
ONE_BY_ONE, STREAM_BATCH, GROUPED = "one by one", "stream batch", "grouped"
# Overlapping windows of frames (`pipeline.windows`): what a video-to-video bundle does, whatever is asked;
# for a camera, `CARRIED`, whose results do not wait for later windows.
WINDOWS, CARRIED = "windows", "carried windows"


@dataclass(eq=False, slots=True)
class FramePacket:
    """One frame uint8 [H, W, 3] with its result; handed from thread to thread, used by one at a time.

    ``captured_s``: when the source had it. ``style_s``: when its style was looked up. ``styled``: the result,
    None until there is one. ``skipped``: it shows the result of an earlier, similar frame. ``stages_ms``: the
    duration of each stage.
    """

    frame: Frame
    captured_s: float = 0.0
    index: int = 0
    style_s: float = 0.0
    styled: Frame | None = None
    skipped: bool = False
    stages_ms: dict[str, float] = field(default_factory=dict)


class _Batcher(Protocol):
    """Frames of one size on their way through the engines; results come in the order of `push`."""

    def push(self, working: Frame, state: State, mark: Mark = no_mark) -> list[Frame]:
        """Take one frame, return those that are finished."""

    def collect(self, mark: Mark = no_mark) -> list[Frame]:
        """Wait for what the engines run at this moment."""

    def flush(self, mark: Mark = no_mark) -> Iterator[Frame]:
        """Finish the frames still inside."""


class _Grouped:
    """``room`` frames in one call of each graph; while a GPU runs one group, the next one is made ready."""

    def __init__(self, stylizer: Stylizer, quality: Quality, room: int, mask: Mask | None) -> None:
        self._stylizer, self._quality, self._room, self._mask = stylizer, quality, room, mask
        self._waiting: list[tuple[Frame, State]] = []
        self._submitted: deque[tuple[Submitted, int]] = deque()  # with the number of frames that count

    def push(self, working: Frame, state: State, mark: Mark = no_mark) -> list[Frame]:
        self._waiting.append((working, state))
        if len(self._waiting) < self._room:
            return []
        self._submit(mark)
        return [*self._collect(mark, leave=1)]

    def collect(self, mark: Mark = no_mark) -> list[Frame]:
        with self._stylizer.lock:
            return [*self._collect(mark)]

    def flush(self, mark: Mark = no_mark) -> Iterator[Frame]:
        if self._waiting:
            self._submit(mark)
        yield from self._collect(mark)

    def _submit(self, mark: Mark) -> None:
        frames, states = [frame for frame, _ in self._waiting], [state for _, state in self._waiting]
        self._waiting = []
        (group,) = self._stylizer.submit_many(
            frames, states, mark, quality=self._quality, frames=self._room, mask=self._mask
        )
        self._submitted.append((group, len(frames)))

    def _collect(self, mark: Mark, leave: int = 0) -> Iterator[Frame]:
        """The frames of all groups but the last ``leave`` that still run."""
        while self._submitted and (len(self._submitted) > leave or not self._submitted[0][0].running):
            group, count = self._submitted.popleft()
            yield from group.collect(mark)[:count]


class _Windowed:
    """Overlapping windows of frames that the UNet sees at once; a flush ends a scene."""

    def __init__(self, stylizer: Stylizer, quality: Quality, *, carried: bool) -> None:
        self._stream = stylizer.window_stream(quality, carried=carried)

    def push(self, working: Frame, state: State, mark: Mark = no_mark) -> list[Frame]:
        return self._stream.push(working, state.noise, mark)

    def collect(self, mark: Mark = no_mark) -> list[Frame]:
        return []  # a window needs its later frames, or a flush

    def flush(self, mark: Mark = no_mark) -> Iterator[Frame]:
        return self._stream.flush(mark)


_BATCHERS: dict[str, Callable[[Stylizer, Quality, Mask | None], _Batcher]] = {
    ONE_BY_ONE: lambda stylizer, quality, mask: _Grouped(stylizer, quality, 1, mask),
    STREAM_BATCH: lambda stylizer, quality, _: StreamBatch(stylizer, quality),
    GROUPED: lambda stylizer, quality, mask: _Grouped(
        stylizer, quality, stylizer.frames_per_call(quality.size), mask
    ),
    WINDOWS: lambda stylizer, quality, _: _Windowed(stylizer, quality, carried=False),
    CARRIED: lambda stylizer, quality, _: _Windowed(stylizer, quality, carried=True),
}


@dataclass(eq=False, slots=True)
class _Inside:
    """A packet inside the engines, and the data to finish it with."""

    packet: FramePacket
    motion: Motion
    changing: bool  # its style differs from that of the frame before
    keep_colours: bool


class FrameStream:
    """Stylizes the frames of one stream, in one thread; streams in several threads may share a stylizer."""

    def __init__(
        self,
        stylizer: Stylizer,
        style_at: StyleAt | None = None,
        *,
        batching: str = ONE_BY_ONE,
        temporal: TemporalFilter | None = None,
        similarity: SimilarityFilter | None = None,
        mask: Mask | None = None,
        seed: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``style_at`` None: the style set on the stylizer. ``temporal`` None: mode off.

        ``similarity`` skips frames that hardly differ from the one before: they get its result. ``mask``: see
        `Stylizer.step`. Raises ValueError for an unknown batching mode, or one that cannot be combined with
        ``similarity`` or ``mask``. With a video-to-video bundle it is `WINDOWS` or `CARRIED`, without masks
        (UsageError), and results come some frames later.
        """
        self._mask = unless_whole(mask)
        self._batching = _checked(batching, stylizer.bundle, similarity, self._mask)
        self._stylizer, self._style_at = stylizer, style_at
        # What any thread may set; it holds from the next frame on. None: as the stylizer has it.
        self.temporal = temporal or TemporalFilter("off")
        self.size: int | Size | None = None
        self.steps: int | None = None
        self.keep_colours: bool | None = None
        self.calls: SharedCalls | None = None
        """With other streams, for one by one without a mask. To be set before the first frame."""
        self._temporal = self.temporal
        # For windows, where the temporal filter sees no cuts.
        self._cuts = None if stylizer.bundle.window is None else Follower(fine=False, weight=0.0)
        self._similarity, self._seed, self._now = similarity, seed, now
        self._followed: tuple[Size, int | Size | None, int | None] | None = None  # shape of the frames, asked
        self.usual: Quality | None = None
        """Quality of the current frames, unless `switch` was called; None before the first frame."""
        self._quality: Quality | None = None
        self._batcher: _Batcher | None = None
        self._state: State | None = None
        self._style: tuple[EncodedStyle, float] | None = None
        self._running = False
        self._inside: deque[_Inside] = deque()
        self._last: Frame | None = None
        self._keep_colours = self.keeps_colours  # of the last frame

    @property
    def quality(self) -> Quality | None:
        """Size and steps in use; None before the first frame."""
        return self._quality

    @property
    def keeps_colours(self) -> bool:
        """Whether the next frame keeps its colours."""
        return self._stylizer.keep_colours if self.keep_colours is None else self.keep_colours

    def switch(self, quality: Quality) -> Iterator[FramePacket]:
        """Change to another quality from the next frame on; yields the packets still inside the engines."""
        if quality != self._quality:
            yield from self._flush()
            self._begin(quality)

    def discard(self) -> int:
        """Drop the packets inside the engines, e.g. after a pause. Returns their number."""
        dropped = len(self._inside)
        if self._quality is not None:
            self._begin(self._quality)
        return dropped

    def run(
        self, packets: Iterable[FramePacket], more: Callable[[], bool] = lambda: True
    ) -> Iterator[FramePacket]:
        """Every packet with its result, in order. `switch` and `discard` may be called in between.

        ``more`` says whether the next packet is there already: then a GPU may run one while the next is made
        ready; without, a result is waited for at once.

        Raises UsageError if another `run` of this stream has not ended: their frames would mix.
        """
        if self._running:
            raise UsageError(
                "this FrameStream is running already, and its frames come in order; make one for each thread"
            )
        self._running = True
        try:
            for packet in packets:
                yield from self._take(packet)
                # A frame that is skipped needs the result of the one before.
                if self._batcher is not None and (self._similarity is not None or not more()):
                    yield from self._finish_all(self._batcher.collect(_stopwatch(packet, self._now)), packet)
            yield from self._flush()
        finally:
            self._running = False

    def frames(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """`run` for bare frames uint8 [H, W, 3]."""
        for packet in self.run(FramePacket(frame) for frame in frames):
            assert packet.styled is not None
            yield packet.styled

    def _take(self, packet: FramePacket) -> Iterator[FramePacket]:
        mark = _stopwatch(packet, self._now)
        if self.temporal is not self._temporal:
            yield from self._flush()
            self._temporal = self.temporal
        yield from self._follow_shape((packet.frame.shape[0], packet.frame.shape[1]))
        assert self._quality is not None
        assert self._state is not None
        assert self._batcher is not None
        working = fit.resize(packet.frame, self._quality.size)
        mark("convert")
        style = self._look_up_style(packet)
        changing = _differ(self._style, style)
        if changing and self._batching in (GROUPED, WINDOWS):  # one call has one style
            yield from self._flush()
        self._style = style
        before, self._keep_colours = self._keep_colours, self.keeps_colours
        if self._may_skip(working, changing or before != self._keep_colours):
            assert self._last is not None
            packet.styled, packet.skipped = self._over(packet.frame, self._last), True
            yield packet
            return
        motion = self._temporal.follow(working)
        if self._cuts is not None and self._is_cut(self._cuts, working, motion):
            yield from self._flush()
        state = self._temporal.noise(self._state, motion)
        mark("follow")
        self._inside.append(_Inside(packet, motion, changing, self._keep_colours))
        if self.calls is not None and self.calls.applies(style):
            assert style is not None
            done: Iterable[Frame] = [self.calls.run(working, state, style, self._quality, mark)]
        else:
            with self._stylizer.lock:
                self._use_style()
                done = self._batcher.push(working, state, mark)
                if done and self._batching == CARRIED:
                    self._share_style(len(done))
        yield from self._finish_all(done, packet)

    def _follow_shape(self, shape: Size) -> Iterator[FramePacket]:
        """Start over if frames of this shape have another working size, or other steps."""
        asked = (shape, self.size, self.steps)
        if asked != self._followed:
            if self._mask is not None:
                self._mask.check(shape)
            self._followed = asked
            before, self.usual = self.usual, self._stylizer.quality(*shape, size=asked[1], steps=asked[2])
            if self.usual != before:
                yield from self.switch(self.usual)

    def _begin(self, quality: Quality) -> None:
        self._quality, self._last = quality, None
        self._state = self._stylizer.state_for(quality, seed=self._seed)
        self._temporal.reset()
        if self._cuts is not None:
            self._cuts.reset()
        self._inside.clear()
        self._batcher = _BATCHERS[self._batching](self._stylizer, quality, self._mask)

    def _look_up_style(self, packet: FramePacket) -> tuple[EncodedStyle, float] | None:
        packet.style_s = self._now()
        return None if self._style_at is None else self._style_at(packet.style_s)

    def _use_style(self) -> None:
        """Set the style of the frames that run next: another stream may have set its own."""
        if self._style is not None:
            self._stylizer.use_style(*self._style)

    def _share_style(self, count: int) -> None:
        """The next ``count`` results are one window's, painted in the style that its newest frame found."""
        window = [self._inside[i] for i in range(count)]
        for each in window:
            each.packet.style_s = window[-1].packet.style_s
        window[0].changing = any(each.changing for each in window)

    def _may_skip(self, working: Frame, changing: bool) -> bool:
        if self._similarity is None:
            return False
        if changing or self._last is None:
            self._similarity.force()
        return self._similarity.skip(working)

    def _is_cut(self, cuts: Follower, working: Frame, motion: Motion) -> bool:
        """Whether a scene begins with this frame, which no window may share with the one before."""
        if min(working.shape[:2]) < SMALLEST_PX:
            return False
        return (cuts.follow(working) if self._temporal.mode == "off" else motion.followed) is None

    def _finish_all(self, done: Iterable[Frame], newest: FramePacket) -> Iterator[FramePacket]:
        """The packets that these are the results of; ``newest`` is the last that was taken."""
        for styled in done:
            if self._batching == STREAM_BATCH:  # the time of the call it comes out of
                self._inside[0].packet.stages_ms = newest.stages_ms
            yield self._finish(styled)

    def _finish(self, styled: Frame) -> FramePacket:
        """The packet that ``styled`` is the result of."""
        done = self._inside.popleft()
        packet, shape = done.packet, (done.packet.frame.shape[0], done.packet.frame.shape[1])
        mark = _stopwatch(packet, self._now)
        settled = self._temporal.settle(styled, done.motion, changing=done.changing)
        mark("settle")
        working = (settled.shape[0], settled.shape[1])
        size = shape if self._mask is not None else fit.result_size(shape, working)
        styled = fit.resize(settled, size)
        mark("convert")
        if done.keep_colours:
            styled = chroma.keep_colours(packet.frame, styled)
            mark("colours")
        self._last, packet.styled = styled, self._over(packet.frame, styled)
        return packet

    def _over(self, frame: Frame, styled: Frame) -> Frame:
        """The result of a frame: ``styled``, with the frame's own pixels outside the mask."""
        return styled if self._mask is None else self._mask.composite(frame, styled)

    def _flush(self) -> Iterator[FramePacket]:
        if self._batcher is None or not (self._inside or self._batching == CARRIED):
            return  # carried windows hold frames that have come out, too
        if self._inside and self._batching == CARRIED:
            self._share_style(len(self._inside))
        watch: Mark = no_mark
        flushing = self._batcher.flush(lambda stage: watch(stage))
        while True:
            if self._inside and self._batching != STREAM_BATCH:
                watch = _stopwatch(self._inside[0].packet, self._now)
            with self._stylizer.lock:
                self._use_style()
                styled = next(flushing, None)
            if styled is None:
                return
            yield self._finish(styled)


def _checked(batching: str, bundle: Bundle, similarity: SimilarityFilter | None, mask: Mask | None) -> str:
    """The batching mode of this bundle. Raises ValueError or UsageError if the three do not fit together."""
    if batching not in _BATCHERS:
        raise ValueError(f"unknown batching mode {batching!r}; use one of {', '.join(_BATCHERS)}")
    if bundle.window is not None:
        for asked, what in ((similarity, "skipping frames"), (mask, "--mask")):
            if asked is not None:
                bundle.check_single_frames(what)
        return CARRIED if batching == CARRIED else WINDOWS
    if batching in (WINDOWS, CARRIED):
        raise ValueError(f"{batching!r} are for video-to-video bundles, which '{bundle.name}' is not")
    if similarity is not None and batching != ONE_BY_ONE:
        raise ValueError(f"frames can only be skipped {ONE_BY_ONE!r}, not {batching!r}")
    if mask is not None and batching == STREAM_BATCH:
        raise ValueError(f"a mask cannot be combined with the {batching!r}")
    return batching


def _differ(before: tuple[EncodedStyle, float] | None, style: tuple[EncodedStyle, float] | None) -> bool:
    """Whether the style has changed since the frame before."""
    if before is None or style is None:
        return False
    return style[0] is not before[0] or style[1] != before[1]


def _stopwatch(packet: FramePacket, now: Callable[[], float]) -> Mark:
    """Adds the time since the last call to the packet's stage."""
    last = now()

    def mark(stage: str) -> None:
        nonlocal last
        at = now()
        packet.stages_ms[stage] = packet.stages_ms.get(stage, 0.0) + (at - last) * 1000
        last = at

    return mark
