"""The presenting lane of a live session: window, recordings, virtual camera, snapshots, and what keys do."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import StdRtError
from std_rt.live.keys import Action, Command, command_for
from std_rt.live.metrics_file import MetricsWriter
from std_rt.live.session import Session
from std_rt.media import fit
from std_rt.media.camera.virtual_camera import VirtualCamera
from std_rt.media.image import write_picture
from std_rt.media.video.record import Recorder, Recording, numbered
from std_rt.media.window.overlay import Thumbnail
from std_rt.media.window.window import Closed, Dropped, Event, Key, Window
from std_rt.streaming.frame_packet import FramePacket

__all__ = ["Outputs", "Presenter"]

Frame = NDArray[np.uint8]

_TICK_S = 0.02  # at most so long without a look at the window's events
_REDRAW_S = 0.1  # where no frame comes
_BANNER_S = 3.0
_HINT_S = 4.0
_LONGEST_FADE_S = 30.0


class _HasProblem(Protocol):
    @property
    def problem(self) -> str: ...


@dataclass
class Outputs:
    """Where frames go. ``record_to``: the first recording; later ones are numbered.

    ``new_recorder`` opens one at a path. ``status`` is told the figures where there is no window.
    """

    window: Window | None = None
    virtual: VirtualCamera | None = None
    metrics: MetricsWriter | None = None
    recorder: Recorder | None = None
    record_to: Path = Path("std-rt.mp4")
    snapshots: Path = Path()
    new_recorder: Callable[[Path], Recorder] | None = None
    status: Callable[[str], None] = field(default=lambda text: None)


class Presenter:
    """Presents a session until it is over, someone quits, or ``stop`` says so. Main thread only."""

    def __init__(
        self,
        session: Session,
        outputs: Outputs,
        first: Frame,
        *,
        say: Callable[[str], None],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``first``: what the window has until something is painted. ``say``: one line for the user."""
        self._session, self._out, self._say, self._now = session, outputs, say, now
        self._fade_s = session.settings.crossfade_s
        self._shot: FramePacket | None = None
        self._first = first
        self._chosen = 0
        self._beside = self._quit = False
        self._figures = self._strip = True
        self._banner, self._banner_until_s = "", -math.inf
        self._drawn_s = self._told_s = -math.inf
        self._recorded_s: float | None = None
        self._told: set[str] = set()
        self.started_s: float | None = None
        # Making a plain MP4 of a long recording takes seconds, which the picture must not stand still for.
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="std-rt-record")
        self._finishing: deque[Future[Recording]] = deque()
        self.recordings: list[Recording] = []

    def run(self, stop: Callable[[], bool], seconds: float | None = None) -> None:
        """Present; ``seconds`` are counted from the first frame."""
        self._draw()
        while not (self._quit or stop() or self._session.over or self._is_over(seconds)):
            shot = self._session.get(_TICK_S)
            if shot is not None:
                self._present(shot)
            elif self._now() - self._drawn_s > _REDRAW_S:
                self._draw()
            if self._out.window is not None:
                for event in self._out.window.events():
                    self._heed(event)
            self._look_after()

    def close(self) -> None:
        """End recordings and outputs; the session is closed by whoever opened it. May be called again."""
        self._end_recording()
        self._finisher.shutdown(wait=True)
        self._tell_finished()
        for output in (self._out.virtual, self._out.metrics, self._out.window):
            if output is not None:
                output.close()
        for ended in (self._out.virtual, self._out.metrics):
            self._tell_problem(ended)

    def _is_over(self, seconds: float | None) -> bool:
        if seconds is None or self.started_s is None:
            return False
        return self._now() - self.started_s >= seconds

    def _present(self, shot: FramePacket) -> None:
        begun = self._now()
        self.started_s = begun if self.started_s is None else self.started_s
        self._shot = shot
        assert shot.styled is not None
        self._draw()
        if self._out.virtual is not None:
            self._out.virtual.send(shot.styled)
        if self._out.recorder is not None and not self._session.paused:
            self._out.recorder.write(shot.styled, begun)
            self._recorded_s = begun if self._recorded_s is None else self._recorded_s
        shot.stages_ms["present"] = (self._now() - begun) * 1000
        self._session.presented(shot)

    def _draw(self) -> None:
        self._drawn_s = self._now()
        if self._out.window is None:
            return
        frame, beside = self._first, None
        if self._shot is not None and self._shot.styled is not None:
            frame = self._shot.styled
            if self._beside:  # at the same resolution: a larger one is work for a screen that shows it small
                beside = fit.resize(self._shot.frame, (frame.shape[0], frame.shape[1]))
        self._out.window.show(
            frame,
            self._session.lines() if self._figures else (),
            beside,
            self._message(),
            recording=self._recording_time(),
            thumbnails=self._thumbnails() if self._strip else (),
        )

    def _message(self) -> str:
        """What matters most now: the camera, a pause, the start, or what was said last."""
        if self._session.source.status:
            return self._session.source.status
        if self._now() < self._banner_until_s:
            return self._banner
        if self._session.paused:
            return "paused"
        if self._shot is None:
            return "opening the engines"
        started_s = self._now() if self.started_s is None else self.started_s
        return "H shows the keys" if self._now() - started_s < _HINT_S else ""

    def _thumbnails(self) -> list[Thumbnail]:
        cards = self._session.deck.cards
        if len(cards) < 2:
            return []
        weights = self._session.deck.weights_at(self._now())
        chosen = self._current()
        return [(card.thumbnail, weights.get(i, 0.0), i == chosen) for i, card in enumerate(cards)]

    def _recording_time(self) -> str | None:
        if self._out.recorder is None or self._out.recorder.problem:
            return None
        seconds = 0 if self._recorded_s is None else int(self._now() - self._recorded_s)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _look_after(self) -> None:
        """Everything that is due now and then, beside the frames."""
        if self._out.metrics is not None:
            self._out.metrics.tick()
        self._tell_finished()
        for output in (self._out.metrics, self._out.recorder, self._out.virtual):
            self._tell_problem(output)
        for notes in (self._session.notes, self._session.deck.problems):
            while notes:
                self._tell(notes.pop(0) if isinstance(notes, list) else notes.popleft())
        if self._now() - self._told_s >= 1:
            self._told_s = self._now()
            status = self._session.source.status
            figures = [line.replace("\t", " ") for line in self._session.lines()]
            self._out.status("   ".join([*figures, *([status] if status else [])]))

    def _tell_problem(self, output: _HasProblem | None) -> None:
        if output is not None and output.problem and output.problem not in self._told:
            self._told.add(output.problem)
            self._tell(output.problem)

    def _tell(self, line: str) -> None:
        """On the window, and for the record on the terminal."""
        self._flash(line)
        self._say(line)

    def _flash(self, line: str) -> None:
        self._banner, self._banner_until_s = line, self._now() + _BANNER_S

    # What keys do

    def _heed(self, event: Event) -> None:
        match event:
            case Closed(reason):
                self._quit = True
                if reason:
                    self._say(reason)
            case Dropped(path):
                self._session.deck.add_in_background(path, show_s=self._fade_s)
                self._flash(f"loading {path.name}")
            case Key(name, repeat):
                command = command_for(name, repeat)
                if command is not None:
                    self.do(command)

    def do(self, command: Command) -> None:
        """What the table of keys says. A command that does not fit the moment says so on the window."""
        try:
            if not self._do_style(command):
                self._do_other(command)
        except StdRtError as error:
            self._flash(str(error))

    def _do_style(self, command: Command) -> bool:
        """What changes the style, each a crossfade; False for any other command."""
        deck, number = self._session.deck, int(command.amount) - 1
        ways: dict[Action, Callable[[], None]] = {
            Action.STEP_STYLE: lambda: self._step(command.amount),
            Action.CHOOSE_STYLE: lambda: deck.select(number, self._fade_s),
            Action.MIX_STYLE: lambda: self._mix(number),
            Action.WEIGHT: lambda: deck.adjust(self._current(), command.amount),
            Action.STRENGTH: lambda: deck.nudge(command.amount),
        }
        way = ways.get(command.action)
        if way is None:
            return False
        asked_s = self._now()
        way()
        self._session.meter.style_asked(asked_s)
        if command.action in (Action.CHOOSE_STYLE, Action.MIX_STYLE):
            self._chosen = number
        return True

    def _step(self, amount: float) -> None:
        deck = self._session.deck
        (deck.next if amount > 0 else deck.previous)(self._fade_s)
        self._chosen = self._largest()

    def _mix(self, index: int) -> None:
        """Into the blend with an equal part, or out of it."""
        target = self._session.deck.weights_at(math.inf)
        part = -1.0 if index in target and len(target) > 1 else 1 / (len(target) + 1)
        self._session.deck.adjust(index, part, self._fade_s)

    def _current(self) -> int:
        """The style chosen last, or the one that the cycle has come to."""
        return self._chosen if self._chosen in self._session.deck.weights_at(math.inf) else self._largest()

    def _largest(self) -> int:
        weights = self._session.deck.weights_at(math.inf)
        return max(weights, key=lambda index: (weights[index], -index))

    def _do_other(self, command: Command) -> None:
        ways: dict[Action, Callable[[], None]] = {
            Action.CROSSFADE: lambda: self._change_fade(command.amount),
            Action.COMPARE: lambda: self._toggle("_beside"),
            Action.MIRROR: self._mirror,
            Action.PAUSE: lambda: self._session.pause(not self._session.paused),
            Action.SNAPSHOT: self._snapshot,
            Action.RECORD: self._toggle_recording,
            Action.FIGURES: lambda: self._toggle("_figures"),
            Action.STRIP: lambda: self._toggle("_strip"),
            Action.QUIT: lambda: self._toggle("_quit"),
        }
        if command.action in ways:
            ways[command.action]()
        elif self._out.window is not None:
            self._do_with(self._out.window, command.action)
        self._draw()

    def _do_with(self, window: Window, action: Action) -> None:
        match action:
            case Action.HELP:
                window.help_shown = not window.help_shown
            case Action.FULLSCREEN:
                window.toggle_fullscreen()
            case Action.BACK:
                self._quit = not window.back()

    def _toggle(self, name: str) -> None:
        setattr(self, name, not getattr(self, name))

    def _mirror(self) -> None:
        self._session.mirror = not self._session.mirror

    def _change_fade(self, seconds: float) -> None:
        self._fade_s = min(_LONGEST_FADE_S, max(0.0, self._fade_s + seconds))
        self._flash(f"crossfade {self._fade_s:g} s")

    def _snapshot(self) -> None:
        if self._shot is None or self._shot.styled is None:
            return
        path = numbered(self._out.snapshots / f"std-rt-{datetime.now():%Y%m%d-%H%M%S}.png")
        write_picture(path, self._shot.styled)
        self._tell(f"snapshot {path}")

    def _toggle_recording(self) -> None:
        if self._out.recorder is not None:
            self._end_recording()
        elif self._out.new_recorder is not None:
            path = numbered(self._out.record_to)
            self._out.recorder = self._out.new_recorder(path)
            self._flash(f"recording {path}")

    def _end_recording(self) -> None:
        recorder, self._out.recorder, self._recorded_s = self._out.recorder, None, None
        if recorder is not None:
            self._finishing.append(self._finisher.submit(recorder.close))

    def _tell_finished(self) -> None:
        while self._finishing and self._finishing[0].done():
            self._tell_recording(self._finishing.popleft().result())

    def _tell_recording(self, done: Recording) -> None:
        self.recordings.append(done)
        if done.frames:
            dropped = f", {done.dropped} dropped" if done.dropped else ""
            self._tell(f"recorded {done.path} ({done.frames} frames, {done.seconds:.1f} s{dropped})")
        if done.problem and done.problem not in self._told:
            self._told.add(done.problem)
            self._tell(done.problem)
