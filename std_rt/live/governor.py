"""Hold a rate: step down a ladder of levels when frames take too long, and up again when there is room.

    governor = Governor(15, levels, costs)
    wanted = governor.observe(busy_ms, now)     # after each frame that went through the engines
    if wanted is not None: ...                  # open its engines, then governor.switched(wanted, now)

Down is quick and up is slow. A level is left when the median frame of a short window misses the deadline, so
that single slow frames do not matter; it is gone back to when the estimated cost there fits with room to
spare. How costs of two levels relate is learned at each switch between them, for the load of the machine
changes both alike; what was learned fades to the caller's estimate, for the load may have changed during the
switch. A step up that has to be undone makes the next one wait twice as long.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from std_rt.core.errors import UsageError

__all__ = ["Governor"]

L = TypeVar("L", bound=Hashable)

_TOLERANCE = 1.03  # times the deadline: a miss that nobody sees is none
_JUDGED_EVERY_S = 0.25
_FEWEST = 9  # frames in a window: four slow ones do not move their median
_FEWEST_ALL_LATE = 5  # or so few, if every one of them misses the deadline: frames may take seconds
_UNSETTLED = 2  # frames after a switch: still of the level before, or the first of new engines
_KEPT = 1024  # frames in the longer window
_GAP_S = 2.0  # without a frame: a pause; what was before it is forgotten
_GAP_FRAMES = 5.0  # or so many times what a frame takes, where that is longer
_TRIAL_S = 30.0  # a step up that lasts so long was right
_LONGEST_WAIT_S = 120.0
_HALF_LIFE_S = 60.0  # of what was learned
_LEARNED_WITHIN_S = 10.0  # of the switch
_MOST_LEARNED = 2.0  # times the caller's estimate, or one over it: more is a load that has changed


@dataclass(frozen=True)
class _Left(Generic[L]):
    """What a frame took at the level that was left."""

    level: L
    busy_ms: float
    at_s: float


@dataclass(frozen=True)
class _Learned:
    """By how much (log) the costs of two levels differ from what the caller says."""

    log: float
    at_s: float


class Governor(Generic[L]):
    """One engine lane, one thread. Levels are the caller's values; here they are only compared."""

    def __init__(
        self,
        target_fps: float,
        levels: Sequence[L],
        costs: Sequence[float],
        *,
        down_after_s: float = 1.0,
        up_after_s: float = 5.0,
        headroom: float = 0.15,
    ) -> None:
        """``levels`` best first, each with its cost relative to the others (any unit, falling).

        ``headroom``: share of the deadline that must be left over for a step up. Raises UsageError for a
        target that is no positive number, ValueError for levels and costs that do not fit together.
        """
        if not 0 < target_fps < math.inf:
            raise UsageError(f"the target must be a number of frames a second above 0, got {target_fps:g}")
        falling = all(a >= b for a, b in pairwise(costs)) and min(costs, default=0) > 0
        if len(levels) != len(costs) or len(set(levels)) != len(levels) or not falling:
            raise ValueError(f"levels {list(levels)} need as many costs above 0 that fall, got {list(costs)}")
        self.target_fps, self.deadline_ms = target_fps, 1000 / target_fps
        self.switches = 0
        self.holds: bool | None = None
        """Whether the median frame meets the deadline; None where that is not known yet."""
        self._down_after_s, self._up_after_s, self._headroom = down_after_s, up_after_s, headroom
        self._levels, self._costs = list(levels), dict(zip(levels, costs, strict=True))
        self._level: L = levels[0]
        self._asked: L | None = None
        self._learned: dict[tuple[L, L], _Learned] = {}
        self._went_up_s, self._undone = -math.inf, False
        self._wait_s, self._up_from_s = up_after_s, -math.inf
        self._left: _Left[L] | None = None
        self._unsettled, self._judged_s = 0, -math.inf
        self._seen: deque[tuple[float, float]] = deque(maxlen=_KEPT)  # (when, busy ms)
        self._since_s = math.inf  # when the frames of this level, without a gap, began

    @property
    def level(self) -> L:
        """The level that frames run at."""
        return self._level

    @property
    def asked(self) -> L | None:
        """The level that was asked for and is not there yet."""
        return self._asked

    def observe(self, busy_ms: float, now: float) -> L | None:
        """A frame kept the engines busy for so long; a level where another one is due.

        Nothing more is asked until `switched` or `refused`. Frames that were skipped are not for here.
        """
        if self._unsettled:
            self._unsettled -= 1
            return None
        self._see(busy_ms, now)
        if self._asked is not None or not self._is_due(now):
            return None
        median = statistics.median(self._window(self._down_after_s, now))
        self._learn(median, now)
        self.holds = median <= _TOLERANCE * self.deadline_ms
        self._asked = self._better(now) if self.holds else self._worse(median, now)
        return self._asked

    def switched(self, level: L, now: float) -> None:
        """Frames run at ``level`` from now on. Raises ValueError where it is none of the ladder's."""
        step = self._levels.index(level) - self._levels.index(self._level)
        self._asked = None
        if not step:
            return
        busy = self._window(self._down_after_s, now)
        self._left = _Left(self._level, statistics.median(busy), now) if busy else None
        if step < 0:
            self._note_up(now)
        else:
            self._note_down(now)
        self._level, self.holds = level, None
        self.switches += 1
        self._unsettled = _UNSETTLED
        self._forget()

    def refused(self, level: L) -> None:
        """``level`` cannot be had (its engines do not open): it is asked for no more."""
        if level == self._level:
            raise ValueError(f"level {level} is the one that frames run at")
        self._levels.remove(level)
        if self._asked == level:
            self._asked = None

    def _see(self, busy_ms: float, now: float) -> None:
        seen = self._seen
        if seen and now - seen[-1][0] > max(_GAP_S, _GAP_FRAMES * busy_ms / 1000):
            self._forget()
        if not seen:
            self._since_s = now
        seen.append((now, busy_ms))
        longest = max(self._up_after_s, self._down_after_s)
        while len(seen) > _FEWEST and seen[0][0] < now - longest:
            seen.popleft()

    def _forget(self) -> None:
        self._seen.clear()
        self._since_s, self._judged_s = math.inf, -math.inf

    def _is_due(self, now: float) -> bool:
        """Enough was seen to judge, and not a moment ago."""
        if now < max(self._since_s + self._down_after_s, self._judged_s + _JUDGED_EVERY_S):
            return False
        if len(self._seen) < _FEWEST:
            late = all(busy > _TOLERANCE * self.deadline_ms for _, busy in self._seen)
            if len(self._seen) < _FEWEST_ALL_LATE or not late:
                return False
        self._judged_s = now
        return True

    def _window(self, seconds: float, now: float) -> list[float]:
        """Busy times of the last ``seconds``, and at least the last few, in ms."""
        recent = [busy for at, busy in self._seen if at >= now - seconds]
        return recent if len(recent) >= _FEWEST else [busy for _, busy in self._seen][-_FEWEST:]

    def _worse(self, median: float, now: float) -> L | None:
        """The best level below this one that is estimated to meet the deadline, or the last."""
        below = self._levels[self._levels.index(self._level) + 1 :]
        fitting = (level for level in below if median * self._ratio(level, now) <= self.deadline_ms)
        return next(fitting, below[-1] if below else None)

    def _better(self, now: float) -> L | None:
        """The best level above this one that fits with room to spare, once the time for it has come."""
        if now < self._up_from_s or now - self._since_s < self._up_after_s:
            return None
        window = sorted(self._window(self._up_after_s, now))
        busy = window[int(0.8 * (len(window) - 1))]
        above = self._levels[: self._levels.index(self._level)]
        room = (1 - self._headroom) * self.deadline_ms
        return next((level for level in above if busy * self._ratio(level, now) <= room), None)

    def _ratio(self, level: L, now: float) -> float:
        """Estimated cost of ``level`` over that of the present one; a better level never costs less."""
        ratio = self._costs[level] / self._costs[self._level]
        learned = self._learned.get((self._level, level))
        if learned is not None:
            ratio *= math.exp(learned.log * 0.5 ** ((now - learned.at_s) / _HALF_LIFE_S))
        is_above = self._levels.index(level) < self._levels.index(self._level)
        return max(1.0, ratio) if is_above else min(1.0, ratio)

    def _learn(self, median: float, now: float) -> None:
        """The first median at a level, beside the last at the one before, tells how they relate."""
        left, self._left = self._left, None
        if left is None or now - left.at_s > _LEARNED_WITHIN_S or not min(median, left.busy_ms) > 0:
            return
        said = self._costs[self._level] / self._costs[left.level]
        most = math.log(_MOST_LEARNED)
        log = max(-most, min(most, math.log(median / left.busy_ms / said)))
        self._learned[left.level, self._level] = _Learned(log, now)
        self._learned[self._level, left.level] = _Learned(-log, now)

    def _note_up(self, now: float) -> None:
        if not self._undone:
            self._wait_s = self._up_after_s
        self._went_up_s, self._undone = now, False

    def _note_down(self, now: float) -> None:
        """Soon after a step up, it undoes that: the next one waits longer."""
        if now - self._went_up_s >= _TRIAL_S:
            self._wait_s = self._up_after_s
            return
        self._undone = True
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
        self._up_from_s = now + self._wait_s
