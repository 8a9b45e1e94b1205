"""Percentiles of any number of durations in constant memory: a histogram with log-spaced bins."""

from __future__ import annotations

import math
from array import array

import numpy as np

__all__ = ["RELATIVE_ERROR", "Histogram"]

_LEAST_MS = 1e-3
_MOST_MS = 1e7  # almost three hours
_GROWTH = 1.01  # edge to edge
_BINS = math.ceil(math.log(_MOST_MS / _LEAST_MS) / math.log(_GROWTH)) + 1
_SCALE = 1 / math.log(_GROWTH)

RELATIVE_ERROR = math.sqrt(_GROWTH) - 1
"""Of a percentile from 0.001 ms to 1e7 ms: half a bin, 0.5 %."""


class Histogram:
    """Milliseconds. Below 0.001 ms is 0, above 1e7 ms is 1e7 ms; 2,300 counters whatever is added."""

    __slots__ = ("_counts", "total")

    def __init__(self) -> None:
        self._counts = array("q", bytes(8 * _BINS))
        self.total = 0

    def add(self, value_ms: float) -> None:
        """Count one value. Raises ValueError for NaN and infinity."""
        if not math.isfinite(value_ms):
            raise ValueError(f"a duration is a finite number of ms, got {value_ms}")
        self._counts[_bin(value_ms)] += 1
        self.total += 1

    def copy(self) -> Histogram:
        """The same counts, apart from this one."""
        return self._of(self._counts[:], self.total)

    def since(self, before: Histogram | None) -> Histogram:
        """What was added after ``before`` was copied from this one; None: everything."""
        if before is None:
            return self.copy()
        left = np.frombuffer(self._counts, np.int64) - np.frombuffer(before._counts, np.int64)
        return self._of(array("q", left.tobytes()), self.total - before.total)

    def percentile(self, share: float) -> float | None:
        """As ``numpy.percentile`` within `RELATIVE_ERROR`; ``share`` 0..100. None where nothing was added."""
        if not self.total:
            return None
        rank = (self.total - 1) * share / 100
        # The smallest bin up to which more than `rank` values lie holds the value of that rank, from 0.
        upto = np.cumsum(np.frombuffer(self._counts, np.int64))
        low, high = (
            _value(int(np.searchsorted(upto, whole(rank), "right"))) for whole in (math.floor, math.ceil)
        )
        return low + (high - low) * (rank - math.floor(rank))

    @classmethod
    def _of(cls, counts: array[int], total: int) -> Histogram:
        made = cls()
        made._counts, made.total = counts, total
        return made


def _bin(value_ms: float) -> int:
    """Bin 0 is what is too short to tell; the others grow by 1 %."""
    if value_ms < _LEAST_MS:
        return 0
    return min(_BINS - 1, 1 + int(math.log(value_ms / _LEAST_MS) * _SCALE))


def _value(index: int) -> float:
    """The middle of a bin, by ratio."""
    return 0.0 if index == 0 else min(_MOST_MS, _LEAST_MS * _GROWTH ** (index - 0.5))
