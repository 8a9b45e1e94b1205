"""The cache of open runners: which stay, which go, and what became of those that failed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from std_rt.core.errors import BackendError, UsageError
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps
from std_rt.engines.hot_swap import HotSwapRunner
from std_rt.engines.program import Mark, Runner, no_mark
from std_rt.pipeline.conditioning import Conditioning
from std_rt.pipeline.program_builder import CONDITIONING, NEGATIVE
from std_rt.pipeline.runner_cache import MAX_KEPT, CachedRunner, Quality, RunnerCache, RunnerKey


def coefficients(steps: int, gamma: float = 0.0) -> Any:
    return NoiseSchedule.scaled_linear().coefficients(trajectory_timesteps(0.75, steps), gamma)


class Fake:
    """A runner that keeps what it is fed."""

    precision = "fp32"

    def __init__(self) -> None:
        self.closed = 0
        self.fed: list[dict[str, np.ndarray]] = []

    def set(self, **feeds: np.ndarray) -> None:
        self.fed.append(feeds)

    def run(self, frame: np.ndarray, mark: Mark = no_mark) -> np.ndarray:
        return frame

    def carried(self) -> dict[str, np.ndarray]:
        return {}

    def carry(self, **buffers: np.ndarray) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


class Openings:
    """Futures that a test settles by hand."""

    def __init__(self) -> None:
        self.futures: list[tuple[RunnerKey, Future[Runner]]] = []

    def __call__(self, key: RunnerKey) -> CachedRunner:
        self.futures.append((key, Future()))
        return CachedRunner(key, coefficients(key.quality.steps), (4, 8, 8), "none", self.futures[-1][1])

    def future(self, key: RunnerKey) -> Future[Runner]:
        """The latest of a key."""
        return next(future for one, future in reversed(self.futures) if one == key)


def key(side: int, steps: int = 4, **how: Any) -> RunnerKey:
    return RunnerKey(Quality((side, side), steps), **how)


def test_the_two_used_last_stay_open_and_the_others_are_closed() -> None:
    openings = Openings()
    cache = RunnerCache(openings)
    runners = {}
    for side in (64, 96, 64, 128):
        cache.get(key(side))
        if side not in runners:
            runners[side] = Fake()
            openings.future(key(side)).set_result(runners[side])
    assert {side: runner.closed for side, runner in runners.items()} == {64: 0, 96: 1, 128: 0}
    assert [one.key.quality.size[0] for one in cache.values()] == [64, 128]
    cache.clear()
    assert [runner.closed for runner in runners.values()] == [1, 1, 1]


def test_more_stay_open_where_the_user_of_the_cache_says_so() -> None:
    openings = Openings()
    cache = RunnerCache(openings, recent=4)
    for side in (64, 96, 128, 160) * 2:
        cache.get(key(side))
    assert len(openings.futures) == 4


def test_steps_and_the_way_of_frames_make_a_runner_too() -> None:
    openings = Openings()
    cache = RunnerCache(openings)
    kinds = [key(64), key(64, 2), key(64, frames=4), key(64, stream=True)]
    for kind in kinds:
        assert cache.get(kind) is cache.get(kind)
    assert [kind for kind, _ in openings.futures] == kinds


def test_what_was_asked_for_stays_until_others_are() -> None:
    openings = Openings()
    cache = RunnerCache(openings)
    asked = [key(side) for side in (64, 96, 128, 160)]
    cache.keep(asked)
    runners = [Fake() for _ in asked]
    for one, runner in zip(asked, runners, strict=True):
        openings.future(one).set_result(runner)
    for side in (32, 40, 48):
        cache.get(key(side))
    assert not any(runner.closed for runner in runners)
    assert len(cache.values()) == 6
    cache.keep([asked[3]])
    assert [runner.closed for runner in runners] == [1, 1, 1, 0]
    assert len(cache.values()) == 3


def test_there_is_a_bound_to_what_is_kept() -> None:
    cache = RunnerCache(Openings())
    qualities = [key(64 + 8 * i) for i in range(MAX_KEPT + 1)]
    with pytest.raises(UsageError, match=f"at most {MAX_KEPT} qualities are kept open, got {MAX_KEPT + 1}"):
        cache.keep(qualities)
    cache.keep(qualities[:-1])
    assert len(cache.values()) == MAX_KEPT


def test_ready_means_that_nobody_waits() -> None:
    openings = Openings()
    cache = RunnerCache(openings)
    assert not cache.ready(key(64))
    assert not openings.futures  # asking opens nothing
    cache.get(key(64))
    assert not cache.ready(key(64))
    openings.future(key(64)).set_result(Fake())
    assert cache.ready(key(64))
    assert not cache.ready(key(64, 2))


def test_one_that_failed_is_opened_again_once_somebody_knows() -> None:
    openings = Openings()
    cache = RunnerCache(openings)
    first = cache.get(key(64))
    openings.future(key(64)).set_exception(BackendError("no memory"))
    assert cache.get(key(64)) is first  # nobody knows yet
    with pytest.raises(BackendError, match="no memory"):
        first.wait()
    assert not cache.ready(key(64))
    second = cache.get(key(64))
    assert second is not first
    openings.future(key(64)).set_exception(BackendError("still none"))
    with pytest.raises(BackendError, match="still none"):
        cache.ready(key(64))
    cache.get(key(64))
    openings.future(key(64)).set_result(Fake())
    assert cache.ready(key(64))


def test_frames_are_submitted_to_the_fast_runner_once_it_has_taken_over() -> None:
    class Fast(Fake):
        def submit(self, frame: np.ndarray) -> Callable[[Mark], np.ndarray]:
            return lambda mark: frame + 1

    slow, fast, coming, opened = Fake(), Fast(), Future[Runner](), Future[Runner]()
    opened.set_result(HotSwapRunner(slow, coming, lambda line: None))
    runner = CachedRunner(key(64), coefficients(4), (4, 8, 8), "none", opened)
    one = dict.fromkeys(CONDITIONING, np.zeros((1, 1), np.float32))
    frame, noise = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((5, 4, 8, 8), np.float32)

    def submit() -> tuple[bool, int]:
        submitted = runner.submit(frame, [Conditioning(one)], [noise], no_mark)
        return submitted.running, int(submitted.collect(no_mark).max())

    assert submit() == (False, 0)
    coming.set_result(fast)
    assert submit() == (False, 0)  # in which it takes over
    assert submit() == (True, 1)
    assert (slow.closed, fast.closed) == (1, 0)
    runner.close()
    assert (slow.closed, fast.closed) == (1, 1)


def test_one_that_goes_while_it_opens_is_closed_when_it_is_there() -> None:
    openings = Openings()
    cache = RunnerCache(openings)
    for side in (64, 96):
        cache.get(key(side))
        openings.future(key(side)).set_running_or_notify_cancel()
    cache.clear()
    runner = Fake()
    openings.future(key(64)).set_result(runner)
    openings.future(key(96)).set_exception(BackendError("no memory"))  # and nobody asks
    assert runner.closed == 1


def opened(how: RunnerKey, mode: str, gamma: float = 0.0) -> tuple[CachedRunner, Fake]:
    future, runner = Future[Runner](), Fake()
    future.set_result(runner)
    return CachedRunner(how, coefficients(how.quality.steps, gamma), (4, 8, 8), mode, future), runner


def told(level: float, guided: bool = True) -> Conditioning:
    positive = {name: np.full((1, 2), level, np.float32) for name in CONDITIONING}
    negative = positive | {name: np.full((1, 2), -level, np.float32) for name in NEGATIVE}
    return Conditioning(positive, negative if guided else {})


def noise(level: float, draws: int) -> Any:
    """Row i holds level + i / 10."""
    return (level + np.arange(draws, dtype=np.float32) / 10).reshape(draws, 1, 1, 1)


FRAMES = np.zeros((3, 8, 8, 3), np.uint8)


def test_a_call_of_several_frames_is_fed_a_row_for_each() -> None:
    for mode, first in (("none", [1, 2, 3]), ("full", [-1, -2, -3, 1, 2, 3]), ("residual", [1, 2, 3])):
        one, runner = opened(key(8, frames=3), mode, gamma=0.5)
        one.run(FRAMES, [told(i) for i in (1, 2, 3)], [noise(i, 4) for i in (1, 2, 3)], no_mark)
        (fed,) = runner.fed
        assert fed["style_tokens"][:, 0].tolist() == first
        assert fed["time_ids"][:, 0].tolist() == [abs(level) for level in first]
        np.testing.assert_allclose(fed["noise_2"].ravel(), [1.2, 2.2, 3.2], rtol=1e-6)
        apart = {name: value[:, 0].tolist() for name, value in fed.items() if name.startswith("negative_")}
        expected = {f"negative_{name}": [-1, -2, -3] for name in NEGATIVE}
        assert apart == (expected if mode == "residual" else {})


def test_a_stream_is_fed_a_row_for_each_slot() -> None:
    for mode, first in (("none", [1, 2, 3]), ("full", [-1, -2, -3, 1, 2, 3]), ("residual", [-1, 2, 3, 1])):
        one, runner = opened(RunnerKey(Quality((8, 8), 3), stream=True), mode, gamma=0.5)
        one.run(FRAMES[:1], [told(i) for i in (1, 2, 3)], [noise(i, 3) for i in (1, 2, 3)], no_mark)
        (fed,) = runner.fed
        assert fed["style_tokens"][:, 0].tolist() == first
        assert fed["noise_0"].ravel().tolist() == [1]
        # The last step is not stochastic; what stands in its row is multiplied with 0.
        np.testing.assert_allclose(fed["noise_steps"].ravel(), [1.1, 2.2, 3.0], rtol=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_only_what_is_another_array_is_fed_again(stream: bool) -> None:
    one, runner = opened(RunnerKey(Quality((8, 8), 3), 1 if stream else 3, stream), "none")
    style, other, start = told(1, guided=False), told(2, guided=False), noise(1, 1)
    for _ in range(3):
        one.run(FRAMES[: 1 if stream else 3], [style] * 3, [start] * 3, no_mark)
    assert len(runner.fed) == 1
    half = Conditioning({**other.positive, "encoder_hidden_states": style.positive["encoder_hidden_states"]})
    one.run(FRAMES[: 1 if stream else 3], [half, style, style], [start] * 3, no_mark)
    assert runner.fed[1].keys() == {*CONDITIONING} - {"encoder_hidden_states"}
    assert runner.fed[1]["style_tokens"][:, 0].tolist() == [2, 1, 1]
    one.run(FRAMES[: 1 if stream else 3], [half, style, style], [noise(5, 1), start, start], no_mark)
    assert runner.fed[2].keys() == {"noise_0"}
