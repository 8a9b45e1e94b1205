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
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from std_rt.errors import BackendError

__all__ = [
    "BACKENDS",
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
    "open_engine",
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
    """

    name: str
    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    key: str
    steady: frozenset[str] = STEADY_INPUTS


@dataclass(frozen=True)
class BackendInfo:
    """One backend as found here: ``detail`` is version and devices, ``install`` the command that adds it."""

    name: str
    available: bool
    detail: str
    install: str


# name -> (importable module, distribution names, install command), in order of preference.
BACKENDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "openvino": ("openvino", ("openvino",), "pip install std-rt"),
    "onnxruntime": (
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
        "pip install 'std-rt[onnx]'",
    ),
}


def backends(*, probe: bool = False) -> list[BackendInfo]:
    """Every backend, best first. ``probe`` also imports those installed to name their devices (slow)."""
    return [_info(name, probe) for name in BACKENDS]


def choose_backend(name: str = "auto") -> tuple[str, str]:
    """(backend, reason). ``auto`` takes the first one installed; a name is taken or refused, never swapped.

    Raises BackendError with the command that installs what is missing.
    """
    found = {info.name: info for info in backends()}
    if name == "auto":
        return _first_available(list(found.values()))
    if name not in found:
        known = ", ".join(BACKENDS)
        raise BackendError(f"there is no backend '{name}'; use --backend with one of auto, {known}")
    if not found[name].available:
        raise BackendError(f"backend '{name}' is not installed; run: {found[name].install}")
    return name, "asked for"


def open_engine(backend: str, spec: GraphSpec, precision: str = "auto") -> Engine:
    """Open ``spec`` on a backend name from `choose_backend` (or ``auto``).

    ``precision`` is what the arithmetic runs in: ``auto`` is bf16 where the processor computes it in
    hardware and fp32 elsewhere. Raises BackendError when the backend is missing, cannot do the
    precision, or cannot run the graph.
    """
    if precision not in PRECISIONS:
        raise BackendError(f"there is no precision '{precision}'; use one of {', '.join(PRECISIONS)}")
    name, _ = choose_backend(backend)
    opener: Callable[[GraphSpec, str], Engine] = import_module(f"std_rt.engines.{name}").open_graph
    return opener(spec, precision)


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
    asked = os.environ.get("STD_RT_CACHE")
    if asked:
        root = Path(asked)
    else:
        import platformdirs

        root = Path(platformdirs.user_cache_dir("std-rt", appauthor=False))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return root if os.access(root, os.W_OK) else None


def _first_available(found: list[BackendInfo]) -> tuple[str, str]:
    for info in found:
        if info.available:
            before = ", ".join(other.name for other in found[: found.index(info)])
            return info.name, f"{before} not installed" if before else "the fastest that is installed"
    commands = "  or  ".join(info.install for info in found)
    raise BackendError(f"no backend is installed; run: {commands}")


def _info(name: str, probe: bool) -> BackendInfo:
    module, distributions, install = BACKENDS[name]
    if find_spec(module) is None:
        return BackendInfo(name, False, "not installed", install)
    detail = _version(distributions)
    if probe:
        detail = f"{detail}; {import_module(f'std_rt.engines.{name}').devices()}"
    return BackendInfo(name, True, detail, install)


def _version(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown version"
