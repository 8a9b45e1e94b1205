"""ONNX files, read without the onnx package: their ports, and the files they take weights from.

The runtime has no onnx package. This walks the protobuf wire format and skips the rest, so
that a graph of gigabytes need not be opened to learn its axes, and a file that names weights outside its
folder is found before a runtime follows the path. Field numbers are those of onnx.proto (they never change).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Axes",
    "GraphPorts",
    "axis_values",
    "external_locations",
    "fixed_shapes",
    "read_opset",
    "read_ports",
]

_GRAPH, _INPUT, _OUTPUT = 7, 11, 12
_OPSET, _DOMAIN, _VERSION = 8, 1, 2
_NAME, _TYPE = 1, 2
_TENSOR, _SHAPE = 1, 2
_DIM, _VALUE, _PARAM = 1, 1, 2
# message -> {field number: message inside}, on the way to a tensor's external data; the leaf "Entry" is
# StringStringEntryProto.
_INSIDE: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}

Axes = tuple[int | str | None, ...]  # each axis a number, a name, or None (unnamed)
Message = list[tuple[int, int | memoryview]]


@dataclass(frozen=True)
class GraphPorts:
    """The axes of the inputs and outputs that a graph declares, in its order."""

    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]


def external_locations(path: Path) -> set[str]:
    """Every ``location`` of external data, as written in the file.

    Raises OSError, or ValueError on a file that is not ONNX.
    """
    data = memoryview(path.read_bytes())
    try:
        return set(_locations(data, "Model"))
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not a readable ONNX file") from error


def read_ports(path: Path) -> GraphPorts:
    """The ports of an ONNX file. Raises OSError, or ValueError on a file that is not ONNX."""
    data = memoryview(path.read_bytes())
    try:
        graph = _fields(_one(_fields(data), _GRAPH))
        inputs, outputs = (dict(map(_port, _all(graph, field))) for field in (_INPUT, _OUTPUT))
    except (LookupError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not a readable ONNX file") from error
    return GraphPorts(inputs, outputs)


def read_opset(path: Path) -> int:
    """The version of ONNX's own operators. Raises OSError, or ValueError on a file that is not ONNX."""
    try:
        for opset in _all(_fields(memoryview(path.read_bytes())), _OPSET):
            found = dict(_fields(opset))
            if not found.get(_DOMAIN):
                return int(found[_VERSION])
    except (LookupError, TypeError) as error:
        raise ValueError(f"{path.name} is not a readable ONNX file") from error
    raise ValueError(f"{path.name} names no opset")


def axis_values(inputs: Mapping[str, Axes], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The value that ``shapes`` give to every named axis. Raises ValueError if they do not fit the ports."""
    found: dict[str, int] = {}
    for name, axes in inputs.items():
        shape = shapes[name]
        if len(shape) != len(axes):
            raise ValueError(f"{name} has {len(axes)} axes, not {len(shape)}")
        for axis, value in zip(axes, shape, strict=True):
            wanted = found.setdefault(axis, value) if isinstance(axis, str) else axis
            if wanted not in (None, value):
                raise ValueError(f"axis {axis} of {name} cannot be {value}; it is {wanted}")
    return found


def fixed_shapes(outputs: Mapping[str, Axes], values: Mapping[str, int]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the outputs if every axis is a number or one of ``values``, else None."""
    fixed = {}
    for name, axes in outputs.items():
        found = [values.get(axis) if isinstance(axis, str) else axis for axis in axes]
        if None in found:
            return None
        fixed[name] = tuple(axis for axis in found if axis is not None)
    return fixed


def _locations(data: memoryview, message: str) -> Iterator[str]:
    fields = [(number, value) for number, value in _fields(data) if not isinstance(value, int)]
    if message == "Entry":
        entry = {number: bytes(value) for number, value in fields}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf-8")
        return
    for number, value in fields:
        if number in _INSIDE[message]:
            yield from _locations(value, _INSIDE[message][number])


def _port(data: memoryview) -> tuple[str, Axes]:
    port = _fields(data)
    tensor = _fields(_one(_fields(_one(port, _TYPE)), _TENSOR))
    axes = tuple(_axis(axis) for axis in _all(_fields(_one(tensor, _SHAPE)), _DIM))
    return bytes(_one(port, _NAME)).decode("utf-8"), axes


def _axis(data: memoryview) -> int | str | None:
    for number, value in _fields(data):
        if number == _VALUE and isinstance(value, int):
            return value
        if number == _PARAM and isinstance(value, memoryview) and value:
            return bytes(value).decode("utf-8")
    return None


def _all(message: Message, wanted: int) -> list[memoryview]:
    """Every field with this number. Raises TypeError if one is not a message."""
    found = [value for number, value in message if number == wanted]
    if any(isinstance(value, int) for value in found):
        raise TypeError("a message was expected")
    return [value for value in found if not isinstance(value, int)]


def _one(message: Message, wanted: int) -> memoryview:
    """The last field with this number, as protobuf has it. Raises IndexError if there is none."""
    return _all(message, wanted)[-1]


def _fields(data: memoryview) -> Message:
    """``(number, value)`` of one protobuf message: numbers as int, fields with a length as bytes.

    Numbers of fixed size are skipped. Raises IndexError on bytes that are not a message.
    """
    fields: Message = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                fields.append((tag >> 3, value))
            case 1:
                at += 8
            case 2:
                size, at = _varint(data, at)
                if at + size > len(data):
                    raise IndexError("a field runs past the end")
                fields.append((tag >> 3, data[at : at + size]))
                at += size
            case 5:
                at += 4
            case _:
                raise IndexError("not a protobuf message")
    return fields


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:  # ten bytes hold any 64-bit number
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise IndexError("a number is too long")
