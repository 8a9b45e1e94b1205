"""Example pictures, styles and a moving picture; `tools/render_examples.py` renders the files from code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["moving", "scenes", "styles", "write_moving"]

Frame = NDArray[np.uint8]

_FOLDER = Path(__file__).parent
_SCENES = ("lake", "still_life", "street", "cat")
_STYLES = ("swirls", "ink", "stained_glass", "wave", "watercolour", "halftone")
_SIDE_PX = 512  # of the files
_SHIFT_PX = 64
_GRAIN = 3.0  # standard deviation of a small camera's noise, of 255


def scenes(size_px: int = _SIDE_PX) -> dict[str, Frame]:
    """Photo-like pictures by name: lake, still_life, street, cat; square frames uint8 [S, S, 3]."""
    return {name: _read(f"scenes/{name}", size_px) for name in _SCENES}


def styles(size_px: int = _SIDE_PX) -> dict[str, Frame]:
    """Style pictures by name: swirls, ink, stained_glass, wave, watercolour, halftone; uint8 [S, S, 3]."""
    return {name: _read(f"styles/{name}", size_px) for name in _STYLES}


def _read(name: str, size_px: int) -> Frame:
    with Image.open(_FOLDER / f"{name}.jpg") as picture:
        frame = np.asarray(picture.convert("RGB"))
    method = cv2.INTER_AREA if size_px < _SIDE_PX else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(frame, (size_px, size_px), interpolation=method), np.uint8)


def moving(frames: int, width_px: int = 640, height_px: int = 480, *, seed: int = 0) -> Iterator[Frame]:
    """A camera that drifts over the still life while a ball crosses it: frames uint8 [H, W, 3].

    ``frames`` of them make a loop: the last is followed by the first. ``seed`` is that of the grain, which
    is new in every frame.
    """
    rng = np.random.default_rng(seed)
    picture = _read("scenes/still_life", _SIDE_PX)
    grain = rng.normal(0, _GRAIN, (height_px + _SHIFT_PX, width_px + _SHIFT_PX, 3)).astype(np.float32)
    drift = 0.05 * min(width_px, height_px)
    for phase in 2 * np.pi * np.arange(frames) / frames:
        zoom = 1.15 * max(width_px, height_px) / _SIDE_PX * (1 + 0.06 * np.sin(phase))
        matrix = cv2.getRotationMatrix2D((_SIDE_PX / 2, _SIDE_PX / 2), 2.5 * np.sin(2 * phase), zoom)
        matrix[0, 2] += width_px / 2 - _SIDE_PX / 2 + drift * np.cos(phase)
        matrix[1, 2] += height_px / 2 - _SIDE_PX / 2 + drift * np.sin(2 * phase)
        view = cv2.warpAffine(picture, matrix, (width_px, height_px), borderMode=cv2.BORDER_REFLECT)
        _draw_ball(np.asarray(view, np.uint8), phase)
        y, x = rng.integers(0, _SHIFT_PX, 2)  # drawing new noise would take longer than everything else
        noisy = view + grain[y : y + height_px, x : x + width_px]
        yield np.clip(noisy + 0.5, 0, 255).astype(np.uint8)


def _draw_ball(view: Frame, phase: float) -> None:
    """A shaded red ball that swings from side to side three times per loop, drawn into ``view``."""
    height, width = view.shape[:2]
    radius = height // 9
    x, y = int(width * (0.5 + 0.38 * np.sin(3 * phase))), int(height * (0.72 - 0.25 * abs(np.cos(3 * phase))))
    for share in np.linspace(1, 0.15, 8):
        brightness = 0.45 + 0.75 * (1 - 0.75 * share)
        offset = round(radius * 0.35 * (1 - share))
        colour = (210 * brightness, 60 * brightness, 50 * brightness)
        cv2.circle(view, (x - offset, y - offset), round(radius * share), colour, -1, cv2.LINE_AA)


def write_moving(
    path: Path, frames: int, *, fps: int = 30, width_px: int = 640, height_px: int = 480
) -> None:
    """Encode `moving` with libx264 to a clip that a player decodes fast, as a camera's frames are."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        for frame in moving(frames, width_px, height_px):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
