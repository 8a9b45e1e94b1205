"""The camera device: a small protocol, its implementation with OpenCV, and messages for failed openings."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2

from std_rt.core.arrays import Size
from std_rt.core.errors import MediaError

__all__ = ["CvDevice", "Device", "Properties", "camera_choices", "camera_name", "list_cameras"]

_DEV, _SYSFS = Path("/dev"), Path("/sys/class/video4linux")
# OpenCV's backends by sys.platform, best first (Media Foundation can take long to open a camera).
_BACKENDS = {
    "win32": [cv2.CAP_DSHOW, cv2.CAP_MSMF],
    "darwin": [cv2.CAP_AVFOUNDATION],
    "linux": [cv2.CAP_V4L2],
}
# Linux' request for the abilities of a video node, the size of its answer, and the bits in it.
_QUERYCAP, _QUERYCAP_BYTES, _DEVICE_CAPS_AT = 0x80685600, 104, 88
_CAPTURES = 0x1 | 0x1000  # one plane, several planes
# One buffer is decoded here while the driver fills the other. With only one it has to skip every second
# frame; more than two would add latency only for a reader that is slower than the camera.
_BUFFERS = 2


@dataclass(frozen=True)
class Properties:
    """What an open camera reports: size (H, W) in pixels, fps in frames/s; None if unknown."""

    size: Size | None
    fps: float | None


class Device(Protocol):
    """A camera, driven by `camera.Camera` from one thread; only the first ``open()`` may be in another."""

    def open(self) -> Properties:
        """Start it and return its properties. Raises MediaError, one line: missing, not allowed, in use."""

    def read(self) -> object:
        """Wait for a frame: an array as it came (BGR, BGRA or grey, uint8), or anything else for no frame."""

    def close(self) -> None:
        """Release it, even if it was never opened."""


class CvDevice:
    """A camera by OpenCV: ``target`` is an index ("0") or a device path ("/dev/video0").

    size: (H, W) and fps to ask for; a camera uses its nearest mode. With either, motion JPEG is
    requested too: uncompressed, USB carries little more than 640 x 480 at 30 frames/s.
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
        self._backends = _BACKENDS.get(sys.platform, [cv2.CAP_ANY]) if backends is None else backends
        self._capture: cv2.VideoCapture | None = None

    def open(self) -> Properties:
        """Start the camera with the first backend that works. Raises MediaError."""
        if "OPENCV_LOG_LEVEL" not in os.environ:
            # No log lines of OpenCV on stderr. What a system's own library prints (AVFoundation, libjpeg) is
            # out of reach.
            log: Any = cv2.utils.logging
            log.setLogLevel(log.LOG_LEVEL_SILENT)
        if sys.platform == "linux":
            self._check_node()
        # OpenCV wants the node itself, not a link to it (/dev/v4l/by-id/...).
        source = int(self._target) if self._target.isdecimal() else str(Path(self._target).resolve())
        for backend in self._backends:
            try:
                capture = cv2.VideoCapture(source, backend)
            except cv2.error:
                continue
            if capture.isOpened():
                self._configure(capture)
                self._capture = capture
                h, w = (
                    int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH)
                )
                fps = capture.get(cv2.CAP_PROP_FPS)
                return Properties((h, w) if min(h, w) > 0 else None, fps if 0 < fps < 1000 else None)
            capture.release()
        raise MediaError(_cannot_open(self._target))

    def read(self) -> object:
        """The next frame, BGR uint8 [H, W, 3]; None if the camera sends none."""
        try:
            found, raw = (False, None) if self._capture is None else self._capture.read()
        except cv2.error:
            return None
        return raw if found else None

    def close(self) -> None:
        """Release the camera."""
        if self._capture is not None:
            self._capture.release()
        self._capture = None

    def _check_node(self) -> None:
        node, name = _node(self._target), camera_name(self._target)
        if not node.exists():
            raise MediaError(f"{name} does not exist; {camera_choices()}")
        if not os.access(node, os.R_OK | os.W_OK):
            raise MediaError(
                f"this user is not allowed to open {name};"
                " run `sudo usermod -aG video $USER` (the video group), then log out and in again"
            )

    def _configure(self, capture: cv2.VideoCapture) -> None:
        # The pixel format first: drivers offer sizes and rates by format.
        if self._size is not None or self._fps is not None:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
        if self._size is not None:
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, self._size[1])
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, self._size[0])
        if self._fps is not None:
            capture.set(cv2.CAP_PROP_FPS, self._fps)
        capture.set(cv2.CAP_PROP_BUFFERSIZE, _BUFFERS)


def camera_name(target: str) -> str:
    """What messages call it: "camera 0", "camera /dev/video0"."""
    return f"camera {target}"


def _node(target: str) -> Path:
    return _DEV / f"video{target}" if target.isdecimal() else Path(target)


def _cannot_open(target: str) -> str:
    """The message for a camera that seems to exist but cannot be opened."""
    name, otherwise = camera_name(target), camera_choices()
    if sys.platform == "darwin":
        settings = "System Settings > Privacy & Security > Camera"
        return f"{name} cannot be opened; allow this terminal to use it ({settings}), or {otherwise}"
    if sys.platform == "win32":
        allow = "allow desktop apps to use it (Settings > Privacy > Camera)"
        return f"{name} cannot be opened; close the program that is using it, {allow}, or {otherwise}"
    who = f"`fuser -v {_node(target)}` names it"
    return f"{name} is busy or not a camera; close the program that is using it ({who}), or {otherwise}"


def camera_choices() -> str:
    """The end of an error message: which cameras or files to name instead."""
    if sys.platform != "linux":
        return "give another index (0, 1, 2) or a video file"
    found = list_cameras()
    if not found:
        return "plug a camera in, or give a clip in its place: --camera clip.mp4 (no camera was found)"
    return f"give one of the cameras found: {', '.join(found)}, or a video file"


def list_cameras() -> list[str]:
    """Cameras by index, with their names: "0 (HD Webcam)". Linux only; empty elsewhere: not known.

    Nodes without pictures (cameras have some for metadata) are left out.
    """
    if sys.platform != "linux":
        return []
    nodes = [node for node in _DEV.glob("video*") if node.name.removeprefix("video").isdecimal()]
    numbers = sorted(int(node.name.removeprefix("video")) for node in nodes if _has_pictures(node))
    return [f"{number} ({_driver_name(number)})" for number in numbers]


def _driver_name(number: int) -> str:
    try:
        text = (_SYSFS / f"video{number}" / "name").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no name"
    return " ".join(text.split()) or "no name"


def _has_pictures(node: Path) -> bool:
    """Whether the driver says that a video node captures pictures; True if it cannot be queried."""
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
