"""A live session: stylizes a frame source; everything can be changed while it runs.

    with Session(stylizer, source, mixer, settings) as session:
        while not session.over:
            packet = session.get(0.02)
            if packet is not None:
                show(packet.styled)
                session.presented(packet)

Three stages, each in its own thread; the last is the caller's (the main thread, if there is a window):

    capture                      stylize                          present
    source.read -> _capture -> [newest frame] -> _stylize -> [2 frames] -> get, presented

Between the first two the newest frame wins and the others count as drops, so a slow model never falls behind.
Between the last two a frame waits for its turn, so a slow screen slows the engines down and loses no frame.
With a video-to-video bundle both queues hold a window: the newest T - overlap frames are the next one's, and
its results, which come at once, are presented as far apart as they were captured.
`metrics` counts all of it; `QualityControl` acts after each stylized frame.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from std_rt.core.bundle import Bundle
from std_rt.core.errors import UsageError
from std_rt.core.prefetcher import Prefetcher
from std_rt.live.governor import QualityControl
from std_rt.live.metrics import Metrics
from std_rt.live.style_mixer import StyleMixer
from std_rt.media.camera.frame_source import Source
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_stream import CARRIED, ONE_BY_ONE, STREAM_BATCH, FramePacket, FrameStream
from std_rt.streaming.similarity import SimilarityFilter
from std_rt.streaming.temporal import TemporalFilter

__all__ = ["Session", "Settings"]

_STYLED_AHEAD = 2
_GAP_S = 1.0  # without a frame for this long, those still inside the engines are out of date
_CATCH_UP = 0.9  # of the time between two captures: results that come late do not stay late
_END_S = 30.0  # for the engines to finish their last frame


@dataclass(frozen=True)
class Settings:
    """How a session runs.

    ``temporal``: off, noise or full. ``similar``: skip frames more similar than this (0..1), None for never.
    ``target_fps``: the rate to maintain, None for no governor. ``crossfade_s``: how long a change of style
    takes.
    """

    stream_batch: bool = False
    temporal: str = "off"
    similar: float | None = None
    target_fps: float | None = None
    crossfade_s: float = 1.0
    seed: int = 0

    def check(self, bundle: Bundle) -> None:
        """Raise UsageError for what a video-to-video bundle cannot do."""
        asked = {
            "--stream-batch": self.stream_batch,
            "--skip-similar": self.similar is not None,
            "--target-fps": self.target_fps is not None,
        }
        flags = [flag for flag, is_on in asked.items() if is_on]
        if bundle.window is not None and flags:
            raise UsageError(
                f"bundle '{bundle.name}' is video-to-video and paints windows of {bundle.window[0]} frames, "
                f"which {flags[0]} does not work with; leave it out"
            )


class Session:
    """Call everything from one thread, the presenting one. ``mirror`` may be changed at any time."""

    def __init__(
        self,
        stylizer: Stylizer,
        source: Source,
        mixer: StyleMixer,
        settings: Settings | None = None,
        *,
        mirror: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """The mixer holds at least one style. Nothing runs before `start` (or ``with``)."""
        self.settings = settings = settings or Settings()
        settings.check(stylizer.bundle)
        self.mixer, self.source, self.mirror, self.paused = mixer, source, mirror, False
        self._now, self._window = now, stylizer.bundle.window
        self.metrics = Metrics(_described(stylizer, source, settings), now=now)
        self.stream = FrameStream(  # its size, steps, temporal filter and colours may be set at any time
            stylizer,
            mixer.at,
            batching=CARRIED if self._window else STREAM_BATCH if settings.stream_batch else ONE_BY_ONE,
            temporal=TemporalFilter(settings.temporal, self.metrics.warped),
            similarity=None if settings.similar is None else SimilarityFilter(settings.similar),
            seed=settings.seed,
            now=now,
        )
        target = settings.target_fps
        self._control = QualityControl(
            stylizer,
            self.stream,
            self.metrics,
            # More frames than come cannot be shown, whatever quality is given up for them.
            target_fps=target if target is None or source.fps is None else min(target, source.fps),
            stream_batch=settings.stream_batch,
        )
        self._captured: Prefetcher[FramePacket] | None = None
        self._styled: Prefetcher[FramePacket] | None = None
        self._lost = False
        self._resumed_s = -math.inf  # when the first frame after a gap was captured
        self._waiting: FramePacket | None = None  # not due yet
        self._last: tuple[float, float] | None = None  # when the last packet was captured, and due
        self._presenting = Lock()

    def start(self) -> None:
        """Start capturing and stylizing, once. Raises UsageError the second time."""
        if self._styled is not None:
            raise UsageError("this session has started already; make a new Session for another run")
        length, overlap = self._window or (0, 0)
        self._captured = Prefetcher(
            self._capture(),
            room=max(1, length - overlap),
            latest=True,
            name="capture",
            dropped=lambda _: self.metrics.dropped(),
        )
        # Room for a window beside the one that is being presented: ending a session then loses neither.
        self._styled = Prefetcher(
            self._stylize(self._captured), room=max(_STYLED_AHEAD, 2 * length), name="engines"
        )

    def _capture(self) -> Iterator[FramePacket]:
        """The first thread: frames as the source delivers them; those of a pause are discarded."""
        last_s = math.inf
        while (taken := self.source.read()) is not None:
            self.metrics.captured(taken.at_s)
            if not self.paused:
                if taken.at_s - last_s > _GAP_S:  # a pause, or a lost camera
                    self._resumed_s = taken.at_s
                last_s = taken.at_s
                frame = np.ascontiguousarray(taken.frame[:, ::-1]) if self.mirror else taken.frame
                yield FramePacket(frame, taken.at_s, taken.index)

    def _stylize(self, captured: Prefetcher[FramePacket]) -> Iterator[FramePacket]:
        """The second thread: every packet with its result."""
        for packet in self.stream.run(self._fresh(captured), lambda: captured.has_next):
            yield packet
            yield from self._control.after(packet, self._now())

    def _fresh(self, captured: Iterator[FramePacket]) -> Iterator[FramePacket]:
        """Packets as they enter the engines. After a gap, frames still inside are dropped."""
        last_s = math.inf
        for packet in captured:
            if last_s < self._resumed_s <= packet.captured_s:
                self.metrics.dropped(self.stream.discard())
            last_s = packet.captured_s
            packet.stages_ms["wait"] = (self._now() - packet.captured_s) * 1000
            yield packet

    def get(self, timeout_s: float) -> FramePacket | None:
        """The next styled packet, or None if none came in time.

        Raises errors of the engines, and UsageError while another thread waits here: frames come in order.
        """
        if not self._presenting.acquire(blocking=False):
            raise UsageError("another thread presents this session; take its packets in one thread")
        try:
            lost = "lost" in self.source.status
            if lost != self._lost:  # a lost camera stops the metrics' clock until its next frame
                (self.metrics.pause if lost else self.metrics.resume)("source")
            self._lost = lost
            packet = self._next(timeout_s)
            wait_s = -math.inf if packet is None else self._due_s(packet) - self._now()
            if wait_s > 0:
                time.sleep(min(wait_s, timeout_s))
            return None if packet is None or wait_s > timeout_s else self._handed(packet, self._now())
        finally:
            self._presenting.release()

    def rest(self) -> Iterator[tuple[FramePacket, float]]:
        """When presenting ends: what the last windows have painted, and when it would have been presented.

        Nothing without windows, whose results come singly.
        """
        while self._window is not None and (packet := self._next(0)) is not None:
            at_s = max(self._now(), self._due_s(packet))
            yield self._handed(packet, at_s), at_s

    def _next(self, timeout_s: float) -> FramePacket | None:
        if self._waiting is None and self._styled is not None:
            self._waiting = self._styled.get(timeout_s)
        return self._waiting

    def _handed(self, packet: FramePacket, at_s: float) -> FramePacket:
        self._waiting, self._last = None, (packet.captured_s, at_s)
        return packet

    def _due_s(self, packet: FramePacket) -> float:
        """When to present it: results of a window come together, but were not captured together."""
        if self._window is None or self._last is None:
            return -math.inf
        captured_s, presented_s = self._last
        if captured_s < self._resumed_s <= packet.captured_s:
            return -math.inf
        return presented_s + _CATCH_UP * (packet.captured_s - captured_s)

    def presented(self, packet: FramePacket) -> None:
        """Count a packet whose frame is now on the screen."""
        self.metrics.presented(packet)

    @property
    def over(self) -> bool:
        """The source has ended and every frame was handed out, or the session is closed."""
        return self._styled is None or (self._styled.over and self._waiting is None)

    @property
    def notes(self) -> deque[str]:
        """Changes of quality, one line each; take them from the left."""
        return self._control.notes

    def pause(self, paused: bool) -> None:
        """Pause, or resume."""
        self.paused = paused
        (self.metrics.pause if paused else self.metrics.resume)("pause")

    @property
    def keep_colours(self) -> bool:
        """Whether frames keep their colours; may be set at any time, for the next frame."""
        return self.stream.keeps_colours

    @keep_colours.setter
    def keep_colours(self, keep: bool) -> None:
        self.stream.keep_colours = keep

    def lines(self) -> list[str]:
        """The overlay: a label, a tab and its value in each line."""
        recent, quality, settings = self.metrics.recent(), self.stream.quality, self.settings
        latency = ""
        if recent.latency_p50_ms is not None and recent.latency_p95_ms is not None:
            latency = f"{recent.latency_p50_ms:.0f} ms  p95 {recent.latency_p95_ms:.0f}"
        modes = {
            "stream batch": settings.stream_batch,
            f"windows of {self._window[0] if self._window else 0}": self._window is not None,
            f"temporal {settings.temporal}": settings.temporal != "off",
            f"target {settings.target_fps or 0:g} fps": settings.target_fps is not None,
        }
        figures = {
            "fps": "" if recent.fps is None else f"{recent.fps:.1f}",
            "latency": latency,
            "dropped": _per_second(recent.drops_per_s),
            "skipped": _per_second(recent.skips_per_s) if settings.similar is not None else "",
            "style": self.mixer.title(self._now()),
            "strength": "" if self.mixer.strength == 1 else f"{self.mixer.strength:.2f}",
            "strokes": "" if self.mixer.stroke_size == 1 else f"{self.mixer.stroke_size:g}",
            "colours": "kept" if self.keep_colours else "",
            "steps": "" if quality is None else f"{quality.steps} at {quality.size[1]}x{quality.size[0]}",
            "mode": ", ".join(mode for mode, is_on in modes.items() if is_on),
        }
        return [f"{label}\t{value}" for label, value in figures.items() if value]

    def report(self) -> dict[str, Any]:
        """The metrics so far."""
        best = self._control.best
        self.metrics.settings |= {
            "size": None if best is None else [best.size[1], best.size[0]],
            "source_faults": self.source.faults,
        }
        return self.metrics.report()

    def close(self) -> None:
        """End both threads; the engines may be closed afterwards. Time spent here does not count."""
        self.metrics.pause("end")
        self.source.close()
        self.report()  # completes what `metrics` reports from now on
        prefetchers = [each for each in (self._styled, self._captured) if each is not None]
        for prefetcher in prefetchers:
            prefetcher.close()
        for prefetcher in prefetchers:
            prefetcher.close(_END_S)
        self._waiting = None

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _described(stylizer: Stylizer, source: Source, settings: Settings) -> dict[str, Any]:
    """The ``settings`` of the report."""
    return {
        "bundle": stylizer.bundle.name,
        "digest": stylizer.bundle.digest,
        "backend": stylizer.backend,
        "steps": stylizer.steps,
        "guidance": [stylizer.guidance.mode, stylizer.guidance.scale],
        "stream_batch": settings.stream_batch,
        "window": stylizer.bundle.window,
        "temporal": settings.temporal,
        "similar": settings.similar,
        "target_fps": settings.target_fps,
        "source": source.name,
        "source_fps": source.fps,
    }


def _per_second(rate: float) -> str:
    return "0" if rate < 0.05 else f"{rate:.1f}/s"
