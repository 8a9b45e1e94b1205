"""What export writes, TensorRT-RTX builds: every graph, for two GPUs, at batch 1 and as guidance calls it.

It refuses graphs that mix number formats, so this is a gate for export. No GPU is needed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx")

import tensorrt_rtx as trt

from std_rt.cli.engines_run import Wanted, plan
from std_rt.core.bundle import Bundle
from std_rt.engines.cache import EngineStore
from std_rt.engines.tensorrt.build import RTX
from std_rt.engines.tensorrt.maker import EngineMaker


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineMaker:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "data"))
    return EngineMaker(trt, RTX, ("sm89", "sm120"), store=EngineStore.open())


@pytest.mark.parametrize("name", ["clip_bundle", "own_bundle"])
def test_every_graph_is_built_for_two_gpus(
    name: str, request: pytest.FixtureRequest, maker: EngineMaker
) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    specs = plan(Wanted(bundle=str(bundle.path))).engines(glue=False)
    assert {spec.name for spec in specs} == {"style_encoder", "vae_encoder", "unet", "vae_decoder"}
    for spec in specs:
        assert maker.ensure(spec).stat().st_size > 0.5 * bundle.weights_path(spec.name).stat().st_size
    assert maker.store is not None
    assert {entry.key.bundle for entry in maker.store.entries()} == {bundle.digest}


def test_the_unet_is_built_at_twice_the_batch(clip_bundle: Bundle, maker: EngineMaker) -> None:
    maker = EngineMaker(trt, RTX, ("sm89",), store=maker.store)  # two GPUs are the test's above
    [unet] = [s for s in plan(Wanted(bundle=str(clip_bundle.path))).engines(glue=False) if s.name == "unet"]
    doubled = replace(unet, shapes={port: (2, *shape[1:]) for port, shape in unet.shapes.items()})
    assert maker.ensure(doubled) != maker.ensure(unet)
