"""The presenter of a live session: window, recordings, virtual camera, snapshots, and key commands."""

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

from std_rt.core.arrays import Frame
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
from std_rt.streaming.frame_stream import FramePacket

__all__ = ["Outputs", "Presenter"]


_TICK_S = 0.02  # longest time between two polls of the window's events
_REDRAW_S = 0.1  # while no frame comes
_BANNER_S = 3.0
_HINT_S = 4.0
_LONGEST_FADE_S = 30.0


class _HasProblem(Protocol):
    @property
    def problem(self) -> str: ...


@dataclass
class Outputs:
    """Where frames go.

    ``record_to``: path of the first recording; later ones are numbered. ``new_recorder`` opens one at a path.
    ``status`` gets the statistics once per second, for use without a window.
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
    """Presents a session until it is over, the user quits, or ``stop`` returns True. Main thread only."""

    def __init__(
        self,
        session: Session,
        outputs: Outputs,
        first: Frame,
        *,
        say: Callable[[str], None],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``first``: shown until a frame is stylized. ``say``: prints one line for the user."""
        self._session, self._out, self._say, self._now = session, outputs, say, now
        self._metrics, self._mixer = session.metrics, session.mixer
        self._fade_s = session.settings.crossfade_s
        self._first = first
        self._packet: FramePacket | None = None  # on the screen
        self._chosen = 0  # the style last chosen or mixed in
        self._shown = {Action.FIGURES, Action.STRIP}  # those switched on, of these two and Action.COMPARE
        self._quit = False
        self._banner, self._banner_until_s = "", -math.inf
        self._drawn_s = self._status_s = -math.inf
        self._started_s: float | None = None
        self._recorded_s: float | None = None  # when the recording's first frame was shown
        self._problems: set[str] = set()  # already announced
        # Finishing a long recording takes seconds, and the picture must not freeze meanwhile.
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="std-rt-record")
        self._finishing: deque[Future[Recording]] = deque()

    def run(self, stop: Callable[[], bool], seconds: float | None = None) -> None:
        """Present; ``seconds`` are counted from the first frame.

        At the end, a recording also gets what is painted and was not due yet.
        """
        self._draw()
        while not (self._quit or stop() or self._session.over or self._is_time_up(seconds)):
            packet = self._session.get(_TICK_S)
            if packet is not None:
                self._present(packet)
            elif self._now() - self._drawn_s > _REDRAW_S:
                self._draw()
            if self._out.window is not None:
                for event in self._out.window.events():
                    self._handle(event)
            if self._out.metrics is not None:
                self._out.metrics.tick()
            self._announce_news()
            if self._now() - self._status_s >= 1:
                self._status_s = self._now()
                figures = [line.replace("\t", " ") for line in self._session.lines()]
                self._out.status("   ".join([*figures, self._session.source.status]).rstrip())
        if self._out.recorder is not None and not self._session.paused:
            for packet, at_s in self._session.rest():
                assert packet.styled is not None
                self._out.recorder.write(packet.styled, at_s)
                self._session.presented(packet)

    def close(self) -> None:
        """End recordings and outputs, but not the session. May be called again."""
        self._end_recording()
        self._finisher.shutdown(wait=True)
        for output in (self._out.virtual, self._out.metrics, self._out.window):
            if output is not None:
                output.close()
        self._announce_news()

    def _is_time_up(self, seconds: float | None) -> bool:
        if seconds is None or self._started_s is None:
            return False
        return self._now() - self._started_s >= seconds

    def _present(self, packet: FramePacket) -> None:
        begun = self._now()
        self._started_s = begun if self._started_s is None else self._started_s
        self._packet = packet
        assert packet.styled is not None
        self._draw()
        if self._out.virtual is not None:
            self._out.virtual.send(packet.styled)
        if self._out.recorder is not None and not self._session.paused:
            self._out.recorder.write(packet.styled, begun)
            self._recorded_s = begun if self._recorded_s is None else self._recorded_s
        packet.stages_ms["present"] = (self._now() - begun) * 1000
        self._session.presented(packet)

    def _draw(self) -> None:
        self._drawn_s = self._now()
        if self._out.window is None:
            return
        frame, beside = self._first, None
        if self._packet is not None and self._packet.styled is not None:
            frame = self._packet.styled
            if Action.COMPARE in self._shown:  # at the same resolution: a larger one costs time for nothing
                beside = fit.resize(self._packet.frame, (frame.shape[0], frame.shape[1]))
        self._out.window.show(
            frame,
            self._session.lines() if Action.FIGURES in self._shown else (),
            beside,
            self._message(),
            recording=self._recording_time(),
            thumbnails=self._thumbnails() if Action.STRIP in self._shown else (),
        )

    def _message(self) -> str:
        """The most important message now: the camera, the last announcement, a pause, or the start."""
        if self._session.source.status:
            return self._session.source.status
        if self._now() < self._banner_until_s:
            return self._banner
        if self._session.paused:
            return "paused"
        if self._started_s is None:
            return "opening the engines"
        return "H shows the keys" if self._now() - self._started_s < _HINT_S else ""

    def _thumbnails(self) -> list[Thumbnail]:
        cards = self._mixer.cards
        if len(cards) < 2:
            return []
        weights, chosen = self._mixer.weights_at(self._now()), self._current()
        return [(card.thumbnail, weights.get(i, 0.0), i == chosen) for i, card in enumerate(cards)]

    def _recording_time(self) -> str | None:
        if self._out.recorder is None or self._out.recorder.problem:
            return None
        seconds = 0 if self._recorded_s is None else int(self._now() - self._recorded_s)
        return f"{seconds // 60}:{seconds % 60:02d}"

    # Announcements

    def _announce_news(self) -> None:
        """Finished recordings, problems (each once), and changes of quality."""
        while self._finishing and self._finishing[0].done():
            self._announce_recording(self._finishing.popleft().result())
        for output in (self._out.metrics, self._out.recorder, self._out.virtual):
            self._announce_problem(output)
        for notes in (self._session.notes, self._mixer.problems):
            while notes:
                self._announce(notes.popleft())

    def _announce_recording(self, done: Recording) -> None:
        if done.frames:
            dropped = f", {done.dropped} dropped" if done.dropped else ""
            self._announce(f"recorded {done.path} ({done.frames} frames, {done.seconds:.1f} s{dropped})")
        self._announce_problem(done)

    def _announce_problem(self, output: _HasProblem | None) -> None:
        if output is not None and output.problem and output.problem not in self._problems:
            self._problems.add(output.problem)
            self._announce(output.problem)

    def _announce(self, line: str) -> None:
        """Show a line in the window and print it to the terminal."""
        self._flash(line)
        self._say(line)

    def _flash(self, line: str) -> None:
        self._banner, self._banner_until_s = line, self._now() + _BANNER_S

    # Keys

    def _handle(self, event: Event) -> None:
        match event:
            case Closed(reason):
                self._quit = True
                if reason:
                    self._say(reason)
            case Dropped(path):
                self._mixer.add_in_background(path, show_s=self._fade_s)
                self._flash(f"loading {path.name}")
            case Key(name, repeat):
                command = command_for(name, repeat)
                if command is not None:
                    self.do(command)

    def do(self, command: Command) -> None:
        """Carry out a command; if it is not possible now, the window says why."""
        asked_s = self._now()
        try:
            if self._change_style(command.action, command.amount):
                self._metrics.style_asked(asked_s)
            else:
                self._change_view(command.action, command.amount)
                self._draw()
        except StdRtError as error:
            self._flash(str(error))

    def _change_style(self, action: Action, amount: float) -> bool:
        """Start the crossfade of a command; False if it does not change the style."""
        index = int(amount) - 1
        match action:
            case Action.STEP_STYLE:
                self._mixer.step(int(amount), self._fade_s)
                self._chosen = self._largest()
            case Action.CHOOSE_STYLE:
                self._mixer.select(index, self._fade_s)
                self._chosen = index
            case Action.MIX_STYLE:  # into the blend with an equal part, or out of it
                target = self._mixer.weights_at(math.inf)
                part = -1.0 if index in target and len(target) > 1 else 1 / (len(target) + 1)
                self._mixer.adjust(index, part, self._fade_s)
                self._chosen = index
            case Action.WEIGHT:
                self._mixer.adjust(self._current(), amount)
            case Action.STRENGTH:
                self._mixer.nudge(amount)
            case _:
                return False
        return True

    def _current(self) -> int:
        """The style chosen last, or the one the cycle has reached."""
        return self._chosen if self._chosen in self._mixer.weights_at(math.inf) else self._largest()

    def _largest(self) -> int:
        weights = self._mixer.weights_at(math.inf)
        return max(weights, key=lambda index: (weights[index], -index))

    def _change_view(self, action: Action, amount: float) -> None:
        match action:
            case Action.CROSSFADE:
                self._fade_s = min(_LONGEST_FADE_S, max(0.0, self._fade_s + amount))
                self._flash(f"crossfade {self._fade_s:g} s")
            case Action.COMPARE | Action.FIGURES | Action.STRIP:
                self._shown ^= {action}
            case Action.STROKES:
                self._mixer.nudge_stroke_size(amount)
                self._flash(f"stroke size {self._mixer.stroke_size:g}")
            case Action.COLOURS | Action.MIRROR | Action.PAUSE:
                self._change_session(action)
            case Action.SNAPSHOT:
                self._save_snapshot()
            case Action.RECORD:
                self._toggle_recording()
            case Action.QUIT:
                self._quit = True
            case _ if self._out.window is not None:
                self._change_window(self._out.window, action)

    def _change_session(self, action: Action) -> None:
        match action:
            case Action.COLOURS:
                self._session.keep_colours = not self._session.keep_colours
            case Action.MIRROR:
                self._session.mirror = not self._session.mirror
            case Action.PAUSE:
                self._session.pause(not self._session.paused)

    def _change_window(self, window: Window, action: Action) -> None:
        match action:
            case Action.HELP:
                window.help_shown = not window.help_shown
            case Action.FULLSCREEN:
                window.toggle_fullscreen()
            case Action.BACK:
                self._quit = not window.back()

    def _save_snapshot(self) -> None:
        if self._packet is None or self._packet.styled is None:
            return
        path = numbered(self._out.snapshots / f"std-rt-{datetime.now():%Y%m%d-%H%M%S}.png")
        write_picture(path, self._packet.styled)
        self._announce(f"saved {path}")

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
