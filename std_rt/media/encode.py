"""Writing clips: stylized frames at their source's times, sound packets untouched."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import lcm
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.codec.context import Flags, ThreadType
from av.container import OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from std_rt.errors import MediaError
from std_rt.media.clip import Clip, TimedFrame
from std_rt.media.colour import Colour, tag_stream, to_yuv
from std_rt.media.files import reason
from std_rt.media.fit import from_working

__all__ = ["CLIP_SUFFIXES", "ClipWriter", "sound_fits"]

_MUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
CLIP_SUFFIXES = frozenset(_MUXERS)
# Brands describe the old container; FFmpeg signs itself as the encoder.
_OLD_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})
# What containers say to packets of damaged sound; frames encoded here never cause it.
_BAD_PACKET = (av.ArgumentError, av.InvalidDataError)

Frame = NDArray[np.uint8]


def sound_fits(stream: AudioStream, suffix: str) -> bool:
    """True if the packets of ``stream`` can be stored in a clip with this suffix as they are."""
    with av.open(io.BytesIO(), "w", format=_MUXERS[suffix]) as probe:
        try:
            probe.add_stream_from_template(stream)
        except ValueError:
            return False
    return True


class ClipWriter:
    """One output clip. The first frame sets its size and colour tags, so sound waits for it.

    Raises MediaError at once for a suffix or encoder that is not known, or sound the container cannot hold.
    """

    def __init__(self, sink: Path, clip: Clip, codec: str | None, crf: int) -> None:
        self._sink, self._clip, self._crf = sink, clip, crf
        self._suffix = sink.suffix.lower()
        self._codec = codec or ("libvpx-vp9" if self._suffix == ".webm" else "libx264")
        self._check()
        self.frames = 0
        self.size = (0, 0)  # (width, height) px
        self._container: OutputContainer | None = None
        self._video: VideoStream | None = None
        self._sound: dict[int, AudioStream] = {}
        self._waiting: list[Packet[AudioStream]] = []
        self._last_dts: dict[int, int] = {}
        self._colour: Colour | None = None
        self._dropped_sound = 0
        self._resized = 0

    def _check(self) -> None:
        if self._suffix not in _MUXERS:
            known = " ".join(sorted(_MUXERS))
            raise MediaError(
                f"{self._sink}: a clip cannot be written as {self._suffix!r}; use one of {known}"
            )
        try:
            av.Codec(self._codec, "w")
        except ValueError as error:
            raise MediaError(f"video encoder {self._codec!r} is not in this FFmpeg; use libx264") from error
        for stream in self._clip.sound:
            if not sound_fits(stream, self._suffix):
                name = stream.codec_context.codec.canonical_name
                raise MediaError(
                    f"{self._sink}: {name} sound cannot be copied into {self._suffix};"
                    f" use -o {self._sink.with_suffix('.mkv').name}"
                )

    @contextmanager
    def open(self, partial: Path) -> Iterator[None]:
        """Write to ``partial`` inside the block; finished at its end, given up if it raises."""
        with self._as_media_error():
            self._container = av.open(
                str(partial.absolute()),
                "w",
                format=_MUXERS[self._suffix],
                container_options=self._mux_options(),
            )
        try:
            yield
            with self._as_media_error():
                self._finish()
        finally:
            # After a failure the file goes away: only its handle matters (Windows), not its trailer.
            with suppress(av.FFmpegError):
                self._container.close()

    def _mux_options(self) -> dict[str, str]:
        """For MP4: index in front, and clocks that hold the source's times (else starts are cut to ms)."""
        if _MUXERS[self._suffix] not in ("mp4", "mov"):
            return {}
        options = {"movflags": "+faststart"}
        ticks = self._clip.time_base.denominator
        if self._clip.time_base.numerator == 1:
            options["video_track_timescale"] = str(ticks)
        common = lcm(
            ticks, *(stream.time_base.denominator for stream in self._clip.sound if stream.time_base)
        )
        options["movie_timescale"] = str(common if common < 1 << 31 else ticks)
        return options

    def write_frame(self, source: TimedFrame, styled: Frame) -> None:
        """Encode ``styled`` (uint8 [H', W', 3]) at the time of the frame it was made from."""
        if styled.ndim != 3 or styled.shape[2] != 3 or styled.dtype != np.uint8:
            raise ValueError(f"stylize must return uint8 [H, W, 3], got {styled.dtype} {styled.shape}")
        even = _pad_to_even(styled)
        with self._as_media_error():
            if self._video is None:
                self._start(source.colour, even)
            self._encode(source, even)
        self.frames += 1

    def _start(self, colour: Colour, first: Frame) -> None:
        assert self._container is not None
        self.size, self._colour = (first.shape[1], first.shape[0]), colour
        tags = self._clip.container.metadata
        self._container.metadata.update({k: v for k, v in tags.items() if k not in _OLD_TAGS})
        self._video = self._add_video(self._container, colour)
        for stream in self._clip.sound:
            copy = self._container.add_stream_from_template(stream)
            copy.metadata.update(_kept_tags(stream.metadata))
            self._sound[stream.index] = copy
        self._container.start_encoding()
        waiting, self._waiting = self._waiting, []
        for packet in waiting:
            self._mux_sound(packet)

    def _add_video(self, container: OutputContainer, colour: Colour) -> VideoStream:
        width, height = self.size
        stream = container.add_stream(
            self._codec,
            rate=self._clip.rate,
            options=_encoder_options(self._codec, self._crf),
            width=width,
            height=height,
            time_base=self._clip.time_base,
        )
        assert isinstance(stream, VideoStream)
        stream.codec_context.thread_type = ThreadType.AUTO
        # Else packets last as long as the average frame, and a long last frame is cut.
        stream.codec_context.flags |= Flags.frame_duration
        if self._clip.pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = self._clip.pixel_aspect
        stream.metadata.update(_kept_tags(self._clip.video.metadata))
        tag_stream(stream, colour)
        return stream

    def _encode(self, source: TimedFrame, styled: Frame) -> None:
        assert self._video is not None
        assert self._colour is not None
        width, height = self.size
        if styled.shape[:2] != (height, width):
            styled = from_working(styled, (height, width))
            self._resized += 1
        frame = to_yuv(styled, self._colour)
        frame.pts, frame.duration, frame.time_base = source.pts, source.duration, self._clip.time_base
        for packet in self._video.encode(frame):
            self._mux(packet)

    def write_sound(self, packet: Packet[AudioStream]) -> None:
        """Copy one sound packet as it is (kept back until the first frame has set up the file)."""
        if self._video is None:
            self._waiting.append(packet)
            return
        with self._as_media_error():
            self._mux_sound(packet)

    def _mux_sound(self, packet: Packet[AudioStream]) -> None:
        index, dts = packet.stream_index, packet.dts
        if dts is not None:
            # Damaged files repeat times; a container takes only rising ones.
            if dts <= self._last_dts.get(index, dts - 1):
                self._dropped_sound += 1
                return
            self._last_dts[index] = dts
        packet.stream = self._sound[index]
        self._mux(packet)

    def _mux(self, packet: Packet[AudioStream] | Packet[VideoStream]) -> None:
        """Hand one packet to the container, which may now reject a damaged sound packet of before."""
        assert self._container is not None
        try:
            self._container.mux(packet)
        except _BAD_PACKET:
            if not self._sound:
                raise
            self._dropped_sound += 1

    def _finish(self) -> None:
        assert self._container is not None
        if self._video is not None:
            for packet in self._video.encode(None):
                self._mux(packet)
        self._container.close()

    @contextmanager
    def _as_media_error(self) -> Iterator[None]:
        try:
            yield
        except (av.FFmpegError, ValueError) as error:
            if self._sound and isinstance(error, _BAD_PACKET):
                name = self._clip.container.name
                raise MediaError(
                    f"{name}: its sound is damaged and cannot be copied; remove it first"
                ) from error
            raise MediaError(f"{self._sink} cannot be written: {reason(error)}") from error

    def notes(self) -> list[str]:
        """What went other than plain into the output."""
        notes = []
        if self._dropped_sound:
            notes.append(f"{self._dropped_sound} damaged sound packets were left out")
        if self._resized:
            notes.append(
                f"the size changed within the clip; {self._resized} frames were resized to the first one's"
            )
        return notes


def _kept_tags(tags: dict[str, str]) -> dict[str, str]:
    """What stays true of a stream: statistics of the old file do not."""
    return {key: value for key, value in tags.items() if key in ("language", "title")}


def _encoder_options(codec: str, crf: int) -> dict[str, str]:
    """Speed first: the encoder shares the processor with the stylizer.

    No B-frames: every packet is then stored at its frame's own time and with its own duration, also for
    players that do not follow edit lists.
    """
    if codec == "libvpx-vp9":
        # VP9 counts quality to 63, not 51.
        return {"crf": str(round(crf * 63 / 51)), "deadline": "realtime", "cpu-used": "8", "row-mt": "1"}
    return {"crf": str(crf), "preset": "veryfast", "bf": "0"} if codec == "libx264" else {}


def _pad_to_even(frame: Frame) -> Frame:
    odd_h, odd_w = frame.shape[0] % 2, frame.shape[1] % 2
    if not (odd_h or odd_w):
        return frame
    return np.pad(frame, ((0, odd_h), (0, odd_w), (0, 0)), mode="edge")
