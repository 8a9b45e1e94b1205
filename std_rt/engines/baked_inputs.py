"""Graphs around inputs that never change: the keys and values of a baked prompt are computed before it opens.

Backends fold constants only in part: TensorRT small products, ONNX Runtime none in fp16. Left alone they
would multiply the prompt by 682 MB of weights in every call of SDXL's UNet. The onnx package, which comes
with the extras of these backends, is loaded at the first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from std_rt.core.errors import BackendError, one_line
from std_rt.core.files import is_inside
from std_rt.engines.protocol import Array, GraphSpec

__all__ = ["baked_graph", "reads"]


def baked_graph(spec: GraphSpec, rewrite: Callable[[Any], None] = lambda model: None) -> bytes:
    """The ONNX file of ``spec`` with constants for its ``baked`` inputs and for their products with weights.

    The inputs stay, unread but in branches. Other weights stay in their files, so whoever opens the graph has
    to be told the folder, and checks them. ``rewrite`` is given the model afterwards, to change it further.
    Raises BackendError if onnx is missing, the graph cannot be read, or a weight of those products lies
    outside its folder.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendError(
            f"graph '{spec.name}' is opened with the onnx package; run: pip install onnx"
        ) from error
    try:
        model = onnx.load(spec.path, load_external_data=False)
        _bake(model.graph, spec.baked, spec.path.parent)
        rewrite(model)
    except Exception as error:  # those of protobuf, onnx and its C++ parts share no base class
        reason = one_line(error, -300)
        raise BackendError(f"graph '{spec.name}' cannot be read: {reason}; export it again") from error
    data: bytes = model.SerializeToString()
    return data


def _bake(graph: Any, baked: Mapping[str, Array], folder: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    known = {name: np.ascontiguousarray(value) for name, value in baked.items()}
    makers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}

    def constant(name: str) -> Array | None:
        """A weight as a layer reads it: stored so, or through nodes such as Transpose and Cast."""
        if name in weights:
            return _weight(weights[name], folder)
        node = makers.get(name)
        if node is None or len(node.output) != 1:
            return None
        inputs = {each: constant(each) for each in node.input}
        if not inputs or any(value is None for value in inputs.values()):
            return None
        [result] = ReferenceEvaluator(node).run(None, inputs)
        return np.asarray(result)

    for node in graph.node:  # in the order of execution
        value = known.get(node.input[0]) if node.input else None
        if value is not None and node.op_type == "Cast":
            [result] = ReferenceEvaluator(node).run(None, {node.input[0]: value})
            known[node.output[0]] = np.asarray(result)
        elif value is not None and node.op_type == "MatMul":
            weight = constant(node.input[1])
            if weight is not None:  # NumPy would also add up halves in halves
                product = value.astype(np.float32) @ weight.astype(np.float32)
                known[node.output[0]] = product.astype(value.dtype)
    _replace(graph, known, baked)


def _weight(tensor: Any, folder: Path) -> Array:
    """A weight, from its file if it lies in one.

    onnx would refuse a file with a second hard link, as installers make them.
    """
    from onnx import TensorProto
    from onnx.numpy_helper import to_array

    if tensor.data_location == TensorProto.EXTERNAL:
        entry = {each.key: each.value for each in tensor.external_data}
        if not is_inside(entry["location"]):
            raise ValueError(f"it reads weights from {entry['location']!r}, outside its folder")
        tensor = TensorProto(data_type=tensor.data_type, dims=tensor.dims)
        with (folder / entry["location"]).open("rb") as file:
            file.seek(int(entry.get("offset", 0)))
            tensor.raw_data = file.read(int(entry.get("length", -1)))
    return np.asarray(to_array(tensor))


def _replace(graph: Any, known: Mapping[str, Array], baked: Mapping[str, Array]) -> None:
    """Put what is known in place of what made it, and leave out what nothing reads any more."""
    from onnx.numpy_helper import from_array

    constants = {name: f"{name}.baked" if name in baked else name for name in known}
    needed = {port.name for port in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output) or known.keys() & set(node.output):
            continue
        for i, name in enumerate(node.input):
            node.input[i] = constants.get(name, name)
        needed |= reads(node)
        kept.append(node)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    tensors += [from_array(known[name], new) for name, new in constants.items() if new in needed]
    for field, values in (("node", kept[::-1]), ("initializer", tensors)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


def reads(node: Any) -> set[str]:
    """Names that a node reads, in its branches too."""
    branches = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
    return set(node.input).union(*(reads(inner) for graph in branches for inner in graph.node))
