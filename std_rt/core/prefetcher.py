"""A prefetcher: an iterator that runs in its own thread, a bounded queue ahead of the consumer.

    with Prefetcher(clip.read(), room=4) as decoded, Prefetcher(stylize(decoded), room=4) as styled:
        for frame in styled:
            write(frame)

A clip runs through three stages in parallel (decode, engines, encode) with two prefetchers between them. A
full queue makes the iterator wait, so memory is bounded and nothing is lost. With ``latest`` the oldest item
in the queue is dropped and counted instead, so items are never older than the queue is long, as a
camera needs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from threading import Condition, Thread
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

T = TypeVar("T")

# Waits end this often to let Python run signal handlers: on Windows, waiting for a lock blocks Ctrl-C.
_POLL_S = 0.2


class Prefetcher(Generic[T]):
    """The items of ``items``, made in another thread, for one consumer, which iterates or calls `get`.

    An exception of the iterator is raised in the consumer, after all items made before it. `close` (or the
    end of the ``with`` block) ends the thread at its next item and closes the iterator if it is a generator.
    """

    def __init__(
        self,
        items: Iterable[T],
        *,
        room: int = 2,
        latest: bool = False,
        name: str = "prefetch",
        dropped: Callable[[T], None] | None = None,
    ) -> None:
        """``room``: most items in the queue. ``dropped`` gets each dropped item, in the iterator's thread.

        A `Prefetcher` that ``items`` reads from should be closed after this one, as ``with`` does. Closing
        only asks the thread to end; it also wakes a consumer that waits.
        """
        if room < 1:
            raise ValueError(f"a prefetcher needs room for at least one item, got {room}")
        self._items, self._room, self._latest = items, room, latest
        self._dropped = dropped
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
            if (item := self.get(_POLL_S)) is not None:
                return item
            if self.over:
                raise StopIteration

    def get(self, timeout_s: float) -> T | None:
        """The next item, or None if none came in time or none will come (see `over`).

        Raises the iterator's exception once the queue is empty.
        """
        with self._changed:
            if not self.wait(timeout_s):
                return None
            item = self._queue.popleft()
            self._changed.notify_all()
            return item

    def wait(self, timeout_s: float) -> bool:
        """Whether an item is queued, now or in time; it stays in the queue. Raises as `get` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ended or self._closed, timeout_s)
            if self._queue or self._closed:
                return bool(self._queue)
            error, self._error = self._error, None
        if error is not None:
            raise error
        return False

    @property
    def has_next(self) -> bool:
        """Whether an item is in the queue."""
        with self._changed:
            return bool(self._queue)

    @property
    def over(self) -> bool:
        """True once no further item will come."""
        with self._changed:
            return self._closed or (self._ended and not self._queue and self._error is None)

    def close(self, timeout_s: float = 0.0) -> None:
        """Ask the thread to end, and wait for it up to ``timeout_s``. Queued items are discarded."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        end_s = time.monotonic() + timeout_s
        while self._thread.is_alive() and (left_s := end_s - time.monotonic()) > 0:
            self._thread.join(min(left_s, _POLL_S))

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    break
        except BaseException as error:  # noqa: BLE001 (raised in the consumer)
            self._error = error
        try:
            if isinstance(self._items, Generator):  # in the thread that ran it
                self._items.close()
        except BaseException as error:  # noqa: BLE001 (raised in the consumer)
            self._error = self._error or error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        """Queue ``item``, waiting for room or dropping the oldest; False once closed."""
        gone: list[T] = []
        with self._changed:
            while self._latest and len(self._queue) >= self._room:
                gone.append(self._queue.popleft())
            while len(self._queue) >= self._room and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._queue.append(item)
            self.drops += len(gone)
            self._changed.notify_all()
        if self._dropped is not None:
            for old in gone:
                self._dropped(old)
        return True
