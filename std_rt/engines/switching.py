"""Start on what is there, go over to what is faster when it is ready: between two frames, with no stop.

runner = SwitchingRunner(on_openvino, pool.submit(open_on_the_gpu), typer.echo)
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import StdRtError
from std_rt.engines.program import Mark, Runner, no_mark

__all__ = ["SwitchingRunner"]

Array = NDArray[Any]
Frame = NDArray[np.uint8]

# What a backend that does not work raises, its bindings included; a mistake in the program is none of these.
_FAILURES = (StdRtError, OSError, MemoryError, RuntimeError, ImportError)


class SwitchingRunner:
    """`program.Runner` over two runners of one program. Not for use from two threads at once.

    Frames run on ``slow`` until ``fast`` is there; then the feeds go over, and what is carried from run to
    run, and with its first frame done ``slow`` is closed and ``said`` is told. Where ``fast`` does not open
    or does not do that frame, ``said`` is told why, once, and ``slow`` goes on.
    """

    def __init__(
        self,
        slow: Runner,
        fast: Future[Runner],
        said: Callable[[str], None],
        names: tuple[str, str] = ("the first backend", "the faster one"),
    ) -> None:
        """``names``: of the two backends, for what is said."""
        self._now = slow
        self._coming: Future[Runner] | None = fast
        self._said, self._names = said, names
        self._feeds: dict[str, Array] = {}

    @property
    def precision(self) -> str:
        """Of the runner that the next frame runs on, as far as is known."""
        return self._now.precision

    @property
    def switched(self) -> bool:
        """True once nothing is waited for any more: ``fast`` runs, or has failed."""
        return self._coming is None

    def set(self, **feeds: Array) -> None:
        """See `program.Runner`."""
        self._now.set(**feeds)
        self._feeds.update(feeds)

    def run(self, frame: Frame, mark: Mark = no_mark) -> Frame:
        """See `program.Runner`; goes over first where the faster runner is ready."""
        if self._coming is not None and self._coming.done():
            styled = self._switch(self._coming, frame, mark)
            if styled is not None:
                return styled
        return self._now.run(frame, mark)

    def carried(self) -> dict[str, Array]:
        """See `program.Runner`."""
        return self._now.carried()

    def carry(self, **buffers: Array) -> None:
        """See `program.Runner`."""
        self._now.carry(**buffers)

    def close(self) -> None:
        """Close the runner in use, and the other one as soon as it is there."""
        if self._coming is not None:
            if not self._coming.done():
                self._said(
                    f"{self._names[1]} was not ready in time; to build it ahead: std-rt engines build "
                    f"--backend {self._names[1]}"
                )
            if not self._coming.cancel():
                self._coming.add_done_callback(_close)
        self._coming = None
        self._now.close()

    def _switch(self, coming: Future[Runner], frame: Frame, mark: Mark) -> Frame | None:
        """The frame from the faster runner, in use from now on; None where it cannot be used."""
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
            reason = " ".join(str(error).split()) or type(error).__name__
            self._said(f"{fast} cannot be used, frames stay on {slow}: {reason}")
            return None
        self._now.close()
        self._now = runner
        self._said(f"{fast} is ready: frames run there now, in {runner.precision}, and no longer on {slow}")
        return styled


def _close(coming: Future[Runner]) -> None:
    if not coming.cancelled() and coming.exception() is None:
        coming.result().close()
