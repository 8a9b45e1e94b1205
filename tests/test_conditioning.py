"""Frames to images and back, style encoding and blending."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from std_rt.conditioning import (
    EncodedStyle,
    StyleEncoder,
    blend,
    guided_inputs,
    square,
    to_frame,
    to_image,
    unet_inputs,
)
from std_rt.errors import BundleError, UsageError


def _style(value: float, pooled: bool = True) -> EncodedStyle:
    tokens = np.full((1, 2, 4), value, np.float32)
    return EncodedStyle(tokens, np.full((1, 6), value, np.float32) if pooled else None)


def test_every_value_survives_the_way_to_an_image_and_back() -> None:
    frame = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    image = to_image(frame, np.empty((1, 3, 16, 16), np.float32))
    assert image.min() == -1
    assert image.max() == pytest.approx(1)
    np.testing.assert_array_equal(to_frame(image), frame)


def test_what_lies_outside_the_range_is_clipped() -> None:
    image = np.array([-9.0, -1.0, 1.0, 9.0], np.float32).reshape(1, 1, 2, 2).repeat(3, 1)
    np.testing.assert_array_equal(to_frame(image)[..., 0], [[0, 0], [255, 255]])


def test_channels_and_rows_keep_their_place() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    image = to_image(frame, np.empty((1, 3, 8, 12), np.float32))
    assert image[0, 2, 5, 11] == pytest.approx(frame[5, 11, 2] / 127.5 - 1)


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
def test_a_blend_is_the_weighted_mean(a: float, b: float) -> None:
    mixed = blend([(_style(1.0), a), (_style(3.0), b)])
    expected = (a * 1 + b * 3) / (a + b)
    np.testing.assert_allclose(mixed.tokens, expected, rtol=1e-5)
    assert mixed.text_embeds is not None
    np.testing.assert_allclose(mixed.text_embeds, expected, rtol=1e-5)


def test_a_style_without_a_pooled_vector_gives_none() -> None:
    assert blend([(_style(1.0, pooled=False), 1.0)]).text_embeds is None


@pytest.mark.parametrize("weight", [0.0, -0.5, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match="must be above 0"):
        blend([(_style(1.0), 1.0), (_style(2.0), weight)])


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


def test_full_guidance_puts_the_negative_first() -> None:
    text, positive = _both()
    fed = guided_inputs("full", text, positive)
    assert fed.keys() == positive.keys()
    for name, value in positive.items():
        assert fed[name].shape == (2, *value.shape[1:])
        np.testing.assert_array_equal(fed[name][1:], value)
        np.testing.assert_array_equal(fed[name][:1], text.get(f"negative_{name}", value))
    assert fed["style_strength"].tolist() == [0.5, 0.5]


def test_residual_guidance_has_the_negative_beside() -> None:
    text, positive = _both()
    fed = guided_inputs("residual", text, positive)
    assert fed.keys() - positive.keys() == {name for name in text if name.startswith("negative_")}
    assert all(fed[name] is positive[name] for name in positive)
    assert guided_inputs("none", text, positive) is positive


def test_a_negative_of_another_length_is_refused() -> None:
    text, positive = _both()
    text["negative_encoder_hidden_states"] = np.zeros((1, 4, 5), np.float32)
    with pytest.raises(BundleError, match=r"negative_encoder_hidden_states is \[1, 4, 5\] and the positive"):
        guided_inputs("full", text, positive)
