"""The clip writer: stylized frames at their source's times; sound is copied packet by packet, never decoded.

Sound is read separately from the frames. In a single pass, one would have to wait in memory for the other:
all of the sound, in a clip whose pictures begin late or end early.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from math import lcm
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from std_rt.core.errors import MediaError
from std_rt.core.files import reason
from std_rt.media.video.clip import Clip, DecodedFrame, open_container, sound_streams
from std_rt.media.video.colour import Colour
from std_rt.media.video.encoder import MUXERS, Encoder, VideoTrack, even_size

__all__ = ["ClipWriter", "sound_fits"]

# Brands describe the old container; FFmpeg names itself as the encoder.
_OLD_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})
# Tags that stay true; statistics of the old file do not.
_STREAM_TAGS = frozenset({"language", "title"})
# Raised by containers for packets of damaged sound; never for frames encoded here.
_BAD_PACKET = (av.ArgumentError, av.InvalidDataError)
# FFmpeg's name for an unknown layout -> how players interpret it.
_LAYOUTS = {"1 channels": "mono", "2 channels": "stereo", "6 channels": "5.1", "8 channels": "7.1"}
_LONGEST_PACKET = 1 << 31  # ticks; FFmpeg returns negative durations as unsigned 32-bit numbers

Frame = NDArray[np.uint8]


class ClipWriter:
    """One output clip. The first frame sets its size and colour tags; sound is copied along with the frames.

    Raises MediaError at once for an unknown suffix or encoder, or sound the container cannot hold.
    """

    def __init__(self, sink: Path, clip: Clip, codec: str | None, crf: int) -> None:
        self._sink, self._clip, self._suffix = sink, clip, sink.suffix.lower()
        self._encoder = Encoder.for_file(sink, codec, crf)
        self._check_sound()
        self.frames = 0
        self.size = (0, 0)  # (width, height) px
        self._container: OutputContainer | None = None
        self._video: VideoTrack | None = None
        self._sound: dict[int, _SoundTrack] = {}  # by the input's stream index
        self._packets: Iterator[Packet[AudioStream]] = iter(())  # of the sound
        self._next: Packet[AudioStream] | None = None  # the first that was not due yet
        self._end_s = 0.0  # of the last frame
        self._dropped_sound = 0

    def _check_sound(self) -> None:
        sounds = self._clip.sound
        for stream in sounds:
            if sound_fits(stream, self._suffix):
                continue
            name = stream.codec_context.codec.canonical_name
            others = [s for s in (".mkv", ".mov") if all(sound_fits(sound, s) for sound in sounds)]
            if others:
                hint = f"into {self._suffix}; use -o {self._sink.with_suffix(others[0]).name}"
            else:
                hint = "into any container; convert the input's sound to AAC first"
            raise MediaError(f"{self._sink}: {name} sound cannot be copied {hint}")

    @contextmanager
    def open(self, partial: Path) -> Iterator[None]:
        """Write to ``partial`` inside the block; finished at its end, abandoned if it raises."""
        with self._as_media_error():
            self._container = av.open(
                str(partial.absolute()),
                "w",
                format=MUXERS[self._suffix],
                container_options=self._mux_options(),
            )
        try:
            with ExitStack() as stack:
                if self._clip.sound:
                    source = stack.enter_context(open_container(Path(self._clip.container.name)))
                    self._packets = _sound_packets(source)
                    self._next = next(self._packets, None)
                yield
                with self._as_media_error():
                    self._finish()
        finally:
            # After a failure the file is deleted: only its handle matters (Windows), not its trailer.
            with suppress(av.FFmpegError):
                self._container.close()

    def _mux_options(self) -> dict[str, str]:
        """For MP4: index in front, and clocks that hold the source's times (else starts are cut to ms)."""
        if MUXERS[self._suffix] not in ("mp4", "mov"):
            return {}
        options = {"movflags": "+faststart"}
        ticks = self._clip.time_base.denominator
        if self._clip.time_base.numerator == 1:
            options["video_track_timescale"] = str(ticks)
        # In MP4 and MOV, sound is counted in samples.
        common = lcm(ticks, *(stream.codec_context.sample_rate or 1 for stream in self._clip.sound))
        options["movie_timescale"] = str(common if common < 1 << 31 else ticks)
        return options

    def write_frame(self, source: DecodedFrame, styled: Frame) -> None:
        """Encode ``styled`` (uint8 [H', W', 3]) at the time of the frame it was made from."""
        if styled.ndim != 3 or styled.shape[2] != 3 or styled.dtype != np.uint8:
            raise ValueError(f"stylize must return uint8 [H, W, 3], got {styled.dtype} {styled.shape}")
        with self._as_media_error():
            if self._video is None:
                self._video = self._start(source.colour, even_size(styled))
            tick = self._clip.time_base
            self._copy_sound(float(source.pts * tick))
            self._end_s = float((source.pts + (source.duration or self._clip.frame_step)) * tick)
            for packet in self._video.encode(styled, source.pts, source.duration):
                self._mux(packet)
        self.frames += 1

    def _start(self, colour: Colour, size: tuple[int, int]) -> VideoTrack:
        """Write the file's header."""
        assert self._container is not None
        self.size, clip = (size[1], size[0]), self._clip
        tags = clip.container.metadata
        self._container.metadata.update({k: v for k, v in tags.items() if k not in _OLD_TAGS})
        aspect = clip.pixel_aspect
        track = VideoTrack(self._container, self._encoder, size, clip.rate, clip.time_base, colour, aspect)
        self._sound = {stream.index: _SoundTrack(self._container, stream) for stream in clip.sound}
        for stream in (clip.video, *clip.sound):
            new = track.stream if stream is clip.video else self._sound[stream.index].stream
            new.metadata.update({k: v for k, v in stream.metadata.items() if k in _STREAM_TAGS})
        self._container.start_encoding()
        return track

    def _copy_sound(self, until_s: float | None) -> None:
        """Copy the sound packets before ``until_s``; None: all remaining ones."""
        while self._next is not None and (until_s is None or _due_s(self._next) < until_s):
            packet, self._next = self._next, next(self._packets, None)
            if self._sound[packet.stream_index].accept(packet):
                self._mux(packet)
            else:
                self._dropped_sound += 1

    def _mux(self, packet: Packet[AudioStream] | Packet[VideoStream]) -> None:
        """Pass one packet to the container, which may only now reject an earlier, damaged sound packet."""
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
            # Stopped early, the sound ends with the frames.
            whole = self._clip.ended and self.frames == self._clip.decoded
            self._copy_sound(None if whole else self._end_s)
            for packet in self._video.flush():
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
        """One line each on what differs from the source."""
        notes = []
        if self._dropped_sound:
            notes.append(f"{self._dropped_sound} damaged sound packets were dropped")
        gaps_s = max((track.gaps_s for track in self._sound.values()), default=0.0)
        if gaps_s and MUXERS[self._suffix] in ("mp4", "mov"):
            other = self._sink.with_suffix(".mkv").name
            notes.append(
                f"its PCM sound has gaps ({gaps_s:.2f} s), which {self._suffix} cannot store: what follows"
                f" plays too early; use -o {other}"
            )
        resized = self._video.resized if self._video is not None else 0
        if resized:
            notes.append(f"the size changed within the clip; {resized} frames were resized to its first size")
        return notes


def sound_fits(stream: AudioStream, suffix: str) -> bool:
    """True if the packets of ``stream`` can be stored in a clip with this suffix as they are."""
    with av.open(io.BytesIO(), "w", format=MUXERS[suffix]) as trial:
        try:
            _SoundTrack(trial, stream)
            # Some are accepted at first and refused when the header is written.
            trial.start_encoding()
        except (ValueError, av.FFmpegError):
            return False
    return True


class _SoundTrack:
    """A sound stream of ``container`` for the packets of ``source``; raises what PyAV raises."""

    def __init__(self, container: OutputContainer, source: AudioStream) -> None:
        self.stream = container.add_stream_from_template(source)
        context = self.stream.codec_context
        # Matroska gives PCM a number of channels and no names, without which MP4 does not take it.
        layout = _LAYOUTS.get(context.layout.name)
        if layout is not None:
            context.layout = layout
        self._is_pcm = context.name.startswith("pcm_")
        self._dts: int | None = None  # of the last packet
        self._duration = 1
        self.gaps_s = 0.0  # silent stretches in PCM, which MP4 and MOV cannot hold

    def accept(self, packet: Packet[AudioStream]) -> bool:
        """Make ``packet`` one of this stream, its times completed; False if a container cannot take it."""
        dts = packet.dts
        if dts is None:  # Ogg does not say when its last packet is due.
            dts = packet.pts = packet.dts = 0 if self._dts is None else self._dts + self._duration
        # Damaged files repeat times; a container takes only rising ones.
        if self._dts is not None and dts <= self._dts:
            return False
        gap = 0 if self._dts is None else dts - self._dts - self._duration
        if self._is_pcm and gap > self._duration // 2:  # Smaller ones are the file's rounding.
            self.gaps_s += float(gap * packet.time_base)
        # Some files do not say how long a packet lasts, or say less than nothing for one that is cut at the
        # end of the sound; MP4 hides a last packet of no duration.
        if not 0 < (packet.duration or 0) < _LONGEST_PACKET:
            packet.duration = self._duration if self._dts is None else dts - self._dts
        self._dts, self._duration = dts, packet.duration or 1
        packet.stream = self.stream
        return True


def _sound_packets(container: InputContainer) -> Iterator[Packet[AudioStream]]:
    try:
        for packet in container.demux(sound_streams(container)):
            if packet.size:
                yield cast("Packet[AudioStream]", packet)
    except av.FFmpegError:  # Broken off here; reading the frames notices it, and says so.
        return


def _due_s(packet: Packet[AudioStream]) -> float:
    return 0.0 if packet.dts is None else float(packet.dts * packet.time_base)
