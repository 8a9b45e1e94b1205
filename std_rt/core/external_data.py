"""Which files an ONNX graph reads its weights from, found without the onnx package.

An ONNX file names its external data by path, and runtimes follow whatever path stands there. The
runtime has no onnx package to look first, so this walks the protobuf wire format: field numbers are
those of onnx.proto (they never change), and whatever is not on the way to a tensor is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["external_locations", "read_fields"]

# message -> {field number: message inside}; the leaf "Entry" is StringStringEntryProto.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}


def external_locations(path: Path) -> set[str]:
    """Every ``location`` in the graph, as written there. Raises ValueError on a file that is not ONNX."""
    data = memoryview(path.read_bytes())
    try:
        return set(_locations(data, "Model"))
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not a readable ONNX file") from error


def _locations(data: memoryview, message: str) -> Iterator[str]:
    if message == "Entry":
        entry = {field: bytes(value) for field, value in _fields(data)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf-8")
        return
    inside = _FIELDS[message]
    for field, value in _fields(data):
        if field in inside:
            yield from _locations(value, inside[field])


def read_fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """``(number, value)`` of one protobuf message: numbers as int, what has a length as bytes.

    Numbers of fixed size are skipped. Raises IndexError on what is no message.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                yield tag >> 3, value
            case 1:
                at += 8
            case 2:
                size, at = _varint(data, at)
                if at + size > len(data):
                    raise IndexError("a field runs past the end")
                yield tag >> 3, data[at : at + size]
                at += size
            case 5:
                at += 4
            case _:
                raise IndexError("not a protobuf message")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Those with a length."""
    yield from ((number, value) for number, value in read_fields(data) if not isinstance(value, int))


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
