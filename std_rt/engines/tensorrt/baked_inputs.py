"""Engines built around inputs that never change: a baked prompt, whose keys and values are computed here.

TensorRT folds only small products of constants. Left alone it would multiply the prompt by 682 MB of weights
in every call of SDXL's UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from std_rt.engines.protocol import Array

__all__ = ["bake"]


def bake(trt: Any, network: Any, values: Mapping[str, Array]) -> dict[str, Array]:
    """Let the network read constants in place of the inputs ``values``, and of their products with weights.

    The inputs stay, unread. Returns every constant by the name of the tensor that it replaces: TensorRT reads
    them while it builds, so they must live that long.
    """
    known = {name: np.ascontiguousarray(value) for name, value in values.items()}
    if known:
        makers = {
            layer.get_output(i).name: layer for layer in _layers(network) for i in range(layer.num_outputs)
        }
        for layer in _layers(network):
            read = layer.get_input(0) if layer.num_inputs else None  # a Fill may have none in first place
            value = None if read is None else known.get(read.name)
            result = None if value is None else _evaluated(trt, layer, value, makers)
            if result is not None:
                known[layer.get_output(0).name] = np.ascontiguousarray(result)
        _replace(trt, network, known)
    return known


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


def _evaluated(trt: Any, layer: Any, value: Array, makers: Mapping[str, Any]) -> Array | None:
    """What a layer makes of a known first input; None unless it is a cast or a product with a weight."""
    kind, output = layer.type, layer.get_output(0)
    if kind == trt.LayerType.CAST and output.dtype in (trt.float16, trt.float32):
        return value.astype(trt.nptype(output.dtype))
    if kind != trt.LayerType.MATRIX_MULTIPLY:
        return None
    layer.__class__ = trt.IMatrixMultiplyLayer
    weight = _constant(trt, layer.get_input(1), makers)
    if weight is None or {layer.op0, layer.op1} != {trt.MatrixOperation.NONE}:
        return None
    return (value.astype(np.float32) @ weight.astype(np.float32)).astype(value.dtype)


def _constant(trt: Any, tensor: Any, makers: Mapping[str, Any]) -> Array | None:
    """A weight in fp16 or fp32, perhaps transposed or given another shape."""
    layer = makers.get(tensor.name)
    if layer is None:
        return None
    if layer.type == trt.LayerType.CONSTANT:
        layer.__class__ = trt.IConstantLayer
        weights = layer.weights
        known = isinstance(weights, np.ndarray) and weights.dtype in (np.float16, np.float32)
        return weights.reshape(tuple(layer.shape)) if known else None
    if layer.type != trt.LayerType.SHUFFLE:
        return None
    source = _constant(trt, layer.get_input(0), makers)
    layer.__class__ = trt.IShuffleLayer
    if source is None or list(layer.second_transpose)[: len(tensor.shape)] != [*range(len(tensor.shape))]:
        return None
    return source.transpose(list(layer.first_transpose)[: source.ndim]).reshape(tuple(tensor.shape))


def _replace(trt: Any, network: Any, known: Mapping[str, Array]) -> None:
    tensors: dict[str, Any] = {}
    for layer in [*_layers(network)]:
        for i in range(layer.num_inputs):
            read = layer.get_input(i)
            if read is None or read.name not in known or layer.get_output(0).name in known:
                continue  # what only makes another constant goes away by itself
            if read.name not in tensors:
                value = known[read.name]
                tensors[read.name] = network.add_constant(value.shape, trt.Weights(value)).get_output(0)
            layer.set_input(i, tensors[read.name])
