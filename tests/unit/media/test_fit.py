"""Working sizes and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from std_rt.media.fit import over_white, resize, result_size, working_size

SIDES = st.integers(1, 20_000)


@given(h=SIDES, w=SIDES, target=st.integers(64, 1024), multiple=st.sampled_from([8, 16, 64]))
def test_working_size_divides_and_stays_near_the_target_area(
    h: int, w: int, target: int, multiple: int
) -> None:
    high, wide = working_size(h, w, target, multiple, min_px=64)
    assert high % multiple == 0
    assert wide % multiple == 0
    assert min(high, wide) >= 64
    # Rounding moves each side by at most one multiple.
    assert (high - multiple) * (wide - multiple) <= target * target


@given(h=SIDES, w=SIDES, target=st.integers(64, 1024))
def test_result_is_never_larger_than_input_or_working_size(h: int, w: int, target: int) -> None:
    work = working_size(h, w, target, 8, min_px=64)
    high, wide = result_size((h, w), work)
    assert 1 <= high <= h
    assert 1 <= wide <= w
    assert high <= work[0]
    assert wide <= work[1]


@pytest.mark.parametrize(
    ("hw", "target", "multiple", "expected"),
    [
        ((1000, 1000), 256, 8, (256, 256)),
        ((1080, 1920), 256, 8, (192, 344)),
        ((1920, 1080), 256, 8, (344, 192)),
        ((1080, 1920), (288, 512), 32, (288, 512)),
        ((100, 150), 256, 8, (104, 152)),  # smaller than the target: its own size, rounded up
        ((1, 1), 256, 8, (64, 64)),  # the minimum
        ((1, 10_000), 256, 8, (64, 1024)),  # the area wins over the aspect
    ],
)
def test_working_size_examples(
    hw: tuple[int, int], target: int, multiple: int, expected: tuple[int, int]
) -> None:
    assert working_size(*hw, target, multiple, min_px=64) == expected


def test_max_px_limits_the_long_side() -> None:
    assert working_size(300, 4000, 512, 8, min_px=64, max_px=768)[1] == 768


@given(h=st.integers(30, 3000), w=st.integers(30, 3000))
def test_result_keeps_the_aspect_within_a_pixel(h: int, w: int) -> None:
    high, wide = result_size((h, w), working_size(h, w, 256, 8, min_px=64))
    scale = wide / w if w > h else high / h
    assert abs(high - h * scale) <= 1
    assert abs(wide - w * scale) <= 1


def test_small_picture_comes_back_at_its_own_size() -> None:
    assert result_size((101, 149), working_size(101, 149, 256, 8)) == (101, 149)


def test_there_and_back_keeps_a_smooth_picture() -> None:
    ramp = np.linspace(0, 255, 90 * 120).reshape(90, 120)
    frame = np.stack([ramp, ramp.T.reshape(90, 120) * 0 + 40, 255 - ramp], axis=2).astype(np.uint8)
    work = resize(frame, (96, 128))
    assert work.shape == (96, 128, 3)
    assert work.dtype == np.uint8
    back = resize(work, (90, 120))
    assert np.abs(back.astype(int) - frame).mean() < 1.5


def test_one_pixel_and_long_strip_resize() -> None:
    assert resize(np.full((1, 1, 3), 9, np.uint8), (64, 64)).tolist() == np.full((64, 64, 3), 9).tolist()
    assert resize(np.zeros((1, 40_000, 3), np.uint8), (64, 1024)).shape == (64, 1024, 3)


def test_alpha_plane_resizes_too() -> None:
    assert resize(np.zeros((64, 64), np.uint8), (10, 20)).shape == (10, 20)


def test_bad_sizes_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="positive"):
        working_size(0, 10, 256, 8)


def test_over_white_blends_by_alpha() -> None:
    rgb = np.array([[[0, 100, 255]] * 3], np.uint8)
    laid = over_white(rgb, np.array([[0, 255, 51]], np.uint8))
    assert laid.tolist() == [[[255, 255, 255], [0, 100, 255], [204, 224, 255]]]
