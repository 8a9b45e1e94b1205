"""The deinterlacer: whole frames from interlaced ones by FFmpeg's bwdif; others pass as they are."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import av
from av.filter import Graph
from av.video.frame import VideoFrame

__all__ = ["Deinterlacer"]


class Deinterlacer:
    """One frame out for each frame in, at its time; from the first interlaced one on they come one late.

    used: True once a frame was interlaced. Frames must have pts and a time base. Raises what PyAV raises.
    """

    def __init__(self) -> None:
        self.used = False
        self._graph: Graph | None = None
        self._kind: tuple[int, int, str] | None = None  # width, height and format of the graph's frames
        self._time_base = Fraction(1)

    def run(self, frame: VideoFrame) -> Iterator[VideoFrame]:
        """The frames that are ready after ``frame``."""
        if not (self.used or frame.interlaced_frame):
            yield frame
            return
        self.used = True
        kind = frame.width, frame.height, frame.format.name
        if kind != self._kind:
            yield from self.flush()
            self._open(frame)
            self._kind = kind
        yield from self._pass(frame)

    def _open(self, frame: VideoFrame) -> None:
        self._graph, self._time_base = Graph(), frame.time_base or Fraction(1, 90_000)
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=self._time_base
        )
        # Only frames that say they are interlaced; one frame each, not one per field.
        bwdif = self._graph.add("bwdif", "mode=send_frame:deint=interlaced")
        self._graph.link_nodes(source, bwdif, self._graph.add("buffersink")).configure()

    def _pass(self, frame: VideoFrame | None) -> Iterator[VideoFrame]:
        assert self._graph is not None
        self._graph.vpush(frame)
        while True:
            try:
                done = self._graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return
            ticks = (done.time_base or self._time_base) / self._time_base  # bwdif counts halves
            done.pts, done.duration = round((done.pts or 0) * ticks), round((done.duration or 0) * ticks)
            done.time_base = self._time_base
            yield done

    def flush(self) -> Iterator[VideoFrame]:
        """The frame that waits for its successor."""
        if self._graph is not None:
            yield from self._pass(None)
            self._graph = self._kind = None
