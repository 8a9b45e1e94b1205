"""A clock, a source and a window under a test's control, and waits that cannot hang."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.live.session import Session
from std_rt.media.camera.camera import Captured
from std_rt.media.window.window import Event
from std_rt.streaming.frame_stream import FramePacket

Frame = NDArray[np.uint8]

SOON_S = 60.0  # only to end a test that hangs


class Clock:
    """Seconds, moved by hand; each reading adds ``step``."""

    def __init__(self, at: float = 100.0, step: float = 0.0) -> None:
        self.at, self.step = at, step

    def __call__(self) -> float:
        self.at += self.step
        return self.at


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def next_packet(session: Session) -> FramePacket:
    """The next styled packet; a session that gives none has failed the test."""
    end = time.monotonic() + SOON_S
    while (packet := session.get(0.05)) is None:
        assert time.monotonic() < end, "no frame came"
        assert not session.over, "the session is over"
    return packet


class ScriptedSource:
    """Delivers the frames of `give`, waits where there is none, ends after `end`."""

    name, fps, is_camera = "script", 30.0, True

    def __init__(self, clock: Callable[[], float], *frames: Frame) -> None:
        self._clock = clock
        self._given: queue.Queue[Frame | None] = queue.Queue()
        self.delivered = 0
        self.status = ""
        self.faults: dict[str, int] = {}
        self.closed = False
        for frame in frames:
            self.give(frame)

    def give(self, frame: Frame) -> None:
        self._given.put(frame)

    def end(self) -> None:
        self._given.put(None)

    def first_frame(self) -> Frame | None:
        taken = self.read()
        return None if taken is None else taken.frame

    def read(self) -> Captured | None:
        frame = self._given.get()
        if frame is None or self.closed:
            return None
        self.delivered += 1
        return Captured(frame, self._clock(), self.delivered - 1)

    def close(self) -> None:
        self.closed = True
        self.end()


class NotedWindow:
    """What `Window` is to `Presenter`, without a screen: ``shown`` is the last call's arguments."""

    def __init__(self, *events: Event) -> None:
        self.shown: dict[str, Any] = {}
        self.count = 0
        self.waiting: list[Event] = list(events)
        self.help_shown = self.fullscreen = self.closed = False

    def show(
        self,
        frame: Frame,
        lines: Sequence[str] = (),
        beside: Frame | None = None,
        banner: str = "",
        *,
        recording: str | None = None,
        thumbnails: Sequence[Any] = (),
    ) -> None:
        self.count += 1
        self.shown = {
            "frame": frame,
            "lines": list(lines),
            "beside": beside,
            "banner": banner,
            "recording": recording,
            "thumbnails": list(thumbnails),
        }

    def events(self) -> list[Event]:
        found, self.waiting = self.waiting, []
        return found

    def toggle_fullscreen(self) -> None:
        self.fullscreen = not self.fullscreen

    def back(self) -> bool:
        was, self.help_shown = self.help_shown, False
        return was

    def close(self) -> None:
        self.closed = True
