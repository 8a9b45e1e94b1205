"""Frames to images and back, style encoding and blending."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from std_rt.core.errors import BundleError, UsageError
from std_rt.pipeline.conditioning import (
    EncodedStyle,
    StyleEncoder,
    StyleSquares,
    blend,
    conditioning_for,
    square,
    style_views,
    unet_inputs,
)


def _style(value: float, pooled: bool = True) -> EncodedStyle:
    tokens = np.full((1, 2, 4), value, np.float32)
    return EncodedStyle(tokens, np.full((1, 6), value, np.float32) if pooled else None)


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (7, 7), (1, 1)])
def test_square_takes_the_middle(shape: tuple[int, int]) -> None:
    frame = np.zeros((*shape, 3), np.uint8)
    h, w = shape
    side = min(h, w)
    frame[(h - side) // 2 : (h + side) // 2 + 1, (w - side) // 2 : (w + side) // 2 + 1] = 200
    cut = square(frame, 16)
    assert cut.shape == (16, 16, 3)
    assert cut.min() == 200


@given(st.floats(0.01, 100), st.floats(0.01, 100))
@settings(deadline=None)
def test_a_blend_is_the_weighted_mean(a: float, b: float) -> None:
    mixed = blend([(_style(1.0), a), (_style(3.0), b)])
    expected = (a * 1 + b * 3) / (a + b)
    np.testing.assert_allclose(mixed.tokens, expected, rtol=1e-5)
    assert mixed.text_embeds is not None
    np.testing.assert_allclose(mixed.text_embeds, expected, rtol=1e-5)


def test_a_style_without_a_pooled_vector_gives_none() -> None:
    assert blend([(_style(1.0, pooled=False), 1.0)]).text_embeds is None


def _noise(seed: int, pooled: bool = True) -> EncodedStyle:
    rng = np.random.default_rng(seed)
    draw = [rng.standard_normal(shape, np.float32) * 10.0**seed for shape in ((1, 2, 4), (1, 6))]
    return EncodedStyle(draw[0].astype(np.float32), draw[1].astype(np.float32) if pooled else None)


@given(st.lists(st.floats(0, 1e308), min_size=1, max_size=6).filter(any))
@settings(deadline=None)
def test_a_blend_lies_between_its_styles_and_only_counts_what_has_weight(weights: list[float]) -> None:
    styles = [_style(float(i)) for i in range(len(weights))]
    tokens = blend(list(zip(styles, weights, strict=True))).tokens
    counted = [i for i, weight in enumerate(weights) if weight]
    assert np.isfinite(tokens).all()
    assert min(counted) - 1e-5 <= tokens.min() <= tokens.max() <= max(counted) + 1e-5


@given(st.floats(1e-300, 1e300), st.integers(0, 3), st.integers(1, 5))
@settings(deadline=None)
def test_one_style_with_all_the_weight_is_returned_itself(weight: float, at: int, count: int) -> None:
    styles = [_noise(i) for i in range(count)]
    at = min(at, count - 1)
    assert blend([(style, weight if i == at else 0.0) for i, style in enumerate(styles)]) is styles[at]


@pytest.mark.parametrize("nothing", [0.0, -0.0, 1e-300])
def test_what_a_style_without_weight_holds_does_not_leak(nothing: float) -> None:
    bad = EncodedStyle(np.full((1, 2, 4), np.nan, np.float32), np.full((1, 6), np.inf, np.float32))
    first, second = _noise(0), _noise(1)
    assert blend([(first, 1.0), (bad, nothing)]) is first
    mixed = blend([(bad, nothing), (first, 0.25), (second, 0.75)])
    np.testing.assert_array_equal(mixed.tokens, blend([(first, 0.25), (second, 0.75)]).tokens)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=4), st.floats(0.01, 100))
@settings(deadline=None)
def test_only_the_ratio_of_weights_counts(weights: list[float], factor: float) -> None:
    styles = [_noise(i % 2) for i in range(len(weights))]
    once = blend(list(zip(styles, weights, strict=True)))
    again = blend([(style, weight * factor) for style, weight in zip(styles, weights, strict=True)])
    np.testing.assert_allclose(once.tokens, again.tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_negative_or_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match="must be 0 or more"):
        blend([(_style(1.0), 1.0), (_style(2.0), weight)])
    with pytest.raises(UsageError, match="must be 0 or more"):
        blend([(_style(1.0), weight)])


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one style a weight above 0"):
        blend([(_style(1.0), 0.0), (_style(2.0), 0.0)])


def test_styles_of_two_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="different style encoders"):
        blend([(_style(1.0), 1.0), (_style(2.0, pooled=False), 1.0)])


def test_no_style_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one style"):
        blend([])


def test_a_picture_is_encoded_once_and_the_oldest_is_forgotten() -> None:
    calls = []

    def run(style_image: np.ndarray) -> dict[str, Any]:
        calls.append(style_image.mean())
        return {"style_tokens": np.full((1, 2, 4), style_image.mean(), np.float32)}

    encoder = StyleEncoder(run, 8, remember=2)
    frames = [np.full((10, 10, 3), value, np.uint8) for value in (10, 20, 30)]
    first = encoder(frames[0])
    assert encoder(frames[0]) is first
    assert len(calls) == 1
    for frame in frames[1:]:
        encoder(frame)
    encoder(frames[0])
    assert len(calls) == 4


# Stroke size

STROKES = (0.5, 0.6, 0.75, 0.9, 1.0, 1.1, 1.3, 1.7, 2.0)


def _painting(side: int = 96) -> np.ndarray:
    """A dark middle in a bright, red-edged frame: other crops of it have another palette."""
    frame = np.full((side, side + 31, 3), 220, np.uint8)
    frame[:, :40, 1:] = 20
    frame[side // 4 : -side // 4, 40:-40] = 10
    return frame


def _waves() -> np.ndarray:
    """Waves of 16 px where the encoder sees 128."""
    wave = 127 + 100 * np.cos(2 * np.pi * (np.arange(256) + 0.5) / 32)
    return np.broadcast_to(wave[None, :, None], (256, 256, 3)).astype(np.uint8)


def _mean(views: list[tuple[np.ndarray, float]], power: int = 1) -> np.ndarray:
    return np.sum([weight * (view.astype(float) ** power).mean((0, 1)) for view, weight in views], axis=0)


def test_stroke_size_1_is_the_centred_square() -> None:
    ((view, weight),) = style_views(_painting(), 32)
    np.testing.assert_array_equal(view, square(_painting(), 32))
    assert weight == 1


@pytest.mark.parametrize("stroke_size", STROKES)
@pytest.mark.parametrize("side_px", [32, 48, 96])
def test_every_stroke_size_has_the_palette_of_the_whole_picture(stroke_size: float, side_px: int) -> None:
    views, whole = style_views(_painting(), side_px, stroke_size), style_views(_painting(), side_px)
    assert sum(weight for _, weight in views) == pytest.approx(1)
    np.testing.assert_allclose(_mean(views), _mean(whole), atol=1.5)
    np.testing.assert_allclose(np.sqrt(_mean(views, 2)), np.sqrt(_mean(whole, 2)), atol=3)


@pytest.mark.parametrize("stroke_size", STROKES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 2), (15, 40)])
def test_no_view_has_a_border_whatever_the_sides(stroke_size: float, shape: tuple[int, int]) -> None:
    for view, _ in style_views(np.full((*shape, 3), 255, np.uint8), 7, stroke_size):
        assert view.shape == (7, 7, 3)
        assert view.min() == 255


@pytest.mark.parametrize(("stroke_size", "period"), [(0.5, 8), (1, 16), (2, 32)])
def test_strokes_are_seen_at_their_size(stroke_size: float, period: int) -> None:
    for view, _ in style_views(_waves(), 128, stroke_size):
        spectrum = np.abs(np.fft.rfft(view[0, :, 0] - view.mean()))
        assert 128 / int(spectrum.argmax()) == period


def test_a_style_moves_steadily_with_the_stroke_size() -> None:
    def fineness(style_image: np.ndarray) -> dict[str, Any]:
        steps = np.abs(np.diff(style_image, axis=3)).mean()
        return {"style_tokens": np.full((1, 2, 4), steps, np.float32)}

    encoder = StyleEncoder(fineness, 128)
    levels = [float(encoder(_waves(), stroke_size).tokens[0, 0, 0]) for stroke_size in STROKES]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 1.8 * levels[4] > 3 * levels[-1]


def test_changing_the_stroke_size_encodes_each_view_once() -> None:
    calls: list[int] = []

    def run(style_image: np.ndarray) -> dict[str, Any]:
        calls.append(1)
        return {"style_tokens": np.full((1, 2, 4), style_image.mean(), np.float32)}

    frame = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    encoder = StyleEncoder(run, 16)
    counts = []
    for stroke_size in (2.0, 1.5, 1.2, 1.0, 0.7, 0.5):
        assert encoder(frame, stroke_size) is encoder(frame, stroke_size)
        counts.append(len(calls))
    assert counts == [4, 5, 5, 5, 6, 6]


def test_what_is_kept_of_a_picture_is_enough_for_every_stroke_size() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    kept = StyleSquares.of(frame, 32)
    assert (kept.whole.shape, kept.large.shape) == ((32, 32, 3), (64, 64, 3))
    for stroke_size in STROKES:
        pairs = zip(style_views(kept, 32, stroke_size), style_views(frame, 32, stroke_size), strict=True)
        assert all(np.array_equal(ours, theirs) for (ours, _), (theirs, _) in pairs)


@pytest.mark.parametrize("stroke_size", [0.49, 2.1, float("nan")])
def test_a_stroke_size_out_of_range_is_refused(stroke_size: float) -> None:
    with pytest.raises(UsageError, match=r"stroke size must be in 0\.5\.\.2, got"):
        style_views(_painting(), 32, stroke_size)


def test_tokens_outlive_the_engine_that_made_them() -> None:
    shared = np.zeros((1, 2, 4), np.float32)

    def run(style_image: np.ndarray) -> dict[str, Any]:
        shared[...] = style_image.mean()
        return {"style_tokens": shared}

    encoder = StyleEncoder(run, 8)
    dark = encoder(np.zeros((8, 8, 3), np.uint8))
    encoder(np.full((8, 8, 3), 255, np.uint8))
    assert dark.tokens.max() == -1


def test_the_styles_pooled_vector_replaces_the_baked_one_as_far_as_the_strength() -> None:
    text = {
        "encoder_hidden_states": np.zeros((1, 3, 5), np.float32),
        "text_embeds": np.full((1, 6), 7, np.float32),
    }
    with_pooled = unet_inputs(text, _style(1.0), 0.5, (64, 96))
    assert with_pooled["text_embeds"].max() == 4  # half-way from 7 to 1
    assert unet_inputs(text, _style(1.0), 1.0, (64, 96))["text_embeds"].max() == 1
    assert unet_inputs(text, _style(1.0), 0.0, (64, 96))["text_embeds"].max() == 7
    assert unet_inputs(text, _style(1.0, pooled=False), 0.5, (64, 96))["text_embeds"].max() == 7
    assert with_pooled["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]]
    assert with_pooled["style_strength"].tolist() == [0.5]


def test_baked_time_ids_win_over_the_size() -> None:
    baked = {
        "encoder_hidden_states": np.zeros((1, 3, 5), np.float32),
        "text_embeds": np.zeros((1, 6), np.float32),
        "time_ids": np.full((1, 6), 9, np.float32),
    }
    assert unet_inputs(baked, _style(1.0), 1.0, (64, 64))["time_ids"].tolist() == [[9] * 6]


def _both() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    text = {
        "encoder_hidden_states": np.zeros((1, 3, 5), np.float32),
        "text_embeds": np.zeros((1, 6), np.float32),
        "negative_encoder_hidden_states": np.full((1, 3, 5), -1, np.float32),
        "negative_text_embeds": np.full((1, 6), -2, np.float32),
        "negative_style_tokens": np.full((1, 2, 4), -3, np.float32),
    }
    return text, unet_inputs(text, _style(1.0), 0.5, (64, 96))


@pytest.mark.parametrize("mode", ["full", "residual"])
def test_the_negative_differs_in_prompt_and_style_only(mode: str) -> None:
    text, positive = _both()
    found = conditioning_for(mode, text, positive)
    assert found.positive is positive
    assert found.negative.keys() == positive.keys()
    for name, value in positive.items():
        np.testing.assert_array_equal(found.negative[name], text.get(f"negative_{name}", value))
    assert not conditioning_for("none", text, positive).negative


def test_a_negative_of_another_length_is_refused() -> None:
    text, positive = _both()
    text["negative_encoder_hidden_states"] = np.zeros((1, 4, 5), np.float32)
    with pytest.raises(BundleError, match=r"negative_encoder_hidden_states is \[1, 4, 5\] and the positive"):
        conditioning_for("full", text, positive)
