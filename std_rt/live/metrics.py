"""The latency contract: what a live session delivered, as one JSON object.

Times are of one clock (`time.perf_counter`). A frame is **captured** when the source has handed it over,
decoded, and **presented** when the call that showed it (window, virtual camera, or none) has returned: what
the camera and the screen add is not seen from here.

fps             presented frames a second of running time
fps_processed   the same without the skips: pictures that came out of the engines
latency_ms      p50, p95, p99 from capture to present, of frames that went through the engines
interval_ms     p50, p95, p99 from one presented frame to the next
stages_ms       median of each stage over the frames that had it
frames          presented frames, skips included
skips           of them, those that show the result of an earlier frame because they hardly differ from it
captured        frames that the source gave, but for those during a pause, which are no drops either
drops           captured frames that were never presented: a newer one took their place in a queue. What is
                still on its way at the end, and what a camera loses before it hands over, is no drop
stalls          intervals over 2x the running median (of the 60 before it; judged once there are 5)
source_stalls   of them, those in which the source gave no frame for as long
seconds         running time: begins with the first presented frame, so that opening and warm-up do not
                count, and stands while the session is paused or the source is lost. It goes on with the
                first frame presented after that; a stall that is under way at the end or when a pause
                begins is counted
first_frame_s   from the making of the meter to the first presented frame
style_switch_ms from the command to the first presented frame whose style was looked up after it (of a
                crossfade: the frame it begins with): count, p50, p95, worst, last. A command that was
                overtaken by another before any frame had it, or that met a pause, is not counted
warping_error   mean of the figures given to `Meter.warped`; None where there are none
levels_s        running time at each level of the governor (or the only one)
peak_memory_mb  largest resident size of the process so far

A figure that nothing was measured for is None, never NaN. Percentiles come from histograms: within 0.5 %.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from threading import Lock
from typing import Any

from std_rt.core.machine import peak_memory_mb
from std_rt.live.histogram import Histogram

__all__ = ["SCHEMA", "Meter", "Recent", "Snapshot", "figures"]

SCHEMA = 1
"""Of the report; changes when the meaning of a name does."""

_SOURCE = "source"
_STALL = 2.0  # times the running median
_MEDIAN_OVER = 60  # intervals
_MEDIAN_FROM = 5
_RECENT_S = 2.0
_RECENT_KEPT = 1024  # frames: enough for 2 s at 500 fps
_COMMANDS_KEPT = 64


@dataclass
class Snapshot:
    """Everything counted up to an instant; the difference of two is what happened between them."""

    frames: int = 0
    skips: int = 0
    captured: int = 0
    drops: int = 0
    intervals: int = 0
    skipped_intervals: int = 0  # intervals that end with a skip
    seconds: float = 0.0
    stalls: int = 0
    source_stalls: int = 0
    warped: int = 0
    warping: float = 0.0  # sum
    switched_ms: float | None = None  # the last style switch
    latency: Histogram = field(default_factory=Histogram)
    interval: Histogram = field(default_factory=Histogram)
    switches: Histogram = field(default_factory=Histogram)
    stages: dict[str, Histogram] = field(default_factory=dict)
    levels_s: dict[str, float] = field(default_factory=dict)

    def add_time(self, seconds: float, level: str) -> None:
        """Running time went by at a level."""
        self.seconds += seconds
        self.levels_s[level] = self.levels_s.get(level, 0.0) + seconds

    def copy(self) -> Snapshot:
        """The same figures, apart from this one."""
        return replace(
            self,
            latency=self.latency.copy(),
            interval=self.interval.copy(),
            switches=self.switches.copy(),
            stages={name: own.copy() for name, own in self.stages.items()},
            levels_s=dict(self.levels_s),
        )

    def since(self, before: Snapshot) -> Snapshot:
        """What was counted after ``before``, a copy of this one made earlier."""
        numbers = {
            each.name: max(0, getattr(self, each.name) - getattr(before, each.name))
            for each in fields(self)
            if each.type in ("int", "float")
        }
        switches = self.switches.since(before.switches)
        return Snapshot(
            **numbers,
            switched_ms=self.switched_ms if switches.total else None,
            latency=self.latency.since(before.latency),
            interval=self.interval.since(before.interval),
            switches=switches,
            stages={name: own.since(before.stages.get(name)) for name, own in self.stages.items()},
            levels_s={name: s - before.levels_s.get(name, 0.0) for name, s in self.levels_s.items()},
        )


@dataclass(frozen=True)
class Recent:
    """The last two seconds, for the overlay; None where nothing was presented in them."""

    fps: float | None
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    drops_per_s: float
    skips_per_s: float


@dataclass(frozen=True)
class _Presented:
    """A presented frame, or an instant without one, as `Recent` needs it; the counts are totals."""

    at_s: float
    latency_ms: float | None
    drops: int
    skips: int
    shown: bool = True


class Meter:
    """Counts what a session does; any thread may call any method.

    One lock guards the counters, held for some 30 microseconds a frame or a snapshot; percentiles are
    computed outside it.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        now: Callable[[], float] = time.perf_counter,
        peak_memory: Callable[[], float | None] = peak_memory_mb,
    ) -> None:
        """``settings`` (size, steps, backend, bundle digest, ...) are reported as given.

        Raises TypeError or ValueError where they are nothing for JSON.
        """
        self.settings = json.loads(json.dumps(dict(settings or {}), allow_nan=False))
        self._now, self._peak_memory = now, peak_memory
        self._lock = Lock()
        self._counts = Snapshot()
        self._begun_s = now()
        self._first_frame_s: float | None = None
        self._standing = True  # the clock of `seconds`; the next presented frame sets it going
        self._reasons: set[str] = set()
        self._level = ""
        self._last_s = 0.0  # when the last frame was presented, and when it was captured
        self._last_captured_s = -math.inf
        self._intervals_ms: deque[float] = deque(maxlen=_MEDIAN_OVER)
        self._limit_ms = math.inf
        self._source_s: float | None = None
        self._source_gaps_s: deque[float] = deque(maxlen=16)  # when gaps of the source ended
        self._commands: deque[tuple[float, float]] = deque(maxlen=_COMMANDS_KEPT)
        self._recent: deque[_Presented] = deque(maxlen=_RECENT_KEPT)

    # Called for every frame

    def captured(self, at_s: float) -> None:
        """The source has given a frame; ``at_s`` is what `presented` will get as ``captured_s``."""
        with self._lock:
            if self._reasons:
                return
            self._counts.captured += 1
            before, self._source_s = self._source_s, at_s
            if before is not None and (at_s - before) * 1000 > self._limit_ms:
                self._source_gaps_s.append(at_s)

    def dropped(self, count: int = 1) -> None:
        """Captured frames that will not be presented, for a newer one has taken their place."""
        with self._lock:
            if not self._reasons:
                self._counts.drops += count

    def presented(
        self,
        captured_s: float,
        *,
        painted_s: float | None = None,
        skipped: bool = False,
        stages_ms: Mapping[str, float] | None = None,
        at_s: float | None = None,
    ) -> None:
        """A new frame has been shown. ``painted_s``: when its style was looked up.

        ``skipped``: it shows the result of an earlier frame; its stages and latency are not counted.
        """
        at = self._now() if at_s is None else at_s
        latency_ms = None if skipped else max(0.0, (at - captured_s) * 1000)
        with self._lock:
            if self._reasons:  # on its way when the pause began
                return
            self._counts.frames += 1
            if latency_ms is None:
                self._counts.skips += 1
            else:
                self._counts.latency.add(latency_ms)
                self._add_stages(stages_ms or {})
            self._run_clock(at, captured_s, skipped)
            if painted_s is not None:
                self._close_commands(at, painted_s)
            self._recent.append(_Presented(at, latency_ms, self._counts.drops, self._counts.skips))
            while len(self._recent) > 2 and self._recent[1].at_s < at - _RECENT_S:
                self._recent.popleft()

    def stages(self, stages_ms: Mapping[str, float]) -> None:
        """What stages of one frame took that `presented` was not told, such as ``present`` itself."""
        with self._lock:
            self._add_stages(stages_ms)

    # Called now and then

    def style_asked(self, at_s: float | None = None, *, from_s: float | None = None) -> None:
        """Another style was commanded; ``from_s``: when frames could have it, where that is later."""
        at = self._now() if at_s is None else at_s
        with self._lock:
            if not self._reasons:
                self._commands.append((at, at if from_s is None else from_s))

    def warped(self, error: float) -> None:
        """A warping error of presented frames; one that is not finite (nothing to follow) is ignored."""
        if math.isfinite(error):
            with self._lock:
                self._counts.warped += 1
                self._counts.warping += error

    def level(self, name: str) -> None:
        """Running time counts for this level from now on."""
        with self._lock:
            self._level = name

    def pause(self, reason: str = "pause", *, at_s: float | None = None) -> None:
        """The clock stands, until `resume` of every reason. ``at_s``: since when, now or before.

        ``source`` is a camera that is lost: without ``at_s`` it is so since its last frame was captured, for
        what follows that is no stall of ours.
        """
        at = self._now() if at_s is None else at_s
        with self._lock:
            if at_s is None and reason == _SOURCE and self._source_s is not None:
                at = self._source_s
            self._reasons.add(reason)
            if not self._standing:
                _add_open(self._counts, at - self._last_s, self._limit_ms, self._level)
            self._standing = True
            self._commands.clear()

    def resume(self, reason: str = "pause") -> None:
        """Undo `pause` of the same reason; the clock goes on with the next presented frame."""
        with self._lock:
            self._reasons.discard(reason)
            self._source_s = None

    # Asked

    def snapshot(self) -> Snapshot:
        """Everything so far, the interval under way included where it is a stall already."""
        at = self._now()
        with self._lock:
            counts = self._counts.copy()
            if not self._standing:
                _add_open(counts, at - self._last_s, self._limit_ms, self._level)
        return counts

    def recent(self) -> Recent:
        """The last two seconds; during a pause, those before it."""
        at = self._now()
        with self._lock:
            frames = list(self._recent)
            stalled = not self._standing and (at - self._last_s) * 1000 > self._limit_ms
            drops, skips = self._counts.drops, self._counts.skips
        if stalled:
            frames.append(_Presented(at, None, drops, skips, shown=False))
        return _recent(frames)

    def report(self) -> dict[str, Any]:
        """The contract, ready for JSON: schema, figures, settings."""
        return {"schema": SCHEMA, **self.figures(self.snapshot()), "settings": self.settings}

    def figures(self, counted: Snapshot) -> dict[str, Any]:
        """`figures` of what was counted, with what is of the process: first frame and memory."""
        own = {"first_frame_s": self._first_frame_s, "peak_memory_mb": self._peak_memory()}
        return figures(counted) | {name: _number(value, 2) for name, value in own.items()}

    # The lock is held

    def _add_stages(self, stages_ms: Mapping[str, float]) -> None:
        for name, value_ms in stages_ms.items():
            self._counts.stages.setdefault(name, Histogram()).add(value_ms)

    def _run_clock(self, at: float, captured_s: float, skipped: bool) -> None:
        """Count the interval that ends with this frame, or set the clock going."""
        if not self._standing:
            self._add_interval(at - self._last_s, captured_s, skipped)
        elif not self._reasons:
            self._standing = False
            self._recent.clear()
            if self._first_frame_s is None:
                self._first_frame_s = at - self._begun_s
        self._last_s, self._last_captured_s = at, captured_s

    def _add_interval(self, seconds: float, captured_s: float, skipped: bool) -> None:
        counts = self._counts
        counts.intervals += 1
        counts.skipped_intervals += skipped
        counts.add_time(seconds, self._level)
        counts.interval.add(seconds * 1000)
        if seconds * 1000 > self._limit_ms:
            counts.stalls += 1
            counts.source_stalls += any(
                self._last_captured_s < end <= captured_s for end in self._source_gaps_s
            )
        self._intervals_ms.append(seconds * 1000)
        if len(self._intervals_ms) >= _MEDIAN_FROM:
            self._limit_ms = _STALL * statistics.median(self._intervals_ms)

    def _close_commands(self, at: float, painted_s: float) -> None:
        """The newest command that this frame has was waited for so long; older ones were overtaken."""
        shown = [asked for asked, begun in self._commands if begun <= painted_s]
        if not shown:
            return
        newest = max(shown)
        waited_ms = (at - newest) * 1000
        self._counts.switches.add(waited_ms)
        self._counts.switched_ms = waited_ms
        later = [command for command in self._commands if command[1] > painted_s]
        self._commands = deque(later, maxlen=_COMMANDS_KEPT)


def figures(counted: Snapshot) -> dict[str, Any]:
    """The figures of the module docstring that counts give, rounded, None where nothing was measured."""
    seconds, switches = counted.seconds, counted.switches
    processed = counted.intervals - counted.skipped_intervals
    return {
        "fps": _number(counted.intervals / seconds if seconds else None, 2),
        "fps_processed": _number(processed / seconds if seconds else None, 2),
        "latency_ms": _percentiles(counted.latency, 50, 95, 99),
        "interval_ms": _percentiles(counted.interval, 50, 95, 99),
        "stages_ms": {name: _number(own.percentile(50), 3) for name, own in counted.stages.items()},
        "frames": counted.frames,
        "skips": counted.skips,
        "captured": counted.captured,
        "drops": counted.drops,
        "stalls": counted.stalls,
        "source_stalls": counted.source_stalls,
        "seconds": _number(seconds, 3),
        "style_switch_ms": {
            "count": switches.total,
            **_percentiles(switches, 50, 95),
            "worst": _number(switches.percentile(100), 2),
            "last": _number(counted.switched_ms, 2),
        },
        "warping_error": _number(counted.warping / counted.warped if counted.warped else None, 5),
        "levels_s": {name: _number(spent, 3) for name, spent in counted.levels_s.items() if name},
    }


def _add_open(counts: Snapshot, seconds: float, limit_ms: float, level: str) -> None:
    """Count an interval that has not ended, where it is a stall already; else nothing."""
    if seconds * 1000 > limit_ms:
        counts.stalls += 1
        counts.add_time(seconds, level)


def _recent(frames: Sequence[_Presented]) -> Recent:
    """Over the frames of the last two seconds, two at least; rates are from the first to the last of them."""
    first = sum(frame.at_s < frames[-1].at_s - _RECENT_S for frame in frames)
    kept = frames[min(first, max(0, len(frames) - 2)) :]
    latencies = sorted(frame.latency_ms for frame in kept if frame.latency_ms is not None)
    p50, p95 = (_ranked(latencies, share) for share in (0.5, 0.95))
    span = kept[-1].at_s - kept[0].at_s if kept else 0.0
    if not span:
        return Recent(None, p50, p95, 0.0, 0.0)
    return Recent(
        fps=sum(frame.shown for frame in kept[1:]) / span,
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        drops_per_s=(kept[-1].drops - kept[0].drops) / span,
        skips_per_s=(kept[-1].skips - kept[0].skips) / span,
    )


def _ranked(ordered: Sequence[float], share: float) -> float | None:
    """The value at a share (0..1) of an ordered sequence, the nearest one."""
    return ordered[round((len(ordered) - 1) * share)] if ordered else None


def _percentiles(histogram: Histogram, *shares: int) -> dict[str, float | None]:
    return {f"p{share}": _number(histogram.percentile(share), 2) for share in shares}


def _number(value: float | None, digits: int) -> float | None:
    """Rounded; None where there is none, or it is nothing that JSON knows."""
    return None if value is None or not math.isfinite(value) else round(value, digits)
