"""The engine lane: whatever is painted together, every frame comes out as it does alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from std_rt.core.bundle import Bundle
from std_rt.examples import moving
from std_rt.media.chroma import keep_colours
from std_rt.pipeline.conditioning import EncodedStyle
from std_rt.pipeline.stylizer import Quality, Stylizer
from std_rt.streaming.frame_stream import GROUPED, ONE_BY_ONE, STREAM_BATCH, FramePacket, FrameStream
from std_rt.streaming.similarity import SimilarityFilter
from std_rt.streaming.temporal import TemporalFilter

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


def _packets(frames: list[Frame]) -> list[FramePacket]:
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


@pytest.mark.parametrize("batching", [ONE_BY_ONE, STREAM_BATCH, GROUPED])
@pytest.mark.parametrize("count", [1, 3, 9])  # fewer than fit together, and not a multiple of it
def test_every_way_gives_what_a_frame_alone_gives(stylizer: Stylizer, batching: str, count: int) -> None:
    frames = _frames(count)
    assert_same(list(FrameStream(stylizer, batching=batching).frames(iter(frames))), alone(stylizer, frames))


def test_one_by_one_without_steadying_is_step_to_the_bit(stylizer: Stylizer) -> None:
    frames = _frames(3)
    for ours, theirs in zip(FrameStream(stylizer).frames(iter(frames)), alone(stylizer, frames), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_seed_is_that_of_step(stylizer: Stylizer) -> None:
    (frame,) = _frames(1)
    (ours,) = FrameStream(stylizer, seed=7).frames([frame])
    np.testing.assert_array_equal(ours, stylizer.stylize(frame, seed=7))
    assert (ours != stylizer.stylize(frame, seed=8)).any()


@pytest.mark.parametrize("batching", [ONE_BY_ONE, STREAM_BATCH, GROUPED])
def test_a_frame_has_the_style_that_it_came_in_with(stylizer: Stylizer, batching: str) -> None:
    frames = _frames(7)
    dark, light = (stylizer.encode_style(_flat(value)) for value in (20, 230))
    asked: list[float] = []

    def style_at(now: float) -> tuple[EncodedStyle, float]:
        asked.append(now)
        return (dark if len(asked) <= 3 else light), 1.0

    ours = list(FrameStream(stylizer, style_at, batching=batching).frames(iter(frames)))
    expected = []
    for index, frame in enumerate(frames):
        stylizer.use_style(dark if index < 3 else light)
        expected.extend(alone(stylizer, [frame]))
    assert_same(ours, expected)
    assert np.abs(ours[2].astype(int) - ours[3]).mean() > 5  # the two styles do differ


@pytest.mark.parametrize("batching", [ONE_BY_ONE, STREAM_BATCH, GROUPED])
def test_a_change_of_size_loses_no_frame(stylizer: Stylizer, batching: str) -> None:
    frames = [*_frames(5), *_frames(6, 48, 72), *_frames(2)]
    packets = list(FrameStream(stylizer, batching=batching).run(_packets(frames)))
    assert [packet.index for packet in packets] == list(range(13))
    assert_same([packet.styled for packet in packets if packet.styled is not None], alone(stylizer, frames))


@pytest.mark.parametrize("batching", [ONE_BY_ONE, STREAM_BATCH])
def test_another_level_from_one_frame_to_the_next(stylizer: Stylizer, batching: str) -> None:
    frames, stream = _frames(8), FrameStream(stylizer, batching=batching)
    small = Quality((32, 48), 2)
    out: list[FramePacket] = []
    painted = stream.run(iter(_packets(frames)))
    while len(out) < 8:
        out.append(next(painted))
        if len(out) == 2:
            out.extend(stream.switch(small))
    assert stream.quality == small
    assert [packet.index for packet in out] == list(range(8))
    sizes = [packet.styled.shape[:2] for packet in out if packet.styled is not None]
    changed = sizes.index((32, 48))
    assert sizes == [(48, 72)] * changed + [(32, 48)] * (8 - changed)
    assert 2 <= changed <= 5  # at once, or after what was inside the batch


def test_what_hardly_differs_is_not_painted_again(stylizer: Stylizer) -> None:
    frame, other = _frames(2)
    stream = FrameStream(stylizer, similarity=SimilarityFilter(0.9, max_skip=100))
    packets = list(stream.run(_packets([frame] * 6 + [other])))
    assert [packet.skipped for packet in packets] == [False] + [True] * 5 + [False]
    assert all(packet.styled is packets[0].styled for packet in packets[:6])


def test_a_change_of_style_is_painted_though_the_frame_is_the_same(stylizer: Stylizer) -> None:
    (frame,) = _frames(1)
    styles = [stylizer.encode_style(_flat(value)) for value in (20, 20, 230, 230)]
    turn = iter(styles)
    stream = FrameStream(
        stylizer, lambda now: (next(turn), 1.0), similarity=SimilarityFilter(0.9, max_skip=100)
    )
    assert [packet.skipped for packet in stream.run(_packets([frame] * 4))] == [False, True, False, True]


@pytest.mark.parametrize("batching", [ONE_BY_ONE, STREAM_BATCH, GROUPED])
def test_colours_are_kept_after_everything_else(stylizer: Stylizer, batching: str) -> None:
    """Of the frame itself, on what the temporal filter made: nothing that flickers is mixed or added."""
    frames = _frames(6, 100, 60)

    def run() -> list[Frame]:
        stream = FrameStream(stylizer, batching=batching, temporal=TemporalFilter("full"))
        return list(stream.frames(iter(frames)))

    plain = run()
    stylizer.keep_colours = True
    assert_same(run(), [keep_colours(*pair) for pair in zip(frames, plain, strict=True)])


def test_a_frame_is_painted_when_its_colours_are_to_change(stylizer: Stylizer) -> None:
    (frame,) = _frames(1)
    stream = FrameStream(stylizer, similarity=SimilarityFilter(0.9, max_skip=100))
    packets = []
    for packet in stream.run(_packets([frame] * 4)):
        packets.append(packet)
        stylizer.keep_colours = len(packets) >= 2
    assert [packet.skipped for packet in packets] == [False, True, False, True]
    assert "colours" in packets[2].stages_ms
    assert packets[0].styled is not None
    np.testing.assert_array_equal(packets[3].styled, keep_colours(frame, packets[0].styled))


def test_similar_frames_are_left_out_one_by_one_only(stylizer: Stylizer) -> None:
    with pytest.raises(ValueError, match="stream batch"):
        FrameStream(stylizer, batching=STREAM_BATCH, similarity=SimilarityFilter())


def test_forgetting_gives_up_what_is_inside(stylizer: Stylizer) -> None:
    frames, stream = _frames(6), FrameStream(stylizer, batching=STREAM_BATCH)
    packets = iter(_packets(frames))

    def interrupted() -> Iterator[FramePacket]:
        yield from (next(packets), next(packets))
        assert stream.discard() == 2
        yield from packets

    out = list(stream.run(interrupted()))
    assert [packet.index for packet in out] == [2, 3, 4, 5]
    assert_same([packet.styled for packet in out if packet.styled is not None], alone(stylizer, frames[2:]))


def test_stages_are_timed(stylizer: Stylizer) -> None:
    for batching in (ONE_BY_ONE, STREAM_BATCH, GROUPED):
        packets = list(FrameStream(stylizer, batching=batching).run(_packets(_frames(9))))
        assert {"unet", "vae_encoder", "vae_decoder", "convert"} <= packets[3].stages_ms.keys()


def test_an_error_of_the_engines_is_raised(stylizer: Stylizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **named: object) -> Frame:
        raise RuntimeError("engine")

    monkeypatch.setattr(stylizer, "submit_many", broken)
    with pytest.raises(RuntimeError, match="engine"):
        list(FrameStream(stylizer).frames(iter(_frames(2))))


def test_an_unknown_batching_mode_is_refused(stylizer: Stylizer) -> None:
    with pytest.raises(ValueError, match="unknown batching mode 'sideways'"):
        FrameStream(stylizer, batching="sideways")
