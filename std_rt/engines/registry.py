"""The one boundary to hardware: an engine is a callable that runs one graph at fixed shapes.

    spec = GraphSpec("unet", path, {"sample": (1, 8, 32, 32), ...}, key=bundle.digest)
    engine = open_engine("openvino", spec)
    noise_pred = engine(sample=..., timestep=...)["noise_pred"]

Backends are imported when they are opened, so listing them costs no start-up time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import BackendError
from std_rt.core.machine import install_hint

if TYPE_CHECKING:
    from std_rt.engines.program import Program, Runner

__all__ = [
    "BACKENDS",
    "GPU_BACKENDS",
    "PRECISIONS",
    "STEADY_INPUTS",
    "BackendInfo",
    "Engine",
    "GraphSpec",
    "Ports",
    "backends",
    "cache_root",
    "check_inputs",
    "choose_backend",
    "gpu_problem",
    "open_engine",
    "open_runner",
    "user_folder",
]

Array = NDArray[Any]
Ports = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]
PRECISIONS = ("auto", "fp32", "bf16")
# UNet inputs that stay the same from frame to frame; what follows from them alone is computed once.
STEADY_INPUTS = frozenset(
    {"timestep", "encoder_hidden_states", "text_embeds", "time_ids", "style_tokens", "style_strength"}
)


class Engine(Protocol):
    """One graph, opened at static shapes."""

    inputs: Ports
    outputs: Ports
    precision: str

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Run once. The arrays returned are valid until the next call; copy what must live longer.

        Raises BackendError on a missing or unknown input, or a wrong shape or dtype.
        """

    def close(self) -> None:
        """Free what the backend holds; the engine must not be called afterwards."""


@dataclass(frozen=True)
class GraphSpec:
    """What to open: the ONNX file, a static shape for every input, and a key for caches (empty: no cache).

    ``steady`` names inputs that rarely change. Engines may keep what follows from them alone, for as long
    as their values (which are compared at every call) stay the same; results do not depend on it.
    ``compute`` is what the file's arithmetic is written in, as the bundle's manifest says: fp32, fp16, bf16
    or int8.
    """

    name: str
    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    key: str
    steady: frozenset[str] = STEADY_INPUTS
    compute: str = "fp32"


@dataclass(frozen=True)
class BackendInfo:
    """One backend as found here: ``detail`` is version and devices, ``install`` the command that adds it.

    ``problem`` is why one that is installed cannot be used here; empty where it can, or is not installed.
    """

    name: str
    available: bool
    detail: str
    install: str
    problem: str = ""


# name -> (importable module, distribution names, install command), in order of preference.
BACKENDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "tensorrt": (
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        install_hint("tensorrt"),
    ),
    "rtx": (
        "tensorrt_rtx",
        ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        install_hint("rtx"),
    ),
    "cuda": ("onnxruntime", ("onnxruntime-gpu",), install_hint("cuda")),
    "openvino": ("openvino", ("openvino",), install_hint()),
    "onnxruntime": (
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
        install_hint("onnx"),
    ),
}
# Backend -> its module, imported by the first engine that needs it.
_MODULES = {
    "tensorrt": "std_rt.engines.tensorrt.tensorrt",
    "rtx": "std_rt.engines.tensorrt.rtx",
    "cuda": "std_rt.engines.onnxruntime.cuda",
    "openvino": "std_rt.engines.openvino.engine",
    "onnxruntime": "std_rt.engines.onnxruntime.cpu",
}

# Those that need an NVIDIA GPU, and the compute capabilities they know (89 is 8.9); empty: all that a
# driver accepts. TensorRT-RTX leaves out the GPUs of data centres.
GPU_BACKENDS: dict[str, tuple[int, ...]] = {
    "tensorrt": (),
    "rtx": (75, 80, 86, 89, 120, 121),
    "cuda": (),
}


def backends(*, probe: bool = False) -> list[BackendInfo]:
    """Every backend, best first. ``probe`` also imports those usable to name their devices (slow)."""
    return [_info(name, probe) for name in BACKENDS]


def choose_backend(name: str = "auto") -> tuple[str, str]:
    """(backend, reason). ``auto`` takes the first one usable; a name is taken or refused, never swapped.

    ``cpu`` is ``auto`` without those that need a GPU.

    Raises BackendError with the command that installs what is missing.
    """
    if name in ("auto", "cpu"):
        return _first_available([key for key in BACKENDS if name == "auto" or key not in GPU_BACKENDS])
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise BackendError(f"there is no backend '{name}'; use --backend with one of auto, {known}")
    info = _info(name)
    if info.problem:
        raise BackendError(
            f"backend '{name}' is installed and cannot be used here: {info.problem}; use --backend auto"
        )
    if not info.available:
        raise BackendError(f"backend '{name}' is not installed; run: {info.install}")
    return name, "asked for"


def open_engine(backend: str, spec: GraphSpec, precision: str = "auto") -> Engine:
    """Open ``spec`` on a backend name from `choose_backend` (or ``auto``).

    ``precision`` is what the arithmetic runs in: ``auto`` is bf16 where the processor computes it in
    hardware and fp32 elsewhere. Raises BackendError when the backend is missing, cannot do the
    precision, or cannot run the graph.
    """
    _check_precision(precision)
    name, _ = choose_backend(backend)
    opener: Callable[[GraphSpec, str], Engine] = _module(name).open_graph
    return opener(spec, precision)


def open_runner(
    backend: str,
    program: Program,
    specs: Mapping[str, GraphSpec],
    precision: str,
    open_graph: Callable[[GraphSpec], Engine],
) -> Runner:
    """Open ``program`` on a backend: by the backend's own runner where it has one, else graph by graph.

    ``specs`` has one for every graph of the program; ``open_graph`` opens one where the backend has no
    runner of its own. Raises BackendError as `open_engine` does.
    """
    _check_precision(precision)
    name, _ = choose_backend(backend)
    module = _module(name)
    if hasattr(module, "open_runner"):
        opener: Callable[[Program, Mapping[str, GraphSpec], str], Runner] = module.open_runner
        return opener(program, specs, precision)
    from std_rt.engines.program import open_on_host

    return open_on_host(program, specs, open_graph)


def check_inputs(name: str, ports: Ports, given: Mapping[str, Array]) -> None:
    """Raise BackendError unless ``given`` fits ``ports``; backends report this unreadably or not at all."""
    if given.keys() != ports.keys():
        found = ", ".join(given) or "nothing"
        raise BackendError(f"graph '{name}' takes {', '.join(ports)}; it was given {found}")
    for key, (shape, dtype) in ports.items():
        array = given[key]
        if array.shape != shape or array.dtype != dtype:
            raise BackendError(
                f"graph '{name}' takes {key} as {dtype} {list(shape)}; "
                f"it was given {array.dtype} {list(array.shape)}"
            )


def cache_root() -> Path | None:
    """A writable folder for what backends compile, or None; the variable ``STD_RT_CACHE`` overrides it."""
    root = user_folder("STD_RT_CACHE", "user_cache_dir")
    return root if root is not None and os.access(root, os.W_OK) else None


def user_folder(variable: str, kind: str) -> Path | None:
    """The folder that ``variable`` names, else platformdirs' of that kind; None where it cannot be made."""
    asked = os.environ.get(variable)
    if asked:
        root = Path(asked)
    else:
        import platformdirs

        root = Path(getattr(platformdirs, kind)("std-rt", appauthor=False))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return root


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise BackendError(f"there is no precision '{precision}'; use one of {', '.join(PRECISIONS)}")


def _first_available(names: list[str]) -> tuple[str, str]:
    """The first that can be used. What is not installed and needs a GPU is not worth a word."""
    passed: list[str] = []
    for name in names:
        info = _info(name)
        if info.available:
            return name, "; ".join(passed) or "the fastest that is installed"
        if info.problem:
            passed.append(f"{name} is installed, but {info.problem}")
        elif name not in GPU_BACKENDS:
            passed.append(f"{name} not installed")
    commands = "  or  ".join(entry[2] for name, entry in BACKENDS.items() if name not in GPU_BACKENDS)
    raise BackendError(f"no backend is installed; run: {commands}")


def _info(name: str, probe: bool = False) -> BackendInfo:
    _, distributions, install = BACKENDS[name]
    if not _installed(name):
        return BackendInfo(name, False, "not installed", install)
    detail = _version(distributions)
    problem = gpu_problem(name) if name in GPU_BACKENDS else ""
    if problem:
        return BackendInfo(name, False, f"{detail}; {problem}", install, problem)
    if probe:
        detail = f"{detail}; {_module(name).devices()}"
    return BackendInfo(name, True, detail, install)


def gpu_problem(name: str) -> str:
    """Why no GPU here can run backend ``name``; empty where one can. Asks the driver once a process."""
    from std_rt.engines.cuda.probe import probe

    found, known = probe(), GPU_BACKENDS[name]
    if found.problem:
        return found.problem
    if known and found.gpus[0].sm not in known:
        names = ", ".join(f"SM{sm}" for sm in known)
        return f"{found.gpus[0]} is none of the GPUs it is made for ({names})"
    return ""


def _module(name: str) -> Any:
    """A backend's module."""
    return import_module(_MODULES[name])


def _installed(name: str) -> bool:
    """True where its module is there; of ONNX Runtime's builds, where the one with CUDA is."""
    spec = find_spec(BACKENDS[name][0])
    if spec is None or spec.origin is None:  # no origin: a folder of that name, which is no package
        return False
    return name != "cuda" or any((Path(spec.origin).parent / "capi").glob("*onnxruntime_providers_cuda.*"))


def _version(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown version"
