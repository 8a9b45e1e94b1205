"""The clip transcoder: decodes, stylizes and encodes in parallel; timestamps and sound are kept."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from std_rt.core.arrays import Frame
from std_rt.core.errors import MediaError
from std_rt.core.files import atomic_file, check_output, writing
from std_rt.core.prefetcher import Prefetcher
from std_rt.media.video.animation import is_animated_picture
from std_rt.media.video.base import DecodedFrame
from std_rt.media.video.clip import copied_streams, nothing_decoded, open_clip, open_container
from std_rt.media.video.clip_writer import ClipWriter
from std_rt.media.video.encoder import CLIP_SUFFIXES
from std_rt.media.video.sound import sound_fits

__all__ = ["CLIP_SUFFIXES", "Stream", "VideoReport", "default_clip_suffix", "stylized", "transcode_stream"]

# Frames waiting between the threads: enough for a group that shares one call of the engines, and few enough
# for 4K clips, whose frames are 25 MB.
_DECODED_AHEAD = 4
_STYLED_AHEAD = 4
_LONGEST_CALL_S = 60.0  # allowed for the threads to finish their last frame before the clip is closed

Stream = Callable[[Iterator[Frame]], Iterator[Frame]]


@dataclass(frozen=True)
class VideoReport:
    """The result of `transcode_stream`.

    frames: written; seconds: wall time; width, height: px of the output; stopped: ``should_stop`` ended it
    early (the output holds the frames so far; with 0 frames no file was written); notes: one line each on
    what a user may want to know (dropped subtitles, damaged input, ...).
    """

    output: Path
    frames: int
    seconds: float
    width: int
    height: int
    stopped: bool
    notes: tuple[str, ...] = ()


def default_clip_suffix(source: Path, sound: str = "auto") -> str:
    """The clip's own suffix if it can be written, else .mp4, or .mkv if only that can hold its sound as is.

    sound: as in `transcode_stream`; sound that is converted or dropped fits .mp4.
    """
    if source.suffix.lower() in CLIP_SUFFIXES:
        return source.suffix
    if sound in ("convert", "drop") or is_animated_picture(source):
        return ".mp4"
    with open_container(source) as container:
        sounds = copied_streams(container)[0]
        in_mp4 = all(sound_fits(stream, ".mp4", usual=True) for stream in sounds)
        return ".mkv" if not in_mp4 and all(sound_fits(stream, ".mkv") for stream in sounds) else ".mp4"


class _NotInPlaceError(Exception):
    """Nothing for the place of the result: no frame before ``should_stop``, or a clip is there already."""


def transcode_stream(
    source: Path,
    sink: Path,
    stream: Stream,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    codec: str | None = None,
    crf: int = 18,
    sound: str = "auto",
    announce: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> VideoReport:
    """Every frame of ``source`` through ``stream`` into ``sink``, same timestamps from 0 on, audio copied.

    stream: an iterator of frames (uint8 [H, W, 3] RGB, upright) to one of as many frames (uint8
    [H', W', 3]), in order; it may take several before it returns one, and may keep the arrays. The
    first result sets the output's size (an odd side gets its last row or column repeated, as 4:2:0 needs
    even sides). It runs in its own thread, between one that decodes and this one, which encodes.
    progress(done, total): called after each frame; total None if unknown. should_stop: called before each
    frame is written. codec: an FFmpeg encoder, default libx264, libvpx-vp9 for .webm. crf: 0..51, lower is
    better. The suffix of ``sink`` selects the container: .mp4 .m4v .mov .mkv .webm. sound: auto (copied, or
    converted to AAC or Opus where ``sink`` cannot hold it), copy, convert or drop. announce: called before
    any frame with each note on what will not be kept as it is; ``notes`` of the report has them, too.

    Stopped early: a playable file with what was done, beside the sink (NAME_stopped) if that was there
    already. If another program made the sink meanwhile (without ``overwrite``), the clip is beside it, too
    (NAME_2). Any exception (from ``stream`` too, passed on as it is): no file. Raises MediaError before any
    work for an output that exists (without ``overwrite``), is the source or cannot be written, and for a
    source with no video or none that can be decoded.
    """
    started_s = time.perf_counter()
    check_output(sink, source=source, overwrite=overwrite)
    stopped, kept = False, sink
    with open_clip(source) as clip:
        writer, total = ClipWriter(sink, clip, codec, crf, sound), clip.frames
        losses = writer.losses()
        if announce is not None:
            for line in losses:
                announce(line)
        try:
            with atomic_file(sink, error=MediaError) as partial:
                with writer.open(partial), stylized(clip.read(), stream) as frames:
                    stopped = _encode(frames, writer, total, progress, should_stop)
                if not writer.frames:
                    raise _NotInPlaceError if stopped else nothing_decoded(source)
                if sink.exists() and (stopped or not overwrite):  # another run has made it meanwhile
                    kept = _free_name(sink, "stopped" if stopped else "2")
                    with writing(kept):
                        partial.replace(kept)
                    raise _NotInPlaceError
        except _NotInPlaceError:
            pass
        notes = (*losses, *clip.notes(stopped=stopped), *writer.notes())
    width, height = writer.size
    seconds = time.perf_counter() - started_s
    return VideoReport(kept, writer.frames, seconds, width, height, stopped, notes)


def _free_name(sink: Path, mark: str) -> Path:
    """``NAME_mark``, with a number after it if that is taken."""
    marks = chain([mark], (f"{mark}_{n}" for n in count(2)))
    return next(name for each in marks if not (name := sink.with_stem(f"{sink.stem}_{each}")).exists())


def _encode(
    frames: Iterator[tuple[DecodedFrame, Frame]],
    writer: ClipWriter,
    total: int | None,
    progress: Callable[[int, int | None], None] | None,
    should_stop: Callable[[], bool] | None,
) -> bool:
    """Write every result; True if ``should_stop`` ended it."""
    for frame, styled in frames:
        if should_stop is not None and should_stop():
            return True
        writer.write_frame(frame, styled)
        if progress is not None:
            progress(writer.frames, total)
    return False


@contextmanager
def stylized(
    frames: Iterator[DecodedFrame], stream: Stream
) -> Iterator[Iterator[tuple[DecodedFrame, Frame]]]:
    """A clip's frames with their results, decoded in one thread and stylized in another.

    Both have ended when the block has: they use the clip, which must not be closed under them.
    """
    with (
        Prefetcher(frames, room=_DECODED_AHEAD, name="decode") as decoded,
        Prefetcher(_paired(decoded, stream), room=_STYLED_AHEAD, name="engines") as styled,
    ):
        try:
            yield styled
        finally:
            decoded.close()
            styled.close(_LONGEST_CALL_S)
            decoded.close(_LONGEST_CALL_S)


def _paired(decoded: Iterator[DecodedFrame], stream: Stream) -> Iterator[tuple[DecodedFrame, Frame]]:
    """Pairs of a decoded frame and its result from ``stream``."""
    inside: deque[DecodedFrame] = deque()

    def frames() -> Iterator[Frame]:
        for frame in decoded:
            inside.append(frame)
            yield frame.rgb

    for styled in stream(frames()):
        if not inside:
            raise ValueError("stream must return one frame per input frame; it returned more")
        yield inside.popleft(), styled
    if inside:
        raise ValueError("stream must return one frame per input frame; it returned fewer")
