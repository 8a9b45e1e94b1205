"""Picture quality of a bundle: the flicker reported is that of the clip that `std-rt stylize` writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.handmade import write_handmade

from std_rt.core.bundle import Bundle
from std_rt.evaluation.bundle_comparison import Contender, Material, Results
from std_rt.evaluation.measures import WarpingError, structure_agreement
from std_rt.evaluation.picture_quality import Clip, judge_clip, paint_clip, pair_files, read_mask, time_slice
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


def _moving(found: dict[str, float]) -> dict[str, float]:
    return {name: found[name] for name in ("warping", "sharpness")}


def test_the_flicker_reported_is_the_products(stylizer: Stylizer, clip: list[Frame]) -> None:
    """By hand, as `std-rt stylize --temporal full` does: follow the motion, move the noise, mix."""
    style = np.full((32, 32, 3), 200, np.uint8)
    stylizer.set_style(style)
    temporal, state, steady = TemporalFilter("full"), stylizer.state(64, 64), []
    for frame in clip:
        motion = temporal.follow(frame)
        styled = stylizer.run(frame, temporal.noise(state, motion))
        steady.append(temporal.settle(styled, motion))
    found, meter = _judged(stylizer, clip, style), WarpingError(clip)
    assert _moving(found["ours"]) == pytest.approx(meter.judge(steady), rel=0.01)
    alone = [stylizer.step(frame)[0] for frame in clip]
    assert _moving(found["ours, temporal off"]) == pytest.approx(meter.judge(alone), rel=0.01)
    assert found["ours"]["warping"] < 0.9 * found["ours, temporal off"]["warping"]


def test_a_video_to_video_bundle_is_judged_as_it_paints_clips(tmp_path: Path, clip: list[Frame]) -> None:
    """In windows of neighbouring frames, which a still does not have."""
    bundle, style = write_handmade(tmp_path / "v2v", window=(4, 1)), np.full((32, 32, 3), 200, np.uint8)
    with Stylizer.load(bundle, backend="openvino", precision="fp32", size=64, steps=2) as stylizer:
        found = _judged(stylizer, clip, style)
        stream, noise = stylizer.window_stream(stylizer.quality(64, 64)), stylizer.state(64, 64).noise
        painted = [*(done for frame in clip for done in stream.push(frame, noise)), *stream.flush()]
        alone = [stylizer.stylize(frame) for frame in clip]
    meter = WarpingError(clip)
    assert _moving(found["ours, temporal off"]) == pytest.approx(meter.judge(painted))
    assert _moving(found["ours, temporal off"]) != pytest.approx(meter.judge(alone), rel=0.02)


@pytest.mark.parametrize(
    ("count", "chosen"), [(5, range(5)), (30, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27])]
)
def test_looks_are_means_over_frames_spread_evenly(count: int, chosen: range | list[int]) -> None:
    frames = list(moving(count, 64, 64))
    outputs = [np.roll(frame, i, 1) for i, frame in enumerate(frames)]
    clip = Clip(Path("clip.mp4"), "clip--style", frames, frames[0], WarpingError(frames))
    found = judge_clip(clip, outputs)
    assert found["structure"] == pytest.approx(
        np.mean([structure_agreement(outputs[i], frames[i]) for i in chosen])
    )
    assert _moving(found) == clip.meter.judge(outputs)


def test_a_slice_over_time_is_the_middle_row_of_each_frame(clip: list[Frame]) -> None:
    found = time_slice(clip)
    assert found.shape == (60, 64, 3)
    for i, frame in enumerate(clip):
        assert (found[5 * i : 5 * i + 5] == frame[32]).all()


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
    every = pair_files(tmp_path / "contents", tmp_path / "styles", 1000)
    assert len(every) == len({*every}) == 10 * styles


def test_what_a_mask_leaves_transparent_is_not_stylized(tmp_path: Path) -> None:
    painted = Image.new("RGBA", (64, 64))
    painted.paste("white", (0, 0, 32, 64))
    painted.save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", 64)
    assert mask[:, :30].all()
    assert not mask[:, 34:].any()
