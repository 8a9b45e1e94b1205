"""The engine lane: whatever is painted together, every frame comes out as it does alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from std_rt.core.bundle import Bundle
from std_rt.examples import moving
from std_rt.live.pacing import SimilarityFilter
from std_rt.pipeline.conditioning import EncodedStyle
from std_rt.pipeline.stylizer import Quality, Stylizer
from std_rt.streaming.frame_packet import FramePacket
from std_rt.streaming.frame_stream import GROUPED, ONE_BY_ONE, STREAM_BATCH, WAYS, FrameStream

Frame = NDArray[np.uint8]


@pytest.fixture
def stylizer(handmade: Bundle) -> Iterator[Stylizer]:
    with Stylizer.load(handmade, backend="openvino", precision="fp32", steps=4) as stylizer:
        stylizer.set_style(_flat(200))
        yield stylizer


def _flat(value: int) -> Frame:
    return np.full((32, 32, 3), value, np.uint8)


def _frames(count: int, width: int = 72, height: int = 48) -> list[Frame]:
    return list(moving(count, width, height))


def _shots(frames: list[Frame]) -> list[FramePacket]:
    return [FramePacket(frame, index=index) for index, frame in enumerate(frames)]


def assert_same(ours: list[Frame], theirs: list[Frame]) -> None:
    """Equal, but for the rounding of a handful of values."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        difference = np.abs(a.astype(int) - b.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001


def alone(stylizer: Stylizer, frames: list[Frame]) -> list[Frame]:
    return [stylizer.step(frame, stylizer.state(*frame.shape[:2]))[0] for frame in frames]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 3, 9])  # fewer than fit together, and not a multiple of it
def test_every_way_gives_what_a_frame_alone_gives(stylizer: Stylizer, way: str, count: int) -> None:
    frames = _frames(count)
    assert_same(list(FrameStream(stylizer, way=way).frames(iter(frames))), alone(stylizer, frames))


def test_one_by_one_without_steadying_is_step_to_the_bit(stylizer: Stylizer) -> None:
    frames = _frames(3)
    for ours, theirs in zip(FrameStream(stylizer).frames(iter(frames)), alone(stylizer, frames), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_seed_is_that_of_step(stylizer: Stylizer) -> None:
    (frame,) = _frames(1)
    (ours,) = FrameStream(stylizer, seed=7).frames([frame])
    np.testing.assert_array_equal(ours, stylizer.stylize(frame, seed=7))
    assert (ours != stylizer.stylize(frame, seed=8)).any()


@pytest.mark.parametrize("way", WAYS)
def test_a_frame_has_the_style_that_it_came_in_with(stylizer: Stylizer, way: str) -> None:
    frames = _frames(7)
    dark, light = (stylizer.encode_style(_flat(value)) for value in (20, 230))
    asked: list[float] = []

    def style_at(now: float) -> tuple[EncodedStyle, float]:
        asked.append(now)
        return (dark if len(asked) <= 3 else light), 1.0

    ours = list(FrameStream(stylizer, style_at, way=way).frames(iter(frames)))
    expected = []
    for index, frame in enumerate(frames):
        stylizer.use_style(dark if index < 3 else light)
        expected.extend(alone(stylizer, [frame]))
    assert_same(ours, expected)
    assert np.abs(ours[2].astype(int) - ours[3]).mean() > 5  # the two styles do differ


@pytest.mark.parametrize("way", WAYS)
def test_a_change_of_size_loses_no_frame(stylizer: Stylizer, way: str) -> None:
    frames = [*_frames(5), *_frames(6, 48, 72), *_frames(2)]
    shots = list(FrameStream(stylizer, way=way).paint(_shots(frames)))
    assert [shot.index for shot in shots] == list(range(13))
    assert_same([shot.styled for shot in shots if shot.styled is not None], alone(stylizer, frames))


@pytest.mark.parametrize("way", [ONE_BY_ONE, STREAM_BATCH])
def test_another_level_from_one_frame_to_the_next(stylizer: Stylizer, way: str) -> None:
    frames, painter = _frames(8), FrameStream(stylizer, way=way)
    small = Quality((32, 48), 2)
    out: list[FramePacket] = []
    painted = painter.paint(iter(_shots(frames)))
    while len(out) < 8:
        out.append(next(painted))
        if len(out) == 2:
            out.extend(painter.go_to(small))
    assert painter.level == small
    assert [shot.index for shot in out] == list(range(8))
    sizes = [shot.styled.shape[:2] for shot in out if shot.styled is not None]
    changed = sizes.index((32, 48))
    assert sizes == [(48, 72)] * changed + [(32, 48)] * (8 - changed)
    assert 2 <= changed <= 5  # at once, or after what was inside the batch


def test_what_hardly_differs_is_not_painted_again(stylizer: Stylizer) -> None:
    frame, other = _frames(2)
    painter = FrameStream(stylizer, similar=SimilarityFilter(0.9, max_skip=100))
    shots = list(painter.paint(_shots([frame] * 6 + [other])))
    assert [shot.skipped for shot in shots] == [False] + [True] * 5 + [False]
    assert all(shot.styled is shots[0].styled for shot in shots[:6])


def test_a_change_of_style_is_painted_though_the_frame_is_the_same(stylizer: Stylizer) -> None:
    (frame,) = _frames(1)
    styles = [stylizer.encode_style(_flat(value)) for value in (20, 20, 230, 230)]
    turn = iter(styles)
    painter = FrameStream(
        stylizer, lambda now: (next(turn), 1.0), similar=SimilarityFilter(0.9, max_skip=100)
    )
    assert [shot.skipped for shot in painter.paint(_shots([frame] * 4))] == [False, True, False, True]


def test_similar_frames_are_left_out_one_by_one_only(stylizer: Stylizer) -> None:
    with pytest.raises(ValueError, match="stream batch"):
        FrameStream(stylizer, way=STREAM_BATCH, similar=SimilarityFilter())


def test_forgetting_gives_up_what_is_inside(stylizer: Stylizer) -> None:
    frames, painter = _frames(6), FrameStream(stylizer, way=STREAM_BATCH)
    shots = iter(_shots(frames))

    def interrupted() -> Iterator[FramePacket]:
        yield from (next(shots), next(shots))
        assert painter.forget() == 2
        yield from shots

    out = list(painter.paint(interrupted()))
    assert [shot.index for shot in out] == [2, 3, 4, 5]
    assert_same([shot.styled for shot in out if shot.styled is not None], alone(stylizer, frames[2:]))


def test_stages_are_timed(stylizer: Stylizer) -> None:
    for way in (ONE_BY_ONE, STREAM_BATCH, GROUPED):
        shots = list(FrameStream(stylizer, way=way).paint(_shots(_frames(9))))
        assert {"unet", "vae_encoder", "vae_decoder", "convert"} <= shots[3].stages_ms.keys()


def test_an_error_of_the_engines_is_raised(stylizer: Stylizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **named: object) -> Frame:
        raise RuntimeError("engine")

    monkeypatch.setattr(stylizer, "run", broken)
    with pytest.raises(RuntimeError, match="engine"):
        list(FrameStream(stylizer).frames(iter(_frames(2))))


def test_a_way_that_is_none_is_refused(stylizer: Stylizer) -> None:
    with pytest.raises(ValueError, match="no way 'sideways'"):
        FrameStream(stylizer, way="sideways")
