"""ONNX Runtime sessions with fixed axes and readable errors, and the CPU backend built on them.

The CPU provider computes fp32, fp16 and int8 (QDQ) graphs, no bf16. fp16 graphs give the right picture but
no speed: most CPU kernels compute in fp32 between casts. Frames run graph by graph (`HostRunner`), not by IO
binding: sessions read NumPy's memory and return theirs, so there is no copy to save; buffers on a device
would add two copies per frame.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from std_rt.core.errors import BackendError, one_line
from std_rt.core.files import is_inside
from std_rt.core.onnx_file import axis_values, external_locations, fixed_shapes, read_ports
from std_rt.engines.baked_inputs import baked_graph
from std_rt.engines.protocol import Array, GraphSpec, Ports, check_inputs

__all__ = [
    "CPU",
    "OnnxRuntimeEngine",
    "Providers",
    "check_precision",
    "devices",
    "failures",
    "open_graph",
    "open_session",
    "ports_of",
    "run_error",
]

Providers = Sequence[str | tuple[str, dict[str, str]]]
CPU = ["CPUExecutionProvider"]
# The CPU computes halves in fp32. Folded, a 2.6 B-parameter UNet in fp16 would be 10 GB of fp32 weights, and
# as much again while they are repacked; from this size on a weight is widened when its layer runs.
_LEAN_FROM_BYTES = 2 * 2**30
# For a graph that is not read from its file.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
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


def open_graph(spec: GraphSpec, precision: str) -> OnnxRuntimeEngine:
    """Open ``spec`` on the CPU. Raises BackendError."""
    if spec.compute == "bf16":
        raise BackendError(
            f"graph '{spec.name}' was exported in bf16, which onnxruntime does not compute on a CPU; "
            "use --backend openvino"
        )
    if precision == "bf16":
        raise BackendError(
            "onnxruntime does not compute bf16 on a CPU; use --precision fp32 or --backend openvino"
        )
    check_precision(spec, precision)
    return OnnxRuntimeEngine(spec, open_session(spec, CPU), spec.compute)


def devices() -> str:
    """The providers of this build, for `std-rt doctor`."""
    return f"providers {', '.join(ort.get_available_providers())}"


def check_precision(spec: GraphSpec, precision: str) -> None:
    """Raise BackendError unless ``precision`` is the one that the graph was exported in, or ``auto``."""
    if precision not in ("auto", spec.compute):
        raise BackendError(
            f"graph '{spec.name}' was exported in {spec.compute}, onnxruntime cannot run it in {precision}; "
            f"use --precision auto, or export it with --precision {precision}"
        )


def open_session(spec: GraphSpec, providers: Providers, graph: bytes | None = None) -> ort.InferenceSession:
    """Open ``spec`` with its named axes fixed. ``graph``: its file, rewritten.

    Raises BackendError in one line.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = _physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    try:
        lean = list(providers) == CPU and _bytes_of_weights(spec) > _LEAN_FROM_BYTES
        if lean:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        declared = read_ports(spec.path).inputs
        if declared.keys() != spec.shapes.keys():
            raise BackendError(
                f"graph '{spec.name}' takes {', '.join(declared)}; "
                f"shapes were given for {', '.join(spec.shapes)}"
            )
        for axis, value in axis_values(declared, spec.shapes).items():
            options.add_free_dimension_override_by_name(axis, value)
        if graph is None and spec.baked:
            graph = baked_graph(spec)
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(spec.path.parent))
        session = ort.InferenceSession(
            str(spec.path) if graph is None else graph,
            options,
            providers=list(providers),
            enable_fallback=0,
            disabled_optimizers=[
                *(["ConstantFolding"] if lean else []),
                # It moves FP8 values through transposes, for which there are no FP8 kernels.
                *(["QDQPropagationTransformer"] if spec.compute == "fp8" else []),
            ],
        )
    except failures() as error:
        raise BackendError(run_error(spec, error)) from error
    session.disable_fallback()  # else a provider that fails is swapped for the CPU, with a line on stdout
    return session


def _bytes_of_weights(spec: GraphSpec) -> int:
    files = (spec.path.parent / location for location in external_locations(spec.path) if is_inside(location))
    return spec.path.stat().st_size + sum(path.stat().st_size for path in files if path.is_file())


class OnnxRuntimeEngine:
    """One session, arrays in and out. Use it from one thread at a time."""

    def __init__(self, spec: GraphSpec, session: ort.InferenceSession, precision: str) -> None:
        self.inputs = ports_of(session.get_inputs(), spec.shapes)
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
        """As the session inferred them, else by the names of their axes, else by one run on zeros."""
        assert self._session is not None
        ports = self._session.get_outputs()
        if all(isinstance(axis, int) for port in ports for axis in port.shape):
            return ports_of(ports, {})
        declared = read_ports(spec.path)
        fixed = fixed_shapes(declared.outputs, axis_values(declared.inputs, spec.shapes))
        if fixed is not None:
            return ports_of(ports, fixed)
        zeros = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.inputs.items()}
        return {name: (value.shape, value.dtype) for name, value in self(**zeros).items()}


def ports_of(ports: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]) -> Ports:
    """Shape (from ``shapes`` if it is there) and dtype of a session's inputs or outputs."""
    for port in ports:
        if port.type not in _DTYPES:
            raise BackendError(f"onnxruntime returns no array for {port.name}, which is {port.type}")
    return {
        port.name: (tuple(shapes.get(port.name, port.shape)), np.dtype(_DTYPES[port.type])) for port in ports
    }


def _physical_cores() -> int:
    """0 lets ONNX Runtime choose (one thread per physical core); fewer if this process may not use all."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return allowed if allowed < (os.cpu_count() or 1) else 0


def failures() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which share no base class."""
    state = ort.capi.onnxruntime_pybind11_state
    return (*(getattr(state, name) for name in _FAILURES), RuntimeError, ValueError, OSError)


def run_error(spec: GraphSpec, error: Exception) -> str:
    """What failed, at which shapes, and the end of ONNX Runtime's message."""
    reason = one_line(error, -300)
    return (
        f"onnxruntime cannot run graph '{spec.name}' at {spec.describe_shapes()}: {reason}; "
        "try another --size"
    )
