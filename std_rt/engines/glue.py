"""Glue: the small operations between a model's graphs, as one table of ports and NumPy functions.

They belong to no model: format conversion, joining and splitting of rows, masks, and linear combinations (a
sampler's step is nothing else). Backends that keep a frame on their device run each as an ONNX file with the
same ports (`glue_path`). `tools/make_glue.py` writes those files; tests compare them with the NumPy
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import BackendError
from std_rt.core.machine import install_hint
from std_rt.engines.protocol import Array, GraphSpec

__all__ = ["GLUE", "Glue", "glue_folder", "glue_path", "glue_spec"]

Axes = tuple[str | int, ...]
_FRAME: Axes = ("batch", "height", "width", 3)  # uint8; everything else is float32
_IMAGE: Axes = ("batch", 3, "height", "width")
_LATENTS: Axes = ("batch", "channels", "height", "width")
_TWICE: Axes = ("double_batch", "channels", "height", "width")
_REST: Axes = ("rest", "channels", "height", "width")
_ALL: Axes = ("all", "channels", "height", "width")
_ONE: Axes = (1, "channels", "height", "width")
_FACTOR: Axes = ("batch", 1, 1, 1)
_MASK: Axes = ("batch", 1, "height", "width")


@dataclass(frozen=True)
class Glue:
    """One operation: ``run(**inputs, **outputs)`` computes it in NumPy, writing into the output arrays.

    ``inputs`` and ``outputs`` map ports to axes; equal names are equal sizes.
    """

    run: Callable[..., None]
    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]


def _frame_in(*, frame: NDArray[np.uint8], image: Array) -> None:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    np.multiply(frame.transpose(0, 3, 1, 2), np.float32(1 / 127.5), out=image)
    image -= 1


def _frame_out(*, image: Array, frame: NDArray[np.uint8]) -> None:
    """float32 [B, 3, H, W], clipped to [-1, 1] -> uint8 [B, H, W, 3], rounded."""
    scaled = image * np.float32(127.5)
    scaled += 128  # 127.5 to shift the range, 0.5 to round
    np.clip(scaled, 0, 255, out=scaled)
    frame[...] = scaled.astype(np.uint8).transpose(0, 2, 3, 1)


def _combine2(*, x: Array, y: Array, a: Array, b: Array, out: Array) -> None:
    """``a x + b y``."""
    np.multiply(x, a, out=out)
    out += b * y


def _combine3(*, x: Array, y: Array, z: Array, a: Array, b: Array, c: Array, out: Array) -> None:
    """``a x + b y + c z``."""
    np.multiply(x, a, out=out)
    out += b * y
    out += c * z


def _blend(*, x: Array, y: Array, mask: Array, out: Array) -> None:
    """``x`` where the mask is 1, ``y`` where it is 0."""
    np.multiply(x, mask, out=out)
    out += (1 - mask) * y


def _double(*, x: Array, out: Array) -> None:
    """[B, ...] -> [2 B, ...]: the batch twice, for guidance."""
    out[: len(x)] = x
    out[len(x) :] = x


def _halves(*, x: Array, first: Array, second: Array) -> None:
    """[2 B, ...] -> two of [B, ...]."""
    first[...] = x[: len(first)]
    second[...] = x[len(first) :]


def _join(*, x: Array, y: Array, out: Array) -> None:
    """[A, ...] and [B, ...] -> [A + B, ...]."""
    out[: len(x)] = x
    out[len(x) :] = y


def _split_last(*, x: Array, rest: Array, last: Array) -> None:
    """[B, ...] -> all rows but the last [B - 1, ...], and the last one [1, ...]; B is 2 or more."""
    rest[...] = x[:-1]
    last[...] = x[-1:]


def _combination(run: Callable[..., None], arrays: str, factors: str) -> Glue:
    return Glue(run, dict.fromkeys(arrays, _LATENTS) | dict.fromkeys(factors, _FACTOR), {"out": _LATENTS})


GLUE: dict[str, Glue] = {
    "frame_in": Glue(_frame_in, {"frame": _FRAME}, {"image": _IMAGE}),
    "frame_out": Glue(_frame_out, {"image": _IMAGE}, {"frame": _FRAME}),
    "combine2": _combination(_combine2, "xy", "ab"),
    "combine3": _combination(_combine3, "xyz", "abc"),
    "blend": Glue(_blend, {"x": _LATENTS, "y": _LATENTS, "mask": _MASK}, {"out": _LATENTS}),
    "double": Glue(_double, {"x": _LATENTS}, {"out": _TWICE}),
    "halves": Glue(_halves, {"x": _TWICE}, {"first": _LATENTS, "second": _LATENTS}),
    "join": Glue(_join, {"x": _LATENTS, "y": _REST}, {"out": _ALL}),
    "split_last": Glue(_split_last, {"x": _ALL}, {"rest": _REST, "last": _ONE}),
}


def glue_folder() -> Path:
    """The folder of the ONNX files, which are package data."""
    return Path(str(files("std_rt"))) / "engines" / "glue_onnx"


def glue_path(op: str) -> Path:
    """The ONNX file of an operation. Raises BackendError if there is none."""
    path = glue_folder() / f"{op}.onnx"
    if op not in GLUE or not path.is_file():
        raise BackendError(
            f"there is no graph for the operation '{op}' (known: {', '.join(GLUE)}); "
            f"install std-rt again: {install_hint()} --force-reinstall --no-deps"
        )
    return path


def glue_spec(op: str, shapes: Mapping[str, tuple[int, ...]]) -> GraphSpec:
    """An operation as a graph to open at ``shapes``."""
    return GraphSpec(f"glue.{op}", glue_path(op), shapes, key="")
