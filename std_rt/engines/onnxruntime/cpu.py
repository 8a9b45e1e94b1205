"""ONNX Runtime on the CPU: graphs in fp32, fp16 and int8 (QDQ); its CPU provider has no bf16.

fp16 graphs open and give the right picture, at no gain: most of its CPU kernels compute in fp32 between
casts. Frames run graph by graph (`program.HostRunner`), not by IO binding (`ort_runner`): sessions read
NumPy's memory and give theirs, so there is no copy to save, and a device's buffers would add two a frame.
"""

from __future__ import annotations

import onnxruntime as ort

from std_rt.core.errors import BackendError
from std_rt.engines.onnxruntime.session import OnnxRuntimeEngine, open_session
from std_rt.engines.registry import GraphSpec

__all__ = ["OnnxRuntimeEngine", "devices", "open_graph"]

_PROVIDERS = ["CPUExecutionProvider"]


def open_graph(spec: GraphSpec, precision: str) -> OnnxRuntimeEngine:
    """Open ``spec`` on the CPU provider with its symbolic axes fixed. Raises BackendError."""
    if spec.compute == "bf16":
        raise BackendError(
            f"graph '{spec.name}' was exported in bf16, which onnxruntime does not compute on a CPU; "
            "use --backend openvino"
        )
    if precision == "bf16":
        raise BackendError(
            "onnxruntime does not compute bf16 on a CPU; use --precision fp32 or --backend openvino"
        )
    if precision not in ("auto", spec.compute):
        raise BackendError(
            f"graph '{spec.name}' was exported in {spec.compute}, onnxruntime cannot run it in {precision}; "
            f"use --precision auto, or export it with --precision {precision}"
        )
    return OnnxRuntimeEngine(spec, open_session(spec, _PROVIDERS), spec.compute)


def devices() -> str:
    """Providers of this build, for `std-rt doctor`."""
    return f"providers {', '.join(ort.get_available_providers())}"
