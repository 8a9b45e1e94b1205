"""The keys and values of a baked prompt, in the graph that export writes."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.numpy_helper import to_array
from safetensors.torch import load_file

from std_rt.cli.engines import plan
from std_rt.core.bundle import Bundle
from std_rt.engines import GraphSpec, open_engine
from std_rt.engines.baked_inputs import baked_graph
from std_rt.engines.onnxruntime import cuda
from std_rt.engines.onnxruntime.ort_session import CPU, open_session
from std_rt.export.quantize_graph import weighted_layers

TEXT = "encoder_hidden_states"
KERNELS = {
    *("Add", "Cast", "Concat", "Conv", "Cos", "Div", "Expand", "Gelu", "Gemm", "InstanceNormalization"),
    *("LayerNormalization", "MatMul", "Mul", "MultiHeadAttention", "Reshape", "Resize", "Shape", "Sigmoid"),
    *("Sin", "Slice", "Softmax", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}


@pytest.fixture(params=[1, 2])
def unet(half_bundle: Bundle, request: pytest.FixtureRequest) -> GraphSpec:
    """For one frame or two a call."""
    [spec] = [s for s in plan(str(half_bundle.path)).engines(glue=False) if s.name == "unet"]
    rows = request.param
    shapes = {port: (rows, *shape[1:]) for port, shape in spec.shapes.items()}
    return replace(spec, shapes=shapes, baked={TEXT: np.repeat(spec.baked[TEXT], rows, 0)})


def test_each_is_the_text_times_a_weight_as_torch_computes_it(half_bundle: Bundle, unet: GraphSpec) -> None:
    state = load_file(half_bundle.weights_path("unet"))
    layers = weighted_layers(model := ir.load(unet.path))
    weights = {str(node.outputs[0].name): layers[node.name][1] for node in model.graph if node.name in layers}
    graph = onnx.load_from_string(baked_graph(unet)).graph
    found = {tensor.name: to_array(tensor) for tensor in graph.initializer if tensor.name in weights}
    wanted = [key for key in state if re.search(r"attn2\.to_[kv]\.weight", key)]
    assert sorted(weights[name] for name in found) == sorted(wanted) != []
    others = {tensor.name for tensor in graph.initializer if tensor.external_data}
    assert others.isdisjoint(found)
    assert len(others) > len(found)
    for name, value in found.items():
        product = torch.from_numpy(unet.baked[TEXT]) @ state[weights[name]].float().T
        assert value.dtype == np.float16
        assert np.abs(value - product.numpy()).max() < 5e-3
    assert TEXT not in {name for node in graph.node for name in node.input}


def test_cuda_is_given_operators_that_it_has_kernels_for(unet: GraphSpec) -> None:
    """And they compute the same, on the CPU here. Which have kernels was seen with `tools.cuda_placement`."""
    graph = cuda._graph(unet)
    assert graph is not None
    model = onnx.load_from_string(graph)
    assert {(each.domain, each.version) for each in model.opset_import} == {("", 20), ("com.microsoft", 1)}
    assert {node.op_type for node in model.graph.node} <= KERNELS
    rng = np.random.default_rng(0)
    plain = open_engine("onnxruntime", replace(unet, baked={}))
    given = {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in plain.inputs.items()}
    given[TEXT] = np.ascontiguousarray(unet.baked[TEXT])
    session = open_session(unet, CPU, graph)
    [found] = session.run(["noise_pred"], given)
    wanted = plain(**given)["noise_pred"]
    np.testing.assert_allclose(found, wanted, atol=5e-3 * np.abs(wanted).max())


def test_the_network_predicts_what_it_does_with_the_prompt_as_an_input(unet: GraphSpec) -> None:
    rng = np.random.default_rng(0)
    baked, plain = open_engine("onnxruntime", unet), open_engine("onnxruntime", replace(unet, baked={}))
    assert baked.inputs == plain.inputs
    given = {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in plain.inputs.items()}
    given[TEXT] = np.ascontiguousarray(unet.baked[TEXT])
    wanted = plain(**given)["noise_pred"]
    np.testing.assert_allclose(baked(**given)["noise_pred"], wanted, atol=5e-3)
    given[TEXT] = given[TEXT] + 1
    np.testing.assert_allclose(baked(**given)["noise_pred"], wanted, atol=5e-3)
    assert np.abs(plain(**given)["noise_pred"] - wanted).max() > 0.02
