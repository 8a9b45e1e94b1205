"""Cameras, which always return the newest frame, and `open_source`, which resolves ``--camera``.

A thread reads the device, because such a read may never return: ``read()``, ``status`` and ``close()`` need
not wait for it.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from std_rt.core.arrays import Frame, Size
from std_rt.core.errors import MediaError
from std_rt.core.prefetcher import Prefetcher
from std_rt.media.camera.device import CvDevice, Device, Properties, camera_choices, camera_name
from std_rt.media.camera.file_camera import FileCamera, clip_playback, still_playback
from std_rt.media.camera.frame_source import Captured, Pause, Sleep, Source, after
from std_rt.media.sources import media_kind

__all__ = ["Camera", "Captured", "Source", "open_source", "to_frame"]

_OPEN_S = 20.0  # some drivers take ten seconds to open a camera
_WARM_UP_S = 3.0  # how long reads may fail before the first frame
_GIVE_UP_S = 0.5  # and between frames, until the camera counts as lost
_RETRY_S = 0.02  # after a read that failed
_CLOSE_S = 0.25  # enough for a camera that works, so that it can be opened again at once
_STALL_S = 1.0
_DARK_S = 2.0
_DARK = 6.0  # mean of 0..255; a covered lens gives some noise
_MIN_PX = 2
_TO_RGB = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}  # by channels
# macOS asks the user for permission only if the first opening comes from the main thread.
_OPEN_HERE = sys.platform == "darwin"


def open_source(
    spec: str,
    *,
    size: Size | None = None,
    fps: float | None = None,
    loop: bool = True,
    now: Callable[[], float] = time.perf_counter,
    sleep: Sleep | None = None,
    device: Callable[[str, Size | None, float | None], Device] = CvDevice,
) -> Source:
    """The source that ``spec`` names: a camera ("0", "/dev/video0"), or a file to play as one.

    A video file plays in real time by its own timestamps, looping unless ``loop`` is False. A picture file
    gives the same frame at ``fps`` (30).

    size: (H, W) and fps in frames/s are requests to a camera, which uses its nearest mode; a video file has
    its own. now: the clock of ``Captured.at_s``; sleep: None to wait in real time, which ``close()`` cuts
    short. device: opens a camera's device.

    Raises MediaError, one line: no such camera or file, not allowed, in use, not readable.
    """
    if size is not None and min(size) < 1:
        raise MediaError(f"camera size must be positive, got {size[1]}x{size[0]}; use for example 1280x720")
    if fps is not None and not (0 < fps <= 1000):
        raise MediaError(
            f"camera rate must be above 0 and at most 1000 frames/s, got {fps:g}; use for example 30"
        )
    target = spec.strip()
    if target.isdecimal() or (target.startswith("/dev/") and not Path(target).is_file()):
        return Camera(camera_name(target), device(target, size, fps), now=now, sleep=sleep)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", target):
        raise MediaError(f"{target} is a network stream, which is not supported; {camera_choices()}")
    path = Path(target).expanduser()
    if not target or not path.exists():
        raise MediaError(f"{target or 'nothing'} is neither a camera nor a file; {camera_choices()}")
    is_clip = media_kind(path) == "video"
    rate, play = clip_playback(path) if is_clip else still_playback(path, fps or 30.0)
    return FileCamera(path.name, rate, play, loop=loop, now=now, sleep=sleep)


class Camera:
    """A `Source` on a device: reopens it when it is lost, and never lets it block the reader.

    name: "camera 0". properties: size and rate as the driver reports them, which may differ from
    what was requested. The constructor waits for the first frame; it raises MediaError if the camera cannot
    be opened or sends none.
    """

    is_camera = True

    def __init__(
        self,
        name: str,
        device: Device,
        *,
        now: Callable[[], float] = time.perf_counter,
        sleep: Sleep | None = None,
    ) -> None:
        self.name, self._device, self._now = name, device, now
        self.properties = device.open() if _OPEN_HERE else Properties(None, None)
        self._pause = Pause(sleep)
        self._returned = 0  # by read()
        # Written by the camera's thread only.
        self._faults: Counter[str] = Counter()
        self._shape: tuple[int, ...] | None = None
        self._is_lost = False
        self._at_s = -math.inf  # the time of the last frame
        self._received_s = -math.inf  # when it came; the same unless the clock repeated a time
        self._dark_since_s: float | None = None
        self._frames = Prefetcher(self._capture(_OPEN_HERE), room=1, latest=True, name=name)
        self._wait_for_first()

    @property
    def fps(self) -> float | None:
        """Frames per second as the driver reports, or None."""
        return self.properties.fps

    @property
    def status(self) -> str:
        """Empty while frames come, else what is wrong."""
        if self._pause.is_over:
            return ""
        if self._is_lost:
            return f"{self.name} lost; reconnecting"
        quiet_s, dark_since_s = self._now() - self._received_s, self._dark_since_s
        if quiet_s > _STALL_S:
            return f"{self.name} has sent no frame for {quiet_s:.0f} s"
        if dark_since_s is not None and self._at_s - dark_since_s >= _DARK_S:
            return f"{self.name} is sending black frames; is the lens covered?"
        return ""

    @property
    def faults(self) -> dict[str, int]:
        """How often each fault occurred; only those that did.

        empty, corrupt: reads without a frame, or with an unusable one; converted: not BGR; resized; black;
        repeated: times; stalls: over a second; lost: found again or not; unread: frames that a newer one
        replaced before ``read()``.
        """
        drops = self._frames.drops
        return {**self._faults, "unread": drops} if drops else dict(self._faults)

    def first_frame(self) -> Frame | None:
        """The newest frame, which ``read()`` will not return again."""
        taken = self.read()
        return None if taken is None else taken.frame

    def read(self) -> Captured | None:
        """The newest frame, once; waits for it. None after ``close()``."""
        newest = next(self._frames, None)
        if newest is None:
            return None
        self._returned += 1
        return Captured(*newest, self._returned - 1)

    def close(self) -> None:
        """End ``read()`` at once. The device is released as soon as its own read returns."""
        self._pause.end()
        self._frames.close(_CLOSE_S)

    def _wait_for_first(self) -> None:
        """Wait for the first frame, or raise the reason why there is none."""
        until_s = self._now() + _OPEN_S
        try:
            # In short waits: on Windows a longer one would hold up Ctrl-C.
            while not self._frames.wait(0.1):
                if self._frames.over or self._now() >= until_s:
                    raise MediaError(
                        f"{self.name} does not answer; unplug it and plug it in again, or {camera_choices()}"
                    )
        except BaseException:
            self.close()
            raise

    def _capture(self, is_open: bool) -> Iterator[tuple[Frame, float]]:
        """Frames and their times, in the camera's thread: reopens the device each time it is lost."""
        while not self._pause.is_over:
            last_s = self._at_s
            problem: MediaError | None = None
            try:
                if not is_open:
                    self.properties = self._device.open()
            except MediaError as error:
                problem = error
            else:
                try:
                    yield from self._read_device()
                finally:
                    self._device.close()
            is_open = False
            if self._pause.is_over:
                return
            if self._at_s == -math.inf:  # Not even a first frame: raised in the constructor.
                raise problem or MediaError(
                    f"{self.name} opens but sends no frames; close other programs that use it,"
                    f" or {camera_choices()}"
                )
            had_frames = self._at_s > last_s
            self._count("lost", had_frames)
            self._is_lost, self._dark_since_s = True, None
            self._pause.before_retry(first=had_frames)

    def _read_device(self) -> Iterator[tuple[Frame, float]]:
        """Frames of the open device until reads fail for too long."""
        last_s, patience_s = self._now(), _WARM_UP_S
        while not self._pause.is_over:
            raw = self._device.read()
            at_s, frame = self._now(), to_frame(raw)
            if frame is None:
                self._count("empty" if raw is None else "corrupt")
                if self._now() - last_s > patience_s:
                    return
                self._pause.wait(_RETRY_S)
                continue
            self._inspect(frame, raw, at_s)
            self._at_s = after(at_s, self._at_s)
            yield frame, self._at_s
            last_s, patience_s = self._now(), _GIVE_UP_S

    def _inspect(self, frame: Frame, raw: object, at_s: float) -> None:
        """Count a frame's faults."""
        self._count("converted", isinstance(raw, np.ndarray) and raw.shape != frame.shape)
        self._count("resized", self._shape is not None and self._shape != frame.shape)
        self._count("repeated", at_s <= self._at_s)
        self._count("stalls", not self._is_lost and _STALL_S < at_s - self._received_s < math.inf)
        is_dark = bool(frame[::16, ::16].mean() < _DARK)
        self._count("black", is_dark)
        if not is_dark:
            self._dark_since_s = None
        elif self._dark_since_s is None:
            self._dark_since_s = at_s
        self._shape, self._received_s, self._is_lost = frame.shape, at_s, False

    def _count(self, fault: str, happened: bool = True) -> None:
        if happened:
            self._faults[fault] += 1


def to_frame(raw: object) -> Frame | None:
    """A camera's array as RGB uint8 [H, W, 3]: BGR, BGRA and grey are converted, anything else is None."""
    if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8 or raw.ndim not in (2, 3):
        return None
    conversion = _TO_RGB.get(1 if raw.ndim == 2 else raw.shape[2])
    if conversion is None or min(raw.shape[:2]) < _MIN_PX:
        return None
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(raw), conversion), dtype=np.uint8)
