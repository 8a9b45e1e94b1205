"""Drawing tools of scenes and styles. Colours are linear float32 [..., 3]; `develop` makes a frame."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Frame = NDArray[np.uint8]


def grid(size_px: int) -> tuple[Array, Array]:
    """Pixel centres ``(x, y)`` [S, S] in [-1, 1], x to the right and y upwards."""
    axis = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px * 2 - 1
    x, y = np.meshgrid(axis, -axis)
    return x, y


def smoothstep(low: float, high: float, x: Array) -> Array:
    """0 below ``low``, 1 above ``high``, a soft step between; ``low`` > ``high`` turns it round."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: Array, b: Array, share: Array) -> Array:
    """``a`` where ``share`` [H, W] (or [N]) is 0, ``b`` where it is 1; colours [..., 3] broadcast."""
    share = np.asarray(share, np.float32)[..., None]
    return a * (1 - share) + b * share


def dot(a: Array, b: Array) -> Array:
    """Inner product over the last axis."""
    return np.einsum("...i,...i->...", a, b)


def normalize(v: Array) -> Array:
    """Unit vectors along the last axis."""
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-9)


def ramp(stops: list[float], colours: Array, x: Array) -> Array:
    """Colours [..., 3] at ``x``, linear between the stops."""
    return np.stack([np.interp(x, stops, colours[:, c]) for c in range(3)], -1).astype(np.float32)


def hexes(*codes: str) -> Array:
    """Linear colours [N, 3] from sRGB hex codes such as ``1b3a6b``."""
    srgb = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in codes], np.float32) / 255
    return (srgb**2.2).astype(np.float32)


def noise(rng: np.random.Generator, size: tuple[int, int], cells: float) -> Array:
    """Smooth noise [H, W] in about [-1, 1] with ``cells`` features along the longer side."""
    h, w = size
    step = max(h, w) / cells
    rough = rng.uniform(-1, 1, (int(h / step) + 4, int(w / step) + 4)).astype(np.float32)
    big = cv2.resize(rough, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
    return np.asarray(big[int(step) :, int(step) :][:h, :w])


def fbm(
    rng: np.random.Generator, size: tuple[int, int], cells: float, octaves: int = 5, gain: float = 0.5
) -> Array:
    """Fractal noise [H, W] in about [-1, 1]: octaves of `noise`, each finer and weaker."""
    total, weight, whole = np.zeros(size, np.float32), 1.0, 0.0
    for octave in range(octaves):
        if octave and cells * 2**octave > max(size):
            break
        total += weight * noise(rng, size, cells * 2**octave)
        whole += weight
        weight *= gain
    return total / whole


def blur(image: Array, sigma_px: float) -> Array:
    """Gaussian blur."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma_px))


def paper(rng: np.random.Generator, size_px: int, colour: str, tooth: float = 0.05) -> Array:
    """A sheet [S, S, 3]: fibres, tooth and an uneven tint."""
    size = (size_px, size_px)
    grain = 0.6 * noise(rng, size, size_px / 2) + 0.4 * fbm(rng, size, 12)
    fibres = blur(rng.normal(0, 1, size).astype(np.float32), 1.2)
    return hexes(colour)[0] * (1 + tooth * (grain + fibres))[..., None]


def paint(image: Array, colour: Array, cover: Array) -> None:
    """Lay ``colour`` over ``image`` [H, W, 3] in place where ``cover`` [H, W] in [0, 1] says."""
    image += cover[..., None] * (colour - image)


def develop(linear: Array, *, exposure: float = 1.0, film: bool = True) -> Frame:
    """Linear light -> frame uint8 [H, W, 3]; ``film`` rolls highlights off as a camera does."""
    light = np.maximum(linear * exposure, 0)
    if film:  # the ACES fit of Narkowicz, a common filmic curve
        light = light * (2.51 * light + 0.03) / (light * (2.43 * light + 0.59) + 0.14)
    return (np.clip(light, 0, 1) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)
