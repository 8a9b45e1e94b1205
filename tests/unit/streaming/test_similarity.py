"""The similarity filter on frames with sensor noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from std_rt.core.errors import UsageError
from std_rt.streaming.similarity import SimilarityFilter, similarity, thumbnail

Frame = NDArray[np.uint8]


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
    assert sum(still.skip(frame) for frame in noisy(5, 60)) > 30
    assert sum(alive.skip(frame) for frame in moving(50)) <= 4


@pytest.mark.parametrize("size", [(256, 256), (192, 320), (512, 512), (768, 1024)])
def test_noise_is_similar_at_every_size(size: tuple[int, int]) -> None:
    first, *others = (thumbnail(frame) for frame in noisy(5, 3, *size))
    assert max(first.shape) == 32
    assert all(similarity(first, other) > 0.99 for other in others)


def test_similarity_is_one_for_equals_and_nothing_for_opposites() -> None:
    black, white = np.zeros((20, 32, 3), np.uint8), np.full((20, 32, 3), 255, np.uint8)
    assert similarity(black, black) == 1
    assert similarity(black, white) == 0
    part = black.copy()
    part[3:5, 4:7] = 255  # the 6 cells that are 1 % of 640
    assert similarity(black, part) == 0


def test_equal_frames_are_skipped_up_to_the_limit() -> None:
    similar = SimilarityFilter(max_skip=4)
    frame = next(noisy(0, 1))
    taken = [similar.skip(frame) for _ in range(16)]
    assert taken == [False, *[True] * 4] * 3 + [False]


@given(alike=st.floats(0.0, 1.0), threshold=st.floats(0.0, 0.99))
@settings(max_examples=8, deadline=None)
def test_the_share_of_skips_rises_from_the_threshold_to_one(alike: float, threshold: float) -> None:
    similar = SimilarityFilter(threshold, max_skip=10**6, seed=3)
    black = np.zeros((32, 32, 3), np.uint8)
    grey = np.full_like(black, round(255 * (1 - alike)))
    share = max(0.0, (similarity(black, grey) - threshold) / (1 - threshold))
    taken = []
    for _ in range(300):  # always beside a processed black frame
        similar.force()
        similar.skip(black)
        taken.append(similar.skip(grey))
    assert abs(np.mean(taken) - share) < 0.12


def test_the_seed_determines_the_decisions() -> None:
    frames = list(noisy(8, 40))
    decisions = [
        [similar.skip(frame) for frame in frames]
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


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold"):
        SimilarityFilter(threshold)
    with pytest.raises(UsageError, match="1 or more"):
        SimilarityFilter(max_skip=0)
