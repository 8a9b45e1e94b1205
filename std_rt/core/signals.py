"""Ctrl-C and other signals that ask a command to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["ended_as_by_ctrl_c", "interruptible"]


@contextmanager
def interruptible(
    *names: str, on_request: Callable[[], object] | None = None
) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether a signal asked the command to end; a second one ends it at once.

    ``names`` are signals such as "SIGINT". Signals that are ignored (as under nohup) stay ignored; outside
    the main thread nothing is changed. ``on_request`` is called at the first signal, in a thread of its own:
    what the handler interrupts may hold the terminal's locks.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if on_request is not None:
            threading.Thread(target=on_request, daemon=True).start()

    before = _handlers(names)
    with _handled(before, ask):
        yield lambda: asked


@contextmanager
def ended_as_by_ctrl_c(*names: str) -> Iterator[None]:
    """Inside the block these signals raise KeyboardInterrupt, so that partial files are removed."""
    with _handled(_handlers(names), signal.default_int_handler):
        yield


def _handlers(names: Sequence[str]) -> dict[signal.Signals, Any]:
    """Handlers of those signals that this system has and that are not ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    found = {kind: signal.getsignal(kind) for kind in known}
    # None: a handler that was not installed from Python, and cannot be put back.
    return {kind: handler for kind, handler in found.items() if handler not in (signal.SIG_IGN, None)}


@contextmanager
def _handled(
    before: Mapping[signal.Signals, Any], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    for kind in before:
        signal.signal(kind, handler)
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)
