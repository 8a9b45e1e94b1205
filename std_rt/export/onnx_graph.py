"""torch module -> ONNX graph, with the batch and the picture's size left open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import config as fx_config

from std_rt.export.quiet import quiet

__all__ = ["OPSET", "Port", "Trace", "trace"]

# 20 is the newest that ONNX Runtime, OpenVINO and TensorRT-RTX all take; OpenVINO executes the same
# fused operations for 21 and 23.
OPSET = 20
_MAX_BATCH = 32  # 64 meets a limit of another axis, and torch then traces twice
_MAX_UNITS = 1024
_STACKS = "do_not_emit_stack_traces"


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: float32 or int64. In ``shape`` a name stands for an open axis."""

    name: str
    shape: tuple[int | str, ...]
    meaning: str
    dtype: str = "float32"


@dataclass(frozen=True)
class Trace:
    """What to trace: a module whose arguments are ``inputs`` and whose results are ``outputs``, in order.

    ``multiples`` says of which number an open axis must be a multiple.
    """

    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    multiples: Mapping[str, int] = field(default_factory=dict)


def trace(plan: Trace) -> ir.Model:
    """Export ``plan`` at a made-up size; every axis given by name stays open, under that name."""
    dims = {axis: _dim(axis, plan.multiples.get(axis, 1)) for port in plan.inputs for axis in _open(port)}
    shapes = {port.name: {i: dims[a] for i, a in enumerate(port.shape) if a in dims} for port in plan.inputs}
    with quiet("torch.onnx", "torch.export", "onnxscript", "onnx_ir"), _without_stacks(), torch.no_grad():
        program = torch.onnx.export(
            plan.module.eval(),
            (),
            kwargs=_example(plan),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            output_names=[port.name for port in plan.outputs],
            verbose=False,
        )
    assert program is not None
    return _tidy(program.model, plan)


@contextmanager
def _without_stacks() -> Iterator[None]:
    """Tracing notes where in the source each operation stands: a third of its time, and nobody reads it."""
    before = getattr(fx_config, _STACKS, None)
    if before is not None:
        setattr(fx_config, _STACKS, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(fx_config, _STACKS, before)


def _open(port: Port) -> list[str]:
    return [axis for axis in port.shape if isinstance(axis, str)]


def _dim(axis: str, multiple: int) -> Dim:
    if axis == "batch":
        return Dim(axis, min=1, max=_MAX_BATCH)
    unit = Dim(f"{axis}_units", min=1, max=_MAX_UNITS)
    return unit if multiple == 1 else multiple * unit


def _example(plan: Trace) -> dict[str, Tensor]:
    """Sizes that differ from each other and from 1, so that tracing takes no axis for another one."""
    sizes = {"batch": 2}
    for port in plan.inputs:
        for axis in _open(port):
            sizes.setdefault(axis, plan.multiples.get(axis, 1) * (2 + len(sizes)))
    shapes = {p.name: [sizes[a] if isinstance(a, str) else a for a in p.shape] for p in plan.inputs}
    return {port.name: _filled(shapes[port.name], port.dtype) for port in plan.inputs}


def _filled(shape: list[int], dtype: str) -> Tensor:
    """Whole numbers are ids, and 1 is one in every vocabulary."""
    if dtype == "int64":
        return torch.ones(shape, dtype=torch.int64)
    assert dtype == "float32", dtype
    return torch.full(shape, 0.5)


def _tidy(model: ir.Model, plan: Trace) -> ir.Model:
    """Give open axes their plain names, drop what only a debugger reads."""
    for value, port in zip(
        [*model.graph.inputs, *model.graph.outputs], [*plan.inputs, *plan.outputs], strict=True
    ):
        value.shape = ir.Shape(port.shape)
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            if id(value) not in ends:
                value.shape = value.type = None
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    return model
