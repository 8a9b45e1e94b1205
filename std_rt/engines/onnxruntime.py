"""ONNX Runtime on the CPU, in fp32 (its CPU provider has no bf16 arithmetic)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from std_rt.engines.base import GraphSpec, Ports, check_inputs
from std_rt.errors import BackendError

__all__ = ["OnnxRuntimeEngine", "devices", "open_graph"]

Array = NDArray[Any]
_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def open_graph(spec: GraphSpec, precision: str) -> OnnxRuntimeEngine:
    """Open ``spec`` on the CPU provider with its symbolic axes fixed. Raises BackendError."""
    if precision == "bf16":
        raise BackendError(
            "onnxruntime does not compute bf16 on a CPU; use --precision fp32 or --backend openvino"
        )
    try:
        options = _options()
        for axis, value in _axes(spec).items():
            options.add_free_dimension_override_by_name(axis, value)
        session = ort.InferenceSession(str(spec.path), options, providers=["CPUExecutionProvider"])
    except _failures() as error:
        raise BackendError(_one_line(spec, error)) from error
    return OnnxRuntimeEngine(spec, session)


class OnnxRuntimeEngine:
    """One session. Not for use from two threads at once."""

    precision = "fp32"

    def __init__(self, spec: GraphSpec, session: ort.InferenceSession) -> None:
        self.inputs = _ports(session.get_inputs(), spec.shapes)
        self._session: ort.InferenceSession | None = session
        self._name = spec.name
        self.outputs = self._measure_outputs()

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        if self._session is None:
            raise BackendError(f"graph '{self._name}' was closed; open it again")
        check_inputs(self._name, self.inputs, inputs)
        names = [port.name for port in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def _measure_outputs(self) -> Ports:
        """Shapes of the outputs; where ONNX leaves an axis unnamed, one run on zeros tells."""
        assert self._session is not None
        ports = self._session.get_outputs()
        if all(isinstance(axis, int) for port in ports for axis in port.shape):
            return _ports(ports, {})
        self.outputs = {}
        result = self(**{name: np.zeros(shape, dtype) for name, (shape, dtype) in self.inputs.items()})
        return {name: (value.shape, value.dtype) for name, value in result.items()}


def devices() -> str:
    """Providers of this build, for `std-rt doctor`."""
    return f"providers {', '.join(ort.get_available_providers())}"


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = _physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _physical_cores() -> int:
    """0 lets ONNX Runtime choose (one thread a physical core); fewer where this process may not use all."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return allowed if allowed < (os.cpu_count() or 1) else 0


def _axes(spec: GraphSpec) -> dict[str, int]:
    """Symbolic axis -> value. A session without overrides tells which axes are symbolic."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    probe = ort.InferenceSession(str(spec.path), options, providers=["CPUExecutionProvider"])
    declared = {port.name: port.shape for port in probe.get_inputs()}
    if declared.keys() != spec.shapes.keys():
        raise BackendError(
            f"graph '{spec.name}' takes {', '.join(declared)}; shapes were given for {', '.join(spec.shapes)}"
        )
    pairs = [pair for name in declared for pair in zip(declared[name], spec.shapes[name], strict=True)]
    return {axis: value for axis, value in pairs if isinstance(axis, str)}


def _ports(ports: list[Any], shapes: Any) -> Ports:
    return {
        port.name: (tuple(shapes.get(port.name, port.shape)), np.dtype(_DTYPES[port.type])) for port in ports
    }


def _failures() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions share no base of their own."""
    state = ort.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (*(getattr(state, name) for name in names), RuntimeError, ValueError)


def _one_line(spec: GraphSpec, error: Exception) -> str:
    reason = " ".join(str(error).split())[-300:]
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in spec.shapes.items())
    return f"onnxruntime cannot run graph '{spec.name}' at {shapes}: {reason}; try another --size"
