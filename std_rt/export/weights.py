"""Weights of an ONNX graph in a safetensors file, under the names of the torch module, stored once.

The exporter renames, transposes and reshapes weights as it likes. Here every large initializer is found
again in the module's ``state_dict`` by its content; the file keeps torch's name and layout, the graph
points into the file, and where it wants another layout a Transpose (which runtimes fold away) follows.
With fp16 weights of an fp32 graph a Cast follows too: the file is half as large, the arithmetic stays the
same. A graph that computes in halves reads its weights as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from std_rt.core.errors import ExportError
from std_rt.models.weight_files import Slot, read_places, write_weights

__all__ = ["INLINE_ELEMENTS", "StoredTensor", "externalize", "point_to_file"]

INLINE_ELEMENTS = 32  # initializers up to this size stay in the graph: shapes, scales and the like
# Constants that tracing computed, which no state_dict holds, are stored under this prefix.
_CONSTANT = "constant."

Array = NDArray[Any]
_TYPES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}


@dataclass(frozen=True)
class _Match:
    """Where an initializer's content is: rows ``start`` to ``stop`` of a key, perhaps transposed."""

    key: str
    transposed: bool
    start: int
    stop: int


def externalize(
    model: ir.Model, state: Mapping[str, Tensor], graph: Path, weights: Path, precision: str
) -> None:
    """Write ``weights`` (all of ``state``) and ``graph``, which reads them, in the same folder.

    ``precision`` fp16 rounds float32 tensors of two and more axes; vectors stay fp32, they cost nothing.
    Tensors that are halves already stay as they are. Nothing is held twice: a tensor is rounded while it is
    written. A file that exists was written for another graph with the same ``state`` and precision: it is
    shared. Raises ExportError if a weight does not fit fp16, or a shared file lacks one.
    """
    arrays = {key: _array(value) for key, value in state.items() if value.is_floating_point()}
    found = _match_all(model, arrays)
    if not weights.exists():
        types = {key: _stored_type(key, array, precision) for key, array in arrays.items()}
        # Wide types first, as safetensors orders them: every tensor then lies on a multiple of its own width.
        order = sorted(arrays, key=lambda key: (-types[key].itemsize, key))
        slots = {key: Slot(_TYPES[types[key]], arrays[key].shape) for key in order}
        write_weights(weights, slots, (_rounded(key, arrays[key], types[key]) for key in order))
    places = read_places(weights)
    lacking = sorted(arrays.keys() - places.keys())
    if lacking:
        raise ExportError(
            f"{weights.name} has no {lacking[0]}, which {graph.name} needs; it cannot be shared"
        )
    for name, match in found.items():
        array = arrays[match.key]
        dtype = _stored_type(match.key, array, precision)
        row = dtype.itemsize * math.prod(array.shape[1:])
        shape = (match.stop - match.start, *array.shape[1:]) if array.ndim else ()
        stored = StoredTensor(shape, dtype, places[match.key] + match.start * row, match.transposed)
        point_to_file(model.graph, model.graph.initializers[name], stored, weights)
    ir.save(model, graph)


def _array(value: Tensor) -> Array:
    """The tensor's own memory as an array, if it is contiguous."""
    plain = value.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:  # NumPy has no such type
        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray((plain if plain.dtype == torch.float16 else plain.float()).numpy())


def _stored_type(key: str, array: Array, precision: str) -> np.dtype[Any]:
    rounded = precision == "fp16" and array.dtype == np.float32 and array.ndim >= 2
    return np.dtype(np.float16) if rounded and not key.startswith(_CONSTANT) else array.dtype


def _rounded(key: str, array: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype, copy=False)
    if rounded is not array and not np.isfinite(rounded).all():
        raise ExportError(
            f"weight {key} is {np.abs(array).max():.0f}, which exceeds the fp16 range; use --weights fp32"
        )
    return rounded


def _match_all(model: ir.Model, arrays: dict[str, Array]) -> dict[str, _Match]:
    """Initializer name -> match. Constants that are not weights are added to ``arrays``."""
    by_size: dict[int, list[str]] = {}
    for key, array in arrays.items():
        by_size.setdefault(array.size, []).append(key)
    types = {ir.DataType.from_numpy(dtype) for dtype in _TYPES}
    found: dict[str, _Match] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value.dtype not in types or tensor.size <= INLINE_ELEMENTS:
            continue
        array = np.ascontiguousarray(tensor.numpy())  # or every reshape below would copy
        match = _look_up(name, array, arrays, by_size)
        if match is None:
            arrays[_CONSTANT + name] = array
            match = _Match(_CONSTANT + name, False, 0, array.shape[0])
        found[name] = match
    return found


def _look_up(
    name: str, array: Array, arrays: Mapping[str, Array], by_size: Mapping[int, list[str]]
) -> _Match | None:
    """The key of the same name, else any key that holds the content, whole or in one of two halves."""
    own = name.removeprefix("module.")
    if own in arrays and arrays[own].size == array.size and _same(arrays[own], array):
        return _Match(own, False, 0, len(arrays[own]))
    for parts in (1, 2):
        for key in by_size.get(array.size * parts, []):
            rows, rest = divmod(arrays[key].shape[0] if arrays[key].ndim else 0, parts)
            for start in range(0, rows * parts, rows) if rows and not rest else ():
                part = arrays[key][start : start + rows]
                if _same(part, array):
                    return _Match(key, False, start, start + rows)
                if part.ndim == 2 and part.T.shape == array.shape and _same(part.T, array):
                    return _Match(key, True, start, start + rows)
    return None


def _same(part: Array, array: Array) -> bool:
    """Equal in content, whatever the shape. One corner decides nearly always, and costs nothing."""
    if part.dtype != array.dtype:
        return False
    # As integers: NumPy compares halves one by one.
    whole = np.dtype(f"u{part.dtype.itemsize}")
    part, array = part.view(whole), array.reshape(part.shape).view(whole)
    corner = (slice(2),) * part.ndim
    return np.array_equal(part[corner], array[corner]) and np.array_equal(part, array)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weights file, or rows of one: where in the file it begins (bytes), and as what."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    transposed: bool = False


def point_to_file(graph: ir.Graph, value: ir.Value, stored: StoredTensor, weights: Path) -> None:
    """Make the initializer ``value`` come from the file: itself, or through Transpose and Cast."""
    assert value.name is not None
    assert value.const_value is not None
    wanted, dtype = value.const_value.dtype, ir.DataType.from_numpy(stored.dtype)
    # Without a Transpose only the bytes count, so the graph may see them in its own shape.
    shape = ir.Shape(stored.shape if stored.transposed else value.const_value.shape.numpy())
    direct = dtype == wanted and not stored.transposed
    name = value.name if direct else f"{value.name}.stored"
    length = stored.dtype.itemsize * math.prod(stored.shape)
    tensor = ir.ExternalTensor(
        weights.name, stored.offset, length, dtype, shape=shape, name=name, base_dir=weights.parent
    )
    if direct:
        value.const_value = tensor
        return
    graph.initializers.pop(value.name)
    source = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(source)
    last, nodes = source, []
    for op, attributes, needed in (
        ("Transpose", {"perm": [1, 0]}, stored.transposed),
        ("Cast", {"to": int(wanted)}, dtype != wanted),
    ):
        if needed:
            nodes.append(ir.node(op, [last], attributes))
            last = nodes[-1].outputs[0]
            last.name = f"{value.name}.{op.lower()}"
    graph.insert_before(graph[0], nodes)
    ir.convenience.replace_all_uses_with(value, last)
