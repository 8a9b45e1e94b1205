"""ONNX files against the onnx package's own reading: where weights come from, and ports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, load, numpy_helper, save_model

from std_rt.core.bundle import load_bundle
from std_rt.core.onnx_file import axis_values, external_locations, fixed_shapes, read_opset, read_ports
from std_rt.engines.glue import GLUE, glue_path

BUILT_IN = load_bundle(None, verify=False)
FILES = [BUILT_IN.graph_path(name) for name in BUILT_IN.manifest["graphs"]] + [glue_path(op) for op in GLUE]


def _external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "8"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _save(path: Path, nodes: list, initializers: list[TensorProto]) -> Path:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    path.write_bytes(
        helper.make_model(helper.make_graph(nodes, "g", [], [output], initializers)).SerializeToString()
    )
    return path


def test_locations_of_initializers_attributes_and_subgraphs_are_found(tmp_path: Path) -> None:
    inner_out = helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])], "inner", [], [inner_out], [_external("w", "inner.bin")]
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], value=_external("c", "attribute.bin")),
        helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner),
    ]
    path = _save(tmp_path / "g.onnx", nodes, [_external("a", "../../secret")])
    assert external_locations(path) == {"inner.bin", "attribute.bin", "../../secret"}


def test_a_graph_with_its_weights_inside_reads_nothing(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.ones(4, np.float32), "w")]
    path = _save(tmp_path / "g.onnx", [helper.make_node("Identity", ["w"], ["y"])], weights)
    assert external_locations(path) == set()


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "g.onnx", [helper.make_node("Identity", ["w"], ["y"])], [_external("w", "w.bin")])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"g\.onnx is not a readable ONNX file"):
        external_locations(path)


@given(data=st.binary(max_size=200))
def test_any_bytes_give_locations_or_a_value_error(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(data)
    try:
        found = external_locations(path)
    except ValueError:
        return
    assert all(isinstance(location, str) for location in found)


def test_external_data_that_onnx_itself_writes(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.ones(4096, np.float32), "w")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4096])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], weights)
    save_model(helper.make_model(graph), tmp_path / "g.onnx", save_as_external_data=True, location="w.data")
    assert external_locations(tmp_path / "g.onnx") == {"w.data"}


# --- ports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_reads_what_the_onnx_package_reads(path: Path) -> None:
    graph = load(path, load_external_data=False).graph
    found = read_ports(path)
    for ours, theirs in ((found.inputs, graph.input), (found.outputs, graph.output)):
        assert list(ours) == [port.name for port in theirs]
        for port in theirs:
            axes = port.type.tensor_type.shape.dim
            wanted = tuple(axis.dim_param or axis.dim_value for axis in axes)
            assert ours[port.name] == wanted


def test_weights_and_unnamed_axes_are_passed_over(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [None, "batch", 3])
    weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [], [weights])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT16, []))
    (tmp_path / "g.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    found = read_ports(tmp_path / "g.onnx")
    assert found.inputs == {"x": (None, "batch", 3)}
    assert found.outputs == {"y": ()}


@pytest.mark.parametrize("content", [b"", b"not onnx", FILES[0].read_bytes()[:200]])
def test_what_is_not_onnx_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"g\.onnx is not a readable ONNX file"):
        read_ports(path)
    with pytest.raises(ValueError, match=r"g\.onnx (is not a readable ONNX file|names no opset)"):
        read_opset(path)


def test_the_opset_is_that_of_onnxs_own_operators(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", 23)]
    graph = helper.make_graph([], "g", [], [])
    path = tmp_path / "g.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())
    assert read_opset(path) == 23


INPUTS = {"a": ("batch", 3, "width"), "b": ("batch", None)}


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
    assert fixed_shapes({"y": ("batch", 1, "width")}, values) == {"y": (2, 1, 8)}
    assert fixed_shapes({"y": ("batch", "other")}, values) is None
    assert fixed_shapes({"y": (None,)}, values) is None
