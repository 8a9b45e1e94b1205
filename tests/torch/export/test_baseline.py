"""Two paths, one picture: the engines against the same bundle rebuilt in diffusers."""

from __future__ import annotations

import numpy as np
import pytest

from std_rt import Stylizer
from std_rt.core.bundle import Bundle
from std_rt.evaluation.bench import sample_frame


@pytest.mark.parametrize("name", ["own_bundle", "clip_bundle"])
def test_the_stylizer_and_the_diffusers_loop_paint_the_same_picture(
    request: pytest.FixtureRequest, name: str
) -> None:
    from std_rt.evaluation.diffusers_baseline import DiffusersLoop

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


def test_bf16_and_compilation_paint_nearly_the_same_picture(
    own_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from std_rt.evaluation.diffusers_baseline import DiffusersLoop

    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)  # type: ignore[func-returns-value]
    frame, style = sample_frame(64, 64), sample_frame(64, 64, seed=1)
    pictures = []
    for options in ({}, {"precision": "bf16", "compiled": True}):
        loop = DiffusersLoop(own_bundle, own_bundle.default_steps, (64, 64), **options)  # type: ignore[arg-type]
        loop.set_style(style)
        pictures.append(loop.step(frame).astype(int))
    assert len(compiled) == 3
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 6
