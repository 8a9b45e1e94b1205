"""The operations between a model's graphs as ONNX files, for backends that keep a frame on their device.

Each computes what the NumPy function of its name in `program.GLUE` computes, with ports of the same names
and open axes for batch and size. Written by `std_rt.export.glue`; no weights inside, a few scalars at most.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from std_rt.core.errors import BackendError
from std_rt.core.machine import install_hint
from std_rt.engines.program import GLUE

__all__ = ["GLUE_PORTS", "glue_folder", "glue_path"]

# operation -> (ports it reads, ports it writes), named as the keyword arguments in `program.GLUE`.
# frame: uint8 [B, H, W, 3]; image: float32 [B, 3, H, W]; a, b, c: float32 [B, 1, 1, 1]; the rest: float32
# [B, C, h, w], where `out` of double and `x` of halves hold 2 B, `out` of join the rows of x and y, `x` of
# split_last those of rest and last.
GLUE_PORTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "frame_in": (("frame",), ("image",)),
    "frame_out": (("image",), ("frame",)),
    "combine2": (("x", "y", "a", "b"), ("out",)),
    "combine3": (("x", "y", "z", "a", "b", "c"), ("out",)),
    "double": (("x",), ("out",)),
    "halves": (("x",), ("first", "second")),
    "join": (("x", "y"), ("out",)),
    "split_last": (("x",), ("rest", "last")),
}


def glue_folder() -> Path:
    """Where the files are: package data, beside this module."""
    return Path(str(files("std_rt"))) / "engines" / "glue"


def glue_path(op: str) -> Path:
    """The ONNX file of one operation of `program.GLUE`. Raises BackendError where there is none."""
    path = glue_folder() / f"{op}.onnx"
    if op not in GLUE or not path.is_file():
        known = ", ".join(GLUE)
        raise BackendError(
            f"there is no graph of the operation '{op}' (there are {known}); "
            f"install std-rt again: {install_hint()} --force-reinstall --no-deps"
        )
    return path
