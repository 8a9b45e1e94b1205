"""A stylizer with two steps, and a mixer of three grey styles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from support.live_support import Clock

from std_rt.core.bundle import Bundle
from std_rt.live.style_mixer import StyleMixer
from std_rt.pipeline.stylizer import Stylizer


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def stylizer(handmade: Bundle) -> Iterator[Stylizer]:
    with Stylizer.load(handmade, backend="openvino", precision="fp32", steps=2) as stylizer:
        yield stylizer


@pytest.fixture
def greys(stylizer: Stylizer, clock: Clock) -> Iterator[StyleMixer]:
    mixer = StyleMixer(stylizer.encode_style, stylizer.bundle, now=clock)
    for value in (20, 120, 230):
        mixer.add(np.full((32, 32, 3), value, np.uint8), f"grey {value}")
    yield mixer
    mixer.close()
