"""Metrics of a live session, by the latency contract, as one JSON object.

docs/live.md ("The latency contract") defines every metric. All times are read from one clock
(`time.perf_counter`). A frame is **captured** when the source has handed it over, decoded, and **presented**
when the call that showed it (window, virtual camera, or none) has returned. The clock of running time starts
with the first presented frame, so opening and warm-up do not count, and stops while the session is paused or
the source is lost. A metric without measurements is None, never NaN. Memory use does not grow with time.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import ceil, floor
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from std_rt.core.machine import peak_memory_mb
from std_rt.streaming.frame_stream import FramePacket

__all__ = ["SCHEMA", "Counts", "Metrics", "Recent", "rounded"]

SCHEMA = 1
"""Version of the report; changes if the meaning of a name does."""

_SOURCE = "source"
_STALL = 2.0  # times the running median
_MEDIAN_OVER = 60  # intervals
_MEDIAN_FROM = 5
_RECENT_S = 2.0
_RECENT_KEPT = 1024  # frames: enough for 2 s at 500 fps
_COMMANDS_KEPT = 64

# A histogram of durations in constant memory: counts by bin. Bin 0 is below 0.001 ms; the others grow by 1 %
# up to 1e7 ms (three hours), so a percentile is off by half a bin, 0.5 %, at most.
Histogram = NDArray[np.int64]
_LEAST_MS, _MOST_MS, _GROWTH = 1e-3, 1e7, 1.01


def _bin(ms: float) -> int:
    if ms < _LEAST_MS:
        return 0
    return 1 + int(math.log(min(ms, _MOST_MS) / _LEAST_MS) / math.log(_GROWTH))


def _empty() -> Histogram:
    return np.zeros(_bin(_MOST_MS) + 1, np.int64)


def _percentile(histogram: Histogram, share: float) -> float | None:
    """As ``numpy.percentile`` of the durations, in ms, ``share`` 0..100; None if there are none."""
    up_to = np.cumsum(histogram)
    if not up_to[-1]:
        return None
    rank = int(up_to[-1] - 1) * share / 100
    bins = (int(np.searchsorted(up_to, at, "right")) for at in (floor(rank), ceil(rank)))
    low, high = (min(_MOST_MS, _LEAST_MS * _GROWTH ** (i - 0.5)) if i else 0.0 for i in bins)
    return low + (high - low) * (rank - floor(rank))


@dataclass
class Counts:
    """Everything counted so far."""

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
    sharpness: float = 0.0  # sum, over the same frames
    switched_ms: float = 0.0  # the last style switch
    latency: Histogram = field(default_factory=_empty)
    interval: Histogram = field(default_factory=_empty)
    switches: Histogram = field(default_factory=_empty)
    stages: dict[str, Histogram] = field(default_factory=dict)
    levels_s: dict[str, float] = field(default_factory=dict)

    def add_time(self, seconds: float, quality: str) -> None:
        """Count running time at a quality."""
        self.seconds += seconds
        self.levels_s[quality] = self.levels_s.get(quality, 0.0) + seconds

    def since(self, before: Counts) -> Counts:
        """What was counted after ``before``, an earlier copy."""
        added = {
            each.name: _added(getattr(self, each.name), getattr(before, each.name)) for each in fields(self)
        }
        return Counts(**{**added, "switched_ms": self.switched_ms})


def _added(after: Any, before: Any) -> Any:
    """The difference of two numbers, of two histograms, or of all values in two dictionaries."""
    if isinstance(after, dict):
        return {key: _added(value, before.get(key, 0)) for key, value in after.items()}
    return after - before if isinstance(after, np.ndarray) else max(0, after - before)


@dataclass(frozen=True)
class Recent:
    """The last two seconds, for the overlay; None if nothing was presented."""

    fps: float | None
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    drops_per_s: float
    skips_per_s: float


class _Moment(NamedTuple):
    """A presented frame (or an instant without one), with the totals up to it."""

    at_s: float
    latency_ms: float | None
    frames: int
    drops: int
    skips: int


class Metrics:
    """Counts the events of a session; any thread may call any method.

    One lock guards the counters, held for some 30 microseconds per frame or copy; percentiles are
    computed outside it.
    """

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, now: Callable[[], float] = time.perf_counter
    ) -> None:
        """``settings`` (size, steps, backend, bundle digest, ...) are reported as given.

        Raises TypeError or ValueError if they cannot be written as JSON.
        """
        self.settings = json.loads(json.dumps(dict(settings or {}), allow_nan=False))
        self._now = now
        self._lock = Lock()
        self._counts = Counts()
        self._begun_s = now()
        self._first_frame_s: float | None = None
        self._pauses: set[str] = set()  # their reasons
        self._quality = ""
        self._last_s: float | None = (
            None  # when the last frame was presented; None while the clock is stopped
        )
        self._last_captured_s = -math.inf
        self._intervals_ms: deque[float] = deque(maxlen=_MEDIAN_OVER)
        self._limit_ms = math.inf  # of an interval; above, it is a stall
        self._source_s: float | None = None  # when the last frame was captured
        self._source_gaps_s: deque[float] = deque(maxlen=16)  # when gaps of the source ended
        self._commands_s: deque[float] = deque(maxlen=_COMMANDS_KEPT)
        self._recent: deque[_Moment] = deque(maxlen=_RECENT_KEPT)

    # Called for every frame

    def captured(self, at_s: float) -> None:
        """The source delivered a frame; ``at_s`` is its packet's ``captured_s``."""
        with self._lock:
            if self._pauses:
                return
            self._counts.captured += 1
            before, self._source_s = self._source_s, at_s
            if before is not None and (at_s - before) * 1000 > self._limit_ms:
                self._source_gaps_s.append(at_s)

    def dropped(self, count: int = 1) -> None:
        """Captured frames will never be presented, because a newer one took their place."""
        with self._lock:
            if not self._pauses:
                self._counts.drops += count

    def presented(self, packet: FramePacket) -> None:
        """A frame was shown just now. The latency and stages of a skip are not counted."""
        at = self._now()
        latency_ms = None if packet.skipped else max(0.0, (at - packet.captured_s) * 1000)
        with self._lock:
            if self._pauses:  # it was in flight when the pause began
                return
            counts = self._counts
            counts.frames += 1
            if latency_ms is None:
                counts.skips += 1
            else:
                counts.latency[_bin(latency_ms)] += 1
                for stage, spent_ms in packet.stages_ms.items():
                    counts.stages.setdefault(stage, _empty())[_bin(spent_ms)] += 1
            self._run_clock(at, packet)
            self._close_commands(at, packet.style_s)
            self._recent.append(self._moment(at, latency_ms))
            while len(self._recent) > 2 and self._recent[1].at_s < at - _RECENT_S:
                self._recent.popleft()

    # Called now and then

    def style_asked(self, at_s: float | None = None) -> None:
        """A change of style was commanded, now or at ``at_s``, from one thread."""
        at = self._now() if at_s is None else at_s
        with self._lock:
            if not self._pauses:
                self._commands_s.append(at)

    def warped(self, error: float, sharpness: float) -> None:
        """The warping error of a presented frame, and its sharpness relative to the camera's picture.

        An error that is not finite (nothing to follow) is ignored.
        """
        if math.isfinite(error):
            with self._lock:
                self._counts.warped += 1
                self._counts.warping += error
                self._counts.sharpness += sharpness

    def quality(self, name: str) -> None:
        """Running time counts for this quality from now on."""
        with self._lock:
            self._quality = name

    def pause(self, reason: str = "pause") -> None:
        """Stop the clock until every reason was given to `resume`.

        The reason ``source`` is a lost camera: it stops the clock from the last captured frame on, since
        stalls after that are not the session's.
        """
        at = self._now()
        with self._lock:
            if reason == _SOURCE and self._source_s is not None:
                at = self._source_s
            self._pauses.add(reason)
            self._count_stall_under_way(self._counts, at)
            self._last_s = None
            self._commands_s.clear()

    def resume(self, reason: str = "pause") -> None:
        """Undo `pause` for the same reason; the clock starts again with the next presented frame."""
        with self._lock:
            self._pauses.discard(reason)
            self._source_s = None

    # Results

    def counts(self) -> Counts:
        """Everything so far, including the current interval if it is a stall already."""
        at = self._now()
        with self._lock:
            counts = self._counts.since(Counts())  # a copy
            self._count_stall_under_way(counts, at)
        return counts

    def recent(self) -> Recent:
        """The last two seconds (two frames at least); during a pause, those before it."""
        at = self._now()
        with self._lock:
            moments = list(self._recent)
            if self._is_stall(at):
                moments.append(self._moment(at, None))
        if not moments:
            return Recent(None, None, None, 0.0, 0.0)
        last = moments[-1]
        within = [moment for moment in moments if moment.at_s >= last.at_s - _RECENT_S]
        kept = within if len(within) > 1 else moments[-2:]
        latencies = sorted(each.latency_ms for each in kept if each.latency_ms is not None)
        p50, p95 = (
            latencies[round(share * (len(latencies) - 1))] if latencies else None for share in (0.5, 0.95)
        )
        first, span = kept[0], last.at_s - kept[0].at_s
        if not span:
            return Recent(None, p50, p95, 0.0, 0.0)
        return Recent(
            (last.frames - first.frames) / span,
            p50,
            p95,
            (last.drops - first.drops) / span,
            (last.skips - first.skips) / span,
        )

    def report(self) -> dict[str, Any]:
        """The contract, ready for JSON: schema, figures, settings."""
        return {"schema": SCHEMA, **self.figures(self.counts()), "settings": self.settings}

    def figures(self, counts: Counts) -> dict[str, Any]:
        """The metrics of these counts, rounded; None without measurements."""
        seconds, switches = counts.seconds, counts.switches
        count = int(switches.sum())
        processed = counts.intervals - counts.skipped_intervals
        return {
            "fps": rounded(counts.intervals / seconds if seconds else None, 2),
            "fps_processed": rounded(processed / seconds if seconds else None, 2),
            "latency_ms": _percentiles(counts.latency, 50, 95, 99),
            "interval_ms": _percentiles(counts.interval, 50, 95, 99),
            "stages_ms": {name: rounded(_percentile(all_, 50), 3) for name, all_ in counts.stages.items()},
            "frames": counts.frames,
            "skips": counts.skips,
            "captured": counts.captured,
            "drops": counts.drops,
            "stalls": counts.stalls,
            "source_stalls": counts.source_stalls,
            "seconds": rounded(seconds, 3),
            "style_switch_ms": {
                "count": count,
                **_percentiles(switches, 50, 95),
                "worst": rounded(_percentile(switches, 100), 2),
                "last": rounded(counts.switched_ms if count else None, 2),
            },
            "warping_error": rounded(counts.warping / counts.warped if counts.warped else None, 5),
            "sharpness": rounded(counts.sharpness / counts.warped if counts.warped else None, 3),
            "levels_s": {name: rounded(spent, 3) for name, spent in counts.levels_s.items() if name},
            "first_frame_s": rounded(self._first_frame_s, 2),
            "peak_memory_mb": rounded(peak_memory_mb(), 2),
        }

    # The lock is held

    def _run_clock(self, at: float, packet: FramePacket) -> None:
        """Count the interval that ends with this frame, or start the clock."""
        if self._last_s is not None:
            self._add_interval(at - self._last_s, packet)
        else:
            self._recent.clear()
            if self._first_frame_s is None:
                self._first_frame_s = at - self._begun_s
        self._last_s, self._last_captured_s = at, packet.captured_s

    def _add_interval(self, seconds: float, packet: FramePacket) -> None:
        counts = self._counts
        counts.intervals += 1
        counts.skipped_intervals += packet.skipped
        counts.add_time(seconds, self._quality)
        counts.interval[_bin(seconds * 1000)] += 1
        if seconds * 1000 > self._limit_ms:
            counts.stalls += 1
            counts.source_stalls += any(
                self._last_captured_s < end <= packet.captured_s for end in self._source_gaps_s
            )
        self._intervals_ms.append(seconds * 1000)
        if len(self._intervals_ms) >= _MEDIAN_FROM:
            self._limit_ms = _STALL * statistics.median(self._intervals_ms)

    def _close_commands(self, at: float, style_s: float) -> None:
        """Count the newest command this frame shows; older ones were superseded."""
        shown = [asked for asked in self._commands_s if asked <= style_s]
        if shown:
            waited_ms = (at - shown[-1]) * 1000
            self._counts.switches[_bin(waited_ms)] += 1
            self._counts.switched_ms = waited_ms
        for _ in shown:
            self._commands_s.popleft()

    def _is_stall(self, at: float) -> bool:
        """Whether the current interval is a stall already."""
        return self._last_s is not None and (at - self._last_s) * 1000 > self._limit_ms

    def _count_stall_under_way(self, counts: Counts, at: float) -> None:
        if self._last_s is not None and self._is_stall(at):
            counts.stalls += 1
            counts.add_time(at - self._last_s, self._quality)

    def _moment(self, at: float, latency_ms: float | None) -> _Moment:
        counts = self._counts
        return _Moment(at, latency_ms, counts.frames, counts.drops, counts.skips)


def _percentiles(histogram: Histogram, *shares: int) -> dict[str, float | None]:
    return {f"p{share}": rounded(_percentile(histogram, share), 2) for share in shares}


def rounded(value: float | None, digits: int) -> float | None:
    """``value`` with so many digits; None stays None."""
    return None if value is None else round(value, digits)
