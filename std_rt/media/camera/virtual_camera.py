"""The virtual camera: frames for other programs (calls, recorders), through pyvirtualcam."""

from __future__ import annotations

import sys
from typing import Any

import cv2
import numpy as np

from std_rt.core.arrays import Frame, Size
from std_rt.core.errors import MediaError
from std_rt.core.files import reason
from std_rt.core.machine import install_hint
from std_rt.media.fit import resize

__all__ = ["VirtualCamera", "letterbox"]

# Instead of bars narrower than this share of a side, the frame is stretched.
_LEAST_BAR = 0.01


class VirtualCamera:
    """A camera that other programs can select. All calls from one thread.

    size: (H, W) of its frames, rounded up to even sides as video needs; fps: the rate it announces, while
    ``send()`` may be called at any rate; device: "/dev/video2" on Linux, the camera's name elsewhere,
    None for the first one.

    Raises MediaError, one line, if pyvirtualcam or the system's driver is missing or the device is in use.
    """

    def __init__(self, size: Size, fps: float, device: str | None = None) -> None:
        self.size: Size = (max(2, size[0] + size[0] % 2), max(2, size[1] + size[1] % 2))
        self.problem = ""  # one line once the driver has ended the output
        self._camera: Any = _open(self.size, fps, device)
        self.device: str = str(self._camera.device)

    def send(self, frame: Frame) -> None:
        """Show ``frame`` (uint8 [h, w, 3] RGB, any size) now; black bars if the aspect differs.

        Never waits for the next frame's time. If the driver fails, ``problem`` says so and this and all
        later frames are dropped; after ``close()`` they are dropped too.
        """
        if self._camera is None:
            return
        fitted = letterbox(frame, self.size)
        try:
            self._camera.send(fitted)
        except (RuntimeError, OSError, ValueError) as error:
            self.problem = (
                f"the virtual camera {self.device} has stopped ({reason(error)}); the live session continues"
            )
            self.close()

    def close(self) -> None:
        """Disconnect from other programs; may be called again."""
        camera, self._camera = self._camera, None
        if camera is None:
            return
        try:
            camera.close()
        except (RuntimeError, OSError) as error:
            self.problem = self.problem or f"the virtual camera {self.device} did not close: {reason(error)}"


def _open(size: Size, fps: float, device: str | None) -> Any:
    try:
        import pyvirtualcam
    except ModuleNotFoundError:
        raise MediaError(f"the virtual camera needs pyvirtualcam; run: {install_hint('live')}") from None
    except ImportError as error:
        raise MediaError(
            f"pyvirtualcam cannot be loaded ({reason(error)}); reinstall it: {install_hint('live')} -U"
        ) from error
    h, w = size
    try:
        return pyvirtualcam.Camera(w, h, fps, fmt=pyvirtualcam.PixelFormat.RGB, device=device)
    except (RuntimeError, OSError, ValueError) as error:
        raise MediaError(_cannot_open(device, reason(error))) from error


def _cannot_open(device: str | None, cause: str) -> str:
    if device is not None:
        return (
            f"virtual camera {device} cannot be opened ({cause}); name another, or none to use the first one"
        )
    if sys.platform != "linux":
        return (
            f"no virtual camera ({cause}); install OBS Studio, start its virtual camera once, then close OBS"
        )
    if "No v4l2 loopback" in cause:
        return "no virtual camera: its driver is not loaded; run: sudo modprobe v4l2loopback devices=1"
    return (
        f"the virtual camera cannot be opened ({cause}); close the program that sends to it, or name another"
    )


def letterbox(frame: Frame, size: Size) -> Frame:
    """``frame`` (uint8 [h, w, 3]) as large as it fits into ``size`` = (H, W), centred on black.

    Contiguous; stretched by up to 1 % if that avoids the bars.
    """
    h, w = frame.shape[:2]
    scale = min(size[0] / h, size[1] / w)
    rows, columns = (_side(part * scale, whole) for part, whole in zip((h, w), size, strict=True))
    fitted = resize(frame, (rows, columns))
    if (rows, columns) == size:
        return fitted
    high, wide = size[0] - rows, size[1] - columns
    top, left = high // 2, wide // 2
    framed = cv2.copyMakeBorder(fitted, top, high - top, left, wide - left, cv2.BORDER_CONSTANT, value=0)
    return np.asarray(framed, dtype=np.uint8)


def _side(fitting: float, whole: int) -> int:
    return whole if whole - fitting < max(1.0, _LEAST_BAR * whole) else max(1, round(fitting))
