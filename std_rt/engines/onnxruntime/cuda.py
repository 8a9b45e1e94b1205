"""ONNX Runtime on an NVIDIA GPU (onnxruntime-gpu): buffers stay there, large graphs replay as CUDA graphs.

Graphs run in the precision they were exported in: fp32 (tensor cores in TF32 unless fp32 is asked for), fp16,
or int8. bf16 is refused: the provider lacks kernels that SDXL needs in it (InstanceNormalization, Resize,
Pad, ReduceMean), and would carry those layers back to the CPU. Each launch ends with a wait of microseconds;
the TensorRT backends, which replay a whole frame, have none. Those waits are in a thread of their own, in
which all programs run: callers follow the motion, settle and present meanwhile (`CudaRunner.submit`).

Tested on one NVIDIA H200 with onnxruntime-gpu 1.31.1 and CUDA 13.0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from functools import cache
from io import StringIO
from itertools import count
from threading import RLock
from typing import Any

import numpy as np
import onnxruntime as ort

from std_rt.core.errors import BackendError
from std_rt.core.machine import install_hint
from std_rt.core.onnx_file import read_opset
from std_rt.engines.baked_inputs import baked_graph
from std_rt.engines.glue import GLUE
from std_rt.engines.gpu.libraries import missing_libraries, provider_problem
from std_rt.engines.gpu.probe import probe
from std_rt.engines.onnxruntime.io_binding import OrtRunner
from std_rt.engines.onnxruntime.ort_session import (
    CPU,
    OnnxRuntimeEngine,
    check_precision,
    failures,
    open_session,
    ports_of,
    run_error,
)
from std_rt.engines.program import Frame, Launch, Mark, Program, check_feeds, check_frame, no_mark
from std_rt.engines.protocol import Array, GraphSpec
from std_rt.engines.shared import Shared

__all__ = ["devices", "open_graph", "open_runner", "provider_options"]

_PROVIDER = "CUDAExecutionProvider"
_OPSET = 20  # every operator that export writes has a CUDA kernel at this one: see `cuda_graph`
_INSTALL = install_hint("cuda")
_LOG = logging.getLogger(__name__)
# ONNX Runtime captures in CUDA's global mode, which is spoilt by memory that any thread allocates or frees
# meanwhile. Whoever allocates, frees or captures holds the lock, so replays wait for no graph that is opened.
_ALLOCATING = RLock()
# Programs run here, in the order in which they were given work: ONNX Runtime keeps a CUDA graph for each
# thread, and sessions that replay must not be in two threads at once.
_LANE = ThreadPoolExecutor(1, thread_name_prefix="std-rt-cuda")
_SESSIONS = Shared[ort.InferenceSession](lambda session: None)
_GRAPH_IDS = count(1)
_NO_GRAPH = "-1"  # a run that is neither captured nor replayed


class CudaEngine(OnnxRuntimeEngine):
    """One graph of its own on the GPU, such as the style encoder, which runs beside frames."""

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        with _ALLOCATING:
            return super().__call__(**inputs)

    def close(self) -> None:
        """See `Engine`."""
        with _ALLOCATING:
            super().close()


class CudaRunner(OrtRunner):
    """A program on the GPU; its sessions may be shared with other programs, which take turns.

    `submit` is the first half of `run`, as in `engines.tensorrt.gpu_runner.GpuRunner`.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        """See `OrtRunner`."""
        super().__init__(*given, **named)
        self._given: dict[str, Array] = {}  # feeds, which may still be on their way
        self._feeding: list[Future[None]] = []  # since the last frame
        self._captured = False

    def set(self, **feeds: Array) -> None:
        """See `Runner`; frames on their way keep theirs."""
        self._check_open()
        check_feeds(self._program, feeds)
        self._given |= feeds
        self._feeding.append(_LANE.submit(super().set, **feeds))

    def run(self, frame: Frame, mark: Mark = no_mark) -> Frame:
        """See `Runner`. The first run captures, alone on the GPU."""
        return self._start(frame, mark).result()

    def submit(self, frame: Frame) -> Callable[[Mark], Frame]:
        """Start a frame and return at once: call the result, once, to wait for it.

        The whole frame is one stage for its ``mark``: "frame". Raises BackendError as `run` does.
        """
        self._check_open()
        check_frame(self._program, frame, self._given)
        running = self._start(frame.copy(), no_mark)

        def collect(mark: Mark) -> Frame:
            styled = running.result()
            mark("frame")
            return styled

        return collect

    def carried(self) -> dict[str, Array]:
        """See `Runner`."""
        return _LANE.submit(super().carried).result()

    def carry(self, **buffers: Array) -> None:
        """See `Runner`."""
        _LANE.submit(super().carry, **buffers).result()

    def close(self) -> None:
        """See `Runner`; frames on their way are finished first."""
        _LANE.submit(self._close).result()

    def _start(self, frame: Frame, mark: Mark) -> Future[Frame]:
        feeding, self._feeding = self._feeding, []
        return _LANE.submit(self._run, frame, mark, feeding)

    def _run(self, frame: Frame, mark: Mark, feeding: list[Future[None]]) -> Frame:
        for fed in feeding:
            fed.result()  # done before this began; raises what went wrong there
        with nullcontext() if self._captured else _ALLOCATING:
            styled = super().run(frame, mark)
        self._captured = True
        return styled

    def _close(self) -> None:
        with _ALLOCATING:
            super().close()


def open_graph(spec: GraphSpec, precision: str) -> OnnxRuntimeEngine:
    """Open one graph on the GPU, NumPy arrays in and out. Raises BackendError."""
    _check_precision(spec, precision)
    graph = _graph(spec)
    with _ALLOCATING:
        return CudaEngine(spec, _open(spec, precision, graph, capture=False), spec.compute)


def open_runner(program: Program, specs: Mapping[str, GraphSpec], precision: str) -> OrtRunner:
    """Open a program with all its buffers on the GPU. Raises BackendError."""
    for name in program.graphs:
        _check_precision(specs[name], precision)
    main = "unet" if "unet" in specs else program.graphs[0]

    def open_session(spec: GraphSpec) -> tuple[ort.InferenceSession, Callable[[], None]]:
        return _SESSIONS.take((spec.key, spec.identity, precision), lambda: _open_captured(spec, precision))

    with _ALLOCATING:
        _load_libraries()
        return CudaRunner(
            program,
            specs,
            open_session,
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
        return _open(spec, precision, None, capture=False)
    graph = _graph(spec)
    try:
        session = _open(spec, precision, graph, capture=True)
    except BackendError as error:
        if "graph capture" not in str(error):
            raise
        session = _open(spec, precision, graph, capture=False)
        _LOG.warning("graph '%s' runs without a CUDA graph, so much slower: %s", spec.name, error)
    _warm_up(spec, session)
    return session


def _warm_up(spec: GraphSpec, session: ort.InferenceSession) -> None:
    """Run once, without capture: cuDNN tries out its algorithms, for seconds that no frame should take."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", _NO_GRAPH)
    ports = ports_of(session.get_inputs(), spec.shapes)
    zeros = {name: np.zeros(*port) for name, port in ports.items()}
    try:
        session.run(None, zeros, options)
    except failures() as error:
        raise BackendError(run_error(spec, error)) from error


def _open(spec: GraphSpec, precision: str, graph: bytes | None, *, capture: bool) -> ort.InferenceSession:
    said = _load_libraries()
    provider = (_PROVIDER, provider_options(precision, capture=capture))
    session = open_session(spec, [provider, *CPU], graph)
    # ONNX Runtime continues without a provider it cannot load; a user who asked for a GPU must know.
    if session.get_providers()[0] != _PROVIDER:
        why = said or provider_problem() or "it loads but does not start; std-rt doctor --gpu tests it"
        raise BackendError(
            f"onnxruntime cannot load its CUDA provider: {why}; run: {_INSTALL}  and see std-rt doctor"
        )
    return session


def _graph(spec: GraphSpec) -> bytes | None:
    """The file of ``spec`` as the CUDA kernels want it, None if it is so already. Raises BackendError."""
    try:
        if not spec.baked and read_opset(spec.path) <= _OPSET:
            return None
    except (OSError, ValueError) as error:
        raise BackendError(run_error(spec, error)) from error
    return baked_graph(spec, _rewrite)


def _rewrite(model: Any) -> None:
    from std_rt.engines.onnxruntime.cuda_graph import for_cuda  # not before: it loads the onnx package

    for_cuda(model, _OPSET)


@cache
def _load_libraries() -> str:
    """Load CUDA and cuDNN from pip's packages, where ONNX Runtime does not look; returns what it printed.

    In one thread at a time: of two that redirect standard output at once, one would leave it redirected.
    Raises BackendError if one is missing: ONNX Runtime would say so at the first frame, or speak of memory.
    """
    if _PROVIDER not in ort.get_available_providers():
        raise BackendError(
            "this onnxruntime has no CUDA provider; run: "
            f"pip uninstall onnxruntime onnxruntime-gpu  and then: {_INSTALL}"
        )
    said = StringIO()
    with redirect_stdout(said):  # it prints, and standard output may be JSON for another program
        ort.preload_dlls()
    # Every session would say that no plugin brings the provider, which is built in.
    ort.set_default_logger_severity(3)
    missing = missing_libraries()
    if missing:
        raise BackendError(f"onnxruntime-gpu does not find {', '.join(missing)}; run: {_INSTALL}")
    return " ".join(said.getvalue().split())[:300]


def _run_options(index: int, launch: Launch) -> ort.RunOptions:
    """Every launch of every program has its own addresses, so its session keeps a CUDA graph for each."""
    options = ort.RunOptions()
    if launch.graph not in GLUE:
        options.add_run_config_entry("gpu_graph_id", str(next(_GRAPH_IDS)))
    return options


def _check_precision(spec: GraphSpec, precision: str) -> None:
    if "bf16" in (precision, spec.compute):
        raise BackendError(
            "backend 'cuda' does not compute bf16: onnxruntime has no CUDA kernels in it for several layers; "
            "export with --precision fp16, or use --backend tensorrt or openvino"
        )
    check_precision(spec, precision)
