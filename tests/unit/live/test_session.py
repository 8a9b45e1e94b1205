"""A live session: what comes out, what is counted, and every way it can go wrong."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from support.live_support import Clock, ScriptedSource, next_packet, wait_until

from std_rt.core.errors import BackendError
from std_rt.examples import moving
from std_rt.live.session import Session, Settings
from std_rt.live.style_mixer import StyleMixer
from std_rt.pipeline.stylizer import Stylizer

Frame = NDArray[np.uint8]
FRAMES = list(moving(8, 72, 48))


@pytest.fixture
def source(clock: Clock) -> ScriptedSource:
    return ScriptedSource(clock)


def test_frames_come_as_the_stylizer_makes_them(
    stylizer: Stylizer, greys: StyleMixer, source: ScriptedSource, clock: Clock
) -> None:
    with Session(stylizer, source, greys, Settings(seed=3), now=clock) as session:
        for frame in FRAMES[:3]:  # one at a time, so that none is dropped
            source.give(frame)
            packet = next_packet(session)
            clock.at += 0.05
            session.presented(packet)
            assert packet.frame is frame
        source.end()
        wait_until(lambda: session.over)
    stylizer.use_style(*greys.at(0))
    assert packet.styled is not None
    np.testing.assert_array_equal(packet.styled, stylizer.stylize(FRAMES[2], seed=3))
    report = session.report()
    assert (report["frames"], report["captured"], report["drops"]) == (3, 3, 0)
    assert report["settings"]["size"] == [72, 48]
    assert report["latency_ms"]["p50"] == pytest.approx(50, rel=0.01)
    assert report["seconds"] == pytest.approx(0.1)


def test_the_newest_frame_wins_and_the_others_are_counted(
    stylizer: Stylizer, greys: StyleMixer, clock: Clock
) -> None:
    """All at once: the first ones go in, the last one stays, what is between is dropped."""
    source = ScriptedSource(clock)
    with Session(stylizer, source, greys, now=clock) as session:
        with stylizer.lock:  # the engines are busy
            for frame in FRAMES * 5:
                source.give(frame)
            wait_until(lambda: source.delivered == 40)
        indexes = [next_packet(session).index]
        while indexes[-1] != 39:
            indexes.append(next_packet(session).index)
        assert indexes == sorted(indexes)
        assert len(indexes) < 10
        assert session.metrics.counts().drops == 40 - len(indexes)


def test_mirror_flips_the_frame(stylizer: Stylizer, greys: StyleMixer, source: ScriptedSource) -> None:
    source.give(FRAMES[0])
    with Session(stylizer, source, greys, mirror=True) as session:
        np.testing.assert_array_equal(next_packet(session).frame, FRAMES[0][:, ::-1])


def test_a_pause_stylizes_nothing_and_is_no_time(
    stylizer: Stylizer, greys: StyleMixer, source: ScriptedSource, clock: Clock
) -> None:
    source.give(FRAMES[0])
    with Session(stylizer, source, greys, now=clock) as session:
        session.presented(next_packet(session))
        session.pause(True)
        clock.at += 60
        source.give(FRAMES[1])
        wait_until(lambda: source.delivered == 2)
        assert session.get(0.05) is None
        session.pause(False)
        source.give(FRAMES[2])
        packet = next_packet(session)
        session.presented(packet)
        assert packet.index == 2
        report = session.report()
    assert report["seconds"] == report["drops"] == report["stalls"] == 0


def test_a_lost_camera_is_no_time(
    stylizer: Stylizer, greys: StyleMixer, source: ScriptedSource, clock: Clock
) -> None:
    source.give(FRAMES[0])
    with Session(stylizer, source, greys, now=clock) as session:
        session.presented(next_packet(session))
        source.status = "script lost, looking for it"
        assert session.get(0.01) is None
        clock.at += 60
        source.status = ""
        source.give(FRAMES[1])
        session.presented(next_packet(session))
        assert session.report()["seconds"] == 0


def test_an_error_in_the_engines_reaches_the_caller(
    stylizer: Stylizer, greys: StyleMixer, source: ScriptedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **named: object) -> Frame:
        raise RuntimeError("engine")

    monkeypatch.setattr(stylizer, "submit_many", broken)
    source.give(FRAMES[0])
    with Session(stylizer, source, greys) as session:
        with pytest.raises(RuntimeError, match="engine"):
            next_packet(session)
        assert session.over


def test_a_session_ends_though_the_camera_hangs(
    stylizer: Stylizer, greys: StyleMixer, source: ScriptedSource
) -> None:
    session = Session(stylizer, source, greys)
    session.start()
    session.close()
    assert session.over
    assert source.closed


@pytest.mark.parametrize("stream_batch", [False, True])
def test_the_governor_goes_down_when_the_target_is_missed(
    stylizer: Stylizer, greys: StyleMixer, source: ScriptedSource, clock: Clock, *, stream_batch: bool
) -> None:
    """Every stage takes 10 ms of this clock: it must go down, and say so."""
    clock.step = 0.01
    settings = Settings(target_fps=100, stream_batch=stream_batch)
    with Session(stylizer, source, greys, settings, now=clock) as session:
        for _ in range(1000):
            source.give(FRAMES[0])
            packet = session.get(0.02)
            if packet is not None:
                session.presented(packet)
            levels = list(session.report()["levels_s"])
            if len(levels) > 1:
                break
        assert levels == ["72x48, 2 steps", "72x48, 1 step"]
        assert session.notes[0] == "now 72x48, 1 step to hold 30 fps"  # more do not come


def test_a_quality_whose_engines_do_not_open_is_named_and_left_out(
    stylizer: Stylizer,
    greys: StyleMixer,
    source: ScriptedSource,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(quality: object, **named: object) -> bool:
        raise BackendError("out of memory")

    monkeypatch.setattr(stylizer, "ready", broken)
    clock.step = 0.01
    with Session(stylizer, source, greys, Settings(target_fps=100), now=clock) as session:
        for _ in range(40):
            source.give(FRAMES[0])
            session.presented(next_packet(session))
        assert list(session.notes) == ["72x48, 1 step cannot be used: out of memory"]
        assert list(session.report()["levels_s"]) == ["72x48, 2 steps"]


def test_the_governor_keeps_its_quality_when_only_the_camera_s_resolution_changes(
    stylizer: Stylizer, greys: StyleMixer, source: ScriptedSource, clock: Clock
) -> None:
    def pass_through(scale: int) -> None:
        source.give(np.repeat(np.repeat(FRAMES[0], scale, 0), scale, 1))
        assert next_packet(session).frame.shape == (48 * scale, 72 * scale, 3)

    clock.step = 0.01
    with Session(stylizer, source, greys, Settings(target_fps=100), now=clock) as session:
        while not session.notes:
            pass_through(4)
        pass_through(4)
        lower = session.stream.quality
        pass_through(8)
        assert stylizer.quality(48 * 4, 72 * 4) == stylizer.quality(48 * 8, 72 * 8) != lower
        assert session.stream.quality == lower


def test_frames_inside_before_a_gap_are_dropped(
    stylizer: Stylizer, greys: StyleMixer, source: ScriptedSource, clock: Clock
) -> None:
    """They are of the past then, and their latency would be that of the gap."""
    with Session(stylizer, source, greys, Settings(stream_batch=True), now=clock) as session:
        source.give(FRAMES[0])
        wait_until(lambda: session.stream._inside)  # two steps: it stays inside
        clock.at += 2
        indexes = []
        for i in (1, 2, 3):
            source.give(FRAMES[i])
            wait_until(lambda i=i: [inside.packet.index for inside in session.stream._inside][-1:] == [i])  # type: ignore[misc]
            if i > 1:
                indexes.append(next_packet(session).index)
        source.end()
        indexes.append(next_packet(session).index)
        assert indexes == [1, 2, 3]
        assert session.report()["drops"] == 1
