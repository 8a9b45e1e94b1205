"""The clip writer: stylized frames at their source's times, and all else that the file can hold.

Sound is copied packet by packet, or converted where the file cannot hold it; subtitles, chapters, fonts,
timecode and tags are kept. What is copied is read separately from the frames: in a single pass, one would
have to wait in memory for the other, all of the sound in a clip whose pictures begin late or end early.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.subtitles.stream import SubtitleStream

from std_rt.core.arrays import Frame
from std_rt.core.errors import MediaError
from std_rt.core.files import reason
from std_rt.media.fit import resize
from std_rt.media.video.base import Clip, DecodedFrame
from std_rt.media.video.clip import open_container
from std_rt.media.video.clock import packets_of
from std_rt.media.video.colour import Colour
from std_rt.media.video.encoder import MUXERS, Encoder, VideoTrack, even_size
from std_rt.media.video.sound import Track, conversion_note, open_track, plan_sound

__all__ = ["ClipWriter"]

# Brands describe the old container; FFmpeg names itself as the encoder.
_OLD_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})
# Tags that stay true; statistics of the old file do not.
_STREAM_TAGS = frozenset({"language", "title", "handler_name"})
_WITH_COVERS = ("mp4", "matroska")
# Raised by containers for packets of damaged sound; never for frames encoded here.
_BAD_PACKET = (av.ArgumentError, av.InvalidDataError)


class ClipWriter:
    """One output clip. The first frame sets its size and colour tags; the rest is copied along with frames.

    sound: how (`plan_sound`). Raises MediaError at once for an unknown suffix or encoder, or sound that
    cannot be kept as asked.
    """

    def __init__(self, sink: Path, clip: Clip, codec: str | None, crf: int, sound: str = "auto") -> None:
        self._sink, self._clip, self._suffix = sink, clip, sink.suffix.lower()
        self._has_alpha = clip.has_alpha
        self._encoder = Encoder.for_file(sink, codec, crf, alpha=self._has_alpha)
        clip.keeps_alpha = self._encoder.has_alpha
        self._plan: list[tuple[AudioStream, str | None]] = list(
            zip(clip.sound, plan_sound(clip.sound, sink, sound), strict=False)
        )
        self._subtitles = [stream for stream in clip.subtitles if _takes(self._suffix, stream)]
        self._tells_conversion = sound == "auto"
        self._start_s = Fraction(0)  # of the source's clock
        self.frames = 0
        self.size = (0, 0)  # (width, height) px
        self._container: OutputContainer | None = None
        self._video: VideoTrack | None = None
        self._tracks: dict[int, Track] = {}  # sound and subtitles, by the input's stream index
        self._packets: Iterator[Packet[Any]] = iter(())  # for these
        self._next: Packet[Any] | None = None  # the first that was not due yet
        self._end_s = 0.0  # of the last frame
        self._refused = 0  # packets of damaged sound

    def losses(self) -> list[str]:
        """One line each on what will not be in the file as it was in the source."""
        losses, mkv = self._clip.losses(), self._sink.with_suffix(".mkv").name
        if self._tells_conversion:
            lines = [conversion_note(stream, name, self._sink) for stream, name in self._plan if name]
            losses += dict.fromkeys(lines)
        left_out = [stream for stream in self._clip.subtitles if stream not in self._subtitles]
        if left_out:
            kinds = ", ".join(sorted({stream.codec_context.codec.canonical_name for stream in left_out}))
            others = [s for s in (".mkv", ".mp4") if all(_takes(s, stream) for stream in left_out)]
            keep = f"; -o {self._sink.with_suffix(others[0]).name} keeps them" if others else ""
            losses.append(f"its subtitles ({kinds}) are not copied{keep}")
        names = [stream.name or "unnamed" for stream in self._clip.attachments]
        if names and not self._keeps_attachments:
            losses.append(f"its attachments ({', '.join(names)}) are not copied; -o {mkv} keeps them")
        if self._clip.covers and MUXERS[self._suffix] not in _WITH_COVERS:
            losses.append(f"its cover picture is not copied; -o {mkv} keeps it")
        if self._has_alpha and not self._encoder.has_alpha:
            better = " or ".join(self._sink.with_suffix(s).name for s in (".webm", ".mov"))
            losses.append(f"transparent parts are laid over white; -o {better} keeps them transparent")
        timecode = self._clip.tags.timecode
        if timecode and not self._keeps_timecode:
            losses.append(f"its timecode ({timecode}) does not fit {self._suffix} and is not copied")
        return losses

    @property
    def _keeps_attachments(self) -> bool:
        return MUXERS[self._suffix] == "matroska"

    @property
    def _keeps_timecode(self) -> bool:
        """Tried: MP4 and MOV count frames in it, and not at every rate."""
        clip, colour = self._clip, Colour(1, False, 1, 1)
        with _trial(self._suffix) as trial:
            track = VideoTrack(trial, self._encoder, (64, 64), clip.rate, clip.time_base, colour)
            track.stream.metadata["timecode"] = clip.tags.timecode or ""
            trial.start_encoding()
            return True
        return False

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
                copied = [*(stream for stream, _ in self._plan), *self._subtitles]
                if copied:
                    source = stack.enter_context(open_container(self._clip.path))
                    self._packets = _copied_packets(source, copied)
                    self._next = next(self._packets, None)
                yield
                with self._as_media_error():
                    self._finish()
        finally:
            # After a failure the file is deleted: only its handle matters (Windows), not its trailer.
            with suppress(av.FFmpegError):
                self._container.close()

    def _mux_options(self) -> dict[str, str]:
        """For MP4: index in front, and clocks that hold the source's times (else starts are cut to ms).

        For Matroska: no subtitles by default that the source does not show by default.
        """
        if MUXERS[self._suffix] not in ("mp4", "mov"):
            return {"default_mode": "infer_no_subs"}
        options = {"movflags": "+faststart"}
        ticks = self._clip.time_base.denominator
        if self._clip.time_base.numerator == 1:
            options["video_track_timescale"] = str(ticks)
        # In MP4 and MOV, sound is counted in samples.
        common = lcm(ticks, *(stream.codec_context.sample_rate or 1 for stream, _ in self._plan))
        options["movie_timescale"] = str(common if common < 1 << 31 else ticks)
        return options

    def write_frame(self, source: DecodedFrame, styled: Frame) -> None:
        """Encode ``styled`` (uint8 [H', W', 3]) at the time of the frame it was made from."""
        if styled.ndim != 3 or styled.shape[2] != 3 or styled.dtype != np.uint8:
            raise ValueError(f"stylize must return uint8 [H, W, 3], got {styled.dtype} {styled.shape}")
        with self._as_media_error():
            if self._video is None:
                self._start_s = self._clip.start_s([stream for stream, _ in self._plan], source)
                self._video = self._start(source.colour, even_size(styled))
            tick = self._clip.time_base
            pts = source.pts - round(self._start_s / tick)
            self._copy(float(pts * tick))
            self._end_s = float((pts + (source.duration or self._clip.frame_step)) * tick)
            pixels = _as_rgba(styled, source.alpha) if self._encoder.has_alpha else styled
            for packet in self._video.encode(pixels, pts, source.duration):
                self._mux(packet)
        self.frames += 1

    def _start(self, colour: Colour, size: tuple[int, int]) -> VideoTrack:
        """Write the file's header."""
        assert self._container is not None
        self.size, clip = (size[1], size[0]), self._clip
        tags = clip.tags
        self._container.metadata.update(
            {k: v for k, v in tags.container.items() if k.lower() not in _OLD_TAGS}
        )
        self._container.set_chapters(self._chapters())
        aspect = clip.pixel_aspect
        track = VideoTrack(self._container, self._encoder, size, clip.rate, clip.time_base, colour, aspect)
        track.stream.metadata.update(_lasting(tags.video))
        _dispose(track.stream, tags.disposition)
        if tags.timecode and self._keeps_timecode:
            track.stream.metadata["timecode"] = tags.timecode
        for sound, encoder in self._plan:
            self._tracks[sound.index] = open_track(self._container, sound, encoder)
        for subtitles in self._subtitles:
            self._tracks[subtitles.index] = _SubtitleTrack(self._container, subtitles)
        for stream in (*(sound for sound, _ in self._plan), *self._subtitles):
            new = self._tracks[stream.index].stream
            new.metadata.update(_lasting(stream.metadata))
            _dispose(new, stream.disposition)
        for attachment in clip.attachments if self._keeps_attachments else ():
            self._container.add_stream_from_template(attachment)
        covers = self._add_covers(self._container)
        self._container.start_encoding()
        self._container.mux(covers)
        return track

    def _add_covers(self, container: OutputContainer) -> list[Packet[Any]]:
        """Streams or attachments for cover pictures; returns the packets to be written behind the header."""
        packets, muxer = [], MUXERS[self._suffix]
        for cover, data in self._clip.covers if muxer in _WITH_COVERS else ():
            kind = {"mjpeg": "jpeg"}.get(cover.codec_context.name, cover.codec_context.name)
            if muxer == "matroska":
                name = cover.metadata.get("filename", f"cover.{kind.replace('jpeg', 'jpg')}")
                container.add_attachment(name, cover.metadata.get("mimetype", f"image/{kind}"), data)
                continue
            packet: Packet[Any] = Packet(data)
            packet.stream = container.add_stream_from_template(cover, opaque=True)
            _dispose(packet.stream, cover.disposition)
            packet.pts = packet.dts = 0
            packet.time_base = Fraction(1, 1000)
            packets.append(packet)
        return packets

    def _chapters(self) -> list[Any]:
        """Those of the source, from its start on."""
        chapters = []
        for number, chapter in enumerate(self._clip.chapters, 1):
            start = round(self._start_s / (chapter["time_base"] or Fraction(1)))
            times = {name: max(0, chapter[name] - start) for name in ("start", "end")}
            chapters.append({**chapter, **times, "id": number})
        return chapters

    def _copy(self, until_s: float | None) -> None:
        """Copy the packets before ``until_s``, and subtitles as they come; None: all remaining ones."""
        while self._next is not None:
            packet = self._next
            track = self._tracks[packet.stream_index]
            if (
                until_s is not None
                and self._due_s(packet) >= until_s
                and not isinstance(track, _SubtitleTrack)
            ):
                return
            self._next = next(self._packets, None)
            start = round(self._start_s / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts - start
            packet.dts = None if packet.dts is None else packet.dts - start
            for ready in track.write(packet):
                self._mux(ready)

    def _due_s(self, packet: Packet[Any]) -> float:
        return 0.0 if packet.dts is None else float(packet.dts * packet.time_base - self._start_s)

    def _mux(self, packet: Packet[Any]) -> None:
        """Pass one packet to the container, which may only now reject an earlier, damaged sound packet."""
        assert self._container is not None
        try:
            self._container.mux(packet)
        except _BAD_PACKET:
            if not self._tracks:
                raise
            self._refused += 1

    def _finish(self) -> None:
        assert self._container is not None
        if self._video is not None:
            # Stopped early, the sound ends with the frames.
            whole = self._clip.ended and self.frames == self._clip.decoded
            self._copy(None if whole else self._end_s)
            for track in self._tracks.values():
                for packet in track.flush():
                    self._mux(packet)
            for last in self._video.flush():
                self._mux(last)
        self._container.close()

    @contextmanager
    def _as_media_error(self) -> Iterator[None]:
        try:
            yield
        except (av.FFmpegError, ValueError) as error:
            if self._tracks and isinstance(error, _BAD_PACKET):
                raise MediaError(
                    f"{self._clip.path}: its sound is damaged and cannot be copied; add --sound drop"
                ) from error
            raise MediaError(f"{self._sink} cannot be written: {reason(error)}") from error

    def notes(self) -> list[str]:
        """After writing: one line each on what differs from the source, beyond `losses`."""
        notes = []
        dropped = self._refused + sum(track.lost for track in self._tracks.values())
        if dropped:
            notes.append(f"{dropped} damaged sound packets were dropped")
        gaps_s = max((track.gaps_s for track in self._tracks.values()), default=0.0)
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


class _SubtitleTrack(Track):
    """Packets as they are."""

    def __init__(self, container: OutputContainer, source: SubtitleStream) -> None:
        self.stream = container.add_stream_from_template(source)

    def write(self, packet: Packet[Any]) -> list[Packet[Any]]:
        """The packet, if it says when it is due."""
        packet.stream = self.stream
        return [packet] if packet.dts is not None else []


@contextmanager
def _trial(suffix: str) -> Iterator[OutputContainer]:
    """A container like that of a file, in memory; what it refuses ends the block."""
    with av.open(io.BytesIO(), "w", format=MUXERS[suffix]) as trial, suppress(ValueError, av.FFmpegError):
        yield trial


def _takes(suffix: str, stream: SubtitleStream) -> bool:
    with _trial(suffix) as trial:
        _SubtitleTrack(trial, stream)
        trial.start_encoding()
        return True
    return False


def _dispose(stream: Stream, disposition: Disposition) -> None:
    stream.disposition = cast(Disposition, disposition.value)  # PyAV 17 takes the number only.


def _lasting(tags: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in tags.items() if k.lower() in _STREAM_TAGS}


def _as_rgba(styled: Frame, alpha: Frame | None) -> Frame:
    """uint8 [H, W, 4]: ``styled`` with the alpha of the frame it was made from, at its size."""
    if alpha is None:
        alpha = np.full(styled.shape[:2], 255, np.uint8)
    return np.dstack([styled, resize(alpha, (styled.shape[0], styled.shape[1]))])


def _copied_packets(container: InputContainer, streams: Sequence[Stream]) -> Iterator[Packet[Any]]:
    with suppress(av.FFmpegError):  # Broken off; reading the frames notices it, and says so.
        yield from packets_of(container, [container.streams[stream.index] for stream in streams])
