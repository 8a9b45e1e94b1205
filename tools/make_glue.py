"""The generator of the glue graphs: one tiny ONNX file per operation in `std_rt.engines.glue`.

    python -m tools.make_glue

The same bytes every time; a test compares them with the shipped files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from std_rt.engines.glue import GLUE, glue_folder

__all__ = ["make_glue", "write_glue"]

OPSET = 20
_IR_VERSION = 10  # what opset 20 needs; newer ones shut out older runtimes
_TO_IMAGE, _TO_FRAME = (0, 3, 1, 2), (0, 2, 3, 1)


def make_glue() -> dict[str, bytes]:
    """Operation -> its ONNX file."""
    models = {op: _model(op) for op in GLUE}
    for model in models.values():
        checker.check_model(model, full_check=True)
    return {op: model.SerializeToString(deterministic=True) for op, model in models.items()}


def make_matmul() -> bytes:
    """A product of two fp16 matrices: what `std_rt.evaluation.gpu_check` measures a GPU's peak with."""

    def port(name: str, *axes: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT16, axes)

    node = helper.make_node("MatMul", ["a", "b"], ["out"])
    graph = helper.make_graph(
        [node], "matmul", [port("a", "m", "k"), port("b", "k", "n")], [port("out", "m", "n")]
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="std-rt")
    checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def write_glue(folder: Path) -> None:
    """Write every file to ``folder``, and the matrix product beside it."""
    (folder.parent / "gpu" / "matmul.onnx").write_bytes(make_matmul())
    for op, content in make_glue().items():
        (folder / f"{op}.onnx").write_bytes(content)


def _nodes(op: str) -> list[NodeProto]:
    node = helper.make_node
    match op:
        case "frame_in":  # cast first: TensorRT knows uint8 only at the border of a network
            return [
                node("Cast", ["frame"], ["numbers"], to=TensorProto.FLOAT),
                node("Transpose", ["numbers"], ["planes"], perm=_TO_IMAGE),
                node("Mul", ["planes", "scale"], ["scaled"]),
                node("Sub", ["scaled", "one"], ["image"]),
            ]
        case "frame_out":  # floor before the cast: backends disagree about which way a cast rounds
            return [
                node("Mul", ["image", "scale"], ["scaled"]),
                node("Add", ["scaled", "shift"], ["shifted"]),
                node("Clip", ["shifted", "low", "high"], ["clipped"]),
                node("Floor", ["clipped"], ["whole"]),
                node("Transpose", ["whole"], ["pixels"], perm=_TO_FRAME),
                node("Cast", ["pixels"], ["frame"], to=TensorProto.UINT8),
            ]
        case "combine2":
            return [
                node("Mul", ["x", "a"], ["ax"]),
                node("Mul", ["y", "b"], ["by"]),
                node("Add", ["ax", "by"], ["out"]),
            ]
        case "combine3":
            return [
                node("Mul", ["x", "a"], ["ax"]),
                node("Mul", ["y", "b"], ["by"]),
                node("Mul", ["z", "c"], ["cz"]),
                node("Add", ["ax", "by"], ["sum1"]),
                node("Add", ["sum1", "cz"], ["out"]),
            ]
        case "blend":
            return [
                node("Mul", ["x", "mask"], ["painted"]),
                node("Sub", ["one", "mask"], ["rest"]),
                node("Mul", ["rest", "y"], ["kept"]),
                node("Add", ["painted", "kept"], ["out"]),
            ]
        case "double":
            return [node("Concat", ["x", "x"], ["out"], axis=0)]
        case "halves":
            return [node("Split", ["x"], ["first", "second"], axis=0, num_outputs=2)]
        case "join":
            return [node("Concat", ["x", "y"], ["out"], axis=0)]
        case "split_last":  # two slices: Split would need the number of rows, which is open here
            return [
                node("Slice", ["x", "start", "minus_one", "axis"], ["rest"]),
                node("Slice", ["x", "minus_one", "end", "axis"], ["last"]),
            ]
    raise ValueError(f"no ONNX nodes are written for the operation {op!r}")


def _constants(op: str) -> dict[str, Any]:
    match op:
        case "frame_in":
            return {"scale": np.float32(1 / 127.5), "one": np.float32(1)}
        case "frame_out":
            scalars = {"scale": 127.5, "shift": 128, "low": 0, "high": 255}
            return {name: np.float32(value) for name, value in scalars.items()}
        case "blend":
            return {"one": np.float32(1)}
        case "split_last":
            bounds = {"start": 0, "minus_one": -1, "end": np.iinfo(np.int64).max, "axis": 0}
            return {name: np.array([value], np.int64) for name, value in bounds.items()}
    return {}


def _model(op: str) -> ModelProto:
    graph = helper.make_graph(
        _nodes(op),
        op,
        [_port(*item) for item in GLUE[op].inputs.items()],
        [_port(*item) for item in GLUE[op].outputs.items()],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in _constants(op).items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, producer_name="std-rt", opset_imports=opsets, ir_version=_IR_VERSION)


def _port(name: str, axes: tuple[str | int, ...]) -> ValueInfoProto:
    kind = TensorProto.UINT8 if name == "frame" else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, axes)


if __name__ == "__main__":
    write_glue(glue_folder())
