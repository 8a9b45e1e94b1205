"""Hot swap from a slow runner to a fast one, between two frames and as soon as the fast one is ready.

runner = HotSwapRunner(on_openvino, pool.submit(open_on_the_gpu), typer.echo)
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future

from std_rt.core.errors import StdRtError, one_line
from std_rt.engines.program import Frame, Mark, Runner, no_mark
from std_rt.engines.protocol import Array, Engine

__all__ = ["HotSwapRunner", "close_when_open", "has_failed"]

# Exceptions of backends (and their bindings) that do not work; bugs in the program raise others.
_FAILURES = (StdRtError, OSError, MemoryError, RuntimeError, ImportError)


class HotSwapRunner:
    """A `Runner` over two runners of one program. Use it from one thread at a time.

    Frames run on ``slow`` until ``fast`` is ready; then it takes over the feeds and the carried buffers, and
    once it has run its first frame ``slow`` is closed. ``report`` gets one line about the swap, or about why
    ``fast`` does not open or cannot run that frame; ``slow`` then stays in use.
    """

    def __init__(
        self,
        slow: Runner,
        fast: Future[Runner],
        report: Callable[[str], None],
        names: tuple[str, str] = ("the first backend", "the faster one"),
    ) -> None:
        """``names``: of the two backends, for the report."""
        self._now = slow
        self._coming: Future[Runner] | None = fast
        self._report, self._names = report, names
        self._feeds: dict[str, Array] = {}

    @property
    def precision(self) -> str:
        """The precision of the runner in use."""
        return self._now.precision

    @property
    def switched(self) -> bool:
        """True once ``fast`` is in use, or has failed."""
        return self._coming is None

    @property
    def settled(self) -> Runner:
        """The runner to use from now on: the one in use once `switched`, until then this one."""
        return self._now if self.switched else self

    def set(self, **feeds: Array) -> None:
        """See `Runner`."""
        self._now.set(**feeds)
        self._feeds.update(feeds)

    def run(self, frame: Frame, mark: Mark = no_mark) -> Frame:
        """See `Runner`; swaps first if the fast runner is ready."""
        if self._coming is not None and self._coming.done():
            styled = self._switch(self._coming, frame, mark)
            if styled is not None:
                return styled
        return self._now.run(frame, mark)

    def carried(self) -> dict[str, Array]:
        """See `Runner`."""
        return self._now.carried()

    def carry(self, **buffers: Array) -> None:
        """See `Runner`."""
        self._now.carry(**buffers)

    def close(self) -> None:
        """Close the runner in use, and the fast one as soon as it is open."""
        if self._coming is not None:
            if not self._coming.done():
                self._report(
                    f"{self._names[1]} was not ready in time; build its engines beforehand: "
                    f"std-rt engines build --backend {self._names[1]}"
                )
            close_when_open(self._coming)
        self._coming = None
        self._now.close()

    def _switch(self, coming: Future[Runner], frame: Frame, mark: Mark) -> Frame | None:
        """The frame from the fast runner, in use from now on; None if it cannot be used."""
        self._coming = None
        slow, fast = self._names
        runner: Runner | None = None
        try:
            runner = coming.result()
            runner.set(**self._feeds)
            runner.carry(**self._now.carried())
            styled = runner.run(frame, mark)
        except (*_FAILURES, CancelledError) as error:
            if runner is not None:
                runner.close()
            reason = one_line(error)
            self._report(f"{fast} cannot be used, so frames stay on {slow}: {reason}")
            return None
        self._now.close()
        self._now = runner
        self._report(f"{fast} is ready: frames now run there, in {runner.precision}, instead of on {slow}")
        return styled


def has_failed(future: Future[Engine] | Future[Runner]) -> bool:
    """Whether opening has ended without an engine or runner."""
    return future.done() and (future.cancelled() or future.exception() is not None)


def close_when_open(future: Future[Engine] | Future[Runner]) -> None:
    """Close an engine or runner, now or as soon as it is open, without waiting for it."""

    def close(future: Future[Engine] | Future[Runner]) -> None:
        if not has_failed(future):
            future.result().close()

    if not future.cancel():
        future.add_done_callback(close)
