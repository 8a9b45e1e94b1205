"""One frame as a program: a fixed list of launches over named buffers, and what runs it.

    program = Program(launches, buffers, constants)
    runner = HostRunner(engines, program)
    runner.set(noise_0=..., style_tokens=...)
    styled = runner.run(frame)

Which graph runs on which buffers in which order is settled before the first frame. So a GPU can keep every
buffer to itself and replay the whole list as one CUDA graph: a frame goes in as uint8, a frame comes out as
uint8, and nothing else crosses. Between the model's graphs stand a few operations that no model has
(`GLUE`): a change of format, rows put together and taken apart, and linear combinations, which is all that a
step of a sampler is.

Most buffers are written before they are read, so a run knows nothing of the one before. Those in ``carried``
are the exception: a run reads in them what the last one left there, zeros at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import BackendError
from std_rt.engines.registry import Engine, GraphSpec, Ports

__all__ = [
    "FRAME",
    "GLUE",
    "STYLED",
    "HostRunner",
    "Launch",
    "Mark",
    "Program",
    "Runner",
    "check_carried",
    "check_feeds",
    "no_mark",
    "open_on_host",
]

Array = NDArray[Any]
Frame = NDArray[np.uint8]
Mark = Callable[[str], None]

FRAME, STYLED = "frame", "styled"  # the buffers [B, H, W, 3] uint8 that cross


def no_mark(stage: str) -> None:
    """Nobody is timing."""


@dataclass(frozen=True)
class Launch:
    """Run ``graph`` (of the model, or one of `GLUE`): ``inputs`` and ``outputs`` map its ports to buffers.

    No launch writes a buffer that it reads. ``stage`` is the name its time is counted under.
    """

    graph: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    stage: str


@dataclass(frozen=True, eq=False)
class Program:
    """``buffers`` gives shape and dtype of each; ``constants`` are filled once and never written.

    ``carried`` keep their contents from run to run and are zero at first. A launch that reads one before it
    is written reads what the last run wrote.
    """

    launches: tuple[Launch, ...]
    buffers: Ports
    constants: Mapping[str, Array] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """ValueError where a launch reads what nobody wrote, or names a buffer that is not there."""
        if not self.carried <= self.written:
            raise ValueError(f"no launch writes {sorted(self.carried - self.written)}, which are carried")
        known = {FRAME, *self.constants, *self.feeds, *self.carried}
        for launch in self.launches:
            reads, writes = set(launch.inputs.values()), set(launch.outputs.values())
            for buffer in reads | writes:
                if buffer not in self.buffers:
                    raise ValueError(f"launch of {launch.graph} names {buffer!r}, which is no buffer")
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
        """The model's graphs that it runs, in order of first use."""
        return list(dict.fromkeys(x.graph for x in self.launches if x.graph not in GLUE))


class Runner(Protocol):
    """A program with its graphs opened at one size. Not for use from two threads at once."""

    @property
    def precision(self) -> str:
        """What the UNet computes in."""

    def set(self, **feeds: Array) -> None:
        """Set what stays the same from frame to frame; arrays must not be changed afterwards.

        Raises BackendError on an unknown name, or a wrong shape or dtype.
        """

    def run(self, frame: Frame, mark: Mark = no_mark) -> Frame:
        """Frames uint8 [B, H, W, 3] in, a new array of the same shape out; every feed must be set."""

    def carried(self) -> dict[str, Array]:
        """Copies of the buffers that are carried from run to run; empty where the program has none."""

    def carry(self, **buffers: Array) -> None:
        """Set carried buffers, to what `carried` of another runner of the program gave.

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


def _check(program: Program, arrays: Mapping[str, Array], names: list[str]) -> None:
    for name, array in arrays.items():
        if name not in names:
            known = ", ".join(names) or "none"
            raise BackendError(f"there is no buffer '{name}' to set; there are {known}")
        shape, dtype = program.buffers[name]
        if array.shape != shape or array.dtype != dtype:
            raise BackendError(
                f"buffer '{name}' is {dtype} {list(shape)}; it was given {array.dtype} {list(array.shape)}"
            )


class HostRunner:
    """Buffers in this machine's memory, engines called one by one: the reference, and the CPU's runner."""

    def __init__(self, engines: Mapping[str, Engine], program: Program) -> None:
        """``engines`` has one for every graph of the program, opened at the shapes of its buffers."""
        self._engines, self._program = dict(engines), program
        self._outlive = _outliving(program)
        self._memory: dict[str, Array] = dict(program.constants)
        for launch in program.launches:
            if launch.graph in GLUE:
                for buffer in launch.outputs.values():
                    self._memory[buffer] = np.empty(*program.buffers[buffer])
        self._memory.update({name: np.zeros(*program.buffers[name]) for name in program.carried})

    @property
    def precision(self) -> str:
        """That of the UNet (or of the only graph)."""
        return self._engines.get("unet", next(iter(self._engines.values()))).precision

    def set(self, **feeds: Array) -> None:
        """Keep references: nothing is copied."""
        check_feeds(self._program, feeds)
        self._memory.update(feeds)

    def run(self, frame: Frame, mark: Mark = no_mark) -> Frame:
        """Launch after launch; ``mark(stage)`` follows each."""
        self._memory[FRAME] = frame
        self._memory[STYLED] = np.empty(*self._program.buffers[STYLED])  # the caller keeps it
        for launch in self._program.launches:
            given = {port: self._memory[buffer] for port, buffer in launch.inputs.items()}
            if launch.graph in GLUE:
                out = {port: self._memory[buffer] for port, buffer in launch.outputs.items()}
                GLUE[launch.graph](**given, **out)
            else:
                results = self._engines[launch.graph](**given)
                for port, buffer in launch.outputs.items():
                    keeps = buffer in self._outlive
                    self._memory[buffer] = results[port].copy() if keeps else results[port]
            mark(launch.stage)
        return self._memory[STYLED]

    def carried(self) -> dict[str, Array]:
        """See `Runner`."""
        return {name: self._memory[name].copy() for name in self._program.carried}

    def carry(self, **buffers: Array) -> None:
        """See `Runner`."""
        check_carried(self._program, buffers)
        self._memory.update({name: array.copy() for name, array in buffers.items()})

    def close(self) -> None:
        """Close every engine."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


def open_on_host(
    program: Program, specs: Mapping[str, GraphSpec], open_graph: Callable[[GraphSpec], Engine]
) -> HostRunner:
    """Open the graphs of a program side by side, and run it from here. What one of them raises is raised.

    ``specs`` has one for every graph of the program.
    """
    with ThreadPoolExecutor(len(specs), thread_name_prefix="std-rt-open") as pool:
        futures = {name: pool.submit(open_graph, specs[name]) for name in program.graphs}
    failed = [future for future in futures.values() if future.exception() is not None]
    if failed:
        for future in futures.values():
            if future.exception() is None:
                future.result().close()
        failed[0].result()
    return HostRunner({name: future.result() for name, future in futures.items()}, program)


def _outliving(program: Program) -> set[str]:
    """Buffers that are read after the engine that wrote them was called again, which may overwrite them."""
    owner: dict[str, tuple[str, int]] = {}
    calls: dict[str, int] = {}
    found = set(program.carried)
    for launch in program.launches:
        for buffer in launch.inputs.values():
            graph, call = owner.get(buffer, ("", 0))
            if calls.get(graph, 0) > call:
                found.add(buffer)
        calls[launch.graph] = calls.get(launch.graph, 0) + 1
        if launch.graph not in GLUE:
            owner.update(dict.fromkeys(launch.outputs.values(), (launch.graph, calls[launch.graph])))
    return found


def _frame_in(*, frame: Frame, image: Array) -> None:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    np.multiply(frame.transpose(0, 3, 1, 2), np.float32(1 / 127.5), out=image)
    image -= 1


def _frame_out(*, image: Array, frame: Frame) -> None:
    """float32 [B, 3, H, W], clipped to [-1, 1] -> uint8 [B, H, W, 3], rounded."""
    scaled = image * np.float32(127.5)
    scaled += 128  # 127.5 to move, 0.5 to round
    np.clip(scaled, 0, 255, out=scaled)
    frame[...] = scaled.astype(np.uint8).transpose(0, 2, 3, 1)


def _combine2(*, x: Array, y: Array, a: Array, b: Array, out: Array) -> None:
    """``a x + b y``; x, y and out [B, C, h, w], a and b [B, 1, 1, 1]."""
    np.multiply(x, a, out=out)
    out += b * y


def _combine3(*, x: Array, y: Array, z: Array, a: Array, b: Array, c: Array, out: Array) -> None:
    """``a x + b y + c z``; shapes as in combine2."""
    np.multiply(x, a, out=out)
    out += b * y
    out += c * z


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
    """[B, ...] -> all rows but the last [B - 1, ...], and that one [1, ...]; B is 2 or more."""
    rest[...] = x[:-1]
    last[...] = x[-1:]


# Operations between graphs, as NumPy functions of their ports; results are written into the outputs.
GLUE: dict[str, Callable[..., None]] = {
    "frame_in": _frame_in,
    "frame_out": _frame_out,
    "combine2": _combine2,
    "combine3": _combine3,
    "double": _double,
    "halves": _halves,
    "join": _join,
    "split_last": _split_last,
}
