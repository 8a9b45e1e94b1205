"""Keeping colours: the luminance of one picture, the hue and chroma of another, whatever their sizes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from std_rt.media import fit
from std_rt.media.chroma import keep_colours

Frame = np.ndarray
Y = np.array([0.2126, 0.7152, 0.0722])


def _noise(height: int, width: int, seed: int = 0, low: int = 0, high: int = 256) -> Frame:
    return np.random.default_rng(seed).integers(low, high, (height, width, 3), np.uint8)


def _linear(frame: Frame) -> np.ndarray:
    v = frame / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def _lightness(frame: Frame) -> np.ndarray:
    """L*, 0..100."""
    y = _linear(frame) @ Y
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * (29 / 3) ** 3)


def _lab(frame: Frame) -> np.ndarray:
    return cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)


def test_a_picture_in_its_own_colours_is_itself() -> None:
    frame = _noise(300, 200)
    np.testing.assert_array_equal(keep_colours(frame, frame), frame)


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (2, 2), (7, 5), (300, 200)])
def test_the_lightness_is_that_of_the_styled_picture(size: tuple[int, int]) -> None:
    """Also for colours that sRGB lacks at that lightness, which clipping would shift by up to 20."""
    photo, styled = _noise(*size), _noise(*size, seed=1)
    difference = np.abs(_lightness(keep_colours(photo, styled)) - _lightness(styled))
    assert difference.max() < 0.3  # half a level of 255


def test_colours_that_fit_are_those_of_opencvs_lab() -> None:
    photo, styled = _noise(100, 100, low=100, high=140), _noise(100, 100, seed=1, low=100, high=140)
    swapped = _lab(photo)
    swapped[..., 0] = _lab(styled)[..., 0]
    expected = cv2.cvtColor(swapped, cv2.COLOR_Lab2RGB) * 255
    assert np.abs(keep_colours(photo, styled) - expected).max() <= 1.5


def test_colours_that_do_not_fit_lose_chroma_and_keep_their_hue() -> None:
    hues = np.array([[[255, 0, 0], [0, 160, 0], [20, 60, 220], [230, 120, 0]]], np.uint8)
    for level in (20, 90, 200, 245):
        result = _lab(keep_colours(hues, np.full_like(hues, level)))[0]
        wanted = _lab(hues)[0]
        chroma, most = (np.hypot(lab[:, 1], lab[:, 2]) for lab in (result, wanted))
        assert (chroma < most + 1).all()
        turned = np.angle((result[:, 1] + 1j * result[:, 2]) * (wanted[:, 1] - 1j * wanted[:, 2]), deg=True)
        assert np.abs(turned[chroma > 8]).max() < 25  # with clipped channels: 31


def test_greys_stay_greys() -> None:
    grey = np.repeat(_noise(40, 30)[..., :1], 3, axis=2)
    result = keep_colours(grey, _noise(40, 30, seed=1)).astype(int)
    assert np.ptp(result, axis=2).max() <= 1


def test_dark_noise_of_the_photo_is_not_amplified() -> None:
    dark = _noise(64, 64, high=3)
    result = keep_colours(dark, np.full_like(dark, 180)).astype(int)
    assert np.ptp(result, axis=2).max() <= 6


def test_strips_leave_no_seam_and_a_large_photo_is_resized() -> None:
    photo, styled = _noise(700, 500), _noise(350, 250, seed=1)  # three strips; transposed, others
    result = keep_colours(photo, styled)
    turned = keep_colours(fit.resize(photo, (350, 250)).transpose(1, 0, 2), styled.transpose(1, 0, 2))
    np.testing.assert_array_equal(result, turned.transpose(1, 0, 2))
