"""Two paths, one picture: the engines against the same bundle rebuilt in diffusers."""

from __future__ import annotations

import numpy as np
import pytest

from std_rt import Stylizer
from std_rt.bench import sample_frame
from std_rt.bundle import Bundle


@pytest.mark.parametrize("name", ["own_bundle", "clip_bundle"])
def test_the_stylizer_and_the_diffusers_loop_paint_the_same_picture(
    request: pytest.FixtureRequest, name: str
) -> None:
    from std_rt.baseline import DiffusersLoop

    bundle: Bundle = request.getfixturevalue(name)
    frame, style = sample_frame(64, 96), sample_frame(64, 64, seed=1)
    loop = DiffusersLoop(bundle, bundle.default_steps, (64, 96))
    loop.set_style(style)
    marks: list[str] = []
    theirs = loop.step(frame, mark=marks.append)
    with Stylizer.load(bundle, size=(64, 96), precision="fp32") as stylizer:
        stylizer.set_style(style)
        ours, _ = stylizer.step(frame)
    error = np.abs(ours.astype(int) - theirs)
    assert ours.shape == theirs.shape == (64, 96, 3)
    assert ours.std() > 5
    assert error.mean() < 0.5
    assert set(marks) == {"convert", "vae_encoder", "unet", "scheduler", "vae_decoder"}
