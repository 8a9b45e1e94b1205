"""A live session: a source, painted, with everything about it that can be changed while it runs.

    with Session(stylizer, source, deck, settings) as session:
        while not session.over:
            shot = session.get(0.02)
            if shot is not None:
                show(shot.styled)
                session.presented(shot)

Three lanes: the source is read in one thread, painted in another, and presented by whoever calls, which a
window wants to be the main thread. Between the first two the newest frame wins and the others are counted;
between the last two a frame waits for its turn, so that a slow screen holds the engines back and not the
picture.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import StdRtError
from std_rt.core.prefetcher import Prefetcher
from std_rt.live.metrics import Meter
from std_rt.live.pacing import Governor, SimilarityFilter, ladder, relative_costs
from std_rt.live.style_mixer import StyleMixer
from std_rt.media.camera.frame_source import Source
from std_rt.pipeline.stylizer import Quality, Stylizer
from std_rt.streaming.frame_packet import FramePacket
from std_rt.streaming.frame_stream import ONE_BY_ONE, STREAM_BATCH, FrameStream
from std_rt.streaming.temporal import TemporalFilter

__all__ = ["Session", "Settings"]

Frame = NDArray[np.uint8]

_STYLED_AHEAD = 2
_GAP_S = 1.0  # after so long without a frame, those still inside the engines are of the past
_END_S = 30.0  # what the engines get to end their last frame
_LEAST_PX = 128  # of a side, for the governor: below, nothing can be made out
_NOT_BUSY = frozenset({"wait", "present"})  # stages in which the engines' thread does nothing


@dataclass(frozen=True)
class Settings:
    """How a session runs. ``temporal``: off, noise or full. ``similar``: threshold 0..1, None for no skips.

    ``target_fps``: the rate that the governor holds, None for no governor. ``crossfade_s``: of a change of
    style.
    """

    stream_batch: bool = False
    temporal: str = "off"
    similar: float | None = None
    target_fps: float | None = None
    crossfade_s: float = 1.0
    seed: int = 0


class Session:
    """Call everything from one thread, the presenting one."""

    def __init__(
        self,
        stylizer: Stylizer,
        source: Source,
        deck: StyleMixer,
        settings: Settings | None = None,
        *,
        mirror: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """The deck holds at least one style. Nothing runs before `start` (or ``with``)."""
        self.settings = settings or Settings()
        self.deck, self.source, self.mirror, self.paused = deck, source, mirror, False
        self._stylizer, self._now = stylizer, now
        similar = self.settings.similar
        self._stream = FrameStream(
            stylizer,
            deck.at,
            batching=STREAM_BATCH if self.settings.stream_batch else ONE_BY_ONE,
            temporal=TemporalFilter(self.settings.temporal, self._measured),
            similarity=None if similar is None else SimilarityFilter(similar),
            seed=self.settings.seed,
            now=now,
        )
        self.meter = Meter(self.described(), now=now)
        self.notes: list[str] = []
        """What the governor has to say; take them from the front."""
        self._pace = _Pace(stylizer, self._stream, self.meter, self.settings, self.notes)
        self._captured: Prefetcher[FramePacket] | None = None
        self._styled: Prefetcher[FramePacket] | None = None
        self._lost = False

    def described(self) -> dict[str, Any]:
        """What the report says about the session."""
        stylizer, own = self._stylizer, self.settings
        return {
            "bundle": stylizer.bundle.name,
            "digest": stylizer.bundle.digest,
            "backend": stylizer.backend,
            "steps": stylizer.steps,
            "guidance": [stylizer.guidance.mode, stylizer.guidance.scale],
            "stream_batch": own.stream_batch,
            "temporal": own.temporal,
            "similar": own.similar,
            "target_fps": own.target_fps,
            "source": self.source.name,
            "source_fps": self.source.fps,
        }

    def start(self) -> None:
        """Begin to read and to paint."""
        self._captured = Prefetcher(
            self._capture(), room=1, latest=True, name="capture", dropped=lambda _: self.meter.dropped()
        )
        self._styled = Prefetcher(self._paint(self._captured), room=_STYLED_AHEAD, name="engines")

    @property
    def over(self) -> bool:
        """The source has ended and everything was given, or the session is closed."""
        return self._styled is None or self._styled.over

    def get(self, timeout_s: float) -> FramePacket | None:
        """The next painted frame, or None where none came in time. Raises what painting raised."""
        self._watch_source()
        return None if self._styled is None else self._styled.get(timeout_s)

    def presented(self, shot: FramePacket) -> None:
        """A frame is on the screen."""
        self.meter.presented(
            shot.captured_s, painted_s=shot.painted_s, skipped=shot.skipped, stages_ms=shot.stages_ms
        )

    def pause(self, paused: bool) -> None:
        """Hold the picture, or let it go on."""
        self.paused = paused
        if paused:
            self.meter.pause("pause")
        else:
            self.meter.resume("pause")

    def lines(self) -> list[str]:
        """The overlay: a label, a tab and its value in each line."""
        recent, level = self.meter.recent(), self._stream.quality
        fps = "" if recent.fps is None else f"{recent.fps:.1f}"
        latency = ""
        if recent.latency_p50_ms is not None and recent.latency_p95_ms is not None:
            latency = f"{recent.latency_p50_ms:.0f} ms  p95 {recent.latency_p95_ms:.0f}"
        figures = {
            "fps": fps,
            "latency": latency,
            "dropped": _a_second(recent.drops_per_s),
            "skipped": _a_second(recent.skips_per_s) if self.settings.similar is not None else "",
            "style": self.deck.title(self._now()),
            "strength": "" if self.deck.strength == 1 else f"{self.deck.strength:.2f}",
            "steps": "" if level is None else f"{level.steps} at {level.size[1]}x{level.size[0]}",
            "way": ", ".join(self._ways()),
        }
        return [f"{label}\t{value}" for label, value in figures.items() if value]

    def _ways(self) -> Iterator[str]:
        if self.settings.stream_batch:
            yield "stream batch"
        if self.settings.temporal != "off":
            yield f"steady {self.settings.temporal}"
        if self.settings.target_fps is not None:
            yield f"holds {self.settings.target_fps:g} fps"

    def report(self) -> dict[str, Any]:
        """The latency contract so far."""
        level = self._pace.best
        self.meter.settings |= {
            "size": None if level is None else [level.size[1], level.size[0]],
            "source_faults": self.source.faults,
        }
        return self.meter.report()

    def close(self) -> None:
        """End both threads; the engines are free to be closed afterwards. What follows is no running time."""
        self.meter.pause("end")
        self.source.close()
        self.report()  # what reads the meter afterwards finds all of it
        for lane in (self._captured, self._styled):
            if lane is not None:
                lane.close()
        for lane in (self._styled, self._captured):
            if lane is not None:
                lane.close(_END_S)

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _capture(self) -> Iterator[FramePacket]:
        """In the first thread."""
        while (taken := self.source.read()) is not None:
            self.meter.captured(taken.at_s)
            if not self.paused:
                frame = np.ascontiguousarray(taken.frame[:, ::-1]) if self.mirror else taken.frame
                yield FramePacket(frame, taken.at_s, taken.index)

    def _paint(self, shots: Iterator[FramePacket]) -> Iterator[FramePacket]:
        """In the second thread."""
        for shot in self._stream.run(self._waited(shots)):
            yield shot
            yield from self._pace.after(shot, self._now())

    def _waited(self, shots: Iterator[FramePacket]) -> Iterator[FramePacket]:
        last_s = math.inf
        for shot in shots:
            if shot.captured_s - last_s > _GAP_S:  # a pause, or a camera that was gone
                self.meter.dropped(self._stream.discard())
            last_s = shot.captured_s
            shot.stages_ms["wait"] = (self._now() - shot.captured_s) * 1000
            yield shot

    def _measured(self, warping_error: float) -> None:
        self.meter.warped(warping_error)

    def _watch_source(self) -> None:
        """A camera that is gone stops the clock of the contract until its next frame."""
        lost = "lost" in self.source.status
        if lost and not self._lost:
            self.meter.pause("source")
        elif self._lost and not lost:
            self.meter.resume("source")
        self._lost = lost


class _Pace:
    """The governor's hands: builds the ladder for the frames that come, opens levels, changes over."""

    def __init__(
        self, stylizer: Stylizer, stream: FrameStream, meter: Meter, settings: Settings, notes: list[str]
    ) -> None:
        self._stylizer, self._stream, self._meter, self._notes = stylizer, stream, meter, notes
        self._target, self._batch = settings.target_fps, settings.stream_batch
        self._governor: Governor[Quality] | None = None
        self.best: Quality | None = None

    def after(self, shot: FramePacket, now: float) -> Iterator[FramePacket]:
        """One frame is painted: note what it took, and go to another level where one is due and open."""
        level = self._stream.quality
        if level is None:
            return
        usual = self._stylizer.quality(shot.frame.shape[0], shot.frame.shape[1])
        if usual != self.best:  # the first frame, or the camera has changed its size
            self._begin(usual)
        if self._governor is None or shot.skipped:
            return
        busy_ms = sum(spent for stage, spent in shot.stages_ms.items() if stage not in _NOT_BUSY)
        wanted = self._governor.observe(busy_ms, now)
        if wanted is not None:
            self._stylizer.prepare_qualities([level, wanted], stream_batch=self._batch)
        if self._governor.asked is not None:
            yield from self._change(self._governor.asked, now)

    def _begin(self, best: Quality) -> None:
        self.best = best
        self._meter.level(_name(best))
        if self._target is None:
            return
        bundle = self._stylizer.bundle
        least_px = max(_LEAST_PX, bundle.size_range[0])
        levels = ladder(best.size, best.steps, bundle.steps_allowed, bundle.size_multiple, least_px)
        self._governor = Governor(self._target, levels, relative_costs(levels))

    def _change(self, asked: Quality, now: float) -> Iterator[FramePacket]:
        """Go over once its engines are open; until then frames go on as they are."""
        assert self._governor is not None
        try:
            if not self._stylizer.ready(asked, stream_batch=self._batch):
                return
        except StdRtError as error:
            self._governor.refused(asked)
            self._notes.append(f"{_name(asked)} cannot be used: {error}")
            return
        yield from self._stream.switch(asked)
        self._governor.switched(asked, now)
        self._meter.level(_name(asked))
        self._notes.append(f"{self._target:g} fps: now {_name(asked)}")


def _name(level: Quality) -> str:
    return f"{level.size[1]}x{level.size[0]}, {level.steps} step" + ("s" if level.steps > 1 else "")


def _a_second(rate: float) -> str:
    return "0" if rate < 0.05 else f"{rate:.1f} a second"
