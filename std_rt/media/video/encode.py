"""Writing clips: stylized frames at their source's times, sound packets untouched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from math import lcm
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from std_rt.core.errors import MediaError
from std_rt.core.files import reason
from std_rt.media.video.clip import Clip, TimedFrame, open_clip
from std_rt.media.video.colour import Colour
from std_rt.media.video.sound import SoundReader, SoundTrack, sound_fits
from std_rt.media.video.track import CLIP_SUFFIXES, MUXERS, Encoder, VideoTrack, even_size

__all__ = ["CLIP_SUFFIXES", "ClipWriter", "sound_fits"]

# Brands describe the old container; FFmpeg signs itself as the encoder.
_OLD_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})
# What containers say to packets of damaged sound; frames encoded here never cause it.
_BAD_PACKET = (av.ArgumentError, av.InvalidDataError)

Frame = NDArray[np.uint8]


class ClipWriter:
    """One output clip. The first frame sets its size and colour tags; sound is copied along with the frames.

    Raises MediaError at once for a suffix or encoder that is not known, or sound the container cannot hold.
    """

    def __init__(self, sink: Path, clip: Clip, codec: str | None, crf: int) -> None:
        self._sink, self._clip, self._suffix = sink, clip, sink.suffix.lower()
        self._encoder = Encoder.for_file(sink, codec, crf)
        self._check_sound()
        self.frames = 0
        self.size = (0, 0)  # (width, height) px
        self._container: OutputContainer | None = None
        self._video: VideoTrack | None = None
        self._sound: dict[int, SoundTrack] = {}  # by the input's stream index
        self._reader: SoundReader | None = None
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
                other = self._sink.with_suffix(others[0]).name
                way_out = f"cannot be copied into {self._suffix}; use -o {other}"
            else:
                way_out = "cannot be copied into any clip as it is; convert the input's sound to AAC first"
            raise MediaError(f"{self._sink}: {name} sound {way_out}")

    @contextmanager
    def open(self, partial: Path) -> Iterator[None]:
        """Write to ``partial`` inside the block; finished at its end, given up if it raises."""
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
                    source = Path(self._clip.container.name)
                    self._reader = SoundReader(stack.enter_context(open_clip(source)))
                yield
                with self._as_media_error():
                    self._finish()
        finally:
            # After a failure the file goes away: only its handle matters (Windows), not its trailer.
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

    def write_frame(self, source: TimedFrame, styled: Frame) -> None:
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
        """Write the head of the file."""
        assert self._container is not None
        self.size, clip = (size[1], size[0]), self._clip
        tags = clip.container.metadata
        self._container.metadata.update({k: v for k, v in tags.items() if k not in _OLD_TAGS})
        aspect = clip.pixel_aspect
        track = VideoTrack(self._container, self._encoder, size, clip.rate, clip.time_base, colour, aspect)
        track.stream.metadata.update(_kept_tags(clip.video.metadata))
        for stream in clip.sound:
            copy = self._sound[stream.index] = SoundTrack(self._container, stream)
            copy.stream.metadata.update(_kept_tags(stream.metadata))
        self._container.start_encoding()
        return track

    def _copy_sound(self, until_s: float | None) -> None:
        """Copy the sound packets that are due before ``until_s`` as they are; None: all that are left."""
        for packet in self._reader.until(until_s) if self._reader is not None else ():
            if self._sound[packet.stream_index].take(packet):
                self._mux(packet)
            else:
                self._dropped_sound += 1

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
        """What went other than plain into the output."""
        notes = []
        if self._dropped_sound:
            notes.append(f"{self._dropped_sound} damaged sound packets were left out")
        gaps_s = max((track.gaps_s for track in self._sound.values()), default=0.0)
        if gaps_s and MUXERS[self._suffix] in ("mp4", "mov"):
            other = self._sink.with_suffix(".mkv").name
            notes.append(
                f"its PCM sound has gaps ({gaps_s:.2f} s), which {self._suffix} cannot hold: what follows"
                f" plays too early; use -o {other}"
            )
        resized = self._video.resized if self._video is not None else 0
        if resized:
            notes.append(f"the size changed within the clip; {resized} frames were resized to its first")
        return notes


def _kept_tags(tags: dict[str, str]) -> dict[str, str]:
    """What stays true of a stream: statistics of the old file do not."""
    return {key: value for key, value in tags.items() if key in ("language", "title")}
