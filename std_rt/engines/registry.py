"""The backend registry: lists the backends of this machine, chooses one, opens graphs and programs on it.

Backends are imported when they are first opened, so listing them costs no start-up time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

from std_rt.core.bundle import QUANTIZED
from std_rt.core.errors import BackendError
from std_rt.core.machine import describe_machine, fastest_arithmetic, install_hint
from std_rt.engines.protocol import Engine, GraphSpec

if TYPE_CHECKING:
    from std_rt.engines.program import Program, Runner

__all__ = [
    "BACKENDS",
    "FP8_BACKENDS",
    "GPU_BACKENDS",
    "PRECISIONS",
    "BackendInfo",
    "backends",
    "choose_backend",
    "choose_form",
    "in_form",
    "open_engine",
    "open_runner",
]

PRECISIONS = ("auto", "fp32", "bf16", *QUANTIZED)


@dataclass(frozen=True)
class BackendInfo:
    """One backend on this machine: ``detail`` is version and devices, ``install`` the command that adds it.

    ``problem`` says why an installed backend cannot be used here; empty if it can, or is not installed.
    """

    name: str
    available: bool
    detail: str
    install: str
    problem: str = ""


class Backend(NamedTuple):
    """How to find and open a backend.

    ``package``: the Python package it needs; ``implementation`` the module or object with its ``open_graph``,
    imported for the first graph. ``gpus``: the compute capabilities of NVIDIA GPUs it supports (89 is 8.9),
    empty for all that the driver accepts; None for a backend that needs no GPU.
    """

    package: str
    distributions: tuple[str, ...]
    install: str
    implementation: str
    gpus: tuple[int, ...] | None = None


BACKENDS: dict[str, Backend] = {  # in order of preference
    "tensorrt": Backend(
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        install_hint("tensorrt"),
        "std_rt.engines.tensorrt.gpu_runner:TENSORRT_BACKEND",
        gpus=(),
    ),
    "rtx": Backend(
        "tensorrt_rtx",
        ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        install_hint("rtx"),
        "std_rt.engines.tensorrt.gpu_runner:RTX_BACKEND",
        gpus=(75, 80, 86, 89, 120, 121),  # no data-centre GPUs
    ),
    "cuda": Backend(
        "onnxruntime",
        ("onnxruntime-gpu",),
        install_hint("cuda"),
        "std_rt.engines.onnxruntime.cuda",
        gpus=(),
    ),
    "openvino": Backend("openvino", ("openvino",), install_hint(), "std_rt.engines.openvino.engine"),
    "onnxruntime": Backend(
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
        install_hint("onnx"),
        "std_rt.engines.onnxruntime.ort_session",
    ),
}
FP8_BACKENDS = ("rtx", "tensorrt")
GPU_BACKENDS = {name: backend.gpus for name, backend in BACKENDS.items() if backend.gpus is not None}


def backends(*, probe: bool = False) -> list[BackendInfo]:
    """Every backend, best first. ``probe`` also imports the usable ones to name their devices (slow)."""
    return [_info(name, probe) for name in BACKENDS]


def choose_backend(name: str = "auto") -> tuple[str, str]:
    """(backend, reason). ``auto`` takes the first usable one, ``cpu`` the first that needs no GPU.

    A backend asked for by name is used or refused, never replaced: BackendError says what to install.
    """
    if name in ("auto", "cpu"):
        return _first_available([key for key in BACKENDS if name == "auto" or key not in GPU_BACKENDS])
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise BackendError(f"unknown backend '{name}'; use --backend with one of auto, {known}")
    info = _info(name)
    if info.problem:
        raise BackendError(
            f"backend '{name}' is installed but cannot be used here: {info.problem}; use --backend auto"
        )
    if not info.available:
        problem = _gpu_problem(name) if name in GPU_BACKENDS else ""
        needs = f"needs an NVIDIA GPU ({problem}) and " if problem else ""
        raise BackendError(f"backend '{name}' {needs}is not installed; run: {info.install}")
    return name, "asked for"


def choose_form(backend: str, precision: str, forms: tuple[str, ...]) -> tuple[str, str]:
    """(one of ``forms``, why): the form of graphs that a backend runs at a ``precision`` of `PRECISIONS`.

    ``forms`` are what the graphs are there in (`Bundle.forms`, `GraphSpec.forms`). ``auto`` is int8 where the
    processor does it fastest; FP8 has to be asked for. Raises BackendError if the backend does not compute
    what is asked for, or none of the forms, and for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise BackendError(f"unknown precision '{precision}'; use one of {', '.join(PRECISIONS)}")
    if precision == "fp8" and backend not in FP8_BACKENDS:
        known = " or ".join(FP8_BACKENDS)
        raise BackendError(
            f"backend '{backend}' does not compute in FP8; use --precision auto, or --backend {known} on an "
            "RTX 40 GPU or newer"
        )
    if backend in GPU_BACKENDS:
        if "int8" in (forms[0], precision):
            instead = "--precision auto" if forms[0] != "int8" else "--backend cpu"
            raise BackendError(
                f"backend '{backend}' runs no int8 graphs: their activations are uint8 with a zero point, "
                f"which GPU engines refuse; use {instead}"
            )
        if precision == "fp8" and "fp8" in forms:
            return "fp8", "asked for"
        return forms[0], f"{backend} runs graphs as they were exported"
    if precision != "auto":
        return precision if precision in forms else forms[0], "asked for"
    if forms[0] == "int8":
        return "int8", "the bundle has no other form"
    if backend != "openvino":  # ONNX Runtime was slower in int8 than in fp32, also with VNNI
        return forms[0], f"{backend} runs graphs as they were exported"
    has_int8 = "int8" in forms
    arithmetic, why = fastest_arithmetic(describe_machine(), int8_at_hand=has_int8)
    if arithmetic != "int8":
        return forms[0], why
    return ("int8", why) if has_int8 else (forms[0], f"{why}, but the bundle has no int8 form")


def in_form(backend: str, spec: GraphSpec, precision: str) -> tuple[GraphSpec, str]:
    """``spec`` with the file that `choose_form` chooses, and the precision of what is not quantized in it."""
    form, _ = choose_form(backend, precision, spec.forms)
    path = spec.quantized.get(form, spec.path)
    between = "auto" if precision in QUANTIZED else precision
    return replace(spec, path=path, compute=form, quantized={}), between


def open_engine(backend: str, spec: GraphSpec, precision: str = "auto") -> Engine:
    """Open ``spec`` on a backend name from `choose_backend` (or ``auto``).

    ``precision`` of the arithmetic: ``auto`` is bf16 if the processor has bf16 hardware, else int8 if
    `choose_form` says so and the graph is there in int8, else fp32. Raises BackendError if the backend is
    missing, does not support the precision, or cannot run the graph.
    """
    name, _ = choose_backend(backend)
    engine: Engine = _implementation(name).open_graph(*in_form(name, spec, precision))
    return engine


def open_runner(
    backend: str,
    program: Program,
    specs: Mapping[str, GraphSpec],
    precision: str,
    open_graph: Callable[[GraphSpec], Engine],
) -> Runner:
    """Open ``program`` on a backend: in the backend's own runner if it has one, else graph by graph.

    ``specs`` has one entry per graph of the program; ``open_graph`` opens each graph in that case.
    Raises BackendError as `open_engine` does.
    """
    name, _ = choose_backend(backend)
    implementation = _implementation(name)
    if hasattr(implementation, "open_runner"):
        chosen = {graph: in_form(name, spec, precision)[0] for graph, spec in specs.items()}
        runner: Runner = implementation.open_runner(program, chosen, precision)
        return runner
    from std_rt.engines.host import open_on_host

    return open_on_host(program, specs, open_graph)


def _first_available(names: list[str]) -> tuple[str, str]:
    """The first usable backend. GPU backends that are not installed are not worth mentioning."""
    passed: list[str] = []
    for name in names:
        info = _info(name)
        if info.available:
            return name, "; ".join(passed) or "the fastest that is installed"
        if info.problem:
            passed.append(f"{name} is installed, but {info.problem}")
        elif name not in GPU_BACKENDS:
            passed.append(f"{name} not installed")
    commands = "  or  ".join(backend.install for backend in BACKENDS.values() if backend.gpus is None)
    raise BackendError(f"no backend is installed; run: {commands}")


def _info(name: str, probe: bool = False) -> BackendInfo:
    install = BACKENDS[name].install
    if not _installed(name):
        return BackendInfo(name, False, "not installed", install)
    detail = _version(BACKENDS[name].distributions)
    problem = _gpu_problem(name) if name in GPU_BACKENDS else ""
    if problem:
        return BackendInfo(name, False, f"{detail}; {problem}", install, problem)
    if probe:
        detail = f"{detail}; {_implementation(name).devices()}"
    return BackendInfo(name, True, detail, install)


def _gpu_problem(name: str) -> str:
    """Why no GPU here can run backend ``name``; empty if one can. Asks the driver once per process.

    The first GPU counts, which is the one that runs; if another one would do, its name is given.
    """
    from std_rt.engines.gpu.probe import probe

    found, known = probe(), GPU_BACKENDS[name]
    if found.problem:
        return found.problem
    if known and found.gpus[0].sm not in known:
        others = [i for i, gpu in enumerate(found.gpus) if gpu.sm in known]
        instead = f"; {found.gpus[others[0]]} is: use --device cuda:{others[0]}" if others else ""
        names = ", ".join(f"SM{sm}" for sm in known)
        return f"{found.gpus[0]} is not a GPU it supports ({names}){instead}"
    needed = _cuda_major(name)
    if needed is not None and found.cuda and int(found.cuda.split(".")[0]) < needed:
        return (
            f"it needs a driver for CUDA {needed}, and this one supports CUDA {found.cuda}; "
            "install a newer NVIDIA driver"
        )
    return ""


def _cuda_major(name: str) -> int | None:
    """The CUDA that an installed backend was built with, 13; None if it does not say."""
    from std_rt.engines.gpu.libraries import cuda_version

    if name == "cuda":
        version = cuda_version()
        return None if version is None else int(version.split(".")[0])
    for distribution in BACKENDS[name].distributions:
        number = distribution.rpartition("-cu")[2]
        if number.isdigit() and _is_distributed(distribution):
            return int(number)
    return None


def _is_distributed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _implementation(name: str) -> Any:
    return resolve_name(BACKENDS[name].implementation)


def _installed(name: str) -> bool:
    """Whether its package is installed; for ``cuda``, whether it is the ONNX Runtime build with CUDA."""
    spec = find_spec(BACKENDS[name].package)
    if spec is None or spec.origin is None:  # no origin: only a folder of that name
        return False
    return name != "cuda" or any((Path(spec.origin).parent / "capi").glob("*onnxruntime_providers_cuda.*"))


def _version(distributions: tuple[str, ...]) -> str:
    found = next((name for name in distributions if _is_distributed(name)), None)
    return "unknown version" if found is None else f"{found} {metadata.version(found)}"
