"""Generated clips with exact flow: layers of photos that pan, turn, zoom and shake, some of them in front.

Made as they are needed, without end. Where each pixel was in another frame follows from the layers' poses,
so a clip can be asked to be steady where no flow search could tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.training.data.picture_set import Frame

__all__ = ["Scene", "camera", "draw_scene"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_SLOWEST, _FASTEST = 0.2, 7.0  # px a frame
_STILL = 0.25  # share of clips whose ground does not move
_LAYERS = (0.35, 0.4, 0.25)  # chances of none, one and two things in front
_SMALLEST, _LARGEST = 0.7, 1.3  # photo pixels a pixel of the frame
_EDGE_PX = 2  # about a thing's edge nothing is said to be followed


@dataclass(frozen=True)
class Scene:
    """``frames`` uint8 [T, S, S, 3]; ``poses`` [L, T, 3, 3]: from a frame's pixels to a layer's photo's.

    ``layers`` [T, S, S]: the layer that a pixel shows; ``sure`` [T, S, S]: it shows nothing else.
    """

    frames: Frame
    poses: Array
    layers: NDArray[np.int64]
    sure: Mask

    def flow(self, after: int, before: int) -> tuple[NDArray[np.float32], Mask]:
        """Where the pixels of frame ``after`` were in ``before`` [S, S, 2] (x, y), and where that is seen."""
        side = self.frames.shape[1]
        y, x = np.mgrid[:side, :side]
        here = np.stack([x, y, np.ones_like(x)], -1).astype(np.float64)
        shown, source = self.layers[after], np.zeros((side, side, 2))
        for layer, poses in enumerate(self.poses):
            moved = here @ (np.linalg.inv(poses[before]) @ poses[after]).T
            source = np.where((shown == layer)[..., None], moved[..., :2], source)
        inside = ((source >= 0) & (source <= side - 1)).all(-1)
        column, row = np.rint(np.clip(source, 0, side - 1)).astype(np.int64).transpose(2, 0, 1)
        same = (self.layers[before][row, column] == shown) & self.sure[before][row, column]
        return source.astype(np.float32), inside & self.sure[after] & same


def draw_scene(photos: Sequence[Frame], frames: int, side_px: int, rng: np.random.Generator) -> Scene:
    """A clip of ``frames`` squares: a photo as the ground, and up to two pieces of others in front."""
    still, count = rng.random() < _STILL, 1 + int(rng.choice(len(_LAYERS), p=_LAYERS))
    pictures = np.zeros((frames, side_px, side_px, 3), np.float32)
    shown = np.zeros((frames, side_px, side_px), np.int64)
    sure = np.ones(shown.shape, bool)
    every = []
    for layer in range(count):
        photo = photos[int(rng.integers(len(photos)))]
        photo = np.ascontiguousarray(photo[:, ::-1] if rng.random() < 0.5 else photo)
        speed = 0.0 if still and layer == 0 else np.exp(rng.uniform(np.log(_SLOWEST), np.log(_FASTEST)))
        poses = _poses(frames, float(speed), (photo.shape[1], photo.shape[0]), side_px, rng)
        matte, placed = (None, np.eye(3)) if layer == 0 else _piece(poses[frames // 2], side_px, rng)
        for t, pose in enumerate(poses):
            seen = _read(photo, pose, side_px)
            if matte is None:
                pictures[t] = seen
                continue
            cover = _read(matte, placed @ pose, side_px, cv2.INTER_LINEAR, cv2.BORDER_CONSTANT)
            pictures[t] += (seen - pictures[t]) * cover[..., None]
            shown[t][cover > 0.5] = layer
            sure[t] &= (cover < 0.02) | (cover > 0.98)
        every.append(poses)
    around = np.ones((2 * _EDGE_PX + 1,) * 2, np.uint8)
    sure = np.stack([cv2.erode(each.astype(np.uint8), around) > 0 for each in sure])
    return Scene(np.rint(np.clip(pictures, 0, 255)).astype(np.uint8), np.stack(every), shown, sure)


def camera(frames: Frame, rng: np.random.Generator) -> Frame:
    """A clip as a camera might have taken it: noise, wavering exposure, compression; each at times."""
    taken = frames.astype(np.float32)
    if rng.random() < 0.7:
        grain = rng.standard_normal((*frames.shape[:3], 1 if rng.random() < 0.5 else 3), np.float32)
        taken += rng.uniform(0, 7) * grain
    if rng.random() < 0.4:
        taken *= 1 + rng.uniform(0, 0.02) * rng.standard_normal((len(frames), 1, 1, 1), np.float32)
    seen = np.rint(np.clip(taken, 0, 255)).astype(np.uint8)
    if rng.random() < 0.5:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(35, 90))]
        for t, frame in enumerate(seen):
            again = cv2.imdecode(cv2.imencode(".jpg", frame, quality)[1], cv2.IMREAD_COLOR)
            seen[t] = np.asarray(again)
    return seen


def _poses(frames: int, speed: float, size: tuple[int, int], side_px: int, rng: np.random.Generator) -> Array:
    """Poses [T, 3, 3] of a layer that moves ``speed`` px a frame; a fast one turns, zooms and shakes more."""
    angle, restless = rng.uniform(0, 2 * np.pi), min(speed, 3.0)
    velocity = speed * np.array([np.cos(angle), np.sin(angle)])
    zoom, turn = rng.normal(0, 0.004, 2) * restless
    shake = rng.uniform(0, 0.4) * min(speed, 2.0)
    phase, rate = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.3, 1.5, 2)
    scale = np.exp(rng.uniform(np.log(_SMALLEST), np.log(_LARGEST)))
    start = np.array([rng.uniform(0, max(1, side - side_px)) for side in size])
    poses = []
    for t in range(frames):
        k = t - (frames - 1) / 2
        size_now, turned = scale * np.exp(zoom * k), turn * k
        across, down = size_now * np.cos(turned), size_now * np.sin(turned)
        about = np.array([[across, -down], [down, across]])
        centre = np.full(2, side_px / 2)
        offset = centre - about @ centre + start + velocity * k + shake * np.sin(rate * t + phase)
        poses.append(np.block([[about, offset[:, None]], [0, 0, 1]]))
    return np.stack(poses)


def _piece(pose: Array, side_px: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], Array]:
    """A blob [2S, 2S] in 0..1 that covers a part of the frame of ``pose``, and where it lies on the photo."""
    rough = rng.standard_normal((6, 6)).astype(np.float32)
    hills = cv2.resize(rough, (2 * side_px, 2 * side_px), interpolation=cv2.INTER_CUBIC)
    above = hills - np.quantile(hills, rng.uniform(0.6, 0.85))
    placed = np.eye(3)
    placed[:2, 2] = rng.uniform(0, side_px, 2) - pose[:2, 2]
    return np.asarray(np.clip(above * side_px / 4 + 0.5, 0, 1), np.float32), placed


def _read(
    picture: Frame,
    pose: Array,
    side_px: int,
    how: int = cv2.INTER_CUBIC,
    border: int = cv2.BORDER_REFLECT,
) -> NDArray[np.float32]:
    """``picture`` as a frame of ``pose`` shows it."""
    flags = how | cv2.WARP_INVERSE_MAP
    read = cv2.warpAffine(picture, pose[:2], (side_px, side_px), flags=flags, borderMode=border)
    return np.asarray(read, np.float32)
