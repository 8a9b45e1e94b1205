"""Graphs around a prompt that never changes: what becomes a constant, and what stays as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

from std_rt.core.errors import BackendError
from std_rt.engines import GraphSpec, open_engine
from std_rt.engines.baked_inputs import baked_graph
from std_rt.engines.protocol import Array

TEXT, ROWS, WIDTH = "encoder_hidden_states", 2, 64
GRAPH = f"""
<ir_version: 10, opset_import: ["" : 20]>
unet (float[B, 3, {WIDTH}] {TEXT}, float16[B, 3, 8] sample, bool flag) => (float16[B, 3, 8] noise_pred) {{
    half = Cast <to = 10> ({TEXT})
    for_keys = Transpose <perm = [1, 0]> (key_weight)
    keys = MatMul (half, for_keys)
    values = MatMul (half, value_weight)
    query = MatMul (sample, query_weight)
    score = Mul (query, keys)
    seen = Add (score, values)
    pooled = ReduceMean <keepdims = 1> ({TEXT})
    pooled_half = Cast <to = 10> (pooled)
    branched = If (flag) <
        then_branch = chosen () => (float16[B, 3, 8] first) {{ first = Add (values, values) }},
        else_branch = other () => (float16[B, 3, 8] second) {{ second = Identity (keys) }}
    >
    added = Add (seen, pooled_half)
    noise_pred = Add (added, branched)
}}
"""


@pytest.fixture
def text() -> Array:
    return np.random.default_rng(1).standard_normal((ROWS, 3, WIDTH)).astype(np.float32)


def write(folder: Path, text: Array, location: str = "unet.bin") -> GraphSpec:
    """A graph that reads a prompt as keys, as values, in branches and by itself; its weights in a file."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(GRAPH)
    shapes = {"key_weight": (8, WIDTH), "value_weight": (WIDTH, 8), "query_weight": (8, 8)}
    data = b""
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape).astype(np.float16)
        tensor = numpy_helper.from_array(weight, name)
        set_external_data(tensor, location, len(data), weight.nbytes)
        data += weight.tobytes()
        model.graph.initializer.append(tensor)
    (folder / location).write_bytes(data)
    (folder / "unet.onnx").write_bytes(model.SerializeToString())
    ports = {TEXT: text.shape, "sample": (ROWS, 3, 8), "flag": ()}
    return GraphSpec("unet", folder / "unet.onnx", ports, "", compute="fp16", baked={TEXT: text})


def result(spec: GraphSpec, text: Array, *, flag: bool) -> Array:
    """What ONNX Runtime makes of a prompt."""
    sample = np.random.default_rng(2).standard_normal((ROWS, 3, 8)).astype(np.float16)
    engine = open_engine("onnxruntime", spec)
    return engine(**{TEXT: text, "sample": sample, "flag": np.array(flag)})["noise_pred"].astype(np.float32)


@pytest.mark.parametrize("flag", [True, False])
def test_a_baked_prompt_gives_what_it_gives_as_an_input(tmp_path: Path, text: Array, flag: bool) -> None:
    baked = write(tmp_path, text)
    plain = GraphSpec("unet", baked.path, baked.shapes, "", compute="fp16")
    wanted = result(plain, text, flag=flag)
    np.testing.assert_allclose(result(baked, text, flag=flag), wanted, rtol=2e-3, atol=2e-2)
    other = np.zeros_like(text)
    np.testing.assert_array_equal(result(baked, other, flag=flag), result(baked, text, flag=flag))
    assert np.abs(result(plain, other, flag=flag) - wanted).max() > 1


def test_keys_and_values_take_the_place_of_their_weights(tmp_path: Path, text: Array) -> None:
    spec = write(tmp_path, text)
    graph: Any = onnx.load_from_string(baked_graph(spec)).graph
    assert [port.name for port in graph.input] == [TEXT, "sample", "flag"]
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    assert tensors.keys() == {"query_weight", "keys", "values", f"{TEXT}.baked"}
    assert tensors["query_weight"].data_location == onnx.TensorProto.EXTERNAL
    kinds = [node.op_type for node in graph.node]
    assert kinds == ["MatMul", "Mul", "Add", "ReduceMean", "Cast", "If", "Add", "Add"]
    read = np.fromfile(tmp_path / "unet.bin", np.float16)[: 8 * WIDTH].reshape(8, WIDTH)
    exact = text.astype(np.float16).astype(np.float64) @ read.astype(np.float64).T
    keys = numpy_helper.to_array(tensors["keys"])
    assert keys.dtype == np.float16
    assert np.abs(keys - exact).max() <= np.spacing(np.float16(np.abs(exact).max())) / 2


def test_keys_and_values_in_bf16_are_numbers(tmp_path: Path, text: Array) -> None:
    """As TensorRT takes them; older versions of the onnx package returned their bits as integers."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        unet (float[B, 3, 64] encoder_hidden_states, bfloat16[B, 3, 8] sample) => (bfloat16[B, 3, 8] y) {
            text = Cast <to = 16> (encoder_hidden_states)
            keys = MatMul (text, weight)
            y = Add (sample, keys)
        }""")
    weight = np.random.default_rng(0).standard_normal((WIDTH, 8)).astype(np.float32)
    model.graph.initializer.append(
        onnx.helper.make_tensor("weight", TensorProto.BFLOAT16, weight.shape, weight)
    )
    (tmp_path / "unet.onnx").write_bytes(model.SerializeToString())
    shapes = {TEXT: text.shape, "sample": (ROWS, 3, 8)}
    spec = GraphSpec("unet", tmp_path / "unet.onnx", shapes, "", compute="bf16", baked={TEXT: text})
    [keys] = onnx.load_from_string(baked_graph(spec)).graph.initializer
    assert (keys.name, keys.data_type) == ("keys", TensorProto.BFLOAT16)
    found = numpy_helper.to_array(keys).astype(np.float32)
    assert np.abs(found - text @ weight).max() < 0.03 * np.abs(found).max()


def test_weights_that_one_node_cuts_from_one_are_left_to_the_backend(tmp_path: Path, text: Array) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        unet (float[B, 3, 64] encoder_hidden_states) => (float[B, 3, 8] y) {
            for_keys, for_values = Split <axis = 1, num_outputs = 2> (both)
            keys = MatMul (encoder_hidden_states, for_keys)
            values = MatMul (encoder_hidden_states, for_values)
            y = Add (keys, values)
        }""")
    weight = np.random.default_rng(0).standard_normal((WIDTH, 16)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "both"))
    (tmp_path / "unet.onnx").write_bytes(model.SerializeToString())
    spec = GraphSpec("unet", tmp_path / "unet.onnx", {TEXT: text.shape}, "", baked={TEXT: text})
    found = open_engine("onnxruntime", spec)(**{TEXT: text})["y"]
    np.testing.assert_allclose(found, text @ weight[:, :8] + text @ weight[:, 8:], atol=1e-4)


def test_weights_outside_the_folder_are_refused(tmp_path: Path, text: Array) -> None:
    (tmp_path / "bundle").mkdir()
    spec = write(tmp_path / "bundle", text, "../unet.bin")
    for use in (baked_graph, lambda spec: open_engine("onnxruntime", spec)):
        with pytest.raises(BackendError, match=r"graph 'unet' cannot be read: .*unet\.bin") as refused:
            use(spec)
        assert "\n" not in str(refused.value)


def test_weights_with_a_second_name_are_read(tmp_path: Path, text: Array) -> None:
    """Installers make hard links, and the onnx package refuses them."""
    spec = write(tmp_path, text)
    expected = baked_graph(spec)
    os.link(tmp_path / "unet.bin", tmp_path / "second.bin")
    assert baked_graph(spec) == expected


def test_weights_that_are_cut_off_are_one_line(tmp_path: Path, text: Array) -> None:
    spec = write(tmp_path, text)
    weights = (tmp_path / "unet.bin").read_bytes()
    (tmp_path / "unet.bin").write_bytes(weights[:WIDTH])
    with pytest.raises(BackendError, match=r"graph 'unet' cannot be read: .*; export it again"):
        baked_graph(spec)


def test_a_broken_file_is_one_line(tmp_path: Path, text: Array) -> None:
    spec = write(tmp_path, text)
    spec.path.write_bytes(spec.path.read_bytes()[:100])
    with pytest.raises(BackendError, match=r"graph 'unet' cannot be read: .*; export it again"):
        baked_graph(spec)
