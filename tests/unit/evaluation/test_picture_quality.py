"""Picture quality of a bundle: the flicker reported is that of the clip that `std-rt stylize` writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from std_rt.core.bundle import Bundle
from std_rt.evaluation.measures import WarpingError
from std_rt.evaluation.picture_quality import judge_clip, paint_clip, read_mask
from std_rt.examples import moving
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.temporal import TemporalFilter

Frame = NDArray[np.uint8]


@pytest.fixture(scope="module")
def stylizer(handmade: Bundle) -> Iterator[Stylizer]:
    with Stylizer.load(handmade, backend="openvino", precision="fp32", size=64, steps=2) as stylizer:
        stylizer.set_style(np.full((32, 32, 3), 200, np.uint8))
        yield stylizer


@pytest.fixture(scope="module")
def clip() -> list[Frame]:
    return list(moving(12, 64, 64))


def test_the_flicker_reported_is_the_products(stylizer: Stylizer, clip: list[Frame]) -> None:
    """By hand, as `std-rt stylize --temporal full` does: follow the motion, move the noise, mix."""
    style = np.full((32, 32, 3), 200, np.uint8)
    temporal, state, steady = TemporalFilter("full"), stylizer.state(64, 64), []
    for frame in clip:
        motion = temporal.follow(frame)
        styled = stylizer.run(frame, temporal.noise(state, motion))
        steady.append(temporal.settle(styled, motion))
    found, meter = judge_clip(stylizer, clip, style), WarpingError(clip)
    assert found["std-rt"] == pytest.approx(meter.of(steady), rel=0.01)
    alone = [stylizer.step(frame)[0] for frame in clip]
    assert found["std-rt, temporal off"] == pytest.approx(meter.of(alone), rel=0.01)
    assert found["std-rt"] < 0.9 * found["std-rt, temporal off"]


def test_painted_frames_have_the_size_of_their_contents(stylizer: Stylizer) -> None:
    clip = list(moving(5, 90, 70))
    assert [frame.shape for frame in paint_clip(stylizer, clip, "full")] == [(70, 90, 3)] * 5


def test_a_clip_of_cuts_says_nothing_about_flicker(stylizer: Stylizer) -> None:
    rng = np.random.default_rng(0)
    cuts = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(3)]
    assert judge_clip(stylizer, cuts, cuts[0]) == {}


def test_what_a_mask_leaves_transparent_is_not_stylized(tmp_path: Path) -> None:
    painted = Image.new("RGBA", (64, 64))
    painted.paste("white", (0, 0, 32, 64))
    painted.save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", 64)
    assert mask[:, :30].all()
    assert not mask[:, 34:].any()
