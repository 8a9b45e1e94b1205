"""Several threads on one object: right results one after the other, or one line that says what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support.fake_backend import Backend
from support.live_support import Clock, ScriptedSource, wait_until

from std_rt import Stylizer
from std_rt.core.bundle import Bundle
from std_rt.core.errors import UsageError
from std_rt.live.session import Session
from std_rt.live.style_mixer import StyleMixer
from std_rt.pipeline.conditioning import EncodedStyle
from std_rt.streaming.frame_stream import GROUPED, ONE_BY_ONE, FrameStream
from std_rt.streaming.stream_batch import StreamBatch

FRAMES = [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(24)]
STYLES = [np.full((32, 32, 3), level, np.uint8) for level in (40, 200)]


def slow_unet(sample: np.ndarray, style_tokens: np.ndarray, **_: Any) -> np.ndarray:
    """Gives the other threads their chance in the middle of a frame."""
    time.sleep(0.001)
    return 0.5 * sample + style_tokens.mean()


@pytest.fixture
def stylizer(handmade: Bundle) -> Stylizer:
    found = Stylizer(handmade, Backend(slow_unet), steps=2)
    found.set_style(STYLES[0])
    return found


def in_threads(work: Callable[[Any], Any], items: list[Any], threads: int = 4) -> list[Any]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pictures_of_several_threads_are_those_of_one(stylizer: Stylizer) -> None:
    wanted = [stylizer.stylize(frame) for frame in FRAMES]
    same(in_threads(stylizer.stylize, FRAMES), wanted)


def test_sizes_of_several_threads_do_not_close_each_others_engines(stylizer: Stylizer) -> None:
    frames = [np.full((64 - 8 * (i % 4), 64, 3), 10 * i, np.uint8) for i in range(16)]
    wanted = [stylizer.stylize(frame) for frame in frames]
    same(in_threads(stylizer.stylize, frames), wanted)


@pytest.mark.parametrize("batching", [ONE_BY_ONE, GROUPED])
def test_streams_in_two_threads_keep_their_own_styles(stylizer: Stylizer, batching: str) -> None:
    styles = [stylizer.encode_style(picture) for picture in STYLES]

    def stream(style: EncodedStyle) -> list[np.ndarray]:
        return list(FrameStream(stylizer, lambda _: (style, 1.0), batching=batching).frames(FRAMES))

    wanted = [stream(style) for style in styles]
    for found, right in zip(in_threads(stream, styles), wanted, strict=True):
        same(found, right)


def test_a_stylizer_is_closed_between_two_frames(stylizer: Stylizer) -> None:
    wanted = stylizer.stylize(FRAMES[3])

    def until_closed(_: int) -> str:
        while True:
            try:
                np.testing.assert_array_equal(stylizer.stylize(FRAMES[3]), wanted)
            except UsageError as error:
                return str(error)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(until_closed, i) for i in range(3)]
        time.sleep(0.05)
        stylizer.close()
        assert {each.result(10) for each in running} == {
            "the stylizer was closed; load it again with Stylizer.load()"
        }


def test_a_stream_runs_once_at_a_time(stylizer: Stylizer) -> None:
    stream = FrameStream(stylizer)
    first = stream.frames(FRAMES)
    next(first)
    with pytest.raises(UsageError, match="make one for each thread"):
        next(stream.frames(FRAMES))
    next(first)  # it goes on
    first.close()  # type: ignore[attr-defined]
    assert len(list(stream.frames(FRAMES))) == len(FRAMES)


def test_a_stream_batch_does_not_give_frames_to_another_thread(stylizer: Stylizer) -> None:
    batch, state = StreamBatch(stylizer, (64, 64)), stylizer.state_for((64, 64))
    assert batch.push(FRAMES[5], state) == []
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(UsageError, match="a StreamBatch of its own"):
            pool.submit(batch.push, FRAMES[6], state).result()
        (found,) = batch.flush()
        np.testing.assert_array_equal(found, stylizer.run(FRAMES[5], state))
        pool.submit(batch.push, FRAMES[6], state).result()  # empty, it may change hands


def test_a_session_has_one_start_and_one_presenter(stylizer: Stylizer) -> None:
    clock = Clock()
    mixer = StyleMixer(stylizer.encode_style, stylizer.bundle, now=clock)
    mixer.add(STYLES[0], "grey")
    with Session(stylizer, ScriptedSource(clock), mixer, now=clock) as session:
        with pytest.raises(UsageError, match="started already"):
            session.start()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(session.get, 5.0)
            wait_until(session._presenting.locked)
            with pytest.raises(UsageError, match="another thread presents"):
                session.get(0)
            session.close()
            assert waiting.result() is None
        assert session.get(0) is None
    mixer.close()
