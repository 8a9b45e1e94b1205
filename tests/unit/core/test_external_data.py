"""What a graph reads from outside, against onnx's own reading of the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, save_model

from std_rt.core.external_data import external_locations


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
