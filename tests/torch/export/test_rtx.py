"""What export writes, TensorRT-RTX builds: every graph, at batch 1 and as guidance calls it.

It refuses graphs that mix number formats, so this is a gate for export. No GPU is needed.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx")

import numpy as np
import onnx_ir as ir
import tensorrt_rtx as trt
import torch
from safetensors.torch import load_file

from std_rt.cli.engines import plan
from std_rt.core.bundle import Bundle
from std_rt.engines.cache import EngineCache
from std_rt.engines.tensorrt.baked_inputs import bake
from std_rt.engines.tensorrt.engine_builder import EngineBuilder
from std_rt.engines.tensorrt.onnx_to_engine import RTX, make_logger
from std_rt.export.quantize_graph import weighted_layers


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


def test_an_engine_for_another_prompt_is_another_engine(half_bundle: Bundle, builder: EngineBuilder) -> None:
    [unet] = [s for s in plan(str(half_bundle.path)).engines(glue=False) if s.name == "unet"]
    [(name, text)] = unet.baked.items()
    assert (name, text.shape) == ("encoder_hidden_states", unet.shapes[name])
    builder = EngineBuilder(trt, RTX, ("sm89",), cache=builder.cache)
    others = [replace(unet, baked={}), replace(unet, baked={name: text + 1})]
    assert len({builder.ensure(spec) for spec in (unet, *others)}) == 3


@pytest.mark.parametrize("rows", [1, 2])
def test_keys_and_values_of_a_baked_prompt_become_constants(half_bundle: Bundle, rows: int) -> None:
    """Each is the text times a weight, as torch computes it, and whatever read it reads the constant."""
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(half_bundle.graph_path("unet")))
    [unet] = [s for s in plan(str(half_bundle.path)).engines(glue=False) if s.name == "unet"]
    for port in (network.get_input(i) for i in range(network.num_inputs)):
        port.shape = (rows, *unet.shapes[port.name][1:])
    text = np.repeat(unet.baked["encoder_hidden_states"], rows, 0)
    inputs = [(layer, i, layer.get_input(i)) for layer in layers_of(network) for i in range(layer.num_inputs)]
    names = [(layer, i, tensor.name) for layer, i, tensor in inputs if tensor is not None]
    constants = bake(trt, network, {"encoder_hidden_states": text})
    read = [(layer, i, name) for layer, i, name in names if name in constants]
    state = load_file(half_bundle.weights_path("unet"))
    layers = weighted_layers(model := ir.load(half_bundle.graph_path("unet")))
    weights = {str(node.outputs[0].name): layers[node.name][1] for node in model.graph if node.name in layers}
    found = {name: value for name, value in constants.items() if name in weights}
    wanted = [key for key in state if re.search(r"attn2\.to_[kv]\.weight", key)]
    assert sorted(weights[name] for name in found) == sorted(wanted) != []
    for name, value in found.items():
        product = torch.from_numpy(text) @ state[weights[name]].float().T
        assert value.dtype == np.float16
        assert np.abs(value - product.numpy()).max() < 5e-3
    makers = {layer.get_output(0).name: layer for layer in layers_of(network) if layer.num_outputs}
    for layer, index, name in read:
        if layer.get_output(0).name not in constants:  # what only makes another constant goes away by itself
            constant = makers[layer.get_input(index).name]
            constant.__class__ = trt.IConstantLayer
            np.testing.assert_array_equal(np.ravel(constant.weights), constants[name].ravel())


def layers_of(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]


def test_the_unet_is_built_at_twice_the_batch(clip_bundle: Bundle, builder: EngineBuilder) -> None:
    builder = EngineBuilder(trt, RTX, ("sm89",), cache=builder.cache)  # two GPUs are the test's above
    [unet] = [s for s in plan(str(clip_bundle.path)).engines(glue=False) if s.name == "unet"]
    doubled = replace(unet, shapes={port: (2, *shape[1:]) for port, shape in unet.shapes.items()})
    assert builder.ensure(doubled) != builder.ensure(unet)
