"""Programs on the host: the reference runner, and engines shared between programs.

    shared = SharedEngines(open_graph)
    four_steps = open_on_host(program_of(4), specs, shared.open)
    two_steps = open_on_host(program_of(2), specs, shared.open)  # opens nothing

A program of one size calls the same graphs at the same shapes whatever its number of steps, so each is opened
once and closed when its last user closes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from std_rt.core.errors import BackendError
from std_rt.engines.glue import GLUE
from std_rt.engines.program import FRAME, STYLED, Frame, Mark, Program, check_carried, check_feeds, no_mark
from std_rt.engines.protocol import Array, Engine, GraphSpec
from std_rt.engines.shared import Shared

__all__ = ["HostRunner", "SharedEngines", "open_on_host"]


class HostRunner:
    """A `Runner` with its buffers in this machine's memory, which calls engines one by one."""

    def __init__(self, engines: Mapping[str, Engine], program: Program) -> None:
        """``engines`` has one entry per graph of the program, opened at the shapes of its buffers."""
        self._engines, self._program = dict(engines), program
        self._copied = _overwritten_too_early(program)
        self._memory: dict[str, Array] = dict(program.constants)
        for launch in program.launches:
            if launch.graph in GLUE:
                for buffer in launch.outputs.values():
                    self._memory[buffer] = np.empty(*program.buffers[buffer])
        self._memory.update({name: np.zeros(*program.buffers[name]) for name in program.carried})

    @property
    def precision(self) -> str:
        """The precision of the UNet (or of the only graph)."""
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
                GLUE[launch.graph].run(**given, **out)
            else:
                results = self._engines[launch.graph](**given)
                for port, buffer in launch.outputs.items():
                    copied = buffer in self._copied
                    self._memory[buffer] = results[port].copy() if copied else results[port]
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
    """Open the graphs of a program in parallel, and run it from this machine's memory.

    ``specs`` has one entry per graph of the program. If a graph fails to open, the others are closed and its
    exception is raised.
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


def _overwritten_too_early(program: Program) -> set[str]:
    """Buffers that are read after the engine that wrote them has run again, which may overwrite them."""
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


class SharedEngines:
    """Engines by `GraphSpec.identity`, each opened once; call those of one set from one thread at a time.

    Opening and closing are safe in several threads.
    """

    def __init__(self, open_graph: Callable[[GraphSpec], Engine]) -> None:
        """``open_graph`` opens a graph that is not open yet."""
        self._open_graph = open_graph
        self._engines = Shared[Engine](lambda engine: engine.close())

    def open(self, spec: GraphSpec) -> Engine:
        """An engine for ``spec``. What opening raises is raised; the next call tries again."""
        engine, release = self._engines.take(spec.identity, lambda: self._open_graph(spec))
        return _SharedEngine(spec.name, engine, release)


class _SharedEngine:
    """An `Engine` that others use too: closing it frees the engine only if it was the last."""

    def __init__(self, name: str, engine: Engine, release: Callable[[], None]) -> None:
        self.inputs, self.outputs, self.precision = engine.inputs, engine.outputs, engine.precision
        self._name, self._release = name, release
        self._engine: Engine | None = engine

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        if self._engine is None:
            raise BackendError(f"graph '{self._name}' was closed; open it again")
        return self._engine(**inputs)

    def close(self) -> None:
        """See `Engine`."""
        if self._engine is not None:
            self._engine = None
            self._release()
