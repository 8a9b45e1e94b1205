"""Frames of several streams in one call: each comes out as it does alone, in its own style."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from support.live_support import wait_until

from std_rt.core.bundle import Bundle
from std_rt.core.errors import BackendError
from std_rt.pipeline.runner_cache import RunnerKey
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_stream import FrameStream
from std_rt.streaming.shared_calls import SharedCalls

Frame = NDArray[np.uint8]


def noise(seed: int) -> Frame:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def stylizer(handmade: Bundle) -> Iterator[Stylizer]:
    with Stylizer.load(handmade, backend="openvino", precision="fp32", size=64, steps=2) as stylizer:
        yield stylizer


def stream_of(stylizer: Stylizer, index: int, calls: SharedCalls | None) -> Callable[[], list[Frame]]:
    style = stylizer.encode_style(np.full((32, 32, 3), 40 * index, np.uint8))
    stream = FrameStream(stylizer, lambda _: (style, 1 - index / 10), seed=index)
    stream.calls = calls
    return lambda: [*stream.frames([noise(index)])]


def at_once(stylizer: Stylizer, calls: SharedCalls, count: int) -> list[Frame]:
    """A frame of each of ``count`` streams, which all wait while somebody else has the engines."""
    streams = [stream_of(stylizer, index, calls) for index in range(count)]
    with ThreadPoolExecutor(count) as pool:
        with stylizer.lock:
            frames = [pool.submit(stream) for stream in streams]
            wait_until(lambda: len(calls._waiting) == count)
        return [frame for each in frames for frame in each.result()]


def test_several_streams_in_one_call_give_what_each_gives_alone(stylizer: Stylizer) -> None:
    calls = SharedCalls(stylizer)
    alone = [stream_of(stylizer, index, None)()[0] for index in range(6)]
    key = RunnerKey(stylizer.quality(64, 64), stylizer.frames_per_call((64, 64)))
    assert key.frames == 4
    calls._is_open(key)
    stylizer.runner(key).wait()
    together = at_once(stylizer, calls, 6)
    assert calls.sizes == {4: 1, 1: 2}
    for ours, theirs in zip(together, alone, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert len({frame.tobytes() for frame in alone}) == 6


def test_nobody_waits_for_engines_that_are_not_open(
    stylizer: Stylizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(key: RunnerKey) -> None:
        raise BackendError("no room")

    calls = SharedCalls(stylizer)
    alone = [stream_of(stylizer, index, None)()[0] for index in range(4)]
    with monkeypatch.context() as patch:
        runner = stylizer.runner
        patch.setattr(stylizer, "runner", lambda key: runner(key) if key.frames == 1 else refuse(key))
        patch.setattr(stylizer, "ready", lambda *_, **__: False)
        together = at_once(stylizer, calls, 4)
    assert calls.sizes == {1: 4}
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))


def test_an_error_is_raised_in_each_stream_of_the_call(
    stylizer: Stylizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = SharedCalls(stylizer)
    monkeypatch.setattr(calls, "_is_open", lambda key: True)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(stylizer, "submit_many", broken)
    for index in range(2):
        with pytest.raises(ZeroDivisionError):
            stream_of(stylizer, index, calls)()
    with pytest.raises(ZeroDivisionError):
        at_once(stylizer, calls, 4)
    assert not calls._waiting
