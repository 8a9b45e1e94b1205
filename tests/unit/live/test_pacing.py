"""The governor on simulated machines, the ladder, and the similarity filter on frames with sensor noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from std_rt.core.errors import UsageError
from std_rt.live.pacing import Governor, SimilarityFilter, ladder, relative_costs
from std_rt.pipeline.stylizer import Quality
from std_rt.streaming.similarity import similarity, thumbnail

Frame = NDArray[np.uint8]
Load = Callable[[float], float]  # seconds -> factor on every cost

COSTS = (1.0, 0.64, 0.45, 0.36, 0.25)
CAMERA_S = 1 / 30
OPENING_S = 0.4


# The governor


@dataclass
class Run:
    """A simulated session: (when, level) of each switch, and (when, busy ms, level) of each frame."""

    switches: list[tuple[float, int]]
    frames: list[tuple[float, float, int]]

    def median_ms(self, start_s: float, end_s: float) -> float:
        return float(np.median([busy for at, busy, _ in self.frames if start_s <= at < end_s]))

    def levels(self, start_s: float, end_s: float) -> set[int]:
        return {level for at, _, level in self.frames if start_s <= at < end_s}

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
        busy = best_ms * costs[governor.level] * load(now) * math.exp(rng.normal(0, noise))
        busy *= 10 if rng.random() < outliers else 1
        now += max(busy / 1000, CAMERA_S)
        run.frames.append((now, busy, governor.level))
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
    return Governor(target_fps, range(len(costs)), costs)


def test_stays_at_the_best_level_where_it_meets_the_deadline() -> None:
    run = simulate(governor(), 50)
    assert run.switches == []


def test_goes_down_within_two_seconds_to_the_best_level_that_meets_the_deadline() -> None:
    run = simulate(governor(), 130)  # x 0.45 = 58 ms of 66.7; x 0.64 = 83
    assert run.switches[0][1] == 2
    assert run.switches[0][0] < 2.5
    assert len(run.switches) == 1


def test_goes_to_the_last_level_where_none_meets_it_and_stays_there() -> None:
    held = governor()
    run = simulate(held, 600)
    assert [level for _, level in run.switches] == [4]
    assert held.holds is False


def test_another_program_takes_a_core_and_gives_it_back() -> None:
    run = simulate(governor(), 45, lambda at: 2.0 if 40 <= at < 80 else 1.0, seconds=160)
    assert run.levels(0, 40) == {0}
    assert run.median_ms(44, 80) <= 1000 / 15
    assert run.levels(100, 160) == {0}
    assert len(run.switches) <= 3


@pytest.mark.parametrize("load", [0.94, 1.0, 1.02, 1.06])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_cost_at_the_edge_does_not_oscillate(load: float, noise: float) -> None:
    run = simulate(governor(), 1000 / 15 * load, noise=noise, seconds=300)
    assert len(run.switches) <= 2


def test_single_slow_frames_change_nothing() -> None:
    run = simulate(governor(), 50, outliers=0.05, noise=0.05, seconds=300)
    assert run.switches == []


def test_an_estimate_that_is_wrong_is_learned_and_tried_ever_less_often() -> None:
    # The caller says that level 0 costs 1.05 times level 1; it is twice. 0 is tried, and undone.
    said, true = (1.0, 0.95), (1.0, 0.5)
    run = simulate(governor(15, said), 100, costs=true, seconds=900)
    ups = [at for at, level in run.switches if level == 0]
    assert run.median_ms(5, 900) <= 1000 / 15
    assert len(ups) <= 8
    assert len([at for at in ups if at > 600]) <= 3


def test_load_that_comes_and_goes_is_followed_with_few_switches() -> None:
    run = simulate(governor(), 50, lambda at: 1.8 if at % 20 < 10 else 1.0, seconds=600)
    assert run.most_in_a_minute() <= 6
    assert len(run.switches) <= 40


def test_a_learned_cost_that_load_had_spoiled_is_forgotten() -> None:
    # The load ends in the very moment of the switch, so level 1 looks far cheaper than it is.
    run = simulate(governor(), 45, lambda at: 3.0 if at < 1.5 else 1.0, seconds=240)
    assert run.levels(200, 240) == {0}


@settings(max_examples=25, deadline=None)
@given(
    best_ms=st.floats(10, 400),
    factor=st.floats(0.5, 3.0),
    off=st.floats(0.75, 1.3),
    noise=st.floats(0.0, 0.15),
    target=st.sampled_from([5.0, 12.0, 24.0]),
    seed=st.integers(0, 5),
)
def test_any_constant_load_is_met_where_a_level_can_and_switches_are_few(
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


@settings(max_examples=15, deadline=None)
@given(best_ms=st.floats(20, 55), load=st.floats(1.5, 4.0), noise=st.floats(0.0, 0.1))
def test_the_best_level_comes_back_when_the_load_goes(best_ms: float, load: float, noise: float) -> None:
    run = simulate(governor(), best_ms * 0.8, lambda at: load if at < 30 else 1.0, noise=noise, seconds=150)
    assert run.levels(120, 150) == {0}


@pytest.mark.parametrize(("then_ms", "level"), [(50, 0), (60, 1)])
def test_a_step_up_needs_room_to_spare(then_ms: float, level: int) -> None:
    # Both fit into 66.7 ms; 60 of them leave less than 15 %.
    run = simulate(governor(), then_ms, lambda at: 1.6 if at < 10 else 1.0, noise=0, seconds=60)
    assert run.levels(50, 60) == {level}


def test_a_step_up_needs_most_frames_to_fit_and_not_only_the_median_one() -> None:
    # At level 0 every third frame would miss.
    uneven = iter([40.0, 40.0, 80.0] * 10_000)
    held = governor()
    held.switched(1, 0.0)
    assert all(held.observe(next(uneven) * COSTS[1], 0.1 * i) is None for i in range(1, 600))
    assert held.holds


def test_nothing_is_asked_while_a_change_is_under_way_and_a_refused_level_never_again() -> None:
    held = governor()
    times = (i / 20 for i in range(10_000))

    def next_asked() -> int:
        return next(level for at in times if (level := held.observe(130, at)) is not None)

    assert next_asked() == held.asked == 2
    assert all(held.observe(130, next(times)) is None for _ in range(100))
    held.refused(2)
    assert next_asked() == 3


def test_a_pause_is_no_time_spent_well() -> None:
    held = governor()
    for i in range(60):
        held.observe(200, i / 5)
    held.switched(4, 12.0)
    for at in (12.2, 12.4, *np.arange(13.0, 15.0, 0.1), *np.arange(100.0, 104.5, 0.1)):
        assert held.observe(10, float(at)) is None
    assert held.observe(10, 105.1) == 0


def test_a_level_of_no_ladder_and_levels_that_do_not_fall_are_refused() -> None:
    with pytest.raises(ValueError, match="is not in"):
        governor().switched(7, 0.0)
    with pytest.raises(ValueError, match="that fall"):
        Governor(15, [0, 1], [0.5, 1.0])
    with pytest.raises(ValueError, match="that fall"):
        Governor(15, [0, 0], [1.0, 0.5])
    with pytest.raises(UsageError, match="above 0, got 0"):
        Governor(0, [0], [1.0])


# The ladder


def test_the_ladder_takes_steps_first_then_size() -> None:
    assert ladder((256, 256), 4, [1, 2, 4, 6, 8], 32) == [
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
def test_every_ladder_falls_in_cost_within_its_limits(
    h: int, w: int, allowed: set[int], multiple: int, least: int, data: st.DataObject
) -> None:
    best = Quality((h * multiple, w * multiple), data.draw(st.sampled_from(sorted(allowed))))
    levels = ladder(best.size, best.steps, allowed, multiple, least)
    costs = relative_costs(levels)
    assert levels[0] == best
    assert len(levels) <= 8
    assert all(b <= 0.9 * a + 1e-12 for a, b in pairwise(costs))
    for level in levels[1:]:
        assert level.steps in allowed
        assert level.steps <= best.steps
        assert all(side % multiple == 0 for side in level.size)
        assert level.size == best.size or min(level.size) >= least
    Governor(15, levels, costs)


def test_a_ladder_from_steps_that_are_not_allowed_is_refused() -> None:
    with pytest.raises(ValueError, match="3 steps"):
        ladder((256, 256), 3, [1, 2, 4], 32)


# The similarity filter


@cache
def scene(h: int = 192, w: int = 320) -> NDArray[np.float32]:
    """Soft shapes with edges, as float."""
    rng = np.random.default_rng(7)
    picture = cv2.resize(rng.uniform(20, 235, (9, 15, 3)).astype(np.float32), (w, h))
    cv2.rectangle(picture, (w // 5, h // 4), (w // 2, h // 2), (200, 60, 40), -1)
    return np.asarray(picture, np.float32)


def noisy(sigma: float, count: int, h: int = 192, w: int = 320) -> Iterator[Frame]:
    """A still scene with sensor noise."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        noise = sigma * rng.standard_normal((h, w, 3), np.float32)
        yield np.clip(scene(h, w) + noise, 0, 255).astype(np.uint8)


def moving(count: int) -> Iterator[Frame]:
    """A thing of 24 px (one part in 107 of the picture) that moves 3 px a frame, with noise."""
    rng = np.random.default_rng(2)
    for i in range(count):
        frame = scene().copy()
        cv2.rectangle(frame, (20 + 3 * i, 120), (44 + 3 * i, 144), (225, 180, 150), -1)
        yield np.clip(frame + 3 * rng.standard_normal(frame.shape, np.float32), 0, 255).astype(np.uint8)


def test_sensor_noise_is_skipped_and_a_small_moving_thing_is_not() -> None:
    still, alive = SimilarityFilter(), SimilarityFilter()
    assert sum(still.skip(frame) for frame in noisy(5, 100)) > 50
    assert sum(alive.skip(frame) for frame in moving(80)) == alive.skips <= 4


@pytest.mark.parametrize("size", [(256, 256), (192, 320), (512, 512), (768, 1024)])
def test_noise_looks_alike_at_every_size(size: tuple[int, int]) -> None:
    first, *others = (thumbnail(frame) for frame in noisy(5, 6, *size))
    assert max(first.shape) == 32
    assert all(similarity(first, other) > 0.99 for other in others)


def test_similarity_is_one_for_equals_and_nothing_for_opposites() -> None:
    black, white = np.zeros((20, 32, 3), np.uint8), np.full((20, 32, 3), 255, np.uint8)
    assert similarity(black, black) == 1
    assert similarity(black, white) == 0
    part = black.copy()
    part[3:5, 4:7] = 255  # the 6 cells that are 1 % of 640
    assert similarity(black, part) == 0


def test_equal_frames_are_skipped_as_often_as_it_may_be_and_counted() -> None:
    similar = SimilarityFilter(max_skip=4)
    frame = next(noisy(0, 1))
    taken = [similar.skip(frame) for _ in range(16)]
    assert taken == [False, *[True] * 4] * 3 + [False]
    assert similar.skips == 12


@given(level=st.floats(0.0, 1.0), threshold=st.floats(0.0, 0.99))
@settings(max_examples=20, deadline=None)
def test_the_share_of_skips_rises_from_the_threshold_to_one(level: float, threshold: float) -> None:
    similar = SimilarityFilter(threshold, max_skip=10**6, seed=3)
    black = np.zeros((32, 32, 3), np.uint8)
    grey = np.full_like(black, round(255 * (1 - level)))
    share = max(0.0, (similarity(black, grey) - threshold) / (1 - threshold))
    taken = []
    for _ in range(400):  # always beside a processed black frame
        similar.force()
        similar.skip(black)
        taken.append(similar.skip(grey))
    assert abs(np.mean(taken) - share) < 0.12


def test_the_seed_decides() -> None:
    decisions = [
        [similar.skip(frame) for frame in noisy(8, 60)]
        for similar in (SimilarityFilter(seed=seed) for seed in (1, 1, 2))
    ]
    assert decisions[0] == decisions[1] != decisions[2]


def test_slow_drift_is_seen_against_the_processed_frame() -> None:
    similar = SimilarityFilter(max_skip=10**6)
    base = scene()
    taken = [similar.skip(np.clip(base + 0.5 * i, 0, 255).astype(np.uint8)) for i in range(100)]
    assert taken.count(False) >= 8


def test_force_and_another_size_are_processed() -> None:
    similar = SimilarityFilter()
    frame = next(noisy(0, 1))
    assert not similar.skip(frame)
    assert similar.skip(frame)
    similar.force()
    assert not similar.skip(frame)
    assert similar.skip(frame)
    assert not similar.skip(np.ascontiguousarray(frame[:, :192]))


def test_a_stream_batch_gets_the_frames_it_needs_before_anything_is_skipped() -> None:
    similar = SimilarityFilter(frames_inside=4)
    frame, other = next(noisy(0, 1)), np.full((192, 320, 3), 9, np.uint8)
    assert [similar.skip(frame) for _ in range(5)] == [False] * 4 + [True]
    assert [similar.skip(other) for _ in range(5)] == [False] * 4 + [True]


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold"):
        SimilarityFilter(threshold)
    with pytest.raises(UsageError, match="1 or more"):
        SimilarityFilter(max_skip=0)
