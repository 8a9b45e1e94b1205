"""Picture quality of a bundle: the flicker reported is that of the clip that `std-rt stylize` writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from std_rt.core.bundle import Bundle
from std_rt.evaluation.bundle_comparison import Contender, Material, Results
from std_rt.evaluation.measures import WarpingError
from std_rt.evaluation.picture_quality import Clip, paint_clip, pair_files, read_mask
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


def _judged(stylizer: Stylizer, frames: list[Frame], style: Frame) -> dict[str, dict[str, float]]:
    clip = Clip(Path("clip.mp4"), "clip--style", frames, style, WarpingError(frames))
    results = Results(Material([], [], [clip], len(style)))
    opened = nullcontext(stylizer)
    results.add_bundle(Contender("ours", stylizer.bundle, 2), lambda: opened, lambda *_: None)
    return results.steady["clip.mp4"]


def test_the_flicker_reported_is_the_products(stylizer: Stylizer, clip: list[Frame]) -> None:
    """By hand, as `std-rt stylize --temporal full` does: follow the motion, move the noise, mix."""
    style = np.full((32, 32, 3), 200, np.uint8)
    temporal, state, steady = TemporalFilter("full"), stylizer.state(64, 64), []
    for frame in clip:
        motion = temporal.follow(frame)
        styled = stylizer.run(frame, temporal.noise(state, motion))
        steady.append(temporal.settle(styled, motion))
    found, meter = _judged(stylizer, clip, style), WarpingError(clip)
    assert found["ours"] == pytest.approx(meter.judge(steady), rel=0.01)
    alone = [stylizer.step(frame)[0] for frame in clip]
    assert found["ours, temporal off"] == pytest.approx(meter.judge(alone), rel=0.01)
    assert found["ours"]["warping"] < 0.9 * found["ours, temporal off"]["warping"]


def test_painted_frames_have_the_size_of_their_contents(stylizer: Stylizer) -> None:
    clip = list(moving(5, 90, 70))
    assert [frame.shape for frame in paint_clip(stylizer, clip, "full")] == [(70, 90, 3)] * 5


def test_a_clip_of_cuts_says_nothing_about_flicker(stylizer: Stylizer) -> None:
    rng = np.random.default_rng(0)
    cuts = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(3)]
    assert _judged(stylizer, cuts, cuts[0]) == {}


@pytest.mark.parametrize("styles", [1, 5, 7, 24])
def test_every_style_comes_before_one_comes_again(tmp_path: Path, styles: int) -> None:
    for kind, count in (("contents", 10), ("styles", styles)):
        (tmp_path / kind).mkdir()
        for i in range(count):
            (tmp_path / kind / f"{i:02d}.png").touch()
    pairs = pair_files(tmp_path / "contents", tmp_path / "styles", 2 * styles)
    assert pairs == pair_files(tmp_path / "contents", tmp_path / "styles", 2 * styles)
    for half in (pairs[:styles], pairs[styles:]):
        assert len({style for _, style in half}) == styles
    assert len({content for content, _ in pairs}) == min(10, 2 * styles)


def test_what_a_mask_leaves_transparent_is_not_stylized(tmp_path: Path) -> None:
    painted = Image.new("RGBA", (64, 64))
    painted.paste("white", (0, 0, 32, 64))
    painted.save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", 64)
    assert mask[:, :30].all()
    assert not mask[:, 34:].any()
