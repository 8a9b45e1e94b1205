"""Windows in constant memory against a plain program that holds the whole clip."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from std_rt.core.arrays import Array
from std_rt.core.errors import UsageError
from std_rt.core.schedule import NoiseSchedule, StepCoefficients, add_noise, step, trajectory_timesteps
from std_rt.pipeline.denoise import denoise, noise_draws
from std_rt.pipeline.windows import Windows

SHAPE = (2, 3, 4)
Predict = Callable[[Array, Array, StepCoefficients], Array]


def steps(count: int = 4, gamma: float = 0.0) -> list[StepCoefficients]:
    return NoiseSchedule.scaled_linear().coefficients(trajectory_timesteps(0.75, count), gamma)


def network(seed: int = 0) -> Predict:
    """Every frame sees every other, its own position and its clean latents; not linear."""
    mixing = np.random.default_rng(seed).normal(size=(64, 64)) / 3

    def predict(x: Array, z: Array, c: StepCoefficients) -> Array:
        t = len(x)
        return np.tanh(np.einsum("st,t...->s...", mixing[:t, :t], x) + z / 2 + c.timestep / 1000)

    return predict


def clip(frames: int, draws: int = 1) -> tuple[Array, Array]:
    rng = np.random.default_rng(7)
    return rng.normal(size=(frames, *SHAPE)), rng.normal(size=(frames, draws, *SHAPE))


def whole_clip(
    z: Array, noise: Array, window: tuple[int, int], cs: list[StepCoefficients], predict: Predict
) -> Array:
    """All frames take a step together, the mean of all windows' predictions each."""
    length, hop = window[0], window[0] - window[1]
    padded = max(length, len(z) + (-(len(z) - length)) % hop)
    x, drawn = add_noise(z, noise[:, 0], cs[0]), 1
    for c in cs:
        total, count = np.zeros_like(x), np.zeros(len(x))
        for begin in range(0, padded - length + 1, hop):
            rows = np.minimum(np.arange(begin, begin + length), len(z) - 1)
            eps = predict(x[rows], z[rows], c)
            real = min(length, len(z) - begin)
            total[begin : begin + real] += eps[:real]
            count[begin : begin + real] += 1
        fresh = noise[:, drawn] if c.noise else None
        drawn += bool(c.noise)
        x = step(x, total / count[:, None, None, None], c, fresh)
    return x


def carried_clip(
    z: Array, noise: Array, window: tuple[int, int], cs: list[StepCoefficients], predict: Predict
) -> Array:
    """Window after window to the end: of each only what the one before has not painted is kept."""
    length, hop = window[0], window[0] - window[1]
    states = [add_noise(z, noise[:, 0], cs[0]), *(np.full_like(z, np.nan) for _ in cs)]
    painted = 0
    while painted < len(z):
        begin = max(0, painted - window[1])
        assert begin % hop == 0
        rows = np.minimum(np.arange(begin, begin + length), len(z) - 1)
        end, drawn = min(begin + length, len(z)), 1
        for level, c in enumerate(cs):
            eps = predict(states[level][rows], z[rows], c)
            new = slice(painted, end)
            fresh = noise[new, drawn] if c.noise else None
            drawn += bool(c.noise)
            states[level + 1][new] = step(states[level][new], eps[painted - begin : end - begin], c, fresh)
        painted = end
    return states[-1]


def streamed(windows: Windows, z: Array, noise: Array) -> Array:
    done = [x for each in zip(z, noise, strict=True) for x in windows.push(*each)]
    return np.stack([*done, *windows.finish()])


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 11, 23])
@pytest.mark.parametrize("window", [(4, 1), (4, 2), (4, 3), (4, 0), (5, 3), (2, 1)])
def test_a_stream_of_frames_is_the_whole_clip(frames: int, window: tuple[int, int]) -> None:
    cs, predict = steps(gamma=0.3), network()
    z, noise = clip(frames, noise_draws(cs))
    windows = Windows(window, cs, predict)
    expected = whole_clip(z, noise, window, cs, predict)
    np.testing.assert_allclose(streamed(windows, z, noise), expected, rtol=1e-9, atol=1e-9)
    again = streamed(windows, z, noise)  # a new scene begins as the first
    np.testing.assert_allclose(again, expected, rtol=1e-9, atol=1e-9)


def test_a_clip_of_one_window_is_the_reference_loop() -> None:
    cs, predict = steps(), network()
    z, noise = clip(6)
    by_time = {c.timestep: c for c in cs}
    wanted = denoise(z, lambda x, t, _: predict(x, z, by_time[t]), noise=[noise[:, 0]], steps=cs)
    np.testing.assert_allclose(streamed(Windows((6, 2), cs, predict), z, noise), wanted, atol=1e-9)


def test_windows_of_a_frame_wise_network_are_one_long_window() -> None:
    """Where no frame sees another the mean changes nothing, so any joint would be a fault of the scheme."""
    cs = steps()

    def alone(x: Array, z: Array, c: StepCoefficients) -> Array:
        return np.tanh(x * (1 + c.timestep / 500))

    z, noise = clip(21)
    joined = streamed(Windows((8, 2), cs, alone), z, noise)
    np.testing.assert_allclose(joined, streamed(Windows((21, 0), cs, alone), z, noise), atol=1e-12)


def test_only_the_frames_of_the_wave_are_held_and_no_window_runs_twice() -> None:
    cs, calls = steps(4), 0
    predict = network()

    def counted(x: Array, z: Array, c: StepCoefficients) -> Array:
        nonlocal calls
        calls += 1
        return predict(x, z, c)

    windows, most = Windows((8, 2), cs, counted), 0
    z, noise = clip(1)
    for _ in range(3002):
        windows.push(z[0], noise[0])
        most = max(most, windows.inside)
    windows.finish()
    assert most <= 8 + 3 * 6
    assert calls == 4 * (1 + (3002 - 8) // 6)
    assert windows.inside == 0


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 6, 7, 10, 11, 23])
@pytest.mark.parametrize("window", [(4, 1), (4, 2), (4, 3), (4, 0), (5, 3), (2, 1)])
def test_carried_windows_are_painted_one_after_the_other(frames: int, window: tuple[int, int]) -> None:
    cs, predict = steps(gamma=0.3), network()
    z, noise = clip(frames, noise_draws(cs))
    windows = Windows(window, cs, predict, carried=True)
    expected = carried_clip(z, noise, window, cs, predict)
    np.testing.assert_allclose(streamed(windows, z, noise), expected, rtol=1e-9, atol=1e-9)
    again = streamed(windows, z, noise)  # a new scene begins as the first, without the last one's frames
    np.testing.assert_allclose(again, expected, rtol=1e-9, atol=1e-9)


def test_carried_windows_give_their_new_frames_at_once_and_hold_no_more_than_a_window() -> None:
    windows = Windows((8, 2), steps(4), network(), carried=True)
    z, noise = clip(1)
    came = []
    for _ in range(602):
        came.append(len(windows.push(z[0], noise[0])))
        assert len(windows._held) <= 8
    assert came == [*[0] * 7, 8, *([0] * 5 + [6]) * 99]
    assert windows.inside == 0
    assert windows.finish() == []


def test_noise_of_another_size_is_refused() -> None:
    z, noise = clip(1)
    with pytest.raises(UsageError, match="use state_for"):
        Windows((4, 1), steps(), network()).push(z[0, :, :2], noise[0])
