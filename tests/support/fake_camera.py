"""A camera device that a test plays: no hardware, every fault at will."""

from __future__ import annotations

import queue

from std_rt.core.arrays import Size
from std_rt.core.errors import MediaError
from std_rt.media.camera.device import Properties


class FakeDevice:
    """What ``give()`` gets comes out of ``read()``, which blocks meanwhile as a stalled camera does.

    Give BGR frames, or anything that a broken camera might. It is there from the start; ``unplug()`` makes
    reads fail (once the frames given before are read) and opening too, until ``plug_in()``. Only one
    source can have it open at a time.
    """

    def __init__(self, *, fps: float | None = 30.0, size: Size | None = None) -> None:
        self._given: queue.Queue[object] = queue.Queue()
        self._properties = Properties(size, fps)
        self.is_there = True
        self.is_open = False
        self.tries = 0  # to open it

    def give(self, *raws: object) -> None:
        """The next frames, in order."""
        for raw in raws:
            self._given.put(raw)

    def unplug(self) -> None:
        """From now on it gives nothing and cannot be opened."""
        self.is_there = False
        self._given.put(None)  # a read that waits comes back

    def plug_in(self) -> None:
        """It can be opened again."""
        self.is_there = True

    def open(self) -> Properties:
        """As the constructor was told. Raises MediaError while it is unplugged, or open already."""
        self.tries += 1
        if not self.is_there:
            raise MediaError("the fake camera is not there; plug it in")
        if self.is_open:
            raise MediaError("the fake camera is busy; close the source that has it")
        self.is_open = True
        return self._properties

    def read(self) -> object:
        """The next of what was given; waits for it."""
        if not self.is_there and self._given.empty():
            return None
        return self._given.get()

    def close(self) -> None:
        """Another source may open it."""
        self.is_open = False
