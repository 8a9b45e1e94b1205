"""Conditioning: all inputs of the UNet except the picture - style tokens, prompt, sizes, guidance.

A style picture is encoded once (and cached by the hash of its pixels); several styles blend as a weighted
mean of their tokens. All arrays are float32 with a leading batch axis of 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.core.arrays import Array, Frame
from std_rt.core.bundle import Bundle
from std_rt.core.errors import BundleError, UsageError
from std_rt.engines.glue import GLUE
from std_rt.pipeline.denoise import GUIDANCE_MODES, Guidance
from std_rt.pipeline.program_builder import NEGATIVE

__all__ = [
    "STROKE_SIZES",
    "Conditioning",
    "EncodedStyle",
    "StyleEncoder",
    "StyleSquares",
    "blend",
    "check_negative",
    "check_stroke_size",
    "choose_guidance",
    "conditioning_for",
    "square",
    "style_views",
    "time_ids",
    "unet_inputs",
]

STROKE_SIZES = (0.5, 2.0)
"""Smallest and largest stroke size."""


@dataclass(frozen=True, eq=False)
class EncodedStyle:
    """``tokens`` [1, T, D]; ``text_embeds`` [1, P] if the style encoder returns them, else None."""

    tokens: Array
    text_embeds: Array | None = None


@dataclass(frozen=True, eq=False)
class Conditioning:
    """UNet input -> value [1, ...] for one frame, for the prompt and for the negative prompt.

    ``negative`` is empty without guidance.
    """

    positive: Mapping[str, Array]
    negative: Mapping[str, Array] = field(default_factory=dict)


def square(frame: Frame, side_px: int) -> Frame:
    """The largest centred square of a frame, resized to ``side_px``."""
    h, w = frame.shape[:2]
    side = min(h, w)
    y, x = (h - side) // 2, (w - side) // 2
    how = cv2.INTER_AREA if side > side_px else cv2.INTER_CUBIC
    resized = cv2.resize(frame[y : y + side, x : x + side], (side_px, side_px), interpolation=how)
    return np.asarray(resized, np.uint8)


def check_stroke_size(stroke_size: float) -> float:
    """``stroke_size`` itself. Raises UsageError unless it is in `STROKE_SIZES`."""
    low, high = STROKE_SIZES
    if not isinstance(stroke_size, Real):
        raise UsageError(f"stroke size must be a number, got {stroke_size!r}")
    if not low <= stroke_size <= high:
        raise UsageError(f"stroke size must be in {low:g}..{high:g}, got {stroke_size:g}")
    return float(stroke_size)


class StyleSquares(NamedTuple):
    """All that any stroke size needs of a picture: its centred square, each resized from the whole once.

    ``whole``: at ``side_px``; ``large``: at most at twice that. Stands in for the picture.
    """

    whole: Frame
    large: Frame

    @classmethod
    def of(cls, picture: Frame | StyleSquares, side_px: int) -> StyleSquares:
        """Of a frame uint8 [H, W, 3]; those of one encoder as they are."""
        if isinstance(picture, StyleSquares):
            return picture
        return cls(square(picture, side_px), square(picture, min(2 * side_px, *picture.shape[:2])))


def style_views(
    picture: Frame | StyleSquares, side_px: int, stroke_size: float = 1.0
) -> list[tuple[Frame, float]]:
    """Squares of ``side_px`` that the style encoder sees of a picture [H, W, 3], with their weights.

    Stroke size 1 is the centred square; 2 is its quarters, where strokes are twice as large; 0.5 is the whole
    at half its size, mirrored to fill the square. In between, two of these are blended: other crops and
    borders would count some parts of the picture twice, and the palette would change. Raises as
    `check_stroke_size` does.
    """
    whole, large = StyleSquares.of(picture, side_px)
    share = abs(math.log2(check_stroke_size(stroke_size)))
    if stroke_size < 1:
        inner = square(whole, max(1, side_px // 2))
        before = (side_px - len(inner)) // 2
        after = side_px - len(inner) - before
        mirrored = cv2.copyMakeBorder(inner, before, after, before, after, cv2.BORDER_REFLECT)
        others = [np.asarray(mirrored, np.uint8)]
    else:
        half = (len(large) + 1) // 2
        starts = (0, len(large) - half)
        others = [square(large[y : y + half, x : x + half], side_px) for y in starts for x in starts]
    weighted = [(whole, 1 - share), *((view, share / len(others)) for view in others)]
    return [(view, weight) for view, weight in weighted if weight]


def blend(styles: Sequence[tuple[EncodedStyle, float]]) -> EncodedStyle:
    """Weighted mean of styles. Weights are relative, 0 or more; a style of weight 0 is ignored.

    Where one style has all the weight it is returned itself: weights (1, 0) are the first style, bit for
    bit. Raises UsageError if there is no style, a weight is negative or not finite, or all are 0.
    """
    if not styles:
        raise UsageError("a style is needed: give at least one style picture")
    shares = _shares([weight for _, weight in styles])
    parts = [(share, style) for share, (style, _) in zip(shares, styles, strict=True) if share]
    if len(parts) == 1:
        return parts[0][1]
    tokens = _mean([(share, style.tokens) for share, style in parts])
    pooled = [(share, style.text_embeds) for share, style in parts if style.text_embeds is not None]
    if len(pooled) not in (0, len(parts)):
        raise UsageError(
            "styles from different style encoders cannot be blended; encode all of them with one bundle"
        )
    return EncodedStyle(tokens, _mean(pooled) if pooled else None)


def _shares(weights: list[float]) -> list[np.float32]:
    """Weights over their sum, in the precision of tokens, in which tiny ones are 0."""
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise UsageError(
                f"style weights must be 0 or more and finite, got {weight:g}; or leave the style out"
            )
    top = max(weights)
    if top == 0:
        raise UsageError("all style weights are 0; give at least one style a weight above 0")
    relative = [weight / top for weight in weights]  # the sum of huge weights would be infinite
    total = sum(relative)
    return [np.float32(weight / total) for weight in relative]


def _mean(parts: list[tuple[np.float32, Array]]) -> Array:
    """Sum of share * value."""
    (share, value), *others = parts
    mean = share * value
    for share, value in others:
        mean += share * value
    return np.asarray(mean, np.float32)


class StyleEncoder:
    """Frames of any size -> `EncodedStyle`, each picture once."""

    def __init__(
        self, run: Callable[..., dict[str, NDArray[Any]]], side_px: int, remember: int = 128
    ) -> None:
        """``run`` is the ``style_encoder`` engine, opened at [1, 3, side_px, side_px]."""
        self._run, self._side_px, self._remember = run, side_px, remember
        self._known: dict[str, EncodedStyle] = {}

    def __call__(self, picture: Frame | StyleSquares, stroke_size: float = 1.0) -> EncodedStyle:
        """Encode a frame uint8 [H, W, 3] by its `style_views`, which raises."""
        views = style_views(picture, self._side_px, stroke_size)
        digests = [hashlib.sha256(view.tobytes()).hexdigest() for view, _ in views]
        parts = [
            (self._remembered(digest, partial(self._encode, view)), weight)
            for digest, (view, weight) in zip(digests, views, strict=True)
        ]
        if len(parts) == 1:
            return parts[0][0]
        return self._remembered(f"{digests} {stroke_size!r}", partial(blend, parts))

    def _remembered(self, key: str, make: Callable[[], EncodedStyle]) -> EncodedStyle:
        if key not in self._known:
            made = make()
            while len(self._known) >= self._remember:
                del self._known[next(iter(self._known))]
            self._known[key] = made
        return self._known[key]

    def _encode(self, pixels: Frame) -> EncodedStyle:
        image = np.empty((1, 3, self._side_px, self._side_px), np.float32)
        GLUE["frame_in"].run(frame=pixels[None], image=image)
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

    ``text`` is the bundle's baked conditioning. A pooled vector from the style replaces the baked one in
    proportion to ``strength`` (the style tokens are scaled inside the graph); baked ``time_ids`` [1, 6] take
    precedence over those of ``size`` (H, W).
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


def conditioning_for(mode: str, text: dict[str, Array], positive: dict[str, Array]) -> Conditioning:
    """``positive`` (from `unet_inputs`) with the negative that guidance ``mode`` needs.

    The negative prompt is ``text``'s; sizes and the strength of the style are the same for both. Raises
    BundleError if the two differ in shape.
    """
    if mode == "none":
        return Conditioning(positive)
    negative = {name: np.ascontiguousarray(text[f"negative_{name}"], np.float32) for name in NEGATIVE}
    for name, value in negative.items():
        if value.shape != positive[name].shape:
            raise BundleError(
                f"negative_{name} is {list(value.shape)} and the positive {list(positive[name].shape)}; "
                "export the bundle again"
            )
    return Conditioning(positive, positive | negative)


def choose_guidance(bundle: Bundle, scale: float | None = None, mode: str | None = None) -> Guidance:
    """The guidance to use: the bundle's, or the one given. Scale 1 is none, whatever the mode.

    A bundle without guidance gets mode ``full`` if only a scale is given. Raises UsageError
    if scale and mode do not fit together, BundleError if the bundle has no negative prompt or
    needs a newer std-rt.
    """
    own = bundle.guidance
    if own["mode"] not in GUIDANCE_MODES:
        raise BundleError(
            f"bundle '{bundle.name}' needs guidance {own['mode']!r}, unknown to this std-rt; upgrade std-rt"
        )
    if mode is not None and mode not in GUIDANCE_MODES:
        raise UsageError(f"unknown guidance mode {mode!r}; use one of {', '.join(GUIDANCE_MODES)}")
    if scale is not None and not 1 <= scale < float("inf"):
        raise UsageError(f"guidance must be 1 (none) or more, got {scale:g}")
    if mode == "none" and scale not in (None, 1):
        raise UsageError(f"guidance {scale:g} does not fit mode 'none'; leave out one of the two")
    if mode == "none" or scale == 1 or (mode is None and scale is None and own["mode"] == "none"):
        return Guidance()
    chosen = float(own["scale"]) if scale is None else scale
    if chosen == 1:
        raise UsageError(f"guidance mode {mode!r} needs a scale above 1; give --guidance")
    return Guidance(mode or (own["mode"] if own["mode"] != "none" else "full"), chosen)


def check_negative(bundle: Bundle, stored: Collection[str], guidance: Guidance) -> None:
    """Raise BundleError if guidance needs a negative prompt that is not among the names ``stored``."""
    missing = [name for name in NEGATIVE if f"negative_{name}" not in stored]
    if guidance.mode != "none" and missing:
        raise BundleError(
            f"bundle '{bundle.name}' has no negative prompt, which guidance {guidance.scale:g} needs; "
            f"use --guidance 1, or export it again with --guidance {guidance.scale:g}"
        )
