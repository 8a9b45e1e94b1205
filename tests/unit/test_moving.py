"""The moving example: it loops, it moves, and the same seed draws the same frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support.media_samples import frame_times

from std_rt.examples.moving import moving_scene, write_moving_scene


def test_it_moves_and_ends_where_it_began() -> None:
    frames = [frame.astype(np.int16) for frame in moving_scene(24, 160, 120)]
    steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:] + frames[:1], strict=True)]
    assert min(steps) > 3  # more than grain
    assert steps[-1] < 1.5 * np.median(steps)  # the last to the first is a step like any other


def test_the_same_seed_draws_the_same() -> None:
    first, again, other = (next(moving_scene(9, 96, 64, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_clip_has_every_frame(tmp_path: Path) -> None:
    write_moving_scene(tmp_path / "a.mp4", 12, fps=24, width_px=96, height_px=64)
    assert len(frame_times(tmp_path / "a.mp4")) == 12
