"""What export writes, TensorRT-RTX builds: every graph, at batch 1 and as guidance calls it.

It refuses graphs that mix number formats, so this is a gate for export. No GPU is needed.
"""

from __future__ import annotations

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


def test_an_engine_for_another_prompt_is_another_engine_and_smaller_than_one_for_all(
    half_bundle: Bundle, builder: EngineBuilder
) -> None:
    [unet] = [s for s in plan(str(half_bundle.path)).engines(glue=False) if s.name == "unet"]
    [(name, text)] = unet.baked.items()
    assert (name, text.shape) == ("encoder_hidden_states", unet.shapes[name])
    builder = EngineBuilder(trt, RTX, ("sm89",), cache=builder.cache)
    others = [replace(unet, baked={}), replace(unet, baked={name: text + 1})]
    engines = [builder.ensure(spec) for spec in (unet, *others)]
    assert len(set(engines)) == 3
    baked, plain, other = (path.stat().st_size for path in engines)
    assert max(baked, other) < plain  # keys and values are smaller than the weights that make them


def test_the_unet_is_built_at_twice_the_batch(clip_bundle: Bundle, builder: EngineBuilder) -> None:
    builder = EngineBuilder(trt, RTX, ("sm89",), cache=builder.cache)  # two GPUs are the test's above
    [unet] = [s for s in plan(str(clip_bundle.path)).engines(glue=False) if s.name == "unet"]
    doubled = replace(unet, shapes={port: (2, *shape[1:]) for port, shape in unet.shapes.items()})
    assert builder.ensure(doubled) != builder.ensure(unet)
