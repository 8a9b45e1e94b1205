"""One picture, or one clip, painted with a look: what `POST /v1/stylize` and jobs do.

Both go through `FrameStream`, as sessions and the commands do.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

from std_rt.core.errors import MediaError, StdRtError, one_line
from std_rt.media import fit
from std_rt.media.image import Picture, open_picture, painted
from std_rt.media.sources import is_video
from std_rt.media.video.clip import open_container, probe
from std_rt.media.video.transcode import transcode_stream
from std_rt.pipeline.style_file import StyleFile
from std_rt.pipeline.stylizer import Stylizer
from std_rt.serve.library import Uploads, named
from std_rt.serve.limits import BusyError, ConflictError, Limits, MissingError
from std_rt.serve.protocol import Look
from std_rt.streaming.frame_stream import FrameStream
from std_rt.streaming.temporal import TemporalFilter

__all__ = ["ClipJob", "ClipJobs", "paint_picture"]

_log = logging.getLogger(__name__)


def _stream(stylizer: Stylizer, look: Look, style: StyleFile) -> FrameStream:
    """A stream that paints with a look, one frame a turn, so that sessions do not wait long."""
    stream = FrameStream(
        stylizer,
        lambda _: (style.style, look.strength),
        temporal=TemporalFilter(look.temporal),
        seed=look.seed,
    )
    stream.size, stream.steps, stream.keep_colours = look.size, look.steps, look.keep_colours
    return stream


def paint_picture(
    stylizer: Stylizer, picture: Picture, look: Look, style: StyleFile, *, upscale: bool = False
) -> Picture:
    """A picture in a style, as `std-rt stylize` paints it. Raises StdRtError."""
    stream = _stream(stylizer, look, style)
    return painted(picture, lambda frame: next(stream.frames([frame])), upscale=upscale)


def _stored_size(path: Path) -> tuple[int, int]:
    """(W, H) in px that the header of a clip, or of an animated picture, states."""
    with suppress(MediaError), open_picture(path) as picture:
        return picture.size
    with open_container(path) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height


@dataclass(eq=False)
class ClipJob:
    """One clip. ``state``: waiting, running, done, failed or cancelled."""

    source: Path
    sink: Path
    look: Look
    style: StyleFile
    upscale: bool
    total: int | None
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    state: str = "waiting"
    frames: int = 0
    error: str = ""
    notes: tuple[str, ...] = ()
    cancelled: Event = field(default_factory=Event)
    ended_s: float | None = None

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "id": self.id,
            "state": self.state,
            "frames": self.frames,
            "total": self.total,
            "error": self.error or None,
            "notes": list(self.notes),
        }


class ClipJobs:
    """Clips, one after the other, in a thread of its own. Any thread may call any method."""

    def __init__(
        self,
        stylizer: Stylizer,
        uploads: Uploads,
        limits: Limits,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stylizer, self._uploads, self._limits, self._now = stylizer, uploads, limits, now
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="std-rt-jobs")
        self._jobs: dict[str, ClipJob] = {}
        self._lock = Lock()

    def check_room(self) -> None:
        """Raise BusyError if no further job is taken now."""
        self.sweep()
        with self._lock:
            waiting = sum(job.ended_s is None for job in self._jobs.values())
        if waiting >= self._limits.jobs:
            raise BusyError(f"busy: {waiting} clips wait already, which is the limit; try again later")

    def submit(self, source: Path, look: Look, style: StyleFile, *, upscale: bool = False) -> ClipJob:
        """Take a clip that lies in the uploads' folder, which is the job's from now on.

        Raises MediaError for what is no clip or too large or long, BusyError at the limit.
        """
        try:
            self.check_room()
            total = self._checked(source)
        except StdRtError as error:
            source.unlink(missing_ok=True)
            raise named(error, source, "the clip") from error
        job = ClipJob(source, self._uploads.new(".mp4"), look, style, upscale, total)
        with self._lock:
            self._jobs[job.id] = job
        self._pool.submit(self._run, job)
        return job

    def _checked(self, source: Path) -> int | None:
        """The number of frames, if it is known."""
        if not is_video(source):
            raise MediaError("the clip is not one that can be read; send an .mp4, .webm or .mov")
        w, h = _stored_size(source)  # before a frame is decoded
        if w * h > self._limits.clip_px:
            raise MediaError(f"the clip is {w} x {h} px, which is too large; scale it down")
        frames, most = probe(source).frames, self._limits.clip_frames
        if frames is not None and frames > most:
            raise MediaError(f"the clip has {frames} frames, and the limit is {most}; cut it")
        return frames

    def _run(self, job: ClipJob) -> None:
        try:
            if not job.cancelled.is_set():
                job.state = "running"
                self._transcode(job)
        except StdRtError as error:
            told = named(named(error, job.source, "the clip"), job.sink, "the result")
            job.state, job.error = "failed", one_line(told)
        except Exception:  # noqa: BLE001 (told to the client, and logged)
            _log.exception("a clip has failed")
            job.state, job.error = "failed", "the clip could not be painted; the server's log says more"
        if job.cancelled.is_set():
            job.state = "cancelled"
            job.sink.unlink(missing_ok=True)
        job.source.unlink(missing_ok=True)
        job.ended_s = self._now()

    def _transcode(self, job: ClipJob) -> None:
        stream = _stream(self._stylizer, job.look, job.style)

        def show(done: int, total: int | None) -> None:
            job.frames, job.total = done, None if total is None else max(total, done)

        report = transcode_stream(
            job.source,
            job.sink,
            fit.upscaling(stream.frames) if job.upscale else stream.frames,
            progress=show,
            should_stop=lambda: job.cancelled.is_set() or job.frames >= self._limits.clip_frames,
        )
        job.notes, job.frames = report.notes, report.frames
        job.total, job.state = report.frames, "done"

    def get(self, key: str) -> ClipJob:
        """The job of an id. Raises MissingError."""
        self.sweep()
        with self._lock:
            if key in self._jobs:
                return self._jobs[key]
        raise MissingError("there is no such job; it may have been deleted, which happens after a time")

    def result(self, key: str) -> Path:
        """The clip of a job that is done. Raises MissingError, or ConflictError for one that is not."""
        job = self.get(key)
        if job.state != "done":
            why = f": {job.error}" if job.error else "; ask again when its state is done"
            raise ConflictError(f"the job is {job.state}{why}")
        return job.sink

    def delete(self, key: str) -> None:
        """Cancel a job if it runs, and delete its files. Raises MissingError."""
        self._drop(self.get(key))

    def _drop(self, job: ClipJob) -> None:
        job.cancelled.set()
        with self._lock:
            self._jobs.pop(job.id, None)
        if job.ended_s is not None:
            job.sink.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete results that have lain here for their time."""
        before = self._now() - self._limits.keep_s
        with self._lock:
            old = [job for job in self._jobs.values() if job.ended_s is not None and job.ended_s < before]
        for job in old:
            self._drop(job)

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        with self._lock:
            states = [job.state for job in self._jobs.values()]
        return {state: states.count(state) for state in ("waiting", "running", "done", "failed")}

    def close(self) -> None:
        """Cancel everything; returns when the engines are no longer in use."""
        with self._lock:
            for job in self._jobs.values():
                job.cancelled.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
