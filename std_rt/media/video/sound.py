"""The sound of clips: copied packet by packet, or converted where the container cannot hold it.

track = open_track(container, stream, plan_sound([stream], sink, "auto")[0])
for packet in packets:
    container.mux(track.write(packet))
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream

from std_rt.core.errors import MediaError, UsageError
from std_rt.media.video.encoder import MUXERS

__all__ = ["SOUND_MODES", "Track", "conversion_note", "open_track", "plan_sound", "sound_fits"]

SOUND_MODES = ("auto", "copy", "convert", "drop")
# What a container takes and common players do not, by the start of the codec's name.
_EXOTIC = {"mp4": ("pcm_", "vorbis")}
_ENCODERS = {"webm": "libopus"}
_ENCODER = "aac"
_RATES = {"libopus": frozenset({48_000}), "aac": frozenset({48_000, 44_100, 32_000, 24_000, 22_050, 16_000})}
_BITS_PER_CHANNEL = 96_000  # a second
_GAP_S = 0.05  # times that are off by less are the container's rounding
# FFmpeg's name for an unknown layout -> how players interpret it.
_LAYOUTS = {"1 channels": "mono", "2 channels": "stereo", "6 channels": "5.1", "8 channels": "7.1"}
_CONVERTED = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # by channels; others are mixed down to stereo
_LONGEST_PACKET = 1 << 31  # ticks; FFmpeg returns negative durations as unsigned 32-bit numbers


def plan_sound(sounds: Sequence[AudioStream], sink: Path, mode: str) -> list[str | None]:
    """How each stream gets into ``sink``: None to copy it, or the encoder that converts it.

    mode: copy; convert; auto, which copies what fits ``sink`` and its usual players, and converts the rest;
    or drop (an empty plan). Raises MediaError for a sound that cannot be copied (copy), before any work.
    """
    suffix = sink.suffix.lower()
    encoder = _ENCODERS.get(MUXERS[suffix], _ENCODER)
    if mode not in SOUND_MODES:
        raise UsageError(f"the sound mode must be one of {', '.join(SOUND_MODES)}, got {mode!r}")
    if mode == "drop":
        return []
    if mode == "convert":
        return [encoder] * len(sounds)
    if mode == "auto":
        return [None if sound_fits(sound, suffix, usual=True) else encoder for sound in sounds]
    for sound in sounds:
        if not sound_fits(sound, suffix):
            others = [s for s in (".mkv", ".mov") if all(sound_fits(one, s) for one in sounds)]
            where = (
                f"into {suffix}; use -o {sink.with_suffix(others[0]).name} or" if others else "at all; use"
            )
            raise MediaError(f"{sink}: {_name(sound)} sound cannot be copied {where} --sound convert")
    return [None] * len(sounds)


def conversion_note(stream: AudioStream, encoder: str, sink: Path) -> str:
    """One line on a sound that is converted, and how it is kept."""
    context = stream.codec_context
    mixed = "" if context.channels in _CONVERTED else f" ({context.channels} channels mixed down to stereo)"
    others = [s for s in (".mkv", ".mov") if sound_fits(stream, s)]
    if sound_fits(stream, sink.suffix.lower()):
        keep = "; --sound copy keeps it as it is"
    else:
        keep = f"; -o {sink.with_suffix(others[0]).name} keeps it as it is" if others else ""
    target = "AAC" if encoder == _ENCODER else "Opus"
    return f"its {_name(stream)} sound is converted to {target}{mixed}{keep}"


def sound_fits(stream: AudioStream, suffix: str, *, usual: bool = False) -> bool:
    """True if the packets of ``stream`` can be stored in a clip with this suffix as they are.

    usual: and the container's usual players can play them.
    """
    if usual and _name(stream).startswith(_EXOTIC.get(MUXERS[suffix], ("?",))):
        return False
    with av.open(io.BytesIO(), "w", format=MUXERS[suffix]) as trial:
        try:
            _CopiedTrack(trial, stream)
            # Some are accepted at first and refused when the header is written.
            trial.start_encoding()
        except (ValueError, av.FFmpegError):
            return False
    return True


def _name(stream: AudioStream) -> str:
    return stream.codec_context.codec.canonical_name


class Track(ABC):
    """A stream of a container, for the packets of a source's stream. Methods raise what PyAV raises.

    lost: packets that could not be used so far; gaps_s: seconds of silence that the container cannot hold.
    """

    stream: Stream
    lost: int = 0
    gaps_s: float = 0.0

    @abstractmethod
    def write(self, packet: Packet[Any]) -> list[Packet[Any]]:
        """The next packet of the source; returns those that are ready for the container."""

    def flush(self) -> list[Packet[Any]]:
        """What is left at the end."""
        return []


def open_track(container: OutputContainer, source: AudioStream, encoder: str | None) -> Track:
    """A stream of ``container`` for the packets of ``source``: copied, or converted by ``encoder``."""
    return _CopiedTrack(container, source) if encoder is None else _ConvertedTrack(container, source, encoder)


class _CopiedTrack(Track):
    """Packets as they are; their times completed."""

    def __init__(self, container: OutputContainer, source: AudioStream) -> None:
        self.stream = container.add_stream_from_template(source)
        context = self.stream.codec_context
        # Matroska gives PCM a number of channels and no names, without which MP4 does not take it.
        layout = _LAYOUTS.get(context.layout.name)
        if layout is not None:
            context.layout = layout
        self._is_pcm = context.name.startswith("pcm_")
        self._rate = context.sample_rate or 48_000
        self._dts: int | None = None  # of the last packet, in the source's ticks
        self._duration = 1
        self._in_tick = 0  # packets before this one with its time

    def write(self, packet: Packet[Any]) -> list[Packet[Any]]:
        """The packet, or nothing if it lies before its predecessor, as in damaged files."""
        dts = packet.dts
        if dts is None:  # Ogg does not say when its last packet is due.
            dts = packet.pts = packet.dts = 0 if self._dts is None else self._dts + self._duration
        if self._dts is not None and dts < self._dts:
            self.lost += 1
            return []
        self._in_tick = self._in_tick + 1 if dts == self._dts else 0
        gap = 0 if self._dts is None else dts - self._dts - self._duration
        if self._is_pcm and gap > max(1, self._duration // 2):  # Smaller ones are the file's rounding.
            self.gaps_s += float(gap * packet.time_base)
        # Some files do not say how long a packet lasts, or say less than nothing for one that is cut at the
        # end of the sound; MP4 hides a last packet of no duration.
        if not 0 < (packet.duration or 0) < _LONGEST_PACKET:
            packet.duration = self._duration if self._dts is None else dts - self._dts
        self._dts, self._duration = dts, packet.duration or 1
        packet.stream = self.stream
        if self._in_tick:
            self._move_on(packet)
        return [packet]

    def _move_on(self, packet: Packet[Any]) -> None:
        """Give a packet its own time where several share one tick (TrueHD: 1200 a second, in milliseconds).

        A sample later than the one before, which rounds back to the same tick where ticks may be shared.
        """
        tick, fine = packet.time_base, Fraction(1, self._rate)
        at = round((packet.dts or 0) * tick / fine) + min(self._in_tick, int(tick / fine / 2))
        packet.pts, packet.dts, packet.time_base = at, at, fine
        packet.duration = max(1, round((packet.duration or 0) * tick / fine))


class _ConvertedTrack(Track):
    """Decoded and encoded again, continuous to the sample; a gap stays a gap."""

    def __init__(self, container: OutputContainer, source: AudioStream, encoder: str) -> None:
        found = source.codec_context
        rate = found.sample_rate if found.sample_rate in _RATES[encoder] else 48_000
        layout = _CONVERTED.get(found.channels, "stereo")
        self.stream = self._encoder = cast(AudioStream, container.add_stream(encoder, rate=rate))
        context = self._encoder.codec_context
        context.layout = layout
        context.bit_rate = _BITS_PER_CHANNEL * context.layout.nb_channels
        self._rate, self._context = rate, context
        self._resampler: AudioResampler | None = None
        self._found: tuple[str, str, int] | None = None  # format, layout and rate that the resampler takes
        self._next: int | None = None  # due sample
        self._source: AudioStream | None = None  # of the packets, which decodes them

    def write(self, packet: Packet[Any]) -> list[Packet[Any]]:
        """Encoded packets; one that cannot be decoded counts as lost."""
        self._source = cast(AudioStream, packet.stream)
        try:
            frames = self._source.decode(packet)
        except av.FFmpegError:
            self.lost += 1
            return []
        return [ready for frame in frames for ready in self._encode(frame)]

    def _encode(self, frame: AudioFrame) -> Iterator[Packet[Any]]:
        found = frame.format.name, frame.layout.name, frame.sample_rate
        if found != self._found:
            yield from self._drain()
            self._resampler = AudioResampler(self._context.format, self._context.layout, self._rate)
            self._found = found
        assert self._resampler is not None
        for part in self._resampler.resample(frame):
            yield from self._encoder.encode(self._timed(part))

    def _timed(self, frame: AudioFrame) -> AudioFrame:
        """The frame directly behind the last one, unless its own time leaves a gap."""
        due = self._next
        if frame.pts is not None and frame.time_base is not None:
            at = round(frame.pts * frame.time_base * self._rate)
            due = at if due is None or at - due > _GAP_S * self._rate else due
        due = due or 0
        frame.pts, frame.time_base = due, Fraction(1, self._rate)
        self._next = due + frame.samples
        return frame

    def _drain(self) -> Iterator[Packet[Any]]:
        """What the resampler still holds."""
        for part in self._resampler.resample(None) if self._resampler is not None else ():
            yield from self._encoder.encode(self._timed(part))

    def flush(self) -> list[Packet[Any]]:
        """What decoder, resampler and encoder still hold."""
        rest: list[AudioFrame] = []
        with suppress(av.FFmpegError):
            rest = self._source.decode(None) if self._source is not None else []
        left = [ready for frame in rest for ready in self._encode(frame)]
        return [*left, *self._drain(), *self._encoder.encode(None)]
