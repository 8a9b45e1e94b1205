"""The program of a frame: a fixed list of launches over named buffers, and the protocol of its runners.

    program = Program(launches, buffers, constants)
    runner = HostRunner(engines, program)
    runner.set(noise_0=..., style_tokens=...)
    styled = runner.run(frame)

Which graph runs on which buffers, and in which order, is fixed before the first frame. So a GPU can keep all
buffers in its memory and replay the whole list as one CUDA graph: a frame goes in as uint8, a frame comes out
as uint8, and nothing else crosses. Between the model's graphs run a few small operations (`engines.glue`).

Most buffers are written before they are read, so a run does not depend on the one before. The exceptions
are the buffers in ``carried``: a run reads what the previous run left in them, zeros at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from std_rt.core.arrays import Frame
from std_rt.core.errors import BackendError
from std_rt.engines.glue import GLUE, glue_spec
from std_rt.engines.protocol import Array, GraphSpec, Ports, check_array

__all__ = [
    "FRAME",
    "STYLED",
    "Frame",
    "Launch",
    "Mark",
    "Program",
    "Runner",
    "check_carried",
    "check_feeds",
    "check_frame",
    "launch_specs",
    "no_mark",
]

Mark = Callable[[str], None]

FRAME, STYLED = "frame", "styled"  # the buffers [B, H, W, 3] uint8 that cross


def no_mark(stage: str) -> None:
    """A `Mark` that does nothing."""


@dataclass(frozen=True)
class Launch:
    """One call of ``graph`` (the model's, or one of `GLUE`); ``inputs`` and ``outputs`` map ports to buffers.

    A launch never writes a buffer that it reads. ``stage`` is the name its time is counted under.
    """

    graph: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    stage: str


@dataclass(frozen=True, eq=False)
class Program:
    """``buffers`` has shape and dtype of each buffer; ``constants`` are filled once and never written.

    Buffers in ``carried`` keep their contents from run to run and are zero at first: a launch that reads one
    before it is written reads what the previous run wrote.
    """

    launches: tuple[Launch, ...]
    buffers: Ports
    constants: Mapping[str, Array] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Raise ValueError if a launch reads a buffer before it is written, or one that does not exist."""
        if not self.carried <= self.written:
            raise ValueError(f"no launch writes {sorted(self.carried - self.written)}, which are carried")
        known = {FRAME, *self.constants, *self.feeds, *self.carried}
        for launch in self.launches:
            reads, writes = set(launch.inputs.values()), set(launch.outputs.values())
            for buffer in reads | writes:
                if buffer not in self.buffers:
                    raise ValueError(f"launch of {launch.graph} names {buffer!r}, which is not a buffer")
            if reads & writes:
                raise ValueError(f"launch of {launch.graph} writes {sorted(reads & writes)}, which it reads")
            if not reads <= known:
                raise ValueError(
                    f"launch of {launch.graph} reads {sorted(reads - known)} before it is written"
                )
            known |= writes
        if STYLED not in known:
            raise ValueError(f"no launch writes {STYLED!r}")

    @property
    def written(self) -> set[str]:
        """Buffers that launches write."""
        return {buffer for launch in self.launches for buffer in launch.outputs.values()}

    @property
    def feeds(self) -> list[str]:
        """Buffers that the host sets between frames: noise and conditioning."""
        return [name for name in self.buffers if name not in {FRAME, *self.constants, *self.written}]

    @property
    def graphs(self) -> list[str]:
        """The model's graphs that are run, in order of first use."""
        return list(dict.fromkeys(x.graph for x in self.launches if x.graph not in GLUE))


class Runner(Protocol):
    """A program with its graphs opened at one size. Use it from one thread at a time."""

    @property
    def precision(self) -> str:
        """The precision that the UNet computes in."""

    def set(self, **feeds: Array) -> None:
        """Set what stays the same from frame to frame; arrays must not be changed afterwards.

        Raises BackendError on an unknown name, or a wrong shape or dtype.
        """

    def run(self, frame: Frame, mark: Mark = no_mark) -> Frame:
        """Frames uint8 [B, H, W, 3] in, a new array of the same shape out; every feed must be set."""

    def carried(self) -> dict[str, Array]:
        """Copies of the buffers that are carried from run to run; empty if the program has none."""

    def carry(self, **buffers: Array) -> None:
        """Set carried buffers to what `carried` of another runner of the same program returned.

        Raises BackendError on an unknown name, or a wrong shape or dtype.
        """

    def close(self) -> None:
        """Free engines and buffers; the runner must not be used afterwards."""


def check_feeds(program: Program, feeds: Mapping[str, Array]) -> None:
    """Raise BackendError unless every array fits the feed of its name."""
    _check(program, feeds, program.feeds)


def check_carried(program: Program, buffers: Mapping[str, Array]) -> None:
    """Raise BackendError unless every array fits the carried buffer of its name."""
    _check(program, buffers, sorted(program.carried))


def check_frame(program: Program, frame: Frame, fed: Mapping[str, Array]) -> None:
    """Raise BackendError unless every feed is in ``fed`` and ``frame`` fits its buffer.

    For runners with buffers on a device: copying an array of another size would read or write out of bounds.
    """
    missing = [name for name in program.feeds if name not in fed]
    if missing:
        raise BackendError(f"set {', '.join(missing)} before the first frame")
    check_array("the program takes frames", program.buffers[FRAME], frame)


def launch_specs(program: Program, specs: Mapping[str, GraphSpec]) -> list[GraphSpec]:
    """The graph that each launch runs, glue included, at the shapes of its buffers.

    Equal ones are one object. ``specs`` has one entry per graph of the model.
    """
    known: dict[tuple[Any, ...], GraphSpec] = {}
    found = []
    for launch in program.launches:
        shapes = {port: program.buffers[buffer][0] for port, buffer in launch.inputs.items()}
        graph = launch.graph, *sorted(shapes.items())
        if graph not in known and launch.graph in GLUE:
            known[graph] = glue_spec(launch.graph, shapes)
        elif graph not in known:
            known[graph] = replace(specs[launch.graph], shapes=shapes)
        found.append(known[graph])
    return found


def _check(program: Program, arrays: Mapping[str, Array], names: list[str]) -> None:
    for name, array in arrays.items():
        if name not in names:
            known = ", ".join(names) or "none"
            raise BackendError(f"there is no buffer '{name}' to set; known: {known}")
        check_array(f"buffer '{name}' is", program.buffers[name], array)
