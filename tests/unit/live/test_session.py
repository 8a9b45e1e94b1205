"""A live session and its presenting: what is shown, counted and kept, and every way it can go wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.live_support import NotedWindow, ScriptedSource
from support.media_samples import frame_times

from std_rt.core.bundle import Bundle
from std_rt.examples import moving
from std_rt.live.keys import Action, Command
from std_rt.live.presenter import Outputs, Presenter
from std_rt.live.session import Session, Settings
from std_rt.live.style_mixer import StyleMixer
from std_rt.media import read_picture
from std_rt.media.video.record import Recorder
from std_rt.media.window.window import Closed, Dropped, Key
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_packet import FramePacket

Frame = NDArray[np.uint8]
SOON_S = 20.0
FRAMES = list(moving(8, 72, 48))


@pytest.fixture
def stylizer(handmade: Bundle) -> Iterator[Stylizer]:
    with Stylizer.load(handmade, backend="openvino", precision="fp32", steps=2) as stylizer:
        yield stylizer


@pytest.fixture
def deck(stylizer: Stylizer) -> Iterator[StyleMixer]:
    deck = StyleMixer(stylizer.encode_style, stylizer.bundle)
    for value in (20, 120, 230):
        deck.add(np.full((32, 32, 3), value, np.uint8), f"grey {value}")
    yield deck
    deck.close()


def get(session: Session) -> FramePacket:
    """The next shot; a session that gives none has failed the test."""
    end = time.monotonic() + SOON_S
    while (shot := session.get(0.05)) is None:
        assert time.monotonic() < end, "no frame came"
        assert not session.over, "the session is over"
    return shot


def wait_until(condition: Any) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# --- the session -----------------------------------------------------------------------------------------


def test_frames_come_as_step_makes_them(stylizer: Stylizer, deck: StyleMixer) -> None:
    source = ScriptedSource()
    with Session(stylizer, source, deck, Settings(seed=3)) as session:
        for frame in FRAMES[:3]:  # one at a time, so that none is dropped
            source.give(frame)
            shot = get(session)
            stylizer_frame = shot.styled
            session.presented(shot)
            assert stylizer_frame is not None
            assert shot.frame is frame
            painted = stylizer_frame
        source.end()
        wait_until(lambda: session.over)
    stylizer.use_style(*deck.at(0))
    np.testing.assert_array_equal(painted, stylizer.stylize(FRAMES[2], seed=3))
    report = session.report()
    assert (report["frames"], report["captured"], report["drops"]) == (3, 3, 0)
    assert report["settings"]["size"] == [72, 48]
    assert report["latency_ms"]["p50"] > 0


def test_the_newest_frame_wins_and_the_others_are_counted(stylizer: Stylizer, deck: StyleMixer) -> None:
    """All at once: the first ones go in, the last one stays, what is between is dropped."""
    source = ScriptedSource(*(FRAMES * 5))
    with Session(stylizer, source, deck) as session:
        indexes = [get(session).index]
        while indexes[-1] != 39:
            indexes.append(get(session).index)
        assert indexes == sorted(indexes)
        assert len(indexes) < 10
        assert session.meter.snapshot().drops == 40 - len(indexes)


def test_a_mirror_turns_the_frame(stylizer: Stylizer, deck: StyleMixer) -> None:
    with Session(stylizer, ScriptedSource(FRAMES[0]), deck, mirror=True) as session:
        np.testing.assert_array_equal(get(session).frame, FRAMES[0][:, ::-1])


def test_a_pause_paints_nothing_and_is_no_time(stylizer: Stylizer, deck: StyleMixer) -> None:
    source = ScriptedSource(FRAMES[0])
    with Session(stylizer, source, deck) as session:
        session.presented(get(session))
        session.pause(True)
        source.give(FRAMES[1])
        wait_until(lambda: source._index == 2)
        assert session.get(0.1) is None
        session.pause(False)
        source.give(FRAMES[2])
        shot = get(session)
        session.presented(shot)
        assert shot.index == 2
        report = session.report()
    assert report["seconds"] < 0.05
    assert report["drops"] == report["stalls"] == 0


def test_a_lost_camera_is_no_time(stylizer: Stylizer, deck: StyleMixer) -> None:
    source = ScriptedSource(FRAMES[0])
    with Session(stylizer, source, deck) as session:
        session.presented(get(session))
        source.status = "script lost, looking for it"
        assert session.get(0.2) is None
        source.status = ""
        source.give(FRAMES[1])
        session.presented(get(session))
        assert session.report()["seconds"] < 0.1


def test_an_error_of_the_painter_reaches_the_presenter(
    stylizer: Stylizer, deck: StyleMixer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **named: object) -> Frame:
        raise RuntimeError("engine")

    monkeypatch.setattr(stylizer, "run", broken)
    with Session(stylizer, ScriptedSource(FRAMES[0]), deck) as session:
        with pytest.raises(RuntimeError, match="engine"):
            get(session)
        assert session.over


def test_a_session_ends_though_the_camera_hangs(stylizer: Stylizer, deck: StyleMixer) -> None:
    source = ScriptedSource()
    session = Session(stylizer, source, deck)
    session.start()
    session.close()
    assert session.over
    assert source.closed


@pytest.mark.parametrize("stream_batch", [False, True])
def test_the_governor_goes_down_when_the_target_is_missed(
    stylizer: Stylizer, deck: StyleMixer, *, stream_batch: bool
) -> None:
    """No machine makes a thousand frames a second: it must go down, and say so."""
    source = ScriptedSource()
    settings = Settings(target_fps=100_000, stream_batch=stream_batch)
    with Session(stylizer, source, deck, settings) as session:
        end = time.monotonic() + SOON_S
        while not session.notes:
            assert time.monotonic() < end, "it stays where it is"
            source.give(FRAMES[0])
            shot = session.get(0.05)
            if shot is not None:
                session.presented(shot)
        for _ in range(5):
            source.give(FRAMES[0])
            session.presented(get(session))
        assert "1 step" in session.notes[0]
        assert len(session.report()["levels_s"]) >= 2


def test_the_governor_keeps_its_level_when_the_camera_changes_its_resolution(
    stylizer: Stylizer, deck: StyleMixer
) -> None:
    source = ScriptedSource()
    with Session(stylizer, source, deck, Settings(target_fps=100_000)) as session:
        end = time.monotonic() + SOON_S
        while not session.notes:
            assert time.monotonic() < end
            source.give(FRAMES[0])
            session.get(0.05)
        while session.get(0.2) is not None:
            pass
        level = session._stream.quality
        source.give(np.repeat(np.repeat(FRAMES[0], 4, 0), 4, 1))
        assert get(session).frame.shape == (192, 288, 3)
        source.give(np.repeat(np.repeat(FRAMES[0], 8, 0), 8, 1))  # the same aspect: the same usual level
        before = session._stream.quality
        get(session)
        assert session._stream.quality == before
    assert level is not None


def test_what_was_inside_before_a_pause_is_given_up(stylizer: Stylizer, deck: StyleMixer) -> None:
    """They are of the past then, and their latency would be that of the pause."""
    source = ScriptedSource()
    with Session(stylizer, source, deck, Settings(stream_batch=True)) as session:
        source.give(FRAMES[0])
        assert session.get(1.0) is None  # two steps: it is inside
        time.sleep(1.1)
        for frame in FRAMES[1:4]:
            source.give(frame)
            session.get(0.3)
            time.sleep(0.05)
        source.end()
        shots = []
        while not session.over:
            if (shot := session.get(0.05)) is not None:
                shots.append(shot)
        report = session.report()
    assert report["drops"] >= 1
    assert all(shot.index > 0 for shot in shots)


# --- presenting ------------------------------------------------------------------------------------------


class Stage:
    """A session on a scripted source with a noted window, driven frame by frame."""

    def __init__(self, stylizer: Stylizer, deck: StyleMixer, folder: Path, **outputs: Any) -> None:
        self.source = ScriptedSource()
        self.session = Session(stylizer, self.source, deck)
        self.window = NotedWindow()
        self.said: list[str] = []

        def new_recorder(path: Path) -> Recorder:
            return Recorder(path, fps=30)

        self.outputs = Outputs(
            window=self.window,  # type: ignore[arg-type]
            record_to=folder / "out.mp4",
            snapshots=folder,
            new_recorder=new_recorder,
            **outputs,
        )
        self.show = Presenter(self.session, self.outputs, FRAMES[0], say=self.said.append)
        self._turns = 0

    def frames(self, count: int = 1) -> None:
        """So many frames pass through everything."""
        for _ in range(count):
            self.source.give(FRAMES[self._turns % len(FRAMES)])
            self._turns += 1
            before = self.session.meter.snapshot().frames
            self.show.run(lambda before=before: self.session.meter.snapshot().frames > before)  # type: ignore[misc]

    def press(self, *keys: str) -> None:
        self.window.waiting.extend(Key(key) for key in keys)
        self.frames()  # the window is asked after a frame
        self.frames()


@pytest.fixture
def stage(stylizer: Stylizer, deck: StyleMixer, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(stylizer, deck, tmp_path)
    with stage.session:
        yield stage
        stage.show.close()


def test_before_the_first_frame_the_window_shows_the_camera(stage: Stage) -> None:
    stage.show.run(lambda: True)
    assert stage.window.shown["frame"] is FRAMES[0]
    assert stage.window.shown["banner"] == "opening the engines"


def test_a_frame_is_shown_with_its_figures(stage: Stage) -> None:
    stage.frames(2)
    shown = stage.window.shown
    assert shown["frame"].shape == (48, 72, 3)
    assert "style\tgrey 20" in shown["lines"]
    assert "steps\t2 at 72x48" in shown["lines"]
    assert [active for _, _, active in shown["thumbnails"]] == [True, False, False]
    assert shown["banner"] == "H shows the keys"


def test_keys_change_the_style(stage: Stage, deck: StyleMixer) -> None:
    stage.frames()
    stage.show.do(Command(Action.CROSSFADE, -5))
    stage.press("n")
    assert deck.weights_at(np.inf) == {1: 1.0}
    stage.press("3")
    assert deck.weights_at(np.inf) == {2: 1.0}
    stage.press("shift+1")
    assert deck.weights_at(np.inf) == {0: 0.5, 2: 0.5}
    stage.press("shift+1")
    assert deck.weights_at(np.inf) == {2: 1.0}
    stage.press("p", "up")
    assert deck.weights_at(np.inf) == {1: 1.0}
    assert deck.strength == 1.05
    switches = stage.session.report()["style_switch_ms"]
    assert switches["count"] >= 4
    assert switches["worst"] < 1000 * SOON_S


def test_a_number_without_a_style_says_so(stage: Stage, deck: StyleMixer) -> None:
    stage.frames()
    stage.press("9")
    assert "there is no style 9; 3 are loaded" in stage.window.shown["banner"]
    assert deck.weights_at(np.inf) == {0: 1.0}


def test_keys_change_what_is_shown(stage: Stage) -> None:
    stage.frames()
    stage.press("c", "i", "t")
    assert stage.window.shown["beside"] is not None
    assert stage.window.shown["lines"] == []
    assert stage.window.shown["thumbnails"] == []
    stage.press("m", "f", "h")
    assert stage.session.mirror
    assert stage.window.fullscreen
    assert stage.window.help_shown
    stage.press("escape")
    assert not stage.window.help_shown


def test_pause_holds_the_picture(stage: Stage) -> None:
    stage.frames()
    stage.show.do(Command(Action.PAUSE))
    assert stage.window.shown["banner"] == "paused"
    assert stage.session.paused
    shown = stage.window.shown["frame"]
    stage.source.give(FRAMES[5])
    turns = iter([False] * 10 + [True])
    stage.show.run(lambda: next(turns))
    assert stage.window.shown["frame"] is shown
    stage.show.do(Command(Action.PAUSE))
    stage.frames()
    assert stage.window.shown["banner"] != "paused"


def test_a_snapshot_is_what_is_on_the_screen(stage: Stage, tmp_path: Path) -> None:
    stage.frames()
    stage.show.do(Command(Action.SNAPSHOT))
    stage.show.do(Command(Action.SNAPSHOT))
    taken = sorted(tmp_path.glob("*.png"))
    assert len(taken) == 2  # the second does not replace the first
    np.testing.assert_array_equal(read_picture(taken[0]).frame, stage.window.shown["frame"])
    assert stage.said[0].startswith("snapshot ")


def test_recordings_start_and_stop_by_key(stage: Stage, tmp_path: Path) -> None:
    stage.frames()
    stage.press("r")
    stage.frames(3)
    assert stage.window.shown["recording"] is not None
    stage.press("r")
    assert stage.window.shown["recording"] is None
    stage.press("r")
    stage.frames(2)
    stage.show.close()
    assert [done.path.name for done in stage.show.recordings] == ["out.mp4", "out-2.mp4"]
    assert len(frame_times(tmp_path / "out.mp4")) == stage.show.recordings[0].frames >= 4
    assert any(line.startswith(f"recorded {tmp_path / 'out.mp4'}") for line in stage.said)


def test_a_dropped_picture_becomes_the_style(stage: Stage, deck: StyleMixer, tmp_path: Path) -> None:
    from std_rt.media import write_picture

    write_picture(tmp_path / "new.png", np.full((40, 40, 3), 60, np.uint8))
    stage.window.waiting.append(Dropped(tmp_path / "new.png"))
    stage.frames()
    wait_until(lambda: deck.weights_at(np.inf) == {3: 1.0})
    (tmp_path / "new.png").unlink()  # it is not needed any more
    stage.frames(2)
    assert deck.names[3] == "new"


def test_a_dropped_file_that_is_no_picture_is_one_line(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    stage.window.waiting.append(Dropped(tmp_path / "notes.txt"))
    stage.frames()
    wait_until(lambda: not stage.session.deck.waiting)
    stage.frames()
    assert len(stage.said) == 1
    assert "notes.txt" in stage.said[0]
    assert "notes.txt" in stage.window.shown["banner"]


@pytest.mark.parametrize("event", [Closed(), Closed("the screen went away"), Key("q"), Key("escape")])
def test_a_closed_window_ends_the_session(stage: Stage, event: Any) -> None:
    stage.window.waiting.append(event)
    stage.show.run(lambda: False)
    assert stage.said == ([event.reason] if isinstance(event, Closed) and event.reason else [])


def test_seconds_count_from_the_first_frame(stage: Stage) -> None:
    stage.source.give(FRAMES[0])
    stage.show.run(lambda: False, seconds=0.01)
    assert stage.show.started_s is not None


def test_a_problem_is_said_once(stage: Stage) -> None:
    class Broken:
        problem = "the disk is full"

        def tick(self) -> None: ...

        def close(self) -> None: ...

    stage.outputs.metrics = Broken()  # type: ignore[assignment]
    stage.frames(3)
    assert stage.said == ["the disk is full"]


def test_the_camera_s_state_is_on_the_window(stage: Stage) -> None:
    stage.frames()
    stage.source.status = "script lost, looking for it"
    turns = iter([False] * 20 + [True])
    stage.show.run(lambda: next(turns))
    assert stage.window.shown["banner"] == "script lost, looking for it"
