"""Make the ONNX files of `std_rt.engines.glue`: one tiny graph for each operation between graphs.

    python -m std_rt.export.glue

The same bytes every time; a test compares them with those that are shipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from std_rt.engines.glue import glue_folder

__all__ = ["make_glue", "write_glue"]

OPSET = 20
_IR_VERSION = 10  # what opset 20 needs; newer ones shut out older runtimes

Axes = tuple[str | int, ...]
_FRAME: Axes = ("batch", "height", "width", 3)
_IMAGE: Axes = ("batch", 3, "height", "width")
_LATENTS: Axes = ("batch", "channels", "height", "width")
_TWICE: Axes = ("double_batch", "channels", "height", "width")
_REST: Axes = ("rest", "channels", "height", "width")
_ALL: Axes = ("all", "channels", "height", "width")
_ONE: Axes = (1, "channels", "height", "width")
_FACTOR: Axes = ("batch", 1, 1, 1)
_TO_IMAGE, _TO_FRAME = (0, 3, 1, 2), (0, 2, 3, 1)


def make_glue() -> dict[str, bytes]:
    """Operation -> its ONNX file."""
    models = {
        "frame_in": _frame_in(),
        "frame_out": _frame_out(),
        "combine2": _combine("xy", "ab"),
        "combine3": _combine("xyz", "abc"),
        "double": _double(),
        "halves": _halves(),
        "join": _join(),
        "split_last": _split_last(),
    }
    for model in models.values():
        checker.check_model(model, full_check=True)
    return {op: model.SerializeToString(deterministic=True) for op, model in models.items()}


def write_glue(folder: Path) -> None:
    """Write every file to ``folder``."""
    for op, content in make_glue().items():
        (folder / f"{op}.onnx").write_bytes(content)


def _frame_in() -> ModelProto:
    """Cast first: TensorRT knows uint8 at the border of a network only."""
    nodes = [
        helper.make_node("Cast", ["frame"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["numbers"], ["planes"], perm=_TO_IMAGE),
        helper.make_node("Mul", ["planes", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], ["image"]),
    ]
    scalars = {"scale": np.float32(1 / 127.5), "one": np.float32(1)}
    return _model("frame_in", nodes, {"frame": _FRAME}, {"image": _IMAGE}, scalars)


def _frame_out() -> ModelProto:
    """Floor before the cast: backends disagree about which way a cast rounds."""
    nodes = [
        helper.make_node("Mul", ["image", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["shifted"]),
        helper.make_node("Clip", ["shifted", "low", "high"], ["clipped"]),
        helper.make_node("Floor", ["clipped"], ["whole"]),
        helper.make_node("Transpose", ["whole"], ["pixels"], perm=_TO_FRAME),
        helper.make_node("Cast", ["pixels"], ["frame"], to=TensorProto.UINT8),
    ]
    scalars = {
        "scale": np.float32(127.5),
        "shift": np.float32(128),
        "low": np.float32(0),
        "high": np.float32(255),
    }
    return _model("frame_out", nodes, {"image": _IMAGE}, {"frame": _FRAME}, scalars)


def _combine(arrays: str, factors: str) -> ModelProto:
    """``a x + b y (+ c z)``, added in this order."""
    pairs = list(zip(arrays, factors, strict=True))
    nodes = [helper.make_node("Mul", [array, factor], [f"{factor}{array}"]) for array, factor in pairs]
    terms = [f"{factor}{array}" for array, factor in pairs]
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        result = "out" if i == len(terms) - 1 else f"sum{i}"
        nodes.append(helper.make_node("Add", [total, term], [result]))
        total = result
    inputs = dict.fromkeys(arrays, _LATENTS) | dict.fromkeys(factors, _FACTOR)
    return _model(f"combine{len(arrays)}", nodes, inputs, {"out": _LATENTS}, {})


def _double() -> ModelProto:
    nodes = [helper.make_node("Concat", ["x", "x"], ["out"], axis=0)]
    return _model("double", nodes, {"x": _LATENTS}, {"out": _TWICE}, {})


def _halves() -> ModelProto:
    nodes = [helper.make_node("Split", ["x"], ["first", "second"], axis=0, num_outputs=2)]
    return _model("halves", nodes, {"x": _TWICE}, {"first": _LATENTS, "second": _LATENTS}, {})


def _join() -> ModelProto:
    nodes = [helper.make_node("Concat", ["x", "y"], ["out"], axis=0)]
    return _model("join", nodes, {"x": _LATENTS, "y": _REST}, {"out": _ALL}, {})


def _split_last() -> ModelProto:
    """Two slices: Split would need the number of rows, which is open here."""
    nodes = [
        helper.make_node("Slice", ["x", "start", "minus_one", "axis"], ["rest"]),
        helper.make_node("Slice", ["x", "minus_one", "end", "axis"], ["last"]),
    ]
    bounds = {"start": 0, "minus_one": -1, "end": np.iinfo(np.int64).max, "axis": 0}
    constants = {name: np.array([value], np.int64) for name, value in bounds.items()}
    return _model("split_last", nodes, {"x": _ALL}, {"rest": _REST, "last": _ONE}, constants)


def _model(
    name: str,
    nodes: Iterable[NodeProto],
    inputs: dict[str, Axes],
    outputs: dict[str, Axes],
    values: Mapping[str, np.float32 | NDArray[np.int64]],
) -> ModelProto:
    constants = [numpy_helper.from_array(np.asarray(value), key) for key, value in values.items()]
    graph = helper.make_graph(
        list(nodes),
        name,
        [_port(*item) for item in inputs.items()],
        [_port(*item) for item in outputs.items()],
        constants,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, producer_name="std-rt", opset_imports=opsets, ir_version=_IR_VERSION)


def _port(name: str, axes: Axes) -> ValueInfoProto:
    kind = TensorProto.UINT8 if name == "frame" else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, axes)


if __name__ == "__main__":
    write_glue(glue_folder())
