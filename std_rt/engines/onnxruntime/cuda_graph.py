"""Graphs as the kernels of ONNX Runtime's CUDA provider want them. Needs the ``onnx`` package.

A kernel fits the version of an operator that it was written for, and InstanceNormalization has none for
opset 22 and later: in SDXL's UNet at opset 23 all 46 would run on the CPU, between two copies each, and no
CUDA graph could be captured. So such a graph is opened at opset 20, with ONNX Runtime's own operator for
attention, which has fused kernels too. `tools/cuda_placement.py` shows where a bundle's nodes would run.
"""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper

from std_rt.engines.baked_inputs import reads

__all__ = ["for_cuda"]

_CONTRIB = "com.microsoft"
_PLAIN = {"q_num_heads", "kv_num_heads", "scale"}


def for_cuda(model: Any, opset: int) -> None:
    """Rewrite ``model``, of a later opset, in place. It stays as it is if its attention has another form."""
    [own] = [each for each in model.opset_import if not each.domain]
    attention = [node for node in model.graph.node if node.op_type == "Attention" and not node.domain]
    if own.version <= opset or not all(map(_is_plain, attention)):
        return
    for node in attention:
        given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        heads, scale = given.pop("q_num_heads"), {name: given[name] for name in ("scale",) if name in given}
        ports = [*node.input], [*node.output]
        node.CopyFrom(
            helper.make_node(
                "MultiHeadAttention", *ports, node.name, None, _CONTRIB, num_heads=heads, **scale
            )
        )
    _drop_casts_of_norms(model.graph)
    own.version = opset
    model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))


def _is_plain(node: Any) -> bool:
    """Attention over [B, S, C] with as many heads everywhere and no mask."""
    given = {each.name: each.i for each in node.attribute}
    heads = {given.get("q_num_heads"), given.get("kv_num_heads")}
    return given.keys() <= _PLAIN and None not in heads and len(heads) == 1 and len(node.input) == 3


def _drop_casts_of_norms(graph: Any) -> None:
    """Let a LayerNormalization in fp32, between casts from fp16 and back, read and write fp16.

    The kernel computes in fp32 anyway. Weights are cast instead, which is done when the graph is opened.
    """
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    outputs, nodes = {port.name for port in graph.output}, list[Any]()
    for node in graph.node:
        if node.op_type == "LayerNormalization" and len(node.output) == 1:
            result, before = node.output[0], makers.get(node.input[0])
            after = readers.get(result, [])
            if (
                len(after) == 1
                and result not in outputs
                and _is_cast(before, TensorProto.FLOAT)
                and _is_cast(after[0], TensorProto.FLOAT16)
            ):
                for i, name in enumerate(node.input[1:], 1):
                    if not name:
                        continue
                    node.input[i] = f"{result}.{i}"
                    nodes.append(helper.make_node("Cast", [name], [node.input[i]], to=TensorProto.FLOAT16))
                node.input[0], node.output[0] = makers[node.input[0]].input[0], after[0].output[0]
                after[0].ClearField("output")
        nodes.append(node)
    # ONNX Runtime would go on to compute casts that nothing reads.
    read = outputs.union(*map(reads, nodes))
    kept = [node for node in nodes if node.op_type != "Cast" or not read.isdisjoint(node.output)]
    graph.ClearField("node")
    graph.node.extend(kept)


def _is_cast(node: Any, dtype: int) -> bool:
    return node is not None and any(each.name == "to" and each.i == dtype for each in node.attribute)
