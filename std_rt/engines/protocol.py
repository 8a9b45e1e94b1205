"""The engine protocol: the only interface to hardware. An engine runs one graph at fixed shapes.

spec = GraphSpec("unet", path, {"sample": (1, 8, 32, 32), ...}, key=bundle.digest)
engine = open_engine("openvino", spec)
noise_pred = engine(sample=..., timestep=...)["noise_pred"]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import BackendError

__all__ = ["STEADY_INPUTS", "Array", "Engine", "GraphSpec", "Ports", "check_array", "check_inputs"]

Array = NDArray[Any]
Ports = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]
# UNet inputs that stay the same from frame to frame; whatever depends only on them is computed once.
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
        """Free the backend's resources; the engine must not be called afterwards."""


@dataclass(frozen=True)
class GraphSpec:
    """One graph to open: the ONNX file, a static shape for every input, a key for caches (empty: no cache).

    ``steady`` names inputs that rarely change. Engines may cache what depends only on them for as long as
    their values (compared at every call) stay the same; this does not change results. ``compute`` is the
    precision that the file's arithmetic is written in, as the bundle's manifest says: fp32, fp16, bf16, int8
    or fp8. ``quantized`` are the files of the same graph in int8 or fp8, by that form. ``baked`` are inputs
    that will never have other values: an engine may be built around them and ignore what it is given.
    """

    name: str
    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    key: str
    steady: frozenset[str] = STEADY_INPUTS
    compute: str = "fp32"
    quantized: Mapping[str, Path] = field(default_factory=dict)
    baked: Mapping[str, Array] = field(default_factory=dict, compare=False)

    @property
    def forms(self) -> tuple[str, ...]:
        """``compute``, then the forms that are files of their own."""
        return (self.compute, *self.quantized)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for specs that can share one engine; hashable."""
        shapes, quantized = (tuple(sorted(found.items())) for found in (self.shapes, self.quantized))
        return self.name, self.path, quantized, shapes, self.steady, self.compute, self.baked_digest

    @cached_property
    def baked_digest(self) -> str:
        """sha256 hex of ``baked``; empty if there is nothing in it."""
        digest = hashlib.sha256()
        for name, array in sorted(self.baked.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
        return digest.hexdigest() if self.baked else ""

    def describe_shapes(self) -> str:
        """The shapes for an error message: ``sample [1, 4, 8, 8], timestep [1]``."""
        return ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())


def check_inputs(name: str, ports: Ports, inputs: Mapping[str, Array]) -> None:
    """Raise BackendError unless ``inputs`` fit ``ports``; backends report it unreadably, if at all."""
    if inputs.keys() != ports.keys():
        found = ", ".join(inputs) or "nothing"
        raise BackendError(f"graph '{name}' takes {', '.join(ports)}; got {found}")
    for key, port in ports.items():
        check_array(f"graph '{name}' takes {key} as", port, inputs[key])


def check_array(expected: str, port: tuple[tuple[int, ...], np.dtype[Any]], array: Array) -> None:
    """Raise BackendError unless ``array`` has the port's shape and dtype; ``expected`` begins the message."""
    shape, dtype = port
    if array.shape != shape or array.dtype != dtype:
        raise BackendError(f"{expected} {dtype} {list(shape)}; got {array.dtype} {list(array.shape)}")
