"""Values that several users share: each is made once, and closed when its last user lets go of it.

shared = Shared[Engine](Engine.close)
engine, release = shared.take(spec.identity, lambda: open_graph(spec))
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Generic, TypeVar

__all__ = ["Shared"]

T = TypeVar("T")


@dataclass(eq=False)
class _Held(Generic[T]):
    """A value that is there or being made, and its number of users."""

    value: Future[T] = field(default_factory=Future)
    users: int = 0


class Shared(Generic[T]):
    """Values by key. Safe in several threads."""

    def __init__(self, close: Callable[[T], None]) -> None:
        """``close`` frees a value that nobody uses any more."""
        self._close = close
        self._held: dict[Hashable, _Held[T]] = {}
        self._lock = Lock()

    def take(self, key: Hashable, make: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """The value of ``key``, and the function to call, once, when it is no longer used.

        What ``make`` raises is raised in every thread that waits for it; the next call tries again.
        """
        with self._lock:
            first = key not in self._held
            held = self._held.setdefault(key, _Held())
            held.users += 1
        if first:
            try:
                held.value.set_result(make())
            except BaseException as error:  # noqa: BLE001 (raised in every thread that waits for it)
                with self._lock:
                    del self._held[key]
                held.value.set_exception(error)
        return held.value.result(), lambda: self._release(key, held)

    def _release(self, key: Hashable, held: _Held[T]) -> None:
        with self._lock:
            held.users -= 1
            if held.users:
                return
            del self._held[key]
        self._close(held.value.result())
