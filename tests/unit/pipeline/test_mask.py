"""Masks: black keeps the input bit for bit, white is no mask, and what lies between is mixed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from std_rt.core.bundle import Bundle
from std_rt.core.errors import UsageError
from std_rt.examples import moving
from std_rt.pipeline.mask import Mask
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_stream import GROUPED, ONE_BY_ONE, STREAM_BATCH, FramePacket, FrameStream
from std_rt.streaming.similarity import SimilarityFilter
from std_rt.streaming.temporal import TemporalFilter

Frame = np.ndarray
H, W = 96, 144  # of the frames; they are processed at a quarter of the area


@pytest.fixture
def stylizer(handmade: Bundle) -> Iterator[Stylizer]:
    with Stylizer.load(handmade, backend="openvino", precision="fp32", size=(48, 72), steps=4) as stylizer:
        stylizer.set_style(np.full((32, 32, 3), 200, np.uint8))
        yield stylizer


def frames(count: int) -> list[Frame]:
    return list(moving(count, W, H))


def left(value: int = 255) -> Mask:
    """The left half."""
    values = np.zeros((H, W), np.uint8)
    values[:, : W // 2] = value
    return Mask(values)


def test_what_is_black_keeps_every_bit_and_the_rest_is_painted(stylizer: Stylizer) -> None:
    (frame,) = frames(1)
    found = stylizer.stylize(frame, mask=left())
    assert found.shape == frame.shape
    np.testing.assert_array_equal(found[:, W // 2 :], frame[:, W // 2 :])
    assert (found[:, : W // 2] != frame[:, : W // 2]).mean() > 0.9


def test_a_black_mask_returns_the_input_and_a_white_one_is_none(stylizer: Stylizer) -> None:
    (frame,) = frames(1)
    black, white = (Mask(np.full((H, W), value, np.uint8)) for value in (0, 255))
    np.testing.assert_array_equal(stylizer.stylize(frame, mask=black), frame)
    np.testing.assert_array_equal(stylizer.stylize(frame, mask=white), stylizer.stylize(frame))


def test_latents_outside_stay_on_the_frames_own_trajectory(stylizer: Stylizer) -> None:
    """So that inside and outside are one picture: there the decoded picture is the frame's."""
    (frame,) = frames(1)
    working = stylizer.fit(frame)
    state = stylizer.state_for(working.shape[:2])
    (found,) = stylizer.run_many([working], [state], frames=1, mask=left())
    encoded = working.reshape(6, 8, 9, 8, 3).mean((1, 3)).repeat(8, 0).repeat(8, 1)
    outside = np.s_[:, W // 4 + 8 :]  # a latent across the border is painted
    assert np.abs(found[outside] - encoded[outside]).max() <= 1
    assert np.abs(found[:, : W // 4] - encoded[:, : W // 4]).mean() > 5


def test_grey_mixes_the_painted_picture_with_the_input(stylizer: Stylizer) -> None:
    (frame,) = frames(1)
    full, half = (stylizer.stylize(frame, mask=left(value)).astype(float) for value in (255, 128))
    inner = np.s_[:, : W // 2 - 4]
    assert np.abs(half[inner] - (full[inner] + frame[inner]) / 2).max() < 2


def test_the_edge_fades_inwards_and_a_thin_line_is_not_lost() -> None:
    values = np.zeros((512, 512), np.uint8)
    values[:, 100:300] = 255
    values[:, 400:402] = 255
    row = Mask(values)._opacity((512, 512))[7]
    assert not row[:100].any()
    assert (np.diff(row[99:105]) > 0).all()
    assert (row[104:290] == 1).all()
    assert (row[400:402] > 0.1).all()
    assert (Mask(values).feeds((256, 256), 8)["mask"][0, 0, :, 25] == 1).all()


@pytest.mark.parametrize("batching", [ONE_BY_ONE, GROUPED])
@pytest.mark.parametrize("mode", ["off", "full"])
def test_in_a_clip_what_is_black_keeps_every_bit(stylizer: Stylizer, batching: str, mode: str) -> None:
    clip = frames(6)
    stream = FrameStream(stylizer, batching=batching, temporal=TemporalFilter(mode), mask=left())
    found = list(stream.frames(clip))
    for frame, result in zip(clip, found, strict=True):
        np.testing.assert_array_equal(result[:, W // 2 :], frame[:, W // 2 :])
        if mode == "off":
            assert np.abs(result.astype(int) - stylizer.stylize(frame, mask=left())).max() <= 1


def test_a_skipped_frame_keeps_its_own_pixels(stylizer: Stylizer) -> None:
    frame = frames(1)[0]
    other = np.clip(frame.astype(int) + 1, 0, 255).astype(np.uint8)
    stream = FrameStream(stylizer, similarity=SimilarityFilter(threshold=0), mask=left())
    packets = list(stream.run(FramePacket(each) for each in (frame, other, frame)))
    assert [packet.skipped for packet in packets] == [False, True, True]
    for packet in packets:
        assert packet.styled is not None
        np.testing.assert_array_equal(packet.styled[:, W // 2 :], packet.frame[:, W // 2 :])


def test_a_stream_batch_has_no_mask(stylizer: Stylizer) -> None:
    with pytest.raises(ValueError, match="a mask cannot be combined with the 'stream batch'"):
        FrameStream(stylizer, batching=STREAM_BATCH, mask=left())


def test_a_mask_of_another_aspect_is_refused(stylizer: Stylizer) -> None:
    (frame,) = frames(1)
    message = r"the mask is 96x96 px and the picture 144x96; crop the mask"
    with pytest.raises(UsageError, match=message):
        stylizer.stylize(frame, mask=Mask(np.zeros((96, 96), np.uint8)))
    Mask(np.zeros((43, 64), np.uint8)).check((H, W))  # a third of it, rounded


def test_a_mask_is_a_bare_array_of_bytes() -> None:
    with pytest.raises(UsageError, match=r"must be a uint8 array \[H, W\].*got float64 \[2, 2\]"):
        Mask(np.zeros((2, 2)))


def test_a_file_is_read_by_its_brightness_and_transparent_is_black(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2), "white").save(tmp_path / "a.png")
    assert Mask.read(tmp_path / "a.png").whole
    Image.new("RGBA", (4, 2), (255, 255, 255, 0)).save(tmp_path / "b.png")
    assert not Mask.read(tmp_path / "b.png").values.any()
