"""Messages and settings: whatever a client sends, the answer is a look or one line."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serve_support import jpeg

from std_rt.core.errors import StdRtError
from std_rt.pipeline.stylizer import Stylizer
from std_rt.serve.protocol import Header, Look, decode_frame, parse_message

_NAMES = ["styles", "strength", "stroke_size", "keep_colours", "size", "steps", "temporal", "crossfade", "x"]
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**500)
_KEYS = st.text(max_size=3)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3)
)


@given(asked=st.dictionaries(st.sampled_from(_NAMES), _VALUES))
@settings(max_examples=300, deadline=None)
def test_any_setting_is_taken_or_refused_in_one_line(stylizer: Stylizer, asked: dict[str, Any]) -> None:
    try:
        look = Look().changed(asked, stylizer)
    except StdRtError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    look.check(stylizer)
    described = json.loads(json.dumps(look.described(), allow_nan=False))
    assert Look().changed(described | {"styles": {"a": 1}}, stylizer)


@given(text=st.text() | _VALUES.map(json.dumps))
@settings(deadline=None)
def test_any_text_is_an_object_or_refused(text: str) -> None:
    with suppress(StdRtError):
        assert isinstance(parse_message(text), dict)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_frame_or_refused(data: st.DataObject) -> None:
    whole = bytearray(Header(1, 0, 2.0).pack(jpeg(np.full((16, 16, 3), 99, np.uint8))))
    for _ in range(data.draw(st.integers(0, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    message = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with suppress(StdRtError):
        _, picture = Header.unpack(message)
        assert decode_frame(picture, 10_000).dtype == np.uint8
