"""TensorRT on an NVIDIA GPU. See `trt_run` (how frames run) and `trt_build` (how engines are made).

Engines are built at first use, which takes minutes for a large UNet, and belong to this GPU, this version
and this driver. The vendor keeps its libraries on an index of its own, so this product is not run by us: the
code is that of `std_rt.engines.tensorrt.rtx`, which our tests build with.
"""

from __future__ import annotations

from collections.abc import Mapping

from std_rt.engines.cuda.driver import cuda_device, driver_problem
from std_rt.engines.program import Program
from std_rt.engines.registry import GraphSpec
from std_rt.engines.tensorrt.build import TENSORRT
from std_rt.engines.tensorrt.runner import DeviceEngine, DeviceRunner, open_session

__all__ = ["devices", "open_graph", "open_runner"]


def open_graph(spec: GraphSpec, precision: str) -> DeviceEngine:
    """Open one graph on the GPU, building its engine where the store has none. Raises BackendError."""
    return open_session(TENSORRT, precision).open_graph(spec)


def open_runner(program: Program, specs: Mapping[str, GraphSpec], precision: str) -> DeviceRunner:
    """Open a whole program on the GPU, building what the store has not. Raises BackendError."""
    return open_session(TENSORRT, precision).open_runner(program, specs, precision)


def devices() -> str:
    """The GPU, or why there is none, for `std-rt doctor`."""
    return driver_problem() or f"{cuda_device().gpu}, {cuda_device().driver}"
