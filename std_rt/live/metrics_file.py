"""`--metrics FILE`: the figures of a live session as JSON lines, while it runs and at its end.

{"kind": "start", "schema": 1, "started": "2026-01-31T12:00:00+00:00", "settings": {...}}
{"kind": "interval", "at_s": 1.0, "fps": 27.1, ...}        once a second: of that second
{"kind": "summary", "fps": 27.3, ..., "settings": {...}}   of the whole, as `Meter.report`
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import IO, Any

from std_rt.core.errors import MediaError
from std_rt.core.files import reason
from std_rt.live.metrics import SCHEMA, Meter, Snapshot

__all__ = ["MetricsWriter"]

_EVERY_S = 1.0
_WAITING = 60  # lines: of a disk that is a minute behind, the oldest that wait are lost
_LAST_LINES_S = 5.0


class MetricsWriter:
    """Lines are written by a thread of its own, so that no disk can hold up a frame, and flushed one by one,
    so that a killed session keeps them.

    A disk that is full or gone ends the file, not the session: `problem` says so. Not for several threads.
    """

    def __init__(
        self,
        path: Path,
        meter: Meter,
        *,
        overwrite: bool = False,
        every_s: float = _EVERY_S,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Write the first line.

        Raises MediaError where ``path`` is taken (without ``overwrite``) or cannot be written.
        """
        self.path, self.problem = path, ""
        self._meter, self._every_s, self._now = meter, every_s, now
        file = _open(path, overwrite)
        self._lines: Queue[str | None] = Queue(_WAITING)
        self._begun_s = now()
        self._due_s = self._begun_s + every_s
        self._counted = Snapshot()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._put({"kind": "start", "schema": SCHEMA, "started": started, "settings": meter.settings})
        self._thread = Thread(target=self._write, args=(file,), name="std-rt-metrics", daemon=True)
        self._thread.start()

    def tick(self) -> None:
        """Add a line where one is due; call it as often as you like."""
        at = self._now()
        if at < self._due_s or self.problem:
            return
        self._due_s = max(self._due_s, at - self._every_s) + self._every_s
        counted = self._meter.snapshot()
        before, self._counted = self._counted, counted
        figures = self._meter.figures(counted.since(before))
        self._put({"kind": "interval", "at_s": round(at - self._begun_s, 3), **figures})

    def close(self) -> None:
        """Add the summary and close the file; waits some seconds at most for a slow disk."""
        if not self._thread.is_alive():
            return
        self._put({"kind": "summary", **self._meter.report()})
        self._put(None)
        self._thread.join(_LAST_LINES_S)
        if self._thread.is_alive():
            self.problem = f"{self.path} is not complete: the disk does not take its last lines"

    def _put(self, line: dict[str, Any] | None) -> None:
        text = None if line is None else json.dumps(line, allow_nan=False)
        try:
            self._lines.put_nowait(text)
        except Full:
            # The oldest line that waits gives way: the summary must find room.
            with suppress(Empty):  # the disk has just taken it
                self._lines.get_nowait()
            self._lines.put_nowait(text)

    def _write(self, file: IO[str]) -> None:
        """The thread: until there is nothing more, or the disk takes nothing more."""
        try:
            with file:
                while (line := self._lines.get()) is not None:
                    file.write(line + "\n")
                    file.flush()
        except OSError as error:
            self.problem = f"{self.path} ends here: {reason(error)}; the session goes on"


def _open(path: Path, overwrite: bool) -> IO[str]:
    """A new file; as a question of one call, so that of two sessions only one gets it."""
    try:
        return path.open("w" if overwrite else "x", encoding="utf-8", newline="\n")
    except FileExistsError:
        raise MediaError(
            f"{path} exists already; add --overwrite to replace it or give another name"
        ) from None
    except OSError as error:
        raise MediaError(
            f"{path} cannot be written: {reason(error)}; give another place with --metrics"
        ) from error
