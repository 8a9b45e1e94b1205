"""Sound of clips: copied packet by packet into another container, never decoded.

It is read apart from the frames. In one reading either would have to wait in memory for the other: all of
the sound, in a clip whose pictures begin late or end early.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from std_rt.media.video.track import MUXERS

__all__ = ["SoundReader", "SoundTrack", "sound_fits", "sound_streams"]

# What FFmpeg calls a layout that is not known -> what players take it for.
_LAYOUTS = {"1 channels": "mono", "2 channels": "stereo", "6 channels": "5.1", "8 channels": "7.1"}
_LONGEST_PACKET = 1 << 31  # ticks; FFmpeg hands out negative durations as unsigned 32-bit numbers


def sound_streams(container: InputContainer) -> list[AudioStream]:
    """Audio streams that can be copied."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


def sound_fits(stream: AudioStream, suffix: str) -> bool:
    """True if the packets of ``stream`` can be stored in a clip with this suffix as they are."""
    with av.open(io.BytesIO(), "w", format=MUXERS[suffix]) as probe:
        try:
            SoundTrack(probe, stream)
            # Some are known to a container and refused all the same, when its head is written.
            probe.start_encoding()
        except (ValueError, av.FFmpegError):
            return False
    return True


class SoundTrack:
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

    def take(self, packet: Packet[AudioStream]) -> bool:
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
        # Some files do not say how long a packet lasts, or say less than nothing of one that is cut to the
        # end of the sound; MP4 hides a last packet that does not last.
        if not 0 < (packet.duration or 0) < _LONGEST_PACKET:
            packet.duration = self._duration if self._dts is None else dts - self._dts
        self._dts, self._duration = dts, packet.duration or 1
        packet.stream = self.stream
        return True


class SoundReader:
    """The sound packets of an open clip, in file order, as they fall due."""

    def __init__(self, container: InputContainer) -> None:
        self._packets = _packets(container)
        self._next = next(self._packets, None)

    def until(self, at_s: float | None) -> Iterator[Packet[AudioStream]]:
        """Those that are due before ``at_s`` seconds and were not given yet; None: all that are left."""
        while self._next is not None and (at_s is None or _due_s(self._next) < at_s):
            packet, self._next = self._next, next(self._packets, None)
            yield packet


def _packets(container: InputContainer) -> Iterator[Packet[AudioStream]]:
    try:
        for packet in container.demux(sound_streams(container)):
            if packet.size:
                yield cast("Packet[AudioStream]", packet)
    except av.FFmpegError:  # Broken off here; reading the frames notices it, and says so.
        return


def _due_s(packet: Packet[AudioStream]) -> float:
    return 0.0 if packet.dts is None else float(packet.dts * packet.time_base)
