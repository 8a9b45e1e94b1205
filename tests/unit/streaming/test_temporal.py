"""Steady video: flicker halves, nothing is dragged along, noise stays noise."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from std_rt.evaluation.measures import WarpingError, sharpness
from std_rt.pipeline.stylizer import State, draw_noise
from std_rt.streaming.noise_warp import MovingNoise
from std_rt.streaming.optical_flow import Followed, Follower, enlarged, reduced, unmoved
from std_rt.streaming.temporal import TEMPORAL_MODES, Motion, TemporalFilter

Frame = NDArray[np.uint8]
Size = tuple[int, int]

_SIZE = (128, 160)
_SIDE = 48  # of the square that crosses the scene


def _soft(seed: int, size: Size = _SIZE, sigma: float = 2.5) -> Frame:
    """Blurred noise over the whole range: enough texture for flow to hold on to."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    blurred = cv2.GaussianBlur(noise.astype(np.float32), (0, 0), sigma)
    low, high = blurred.min(), blurred.max()
    return np.asarray((blurred - low) * (255 / (high - low)), np.uint8)


def _pan(count: int, step: int = 2, size: Size = _SIZE) -> list[Frame]:
    """A view that moves to the right by ``step`` px a frame."""
    wide = _soft(0, (size[0], size[1] + count * step))
    return [np.ascontiguousarray(wide[:, i * step : i * step + size[1]]) for i in range(count)]


def _crossing(count: int, step: int = 4) -> Iterator[tuple[Frame, slice]]:
    """A light square with strong texture that crosses a darker scene; frames, and the columns it covers."""
    scene = (_soft(1) // 2).astype(np.uint8)
    square = (128 + _soft(2, (_SIDE, _SIDE)) // 2).astype(np.uint8)
    for i in range(count):
        frame, x = scene.copy(), 4 + i * step
        frame[40 : 40 + _SIDE, x : x + _SIDE] = square
        yield frame, slice(x, x + _SIDE)


def _flickering(contents: Sequence[Frame], levels: float = 14.0) -> list[Frame]:
    """A stylizer that inverts, and paints other strokes over every frame."""
    rng = np.random.default_rng(5)
    outputs = []
    for content in contents:
        strokes = cv2.GaussianBlur(rng.standard_normal(content.shape).astype(np.float32), (0, 0), 1.5)
        painted = 255.0 - content + levels * strokes / strokes.std()
        outputs.append(np.clip(painted, 0, 255).astype(np.uint8))
    return outputs


def _settled(temporal: TemporalFilter, contents: Sequence[Frame], outputs: Sequence[Frame]) -> list[Frame]:
    return [temporal.settle(o, temporal.follow(c)) for c, o in zip(contents, outputs, strict=True)]


def _into(figures: list[tuple[float, float]]) -> Callable[[float, float], None]:
    """For `TemporalFilter`: error and sharpness as measured."""
    return lambda error, sharp: figures.append((error, sharp))


def _state(size: Size = _SIZE, seed: int = 0) -> State:
    return State(seed, 0, draw_noise(seed, (2, 4, size[0] // 8, size[1] // 8)))


def _moved(size: Size, x: float, y: float = 0.0) -> Followed:
    """Every pixel was ``x``, ``y`` px further right and down before."""
    source = unmoved(size) + np.array([x, y], np.float32)
    return Followed(source, np.ones(size, np.float32))


def _error(contents: Sequence[Frame], outputs: Sequence[Frame]) -> float:
    found = WarpingError(contents).of(outputs)
    assert found is not None
    return found


def test_off_gives_back_the_very_state_and_frames() -> None:
    temporal, state = TemporalFilter("off"), _state()
    for content in _pan(5):
        motion = temporal.follow(content)
        assert motion.followed is None
        assert temporal.noise(state, motion) is state
        assert temporal.settle(content, motion) is content


def test_full_lowers_the_warping_error_by_more_than_two_fifths() -> None:
    contents = _pan(24)
    outputs = _flickering(contents)
    off = _error(contents, outputs)
    assert off > 0.04
    assert _error(contents, _settled(TemporalFilter("full"), contents, outputs)) < 0.6 * off


def test_noise_leaves_the_frames_of_the_engines_alone() -> None:
    contents = _pan(3)
    outputs = _flickering(contents)
    assert all(
        a is b for a, b in zip(_settled(TemporalFilter("noise"), contents, outputs), outputs, strict=True)
    )


def test_no_ghost_follows_a_moving_square() -> None:
    clip = list(_crossing(20))
    contents = [frame for frame, _ in clip]
    outputs = [np.asarray(255 - frame) for frame in contents]
    settled = _settled(TemporalFilter("full"), contents, outputs)
    smeared = outputs[0].astype(np.float32)
    for i, (now, (_, before)) in enumerate(zip(clip[1:], clip[:-1], strict=True), 1):
        smeared = 0.9 * smeared + 0.1 * outputs[i]
        left = (slice(44, 36 + _SIDE), slice(before.start, now[1].start))  # what the square has just left
        ghost = np.abs(settled[i][left].astype(np.float32) - outputs[i][left]).mean()
        assert ghost < 10  # the square and what is behind it differ by 135
        assert ghost < 0.15 * np.abs(smeared[left] - outputs[i][left]).mean()


def test_edges_of_a_moving_square_stay_where_they_are() -> None:
    contents = [frame for frame, _ in _crossing(16)]
    outputs = [np.asarray(255 - frame) for frame in contents]
    settled = _settled(TemporalFilter("full"), contents, outputs)
    off = np.abs(settled[-1].astype(np.float32) - outputs[-1])
    assert off.mean() < 1
    assert np.percentile(off, 99) < 20  # of the 135 between the square and the scene


def test_detail_does_not_wear_away() -> None:
    contents = _pan(30, step=1)
    outputs = _flickering(contents)
    settled = _settled(TemporalFilter("full"), contents, outputs)

    def sharpness(frame: Frame) -> float:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
        return float(np.square(np.diff(grey, axis=1)).mean())

    assert sharpness(settled[-1]) > 0.9 * sharpness(outputs[-1])  # 0.8 for the plain mean


def test_the_picture_does_not_freeze() -> None:
    temporal, content = TemporalFilter("full"), _soft(0)
    dark = np.full_like(content, 100)
    for _ in range(3):
        temporal.settle(dark, temporal.follow(content))
    lighter = np.full_like(content, 104)  # with whole levels, a tenth of 4 would be lost in every frame
    for _ in range(40):
        shown = temporal.settle(lighter, temporal.follow(content))
    assert np.abs(shown.astype(int) - 104).max() <= 1


def test_a_slow_fade_of_the_scene_is_not_held_back() -> None:
    temporal = TemporalFilter("full")
    first, second = _soft(0).astype(np.float32), _soft(9).astype(np.float32)
    late = []
    for share in np.linspace(0, 1, 20):
        content = (first + share * (second - first)).astype(np.uint8)
        shown = temporal.settle(content, temporal.follow(content))
        late.append(np.abs(shown.astype(np.float32) - content).mean())
    assert max(late) < 9  # 12 where frames are compared with the last one, not with what the history shows


def test_a_cut_resets_everything() -> None:
    temporal, state = TemporalFilter("full"), _state()
    outputs = _flickering(_pan(9, step=8))
    for content, output in zip(_pan(9, step=8), outputs, strict=True):
        motion = temporal.follow(content)
        moved = temporal.noise(state, motion)
        temporal.settle(output, motion)
    assert moved is not state
    other = np.asarray(_soft(77) // 3, np.uint8)
    motion = temporal.follow(other)
    assert motion.followed is None
    assert temporal.noise(state, motion) is state
    assert temporal.settle(other, motion) is other
    assert temporal.follow(other).followed is not None


@pytest.mark.parametrize("mode", ["noise", "full"])
def test_moving_content_is_no_cut(mode: str) -> None:
    temporal = TemporalFilter(mode)
    motions = [temporal.follow(frame) for frame, _ in _crossing(12)]
    assert all(motion.followed is not None for motion in motions[1:])


@pytest.mark.parametrize("mode", ["noise", "full"])
def test_a_still_clip_keeps_the_noise_of_off(mode: str) -> None:
    temporal, state, content = TemporalFilter(mode), _state(), _soft(0)
    for _ in range(4):
        assert temporal.noise(state, temporal.follow(content)) is state


def test_grain_of_the_camera_moves_no_noise() -> None:
    temporal, state, rng = TemporalFilter("full"), _state(), np.random.default_rng(0)
    for _ in range(12):
        grainy = np.clip(_soft(0) + rng.normal(0, 3, (*_SIZE, 3)), 0, 255).astype(np.uint8)
        kept = temporal.noise(state, temporal.follow(grainy)).noise
    assert (kept != state.noise).any(axis=(0, 1)).mean() < 0.02


@pytest.mark.parametrize(("step", "frames"), [(8, 1), (1, 8), (2, 4), (3, 8)])
def test_noise_moves_as_far_as_its_content(step: int, frames: int) -> None:
    noise = _state().noise
    moving = MovingNoise(noise)
    for _ in range(frames):
        moving.follow(_moved(_SIZE, step))
    cells = step * frames // 8
    assert np.array_equal(moving.noise[..., :-cells], noise[..., cells:])


def test_noise_follows_what_is_seen_to_move() -> None:
    temporal, state = TemporalFilter("noise"), _state()
    for content in _pan(13):
        noise = temporal.noise(state, temporal.follow(content)).noise
    inner = np.s_[:, :, 2:-2, 2:-6]
    followed = (noise[inner] == np.roll(state.noise, -3, 3)[inner]).all(axis=(0, 1))
    assert followed.mean() > 0.9


def test_noise_stays_unit_normal_and_white_whatever_the_flow() -> None:
    size, rng = (256, 320), np.random.default_rng(3)
    noise = draw_noise(1, (1, 4, 32, 40))
    moving, centre = MovingNoise(noise), np.array([160, 128], np.float32)
    for i in range(150):
        turn = cv2.getRotationMatrix2D((160, 128), 1.0, 1 + 0.03 * np.sin(i / 9)).astype(np.float32)
        source = unmoved(size) @ turn[:, :2].T + turn[:, 2]
        source += cv2.GaussianBlur(rng.standard_normal((*size, 2)).astype(np.float32), (0, 0), 6) * 12
        moving.follow(Followed(source, (rng.random(size) < 0.9).astype(np.float32)))
    assert np.abs(centre - source.mean((0, 1))).max() < 20
    assert np.array_equal(np.sort(moving.noise, axis=None), np.sort(noise, axis=None))  # mean, variance, all
    assert (moving.noise != noise).mean() > 0.9
    for axis in (2, 3):
        a, b = (np.take(moving.noise, range(*ends), axis) for ends in ((0, 31), (1, 32)))
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05  # 3.5 times its standard deviation
    cells = moving.noise.reshape(4, -1)
    assert {tuple(c) for c in cells.T} == {tuple(c) for c in noise.reshape(4, -1).T}  # channels stay together


def test_noise_stays_where_flow_cannot_be_trusted() -> None:
    moving = MovingNoise(_state().noise)
    before = moving.noise
    moving.follow(Followed(unmoved(_SIZE) + np.float32(24), np.zeros(_SIZE, np.float32)))
    assert moving.noise is before


def test_noise_goes_on_from_the_first_state_or_the_last() -> None:
    first, last = TemporalFilter("noise"), TemporalFilter("noise")
    home = carried = _state()
    for content in _pan(10, step=4):
        fixed = first.noise(home, first.follow(content))
        carried = last.noise(carried, last.follow(content))
        assert np.array_equal(fixed.noise, carried.noise)
    assert (fixed.seed, fixed.index) == (home.seed, home.index)
    other = _state(seed=4)
    assert first.noise(other, first.follow(content)) is other


def test_settling_later_gives_the_same() -> None:
    contents = _pan(10)
    outputs = _flickering(contents)
    figures: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    now, later = (TemporalFilter("full", _into(each)) for each in figures)
    motions = [later.follow(content) for content in contents]
    delayed = [later.settle(o, m) for o, m in zip(outputs, motions, strict=True)]
    for a, b in zip(_settled(now, contents, outputs), delayed, strict=True):
        assert np.array_equal(a, b)
    assert figures[0] == figures[1] != []


def test_a_frame_that_got_lost_is_not_bridged() -> None:
    contents = _pan(5)
    outputs = _flickering(contents)
    temporal = TemporalFilter("full")
    motions = [temporal.follow(content) for content in contents]
    for i in (0, 1, 2):
        temporal.settle(outputs[i], motions[i])
    assert temporal.settle(outputs[4], motions[4]) is outputs[4]


def test_another_size_and_a_reset_begin_anew() -> None:
    temporal, state = TemporalFilter("full"), _state()
    for content in _pan(9, step=8):
        motion = temporal.follow(content)
        temporal.noise(state, motion)
        temporal.settle(content, motion)
    small = _soft(0, (64, 96))
    motion = temporal.follow(small)
    assert (motion.index, motion.followed) == (0, None)
    fresh = _state((64, 96))
    assert temporal.noise(fresh, motion) is fresh
    assert temporal.settle(small, motion) is small
    temporal.reset()
    assert temporal.follow(small).followed is None


def test_another_style_is_there_at_once() -> None:
    temporal, content = TemporalFilter("full"), _soft(0)
    outputs = _flickering([content] * 6, levels=6)
    for output in outputs[:5]:
        temporal.settle(output, temporal.follow(content))
    other = np.asarray(255 - outputs[5], np.uint8)
    assert temporal.settle(other, temporal.follow(content), changing=True) is other


def test_a_crossfade_is_not_held_back() -> None:
    contents = [_soft(0)] * 40
    first, second = _flickering(contents, levels=6), _soft(4).astype(np.float32)
    late = {}
    for told in (False, True):
        temporal, late[told] = TemporalFilter("full"), 0.0
        for i, (content, output) in enumerate(zip(contents, first, strict=True)):
            share = min(1.0, max(0.0, (i - 9) / 20))
            styled = (output + share * (second - output)).astype(np.uint8)
            shown = temporal.settle(styled, temporal.follow(content), changing=told and 0 < share < 1)
            if 10 < i < 30:
                late[told] = max(late[told], float(np.abs(shown.astype(np.float32) - styled).mean()))
    assert late[True] < 0.4 * late[False]
    assert late[True] < 8


@pytest.mark.parametrize("mode", TEMPORAL_MODES)
def test_error_and_sharpness_are_those_of_the_sampled_pairs(mode: str) -> None:
    contents = _pan(40)
    outputs = _flickering(contents)
    figures: list[tuple[float, float]] = []
    temporal = TemporalFilter(mode, _into(figures))
    settled = _settled(temporal, contents[:8], outputs[:8])
    assert not figures
    settled += _settled(temporal, contents[8:], outputs[8:])
    pairs = [_error(contents[i - 1 : i + 1], settled[i - 1 : i + 1]) for i in (8, 38)]
    assert [error for error, _ in figures] == pytest.approx(pairs, rel=1e-6)
    sharp = [sharpness(settled[i : i + 1], contents[i : i + 1]) for i in (8, 38)]
    assert [found for _, found in figures] == pytest.approx(sharp, rel=1e-6)


def test_the_error_is_not_that_of_a_cut() -> None:
    contents = [*_pan(8), *(np.asarray(_soft(i) // 2, np.uint8) for i in (50, 51))]
    figures: list[tuple[float, float]] = []
    _settled(TemporalFilter("off", _into(figures)), contents, contents)
    assert not figures


def test_large_frames_are_followed_at_a_reduced_size() -> None:
    size = (384, 512)
    assert reduced(np.zeros((*size, 3), np.uint8)).shape == (192, 256, 3)
    follower = Follower(fine=True, weight=0.9)
    for content in _pan(3, step=6, size=size):
        found = follower.follow(content)
    assert found is not None
    way = (found.source - unmoved(size))[64:-64, 64:-64]
    assert np.abs(way - np.array([6, 0])).mean() < 0.2
    assert found.trust[64:-64, 64:-64].mean() > 0.9
    contents = _pan(10, step=6, size=size)
    figures: list[tuple[float, float]] = []
    _settled(TemporalFilter("off", _into(figures)), contents, contents)
    ((error, sharp),) = figures
    assert error < 0.01
    assert sharp == 1


def test_a_flow_of_half_the_size_points_to_the_same_places() -> None:
    found = enlarged(unmoved((32, 40)) + np.float32(1.5), np.ones((32, 40), np.float32), (64, 80))
    assert np.allclose(found.source, unmoved((64, 80)) + 3)
    assert found.trust.shape == (64, 80)


@pytest.mark.parametrize("size", [(8, 8), (12, 16), (16, 400)])
@pytest.mark.parametrize("mode", TEMPORAL_MODES)
def test_small_frames_pass(mode: str, size: Size) -> None:
    temporal, state = TemporalFilter(mode), _state(size)
    for content in _pan(10, step=1, size=size):
        motion = temporal.follow(content)
        assert temporal.noise(state, motion).noise.shape == state.noise.shape
        assert temporal.settle(content, motion).shape == content.shape


def test_memory_does_not_grow() -> None:
    contents = _pan(60, size=(64, 96))
    temporal, state = TemporalFilter("full"), _state((64, 96))

    def play() -> None:
        for content in contents:
            motion = temporal.follow(content)
            temporal.noise(state, motion)
            temporal.settle(content, motion)

    tracemalloc.start()
    try:
        play()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(3):
            play()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 50_000  # one frame kept would be 18 kB, a hundred and eighty are


def test_wrong_use_says_so() -> None:
    with pytest.raises(ValueError, match="off, noise, full"):
        TemporalFilter("on")
    with pytest.raises(ValueError, match="cannot be settled"):
        TemporalFilter("full").settle(_soft(0, (16, 16)), Motion(0, (32, 32)))
