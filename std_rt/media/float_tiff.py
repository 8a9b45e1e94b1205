"""Colour TIFF files of 32-bit floats, the one common kind that Pillow does not read (OpenCV does)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import TiffImagePlugin

from std_rt.core.errors import MediaError

__all__ = ["float_tiff_size", "read_float_tiff"]

_WIDTH, _HEIGHT, _SAMPLES, _SAMPLE_FORMAT = 256, 257, 277, 339
_IS_FLOAT = 3


def float_tiff_size(path: Path) -> tuple[int, int] | None:
    """(width, height) px if ``path`` is a TIFF of float colours, else None; reads its directory only."""
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] not in (b"II*\0", b"MM\0*"):
            return None
        tags: Any = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        try:
            tags.load(file)
            if tags[_SAMPLES] < 3 or tags[_SAMPLE_FORMAT][0] != _IS_FLOAT:
                return None
            return int(tags[_WIDTH]), int(tags[_HEIGHT])
        except (OSError, ValueError, TypeError, LookupError):
            return None  # Whatever it is, it is not this kind; the ordinary reader says what is wrong.


def read_float_tiff(path: Path) -> NDArray[np.float32]:
    """float32 [H, W, 3] RGB as stored (any range; a fourth channel is dropped). MediaError if damaged."""
    log = cv2.utils.logging
    before = log.setLogLevel(log.LOG_LEVEL_SILENT)  # It prints on damaged files; the error below says it.
    try:
        # Through bytes: OpenCV's own file names break on non-ASCII paths under Windows.
        bgr = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error) as error:
        raise MediaError(f"{path} is damaged and cannot be read whole") from error
    finally:
        log.setLogLevel(before)
    if bgr is None or bgr.ndim != 3:
        raise MediaError(f"{path} is damaged and cannot be read whole")
    return np.ascontiguousarray(bgr[:, :, 2::-1], dtype=np.float32)
