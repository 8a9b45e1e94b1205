"""A file that stands in for a camera: its frames at their own times, again and again.

A thread decodes a few frames ahead, which hides the start of each round. Where the machine cannot decode
as fast as the clip plays, frames that no other needs are left out; if even that is too slow, the clip's
clock is moved, so that it plays on from the present instead of falling ever further behind.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from std_rt.core.errors import MediaError
from std_rt.media.camera.frame_source import Captured, Frame, Pause, Sleep, after
from std_rt.media.fit import to_working
from std_rt.media.image import read_picture
from std_rt.media.video.clip import Clip, TimedFrame, first_video_stream, open_clip
from std_rt.media.video.transcode import probe

__all__ = ["PlayedFrame", "PlayedSource", "clip_camera", "still_camera"]

_AHEAD = 3  # frames
_BEHIND_S = 0.1  # from here on, frames that no other needs are not decoded
_MOVE_S = 0.5  # from here on, the clock is moved
_LONGEST_S = 10.0  # between frames: longer is a broken time, or as good as no camera
_SHORTEST_S = 0.001
_LOOK_AGAIN_S, _LOOK_AGAIN_MAX_S = 0.2, 2.0
_CAMERA_PX = 3840 * 2160


@dataclass(frozen=True, eq=False)
class PlayedFrame:
    """A frame of one round: when it is due and for how long, in seconds from the round's start.

    left_out: frames before it that were not decoded.
    """

    frame: Frame
    at_s: float
    lasts_s: float
    left_out: int = 0


@dataclass(frozen=True, eq=False)
class _Ready:
    """A shot on the clock of all rounds: due_s from the first frame, ready_s by the source's clock."""

    frame: Frame
    due_s: float
    ready_s: float
    left_out: int


Round = Callable[[Callable[[], bool]], Generator[PlayedFrame, None, None]]
"""Gives the shots of one round; asks its argument whether it is behind, and may then leave some out."""


class PlayedSource:
    """Plays rounds of shots in real time; a :class:`~std_rt.media.camera.frame_source.Source`.

    fps: nominal frames/s or None. The clock starts with the first ``read()``.
    """

    def __init__(
        self,
        name: str,
        fps: float | None,
        play: Round,
        *,
        loop: bool = True,
        now: Callable[[], float] = time.perf_counter,
        sleep: Sleep | None = None,
    ) -> None:
        self._name, self._fps, self._play, self._loop, self._now = name, fps, play, loop, now
        self._pause = Pause(sleep)
        self._news = threading.Condition()  # guards the next four
        self._ahead: deque[_Ready] = deque()
        self._has_ended = self._is_lost = False
        self._losses = 0
        self._is_behind = False
        self._start_s: float | None = None
        self._at_s = -math.inf
        self._given = self._late = 0
        self._thread = threading.Thread(target=self._decode, name=name, daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The file's name."""
        return self._name

    @property
    def fps(self) -> float | None:
        """Average frames per second as the file says, or None."""
        return self._fps

    @property
    def status(self) -> str:
        """Empty but where the file has gone while it was played."""
        return f"{self._name} lost, looking for it" if self._is_lost and not self._has_ended else ""

    @property
    def faults(self) -> dict[str, int]:
        """Counts: late (frames left out or passed over to stay in the present), lost (the file was gone)."""
        counts = {"late": self._late, "lost": self._losses}
        return {fault: count for fault, count in counts.items() if count}

    def read(self) -> Captured | None:
        """Wait until the next frame is due. None: closed, or the end without ``loop``."""
        while (ready := self._next()) is not None:
            due_s = self._settle(ready)
            if self._newer_is_due():
                self._late += 1
                continue
            while (left_s := due_s - self._now()) > 0:
                if not self._pause.wait(left_s):
                    return None
            self._at_s = after(max(due_s, ready.ready_s), self._at_s)
            self._given += 1
            return Captured(ready.frame, self._at_s, self._given - 1)
        return None

    def close(self) -> None:
        """End ``read()`` and let the file go."""
        self._end()
        self._thread.join(timeout=0.25)

    def _end(self) -> None:
        self._pause.end()
        with self._news:
            self._ahead.clear()
            self._has_ended = True
            self._news.notify_all()

    def _next(self) -> _Ready | None:
        with self._news:
            self._news.wait_for(lambda: self._ahead or self._has_ended)
            self._news.notify_all()
            return self._ahead.popleft() if self._ahead else None

    def _settle(self, ready: _Ready) -> float:
        """When the frame is due by the clock, which is moved if it is too far behind."""
        now_s = self._now()
        if self._start_s is None:
            self._start_s = now_s - ready.due_s
        lag_s = now_s - self._start_s - ready.due_s
        self._late += ready.left_out
        self._is_behind = lag_s > _BEHIND_S
        if lag_s > _MOVE_S:
            self._late += round(lag_s * (self._fps or 25.0))
            self._start_s += lag_s
        return self._start_s + ready.due_s

    def _newer_is_due(self) -> bool:
        with self._news:
            newer = self._ahead[0].due_s if self._ahead else math.inf
        return self._start_s is not None and self._start_s + newer <= self._now()

    def _decode(self) -> None:
        """The decoding thread: round after round, a few frames ahead of the reader."""
        started_s, wait_s = 0.0, _LOOK_AGAIN_S
        try:
            while not self._pause.is_over:
                try:
                    started_s = self._one_round(started_s)
                    wait_s = _LOOK_AGAIN_S
                except (MediaError, av.FFmpegError):
                    self._losses += not self._is_lost
                    self._is_lost = True
                    self._pause.wait(wait_s)
                    wait_s = min(2 * wait_s, _LOOK_AGAIN_MAX_S)
                if not self._loop:
                    return
        finally:
            self._finish()

    def _one_round(self, started_s: float) -> float:
        """Hand over the shots of a round; when the next one starts."""
        end_s = started_s
        with closing(self._play(lambda: self._is_behind)) as shots:
            for shot in shots:
                self._is_lost = False
                ready = _Ready(shot.frame, started_s + shot.at_s, self._now(), shot.left_out)
                end_s = max(end_s, ready.due_s + max(shot.lasts_s, _SHORTEST_S))
                if not self._put(ready):
                    break
        return end_s

    def _put(self, ready: _Ready) -> bool:
        with self._news:
            self._news.wait_for(lambda: len(self._ahead) < _AHEAD or self._has_ended)
            if not self._has_ended:
                self._ahead.append(ready)
                self._news.notify_all()
            return not self._has_ended

    def _finish(self) -> None:
        """After the last round: what is decoded may still be read."""
        with self._news:
            self._news.wait_for(lambda: not self._ahead or self._has_ended)
            self._has_ended = True
            self._news.notify_all()


def clip_camera(
    path: Path,
    *,
    loop: bool = True,
    now: Callable[[], float] = time.perf_counter,
    sleep: Sleep | None = None,
) -> PlayedSource:
    """A clip in a camera's place, upright. Raises MediaError if it is no video or cannot be decoded."""
    rate = probe(path).average_rate
    fps = float(rate) if rate else None
    return PlayedSource(path.name, fps, lambda behind: _shots(path, behind), loop=loop, now=now, sleep=sleep)


def _shots(path: Path, is_behind: Callable[[], bool]) -> Generator[PlayedFrame, None, None]:
    """One round of a clip; its first frame is at 0 whatever its timestamp."""
    with open_clip(path) as container:
        clip = Clip(container, first_video_stream(container, path))
        step_s = float(clip.frame_step * clip.time_base)
        at_s, last_pts = 0.0, None
        for item in clip.read():
            if not isinstance(item, TimedFrame):
                continue
            gap_s = 0.0 if last_pts is None else float((item.pts - last_pts) * clip.time_base)
            at_s, last_pts = at_s + min(gap_s, _LONGEST_S), item.pts
            lasts_s = min(float(item.duration * clip.time_base), _LONGEST_S) or step_s
            yield PlayedFrame(item.rgb, at_s, lasts_s, _left_out(clip, gap_s, step_s))
            clip.video.codec_context.skip_frame = "NONREF" if is_behind() else "DEFAULT"
    if last_pts is None:
        raise MediaError(f"{path} is damaged: not one frame of it could be decoded")


def _left_out(clip: Clip, gap_s: float, step_s: float) -> int:
    """How many frames of the average length would have been in the gap, if decoding leaves some out."""
    skips = clip.video.codec_context.skip_frame != "DEFAULT"
    return max(0, round(gap_s / step_s) - 1) if skips else 0


def still_camera(
    path: Path,
    *,
    fps: float = 30.0,
    loop: bool = True,
    now: Callable[[], float] = time.perf_counter,
    sleep: Sleep | None = None,
) -> PlayedSource:
    """A camera that sees nothing but a picture (once, without ``loop``); transparent parts are white.

    A picture larger than 4K is scaled down to it. Raises MediaError if it cannot be read.
    """
    frame = _picture(path)

    def shots(_: Callable[[], bool]) -> Generator[PlayedFrame, None, None]:
        yield PlayedFrame(frame.copy(), 0.0, 1 / fps)

    return PlayedSource(path.name, fps, shots, loop=loop, now=now, sleep=sleep)


def _picture(path: Path) -> Frame:
    picture = read_picture(path)
    frame = picture.frame
    if picture.alpha is not None:
        alpha = picture.alpha[:, :, None].astype(np.uint16)
        frame = ((frame * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    h, w = frame.shape[:2]
    scale = math.sqrt(_CAMERA_PX / (h * w))
    return frame if scale >= 1 else to_working(frame, (max(1, int(h * scale)), max(1, int(w * scale))))
