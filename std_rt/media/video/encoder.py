"""The video encoder of a clip: its choice, its options, and frames of one size into its stream."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags, ThreadType
from av.container import OutputContainer
from av.packet import Packet
from av.video.frame import PictureType
from av.video.stream import VideoStream

from std_rt.core.arrays import Frame
from std_rt.core.errors import MediaError
from std_rt.core.files import reason
from std_rt.media.fit import resize
from std_rt.media.video.colour import Colour, tag_stream, to_yuv

__all__ = ["CLIP_SUFFIXES", "MUXERS", "Encoder", "VideoTrack", "even_size"]

MUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
CLIP_SUFFIXES = frozenset(MUXERS)
_TRIAL_PX = 256
# Encoders that keep transparency, and the format in which they take it; the one for each suffix.
_WITH_ALPHA = {"libvpx-vp9": "yuva420p", "prores_ks": "yuva444p10le"}
_ALPHA_ENCODERS = {".webm": "libvpx-vp9", ".mkv": "libvpx-vp9", ".mov": "prores_ks"}


@dataclass(frozen=True)
class Encoder:
    """An encoder of FFmpeg with its options; threads: 0 lets it choose."""

    name: str
    options: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    pix_fmt: str = "yuv420p"

    @staticmethod
    def for_file(
        sink: Path, codec: str | None, crf: int, *, live: bool = False, alpha: bool = False
    ) -> Encoder:
        """The encoder for ``sink``: ``codec``, or libx264, or libvpx-vp9 for .webm.

        live: one that holds no frame back and uses one thread. alpha: one that keeps transparency if there is
        one (VP9 for .webm and .mkv, ProRes 4444 for .mov): see `has_alpha`. Raises MediaError for an unknown
        suffix or encoder, and for an encoder that fails here (a trial frame).
        """
        suffix = sink.suffix.lower()
        if suffix not in MUXERS:
            found, known = suffix or "a name without suffix", " ".join(sorted(MUXERS))
            raise MediaError(f"{sink}: cannot write a clip as {found!r}; use one of {known}")
        usual = "libvpx-vp9" if suffix == ".webm" else "libx264"
        name = codec or (_ALPHA_ENCODERS.get(suffix, usual) if alpha else usual)
        try:
            av.Codec(name, "w")
        except ValueError as error:
            raise MediaError(f"this FFmpeg has no video encoder {name!r}; use {usual}") from error
        try:
            return _tried(name, crf, live, suffix, alpha)
        except (ValueError, OSError, av.FFmpegError) as error:
            raise MediaError(
                f"video encoder {name!r} does not work for {suffix} here ({reason(error)}); use {usual}"
            ) from error

    @property
    def has_alpha(self) -> bool:
        """True if it keeps transparency."""
        return self.pix_fmt.startswith("yuva")


@cache
def _tried(name: str, crf: int, live: bool, suffix: str, alpha: bool) -> Encoder:
    """An encoder that has encoded a trial frame. Raises what PyAV raises.

    One for other hardware, or whose codec the container cannot hold, would fail only when used.
    """
    options = _options(name, crf) | (_live_options(name) if live else {})
    pix_fmt = _WITH_ALPHA.get(name, "yuv420p") if alpha else "yuv420p"
    encoder = Encoder(name, options, threads=1 if live else 0, pix_fmt=pix_fmt)
    shape = _TRIAL_PX, _TRIAL_PX
    black = np.zeros((*shape, 4 if encoder.has_alpha else 3), np.uint8)
    with av.open(io.BytesIO(), "w", format=MUXERS[suffix]) as container:
        track = VideoTrack(container, encoder, shape, Fraction(25), Fraction(1, 25), Colour(1, False, 1, 1))
        container.mux([*track.encode(black, 0, 1), *track.flush()])
    return encoder


def _options(codec: str, crf: int) -> dict[str, str]:
    """Speed first: the encoder shares the processor with the stylizer.

    No B-frames: every packet is then stored at its frame's own time and with its own duration, also for
    players that do not follow edit lists.
    """
    of_63 = str(round(crf * 63 / 51))  # VP9 and AV1 count quality to 63, not 51.
    known = {
        "libx264": {"crf": str(crf), "preset": "veryfast", "bf": "0"},
        "libx265": {"crf": str(crf), "preset": "veryfast", "bf": "0", "x265-params": "log-level=error"},
        "libvpx-vp9": {"crf": of_63, "deadline": "realtime", "cpu-used": "8", "row-mt": "1"},
        "libsvtav1": {"crf": of_63, "preset": "10"},
        "prores_ks": {"profile": "4444", "vendor": "apl0"},
    }
    return known.get(codec, {})


def _live_options(codec: str) -> dict[str, str]:
    """No look-ahead: a frame that waits in the encoder is lost when the program is killed.

    Processor time per frame on one core of a Xeon at crf 18, photographic content, 256 and 512 px:
    veryfast 1.2 and 4.5 ms, superfast 0.8 and 2.9 ms, ultrafast 0.4 and 1.3 ms at 1.5 times the bytes;
    libvpx-vp9 2.5 and 6 ms.
    """
    if codec == "libvpx-vp9":
        return {"lag-in-frames": "0"}
    return {"preset": "superfast", "tune": "zerolatency"} if codec == "libx264" else {}


def even_size(frame: Frame) -> tuple[int, int]:
    """(H, W) of ``frame`` rounded up to even numbers, as 4:2:0 needs them."""
    return frame.shape[0] + frame.shape[0] % 2, frame.shape[1] + frame.shape[1] % 2


class VideoTrack:
    """The video stream of ``container``: frames of any size in, packets of its one size out.

    size: (H, W) px, even. time_base: of the pts and durations given to `encode`. resized: frames that had
    another size. Methods raise what PyAV raises.
    """

    def __init__(
        self,
        container: OutputContainer,
        encoder: Encoder,
        size: tuple[int, int],
        rate: Fraction,
        time_base: Fraction,
        colour: Colour,
        pixel_aspect: Fraction | None = None,
    ) -> None:
        self.size, self.resized = size, 0
        self._time_base, self._colour, self._pix_fmt = time_base, colour, encoder.pix_fmt
        stream = container.add_stream(
            encoder.name,
            rate=rate,
            options=dict(encoder.options),
            width=size[1],
            height=size[0],
            time_base=time_base,
            pix_fmt=encoder.pix_fmt,
        )
        assert isinstance(stream, VideoStream)
        self.stream = stream
        context = stream.codec_context
        context.thread_type, context.thread_count = ThreadType.AUTO, encoder.threads
        # Else packets last as long as the average frame, and a long last frame is cut.
        context.flags |= Flags.frame_duration
        if pixel_aspect is not None:
            context.sample_aspect_ratio = pixel_aspect
        tag_stream(stream, colour)

    def encode(self, rgb: Frame, pts: int, duration: int, *, key: bool = False) -> list[Packet[VideoStream]]:
        """Packets that are ready after ``rgb`` (uint8 [H, W, 3], or 4 with alpha if the encoder keeps it).

        key: players can start at this frame.
        """
        frame = to_yuv(self._fit(rgb), self._colour, self._pix_fmt)
        frame.pts, frame.duration, frame.time_base = pts, duration, self._time_base
        if key:
            frame.pict_type = PictureType.I
        return self.stream.encode(frame)

    def _fit(self, rgb: Frame) -> Frame:
        """Odd sides get their last row or column repeated; other sizes are resized."""
        even = even_size(rgb)
        if even != self.size:
            self.resized += 1
            return resize(rgb, self.size)
        h, w = rgb.shape[:2]
        return rgb if even == (h, w) else np.pad(rgb, ((0, even[0] - h), (0, even[1] - w), (0, 0)), "edge")

    def flush(self) -> list[Packet[VideoStream]]:
        """The packets that the encoder still holds; the last call."""
        return self.stream.encode(None)
