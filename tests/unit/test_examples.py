"""Example pictures: the same everywhere, distinct, and not blank."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from std_rt.examples import SCENES, STYLES

PICTURES = {**SCENES, **STYLES}


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """Every picture at a small size."""
    return {name: draw(96) for name, draw in PICTURES.items()}


def test_they_have_the_size_asked_for(drawn: dict[str, np.ndarray]) -> None:
    for name, frame in drawn.items():
        assert (frame.shape, frame.dtype) == ((96, 96, 3), np.uint8), name


def test_they_are_drawn_and_not_filled(drawn: dict[str, np.ndarray]) -> None:
    for name, frame in drawn.items():
        assert frame.std() > 15, name
        assert cv2.Laplacian(frame.mean(2), cv2.CV_64F).std() > 3, name


def test_styles_have_palettes_of_their_own(drawn: dict[str, np.ndarray]) -> None:
    def palette(frame: np.ndarray) -> np.ndarray:
        return (
            np.histogramdd(frame.reshape(-1, 3), bins=4, range=[(0, 256)] * 3, density=False)[0]
            / frame[..., 0].size
        )

    for a, b in itertools.combinations(STYLES, 2):
        assert np.minimum(palette(drawn[a]), palette(drawn[b])).sum() < 0.75, (a, b)


@pytest.mark.parametrize("draw", [SCENES["street"], STYLES["wave"], STYLES["stained_glass"]])
def test_they_are_the_same_every_time(draw: Callable[[int], np.ndarray]) -> None:
    np.testing.assert_array_equal(draw(64), draw(64))
