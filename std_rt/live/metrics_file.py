"""The writer of `--metrics FILE`: metrics of a live session as JSON lines, while it runs and at its end.

{"kind": "start", "schema": 1, "started": "2026-01-31T12:00:00+00:00", "settings": {...}}
{"kind": "interval", "at_s": 1.0, "fps": 27.1, ...}        once per second, for that second
{"kind": "summary", "fps": 27.3, ..., "settings": {...}}   for the whole session, as `Metrics.report`
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
from std_rt.live.metrics import SCHEMA, Counts, Metrics

__all__ = ["MetricsWriter"]

_EVERY_S = 1.0
_LINES_KEPT = 60  # if the disk is a minute behind, the oldest waiting lines are dropped
_LAST_LINES_S = 5.0


class MetricsWriter:
    """Writes and flushes each line in a thread, so disks delay no frame and a killed session keeps its lines.

    A full or missing disk ends the file, not the session; `problem` then says why. Call from one thread.
    """

    def __init__(
        self,
        path: Path,
        metrics: Metrics,
        *,
        overwrite: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Write the first line.

        Raises MediaError if ``path`` exists (without ``overwrite``) or cannot be written.
        """
        self.path, self.problem = path, ""
        self._metrics, self._now = metrics, now
        file = _open(path, overwrite)
        self._lines: Queue[str | None] = Queue(_LINES_KEPT)
        self._begun_s = now()
        self._due_s = self._begun_s + _EVERY_S
        self._counts = Counts()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._put({"kind": "start", "schema": SCHEMA, "started": started, "settings": metrics.settings})
        self._thread = Thread(target=self._write, args=(file,), name="std-rt-metrics", daemon=True)
        self._thread.start()

    def tick(self) -> None:
        """Add a line if a second has passed since the last; call it as often as you like."""
        at = self._now()
        if at < self._due_s or self.problem:
            return
        self._due_s = max(self._due_s, at - _EVERY_S) + _EVERY_S
        before, self._counts = self._counts, self._metrics.counts()
        figures = self._metrics.figures(self._counts.since(before))
        self._put({"kind": "interval", "at_s": round(at - self._begun_s, 3), **figures})

    def close(self) -> None:
        """Add the summary and close the file; waits a few seconds at most for a slow disk."""
        if not self._thread.is_alive():
            return
        self._put({"kind": "summary", **self._metrics.report()})
        self._put(None)
        self._thread.join(_LAST_LINES_S)
        if self._thread.is_alive():
            self.problem = f"{self.path} is incomplete: the disk was too slow for its last lines"

    def _put(self, line: dict[str, Any] | None) -> None:
        text = None if line is None else json.dumps(line, allow_nan=False)
        try:
            self._lines.put_nowait(text)
        except Full:
            # Drop the oldest waiting line: the summary must find room.
            with suppress(Empty):  # the disk has just taken it
                self._lines.get_nowait()
            self._lines.put_nowait(text)

    def _write(self, file: IO[str]) -> None:
        """Run in the thread, until the last line or until a write fails."""
        try:
            with file:
                while (line := self._lines.get()) is not None:
                    file.write(line + "\n")
                    file.flush()
        except OSError as error:
            self.problem = f"{self.path} was closed: {reason(error)}; the session continues"


def _open(path: Path, overwrite: bool) -> IO[str]:
    """Create the file in one call, so that only one of two sessions gets it."""
    try:
        return path.open("w" if overwrite else "x", encoding="utf-8", newline="\n")
    except FileExistsError:
        raise MediaError(
            f"{path} already exists; add --overwrite to replace it or give another name"
        ) from None
    except OSError as error:
        raise MediaError(
            f"{path} cannot be written: {reason(error)}; give another place with --metrics"
        ) from error
