"""Quantization of one ONNX graph to int8, by NNCF after training, written so that every runtime reads it.

The result is an ordinary ONNX graph with QuantizeLinear and DequantizeLinear around convolutions and matrix
products. Its weights are those of the float graph, in the same file: a runtime rounds them to int8 when it
opens the graph, so a bundle with both forms is hardly larger than one. Sizes and batch stay open.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants

from std_rt.core.errors import ExportError, one_line
from std_rt.engines.protocol import STEADY_INPUTS
from std_rt.export.weights import INLINE_ELEMENTS
from std_rt.models.components import quiet
from std_rt.models.weight_files import read_places

__all__ = ["RUNGS", "kept_layers", "quantize_graph", "steady_layers", "weighted_layers"]

Sample = Mapping[str, NDArray[Any]]

# What stays in float, one rung after the other, if a graph loses too much: parts of weight names.
# The ends (first and last convolution) are found by their place.
RUNGS: tuple[tuple[str, ...], ...] = ((), ("ends",), ("ends", "to_out", "proj_out", "proj_in", "upsamplers"))
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_RESHAPERS = ("Cast", "Reshape", "Slice", "Transpose")  # between a stored weight and the layer that reads it
_LARGEST_BYTES = 2**31 - 2**20  # of a protobuf message, as which NNCF handles a graph


def quantize_graph(
    source: Path, target: Path, name: str, samples: Sequence[Sample], kept: Collection[str] = ()
) -> None:
    """Write ``target``: the graph ``source`` in int8, which reads the same weights file beside it.

    ``samples`` are inputs as the graph sees them in use; from them come the ranges of activations.
    ``kept`` are the nodes that stay in float. Raises ExportError if the graph is too large, or NNCF does not
    take it.
    """
    model = ir.load(source)
    _check_size(model, name)
    folded = _folded(model)
    before = {tensor.name: tensor.raw_data for tensor in folded.graph.initializer}
    quantized = _quantize(folded, name, samples, sorted({*kept, *steady_layers(folded)}))
    del quantized.graph.value_info[:]  # shapes that shape inference found; runtimes find their own
    same = {
        tensor.name
        for tensor in quantized.graph.initializer
        if math.prod(tensor.dims) > INLINE_ELEMENTS and before.get(tensor.name) == tensor.raw_data
    }
    _share_constants(quantized.graph, onnx.load(source, load_external_data=False).graph, same)
    onnx.save(quantized, target)


def _check_size(model: ir.Model, name: str) -> None:
    elements = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    if elements * 4 > _LARGEST_BYTES:
        raise ExportError(
            f"graph '{name}' has {elements * 4 / 2**30:.1f} GB of weights in fp32, and int8 is made for "
            "graphs below 2 GB; use --precision fp16 or bf16"
        )


def weighted_layers(model: ir.Model) -> dict[str, tuple[str, str]]:
    """Name of each node that multiplies by a weight -> (operator, the weight's name in torch)."""
    found = {}
    for node in model.graph:
        if node.op_type not in _LAYERS or node.name is None:
            continue
        value = node.inputs[1]
        while value is not None and (maker := value.producer()) is not None and maker.op_type in _RESHAPERS:
            value = maker.inputs[0]
        if value is not None and isinstance(value.const_value, ir.ExternalTensor):
            found[node.name] = (node.op_type, _torch_name(value.const_value))
    return found


def _torch_name(tensor: ir.ExternalTensor) -> str:
    """The key of the weights file whose bytes hold the tensor's."""
    offset = tensor.offset or 0
    return max((place, key) for key, place in read_places(Path(tensor.path)).items() if place <= offset)[1]


def kept_layers(layers: Mapping[str, tuple[str, str]], keep: Sequence[str]) -> dict[str, str]:
    """Those of ``layers`` that ``keep`` names: node -> weight."""
    convs = [node for node, (kind, _) in layers.items() if kind == "Conv"]
    ends = {convs[0], convs[-1]} if convs and "ends" in keep else set()
    return {
        node: weight
        for node, (_, weight) in layers.items()
        if node in ends or any(f".{part}." in f".{weight}" for part in keep)
    }


def steady_layers(model: onnx.ModelProto) -> list[str]:
    """Layers that follow from the style, the text and the time alone, and those that take such values in.

    The former run once per style (`std_rt.engines.openvino.graph`), so int8 saves nothing there; and the
    values of a style that calibration has not seen lie outside the ranges that it found.
    """
    steady = {port.name for port in model.graph.input if port.name in STEADY_INPUTS}
    fixed = {tensor.name for tensor in model.graph.initializer} | {""}
    found = []
    for node in model.graph.node:
        behind = set(node.input) - fixed
        if not behind or node.op_type == "Shape":
            fixed.update(node.output)
        elif behind <= steady:
            steady.update(node.output)
        if node.op_type in _LAYERS and behind & steady:
            found.append(node.name)
    return found


def _folded(model: ir.Model) -> onnx.ModelProto:
    """The graph with its weights inside and computed constants (Cast, Transpose, Slice) made plain ones."""
    model = ir.external_data.load_to_model(model)
    with quiet("onnxscript", "onnx_ir"):
        fold_constants(model, input_size_limit=_LARGEST_BYTES, output_size_limit=_LARGEST_BYTES)
        RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _quantize(
    model: onnx.ModelProto, name: str, samples: Sequence[Sample], ignored: list[str]
) -> onnx.ModelProto:
    # NNCF reports its use to its makers over the network unless this is set before it is imported.
    os.environ.setdefault("NNCF_CI", "1")
    with quiet("nncf"):
        import nncf
        from nncf.quantization.range_estimator import (
            RangeEstimatorParametersSet,
        )

        # The whole range that was seen: NNCF's mean over samples clips a picture brighter than most.
        ranges = RangeEstimatorParametersSet.MINMAX
        has_attention = any(node.op_type == "Softmax" for node in model.graph.node)
        try:
            return nncf.quantize(
                model,
                nncf.Dataset([dict(sample) for sample in samples]),
                subset_size=len(samples),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER if has_attention else None,
                ignored_scope=nncf.IgnoredScope(names=ignored) if ignored else None,
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=ranges,
                    # Weights stay what they are, for the float form reads them too.
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
                    backend_params={"compress_weights": False},
                ),
            )
        except (nncf.NNCFError, RuntimeError, ValueError) as error:
            reason = one_line(error, 200)
            raise ExportError(
                f"NNCF cannot quantize graph '{name}': {reason}; use another --precision"
            ) from error


def _share_constants(graph: onnx.GraphProto, source: onnx.GraphProto, names: Collection[str]) -> None:
    """Make ``graph`` read the constants ``names`` as ``source`` does: from the weights file, or through nodes
    that follow from it (Cast, Transpose, Slice).
    """
    stored = {tensor.name for tensor in source.initializer}
    makers: dict[str, onnx.NodeProto] = {}
    for node in source.node:
        if all(name in stored or name in makers for name in node.input if name):
            makers.update(dict.fromkeys(node.output, node))
    waiting, needed = [name for name in names if name in stored or name in makers], set[str]()
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting += [name for name in makers[name].input if name] if name in makers else []
    own = [tensor for tensor in graph.initializer if tensor.name not in needed]
    shared = [tensor for tensor in source.initializer if tensor.name in needed]
    nodes = [node for node in source.node if needed.intersection(node.output)]
    for field, items in ((graph.initializer, [*own, *shared]), (graph.node, [*nodes, *graph.node])):
        del field[:]
        field.extend(items)
