"""A source that plays what a test says, and a window that notes what it was shown."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.media.camera.camera import Captured
from std_rt.media.window.window import Event

Frame = NDArray[np.uint8]


class ScriptedSource:
    """Gives the frames of `give`, waits where there is none, ends after `end`."""

    name, fps = "script", 30.0

    def __init__(self, *frames: Frame) -> None:
        self._given: queue.Queue[Frame | None] = queue.Queue()
        self._index = 0
        self.status = ""
        self.faults: dict[str, int] = {}
        self.closed = False
        for frame in frames:
            self.give(frame)

    def give(self, frame: Frame) -> None:
        self._given.put(frame)

    def end(self) -> None:
        self._given.put(None)

    def read(self) -> Captured | None:
        import time

        frame = self._given.get()
        if frame is None or self.closed:
            return None
        self._index += 1
        return Captured(frame, time.perf_counter(), self._index - 1)

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
