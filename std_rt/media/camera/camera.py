"""Cameras: the newest frame, whatever the device does; and which source a user's word means.

A thread of its own reads the device, because such a read may never come back: ``read()``, ``status`` and
``close()`` need not wait for it.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import MediaError
from std_rt.media.camera.clip_camera import clip_camera, still_camera
from std_rt.media.camera.device import (
    CvDevice,
    Device,
    Properties,
    Size,
    camera_name,
    cameras_to_give,
    list_cameras,
)
from std_rt.media.camera.frame_source import Captured, Frame, Pause, Sleep, Source, after
from std_rt.media.kind import media_kind

__all__ = ["Camera", "Captured", "Source", "list_cameras", "open_source", "to_frame"]

_OPEN_S = 20.0  # some drivers take ten seconds to open a camera
_WARM_UP_S = 3.0  # reads may fail so long before the first frame
_GIVE_UP_S = 0.5  # and so long between frames, until the camera counts as lost
_RETRY_S = 0.02  # after a read that failed
_LOOK_AGAIN_S, _LOOK_AGAIN_MAX_S = 0.2, 2.0
_STALL_S = 1.0
_DARK_S = 2.0
_DARK = 6.0  # mean of 0..255; a covered lens gives some noise
_LEAST_PX = 2
# macOS asks the user for permission only where the first opening comes from the main thread.
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
    """The source that ``spec`` names: a camera ("0", "/dev/video0"), or a file that stands in for one.

    A video file plays in real time by its own timestamps, again and again unless ``loop`` is False. A
    picture file is a camera that sees only it, at ``fps`` (30).

    size: (H, W) and fps in frames/s are asked of a camera, which takes the nearest that it has; a video
    file has its own. now: the clock of ``Captured.at_s``; sleep: waits in real time if None, and then
    ``close()`` cuts waiting short. device: makes the device of a camera (tests give a fake).

    Raises MediaError, one line: no such camera or file, not allowed, in use, not readable.
    """
    _check(size, fps)
    target = spec.strip()
    if _is_camera(target):
        name = camera_name(target)
        return Camera(name, device(target, size, fps), now=now, sleep=sleep)
    path = _file(target)
    if media_kind(path) == "video":
        return clip_camera(path, loop=loop, now=now, sleep=sleep)
    return still_camera(path, fps=fps or 30.0, loop=loop, now=now, sleep=sleep)


def _check(size: Size | None, fps: float | None) -> None:
    if size is not None and min(size) < 1:
        raise MediaError(f"a camera cannot give {size[1]} x {size[0]} px; ask for a size such as 1280 x 720")
    if fps is not None and not (0 < fps <= 1000):
        raise MediaError(f"a camera cannot give {fps:g} frames/s; ask for a rate from 1 to 1000")


def _is_camera(target: str) -> bool:
    return target.isdecimal() or (target.startswith("/dev/") and not Path(target).is_file())


def _file(target: str) -> Path:
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", target):
        raise MediaError(
            f"{target} is an address, and streams from the net are not read; {cameras_to_give()}"
        )
    path = Path(target).expanduser()
    if not target or not path.exists():
        raise MediaError(f"{target or 'nothing'} is neither a camera nor a file; {cameras_to_give()}")
    return path


class Camera:
    """A source on a device: looks for it again when it is lost, and never lets it block or raise.

    Raises MediaError if the camera cannot be opened or gives no frame; waits for the first one.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        *,
        now: Callable[[], float] = time.perf_counter,
        sleep: Sleep | None = None,
    ) -> None:
        self._name, self._device, self._now = name, device, now
        self._pause = Pause(sleep)
        self._news = threading.Condition()  # guards all below
        self._newest: tuple[Frame, float] | None = None
        self._given = 0
        self._refusal: MediaError | None = None
        self._properties = Properties(None, None)
        self._faults: Counter[str] = Counter()
        self._shape: tuple[int, ...] | None = None
        self._is_open = self._is_lost = self._has_ended = False
        self._at_s = -math.inf  # of the last frame
        self._heard_s = -math.inf  # when the last frame came, the same but for repeated times
        self._dark_since_s: float | None = None
        if _OPEN_HERE:
            self._open(raises=True)
        self._thread = threading.Thread(target=self._pump, name=name, daemon=True)
        self._thread.start()
        self._await_first()

    @property
    def name(self) -> str:
        """ "camera 0"."""
        return self._name

    @property
    def fps(self) -> float | None:
        """Frames per second as the driver says, or None."""
        return self._properties.fps

    @property
    def properties(self) -> Properties:
        """Size and rate as the driver says; a camera need not give what it was asked for."""
        return self._properties

    @property
    def status(self) -> str:
        """Empty while frames come, else what is wrong."""
        with self._news:
            if self._has_ended:
                return ""
            if self._is_lost:
                return f"{self._name} lost, looking for it"
            quiet_s = self._now() - self._heard_s
            if quiet_s > _STALL_S:
                return f"{self._name} has given no frame for {quiet_s:.0f} s"
            if self._dark_since_s is not None and self._at_s - self._dark_since_s >= _DARK_S:
                return f"{self._name} gives black frames; is the lens covered?"
            return ""

    @property
    def faults(self) -> dict[str, int]:
        """Counts, of what happened at all.

        empty, corrupt: reads without a frame, or with one that cannot be used; converted: not BGR;
        resized; black; repeated: times; stalls: over a second; lost: found again or not; unread: frames
        that a newer one replaced before ``read()``.
        """
        with self._news:
            return dict(self._faults)

    def read(self) -> Captured | None:
        """The newest frame, once; waits for it. None after ``close()``."""
        with self._news:
            self._news.wait_for(lambda: self._newest is not None or self._has_ended)
            if self._newest is None or self._has_ended:
                return None
            (frame, at_s), self._newest = self._newest, None
            self._given += 1
            return Captured(frame, at_s, self._given - 1)

    def close(self) -> None:
        """End ``read()`` at once. The device is let go as soon as its own read comes back."""
        self._end()
        # Long enough for a camera that works, so that it can be opened again at once.
        self._thread.join(timeout=0.25)

    def _end(self) -> None:
        self._pause.end()
        with self._news:
            self._has_ended = True
            self._newest = None
            self._news.notify_all()

    def _await_first(self) -> None:
        """Wait for the first frame, or raise the reason why there is none."""
        until_s = self._now() + _OPEN_S
        try:
            with self._news:
                # In short waits: on Windows a longer one would hold up Ctrl-C.
                while self._newest is None and not self._has_ended and self._now() < until_s:
                    self._news.wait(0.1)
                if self._newest is not None:
                    return
            raise self._refusal or MediaError(
                f"{self._name} does not answer; unplug it and plug it in again, or {cameras_to_give()}"
            )
        except BaseException:
            self.close()
            raise

    def _pump(self) -> None:
        """The device's thread: read until the camera is lost, look for it again, until ``close()``."""
        wait_s = _LOOK_AGAIN_S
        try:
            while not self._pause.is_over:
                frames = self._session()
                if self._at_s == -math.inf:  # Not even a first frame: the constructor tells the user.
                    return
                if frames:
                    wait_s = _LOOK_AGAIN_S
                if not self._pause.wait(wait_s):
                    return
                wait_s = min(2 * wait_s, _LOOK_AGAIN_MAX_S)
        finally:
            self._end()

    def _session(self) -> int:
        """Open the camera and read it until it is lost or closed; how many frames came."""
        if not self._is_open and not self._open():
            return 0
        try:
            frames = self._read_on()
        finally:
            self._is_open = False
            self._device.close()
        if not self._pause.is_over:
            self._lose(frames)
        return frames

    def _open(self, raises: bool = False) -> bool:
        try:
            self._device.open()
        except MediaError as error:
            if raises:
                raise
            self._refusal = error
            return False
        self._is_open = True
        self._properties = self._device.properties()
        return True

    def _read_on(self) -> int:
        frames, patience_s = 0, _WARM_UP_S
        last_s = self._now()
        while not self._pause.is_over:
            if self._take(self._device.read()):
                frames, patience_s, last_s = frames + 1, _GIVE_UP_S, self._now()
            elif self._now() - last_s > patience_s:
                break
            else:
                self._pause.wait(_RETRY_S)
        return frames

    def _lose(self, frames: int) -> None:
        with self._news:
            self._refusal = MediaError(
                f"{self._name} opens but gives no frames; close other programs that use it,"
                f" or {cameras_to_give()}"
            )
            self._is_lost = True
            self._faults["lost"] += frames > 0
            self._dark_since_s = None

    def _take(self, raw: object) -> bool:
        """What a read gave becomes the newest frame; False if it is none."""
        at_s = self._now()
        frame = to_frame(raw)
        if frame is None:
            self._count("empty" if raw is None else "corrupt")
            return False
        with self._news:
            self._note(frame, raw, at_s)
            self._at_s = after(at_s, self._at_s)
            self._count("unread", self._newest is not None)
            if not self._has_ended:
                self._newest = frame, self._at_s
            self._news.notify_all()
        return True

    def _note(self, frame: Frame, raw: object, at_s: float) -> None:
        """Tally what is odd about a frame."""
        self._count("converted", isinstance(raw, np.ndarray) and raw.shape != frame.shape)
        self._count("resized", self._shape is not None and self._shape != frame.shape)
        self._count("repeated", at_s <= self._at_s)
        self._count("stalls", not self._is_lost and _STALL_S < at_s - self._heard_s < math.inf)
        is_dark = frame[::16, ::16].mean() < _DARK
        self._count("black", is_dark)
        if not is_dark:
            self._dark_since_s = None
        elif self._dark_since_s is None:
            self._dark_since_s = at_s
        self._shape, self._heard_s, self._is_lost = frame.shape, at_s, False

    def _count(self, fault: str, happened: bool = True) -> None:
        if happened:
            with self._news:
                self._faults[fault] += 1


def to_frame(raw: object) -> Frame | None:
    """What a camera gave as RGB uint8 [H, W, 3]: BGR, BGRA and grey are converted, the rest is None."""
    if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8 or raw.ndim not in (2, 3):
        return None
    if min(raw.shape[:2]) < _LEAST_PX:
        return None
    ways = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
    way = ways.get(1 if raw.ndim == 2 else raw.shape[2])
    if way is None:
        return None
    pixels: NDArray[np.uint8] = np.ascontiguousarray(raw)
    return np.asarray(cv2.cvtColor(pixels, way), dtype=np.uint8)
