"""Clips: decode, stylize, encode side by side in constant memory; times and sound stay as they were."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from std_rt.core.errors import MediaError
from std_rt.core.files import atomic_file, check_output
from std_rt.core.prefetcher import Prefetcher
from std_rt.media.video.clip import Clip, TimedFrame, first_video_stream, is_cover, open_clip
from std_rt.media.video.encode import CLIP_SUFFIXES, ClipWriter, sound_fits

__all__ = [
    "CLIP_SUFFIXES",
    "VideoInfo",
    "VideoReport",
    "default_clip_suffix",
    "probe",
    "transcode",
    "transcode_stream",
]

# Frames that wait between the threads: enough for a group of them that shares a call of the engines, and few
# enough for clips of 4K, whose frames are 25 MB.
_DECODED_AHEAD = 4
_STYLED_AHEAD = 4
_LONGEST_CALL_S = 60.0  # what the threads get to end their last frame before a clip is closed

Frame = NDArray[np.uint8]
Stream = Callable[[Iterator[Frame]], Iterator[Frame]]


@dataclass(frozen=True)
class VideoInfo:
    """What a clip says about itself; ``width`` x ``height`` px is the upright picture.

    rotation: degrees clockwise that were needed to get it upright (0, 90, 180, 270).
    frames: their number, or an estimate from duration and rate, or None; duration_s: seconds or None;
    average_rate: frames/s or None; time_base: seconds per unit of the frames' timestamps.
    """

    width: int
    height: int
    rotation: int
    frames: int | None
    duration_s: float | None
    average_rate: Fraction | None
    has_audio: bool
    time_base: Fraction


@dataclass(frozen=True)
class VideoReport:
    """What :func:`transcode` did.

    frames: written; seconds: wall time; width, height: px of the output; stopped: ``should_stop`` ended it
    early (the output holds the frames so far; with 0 frames no file was written); audio_streams: copied;
    notes: one line each on what a user may want to know (dropped subtitles, damaged input, ...).
    """

    output: Path
    frames: int
    seconds: float
    width: int
    height: int
    stopped: bool
    audio_streams: int
    notes: tuple[str, ...] = ()


def probe(path: Path) -> VideoInfo:
    """Open a clip and decode its first frame. Raises MediaError if it is no video or cannot be decoded."""
    with open_clip(path) as container:
        clip = Clip(container, first_video_stream(container, path))
        for item in clip.read():
            if isinstance(item, TimedFrame):
                return _info(clip, item)
    raise _nothing_decoded(path)


def _info(clip: Clip, first: TimedFrame) -> VideoInfo:
    return VideoInfo(
        width=first.rgb.shape[1],
        height=first.rgb.shape[0],
        rotation=first.turn.degrees,
        frames=clip.frames,
        duration_s=clip.duration_s,
        average_rate=clip.video.average_rate,
        has_audio=bool(clip.sound),
        time_base=clip.time_base,
    )


def _nothing_decoded(path: Path) -> MediaError:
    return MediaError(f"{path} is damaged: not one frame of it could be decoded")


def default_clip_suffix(source: Path) -> str:
    """The clip's own suffix where it can be written, else .mp4, or .mkv if mp4 cannot hold its sound."""
    if source.suffix.lower() in CLIP_SUFFIXES:
        return source.suffix
    with open_clip(source) as container:
        return ".mp4" if all(sound_fits(stream, ".mp4") for stream in container.streams.audio) else ".mkv"


class _StoppedAtOnceError(Exception):
    """should_stop before the first frame: there is no file to keep."""


def transcode(
    source: Path,
    sink: Path,
    stylize: Callable[[Frame], Frame],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    codec: str | None = None,
    crf: int = 18,
    should_stop: Callable[[], bool] | None = None,
) -> VideoReport:
    """`transcode_stream` with a function of one frame."""

    def each(frames: Iterator[Frame]) -> Iterator[Frame]:
        return (stylize(frame) for frame in frames)

    return transcode_stream(
        source,
        sink,
        each,
        overwrite=overwrite,
        progress=progress,
        codec=codec,
        crf=crf,
        should_stop=should_stop,
    )


def transcode_stream(
    source: Path,
    sink: Path,
    stream: Stream,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    codec: str | None = None,
    crf: int = 18,
    should_stop: Callable[[], bool] | None = None,
) -> VideoReport:
    """Every frame of ``source`` through ``stream`` into ``sink``, same timestamps, audio copied.

    stream: an iterator of frames (uint8 [H, W, 3] RGB, upright) to one of as many frames (uint8
    [H', W', 3]), in order; it may take several before it gives one. The first result sets the output's size
    (an odd side gets its last row or column repeated, as 4:2:0 needs even sides). The arrays it gets are its
    own to keep. It runs in a thread of its own, between one that decodes and this one, which encodes.
    progress(done, total): after each frame; total None if unknown. should_stop: asked before each frame is
    written. codec: an FFmpeg encoder, default libx264, libvpx-vp9 for .webm. crf: 0..51, lower is better.
    The suffix of ``sink`` picks the container: .mp4 .m4v .mov .mkv .webm.

    Stopped early: a playable file with what was done. Any exception (from ``stream`` too, passed on as it
    is): no file. Raises MediaError before any work for an output that exists (without ``overwrite``), is
    the source or cannot be written, and for a source with no video or none that can be decoded.
    """
    started = time.perf_counter()
    check_output(sink, source=source, overwrite=overwrite)
    with open_clip(source) as container:
        clip = Clip(container, first_video_stream(container, source))
        writer = ClipWriter(sink, clip, codec, crf)
        try:
            with atomic_file(sink, error=MediaError) as partial:
                stopped = _pump(clip, writer, partial, stream, progress, should_stop)
                if not writer.frames:
                    raise _StoppedAtOnceError if stopped else _nothing_decoded(source)
        except _StoppedAtOnceError:
            stopped = True
        audio_streams = len(clip.sound)
        notes = (*_source_notes(container, clip, stopped), *writer.notes())
    width, height = writer.size
    seconds = time.perf_counter() - started
    return VideoReport(sink, writer.frames, seconds, width, height, stopped, audio_streams, notes)


def _pump(
    clip: Clip,
    writer: ClipWriter,
    partial: Path,
    stream: Stream,
    progress: Callable[[int, int | None], None] | None,
    should_stop: Callable[[], bool] | None,
) -> bool:
    """Read, stylize, write until the end; True if ``should_stop`` came first."""
    total = clip.frames
    with writer.open(partial), _lanes(clip, stream) as styled_frames:
        for source, styled in styled_frames:
            if should_stop is not None and should_stop():
                return True
            writer.write_frame(source, styled)
            if progress is not None:
                progress(writer.frames, total)
    return False


@contextmanager
def _lanes(clip: Clip, stream: Stream) -> Iterator[Prefetcher[tuple[TimedFrame, Frame]]]:
    """The clip, decoded in one thread and stylized in another; both have ended when the block has.

    They use the clip, which must not be closed under them.
    """
    with (
        Prefetcher(clip.read(), room=_DECODED_AHEAD, name="decode") as decoded,
        Prefetcher(_through(decoded, stream), room=_STYLED_AHEAD, name="engines") as styled,
    ):
        try:
            yield styled
        finally:
            decoded.close()
            styled.close(_LONGEST_CALL_S)
            decoded.close(_LONGEST_CALL_S)


def _through(decoded: Iterator[TimedFrame], stream: Stream) -> Iterator[tuple[TimedFrame, Frame]]:
    """Frames, each with what ``stream`` makes of it."""
    inside: deque[TimedFrame] = deque()

    def frames() -> Iterator[Frame]:
        for frame in decoded:
            inside.append(frame)
            yield frame.rgb

    for styled in stream(frames()):
        if not inside:
            raise ValueError("stream must give one frame for each that it takes; it gave more")
        yield inside.popleft(), styled
    if inside:
        raise ValueError("stream must give one frame for each that it takes; it gave fewer")


def _source_notes(container: InputContainer, clip: Clip, stopped: bool) -> list[str]:
    notes = []
    if clip.damage or (not stopped and clip.is_short):
        notes.append("the input is damaged or cut short; everything that could be decoded was done")
    if container.streams.subtitles:
        notes.append("subtitles were not copied")
    if sum(not is_cover(stream) for stream in container.streams.video) > 1:
        notes.append("only the first video stream was used")
    if clip.is_hdr:
        notes.append("HDR brightness (PQ or HLG) was taken as it is, without tone mapping")
    return notes
