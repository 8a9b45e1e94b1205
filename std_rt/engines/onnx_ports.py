"""Inputs and outputs of an ONNX file, read without the onnx package and without loading weights.

Engines must know which axes of a graph are open before they fix them. Asking a runtime means opening the
graph twice, which for SDXL's UNet is gigabytes; this walks the protobuf wire format, skips nodes and weights,
and reads what the graph declares. Field numbers are those of onnx.proto (they never change).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from std_rt.core.external_data import read_fields

__all__ = ["Declared", "GraphPorts", "axis_values", "fixed_shapes", "read_ports"]

_GRAPH, _INPUT, _OUTPUT = 7, 11, 12
_NAME, _TYPE = 1, 2
_TENSOR, _ELEMENT, _SHAPE = 1, 1, 2
_DIM, _VALUE, _PARAM = 1, 1, 2

Field = tuple[int, int | memoryview]


@dataclass(frozen=True)
class Declared:
    """An input or output: ONNX element type, and axes that are a number, a name, or None (unnamed)."""

    element: int
    axes: tuple[int | str | None, ...]


@dataclass(frozen=True)
class GraphPorts:
    """What a graph declares, in its order."""

    inputs: Mapping[str, Declared]
    outputs: Mapping[str, Declared]


def read_ports(path: Path) -> GraphPorts:
    """Read an ONNX file's ports. Raises OSError, or ValueError on a file that is not ONNX."""
    data = memoryview(path.read_bytes())
    try:
        graph = _one(read_fields(data), _GRAPH)
        fields = [field for field in read_fields(graph) if field[0] in (_INPUT, _OUTPUT)]
        inputs = dict(_port(_bytes(value)) for number, value in fields if number == _INPUT)
        outputs = dict(_port(_bytes(value)) for number, value in fields if number == _OUTPUT)
    except (IndexError, LookupError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not a readable ONNX file") from error
    return GraphPorts(inputs, outputs)


def axis_values(inputs: Mapping[str, Declared], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What ``shapes`` makes of every named axis. Raises ValueError where they do not fit the declaration."""
    found: dict[str, int] = {}
    for name, port in inputs.items():
        shape = shapes[name]
        if len(shape) != len(port.axes):
            raise ValueError(f"{name} has {len(port.axes)} axes, not {len(shape)}")
        for axis, value in zip(port.axes, shape, strict=True):
            wanted = found.setdefault(axis, value) if isinstance(axis, str) else axis
            if wanted not in (None, value):
                raise ValueError(f"axis {axis} of {name} cannot be {value}; it is {wanted}")
    return found


def fixed_shapes(
    outputs: Mapping[str, Declared], values: Mapping[str, int]
) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the outputs where every axis is a number or one of ``values``, else None."""
    fixed = {}
    for name, port in outputs.items():
        axes = [values.get(axis) if isinstance(axis, str) else axis for axis in port.axes]
        if None in axes:
            return None
        fixed[name] = tuple(axis for axis in axes if axis is not None)
    return fixed


def _port(data: memoryview) -> tuple[str, Declared]:
    fields = list(read_fields(data))
    tensor = list(read_fields(_one(read_fields(_one(fields, _TYPE)), _TENSOR)))
    element = next(value for number, value in tensor if number == _ELEMENT)
    if not isinstance(element, int):
        raise TypeError("an element type is a number")
    axes = [_axis(_bytes(value)) for number, value in read_fields(_one(tensor, _SHAPE)) if number == _DIM]
    return bytes(_one(fields, _NAME)).decode("utf-8"), Declared(element, tuple(axes))


def _axis(data: memoryview) -> int | str | None:
    for number, value in read_fields(data):
        if number == _VALUE and isinstance(value, int):
            return value
        if number == _PARAM and isinstance(value, memoryview) and value:
            return bytes(value).decode("utf-8")
    return None


def _one(fields: Iterator[Field] | list[Field], wanted: int) -> memoryview:
    """The last message with this number, as protobuf has it."""
    found = [value for number, value in fields if number == wanted]
    return _bytes(found[-1])


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise TypeError("a message was expected")
    return value
