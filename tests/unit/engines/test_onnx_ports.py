"""Ports of an ONNX file, read without the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, load, numpy_helper

from std_rt.core.bundle import load_bundle
from std_rt.engines.glue import glue_path
from std_rt.engines.onnx_ports import Declared, axis_values, fixed_shapes, read_ports
from std_rt.engines.program import GLUE

BUILT_IN = load_bundle(None, verify=False)
FILES = [BUILT_IN.graph_path(name) for name in BUILT_IN.manifest["graphs"]] + [glue_path(op) for op in GLUE]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_reads_what_the_onnx_package_reads(path: Path) -> None:
    graph = load(path, load_external_data=False).graph
    found = read_ports(path)
    for ours, theirs in ((found.inputs, graph.input), (found.outputs, graph.output)):
        assert list(ours) == [port.name for port in theirs]
        for port in theirs:
            axes = port.type.tensor_type.shape.dim
            wanted = tuple(axis.dim_param or axis.dim_value for axis in axes)
            assert ours[port.name] == Declared(port.type.tensor_type.elem_type, wanted)


def test_weights_and_unnamed_axes_are_passed_over(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [None, "batch", 3])
    weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [], [weights])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT16, []))
    (tmp_path / "g.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    found = read_ports(tmp_path / "g.onnx")
    assert found.inputs == {"x": Declared(10, (None, "batch", 3))}
    assert found.outputs == {"y": Declared(10, ())}


@pytest.mark.parametrize("content", [b"", b"not onnx", FILES[0].read_bytes()[:200]])
def test_what_is_not_onnx_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"g\.onnx is not a readable ONNX file"):
        read_ports(path)


INPUTS = {"a": Declared(1, ("batch", 3, "width")), "b": Declared(1, ("batch", None))}


def test_named_axes_take_the_values_of_the_shapes() -> None:
    assert axis_values(INPUTS, {"a": (2, 3, 8), "b": (2, 5)}) == {"batch": 2, "width": 8}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a": (2, 3, 8), "b": (1, 5)}, "axis batch of b cannot be 1; it is 2"),
        ({"a": (2, 4, 8), "b": (2, 5)}, "axis 3 of a cannot be 4; it is 3"),
        ({"a": (2, 3), "b": (2, 5)}, "a has 3 axes, not 2"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        axis_values(INPUTS, shapes)


def test_outputs_are_known_where_their_axes_are() -> None:
    values = {"batch": 2, "width": 8}
    assert fixed_shapes({"y": Declared(1, ("batch", 1, "width"))}, values) == {"y": (2, 1, 8)}
    assert fixed_shapes({"y": Declared(1, ("batch", "other"))}, values) is None
    assert fixed_shapes({"y": Declared(1, (None,))}, values) is None
