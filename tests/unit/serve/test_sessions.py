"""Sessions over a WebSocket: what they paint, together and alone, and what they leave behind."""

from __future__ import annotations

import numpy as np
from support.serve_support import (
    Frame,
    Site,
    decoded,
    jpeg,
    next_result,
    next_text,
    send_frame,
)

from std_rt.pipeline.stylizer import Stylizer
from std_rt.serve.protocol import encode_frame


def noise(seed: int, height: int = 64, width: int = 64) -> Frame:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_session_paints_what_the_stylizer_paints(
    site: Site, stylizer: Stylizer, art: dict[str, Frame]
) -> None:
    data = jpeg(noise(1))
    stylizer.set_style(art["dark"])
    expected = encode_frame(stylizer.stylize(decoded(data)))
    with site.connect() as socket:
        send_frame(socket, 7, data)
        number, at_ms, painted = next_result(socket)
        assert (number, at_ms) == (7, 7000.0)
        assert painted == expected
        assert next_text(socket, "figures")["steps"] == 2
