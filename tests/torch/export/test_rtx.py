"""What export writes, TensorRT-RTX builds: every graph, at batch 1 and as guidance calls it.

It refuses graphs that mix number formats, so this is a gate for export. No GPU is needed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx")

import tensorrt_rtx as trt

from std_rt.cli.engines import plan
from std_rt.core.bundle import Bundle
from std_rt.engines.cache import EngineCache
from std_rt.engines.tensorrt.engine_builder import EngineBuilder
from std_rt.engines.tensorrt.onnx_to_engine import RTX
from std_rt.models.weight_files import read_shapes


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineBuilder:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "data"))
    return EngineBuilder(trt, RTX, ("sm89", "sm120"), cache=EngineCache.open())


@pytest.mark.parametrize("name", ["own_bundle", pytest.param("clip_bundle", marks=pytest.mark.long)])
def test_every_graph_is_built_for_two_gpus(
    name: str, request: pytest.FixtureRequest, builder: EngineBuilder
) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    specs = plan(str(bundle.path)).engines(glue=False)
    assert {spec.name for spec in specs} == {"style_encoder", "vae_encoder", "unet", "vae_decoder"}
    for spec in specs:
        assert builder.ensure(spec).stat().st_size > 0.5 * bundle.weights_path(spec.name).stat().st_size
    assert builder.cache is not None
    assert {entry.key.bundle for entry in builder.cache.entries()} == {bundle.digest}


def test_the_keys_and_values_of_a_baked_prompt_are_folded(
    half_bundle: Bundle, builder: EngineBuilder
) -> None:
    """The engine lacks the weights that make them, and one for another prompt is another engine."""
    builder = EngineBuilder(trt, RTX, ("sm89",), cache=builder.cache)
    [unet] = [s for s in plan(str(half_bundle.path)).engines(glue=False) if s.name == "unet"]
    [(name, text)] = unet.baked.items()
    assert (name, text.shape) == ("encoder_hidden_states", unet.shapes[name])
    weights = sum(
        math.prod(shape) * 2
        for key, shape in read_shapes(half_bundle.weights_path("unet")).items()
        if ".attn2.to_k." in key or ".attn2.to_v." in key
    )
    open_, baked = (builder.ensure(spec).stat().st_size for spec in (replace(unet, baked={}), unet))
    assert weights > 0
    assert open_ - baked > 0.8 * weights
    assert builder.key(unet) != builder.key(replace(unet, baked={name: text + 1}))


def test_the_unet_is_built_at_twice_the_batch(clip_bundle: Bundle, builder: EngineBuilder) -> None:
    builder = EngineBuilder(trt, RTX, ("sm89",), cache=builder.cache)  # two GPUs are the test's above
    [unet] = [s for s in plan(str(clip_bundle.path)).engines(glue=False) if s.name == "unet"]
    doubled = replace(unet, shapes={port: (2, *shape[1:]) for port, shape in unet.shapes.items()})
    assert builder.ensure(doubled) != builder.ensure(unet)
