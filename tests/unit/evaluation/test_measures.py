"""The weight-free measures against values known beforehand."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from std_rt.evaluation.measures import (
    Flow,
    WarpingError,
    lattice,
    score,
    sharpness,
    sliced_wasserstein,
    ssim,
    structure_agreement,
    warp,
)

Frame = NDArray[np.uint8]


def _soft(seed: int = 0, size: int = 96) -> Frame:
    """Blurred noise over the whole range: enough texture for flow to hold on to."""
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return np.asarray(
        cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX), np.uint8
    )


def _grey(value: int) -> Frame:
    return np.full((32, 32, 3), value, np.uint8)


def test_identical_pictures_have_the_best_of_every_score() -> None:
    found = score(_soft(), _soft(), _soft())
    assert found.ssim == pytest.approx(1)
    assert found.structure == pytest.approx(1)
    assert (found.colour, found.texture) == (0, 0)


def test_ssim_of_flat_pictures_is_its_luminance_term() -> None:
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(_grey(100), _grey(150)) == pytest.approx(expected, rel=1e-6)


def test_ssim_is_what_its_definition_says_for_one_window() -> None:
    a, b = _soft(1, 11), _soft(2, 11)
    x, y = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY).astype(np.float64) for f in (a, b))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / np.outer(line, line).sum()
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
    shared = (weight * (x - mx) * (y - my)).sum()
    c1, c2 = 6.5025, 58.5225
    expected = (2 * mx * my + c1) * (2 * shared + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b) == pytest.approx(expected, rel=1e-9)


def test_ssim_sees_an_inverted_and_a_noisy_picture() -> None:
    frame = _soft()
    noise = np.random.default_rng(1).normal(0, 25, frame.shape)
    noisy = np.clip(frame + noise, 0, 255).astype(np.uint8)
    assert ssim(255 - frame, frame) < 0
    assert 0.1 < ssim(noisy, frame) < 0.95


def test_a_picture_too_small_for_ssim_says_so() -> None:
    with pytest.raises(ValueError, match="11 px"):
        ssim(_soft(0, 10), _soft(0, 10))


def test_structure_of_a_flat_picture_is_no_agreement() -> None:
    assert structure_agreement(_grey(7), _soft(0, 32)) == 0


def test_scores_look_inside_the_mask_only() -> None:
    content, style = _soft(0), _soft(1)
    mask = np.zeros(content.shape[:2], np.bool_)
    mask[16:80, 16:80] = True
    spoiled = content.copy()
    spoiled[~mask] = 0
    whole, inside = score(spoiled, content, style), score(spoiled, content, style, mask)
    alone = score(content, content, style, mask)
    assert (inside.colour, inside.texture) == (alone.colour, alone.texture)
    assert whole.texture > 1.5 * inside.texture
    # The windows of these two reach over the edge of the mask.
    assert inside.structure > whole.structure
    assert inside.ssim > whole.ssim + 0.2


def test_sliced_wasserstein_in_one_dimension_is_the_shift() -> None:
    x = np.random.default_rng(0).normal(size=(999, 1)).astype(np.float32)
    assert sliced_wasserstein(x, x + np.float32(0.25)) == pytest.approx(0.25, rel=1e-5)
    assert sliced_wasserstein(x, np.repeat(x, 2, axis=0)) < 0.02  # the same set, every member twice
    assert sliced_wasserstein(x[:1], x[:1]) == 0


def test_sliced_wasserstein_compares_quantiles() -> None:
    x, y = (np.random.default_rng(i).normal(size=(300 + i, 3)).astype(np.float32) for i in (0, 1))
    d = np.random.default_rng(0).standard_normal((3, 64))
    d /= np.linalg.norm(d, axis=0)
    a, b = (np.quantile(v @ d, np.linspace(0, 1, 512), axis=0) for v in (x, y))
    assert sliced_wasserstein(x, y) == pytest.approx(np.sqrt(np.mean((a - b) ** 2)), rel=1e-4)


def test_flow_finds_a_shift() -> None:
    wide = _soft(0, 128)
    before, after = (np.ascontiguousarray(wide[:96, x : x + 96]) for x in (8, 11))
    flow = Flow.between(before, after)
    y, x = np.mgrid[:96, :96]
    inner = flow.source[16:-16, 16:-16]
    assert np.abs(inner[..., 0] - x[16:-16, 16:-16] - 3).mean() < 0.1
    assert np.abs(inner[..., 1] - y[16:-16, 16:-16]).mean() < 0.1
    assert not flow.followed[:, -2:].any()  # what has come into view was nowhere before
    assert np.abs(warp(before, flow.source) - after)[flow.followed].mean() < 1


def _walk(change: Callable[[Frame, int], Frame]) -> tuple[float, float]:
    """(floor, error of the outputs) of a picture that moves by two pixels a frame."""
    wide = _soft(0, 128)
    contents = [np.ascontiguousarray(wide[:96, 2 * i : 2 * i + 96]) for i in range(4)]
    meter = WarpingError(contents)
    assert meter.pairs == 3
    assert meter.floor is not None
    error = meter.of([change(frame, i) for i, frame in enumerate(contents)])
    assert error is not None
    return meter.floor, error


def test_what_moves_with_its_content_does_not_flicker() -> None:
    floor, error = _walk(lambda frame, _: 255 - frame)
    assert floor < 0.002
    assert error == pytest.approx(floor, rel=1e-3)


def test_flicker_is_its_own_height() -> None:
    _, error = _walk(lambda frame, i: frame // 2 + np.uint8(51 * (i % 2)))
    assert error == pytest.approx(0.2, abs=0.005)


def test_a_pattern_that_stands_still_on_a_moving_picture_is_found() -> None:
    still = _soft(3)
    floor, error = _walk(lambda *_: still)
    assert error > 10 * floor


def test_cuts_are_left_out() -> None:
    rng = np.random.default_rng
    frames = [rng(i).integers(0, 256, (96, 96, 3), np.uint8) for i in range(3)]
    meter = WarpingError(frames)
    assert (meter.pairs, meter.floor, meter.of(frames)) == (0, None, None)
    assert WarpingError([_soft(0), _soft(0), _soft(5)]).pairs == 1


def test_sharpness_is_the_slope_of_a_ramp() -> None:
    """Two ways to one answer: a ramp's gradient is known, and it scales with contrast."""
    ramp = np.repeat(np.tile(np.arange(0, 96, 2, np.uint8), (48, 1))[..., None], 3, axis=2)
    assert sharpness([ramp * 2], [ramp]) == pytest.approx(2, rel=1e-3)
    half = np.zeros(ramp.shape[:2], np.bool_)
    half[:, :20] = True
    spoiled = np.where(half[..., None], ramp * 2, ramp).astype(np.uint8)
    assert sharpness([spoiled], [ramp]) > 2.1  # the step between them counts
    inner = np.zeros_like(half)
    inner[:, 2:18] = True
    assert sharpness([spoiled], [ramp], inner) == pytest.approx(2, rel=1e-3)
    assert sharpness([_grey(9)], [_grey(9)]) == 0


def test_a_lattice_of_the_decoders_period_is_seen() -> None:
    rng = np.random.default_rng(0)
    picture = np.clip(rng.normal(128, 12, (128, 128, 3)), 0, 255).astype(np.uint8)
    dots = picture.copy()
    dots[3::8, 5::8] += 40
    assert lattice(picture) < 0.15
    assert lattice(dots) > lattice(picture) + 0.1
    assert lattice(dots, period=7) < lattice(picture, period=7) + 0.05
    left = np.zeros((128, 128), bool)
    left[:, :64] = True
    mixed = np.concatenate([picture[:, :64], dots[:, 64:]], 1)
    assert lattice(mixed, left) == pytest.approx(lattice(picture, left), rel=0.05)
    assert lattice(mixed, ~left) == pytest.approx(lattice(dots, ~left), rel=0.05)
    assert lattice(np.full((64, 64, 3), 9, np.uint8)) == 0


def test_blur_lowers_the_warping_error_and_is_seen_in_the_sharpness() -> None:
    wide, rng = _soft(0, 128), np.random.default_rng(5)
    contents = [np.ascontiguousarray(wide[:96, 2 * i : 2 * i + 96]) for i in range(5)]
    grain = [rng.integers(0, 60, (96, 96, 1), np.uint8) for _ in contents]
    painted = [frame // 2 + 60 + one for frame, one in zip(contents, grain, strict=True)]
    blurred = [np.asarray(cv2.GaussianBlur(frame, (0, 0), 3), np.uint8) for frame in painted]
    meter = WarpingError(contents)
    crisp, soft = meter.judge(painted), meter.judge(blurred)
    assert soft["warping"] < 0.5 * crisp["warping"]
    assert soft["sharpness"] < 0.5 * crisp["sharpness"]
    assert meter.judge(contents) == {"warping": meter.floor, "sharpness": pytest.approx(1)}
    assert WarpingError([contents[0]]).judge(contents[:1]) == {}
