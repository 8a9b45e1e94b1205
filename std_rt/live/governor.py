"""The governor: maintains a frame rate by stepping down a ladder of qualities, and up again when possible.

`ladder` lists the qualities (size and steps), `Governor` chooses one from the times of the last
frames, `QualityControl` opens its engines and moves the stream there.

Steps down are quick, steps up are slow. A quality is left when the median frame of a short window misses the
deadline, so single slow frames do not matter; it is returned to when its estimated cost fits with room to
spare. The relative cost of two qualities is learned at each switch between them, because other load on the
machine affects both equally; it decays to the given estimate, in case the load changed during the switch. A
step up that must be undone doubles the wait before the next one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from itertools import pairwise
from typing import Generic, TypeVar

from std_rt.core.errors import StdRtError, UsageError, counted
from std_rt.live.metrics import Metrics
from std_rt.pipeline.stylizer import Quality, Stylizer
from std_rt.streaming.frame_stream import FramePacket, FrameStream

__all__ = ["Governor", "QualityControl", "ladder"]

Q = TypeVar("Q", bound=Hashable)

_DOWN_AFTER_S, _UP_AFTER_S = 1.0, 5.0
_HEADROOM = 0.15  # share of the deadline that must be left over for a step up
_TOLERANCE = 1.03  # times the deadline: a smaller miss is invisible
_JUDGED_EVERY_S = 0.25
_FEWEST = 9  # frames in a window: four slow ones do not move their median
_FEWEST_ALL_LATE = 5  # enough if every one of them misses the deadline: frames may take seconds
_UNSETTLED = 2  # frames after a switch: of the quality before, or the first of new engines
_KEPT = 1024  # frames in the longer window
_GAP_S = 2.0  # without a frame: a pause, and the frames before it are forgotten
_GAP_FRAMES = 5.0  # or this many times the duration of a frame, if longer
_TRIAL_S = 30.0  # a step up that lasts this long was right
_LONGEST_WAIT_S = 120.0
_HALF_LIFE_S = 60.0  # of a learned ratio
_LEARNED_WITHIN_S = 10.0  # of the switch
_MOST_LEARNED = 2.0  # times the estimate, or one over it: beyond that, the load has changed

_SCALES = (0.75, 0.5, 0.375, 0.25)  # of the best size's sides
_STEPS_WHEN_SMALL = 2
_LEAST_PX = 128  # per side: smaller frames are unrecognizable
_MOST_QUALITIES = 8
_WORTH_IT = 0.9  # times the cost of the quality above: a smaller gain is not worth a switch
# Cost of a frame apart from the UNet, in UNet calls: the built-in model on OpenVINO at 256 px (0.7 to 0.9 in
# fp32, 0.6 in int8, from the speeds in docs/results.md). The governor learns the rest.
_BESIDES_THE_UNET = 0.8
_NOT_BUSY = frozenset({"wait", "present"})  # stages in which the engines' thread does nothing


def ladder(
    best: Quality, steps_allowed: Collection[int], multiple: int, min_px: int = _LEAST_PX
) -> dict[Quality, float]:
    """Up to 8 qualities from ``best`` down, each clearly cheaper than the one above, with relative costs.

    First fewer steps at the same size; then smaller sizes (the shorter side at least ``min_px`` and 128, both
    multiples of ``multiple``), at 2 steps and 1. Fewer steps cost some texture and keep the drawing, smaller
    sizes lose the drawing (faces first); and steps share their engines if sizes do not. The cost of
    ``best`` is 1. Raises ValueError if its steps are not allowed.
    """
    if best.steps not in steps_allowed:
        raise ValueError(f"{best.steps} steps are not among {sorted(steps_allowed)}")
    fewer = sorted((steps for steps in steps_allowed if steps <= best.steps), reverse=True)
    small = [steps for steps in fewer if steps <= _STEPS_WHEN_SMALL] or fewer[-1:]
    proposed = [Quality(best.size, steps) for steps in fewer]
    for scale in _SCALES:
        h, w = (max(1, round(side * scale / multiple)) * multiple for side in best.size)
        if min(h, w) >= max(_LEAST_PX, min_px):
            proposed += [Quality((h, w), steps) for steps in small]
    kept = {proposed[0]: 1.0}
    lowest = 1.0
    for quality in proposed[1:]:
        cost = _cost(quality) / _cost(best)
        if cost <= _WORTH_IT * lowest and len(kept) < _MOST_QUALITIES:
            kept[quality] = lowest = cost
    return kept


def _cost(quality: Quality) -> float:
    return quality.size[0] * quality.size[1] * (_BESIDES_THE_UNET + quality.steps)


class Governor(Generic[Q]):
    """Decides for one stream, in one thread; qualities are only compared.

        wanted = governor.observe(busy_ms, now)     # after each frame that went through the engines
        if wanted is not None: ...                  # open its engines, then governor.switched(wanted, now)

    ``quality`` is the one in use, ``asked`` the one asked for and not yet switched to.
    """

    def __init__(self, target_fps: float, costs: Mapping[Q, float]) -> None:
        """``costs``: the qualities, best first, each with the relative cost of a frame (any unit, falling).

        Raises UsageError for a target that is not a positive number, ValueError for costs that do not fall.
        """
        if not 0 < target_fps < math.inf:
            raise UsageError(f"the target frame rate must be a positive number, got {target_fps:g}")
        if any(a < b for a, b in pairwise(costs.values())) or not min(costs.values(), default=0) > 0:
            raise ValueError(f"costs must fall and stay above 0, got {list(costs.values())}")
        self._deadline_ms = 1000 / target_fps
        self._qualities, self._costs = list(costs), dict(costs)
        self.quality: Q = self._qualities[0]
        self.asked: Q | None = None
        self._learned: dict[tuple[Q, Q], tuple[float, float]] = {}  # log of cost over estimate, and when
        self._went_up_s, self._undone = -math.inf, False
        self._wait_s, self._up_from_s = _UP_AFTER_S, -math.inf
        self._left: tuple[Q, float, float] | None = None  # quality before, its median busy ms, and when
        self._unsettled, self._judged_s = 0, -math.inf
        self._seen: deque[tuple[float, float]] = deque(maxlen=_KEPT)  # (when, busy ms)
        self._since_s = math.inf  # when the frames of this quality, without a gap, began

    def observe(self, busy_ms: float, now: float) -> Q | None:
        """Record how long a frame kept the engines busy; returns another quality if it is time to switch.

        Nothing more is asked for until `switched` or `refused`. Leave out skipped frames.
        """
        if self._unsettled:
            self._unsettled -= 1
            return None
        self._see(busy_ms, now)
        if self.asked is not None or not self._can_judge(now):
            return None
        median = statistics.median(self._window(_DOWN_AFTER_S, now))
        self._learn(median, now)
        is_late = median > _TOLERANCE * self._deadline_ms
        self.asked = self._worse(median, now) if is_late else self._better(now)
        return self.asked

    def switched(self, quality: Q, now: float) -> None:
        """Frames run at ``quality`` from now on. Raises ValueError for one that is not on the ladder."""
        is_up = self._qualities.index(quality) < self._qualities.index(self.quality)
        busy = self._window(_DOWN_AFTER_S, now)
        self._left = (self.quality, statistics.median(busy), now) if busy else None
        if is_up:
            if not self._undone:
                self._wait_s = _UP_AFTER_S
            self._went_up_s, self._undone = now, False
        elif now - self._went_up_s >= _TRIAL_S:
            self._wait_s = _UP_AFTER_S
        else:  # it undoes a step up: the next one waits longer
            self._wait_s, self._undone = min(2 * self._wait_s, _LONGEST_WAIT_S), True
            self._up_from_s = now + self._wait_s
        self.quality, self.asked, self._unsettled = quality, None, _UNSETTLED
        self._forget()

    def refused(self, quality: Q) -> None:
        """``quality`` cannot be used (its engines do not open): never return it again."""
        self._qualities.remove(quality)
        self.asked = None

    def _see(self, busy_ms: float, now: float) -> None:
        seen = self._seen
        if seen and now - seen[-1][0] > max(_GAP_S, _GAP_FRAMES * busy_ms / 1000):
            self._forget()
        if not seen:
            self._since_s = now
        seen.append((now, busy_ms))
        while len(seen) > _FEWEST and seen[0][0] < now - max(_UP_AFTER_S, _DOWN_AFTER_S):
            seen.popleft()

    def _forget(self) -> None:
        self._seen.clear()
        self._since_s, self._judged_s = math.inf, -math.inf

    def _can_judge(self, now: float) -> bool:
        """Whether enough frames were seen, and the last judgement is not a moment ago."""
        if now < max(self._since_s + _DOWN_AFTER_S, self._judged_s + _JUDGED_EVERY_S):
            return False
        if len(self._seen) < _FEWEST:
            all_late = all(busy > _TOLERANCE * self._deadline_ms for _, busy in self._seen)
            if len(self._seen) < _FEWEST_ALL_LATE or not all_late:
                return False
        self._judged_s = now
        return True

    def _window(self, seconds: float, now: float) -> list[float]:
        """Busy times of the last ``seconds``, and at least the last few, in ms."""
        recent = [busy for at, busy in self._seen if at >= now - seconds]
        return recent if len(recent) >= _FEWEST else [busy for _, busy in self._seen][-_FEWEST:]

    def _worse(self, median: float, now: float) -> Q | None:
        """The best quality below this one that is estimated to meet the deadline, or the last."""
        below = self._qualities[self._qualities.index(self.quality) + 1 :]
        fitting = (quality for quality in below if median * self._ratio(quality, now) <= self._deadline_ms)
        return next(fitting, below[-1] if below else None)

    def _better(self, now: float) -> Q | None:
        """The best quality above this one that fits with room to spare, after the wait for it."""
        if now < self._up_from_s or now - self._since_s < _UP_AFTER_S:
            return None
        window = sorted(self._window(_UP_AFTER_S, now))
        busy = window[int(0.8 * (len(window) - 1))]
        above = self._qualities[: self._qualities.index(self.quality)]
        room = (1 - _HEADROOM) * self._deadline_ms
        return next((quality for quality in above if busy * self._ratio(quality, now) <= room), None)

    def _ratio(self, quality: Q, now: float) -> float:
        """Estimated cost of ``quality`` over that of this one; a better one never costs less."""
        ratio = self._costs[quality] / self._costs[self.quality]
        log, at_s = self._learned.get((self.quality, quality), (0.0, now))
        ratio *= math.exp(log * 0.5 ** ((now - at_s) / _HALF_LIFE_S))
        is_above = self._qualities.index(quality) < self._qualities.index(self.quality)
        return max(1.0, ratio) if is_above else min(1.0, ratio)

    def _learn(self, median: float, now: float) -> None:
        """Relate the first median at a quality to the last one at the quality before."""
        left, self._left = self._left, None
        if left is None:
            return
        before, before_ms, left_s = left
        if now - left_s > _LEARNED_WITHIN_S or not min(median, before_ms) > 0:
            return
        estimate = self._costs[self.quality] / self._costs[before]
        most = math.log(_MOST_LEARNED)
        log = max(-most, min(most, math.log(median / before_ms / estimate)))
        self._learned[before, self.quality] = log, now
        self._learned[self.quality, before] = -log, now


class QualityControl:
    """Moves a stream to the quality its governor asks for, as soon as the engines of that quality are open.

    ``notes``: changes, one line each, to be taken from the left. ``best``: the quality of the current frames
    without a governor; None before the first frame.
    """

    def __init__(
        self,
        stylizer: Stylizer,
        stream: FrameStream,
        metrics: Metrics,
        *,
        target_fps: float | None,
        stream_batch: bool,
    ) -> None:
        """``target_fps`` None: stay at the best quality."""
        self._stylizer, self._stream, self._metrics = stylizer, stream, metrics
        self._target_fps, self._stream_batch = target_fps, stream_batch
        self._governor: Governor[Quality] | None = None
        self.best: Quality | None = None
        self.notes: deque[str] = deque()

    def after(self, packet: FramePacket, now: float) -> Iterator[FramePacket]:
        """Record a finished frame and change the quality if necessary; yields packets that were inside."""
        quality, best = self._stream.quality, self._stream.usual
        if quality is None or best is None:
            return
        if best != self.best:  # the first frame, or the camera has changed its size
            self._begin(best)
        if self._governor is None or packet.skipped:
            return
        busy_ms = sum(spent for stage, spent in packet.stages_ms.items() if stage not in _NOT_BUSY)
        wanted = self._governor.observe(busy_ms, now)
        if wanted is not None:
            self._stylizer.prepare_qualities([quality, wanted], stream_batch=self._stream_batch)
        if self._governor.asked is not None:
            yield from self._switch(self._governor, self._governor.asked, now)

    def _begin(self, best: Quality) -> None:
        self.best = best
        self._metrics.quality(_name(best))
        if self._target_fps is not None:
            bundle = self._stylizer.bundle
            costs = ladder(best, bundle.steps_allowed, bundle.size_multiple, bundle.size_range[0])
            self._governor = Governor(self._target_fps, costs)

    def _switch(self, governor: Governor[Quality], asked: Quality, now: float) -> Iterator[FramePacket]:
        """Switch once the engines are open; until then the quality stays."""
        try:
            if not self._stylizer.ready(asked, stream_batch=self._stream_batch):
                return
        except StdRtError as error:
            governor.refused(asked)
            self.notes.append(f"{_name(asked)} cannot be used: {error}")
            return
        yield from self._stream.switch(asked)
        governor.switched(asked, now)
        self._metrics.quality(_name(asked))
        self.notes.append(f"now {_name(asked)} to hold {self._target_fps:g} fps")


def _name(quality: Quality) -> str:
    h, w = quality.size
    return f"{w}x{h}, {counted(quality.steps, 'step')}"
