"""`std-rt doctor --gpu`: tries every GPU backend with the built-in model, against the processor.

For each: the time to open (engines are built at first), the largest difference from the CPU's picture,
whether a frame is one CUDA graph, milliseconds per frame, memory, and the rate of half-precision matrix
products, which is the most that the card gives through that backend.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from std_rt.core.arrays import Frame
from std_rt.core.errors import BackendError, StdRtError, one_line
from std_rt.core.machine import describe_machine
from std_rt.engines import BackendInfo, backends, open_engine, open_runner
from std_rt.engines.gpu import probe
from std_rt.engines.program import FRAME, STYLED, Launch, Program
from std_rt.engines.protocol import Array, GraphSpec, Ports
from std_rt.engines.registry import GPU_BACKENDS
from std_rt.evaluation.bench import measure, sample_frame, stream_step
from std_rt.pipeline.runner_cache import RunnerKey
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["Say", "check_gpu"]

SIZE_PX, STEPS, FRAMES, WARMUP = 256, 2, 60, 5
MATRIX_SIDE, PRODUCTS, RUNS = 4096, 16, 10
MOST_DIFFERENCE = 24  # of 255, at one pixel: arithmetic in TF32 or fp16 moves pixels a little, a fault a lot
_MATMUL = Path(__file__).parents[1] / "engines" / "gpu" / "matmul.onnx"

Say = Callable[[str], None]


def check_gpu(say: Say) -> dict[str, Any]:
    """Everything found, for JSON; ``say`` is told what is being tried. Raises BackendError without a GPU."""
    found = probe.probe()
    if found.problem is not None:
        raise BackendError(f"there is no GPU to test: {found.problem}; std-rt doctor shows the rest")
    say("the picture on the processor")
    expected = _picture("cpu", None, "fp32")  # by itself it may take int8, which is further away
    tried = {info.name: _check(info, expected, say) for info in backends() if info.name in GPU_BACKENDS}
    return {
        "gpus": [str(gpu) for gpu in found.gpus],
        "cuda": found.cuda,
        "machine": str(describe_machine()),
        "backends": tried,
    }


def _check(info: BackendInfo, expected: Frame, say: Say) -> dict[str, Any]:
    """One backend: what it gave, and ``problem`` if it cannot be used or its picture is wrong."""
    result: dict[str, Any] = {"version": info.detail, "problem": ""}
    if not info.available:
        return result | {"problem": info.problem or f"not installed; run: {info.install}"}
    say(f"{info.name}: opening the built-in model")
    try:
        styled = _picture(info.name, result)
        say(f"{info.name}: matrix products")
        result["matrix_tflops"] = round(_matrix_rate(info.name), 1)
    except (StdRtError, OSError, RuntimeError) as error:  # of a driver or a library; the next one is tried
        return result | {"problem": one_line(error)}
    difference = int(np.abs(styled.astype(int) - expected).max())
    result["difference"] = difference
    if difference > MOST_DIFFERENCE:
        result["problem"] = f"its picture differs from the CPU's by {difference} of 255"
    return result


def _picture(backend: str, result: dict[str, Any] | None, precision: str = "auto") -> Frame:
    """A stylized frame; timings go to ``result``."""
    size = (SIZE_PX, SIZE_PX)
    begun, before = time.perf_counter(), _free_mb(result)
    with Stylizer.load(None, backend=backend, precision=precision, size=SIZE_PX, steps=STEPS) as stylizer:
        stylizer.set_style(sample_frame(stylizer.bundle.style_px, stylizer.bundle.style_px, seed=1))
        styled = stylizer.stylize(sample_frame(*size))
        if result is not None:
            result["open_s"] = round(time.perf_counter() - begun, 2)
            result["precision"] = stylizer.precision
            result["memory_mb"] = None if before is None else round(before - (_free_mb(result) or 0))
            runner = stylizer.runner(RunnerKey(stylizer.quality_at(size))).wait()
            # Whether a whole frame is replayed as one CUDA graph.
            result["one_graph"] = bool(getattr(runner, "captured", False))
            timing = measure({"": stream_step(stylizer, size)}, FRAMES, WARMUP, silent=True)[""]
            result["frame_ms"] = round(timing.median_ms["total"], 3)
            result["p95_ms"] = round(timing.p95_ms["total"], 3)
    return styled


def _free_mb(result: dict[str, Any] | None) -> float | None:
    """Memory of the GPU that nobody uses, in MB (2**20 bytes)."""
    if result is None:
        return None
    from std_rt.engines.gpu.driver import cuda_device

    device = cuda_device()
    device.bind()
    return device.memory_free() / 2**20


def _matrix_rate(backend: str) -> float:
    """TFLOP/s of products of fp16 matrices, a chain of them in one program."""
    side, kind = MATRIX_SIDE, np.dtype(np.float16)
    rng = np.random.default_rng(0)
    constants: dict[str, Array] = {
        name: (rng.standard_normal((side, side), np.float32) / np.sqrt(side)).astype(kind) for name in "ab"
    }
    names = ["a", *(f"c{i}" for i in range(PRODUCTS))]
    frame = (1, 8, 8, 3), np.dtype(np.uint8)
    image = (1, 3, 8, 8), np.dtype(np.float32)
    buffers: Ports = {FRAME: frame, STYLED: frame, "i": image}
    buffers |= dict.fromkeys(("b", *names), ((side, side), kind))
    products = [
        Launch("matmul", {"a": given, "b": "b"}, {"out": made}, "matmul") for given, made in pairwise(names)
    ]
    launches = (
        *products,
        Launch("frame_in", {"frame": FRAME}, {"image": "i"}, "convert"),
        Launch("frame_out", {"image": "i"}, {"frame": STYLED}, "convert"),
    )
    spec = GraphSpec("matmul", _MATMUL, {"a": (side, side), "b": (side, side)}, key="", compute="fp16")
    program = Program(launches, buffers, constants)
    runner = open_runner(backend, program, {"matmul": spec}, "auto", partial(open_engine, backend))
    blank = np.zeros(*frame)
    try:
        runner.run(blank)
        begun = time.perf_counter()
        for _ in range(RUNS):
            runner.run(blank)
        seconds = (time.perf_counter() - begun) / RUNS
    finally:
        runner.close()
    return 2 * side**3 * PRODUCTS / seconds / 1e12
