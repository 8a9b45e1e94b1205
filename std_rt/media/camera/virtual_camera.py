"""The virtual camera: frames for other programs (calls, recorders), by pyvirtualcam."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import MediaError
from std_rt.core.files import reason
from std_rt.core.machine import install_hint
from std_rt.media.fit import to_working

__all__ = ["VirtualCamera", "letterbox"]

Frame = NDArray[np.uint8]
Size = tuple[int, int]  # (H, W)

# Bars narrower than this part of a side are not worth their edge: the frame is stretched instead.
_LEAST_BAR = 0.01


class VirtualCamera:
    """A camera that other programs can choose. All calls from one thread.

    size: (H, W) of what it gives, rounded up to even sides as video needs; fps: the rate it announces,
    ``send()`` may be called at any other; device: "/dev/video2" on Linux, the camera's name elsewhere,
    None for the first one.

    Raises MediaError, one line, if pyvirtualcam or the system's driver is missing or the device is in use.
    """

    def __init__(self, size: Size, fps: float, device: str | None = None) -> None:
        self.size: Size = (_even(size[0]), _even(size[1]))
        self.problem = ""  # one line once the output has ended because of the driver
        self._camera: Any = _open(self.size, fps, device)
        self.device: str = str(self._camera.device)

    def send(self, frame: Frame) -> None:
        """Show ``frame`` (uint8 [h, w, 3] RGB, any size) now; black bars where the aspect differs.

        Never waits for the next frame's time. If the driver fails, ``problem`` says so and this and all
        later frames are dropped; after ``close()`` they are dropped too.
        """
        if self._camera is None:
            return
        fitted = letterbox(frame, self.size)
        try:
            self._camera.send(fitted)
        except (RuntimeError, OSError, ValueError) as error:
            self.problem = f"the virtual camera {self.device} has stopped ({reason(error)}); live goes on"
            self.close()

    def close(self) -> None:
        """Take the camera away from other programs; may be called again."""
        camera, self._camera = self._camera, None
        if camera is None:
            return
        try:
            camera.close()
        except (RuntimeError, OSError) as error:
            self.problem = (
                self.problem or f"the virtual camera {self.device} did not end well: {reason(error)}"
            )


def _even(side: int) -> int:
    return max(2, side + side % 2)


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
        raise MediaError(_does_not_open(device, reason(error))) from error


def _does_not_open(device: str | None, cause: str) -> str:
    if device is not None:
        return f"virtual camera {device} does not open ({cause}); give another, or none to take the first one"
    if sys.platform != "linux":
        return (
            f"no virtual camera ({cause}); install OBS Studio, start its virtual camera once, then close OBS"
        )
    if "No v4l2 loopback" in cause:
        return "no virtual camera: its driver is not loaded; run: sudo modprobe v4l2loopback devices=1"
    return f"the virtual camera does not open ({cause}); close the program that sends to it, or name another"


def letterbox(frame: Frame, size: Size) -> Frame:
    """``frame`` (uint8 [h, w, 3]) as large as it fits into ``size`` = (H, W), centred on black.

    Contiguous; stretched by up to 1 % where that saves the bars.
    """
    h, w = frame.shape[:2]
    scale = min(size[0] / h, size[1] / w)
    rows, columns = (_side(part * scale, whole) for part, whole in zip((h, w), size, strict=True))
    fitted = to_working(frame, (rows, columns))
    if (rows, columns) == size:
        return fitted
    canvas = np.zeros((*size, 3), np.uint8)
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    canvas[top : top + rows, left : left + columns] = fitted
    return canvas


def _side(fitting: float, whole: int) -> int:
    return whole if whole - fitting < max(1.0, _LEAST_BAR * whole) else max(1, round(fitting))
