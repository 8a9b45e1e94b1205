"""The recorder of a live session: never blocks it; the file is playable at any time, at presentation times.

The file is written in self-contained fragments (MP4 fragments, Matroska clusters) of one second each, so a
killed process loses only the last second. A clean `Recorder.close` turns the fragments of an MP4 into a plain
one, in which every player and editor can seek.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, count
from math import isfinite
from pathlib import Path
from queue import Full, Queue
from threading import Thread

import av
import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream

from std_rt.core.arrays import Frame
from std_rt.core.errors import MediaError
from std_rt.core.files import atomic_file, check_output, reason
from std_rt.media.video.colour import Colour
from std_rt.media.video.encoder import MUXERS, Encoder, VideoTrack, even_size

__all__ = ["Recorder", "Recording", "numbered"]

_FRAGMENT_S = 1  # lost at most if the process is killed
_POLL_S = 0.2  # waits end this often: on Windows longer ones would hold up Ctrl-C
_BT709 = Colour(1, False, 1, 1)
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
_CLUSTERS = {"cluster_time_limit": str(1000 * _FRAGMENT_S), "flush_packets": "1"}
_MUX_OPTIONS = {"mp4": _FRAGMENTS, "mov": _FRAGMENTS, "matroska": _CLUSTERS, "webm": _CLUSTERS}
# Matroska counts milliseconds. A frame of MP4 may last 2**31 ticks, which are 59 hours of pause here.
_TICKS = {"mp4": 10_000, "mov": 10_000, "matroska": 1000, "webm": 1000}
_SPARE_BYTES = 1 << 20
_FAILURES = (av.FFmpegError, OSError, ValueError, MemoryError, MediaError)


@dataclass(frozen=True)
class Recording:
    """The result of a recording.

    path: the file; its name differs from the requested one if that was taken meanwhile. frames: in the file
    (0: there is none); dropped: given and not in it; seconds: from the first frame to the end of the last.
    problem: "" or one line on what went wrong; everything recorded until then is kept.
    """

    path: Path
    frames: int
    dropped: int
    seconds: float
    problem: str = ""


def numbered(path: Path) -> Path:
    """``path`` if nothing has that name, else the first free one of name-2, name-3, ..."""
    others = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(name for name in chain([path], others) if not name.exists())


class Recorder:
    """Encodes frames in its own thread, so that `write` neither waits nor raises.

    sink: .mp4 .m4v .mov .mkv .webm. fps: the nominal rate; the times are those given to `write`. room:
    frames that may wait for a slow disk or encoder; more are dropped and counted. codec, crf: as in
    `transcode_stream`. Raises MediaError, before anything is recorded, for an unusable suffix,
    encoder or place, and for a file that exists (without ``overwrite``). The file is created with the first
    frame.
    """

    def __init__(
        self,
        sink: Path,
        *,
        fps: float,
        overwrite: bool = False,
        room: int = 32,
        codec: str | None = None,
        crf: int = 18,
    ) -> None:
        if not (isfinite(fps) and fps > 0 and room > 0):
            raise ValueError(f"fps and room must be positive, got {fps} and {room}")
        self._encoder = Encoder.for_file(sink, codec, crf, live=True)
        check_output(sink, overwrite=overwrite)
        self._sink, self._fps, self._overwrite = sink, fps, overwrite
        self._queue: Queue[tuple[Frame, float] | None] = Queue(room)  # None: the end
        self._file: _FragmentedFile | None = None
        self._given = self._missed = self._refused = 0
        self.problem = ""  # one line on what ended the recording
        self._ended = False  # no more frames are taken
        self._result: Recording | None = None
        self._thread = Thread(target=self._run, name="std-rt-record", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        """The file; final from the first frame on."""
        return self._file.path if self._file else self._sink

    @property
    def frames(self) -> int:
        """Encoded so far."""
        return self._file.frames if self._file else 0

    @property
    def dropped(self) -> int:
        """Frames so far that will not be in the file: no room, after its end, or not frames at all."""
        return self._missed + self._refused

    def write(self, frame: Frame, at_s: float) -> None:
        """Record ``frame`` (uint8 [H, W, 3] RGB) as shown from ``at_s`` seconds on (any clock that rises).

        Not copied: nobody may change the array afterwards. The first frame sets the size; others are
        resized to it. Anything that is not a frame counts as dropped.
        """
        self._given += 1
        try:
            if self._ended:
                raise Full
            self._queue.put_nowait((frame, at_s))
        except Full:
            self._missed += 1

    def close(self) -> Recording:
        """Write what waits, make an MP4 plain, and report; called again it returns the same report.

        Takes as long as copying the file does. If interrupted (Ctrl-C), the recording stays fragmented.
        """
        self._ended = True
        while self._thread.is_alive():
            with suppress(Full):
                self._queue.put(None, timeout=_POLL_S)
            self._thread.join(_POLL_S)
        if self._result is None:
            self._result = self._finish()
        return self._result

    def _run(self) -> None:
        try:
            for frame, at_s in iter(self._queue.get, None):
                if not _is_frame(frame, at_s):
                    self._refused += 1
                    continue
                if self._file is None:
                    path = _create(self._sink, self._overwrite)
                    self._file = _FragmentedFile(path, self._encoder, self._fps, even_size(frame))
                self._file.write(frame, at_s)
            if self._file is not None:
                self._file.finish()
        except _FAILURES as error:
            self.problem = (
                f"recording to {self.path} stopped early; everything up to then was saved: {reason(error)}"
            )
            if self._file is not None:
                self._file.abandon()
        finally:
            self._ended = True

    def _finish(self) -> Recording:
        file, problem = self._file, self.problem
        if file is None:
            return Recording(self._sink, 0, self._given, 0.0, problem)
        frames, seconds = (file.frames, file.seconds) if not problem else _readable(file.path)
        if frames == 0:
            with suppress(OSError):
                file.path.unlink()
            return Recording(file.path, 0, self._given, 0.0, problem)
        if MUXERS[file.path.suffix.lower()] in ("mp4", "mov"):
            problem = problem or _make_plain(file.path, frames)
        return Recording(file.path, frames, self._given - frames, seconds, problem)


def _is_frame(frame: object, at_s: float) -> bool:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3:
        return False
    return frame.shape[2] == 3 and frame.size > 0 and isfinite(at_s)


def _create(sink: Path, overwrite: bool) -> Path:
    """The file to record into: ``sink``, or the next free name if another program took it meanwhile."""
    while not overwrite:
        path = numbered(sink)
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    return sink


class _FragmentedFile:
    """One file being recorded, fragment by fragment. Raises what PyAV raises.

    A frame lasts until the next one, so each is held until the next is there.
    """

    def __init__(self, path: Path, encoder: Encoder, fps: float, size: tuple[int, int]) -> None:
        muxer = MUXERS[path.suffix.lower()]
        self.path, self.frames = path, 0
        self._ticks = _TICKS[muxer]  # per second
        self._step = max(1, round(self._ticks / fps))
        self._start_s: float | None = None
        self._held: tuple[Frame, int] | None = None
        self._key_pts = self._end_pts = 0
        self._container = av.open(
            str(path.absolute()), "w", format=muxer, container_options=_MUX_OPTIONS[muxer]
        )
        rate, tick = Fraction(fps).limit_denominator(1001), Fraction(1, self._ticks)
        self._track = VideoTrack(self._container, encoder, size, rate, tick, _BT709)
        self._container.start_encoding()

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last that is encoded."""
        return self._end_pts / self._ticks

    def write(self, frame: Frame, at_s: float) -> None:
        """Hold ``frame``, and encode the one before it."""
        self._start_s = at_s if self._start_s is None else self._start_s
        pts = round((at_s - self._start_s) * self._ticks)
        if self._held is not None:
            pts = max(pts, self._held[1] + 1)  # two in one tick, or a clock set back
            self._encode(*self._held, until=pts)
        self._held = frame, pts

    def _encode(self, frame: Frame, pts: int, until: int) -> None:
        # A fragment begins where players can start: by time, as the rate may be anything.
        key = pts - self._key_pts >= _FRAGMENT_S * self._ticks
        self._key_pts = pts if key else self._key_pts
        for packet in self._track.encode(frame, pts, until - pts, key=key):
            self._container.mux(packet)
        self.frames, self._end_pts = self.frames + 1, until

    def finish(self) -> None:
        """Write all that is left; the last frame lasts as long as one at the nominal rate."""
        if self._held is not None:
            self._encode(*self._held, until=self._held[1] + self._step)
            self._held = None
        for packet in self._track.flush():
            self._container.mux(packet)
        self._container.close()

    def abandon(self) -> None:
        """Release the file after a failure."""
        self._held = None
        with suppress(*_FAILURES):
            self._container.close()


def _whole_packets(path: Path) -> Iterator[Packet[VideoStream]]:
    """Packets of a recording up to the first that is incomplete."""
    muxer = MUXERS[path.suffix.lower()]
    with av.open(str(path.absolute()), format=muxer) as container, suppress(av.FFmpegError):
        for packet in container.demux(container.streams.video[0]):
            if packet.is_corrupt:
                return
            if packet.size:
                yield packet


def _readable(path: Path) -> tuple[int, float]:
    """(frames, seconds) in a recording that broke off."""
    frames, seconds = 0, 0.0
    with suppress(*_FAILURES):
        for packet in _whole_packets(path):
            end = (packet.pts or 0) + (packet.duration or 0)
            frames, seconds = frames + 1, float(end * packet.time_base)
    return frames, seconds


def _make_plain(path: Path, frames: int) -> str:
    """Turn fragments into a plain MP4 with its index in front; returns "", or why it stays fragmented."""
    try:
        if shutil.disk_usage(path.parent).free < path.stat().st_size + _SPARE_BYTES:
            raise MediaError("the disk has no room for the copy this needs")
        with atomic_file(path, error=MediaError) as partial:
            copied = _copy_plain(path, partial)
            if copied != frames:
                raise MediaError(f"{copied} of its {frames} frames were read back")
    except _FAILURES as error:
        return f"{path} is complete but still fragmented; some players cannot seek in it: {reason(error)}"
    return ""


def _copy_plain(path: Path, plain: Path) -> int:
    """Copy the packets, as they are and at their times; returns how many."""
    muxer = MUXERS[path.suffix.lower()]
    options = {"movflags": "+faststart", "video_track_timescale": str(_TICKS[muxer])}
    copied = 0
    with av.open(str(plain.absolute()), "w", format=muxer, container_options=options) as target:
        stream = None
        for packet in _whole_packets(path):
            if stream is None:
                stream = target.add_stream_from_template(packet.stream, opaque=True)
            packet.stream = stream
            target.mux(packet)
            copied += 1
    return copied
