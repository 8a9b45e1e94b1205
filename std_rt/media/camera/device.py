"""The boundary to cameras: a tiny protocol, OpenCV behind it, and what to tell a user when one fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2

from std_rt.core.errors import MediaError

__all__ = ["CvDevice", "Device", "Properties", "camera_name", "cameras_to_give", "list_cameras"]

Size = tuple[int, int]  # (H, W)

_DEV, _SYSFS = Path("/dev"), Path("/sys/class/video4linux")
# Linux' request for the abilities of a video node, the size of its answer, and the bits in it.
_QUERYCAP, _QUERYCAP_BYTES, _DEVICE_CAPS_AT = 0x80685600, 104, 88
_CAPTURES = 0x1 | 0x1000  # one plane, several planes
# One buffer is decoded here while the driver fills the other. With only one it has to leave out every
# second frame; more than two would add latency only for a reader that is slower than the camera.
_BUFFERS = 2


@dataclass(frozen=True)
class Properties:
    """What an open camera says of itself; None where it says nothing that can be."""

    size: Size | None
    fps: float | None


class Device(Protocol):
    """A camera. All calls come from one thread, but that the first ``open()`` may come from another."""

    def open(self) -> None:
        """Start it. Raises MediaError, one line: not there, not allowed, in use."""

    def read(self) -> object:
        """Wait for a frame: an array as it came (BGR, BGRA or grey, uint8), or anything else for none."""

    def close(self) -> None:
        """Let it go; also when it was never opened."""

    def properties(self) -> Properties:
        """Of the open camera."""


class CvDevice:
    """A camera by OpenCV: ``target`` is an index ("0") or a device path ("/dev/video0").

    size: (H, W) and fps to ask for; a camera takes the nearest that it has. Asked for either, it is asked
    for motion JPEG too: uncompressed, USB carries little more than 640 x 480 at 30 frames/s.
    """

    def __init__(
        self,
        target: str,
        size: Size | None = None,
        fps: float | None = None,
        *,
        backends: Sequence[int] | None = None,
    ) -> None:
        self._target, self._size, self._fps = target, size, fps
        self._backends = _backends() if backends is None else backends
        self._capture: cv2.VideoCapture | None = None

    def open(self) -> None:
        """Start the camera with the first of the system's ways that works. Raises MediaError."""
        _quieten()
        if sys.platform == "linux":
            self._check_node()
        for backend in self._backends:
            capture = _capture(self._source(), backend)
            if capture is not None:
                self._ask(capture)
                self._capture = capture
                return
        raise MediaError(_does_not_open(self._target))

    def read(self) -> object:
        """The next frame, BGR uint8 [H, W, 3]; None if the camera gives none."""
        if self._capture is None:
            return None
        try:
            found, raw = self._capture.read()
        except cv2.error:
            return None
        return raw if found else None

    def close(self) -> None:
        """Let the camera go."""
        if self._capture is not None:
            self._capture.release()
        self._capture = None

    def properties(self) -> Properties:
        """Size and rate as the driver says."""
        if self._capture is None:
            return Properties(None, None)
        get = self._capture.get
        h, w = int(get(cv2.CAP_PROP_FRAME_HEIGHT)), int(get(cv2.CAP_PROP_FRAME_WIDTH))
        fps = get(cv2.CAP_PROP_FPS)
        return Properties((h, w) if min(h, w) > 0 else None, fps if 0 < fps < 1000 else None)

    def _source(self) -> int | str:
        # OpenCV wants the node itself, not a link to it (/dev/v4l/by-id/...).
        return int(self._target) if self._target.isdecimal() else str(Path(self._target).resolve())

    def _check_node(self) -> None:
        node = _node(self._target)
        if not node.exists():
            raise MediaError(f"{camera_name(self._target)} is not there; {cameras_to_give()}")
        if not os.access(node, os.R_OK | os.W_OK):
            raise MediaError(
                f"{camera_name(self._target)} may not be opened by this user;"
                " run `sudo usermod -aG video $USER` (the video group), then log out and in again"
            )

    def _ask(self, capture: cv2.VideoCapture) -> None:
        # The pixel format first: drivers offer sizes and rates by format.
        if self._size is not None or self._fps is not None:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
        if self._size is not None:
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, self._size[1])
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, self._size[0])
        if self._fps is not None:
            capture.set(cv2.CAP_PROP_FPS, self._fps)
        capture.set(cv2.CAP_PROP_BUFFERSIZE, _BUFFERS)


def _backends() -> list[int]:
    """OpenCV's ways to a camera here, best first (Media Foundation can take long to open one)."""
    if sys.platform == "win32":
        return [cv2.CAP_DSHOW, cv2.CAP_MSMF]
    if sys.platform == "darwin":
        return [cv2.CAP_AVFOUNDATION]
    return [cv2.CAP_V4L2] if sys.platform == "linux" else [cv2.CAP_ANY]


def _capture(source: int | str, backend: int) -> cv2.VideoCapture | None:
    try:
        capture = cv2.VideoCapture(source, backend)
    except cv2.error:
        return None
    if capture.isOpened():
        return capture
    capture.release()
    return None


def _quieten() -> None:
    """No log lines of OpenCV on stderr, in this process; left as it is if the user set OPENCV_LOG_LEVEL.

    What a system's own library prints (AVFoundation, libjpeg) is out of reach.
    """
    if "OPENCV_LOG_LEVEL" in os.environ:
        return
    log: Any = getattr(getattr(cv2, "utils", None), "logging", None)
    if log is not None:
        log.setLogLevel(log.LOG_LEVEL_SILENT)


def camera_name(target: str) -> str:
    """ "camera 0", "camera /dev/video0": what lines for the user call it."""
    return f"camera {target}"


def _node(target: str) -> Path:
    return _DEV / f"video{target}" if target.isdecimal() else Path(target)


def _does_not_open(target: str) -> str:
    """The line for a camera that is there, as far as can be known, and cannot be opened."""
    name, else_give = camera_name(target), cameras_to_give()
    if sys.platform == "darwin":
        allow = "System Settings > Privacy & Security > Camera"
        return f"{name} does not open; allow this terminal the camera ({allow}), or {else_give}"
    if sys.platform == "win32":
        allow = "allow desktop apps the camera (Settings > Privacy > Camera)"
        return f"{name} does not open; close the program that is using it, {allow}, or {else_give}"
    who = f"`fuser -v {_node(target)}` names it"
    return f"{name} is busy or no camera; close the program that is using it ({who}), or {else_give}"


def cameras_to_give() -> str:
    """The end of an error line: which cameras could be given instead, as far as the system tells."""
    if sys.platform != "linux":
        return "give another index (0, 1, 2) or a video file"
    found = list_cameras()
    if not found:
        return "plug a camera in or give a video file in its place (no camera was found)"
    return f"give one of the cameras found: {', '.join(found)}, or a video file"


def list_cameras() -> list[str]:
    """Cameras by index, with their names: "0 (HD Webcam)". Linux only; empty elsewhere: not known.

    Nodes that give no pictures (cameras have some for metadata) are left out.
    """
    if sys.platform != "linux":
        return []
    nodes = [node for node in _DEV.glob("video*") if node.name.removeprefix("video").isdecimal()]
    numbers = sorted(int(node.name.removeprefix("video")) for node in nodes if _gives_pictures(node))
    return [f"{number} ({_driver_name(number)})" for number in numbers]


def _driver_name(number: int) -> str:
    try:
        text = (_SYSFS / f"video{number}" / "name").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no name"
    return " ".join(text.split()) or "no name"


def _gives_pictures(node: Path) -> bool:
    """What the driver says of a video node; True where it cannot be asked."""
    if sys.platform != "linux":
        return True
    import fcntl

    answer = bytearray(_QUERYCAP_BYTES)
    try:
        handle = os.open(node, os.O_RDONLY | os.O_NONBLOCK)
        try:
            fcntl.ioctl(handle, _QUERYCAP, answer)
        finally:
            os.close(handle)
    except OSError:
        return True
    return bool(int.from_bytes(answer[_DEVICE_CAPS_AT : _DEVICE_CAPS_AT + 4], sys.byteorder) & _CAPTURES)
