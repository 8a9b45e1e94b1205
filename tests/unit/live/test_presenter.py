"""The presenter: what is shown, kept and announced, and what keys and drops do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.live_support import Clock, NotedWindow, ScriptedSource, wait_until
from support.media_samples import frame_times

from std_rt.examples import moving
from std_rt.live.keys import Action, Command
from std_rt.live.presenter import Outputs, Presenter
from std_rt.live.session import Session
from std_rt.live.style_mixer import StyleMixer
from std_rt.media import read_picture, write_picture
from std_rt.media.video.record import Recorder
from std_rt.media.window.window import Closed, Dropped, Key
from std_rt.pipeline.stylizer import Stylizer

FRAMES = list(moving(8, 72, 48))


class Stage:
    """A session on a scripted source with a noted window, driven frame by frame."""

    def __init__(self, stylizer: Stylizer, mixer: StyleMixer, clock: Clock, folder: Path) -> None:
        self.clock, self.mixer = clock, mixer
        self.source = ScriptedSource(clock)
        self.session = Session(stylizer, self.source, mixer, now=clock)
        self.window = NotedWindow()
        self.said: list[str] = []
        self.outputs = Outputs(
            window=self.window,  # type: ignore[arg-type]
            record_to=folder / "out.mp4",
            snapshots=folder,
            new_recorder=lambda path: Recorder(path, fps=30),
        )
        self.presenter = Presenter(self.session, self.outputs, FRAMES[0], say=self.said.append, now=clock)
        self._given = 0

    def frames(self, count: int = 1) -> None:
        """So many frames, 50 ms apart, pass through everything."""
        for _ in range(count):
            self.clock.at += 0.05
            self.source.give(FRAMES[self._given % len(FRAMES)])
            self._given += 1
            before = self.session.metrics.counts().frames
            self.presenter.run(lambda before=before: self.session.metrics.counts().frames > before)  # type: ignore[misc]

    def turns(self, count: int) -> None:
        """So many turns of the loop, 0.2 s apart, without a frame."""
        for _ in range(count):
            self.clock.at += 0.2
            once = iter([False, True])
            self.presenter.run(lambda once=once: next(once))  # type: ignore[misc]

    def press(self, *keys: str) -> None:
        self.window.waiting.extend(Key(key) for key in keys)
        self.frames(2)  # the window is asked after a frame

    def target(self) -> dict[int, float]:
        """The weights the mixer is going to."""
        return self.mixer.weights_at(np.inf)


@pytest.fixture
def stage(stylizer: Stylizer, greys: StyleMixer, clock: Clock, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(stylizer, greys, clock, tmp_path)
    with stage.session:
        yield stage
        stage.presenter.close()


def test_before_the_first_frame_the_window_shows_the_camera(stage: Stage) -> None:
    stage.presenter.run(lambda: True)
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


def test_keys_change_the_style(stage: Stage) -> None:
    stage.frames()
    stage.presenter.do(Command(Action.CROSSFADE, -5))
    stage.press("n")
    assert stage.target() == {1: 1.0}
    stage.press("3")
    assert stage.target() == {2: 1.0}
    stage.press("shift+1")
    assert stage.target() == {0: 0.5, 2: 0.5}
    stage.press("shift+1")
    assert stage.target() == {2: 1.0}
    stage.press("p", "up")
    assert stage.target() == {1: 1.0}
    assert stage.mixer.strength == 1.05
    switches = stage.session.report()["style_switch_ms"]
    assert switches["count"] >= 4
    assert switches["worst"] <= 150


def test_keys_change_the_strokes_and_the_colours(stage: Stage) -> None:
    stage.frames()
    stage.press("b", "b", "shift+b")
    assert stage.mixer.stroke_size == 1.1
    assert "strokes\t1.1" in stage.window.shown["lines"]
    assert stage.window.shown["banner"] == "stroke size 1.1"
    assert stage.session.report()["style_switch_ms"]["count"] == 0
    stage.press("k")
    assert "colours\tkept" in stage.window.shown["lines"]
    assert "colours" in stage.session.report()["stages_ms"]  # which test_frame_stream looks at
    stage.press("k")
    assert "colours\tkept" not in stage.window.shown["lines"]


def test_a_number_without_a_style_is_announced(stage: Stage) -> None:
    stage.frames()
    stage.press("9")
    assert "there is no style 9; 3 are loaded" in stage.window.shown["banner"]
    assert stage.target() == {0: 1.0}


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
    stage.presenter.do(Command(Action.PAUSE))
    assert stage.window.shown["banner"] == "paused"
    assert stage.session.paused
    shown = stage.window.shown["frame"]
    stage.source.give(FRAMES[5])
    stage.turns(3)
    assert stage.window.shown["frame"] is shown
    stage.presenter.do(Command(Action.PAUSE))
    stage.frames()
    assert stage.window.shown["banner"] != "paused"


def test_a_snapshot_is_what_is_on_the_screen(stage: Stage, tmp_path: Path) -> None:
    stage.frames()
    stage.presenter.do(Command(Action.SNAPSHOT))
    stage.presenter.do(Command(Action.SNAPSHOT))
    taken = sorted(tmp_path.glob("*.png"))
    assert len(taken) == 2  # the second does not replace the first
    np.testing.assert_array_equal(read_picture(taken[0]).frame, stage.window.shown["frame"])
    assert sorted(stage.said) == [f"saved {path}" for path in taken]


def test_recordings_start_and_stop_by_key(stage: Stage, tmp_path: Path) -> None:
    stage.frames()
    stage.press("r")
    stage.frames(3)
    assert stage.window.shown["recording"] is not None
    stage.press("r")
    assert stage.window.shown["recording"] is None
    stage.press("r")
    stage.frames(2)
    stage.presenter.close()
    first, second = (len(frame_times(tmp_path / name)) for name in ("out.mp4", "out-2.mp4"))
    assert min(first, second) >= 3
    assert stage.said[0].startswith(f"recorded {tmp_path / 'out.mp4'} ({first} frames, ")
    assert stage.said[1].startswith(f"recorded {tmp_path / 'out-2.mp4'} ({second} frames, ")


def test_a_dropped_picture_becomes_the_style(stage: Stage, tmp_path: Path) -> None:
    write_picture(tmp_path / "new.png", np.full((40, 40, 3), 60, np.uint8))
    stage.window.waiting.append(Dropped(tmp_path / "new.png"))
    stage.frames()
    wait_until(lambda: stage.target() == {3: 1.0})
    (tmp_path / "new.png").unlink()  # it is not needed any more
    stage.frames(2)
    assert stage.mixer.cards[3].name == "new"


def test_a_dropped_file_that_is_not_a_picture_is_one_line(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    stage.window.waiting.append(Dropped(tmp_path / "notes.txt"))
    stage.frames()
    wait_until(lambda: stage.frames() or stage.said)
    stage.frames()
    assert len(stage.said) == 1
    assert "notes.txt" in stage.said[0]
    assert "notes.txt" in stage.window.shown["banner"]


@pytest.mark.parametrize("event", [Closed(), Closed("the screen went away"), Key("q"), Key("escape")])
def test_a_closed_window_ends_the_session(stage: Stage, event: Any) -> None:
    stage.window.waiting.append(event)
    stage.presenter.run(lambda: False)
    assert stage.said == ([event.reason] if isinstance(event, Closed) and event.reason else [])


def test_seconds_count_from_the_first_frame(stage: Stage) -> None:
    stage.source.give(FRAMES[0])
    stage.clock.step = 0.01
    stage.presenter.run(lambda: False, seconds=1)
    assert stage.session.metrics.counts().frames == 1


def test_a_problem_is_announced_once(stage: Stage) -> None:
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
    stage.turns(1)
    assert stage.window.shown["banner"] == "script lost, looking for it"
