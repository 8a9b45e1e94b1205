"""The governor on simulated machines, and the ladder of qualities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from std_rt.core.errors import UsageError
from std_rt.live.governor import Governor, ladder
from std_rt.pipeline.stylizer import Quality

Load = Callable[[float], float]  # seconds -> factor on every cost

COSTS = (1.0, 0.64, 0.45, 0.36, 0.25)
CAMERA_S = 1 / 30
OPENING_S = 0.4


# The governor


@dataclass
class Run:
    """A simulated session: (when, quality) of each switch, and (when, busy ms, quality) of each frame."""

    switches: list[tuple[float, int]]
    frames: list[tuple[float, float, int]]

    def median_ms(self, start_s: float, end_s: float) -> float:
        return float(np.median([busy for at, busy, _ in self.frames if start_s <= at < end_s]))

    def qualities(self, start_s: float, end_s: float) -> set[int]:
        return {quality for at, _, quality in self.frames if start_s <= at < end_s}

    def most_in_a_minute(self) -> int:
        times = [at for at, _ in self.switches]
        return max((sum(t <= at < t + 60 for at in times) for t in times), default=0)


def simulate(
    governor: Governor[int],
    best_ms: float,
    load: Load = lambda at: 1.0,
    *,
    seconds: float = 120.0,
    noise: float = 0.05,
    outliers: float = 0.0,
    costs: tuple[float, ...] = COSTS,
    seed: int = 0,
) -> Run:
    """Frames of a 30 fps camera through engines whose true costs are ``costs`` times ``best_ms``."""
    rng = np.random.default_rng(seed)
    run, now, opened_s, wanted = Run([], []), 0.0, math.inf, 0
    while now < seconds:
        busy = best_ms * costs[governor.quality] * load(now) * math.exp(rng.normal(0, noise))
        busy *= 10 if rng.random() < outliers else 1
        now += max(busy / 1000, CAMERA_S)
        run.frames.append((now, busy, governor.quality))
        asked = governor.observe(busy, now)
        if asked is not None:
            assert opened_s == math.inf, "asked while a change was under way"
            wanted, opened_s = asked, now + OPENING_S
        if now >= opened_s:
            governor.switched(wanted, now)
            run.switches.append((now, wanted))
            opened_s = math.inf
    return run


def governor(target_fps: float = 15.0, costs: tuple[float, ...] = COSTS) -> Governor[int]:
    return Governor(target_fps, dict(enumerate(costs)))


def test_stays_at_the_best_quality_where_it_meets_the_deadline() -> None:
    run = simulate(governor(), 50)
    assert run.switches == []


def test_goes_down_within_two_seconds_to_the_best_quality_that_meets_the_deadline() -> None:
    run = simulate(governor(), 130)  # x 0.45 = 58 ms of 66.7; x 0.64 = 83
    assert run.switches[0][1] == 2
    assert run.switches[0][0] < 2.5
    assert len(run.switches) == 1


def test_goes_to_the_lowest_quality_where_none_meets_it_and_stays_there() -> None:
    run = simulate(governor(), 600)
    assert [quality for _, quality in run.switches] == [4]


def test_load_that_ends_brings_the_best_quality_back() -> None:
    run = simulate(governor(), 45, lambda at: 2.0 if 40 <= at < 80 else 1.0, seconds=160)
    assert run.qualities(0, 40) == {0}
    assert run.median_ms(44, 80) <= 1000 / 15
    assert run.qualities(100, 160) == {0}
    assert len(run.switches) <= 3


@pytest.mark.parametrize("load", [0.94, 1.0, 1.02, 1.06])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_cost_at_the_edge_does_not_oscillate(load: float, noise: float) -> None:
    run = simulate(governor(), 1000 / 15 * load, noise=noise, seconds=120)
    assert len(run.switches) <= 2


def test_single_slow_frames_change_nothing() -> None:
    run = simulate(governor(), 50, outliers=0.05, noise=0.05, seconds=120)
    assert run.switches == []


def test_an_estimate_that_is_wrong_is_learned_and_tried_ever_less_often() -> None:
    # The estimate says that quality 0 costs 1.05 times quality 1; it is twice. 0 is tried, and undone.
    said, true = (1.0, 0.95), (1.0, 0.5)
    run = simulate(governor(15, said), 100, costs=true, seconds=900)
    ups = [at for at, quality in run.switches if quality == 0]
    assert run.median_ms(5, 900) <= 1000 / 15
    assert len(ups) <= 8
    assert len([at for at in ups if at > 600]) <= 3


def test_load_that_comes_and_goes_is_followed_with_few_switches() -> None:
    run = simulate(governor(), 50, lambda at: 1.8 if at % 20 < 10 else 1.0, seconds=600)
    assert run.most_in_a_minute() <= 6
    assert len(run.switches) <= 40


def test_a_ratio_learned_under_changing_load_is_forgotten() -> None:
    # The load ends in the very moment of the switch, so quality 1 looks far cheaper than it is.
    run = simulate(governor(), 45, lambda at: 3.0 if at < 1.5 else 1.0, seconds=240)
    assert run.qualities(200, 240) == {0}


any_load = given(
    best_ms=st.floats(10, 400),
    factor=st.floats(0.5, 3.0),
    off=st.floats(0.75, 1.3),
    noise=st.floats(0.0, 0.15),
    target=st.sampled_from([5.0, 12.0, 24.0]),
    seed=st.integers(0, 5),
)


def _check_any_constant_load(
    best_ms: float, factor: float, off: float, noise: float, target: float, seed: int
) -> None:
    true = tuple(cost * off**i for i, cost in enumerate(COSTS)) if off <= 1 else COSTS
    deadline = 1000 / target
    run = simulate(
        governor(target),
        best_ms,
        lambda at: factor if at >= 60 else 1.0,
        costs=true,
        noise=noise,
        outliers=0.05,
        seed=seed,
        seconds=180,
    )
    assert run.most_in_a_minute() <= 8
    for load, start, end in ((1.0, 30, 60), (factor, 130, 180)):
        if best_ms * load * true[-1] * 1.1 < deadline:
            assert run.median_ms(start, end) <= deadline * 1.06


@settings(max_examples=6, deadline=None)
@any_load
def test_any_constant_load_is_met_where_a_quality_can_and_switches_are_few(**session: Any) -> None:
    _check_any_constant_load(**session)


@pytest.mark.long
@settings(max_examples=100, deadline=None)
@any_load
def test_many_constant_loads(**session: Any) -> None:
    _check_any_constant_load(**session)


@settings(max_examples=5, deadline=None)
@given(best_ms=st.floats(20, 55), load=st.floats(1.5, 4.0), noise=st.floats(0.0, 0.1))
def test_the_best_quality_comes_back_when_the_load_goes(best_ms: float, load: float, noise: float) -> None:
    run = simulate(governor(), best_ms * 0.8, lambda at: load if at < 30 else 1.0, noise=noise, seconds=150)
    assert run.qualities(120, 150) == {0}


@pytest.mark.parametrize(("then_ms", "quality"), [(50, 0), (60, 1)])
def test_a_step_up_needs_room_to_spare(then_ms: float, quality: int) -> None:
    # Both fit into 66.7 ms; 60 of them leave less than 15 %.
    run = simulate(governor(), then_ms, lambda at: 1.6 if at < 10 else 1.0, noise=0, seconds=60)
    assert run.qualities(50, 60) == {quality}


def test_a_step_up_needs_most_frames_to_fit_and_not_only_the_median_one() -> None:
    # At quality 0 every third frame would miss.
    uneven = iter([40.0, 40.0, 80.0] * 10_000)
    held = governor()
    held.switched(1, 0.0)
    assert all(held.observe(next(uneven) * COSTS[1], 0.1 * i) is None for i in range(1, 600))


def test_nothing_is_asked_while_a_change_is_under_way_and_a_refused_quality_never_again() -> None:
    held = governor()
    times = (i / 20 for i in range(10_000))

    def next_asked() -> int:
        return next(asked for at in times if (asked := held.observe(130, at)) is not None)

    assert next_asked() == held.asked == 2
    assert all(held.observe(130, next(times)) is None for _ in range(100))
    held.refused(2)
    assert next_asked() == 3


def test_a_pause_does_not_count_as_time_with_room_to_spare() -> None:
    held = governor()
    for i in range(60):
        held.observe(200, i / 5)
    held.switched(4, 12.0)
    for at in (12.2, 12.4, *np.arange(13.0, 15.0, 0.1), *np.arange(100.0, 104.5, 0.1)):
        assert held.observe(10, float(at)) is None
    assert held.observe(10, 105.1) == 0


def test_a_quality_off_the_ladder_and_costs_that_do_not_fall_are_refused() -> None:
    with pytest.raises(ValueError, match="is not in"):
        governor().switched(7, 0.0)
    for costs in ({0: 0.5, 1: 1.0}, {0: 1.0, 1: 0.0}, {}):
        with pytest.raises(ValueError, match="costs must fall"):
            Governor(15, costs)
    with pytest.raises(UsageError, match="positive number, got 0"):
        Governor(0, {0: 1.0})


# The ladder


def test_the_ladder_takes_steps_first_then_size() -> None:
    assert list(ladder(Quality((256, 256), 4), [1, 2, 4, 6, 8], 32)) == [
        Quality((256, 256), 4),
        Quality((256, 256), 2),
        Quality((256, 256), 1),
        Quality((192, 192), 2),
        Quality((192, 192), 1),
        Quality((128, 128), 2),
        Quality((128, 128), 1),
    ]


@given(
    h=st.integers(2, 32),
    w=st.integers(2, 32),
    allowed=st.sets(st.sampled_from([1, 2, 3, 4, 6, 8, 16]), min_size=1),
    multiple=st.sampled_from([8, 32, 64]),
    least=st.integers(32, 400),
    data=st.data(),
)
@settings(max_examples=50)
def test_every_ladder_falls_in_cost_within_its_limits(
    h: int, w: int, allowed: set[int], multiple: int, least: int, data: st.DataObject
) -> None:
    best = Quality((h * multiple, w * multiple), data.draw(st.sampled_from(sorted(allowed))))
    costs = ladder(best, allowed, multiple, least)
    qualities = list(costs)
    assert qualities[0] == best
    assert costs[best] == 1
    assert len(qualities) <= 8
    assert all(b <= 0.9 * a + 1e-12 for a, b in pairwise(costs.values()))
    for quality in qualities[1:]:
        assert quality.steps in allowed
        assert quality.steps <= best.steps
        assert all(side % multiple == 0 for side in quality.size)
        assert quality.size == best.size or min(quality.size) >= max(least, 128)
    Governor(15, costs)


def test_a_ladder_from_steps_that_are_not_allowed_is_refused() -> None:
    with pytest.raises(ValueError, match="3 steps"):
        ladder(Quality((256, 256), 3), [1, 2, 4], 32)
