"""A re-entrant lock that threads get in the order in which they asked for it.

    turns = Turns()
    with turns:
        ...

`threading.RLock` promises no order: a thread that takes it again at once may keep it from those that wait.
"""

from __future__ import annotations

from collections import deque
from threading import Lock, get_ident

__all__ = ["Turns"]


class Turns:
    """A lock for ``with`` blocks, which may be nested in one thread; first come, first served."""

    def __init__(self) -> None:
        self._state = Lock()  # guards the rest, held for an instant
        self._owner: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, Lock]] = deque()  # threads, and what wakes them up

    def __enter__(self) -> None:
        me = get_ident()
        with self._state:
            if self._owner in (None, me):
                self._owner, self._depth = me, self._depth + 1
                return
            turn = Lock()
            turn.acquire()
            self._waiting.append((me, turn))
        try:
            turn.acquire()  # released by the thread before, which has made this one the owner
        except BaseException:  # Ctrl-C in the main thread
            self._give_up(me, turn)
            raise

    def __exit__(self, *_: object) -> None:
        with self._state:
            self._depth -= 1
            if not self._depth:
                self._hand_on()

    def _give_up(self, me: int, turn: Lock) -> None:
        with self._state:
            if (me, turn) in self._waiting:
                self._waiting.remove((me, turn))
            else:  # it was this thread's turn already
                self._hand_on()

    def _hand_on(self) -> None:
        self._owner, self._depth = None, 0
        if self._waiting:
            self._owner, turn = self._waiting.popleft()
            self._depth = 1
            turn.release()
