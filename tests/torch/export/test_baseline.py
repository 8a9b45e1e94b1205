"""Two paths, one picture: the engines against the same bundle rebuilt in diffusers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from std_rt import Stylizer
from std_rt.core.bundle import Bundle
from std_rt.core.errors import UsageError
from std_rt.core.machine import describe_machine
from std_rt.evaluation import bench
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


def test_fp16_as_on_a_gpu_paints_nearly_the_same_and_every_stage_ends_with_a_wait(
    own_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from std_rt.evaluation.diffusers_baseline import DiffusersLoop

    frame, style = sample_frame(64, 64), sample_frame(64, 64, seed=1)
    order: list[str] = []
    monkeypatch.setattr(DiffusersLoop, "_wait", lambda self: order.append("wait"))
    pictures = []
    for precision in ("fp32", "fp16"):
        loop = DiffusersLoop(own_bundle, own_bundle.default_steps, (64, 64), precision=precision)
        loop.set_style(style)
        pictures.append(loop.step(frame, mark=order.append).astype(int))
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 2
    assert set(order[::2]) == {"wait"}
    assert "wait" not in order[1::2]


def test_a_gpu_is_compared_with_diffusers_on_the_gpu_in_fp16(
    own_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(bench, "diffusers_step", lambda *given, **how: asked.append(how) or dict)  # type: ignore[func-returns-value]
    with Stylizer.load(own_bundle, size=(64, 64), precision="fp32") as stylizer:
        bench._against(stylizer, (64, 64), "diffusers")
        stylizer.backend = "rtx"
        for name in bench.AGAINST:
            bench._against(stylizer, (64, 64), name)
    assert asked == [
        {"precision": "fp32", "compiled": False, "device": "cpu"},
        {"precision": "fp16", "compiled": False, "device": "cuda"},
        {"precision": "fp16", "compiled": True, "device": "cuda"},
    ]
    assert bench.title_of("compile", "rtx") == "diffusers (torch.compile fp16, GPU)"


def test_without_a_gpu_a_comparison_on_one_is_refused(
    own_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from std_rt.core.errors import UsageError
    from std_rt.evaluation.diffusers_baseline import DiffusersLoop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"needs torch on the GPU, .* compare on the CPU: --backend cpu"):
        DiffusersLoop(own_bundle, 1, (64, 64), device="cuda")


@pytest.mark.parametrize(("features", "precision"), [((), "fp32"), (("AVX-512 bf16",), "bf16")])
def test_compiled_it_runs_in_what_the_processor_is_fast_in(
    features: tuple[str, ...], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(describe_machine(), features=features)
    monkeypatch.setattr(bench, "describe_machine", lambda: machine)
    assert bench.title_of("compile", "openvino") == f"diffusers (torch.compile {precision})"
    assert bench.title_of("diffusers", "openvino") == "diffusers (eager fp32)"


def test_a_compiler_that_fails_is_one_line(handmade: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("no C++\ncompiler")

    monkeypatch.setattr(bench, "diffusers_step", lambda *_, **__: fails)
    said = r"^torch.compile failed.*: no C\+\+ compiler$"
    with Stylizer.load(handmade) as stylizer, pytest.raises(UsageError, match=said):
        bench._against(stylizer, (64, 64), "compile")
