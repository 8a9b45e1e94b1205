"""Statistics against closed forms, and against a slower way to the same number."""

from __future__ import annotations

import numpy as np
import pytest

from std_rt.evaluation.statistics import Estimate, bootstrap, csls, frechet_distance, wilson


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    found = bootstrap(values).column(0)
    half = 1.959964 * values.std() / 400**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_the_interval_holds_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for i in range(300):
        found = bootstrap(rng.exponential(1.0, (60, 1)), resamples=1000, seed=i).column(0)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1 <= found.high
    assert 0.89 < held / 300 < 0.98


def test_a_difference_is_paired() -> None:
    """Two columns that vary much over the pairs, and differ by little, always in one direction."""
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 1, 100)
    values = np.stack([hard, hard + 0.05 + rng.normal(0, 0.01, 100)], 1)
    found = bootstrap(values)
    a, b = found.column(0), found.column(1)
    assert a.high is not None
    assert b.low is not None
    assert a.high > b.low  # alone, they cannot be told apart
    assert found.difference(1, 0).sign == 1
    assert found.difference(0, 1).sign == -1
    assert found.difference(1, 0).value == pytest.approx((values[:, 1] - values[:, 0]).mean())
    assert bootstrap(rng.normal(0, 1, (100, 2))).difference(0, 1).sign == 0


def test_few_rows_have_no_interval() -> None:
    assert bootstrap(np.ones((4, 2))).column(1) == Estimate(1.0)
    assert bootstrap(np.arange(4.0)[:, None] * [[1, 2]]).difference(0, 1).sign == 0


def test_the_frechet_distance_of_known_gaussians() -> None:
    """Features whose sample mean and covariance are exact: |m1 - m2|^2 + sum (s1 - s2)^2."""
    z = np.random.default_rng(3).normal(size=(50, 3))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T
    x, y = z * [1, 2, 3] + [1, 0, 0], z[::-1] * [2, 2, 1] + [0, 0, 2]
    assert frechet_distance(x, y) == pytest.approx((1 + 4) + (1 + 0 + 4))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rows", [6, 40])
def test_the_frechet_distance_by_way_of_matrix_roots(rows: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(rows, 10)), rng.normal(1, 2, (rows, 10))
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.real(linalg.sqrtm(a @ b)) if rows > 10 else _root_of_singular(a, b)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


def _root_of_singular(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a^(1/2) b a^(1/2)`` has the eigenvalues of ``a b`` and is symmetric."""

    def root(m: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(m)
        return np.asarray(vectors * np.sqrt(values.clip(0)) @ vectors.T)

    return root(root(a) @ b @ root(a))


def test_counted_rows_are_repeated_rows() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 4))
    counts = np.array([2, 0, 1, 3, 0, 1, 1, 0])
    expected = frechet_distance(np.repeat(x, counts, 0), np.repeat(y, counts, 0))
    assert frechet_distance(x, y, counts) == pytest.approx(expected)


def test_csls_is_what_its_definition_says() -> None:
    rng = np.random.default_rng(6)
    styles = rng.normal(size=(5, 8))
    own = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 4])
    outputs = styles[own] + rng.normal(size=(12, 8))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (outputs, styles))
    expected = []
    for i, k in enumerate(own):
        to_styles = sorted((float(x[i] @ s) for s in y), reverse=True)[:3]
        to_outputs = sorted((float(o @ y[k]) for o in x), reverse=True)[:3]
        expected.append(2 * float(x[i] @ y[k]) - sum(to_styles) / 3 - sum(to_outputs) / 3)
    assert csls(x, y[own], 3) == pytest.approx(np.array(expected))


def test_csls_tells_what_a_cosine_to_crowded_styles_does_not() -> None:
    """All styles are near each other: what only looks like the crowd has a high cosine all the same."""
    rng = np.random.default_rng(7)
    crowd = np.zeros(16)
    crowd[0] = 4
    styles = crowd + rng.normal(size=(12, 16)) * 0.5

    def unit(v: np.ndarray) -> np.ndarray:
        return np.asarray(v / np.linalg.norm(v, axis=-1, keepdims=True))

    alike, apart = unit(np.repeat(crowd[None], 12, 0)), unit(styles)
    assert (alike * apart).sum(1).min() > 0.8
    assert csls(alike, apart).mean() == pytest.approx(0, abs=0.02)
    assert csls(apart, apart).mean() > 0.1


def test_wilsons_interval_solves_its_equation() -> None:
    """Its ends are the shares p at which the observed one is 1.96 deviations away."""
    found = wilson(0.3, 40)
    for end in (found.low, found.high):
        assert end is not None
        assert abs(0.3 - end) == pytest.approx(1.959964 * (end * (1 - end) / 40) ** 0.5)
    assert wilson(1.0, 10).high == 1
    assert wilson(1.0, 10).low == pytest.approx(10 / (10 + 1.959964**2))
    assert wilson(0.0, 10).low == 0
