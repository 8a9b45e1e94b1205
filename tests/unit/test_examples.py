"""Example pictures: every one there, distinct, what the tools render; and a moving one that is a loop."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.media_samples import frame_times

from std_rt import examples
from std_rt.examples import moving, scenes, styles, write_moving

Frame = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pictures() -> dict[str, Frame]:
    """Every picture at a small size."""
    return scenes(96) | styles(96)


def test_they_have_the_size_asked_for_and_are_not_blank(pictures: dict[str, Frame]) -> None:
    assert len(pictures) == 10
    for name, frame in pictures.items():
        assert (frame.shape, frame.dtype) == ((96, 96, 3), np.uint8), name
        assert frame.std() > 15, name
        assert cv2.Laplacian(frame.mean(2), cv2.CV_64F).std() > 3, name


def test_no_two_styles_share_a_palette(pictures: dict[str, Frame]) -> None:
    def palette(name: str) -> NDArray[np.float64]:
        colours = pictures[name].reshape(-1, 3)
        return np.histogramdd(colours, bins=4, range=[(0, 256)] * 3)[0] / len(colours)

    for a, b in itertools.combinations(styles(96), 2):
        assert np.minimum(palette(a), palette(b)).sum() < 0.85, (a, b)


@pytest.mark.long
def test_the_tools_still_render_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from tools.render_examples import render

    render(tmp_path)
    shipped = scenes() | styles()
    monkeypatch.setattr(examples, "_FOLDER", tmp_path)
    rendered = scenes() | styles()
    for name, frame in shipped.items():
        difference = np.abs(frame.astype(int) - rendered[name])
        assert difference.mean() < 1, name  # nothing where the same libraries rendered both


def test_the_moving_picture_moves_and_ends_where_it_began() -> None:
    frames = [frame.astype(np.int16) for frame in moving(24, 160, 120)]
    steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:] + frames[:1], strict=True)]
    assert min(steps) > 3  # more than grain
    assert steps[-1] < 1.5 * np.median(steps)  # the last to the first is a step like any other


def test_the_same_seed_gives_the_same_frames() -> None:
    first, again, other = (next(moving(9, 96, 64, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_clip_has_every_frame(tmp_path: Path) -> None:
    write_moving(tmp_path / "a.mp4", 12, fps=24, width_px=96, height_px=64)
    assert len(frame_times(tmp_path / "a.mp4")) == 12
