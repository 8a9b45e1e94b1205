"""A moving picture, rendered by code: a camera that wanders over a scene while a ball crosses it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.examples.scenes import SCENES

__all__ = ["moving_scene", "write_moving_scene"]

Frame = NDArray[np.uint8]

_SCENE_PX = 512
_SHIFT_PX = 64
_GRAIN = 3.0  # standard deviation of a small camera's noise, of 255


def moving_scene(
    frames: int, width_px: int = 640, height_px: int = 480, *, scene: str = "still_life", seed: int = 0
) -> Iterator[Frame]:
    """``frames`` frames uint8 [H, W, 3] that end where they began, so that they can be played in a loop.

    The view drifts, turns and breathes by a few pixels a frame; the ball covers and uncovers what is behind
    it; grain is new in every frame.
    """
    rng = np.random.default_rng(seed)
    picture = _scene(scene)
    grain = rng.normal(0, _GRAIN, (height_px + _SHIFT_PX, width_px + _SHIFT_PX, 3)).astype(np.float32)
    for i in range(frames):
        phase = 2 * np.pi * i / frames
        view = cv2.warpAffine(
            picture,
            _view(phase, width_px, height_px),
            (width_px, height_px),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        )
        _ball(np.asarray(view, np.uint8), phase)
        y, x = rng.integers(0, _SHIFT_PX, 2)  # drawing new noise would take longer than all the rest
        noisy = view + grain[y : y + height_px, x : x + width_px]
        yield np.clip(noisy + 0.5, 0, 255).astype(np.uint8)


def write_moving_scene(
    path: Path, frames: int, *, fps: int = 30, width_px: int = 640, height_px: int = 480
) -> None:
    """Encode `moving_scene` with libx264 to a clip that a player decodes fast, as a camera's frames are."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        for frame in moving_scene(frames, width_px, height_px):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@cache
def _scene(name: str) -> Frame:
    return SCENES[name](_SCENE_PX)


def _view(phase: float, width_px: int, height_px: int) -> NDArray[np.float64]:
    """The affine map [2, 3] from the scene to a view of its middle, at a point of the loop."""
    zoom = 1.15 * max(width_px, height_px) / _SCENE_PX * (1 + 0.06 * np.sin(phase))
    matrix = cv2.getRotationMatrix2D((_SCENE_PX / 2, _SCENE_PX / 2), 2.5 * np.sin(2 * phase), zoom)
    drift = 0.05 * min(width_px, height_px)
    matrix[0, 2] += width_px / 2 - _SCENE_PX / 2 + drift * np.cos(phase)
    matrix[1, 2] += height_px / 2 - _SCENE_PX / 2 + drift * np.sin(2 * phase)
    return np.asarray(matrix, np.float64)


def _ball(view: Frame, phase: float) -> None:
    """A shaded ball that swings from side to side, drawn into ``view``."""
    height, width = view.shape[:2]
    radius = height // 9
    x, y = int(width * (0.5 + 0.38 * np.sin(3 * phase))), int(height * (0.72 - 0.25 * abs(np.cos(3 * phase))))
    for share in np.linspace(1, 0.15, 8):
        light = 1 - 0.75 * share
        colour = tuple(float(c) for c in np.array([210, 60, 50]) * (0.45 + 0.75 * light))
        offset = round(radius * 0.35 * (1 - share))
        centre = (x - offset, y - offset)
        cv2.circle(view, centre, round(radius * share), colour, -1, cv2.LINE_AA)
