"""A player that makes a file look like a camera: in real time, looping.

A thread decodes a few frames ahead, which hides the start of each pass. If the machine cannot decode as fast
as the clip plays, frames that no other frame needs are skipped; if even that is too slow, the clip's clock is
moved forward, so that it never falls further behind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av

from std_rt.core.arrays import Frame
from std_rt.core.errors import MediaError
from std_rt.core.prefetcher import Prefetcher
from std_rt.media.camera.frame_source import Captured, Pause, Sleep, after
from std_rt.media.fit import resize
from std_rt.media.image import read_picture
from std_rt.media.video.clip import nothing_decoded, open_clip, probe

__all__ = ["FileCamera", "Play", "PlaybackFrame", "clip_playback", "still_playback"]

_AHEAD = 3  # frames
_BEHIND_S = 0.1  # beyond this, frames that no other frame needs are not decoded
_MOVE_S = 0.5  # beyond this, the clock is moved
_LONGEST_S = 10.0  # between frames: a longer gap is a broken timestamp, or useless as a camera
_SHORTEST_S = 0.001
_CAMERA_PX = 3840 * 2160


@dataclass(frozen=True, eq=False)
class PlaybackFrame:
    """A frame of a file that is played: when it is due and how long it lasts, in seconds.

    at_s: from the start of the pass, or, once it is scheduled, of the first pass. ready_s: when it was
    decoded, by the source's clock. skipped: frames before it that were not decoded.
    """

    frame: Frame
    at_s: float
    lasts_s: float
    skipped: int = 0
    ready_s: float = 0.0


Play = Callable[[Callable[[], bool]], Generator[PlaybackFrame, None, None]]
"""Yields the frames of one pass; its argument tells whether it is behind, and it may then skip some."""


class FileCamera:
    """A `Source` that plays passes of a file in real time; its clock starts with the first ``read()``.

    name: the file's name. fps: nominal frames/s or None.
    """

    is_camera = False

    def __init__(
        self,
        name: str,
        fps: float | None,
        play: Play,
        *,
        loop: bool = True,
        now: Callable[[], float] = time.perf_counter,
        sleep: Sleep | None = None,
    ) -> None:
        self.name, self.fps = name, fps
        self._play, self._loop, self._now = play, loop, now
        self._pause = Pause(sleep)
        # Of the decoding thread:
        self._is_lost = False
        self._losses = 0
        # Of the reader:
        self._is_behind = False
        self._start_s: float | None = None
        self._at_s = -math.inf
        self._returned = self._late = 0
        self._next: PlaybackFrame | None = None  # looked at, not yet returned
        self._frames = Prefetcher(self._decode(), room=_AHEAD, name=name)

    @property
    def status(self) -> str:
        """Empty unless the file disappeared during playback."""
        is_over = self._pause.is_over or self._frames.over
        return f"{self.name} lost; reconnecting" if self._is_lost and not is_over else ""

    @property
    def faults(self) -> dict[str, int]:
        """How often: late (frames skipped to stay in the present), lost (the file was gone)."""
        counts = {"late": self._late, "lost": self._losses}
        return {fault: count for fault, count in counts.items() if count}

    def first_frame(self) -> Frame | None:
        """A copy of the first frame, which ``read()`` will return as usual."""
        self._next = self._next or next(self._frames, None)
        return None if self._next is None else self._next.frame.copy()

    def read(self) -> Captured | None:
        """Wait until the next frame is due. None: closed, or the end without ``loop``."""
        while not self._pause.is_over:
            frame = self._next or next(self._frames, None)
            if frame is None:
                return None
            due_s, self._next = self._due_s(frame), self._frames.get(0)
            if self._next is not None and due_s + self._next.at_s - frame.at_s <= self._now():
                self._late += 1
                continue
            while (left_s := due_s - self._now()) > 0:
                if not self._pause.wait(left_s):
                    return None
            self._at_s = after(max(due_s, frame.ready_s), self._at_s)
            self._returned += 1
            return Captured(frame.frame, self._at_s, self._returned - 1)
        return None

    def close(self) -> None:
        """End ``read()`` and release the file."""
        self._pause.end()
        self._frames.close(0.25)

    def _due_s(self, frame: PlaybackFrame) -> float:
        """When the frame is due by the source's clock, which is moved if it is too far behind."""
        now_s = self._now()
        if self._start_s is None:
            self._start_s = now_s - frame.at_s
        lag_s = now_s - self._start_s - frame.at_s
        self._late += frame.skipped
        self._is_behind = lag_s > _BEHIND_S
        if lag_s > _MOVE_S:
            self._late += round(lag_s * (self.fps or 25.0))
            self._start_s += lag_s
        return self._start_s + frame.at_s

    def _decode(self) -> Iterator[PlaybackFrame]:
        """Pass after pass, in the decoding thread."""
        start_s = 0.0
        while not self._pause.is_over:
            end_s = start_s
            try:
                with closing(self._play(lambda: self._is_behind)) as frames:
                    for item in frames:
                        self._is_lost = False
                        at_s = start_s + item.at_s
                        end_s = max(end_s, at_s + max(item.lasts_s, _SHORTEST_S))
                        yield replace(item, at_s=at_s, ready_s=self._now())
            except (MediaError, av.FFmpegError):
                newly_lost, self._is_lost = not self._is_lost, True
                self._losses += newly_lost
                self._pause.before_retry(first=newly_lost)
            if not self._loop:
                return
            start_s = end_s


def clip_playback(path: Path) -> tuple[float | None, Play]:
    """Frames/s (None if unknown) and the passes of a clip, upright.

    Raises MediaError if it is not a video or cannot be decoded.
    """
    rate = probe(path).average_rate
    return float(rate) if rate else None, lambda is_behind: _play_clip(path, is_behind)


def _play_clip(path: Path, is_behind: Callable[[], bool]) -> Generator[PlaybackFrame, None, None]:
    """One pass through a clip, with square pixels; its first frame is at 0 whatever its timestamp."""
    with open_clip(path) as clip:
        step_s = float(clip.frame_step * clip.time_base)
        at_s, last_pts = 0.0, None
        for item in clip.read():
            gap_s = 0.0 if last_pts is None else float((item.pts - last_pts) * clip.time_base)
            at_s, last_pts = at_s + min(gap_s, _LONGEST_S), item.pts
            lasts_s = min(float(item.duration * clip.time_base), _LONGEST_S) or step_s
            # How many frames of the average length would have been in the gap.
            skipped = max(0, round(gap_s / step_s) - 1) if clip.skips else 0
            yield PlaybackFrame(_square_pixels(item.rgb, clip.pixel_aspect), at_s, lasts_s, skipped)
            clip.skips = is_behind()
    if last_pts is None:
        raise nothing_decoded(path)


def _square_pixels(frame: Frame, pixel_aspect: Fraction | None) -> Frame:
    """A frame whose pixels are oblong, as windows, calls and recordings show it; no side gets shorter."""
    h, w = frame.shape[:2]
    if pixel_aspect is None:
        return frame
    size = (h, round(w * pixel_aspect)) if pixel_aspect > 1 else (round(h / pixel_aspect), w)
    return _at_most_4k(frame, size)


def _at_most_4k(frame: Frame, size: tuple[int, int]) -> Frame:
    """``frame`` at ``size`` (H, W), or smaller in the same aspect."""
    scale = min(1.0, math.sqrt(_CAMERA_PX / (size[0] * size[1])))
    return resize(frame, (max(1, int(size[0] * scale)), max(1, int(size[1] * scale))))


def still_playback(path: Path, fps: float) -> tuple[float, Play]:
    """``fps`` and the passes of a picture, one frame each; transparent parts are white.

    A picture larger than 4K is scaled down to it. Raises MediaError if it cannot be read.
    """
    frame = read_picture(path).frame
    frame = _at_most_4k(frame, (frame.shape[0], frame.shape[1]))

    def play(_: Callable[[], bool]) -> Generator[PlaybackFrame, None, None]:
        yield PlaybackFrame(frame.copy(), 0.0, 1 / fps)

    return fps, play
