"""An ONNX graph's weights in a safetensors file, under the names of the torch module, stored once.

The exporter renames, transposes and reshapes weights as it likes. Here every large initializer is found
again in the module's ``state_dict`` by its content; the file keeps torch's name and layout, the graph
points into the file, and where it wants another layout a Transpose (which runtimes fold away) follows.
With fp16 weights a Cast to float32 follows too: the file is half as large, the arithmetic stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from std_rt.errors import ExportError

__all__ = ["WEIGHT_PRECISIONS", "externalize"]

WEIGHT_PRECISIONS = ("fp16", "fp32")
# Smaller initializers stay in the graph: shapes, scales and the like.
_INLINE_ELEMENTS = 32
# Constants that tracing computed, which no state_dict holds, are stored under this prefix.
_CONSTANT = "constant."

Array = NDArray[np.float32]


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

    ``precision`` fp16 rounds tensors of two and more axes; vectors stay fp32, they cost nothing.
    A file that exists was written for another graph with the same ``state`` and precision: it is shared.
    Raises ExportError where a weight does not fit fp16, or a shared file lacks one.
    """
    arrays = {key: _array(value) for key, value in state.items() if value.is_floating_point()}
    found = _match_all(model, arrays)
    stored = {key: _store(key, array, precision) for key, array in arrays.items()}
    if not weights.exists():
        # Not save_file: it makes files that only their owner may read, and a bundle is there to be shared.
        weights.write_bytes(save(stored, {"format": "pt"}))
    places = _places(weights)
    lacking = sorted(stored.keys() - places.keys())
    if lacking:
        raise ExportError(
            f"{weights.name} has no {lacking[0]}, which {graph.name} needs; it cannot be shared"
        )
    for name, match in found.items():
        part = stored[match.key][match.start : match.stop]
        offset = places[match.key] + match.start * stored[match.key][:1].nbytes
        _point(model.graph, model.graph.initializers[name], part, match.transposed, weights, offset)
    ir.save(model, graph)


def _array(value: Tensor) -> Array:
    return np.ascontiguousarray(value.detach().cpu().float().numpy())


def _match_all(model: ir.Model, arrays: dict[str, Array]) -> dict[str, _Match]:
    """Initializer name -> match. Constants that are no weights are added to ``arrays``."""
    by_size: dict[int, list[str]] = {}
    for key, array in arrays.items():
        by_size.setdefault(array.size, []).append(key)
    found: dict[str, _Match] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value.dtype != ir.DataType.FLOAT or tensor.size <= _INLINE_ELEMENTS:
            continue
        array = np.asarray(tensor.numpy(), np.float32)
        found[name] = _look_up(name, array, arrays, by_size) or _new(name, array, arrays)
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
            for start, part in _cut(arrays[key], parts):
                if _same(part, array):
                    return _Match(key, False, start, start + len(part))
                if part.ndim == 2 and part.T.shape == array.shape and _same(part.T, array):
                    return _Match(key, True, start, start + len(part))
    return None


def _cut(array: Array, parts: int) -> Iterator[tuple[int, Array]]:
    """(first row, rows) of each part along the first axis; nothing where it does not divide."""
    rows, rest = divmod(array.shape[0] if array.ndim else 0, parts)
    if rows and not rest:
        yield from ((start, array[start : start + rows]) for start in range(0, rows * parts, rows))


def _same(part: Array, array: Array) -> bool:
    """Equal in content, whatever the shape. One corner decides nearly always, and costs nothing."""
    array = array.reshape(part.shape)
    corner = (slice(2),) * part.ndim
    return np.array_equal(part[corner], array[corner]) and np.array_equal(part, array)


def _new(name: str, array: Array, arrays: dict[str, Array]) -> _Match:
    arrays[_CONSTANT + name] = array
    return _Match(_CONSTANT + name, False, 0, array.shape[0])


def _store(key: str, array: Array, precision: str) -> NDArray[np.floating]:
    if precision == "fp32" or array.ndim < 2 or key.startswith(_CONSTANT):
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError(f"weight {key} reaches {np.abs(array).max():.0f}, beyond fp16; use --weights fp32")
    return half


def _places(weights: Path) -> dict[str, int]:
    """Key -> offset of its bytes in the file, from the safetensors header."""
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items()}


def _point(
    graph: ir.Graph, value: ir.Value, part: NDArray[np.floating], transposed: bool, weights: Path, offset: int
) -> None:
    """Let ``value`` come from the file: the initializer itself, or Transpose and Cast of it."""
    assert value.name is not None
    assert value.const_value is not None
    dtype = ir.DataType.FLOAT16 if part.dtype == np.float16 else ir.DataType.FLOAT
    # Without a Transpose only the bytes count, so the graph may see them in its own shape.
    shape = ir.Shape(part.shape if transposed else value.const_value.shape.numpy())
    direct = dtype == ir.DataType.FLOAT and not transposed
    name = value.name if direct else f"{value.name}.stored"
    tensor = ir.ExternalTensor(
        weights.name, offset, part.nbytes, dtype, shape=shape, name=name, base_dir=weights.parent
    )
    if direct:
        value.const_value = tensor
        return
    graph.initializers.pop(value.name)
    source = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(source)
    last, nodes = source, []
    for op, attributes, wanted in (
        ("Transpose", {"perm": [1, 0]}, transposed),
        ("Cast", {"to": int(ir.DataType.FLOAT)}, dtype == ir.DataType.FLOAT16),
    ):
        if wanted:
            nodes.append(ir.node(op, [last], attributes))
            last = nodes[-1].outputs[0]
            last.name = f"{value.name}.{op.lower()}"
    graph.insert_before(graph[0], nodes)
    ir.convenience.replace_all_uses_with(value, last)
