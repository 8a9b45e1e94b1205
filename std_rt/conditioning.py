"""What the UNet is told besides the picture: style tokens, baked text, sizes.

A style picture becomes tokens once (and is remembered by the hash of its pixels); several styles
blend as a weighted mean of their tokens. All arrays are float32 with a leading batch axis of 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.errors import BundleError, UsageError
from std_rt.frame_program import NEGATIVE

__all__ = [
    "EncodedStyle",
    "StyleEncoder",
    "blend",
    "guided_inputs",
    "square",
    "time_ids",
    "to_frame",
    "to_image",
    "unet_inputs",
]

Frame = NDArray[np.uint8]
Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class EncodedStyle:
    """``tokens`` [1, T, D]; ``text_embeds`` [1, P] where the style encoder gives them, else None."""

    tokens: Array
    text_embeds: Array | None = None


def to_image(frame: Frame, out: Array) -> Array:
    """Frame uint8 [H, W, 3] -> image [1, 3, H, W] in [-1, 1], written into ``out`` and returned."""
    np.multiply(frame.transpose(2, 0, 1), np.float32(1 / 127.5), out=out[0])
    out -= 1
    return out


def to_frame(image: Array) -> Frame:
    """Image [1, 3, H, W], clipped to [-1, 1] -> a new frame uint8 [H, W, 3]."""
    scaled = image[0] * np.float32(127.5)
    scaled += 128  # 127.5 to move, 0.5 to round
    np.clip(scaled, 0, 255, out=scaled)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(1, 2, 0))


def square(frame: Frame, side_px: int) -> Frame:
    """The largest centred square of a frame, resized to ``side_px``."""
    h, w = frame.shape[:2]
    side = min(h, w)
    y, x = (h - side) // 2, (w - side) // 2
    how = cv2.INTER_AREA if side > side_px else cv2.INTER_CUBIC
    resized = cv2.resize(frame[y : y + side, x : x + side], (side_px, side_px), interpolation=how)
    return np.asarray(resized, np.uint8)


def blend(styles: Sequence[tuple[EncodedStyle, float]]) -> EncodedStyle:
    """Weighted mean of styles; weights are relative. Raises UsageError where one is not positive."""
    if not styles:
        raise UsageError("a style is needed: give at least one style picture")
    for _, weight in styles:
        if not 0 < weight < float("inf"):
            raise UsageError(f"style weights must be above 0, got {weight:g}; leave a style out instead")
    total = sum(weight for _, weight in styles)
    shares = [np.float32(weight / total) for _, weight in styles]
    tokens = sum(share * style.tokens for share, (style, _) in zip(shares, styles, strict=True))
    pooled = [style.text_embeds for style, _ in styles if style.text_embeds is not None]
    if not pooled:
        return EncodedStyle(np.asarray(tokens))
    return EncodedStyle(
        np.asarray(tokens), np.asarray(sum(s * p for s, p in zip(shares, pooled, strict=True)))
    )


class StyleEncoder:
    """Frames of any size -> `EncodedStyle`, each picture once."""

    def __init__(self, run: Callable[..., dict[str, NDArray[Any]]], side_px: int, remember: int = 64) -> None:
        """``run`` is the ``style_encoder`` engine, opened at [1, 3, side_px, side_px]."""
        self._run, self._side_px, self._remember = run, side_px, remember
        self._known: dict[str, EncodedStyle] = {}

    def __call__(self, frame: Frame) -> EncodedStyle:
        """Encode a frame uint8 [H, W, 3] by its centred square."""
        pixels = square(frame, self._side_px)
        key = hashlib.sha256(pixels.tobytes()).hexdigest()
        if key not in self._known:
            if len(self._known) >= self._remember:
                del self._known[next(iter(self._known))]
            self._known[key] = self._encode(pixels)
        return self._known[key]

    def _encode(self, pixels: Frame) -> EncodedStyle:
        image = to_image(pixels, np.empty((1, 3, self._side_px, self._side_px), np.float32))
        out = self._run(style_image=image)
        pooled = out.get("text_embeds")
        return EncodedStyle(out["style_tokens"].copy(), None if pooled is None else pooled.copy())


def time_ids(height_px: int, width_px: int) -> Array:
    """SDXL's size conditioning [1, 6]: original size, crop corner, target size."""
    return np.array([[height_px, width_px, 0, 0, height_px, width_px]], np.float32)


def unet_inputs(
    text: dict[str, Array], style: EncodedStyle, strength: float, size: tuple[int, int]
) -> dict[str, Array]:
    """Every UNet input that stays the same over a stream.

    ``text`` is the bundle's baked conditioning. A pooled vector from the style replaces the baked one, as
    far as ``strength`` says (the style tokens are scaled inside the graph); baked ``time_ids`` [1, 6] win
    over those made from ``size`` (H, W).
    """
    pooled = text["text_embeds"]
    if style.text_embeds is not None:
        pooled = pooled + np.float32(strength) * (style.text_embeds - pooled)
    return {
        "encoder_hidden_states": np.ascontiguousarray(text["encoder_hidden_states"], np.float32),
        "text_embeds": np.ascontiguousarray(pooled, np.float32),
        "time_ids": np.ascontiguousarray(text.get("time_ids", time_ids(*size)), np.float32),
        "style_tokens": np.ascontiguousarray(style.tokens, np.float32),
        "style_strength": np.array([strength], np.float32),
    }


def guided_inputs(mode: str, text: dict[str, Array], positive: dict[str, Array]) -> dict[str, Array]:
    """What a frame program of guidance ``mode`` is fed: ``positive`` (from `unet_inputs`) and its negative.

    ``full`` puts the negative [1, ...] before the positive [1, ...] in one array [2, ...]; ``residual``
    adds it under ``negative_`` and the name. It is ``text``'s as stored: sizes and the style's strength
    are the same for both. Raises BundleError where the two do not have one shape.
    """
    if mode == "none":
        return positive
    negative = {name: np.ascontiguousarray(text[f"negative_{name}"], np.float32) for name in NEGATIVE}
    for name, value in negative.items():
        if value.shape != positive[name].shape:
            raise BundleError(
                f"negative_{name} is {list(value.shape)} and the positive {list(positive[name].shape)}; "
                "export the bundle again"
            )
    if mode == "residual":
        return positive | {f"negative_{name}": value for name, value in negative.items()}
    return {name: np.concatenate([negative.get(name, value), value]) for name, value in positive.items()}
