"""De-stylization: a content version of an artwork, as if someone had photographed its scene plainly.

The small teacher learns "content + style -> picture" from artworks alone: the content version keeps
the drawing and loses the medium (edge-preserving smoothing) and the palette (colour statistics of a
random photo, a random mix of channels, random shading). Pictures are uint8 ``[H, W, 3]`` RGB.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.training.data.picture_set import Frame, Image


def smooth(frame: Frame, rng: np.random.Generator) -> Frame:
    """Remove strokes and grain, keep edges; kind and strength are random."""
    kind = rng.choice(["bilateral", "median", "both", "soft"])
    if kind in ("median", "both"):
        frame = cv2.medianBlur(frame, int(rng.choice([3, 5, 7])))
    if kind in ("bilateral", "both"):
        for _ in range(int(rng.integers(1, 4))):
            frame = cv2.bilateralFilter(frame, 7, float(rng.uniform(30, 80)), float(rng.uniform(3, 6)))
    if kind == "soft":
        frame = cv2.GaussianBlur(frame, (0, 0), float(rng.uniform(1.0, 2.5)))
        frame = cv2.addWeighted(frame, 1.5, cv2.GaussianBlur(frame, (0, 0), 3.0), -0.5, 0)
    return frame


def _root(cov: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(cov + 1e-4 * np.eye(3))
    return (vectors * np.maximum(values, 1e-5) ** power) @ vectors.T


def transfer_colours(frame: Frame, reference: Frame) -> Frame:
    """Give ``frame`` the mean and covariance of ``reference``'s colours (linear, Reinhard-like)."""
    x = frame.reshape(-1, 3).astype(np.float64) / 255
    y = reference[::4, ::4].reshape(-1, 3).astype(np.float64) / 255
    a = _root(np.cov(x[::7].T), -0.5) @ _root(np.cov(y.T), 0.5)
    out = (x - x.mean(0)) @ a + y.mean(0)
    return (np.clip(out, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(frame.shape)


def _shading(shape: tuple[int, ...], rng: np.random.Generator) -> Image:
    small = rng.normal(0, 1, (4, 4, 3)) * rng.uniform(0, 0.06) + rng.normal(0, 1, (4, 4, 1)) * rng.uniform(
        0, 0.18
    )
    return cv2.resize(small.astype(np.float32), (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


def recolour(frame: Frame, reference: Frame, rng: np.random.Generator) -> Frame:
    """Colours that say nothing of the original's: a photo's statistics, a channel mix, shading, gamma."""
    out = transfer_colours(frame, reference) if rng.random() < 0.8 else frame
    x = out.astype(np.float32) / 255
    if rng.random() < 0.6:
        mix = np.eye(3) + rng.normal(0, 0.25, (3, 3))
        mix /= mix.sum(1, keepdims=True)  # grey stays grey
        x = (x - 0.5) @ mix.T.astype(np.float32) + 0.5
    x = x + _shading(frame.shape, rng)
    x = np.clip(x, 0, 1) ** float(np.exp(rng.normal(0, 0.25)))
    return (x * 255 + 0.5).astype(np.uint8)


def content_version(artwork: Frame, photo: Frame, rng: np.random.Generator) -> Frame:
    """The artwork without its style; ``photo`` lends its colour statistics."""
    return recolour(smooth(artwork, rng), photo, rng)
