"""TensorRT-RTX on an NVIDIA GPU. See `trt_run` (how frames run) and `trt_build` (how engines are made).

Engines can be built ahead, for GPUs that are not there (`std-rt engines build --sm 89,120`); the last
stretch is compiled where they run, once a GPU and driver. Building is tested with the real product; running
an engine was not run on a GPU by us.
"""

from __future__ import annotations

from collections.abc import Mapping

from std_rt.engines.cuda.driver import cuda_device, driver_problem
from std_rt.engines.program import Program
from std_rt.engines.registry import GraphSpec
from std_rt.engines.tensorrt.build import RTX
from std_rt.engines.tensorrt.runner import DeviceEngine, DeviceRunner, open_session

__all__ = ["devices", "open_graph", "open_runner"]


def open_graph(spec: GraphSpec, precision: str) -> DeviceEngine:
    """Open one graph on the GPU, building its engine where the store has none. Raises BackendError."""
    return open_session(RTX, precision).open_graph(spec)


def open_runner(program: Program, specs: Mapping[str, GraphSpec], precision: str) -> DeviceRunner:
    """Open a whole program on the GPU, building what the store has not. Raises BackendError."""
    return open_session(RTX, precision).open_runner(program, specs, precision)


def devices() -> str:
    """The GPU, or why there is none, for `std-rt doctor`."""
    return driver_problem() or f"{cuda_device().gpu}, {cuda_device().driver}"
