"""Video-to-video bundles live: windows of the newest frames, painted as they fill up, shown evenly."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.handmade import write_handmade
from support.live_support import Clock, ScriptedSource, next_packet, wait_until
from support.media_samples import frame_times

from std_rt.core.bundle import Bundle
from std_rt.core.errors import UsageError
from std_rt.core.schedule import add_noise, step
from std_rt.live.presenter import Outputs, Presenter
from std_rt.live.session import Session, Settings
from std_rt.live.style_mixer import StyleMixer
from std_rt.media.video.record import Recorder
from std_rt.pipeline.stylizer import Stylizer

Frame = NDArray[np.uint8]
T, OVERLAP, HOP = 4, 1, 3
SIZE = (48, 72)


@pytest.fixture(scope="module")
def v2v(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pytest.importorskip("onnx")
    return write_handmade(tmp_path_factory.mktemp("v2v") / "v2v", window=(T, OVERLAP))


@pytest.fixture(scope="module")
def stylizer(v2v: Bundle) -> Iterator[Stylizer]:
    with Stylizer.load(v2v, backend="openvino", precision="fp32", size=SIZE, steps=2) as stylizer:
        yield stylizer


def pan(count: int) -> list[Frame]:
    """A pan over soft noise, two pixels a frame: no cut in it."""
    rough = np.random.default_rng(5).integers(40, 216, (SIZE[0] // 8, 40, 3), np.uint8)
    wide = rough.repeat(8, 0).repeat(8, 1)
    return [np.ascontiguousarray(wide[:, (2 * i) % 200 :][:, : SIZE[1]]) for i in range(count)]


def painted(frames: list[Frame], stylizer: Stylizer, greys: list[int]) -> NDArray[np.float64]:
    """The documented rule on paper: window after window, each in the style of its newest frame."""
    noise = stylizer.state(*SIZE).noise[0]
    h, w = SIZE[0] // 8, SIZE[1] // 8
    z = (
        np.stack(frames).astype(float).reshape(-1, h, 8, w, 8, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 127.5
        - 1
    )
    levels = [add_noise(z, noise, stylizer.coefficients[0]), np.zeros_like(z), np.zeros_like(z)]
    done = 0
    while done < len(z):
        begin = max(0, done - OVERLAP)
        end = min(begin + T, len(z))
        rows = np.minimum(np.arange(begin, begin + T), len(z) - 1)
        level_of_style = greys[end - 1] / 127.5 - 1
        for i, c in enumerate(stylizer.coefficients):
            x = levels[i][rows]
            eps = x / 2 + level_of_style + x.mean(0) / 4
            levels[i + 1][done:end] = step(x, eps, c)[done - begin : end - begin]
        done = end
    return ((levels[-1].transpose(0, 2, 3, 1) + 1) * 127.5).clip(0, 255).repeat(8, 1).repeat(8, 2)


def feed(session: Session, source: ScriptedSource, frames: list[Frame]) -> None:
    """One at a time, so that none is dropped."""
    assert session._captured is not None
    for frame in frames:
        before = source.delivered
        source.give(frame)
        wait_until(lambda before=before: source.delivered > before and not session._captured.has_next)  # type: ignore[misc, union-attr]


def test_live_is_what_the_rule_gives_and_a_change_of_style_holds_for_a_window(
    stylizer: Stylizer, greys: StyleMixer
) -> None:
    frames, styles = pan(12), [20] * 5 + [230] * 7
    source = ScriptedSource(Clock())
    with Session(stylizer, source, greys) as session:
        feed(session, source, frames[:5])
        wait_until(lambda: len(session.stream._inside) == 1)
        found = [next_packet(session) for _ in range(T)]
        greys.select(2)
        feed(session, source, frames[5:])
        source.end()
        found += [next_packet(session) for _ in frames[T:]]
        wait_until(lambda: session.over)
    assert [packet.index for packet in found] == list(range(12))
    expected = painted(frames, stylizer, styles)
    differ = np.abs(np.stack([packet.styled for packet in found if packet.styled is not None]) - expected)
    assert differ.max() <= 1
    assert (
        found[4].style_s == found[6].style_s
    )  # the fifth frame shows the new style, though it came before it
    assert session.metrics.counts().drops == 0


def test_results_of_a_window_are_presented_as_they_were_captured(
    stylizer: Stylizer, greys: StyleMixer, clock: Clock
) -> None:
    source = ScriptedSource(clock)
    with Session(stylizer, source, greys, now=clock) as session:
        for frame in pan(T):
            clock.at += 0.1
            feed(session, source, [frame])
        assert next_packet(session).index == 0
        assert session._styled is not None
        wait_until(lambda: len(session._styled._queue) == 3)  # type: ignore[union-attr]
        for index in (1, 2, 3):
            assert session.get(0.02) is None  # here already, and not due
            clock.at += 0.091
            packet = session.get(0.02)
            assert packet is not None
            assert packet.index == index
        assert session.get(0.02) is None


def test_the_newest_frames_are_the_next_window(stylizer: Stylizer, greys: StyleMixer) -> None:
    source, frames = ScriptedSource(Clock()), pan(1) * 26  # a camera that stands still: no cuts
    with Session(stylizer, source, greys) as session:
        assert session._captured is not None
        with stylizer.lock:  # the engines are busy
            feed(session, source, frames[:1])
            for frame in frames[1:20]:
                source.give(frame)
            wait_until(lambda: session._captured.drops == 16)  # type: ignore[union-attr]
        packets = [next_packet(session).index for _ in range(T)]
        feed(session, source, frames[20:])
    assert packets == [0, 17, 18, 19]
    assert session.metrics.counts().drops == 16


def test_a_pause_drops_the_window_that_is_not_full_and_begins_anew(
    stylizer: Stylizer, greys: StyleMixer, clock: Clock
) -> None:
    source, frames = ScriptedSource(clock), pan(10)
    with Session(stylizer, source, greys, now=clock) as session:
        feed(session, source, frames[: T + 2])
        wait_until(lambda: len(session.stream._inside) == 2)
        found = [session.get(0.02)]
        session.pause(True)
        clock.at += 60
        session.pause(False)
        feed(session, source, frames[T + 2 :])
        while len(found) < 2 * T:
            clock.at += 0.05
            found.append(next_packet(session))
    assert [packet.index for packet in found if packet is not None] == [0, 1, 2, 3, 6, 7, 8, 9]
    assert session.metrics.counts().drops == 2
    expected = painted(frames[T + 2 :], stylizer, [20] * T)
    after = np.stack(
        [packet.styled for packet in found[T:] if packet is not None and packet.styled is not None]
    )
    assert np.abs(after - expected).max() <= 1


def test_stopping_within_a_window_keeps_what_is_painted(
    stylizer: Stylizer, greys: StyleMixer, tmp_path: Path
) -> None:
    clock = Clock(step=0.001)
    source, frames = ScriptedSource(clock), pan(T + HOP + 1)
    with Session(stylizer, source, greys, now=clock) as session:
        recorder = Recorder(tmp_path / "out.mkv", fps=10)
        presenter = Presenter(session, Outputs(recorder=recorder), frames[0], say=lambda _: None, now=clock)
        for frame in frames:
            clock.at += 0.1
            feed(session, source, [frame])
        assert session._styled is not None
        wait_until(lambda: len(session._styled._queue) == T + HOP)  # type: ignore[union-attr]
        presenter.run(lambda: session.metrics.counts().frames == 2)
        presenter.close()
    times = frame_times(tmp_path / "out.mkv")
    assert len(times) == T + HOP
    assert min(later - earlier for earlier, later in pairwise(times)) > 0.05


def test_memory_stays_flat(stylizer: Stylizer, greys: StyleMixer) -> None:
    frames, used = pan(100), []
    source = ScriptedSource(Clock())
    tracemalloc.start()
    try:
        with Session(stylizer, source, greys) as session:
            for _ in range(6):
                for frame in frames:
                    feed(session, source, [frame])
                    while session.get(0) is not None:
                        pass
                used.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    one_frame = SIZE[0] * SIZE[1] * 3
    assert max(used[1:]) - min(used[1:]) < 40 * one_frame


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        (Settings(stream_batch=True), "--stream-batch"),
        (Settings(similar=0.98), "--skip-similar"),
        (Settings(target_fps=15), "--target-fps"),
    ],
)
def test_what_windows_cannot_do_is_refused(
    settings: Settings, flag: str, stylizer: Stylizer, greys: StyleMixer
) -> None:
    with pytest.raises(
        UsageError, match=f"windows of 4 frames, which {flag} does not work with; leave it out"
    ):
        Session(stylizer, ScriptedSource(Clock()), greys, settings)
