"""One ONNX graph in FP8 (E4M3), for GPUs with FP8 units: SM89 (RTX 40) and newer.

QuantizeLinear and DequantizeLinear stand in front of convolutions and matrix products, with one scale for an
activation and one for each output of a weight; engines compute what lies behind such a pair in FP8. Weights
are those of the float graph, in the same file, and are rounded when an engine is built.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from std_rt.engines import GraphSpec, open_engine
from std_rt.export.quantize_graph import Sample, steady_layers, weighted_layers

__all__ = ["MARGIN", "activation_ranges", "float8_graph"]

# Room above the largest magnitude seen. It costs one of E4M3's 18 binades, at the small end.
MARGIN = 2.0
_LARGEST = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)  # 448
_SMALLEST = 1e-4  # of a magnitude: its scale is still a number in fp16
_RANGE = ".range"
_LAYERS = ("Conv", "MatMul")
_FLOAT = ir.DataType.FLOAT


def float8_graph(source: Path, target: Path, ranges: Mapping[str, float], kept: Collection[str] = ()) -> None:
    """Write ``target``, in a folder that holds the weights of ``source``: that graph in FP8.

    ``ranges`` are those of `activation_ranges`; ``kept`` are nodes that stay in float. So do layers that see
    the style, the text or the time.
    """
    plain = onnx.shape_inference.infer_shapes(onnx.load(source, load_external_data=False))
    model = ir.load(source)
    nodes = [node for node in _float8_layers(model) if node.name not in kept]
    kinds = {
        info.name: info.type.tensor_type.elem_type for info in (*plain.graph.value_info, *plain.graph.input)
    }
    done: dict[str, ir.Value] = {}
    for node in nodes:
        x, w = (_name(node, index) for index in (0, 1))
        if x not in done:
            scale = np.float32(max(ranges[x], _SMALLEST) * MARGIN / _LARGEST)
            done[x] = _quantized(model, node, 0, scale, ir.DataType(kinds[x]))
        if w not in done:
            done[w] = _quantized(model, node, 1, _row_scales(node), ir.DataType(kinds[x]))
        for index, name in enumerate((x, w)):
            node.replace_input_with(index, done[name])
    ir.save(model, target)


def activation_ranges(source: Path, folder: Path, name: str, samples: Sequence[Sample]) -> dict[str, float]:
    """The largest magnitude of every value that layers in FP8 read, over the samples.

    ``folder`` holds the weights of ``source``; a graph is written there for the time being. ``samples``: as
    for `quantize_graph`. Raises BackendError if ONNX Runtime does not run the graph.
    """
    model = ir.load(source)
    found = {_name(node, 0): 0.0 for node in _float8_layers(model)}
    makers = [out for node in model.graph for out in node.outputs]
    for value in [*model.graph.inputs, *makers]:
        if value.name in found:
            model.graph.outputs.append(_largest(model, value))
    scratch = folder / f"{name}{_RANGE}"
    ir.save(model, scratch)
    try:
        for shapes, group in groupby(samples, lambda sample: {key: sample[key].shape for key in sample}):
            engine = open_engine("onnxruntime", GraphSpec(name, scratch, shapes, key=""))
            for sample in group:
                results = engine(**sample)
                found = {value: max(past, float(results[value + _RANGE])) for value, past in found.items()}
            engine.close()
    finally:
        scratch.unlink()
    return found


def _float8_layers(model: ir.Model) -> list[ir.Node]:
    """The layers that can be in FP8, in the graph's order."""
    layers = {node for node, (kind, _) in weighted_layers(model).items() if kind in _LAYERS}
    layers.difference_update(steady_layers(ir.to_proto(model)))
    return [node for node in model.graph if node.name in layers]


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    assert value is not None
    assert value.name is not None
    return value.name


def _largest(model: ir.Model, value: ir.Value) -> ir.Value:
    """A new float32 scalar of the graph: the largest magnitude in ``value``."""
    nodes: list[ir.Node] = []
    for operator, attributes in (("Abs", {}), ("ReduceMax", {"keepdims": 0}), ("Cast", {"to": int(_FLOAT)})):
        nodes.append(ir.node(operator, [nodes[-1].outputs[0] if nodes else value], attributes))
        nodes[-1].outputs[0].name = f"{value.name}.{operator}"
    model.graph.extend(nodes)
    result = nodes[-1].outputs[0]
    result.name, result.shape, result.type = f"{value.name}{_RANGE}", ir.Shape(()), ir.TensorType(_FLOAT)
    return result


def _row_scales(node: ir.Node) -> NDArray[np.float32]:
    """The scale of each output of a layer."""
    value = node.inputs[1]
    assert value is not None
    weight = np.moveaxis(np.abs(_constant(value)), _axis(node), 0)
    largest = weight.reshape(len(weight), -1).max(1).astype(np.float32)
    return np.maximum(largest, _SMALLEST) / np.float32(_LARGEST)


def _constant(value: ir.Value) -> NDArray[Any]:
    """A weight as a layer reads it: stored so, or through nodes such as Transpose and Slice."""
    maker = value.producer()
    if maker is None:
        assert value.const_value is not None
        return value.const_value.numpy()
    inputs = {str(each.name): _constant(each) for each in maker.inputs if each is not None}
    [result] = ReferenceEvaluator(ir.to_proto(maker)).run(None, inputs)
    return np.asarray(result)


def _axis(node: ir.Node) -> int:
    """The axis of a layer's weight that counts its outputs."""
    return 0 if node.op_type == "Conv" else 1


def _quantized(
    model: ir.Model, reader: ir.Node, index: int, scale: NDArray[np.float32] | np.float32, kind: ir.DataType
) -> ir.Value:
    """The input ``index`` of ``reader``, rounded to FP8 and back; ``scale`` of all, or of each output."""
    value, name = reader.inputs[index], _name(reader, index)
    zero = np.zeros(np.shape(scale), ml_dtypes.float8_e4m3fn)
    ports = []
    for part, array in (("scale", np.asarray(scale).astype(kind.numpy())), ("zero", zero)):
        tensor = ir.tensor(array, name=f"{name}.{part}")
        ports.append(
            ir.Value(
                name=tensor.name,
                const_value=tensor,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
            )
        )
        model.graph.register_initializer(ports[-1])
    attributes = {"axis": _axis(reader)} if np.ndim(scale) else {}
    down = ir.node("QuantizeLinear", [value, *ports], attributes, name=f"{name}.quantize")
    up = ir.node("DequantizeLinear", [down.outputs[0], *ports], attributes, name=f"{name}.dequantize")
    down.outputs[0].name, up.outputs[0].name = f"{name}.fp8", f"{name}.rounded"
    model.graph.insert_before(reader, [down, up])
    return up.outputs[0]
