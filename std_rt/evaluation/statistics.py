"""Statistics over a set of pairs: bootstrap intervals, the Fréchet distance, CSLS, and shares of votes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVEL", "RESAMPLES", "Estimate", "Resampled", "bootstrap", "csls", "frechet_distance", "wilson"]

Array = NDArray[Any]

LEVEL = 0.95
RESAMPLES = 10_000
FEWEST = 5  # rows; the bootstrap of fewer says little
_Z = 1.959964  # of LEVEL, two-sided
_CHUNK = 500  # resamples at a time


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that holds it at `LEVEL`; without ends where there are too few rows."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True, eq=False)
class Resampled:
    """Figures of K columns, ``points [K]``, and the same of resampled rows, ``draws [R, K]``.

    Each draw takes the same rows for all columns, so that differences between columns are paired. Intervals
    are percentiles of the draws; ``centred``: symmetric about the figure, by the deviation of the draws (for
    a figure whose draws are biased). Without draws there are none.
    """

    points: Array
    draws: Array
    centred: bool = False

    def column(self, k: int) -> Estimate:
        """The figure of a column."""
        return self._estimate(self.points[k], self.draws[:, k])

    def part(self, start: int, stop: int) -> Resampled:
        """Some of the columns, of the same draws."""
        return Resampled(self.points[start:stop], self.draws[:, start:stop], self.centred)

    def difference(self, a: int, b: int) -> Estimate:
        """Column a less column b."""
        return self._estimate(self.points[a] - self.points[b], self.draws[:, a] - self.draws[:, b])

    def _estimate(self, value: float, draws: Array) -> Estimate:
        if not len(draws):
            return Estimate(float(value))
        if self.centred:
            off = _Z * float(draws.std(ddof=1))
            return Estimate(float(value), float(value) - off, float(value) + off)
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(value), float(low), float(high))


def bootstrap(values: Array, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Means of the columns of ``values [N, K]``, with percentile intervals over the rows.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. No intervals below five rows.
    """
    n = len(values)
    rng = np.random.default_rng(seed)
    counts = [min(_CHUNK, resamples - i) for i in range(0, resamples if n >= FEWEST else 0, _CHUNK)]
    parts = [resampled_rows(rng, n, count) @ values / n for count in counts]
    return Resampled(values.mean(0), np.concatenate(parts) if parts else np.empty((0, values.shape[1])))


def resampled_rows(rng: np.random.Generator, n: int, count: int) -> Array:
    """How often each of ``n`` rows is in each of ``count`` resamples: ``[count, n]``."""
    return np.asarray(rng.multinomial(n, np.full(n, 1 / n), size=count))


def frechet_distance(x: Array, y: Array, counts: Array | None = None) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features, ``[N, D]`` each; 0 = the same.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` with unbiased covariances (Heusel et al. 2017,
    arXiv 1706.08500). ``counts [N]``: how often each row is in both sets; default once.

    With centred features A and B, the trace of the root is the sum of the singular values of ``A B^T``: no
    matrix of ``D x D`` is needed, and none is near singular.
    """
    counts = np.ones(len(x), np.int64) if counts is None else counts
    there, n = counts > 0, int(counts.sum())
    weights = np.sqrt(counts[there] / (n - 1))[:, None]
    means = [counts @ rows.astype(np.float64) / n for rows in (x, y)]
    a, b = (weights * (rows[there] - mean) for rows, mean in zip((x, y), means, strict=True))
    spread = float(np.square(a).sum() + np.square(b).sum())
    if len(a) > a.shape[1]:
        a, b = (np.asarray(np.linalg.qr(rows, mode="r")) for rows in (a, b))
    root = float(np.linalg.norm(a @ b.T, "nuc"))
    return max(0.0, float(np.square(means[0] - means[1]).sum()) + spread - 2 * root)


def csls(outputs: Array, styles: Array, neighbours: int = 10) -> Array:
    """Cross-domain similarity local scaling of each output to its own style, ``[N]``, in -4..4.

    ``2 cos(x, y) - r(x) - r(y)`` (Conneau et al. 2018, arXiv 1710.04087, section 2.3): ``r(x)`` is the mean
    cosine of output x to its nearest styles, ``r(y)`` that of style y to its nearest outputs. Where every
    picture is near every other, as paintings are for CSD, the plain cosine is high for all; this one is high
    only for an output that is nearer to its style than to the others.

    ``outputs`` and ``styles [N, D]``, unit vectors, row by row; a style may come several times and counts
    once. With fewer than ``neighbours`` in a set all of them are taken.
    """
    _, first, own = np.unique(np.round(styles, 5), axis=0, return_index=True, return_inverse=True)
    cosines = outputs @ styles[first].T  # [N, S]
    of_output, of_style = _nearest(cosines, neighbours), _nearest(cosines.T, neighbours)
    own = own.reshape(-1)
    return np.asarray(2 * cosines[np.arange(len(own)), own] - of_output - of_style[own])


def _nearest(cosines: Array, count: int) -> Array:
    """Mean of the ``count`` largest of each row."""
    return np.asarray(np.sort(cosines, axis=1)[:, -count:].mean(1))


def wilson(share: float, number: int) -> Estimate:
    """A share of ``number`` independent votes, with Wilson's score interval (JASA 22, 1927)."""
    if number < 1:
        return Estimate(share)
    z = _Z**2 / number
    middle, half = share + z / 2, _Z * float(np.sqrt((share * (1 - share) + z / 4) / number))
    low, high = (middle - half) / (1 + z), (middle + half) / (1 + z)
    return Estimate(share, min(max(low, 0.0), share), max(min(high, 1.0), share))
