"""Engines that several programs use: each opened once, closed when the last one gives it back.

    shared = SharedEngines(open_graph)
    four_steps = open_on_host(program_of(4), specs, shared.open)
    two_steps = open_on_host(program_of(2), specs, shared.open)  # opens nothing

A program of one size calls the same graphs at the same shapes whatever its number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from std_rt.core.errors import BackendError
from std_rt.engines.registry import Engine, GraphSpec

__all__ = ["SharedEngines"]

Array = NDArray[Any]
_Key = tuple[Any, ...]


@dataclass(eq=False)
class _Held:
    """An engine that is open or being opened, and how many have it."""

    engine: Future[Engine]
    users: int


class SharedEngines:
    """What `open` gives is for programs that run one after the other, in one thread at a time.

    Opening and closing are safe in several threads.
    """

    def __init__(self, open_graph: Callable[[GraphSpec], Engine]) -> None:
        """``open_graph`` opens what is not open yet."""
        self._open_graph = open_graph
        self._held: dict[_Key, _Held] = {}
        self._lock = Lock()

    def open(self, spec: GraphSpec) -> Engine:
        """An engine of ``spec``. What opening raises is raised; the next call tries again."""
        key = _key(spec)
        with self._lock:
            held = self._held.get(key)
            mine = held is None
            if held is None:
                held = self._held[key] = _Held(Future(), 0)
            held.users += 1
        if mine:
            self._fill(key, held, spec)
        return _Shared(spec.name, held.engine.result(), lambda: self._give_back(key, held))

    def _fill(self, key: _Key, held: _Held, spec: GraphSpec) -> None:
        try:
            held.engine.set_result(self._open_graph(spec))
        except BaseException as error:  # noqa: BLE001 (raised in everyone who waits for it)
            with self._lock:
                del self._held[key]
            held.engine.set_exception(error)

    def _give_back(self, key: _Key, held: _Held) -> None:
        with self._lock:
            held.users -= 1
            last = held.users == 0
            if last:
                del self._held[key]
        if last:
            held.engine.result().close()


class _Shared:
    """`base.Engine` that belongs to others too."""

    def __init__(self, name: str, engine: Engine, give_back: Callable[[], None]) -> None:
        self.inputs, self.outputs, self.precision = engine.inputs, engine.outputs, engine.precision
        self._name, self._give_back = name, give_back
        self._engine: Engine | None = engine

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        if self._engine is None:
            raise BackendError(f"graph '{self._name}' was closed; open it again")
        return self._engine(**inputs)

    def close(self) -> None:
        """The engine is freed when nobody else has it."""
        if self._engine is not None:
            self._engine = None
            self._give_back()


def _key(spec: GraphSpec) -> _Key:
    """Equal for specs that one engine serves."""
    return spec.name, str(spec.path), tuple(sorted(spec.shapes.items())), spec.steady, spec.compute
