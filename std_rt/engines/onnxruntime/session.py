"""What ONNX Runtime's backends share: a session with every axis fixed, its ports, and readable errors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from std_rt.core.errors import BackendError
from std_rt.engines.onnx_ports import axis_values, fixed_shapes, read_ports
from std_rt.engines.registry import GraphSpec, Ports, check_inputs

__all__ = ["OnnxRuntimeEngine", "Providers", "failures", "one_line", "open_session", "session_options"]

Array = NDArray[Any]
Providers = Sequence[str | tuple[str, dict[str, str]]]
# The CPU computes halves in fp32. Folded, a 2.6 B-parameter UNet in fp16 would be 10 GB of fp32 weights, and
# as much again while they are repacked; from this size on a weight is widened when its layer runs.
_LEAN_FROM_BYTES = 2 * 2**30
_FAILURES = (
    "EPFail",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)
_DTYPES = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


def session_options() -> ort.SessionOptions:
    """Threads as many as this process may use; errors only in the log."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = _physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def open_session(
    spec: GraphSpec, providers: Providers, options: ort.SessionOptions | None = None
) -> ort.InferenceSession:
    """Open ``spec`` with its named axes fixed. Raises BackendError in one line."""
    options = session_options() if options is None else options
    try:
        declared = read_ports(spec.path).inputs
        if declared.keys() != spec.shapes.keys():
            raise BackendError(
                f"graph '{spec.name}' takes {', '.join(declared)}; "
                f"shapes were given for {', '.join(spec.shapes)}"
            )
        for axis, value in axis_values(declared, spec.shapes).items():
            options.add_free_dimension_override_by_name(axis, value)
        lean = _on_cpu(providers) and _file_bytes(spec) > _LEAN_FROM_BYTES
        if lean:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        session = ort.InferenceSession(
            str(spec.path),
            options,
            providers=list(providers),
            enable_fallback=0,
            disabled_optimizers=["ConstantFolding"] if lean else [],
        )
    except failures() as error:
        raise BackendError(one_line(spec.name, spec.shapes, error)) from error
    session.disable_fallback()  # else a provider that fails is swapped for the CPU, with a line on stdout
    return session


def _on_cpu(providers: Providers) -> bool:
    return list(providers) == ["CPUExecutionProvider"]


def _file_bytes(spec: GraphSpec) -> int:
    """Size of the graph with the weights beside it."""
    return sum(path.stat().st_size for path in spec.path.parent.glob(f"{spec.path.stem}.*"))


class OnnxRuntimeEngine:
    """One session, arrays in and out. Not for use from two threads at once."""

    def __init__(self, spec: GraphSpec, session: ort.InferenceSession, precision: str) -> None:
        self.inputs = _ports(session.get_inputs(), spec.shapes)
        self.precision = precision
        self._session: ort.InferenceSession | None = session
        self._name = spec.name
        self._results = [port.name for port in session.get_outputs()]
        self.outputs = self._find_outputs(spec)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        if self._session is None:
            raise BackendError(f"graph '{self._name}' was closed; open it again")
        check_inputs(self._name, self.inputs, inputs)
        return dict(zip(self._results, self._session.run(self._results, inputs), strict=True))

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def _find_outputs(self, spec: GraphSpec) -> Ports:
        """As inferred, else as the names of their axes say, else by one run on zeros."""
        assert self._session is not None
        ports = self._session.get_outputs()
        if all(isinstance(axis, int) for port in ports for axis in port.shape):
            return _ports(ports, {})
        declared = read_ports(spec.path)
        fixed = fixed_shapes(declared.outputs, axis_values(declared.inputs, spec.shapes))
        if fixed is not None:
            return _ports(ports, fixed)
        zeros = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.inputs.items()}
        return {name: (value.shape, value.dtype) for name, value in self(**zeros).items()}


def _ports(ports: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]) -> Ports:
    for port in ports:
        if port.type not in _DTYPES:
            raise BackendError(f"onnxruntime has no arrays for {port.name}, which is {port.type}")
    return {
        port.name: (tuple(shapes.get(port.name, port.shape)), np.dtype(_DTYPES[port.type])) for port in ports
    }


def _physical_cores() -> int:
    """0 lets ONNX Runtime choose (one thread a physical core); fewer where this process may not use all."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return allowed if allowed < (os.cpu_count() or 1) else 0


def failures() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions share no base of their own."""
    state = ort.capi.onnxruntime_pybind11_state
    return (*(getattr(state, name) for name in _FAILURES), RuntimeError, ValueError, OSError)


def one_line(name: str, shapes: Mapping[str, tuple[int, ...]], error: Exception) -> str:
    """What failed, at which shapes, and the end of what ONNX Runtime says."""
    reason = " ".join(str(error).split())[-300:]
    at = ", ".join(f"{port} {list(shape)}" for port, shape in shapes.items())
    return f"onnxruntime cannot run graph '{name}' at {at}: {reason}; try another --size"
