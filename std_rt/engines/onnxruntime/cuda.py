"""ONNX Runtime on an NVIDIA GPU (onnxruntime-gpu): buffers stay there, large graphs replay as CUDA graphs.

Graphs run in the precision they were exported in: fp32 (tensor cores in TF32 unless fp32 is asked for), fp16,
or int8. bf16 is refused: the provider lacks kernels that SDXL needs in it (InstanceNormalization, Resize,
Pad, ReduceMean), and would carry those layers back to the CPU. Each launch ends with a wait of microseconds;
the TensorRT backends, which replay a whole frame, have none.

Untested on a real GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from io import StringIO

import onnxruntime as ort

from std_rt.core.errors import BackendError
from std_rt.core.machine import install_hint
from std_rt.engines.glue import GLUE
from std_rt.engines.gpu.probe import probe
from std_rt.engines.onnxruntime.io_binding import OrtRunner
from std_rt.engines.onnxruntime.ort_session import CPU, OnnxRuntimeEngine, check_precision, open_session
from std_rt.engines.program import Launch, Program
from std_rt.engines.protocol import GraphSpec

__all__ = ["devices", "open_graph", "open_runner", "provider_options"]

_PROVIDER = "CUDAExecutionProvider"
_INSTALL = install_hint("cuda")
_LOG = logging.getLogger(__name__)


def open_graph(spec: GraphSpec, precision: str) -> OnnxRuntimeEngine:
    """Open one graph on the GPU, NumPy arrays in and out. Raises BackendError."""
    _check_precision(spec, precision)
    return OnnxRuntimeEngine(spec, _open(spec, precision, capture=False), spec.compute)


def open_runner(program: Program, specs: Mapping[str, GraphSpec], precision: str) -> OrtRunner:
    """Open a program with all its buffers on the GPU. Raises BackendError."""
    for name in program.graphs:
        _check_precision(specs[name], precision)
    _load_libraries()
    main = "unet" if "unet" in specs else program.graphs[0]
    return OrtRunner(
        program,
        specs,
        lambda spec: _open_captured(spec, precision),
        device="cuda",
        precision=specs[main].compute,
        options=_run_options,
    )


def devices() -> str:
    """Providers and GPUs, for `std-rt doctor`."""
    gpus = ", ".join(str(gpu) for gpu in probe().gpus)
    return f"providers {', '.join(ort.get_available_providers())}; {gpus or 'no GPU'}"


def provider_options(precision: str, *, capture: bool) -> dict[str, str]:
    """Options of the CUDA provider.

    Convolution algorithms are tried out once at the size in use; memory grows only as requested, because
    several sessions share the card; an explicit ``fp32`` disables TF32. With ``capture`` a session
    records its kernels at the first run and replays them as one from then on.
    """
    return {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "use_tf32": "0" if precision == "fp32" else "1",
        "enable_cuda_graph": "1" if capture else "0",
    }


def _open_captured(spec: GraphSpec, precision: str) -> ort.InferenceSession:
    """With CUDA graph capture if possible; a graph with nodes left to the CPU runs without, and a warning."""
    if not spec.key and spec.name.startswith("glue."):  # two or three kernels: nothing to save
        return _open(spec, precision, capture=False)
    try:
        return _open(spec, precision, capture=True)
    except BackendError as error:
        session = _open(spec, precision, capture=False)
        _LOG.warning("graph '%s' runs without a CUDA graph, so somewhat slower: %s", spec.name, error)
        return session


def _open(spec: GraphSpec, precision: str, *, capture: bool) -> ort.InferenceSession:
    said = _load_libraries()
    provider = (_PROVIDER, provider_options(precision, capture=capture))
    session = open_session(spec, [provider, *CPU])
    # ONNX Runtime continues without a provider it cannot load; a user who asked for a GPU must know.
    if session.get_providers()[0] != _PROVIDER:
        raise BackendError(
            f"onnxruntime cannot load its CUDA provider: {said or 'CUDA or cuDNN libraries are missing'}; "
            f"run: {_INSTALL}  and see std-rt doctor"
        )
    return session


@cache
def _load_libraries() -> str:
    """Load CUDA and cuDNN from pip's packages, where ONNX Runtime does not look; returns what it printed."""
    if _PROVIDER not in ort.get_available_providers():
        raise BackendError(
            "this onnxruntime has no CUDA provider; run: "
            f"pip uninstall onnxruntime onnxruntime-gpu  and then: {_INSTALL}"
        )
    said = StringIO()
    with redirect_stdout(said):  # it prints, and standard output may be JSON for another program
        ort.preload_dlls()
    return " ".join(said.getvalue().split())[:300]


def _run_options(index: int, launch: Launch) -> ort.RunOptions:
    """Every launch has its own buffer addresses, so its session must keep a separate CUDA graph for it."""
    options = ort.RunOptions()
    if launch.graph not in GLUE:
        options.add_run_config_entry("gpu_graph_id", str(index + 1))
    return options


def _check_precision(spec: GraphSpec, precision: str) -> None:
    if "bf16" in (precision, spec.compute):
        raise BackendError(
            "backend 'cuda' does not compute bf16: onnxruntime has no CUDA kernels in it for several layers; "
            "export with --precision fp16, or use --backend tensorrt or openvino"
        )
    check_precision(spec, precision)
