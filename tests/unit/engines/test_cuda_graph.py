"""What CUDA's kernels are given in place of a graph of a later opset; computed here on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from std_rt.core.bundle import load_bundle
from std_rt.core.errors import BackendError
from std_rt.engines.glue import GLUE, glue_spec
from std_rt.engines.onnxruntime import cuda
from std_rt.engines.onnxruntime.cuda_graph import for_cuda
from std_rt.engines.protocol import Array, GraphSpec

WIDTH = 16
GRAPH = f"""
<ir_version: 10, opset_import: ["" : 23]>
block (float16[2, 5, {WIDTH}] x) => (float16[2, 5, {WIDTH}] y) {{
    wide = Cast <to = 1> (x)
    normed = LayerNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> (wide, gamma, beta)
    half = Cast <to = 10> (normed)
    seen = Attention <q_num_heads = 4, kv_num_heads = 4, scale = 0.4> (half, half, x)
    again = Cast <to = 1> (seen)
    exact = LayerNormalization <axis = -1> (again, gamma)
    summed = Add (exact, again)
    y = Cast <to = 10> (summed)
}}
"""


def made(text: str = GRAPH) -> Any:
    """A block of a transformer in fp16 with norms in fp32, the second of which is read in fp32 too."""
    rng, model = np.random.default_rng(0), onnx.parser.parse_model(text)
    for name in ("gamma", "beta"):
        weight = rng.standard_normal(WIDTH).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    return model


def result(model: Any, x: Array) -> Array:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0], np.float32)


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_attention_and_norms_are_written_for_the_kernels_that_there_are() -> None:
    model, x = made(), np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype(np.float16) * 30
    wanted = result(model, x)
    for_cuda(model, 20)
    assert {(each.domain, each.version) for each in model.opset_import} == {("", 20), ("com.microsoft", 1)}
    # The casts that are left: two of the weights, and those around the norm that is read in fp32.
    norm, attention = ["Cast", "Cast", "LayerNormalization"], ["MultiHeadAttention"]
    assert kinds(model) == [*norm, *attention, "Cast", "LayerNormalization", "Add", "Cast"]
    np.testing.assert_allclose(result(model, x), wanted, rtol=4e-3, atol=2e-2)


@pytest.mark.parametrize(
    "other",
    [
        GRAPH.replace('"" : 23', '"" : 20'),
        GRAPH.replace("kv_num_heads = 4", "kv_num_heads = 2"),
        GRAPH.replace("scale = 0.4", "scale = 0.4, is_causal = 1"),
        GRAPH.replace("(half, half, x)", "(half, half, x, mask)"),
    ],
)
def test_other_graphs_stay_as_they_are(other: str) -> None:
    model = made(other)
    before = model.SerializeToString()
    for_cuda(model, 20)
    assert model.SerializeToString() == before


def test_graphs_in_the_box_are_not_rewritten() -> None:
    bundle = load_bundle("std-tiny")
    specs = [GraphSpec(name, bundle.graph_path(name), {}, "") for name in bundle.manifest["graphs"]]
    for spec in [*specs, *(glue_spec(op, {}) for op in GLUE)]:
        assert cuda._graph(spec) is None


def test_a_missing_package_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "unet.onnx").write_bytes(made().SerializeToString())
    spec = GraphSpec("unet", tmp_path / "unet.onnx", {"x": (2, 5, WIDTH)}, "", compute="fp16")
    graph = cuda._graph(spec)
    assert graph is not None
    assert "MultiHeadAttention" in kinds(onnx.load_from_string(graph))
    spec.path.write_bytes(b"not onnx")
    with pytest.raises(BackendError, match=r"cannot run graph 'unet' .*: unet\.onnx is not a readable ONNX"):
        cuda._graph(spec)
    spec.path.write_bytes(made().SerializeToString())
    monkeypatch.setitem(sys.modules, "onnx", None)  # as where it is not installed
    with pytest.raises(BackendError, match=r"'unet' is opened with the onnx package; run: pip install onnx"):
        cuda._graph(spec)


def test_norms_that_are_read_elsewhere_too_stay_in_fp32() -> None:
    """In a branch, or by whoever runs the graph; a norm without a bias has nothing to cast there."""
    text = GRAPH.replace(
        "y = Cast <to = 10> (summed)",
        """
    zero = Constant <value_float = 0.0> ()
    yes = Greater (zero, zero)
    chosen = If (yes) <then_branch = a () => (float[2, 5, 16] p) { p = Identity (normed) },
                       else_branch = b () => (float[2, 5, 16] q) { q = Identity (wide) }>
    bare = LayerNormalization <axis = -1> (chosen, gamma)
    more = Add (bare, summed)
    y = Cast <to = 10> (more)""",
    )
    model, x = made(text), np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype(np.float16)
    shown = onnx.helper.make_tensor_value_info("normed", onnx.TensorProto.FLOAT, [2, 5, WIDTH])
    model.graph.output.append(shown)
    wanted = result(model, x)
    for_cuda(model, 20)
    np.testing.assert_allclose(result(model, x), wanted, rtol=4e-3, atol=2e-2)
