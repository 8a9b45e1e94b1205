"""Lanes: an iterator that runs in a thread of its own and hands on what it gives through a short queue.

    with Prefetcher(clip.read(), room=4) as decoded, Prefetcher(paint(decoded), room=4) as styled:
        for frame in styled:
            write(frame)

Three of them side by side (decode, engines, encode) are the streaming core. A full queue holds its maker
back, so memory is bounded and nothing is lost; with ``latest`` the oldest in the queue goes instead and is
counted, so what comes out is never older than the queue is long: what a camera needs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from threading import Condition, Thread
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

T = TypeVar("T")

# Waits end this often to let Python run signal handlers: on Windows a wait for a lock blocks Ctrl-C.
_PATIENCE_S = 0.2


class Prefetcher(Generic[T]):
    """What ``items`` gives, made in another thread. One consumer; it iterates, or calls `get`.

    What the iterator raises is raised in the consumer, after all that was made before it. `close` (or the
    end of the ``with`` block) ends the thread at the next item, then the generator, if it is one.
    """

    def __init__(
        self,
        items: Iterable[T],
        *,
        room: int = 2,
        latest: bool = False,
        name: str = "lane",
        dropped: Callable[[T], None] | None = None,
    ) -> None:
        """``room``: items that wait at most. ``dropped`` is told, in the maker's thread, what went.

        A `Prefetcher` that ``items`` reads from in turn is to be closed after this one (``with`` does so),
        which is safe: closing only asks the thread to end, and ends the wait of whoever reads.
        """
        if room < 1:
            raise ValueError(f"a lane needs room for at least one item, got {room}")
        self._items, self._room, self._latest = items, room, latest
        self._told = dropped
        self._queue: deque[T] = deque()
        self._changed = Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self.drops = 0
        self._thread = Thread(target=self._run, name=f"std-rt-{name}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while True:
            if (item := self.get(_PATIENCE_S)) is not None:
                return item
            if self.over:
                raise StopIteration

    def get(self, timeout_s: float) -> T | None:
        """The next item, or None where none came in time or none will come (see `over`).

        Raises what the iterator raised, once the queue is empty.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ended or self._closed, timeout_s)
            if self._closed:
                return None
            if self._queue:
                item = self._queue.popleft()
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        if error is not None:
            raise error
        return None

    @property
    def over(self) -> bool:
        """Nothing will come any more."""
        with self._changed:
            return self._closed or (self._ended and not self._queue and self._error is None)

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    def close(self, timeout_s: float = 0.0) -> None:
        """Ask the thread to end, and wait for it as long as said. What waits in the queue is given up."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        end = time.monotonic() + timeout_s
        while self._thread.is_alive() and (left := end - time.monotonic()) > 0:
            self._thread.join(min(left, _PATIENCE_S))

    @property
    def running(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    break
        except BaseException as error:  # noqa: BLE001 (raised in the consumer)
            self._error = error
        finally:
            self._finish()

    def _finish(self) -> None:
        """Close the generator here, in the thread that ran it, and say that the end is reached."""
        try:
            if isinstance(self._items, Generator):
                self._items.close()
        except BaseException as error:  # noqa: BLE001 (raised in the consumer)
            self._error = self._error or error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        """Queue an item, waiting or dropping as the lane does; False once it is closed."""
        gone: list[T] = []
        with self._changed:
            if self._latest:
                while len(self._queue) >= self._room:
                    gone.append(self._queue.popleft())
            while len(self._queue) >= self._room and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._queue.append(item)
            self.drops += len(gone)
            self._changed.notify_all()
        if self._told is not None:
            for old in gone:
                self._told(old)
        return True
