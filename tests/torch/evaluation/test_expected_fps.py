"""The calculation of frame rates: its networks are SDXL's, and its times are what the formula says."""

from __future__ import annotations

import pytest

from tools.expected_fps import TEXT_PARAMETERS, Cost, Gpu, _networks, frame_s


def test_a_call_takes_the_longer_of_arithmetic_and_reading_weights() -> None:
    gpu = Gpu("card", peak=100e12, bandwidth=1e12)
    arithmetic, reading = Cost(1e12, 1e9), Cost(1e9, 8e9)
    assert arithmetic.seconds(gpu, 0.5) == pytest.approx(0.02)
    assert reading.seconds(gpu, 0.5) == pytest.approx(0.01)
    assert frame_s(gpu, reading, arithmetic, 4, 0.5) == pytest.approx(0.09)
    assert Cost(1e12, 1e9, attention=0.4e12).in_fp8().seconds(gpu, 0.5) == pytest.approx(0.014)
    assert reading.in_fp8().seconds(gpu, 0.5) == pytest.approx(0.005)
    assert Cost(5.0, 4.0, 3.0).without(Cost(1.0, 2.0)) == Cost(4.0, 2.0, 3.0)


@pytest.mark.long
def test_the_networks_have_the_published_sizes() -> None:
    unet, full, tiny = _networks()
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert sum(p.numel() for p in full.parameters()) == 83_653_863
    assert sum(p.numel() for p in tiny.parameters()) == pytest.approx(2.45e6, rel=0.01)
    text = [p for name, p in unet.named_parameters() if ".attn2.to_k." in name or ".attn2.to_v." in name]
    assert sum(p.numel() for p in text) == TEXT_PARAMETERS
