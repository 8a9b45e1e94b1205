"""The clip reader: decodes an open container into upright RGB frames with timestamps.

FFmpeg is limited to known containers: it would also play text files, and playlists that fetch other files.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.buffer import Buffer
from av.codec.context import ThreadType
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from std_rt.core.errors import MediaError
from std_rt.core.files import check_input, reason
from std_rt.media.video.colour import Colour, colour_of, to_rgb

__all__ = [
    "Clip",
    "DecodedFrame",
    "VideoInfo",
    "nothing_decoded",
    "open_clip",
    "open_container",
    "probe",
    "sound_streams",
]

_CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif,apng,mxf,ivf,yuv4mpegpipe,h264,hevc,obu,nut,dv,rm,"
    "mpegvideo,m4v,mp3,wav,aac,flac,aiff"
)
_LARGE_PX = 1920 * 1088
_LAST_PACKET_S = 0.2  # longer than any packet of sound, whose duration FLV does not store
# ISO files that hold a picture, which the mov reader would return as the tiles of a mosaic.
_STILL_BRANDS = frozenset({"heic", "heix", "heim", "heis", "mif1", "avif"})


@dataclass(frozen=True)
class Orientation:
    """What turns a stored frame upright: transpose first, then flip rows and columns."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @staticmethod
    def of(frame: VideoFrame) -> Orientation:
        """From a decoded frame's display matrix: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
        try:
            # Not frame.side_data: it keeps the frame in a reference cycle, and hundreds pile up before the
            # collector, which counts objects and not bytes, looks for them.
            side_data: Mapping[str, Buffer] = cast(Any, SideDataContainer)(frame)
            matrix = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), dtype=np.int32)
        except KeyError:
            return Orientation()
        a, b, c, d = (int(matrix[index]) for index in (0, 1, 3, 4))
        if abs(b) + abs(c) > abs(a) + abs(d):
            return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)
        return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)

    @property
    def degrees(self) -> int:
        """Clockwise degrees of the rotation (0, 90, 180, 270), mirroring aside."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows else 0

    def apply(self, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The array ([H, W] or [H, W, C]) upright, contiguous."""
        turned = array.swapaxes(0, 1) if self.transpose else array
        turned = turned[::-1] if self.flip_rows else turned
        turned = turned[:, ::-1] if self.flip_columns else turned
        return np.ascontiguousarray(turned)


@dataclass(frozen=True)
class DecodedFrame:
    """One upright frame: rgb uint8 [H, W, 3]; pts and duration in the stream's time base (0 = unknown).

    orientation: what turned it upright.
    """

    rgb: NDArray[np.uint8]
    pts: int
    duration: int
    colour: Colour
    orientation: Orientation


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a clip; ``width`` x ``height`` px is the upright picture.

    rotation: clockwise degrees that turned it upright (0, 90, 180, 270).
    frames: their number, or an estimate from duration and rate, or None; average_rate: frames/s or None.
    """

    width: int
    height: int
    rotation: int
    frames: int | None
    average_rate: Fraction | None


def probe(path: Path) -> VideoInfo:
    """Open a clip and decode its first frame. Raises MediaError if it is not a video or cannot be decoded."""
    with open_clip(path) as clip:
        first = next(clip.read(), None)
        if first is None:
            raise nothing_decoded(path)
        return VideoInfo(
            width=first.rgb.shape[1],
            height=first.rgb.shape[0],
            rotation=first.orientation.degrees,
            frames=clip.frames,
            average_rate=clip.video.average_rate,
        )


def nothing_decoded(path: Path) -> MediaError:
    """The error for a clip without a single frame that can be decoded."""
    return MediaError(f"{path} is damaged: no frame could be decoded")


@contextmanager
def open_container(path: Path) -> Iterator[InputContainer]:
    """The container of a clip (or of sound). Raises MediaError if it is not one of the known kinds."""
    check_input(path)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(str(path.absolute()), container_options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError, OSError) as error:
        is_mp4 = path.suffix.lower() in (".mp4", ".mov")
        hint = "a truncated .mp4 lacks the index at its end" if is_mp4 else "damaged?"
        raise MediaError(f"{path} cannot be read as a video ({reason(error)}; {hint})") from error
    with container:
        if container.metadata.get("major_brand", "") in _STILL_BRANDS:
            raise MediaError(f"{path} is an HEIF/AVIF picture that cannot be read; convert it to JPEG or PNG")
        yield container


@contextmanager
def open_clip(path: Path) -> Iterator[Clip]:
    """A clip: its first stream of moving pictures (album covers do not count), and its sound.

    Raises MediaError if it is not a video, has no video stream, or this FFmpeg cannot decode it.
    """
    with open_container(path) as container:
        video = next((stream for stream in container.streams.video if not _is_cover(stream)), None)
        if video is None:
            found = "only sound" if container.streams.audio else "no video"
            raise MediaError(f"{path} holds {found}; give a clip with a video stream, or a picture")
        if video.codec_context is None:
            raise MediaError(
                f"{path}: this build cannot decode its video codec; convert the clip to H.264 first"
            )
        yield Clip(container, video)


def sound_streams(container: InputContainer) -> list[AudioStream]:
    """Audio streams that can be copied."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


def _is_cover(stream: VideoStream) -> bool:
    """True for an album cover, which containers list as a video stream."""
    return bool(stream.disposition & Disposition.attached_pic)


@dataclass
class Clip:
    """Frames of an open container, in file order, and counts of what went wrong."""

    container: InputContainer
    video: VideoStream
    damage: int = 0  # packets that could not be decoded, and reads that broke off
    hidden: int = 0  # packets an edit list keeps for decoding only
    decoded: int = 0  # frames
    ended: bool = False  # read to its end, or as far as it goes
    is_hdr: bool = False
    transposed: bool = False  # the last frame's height was its stored width
    _last_pts: int | None = field(default=None, repr=False)
    _end_pts: int = field(default=0, repr=False)  # of the last frame
    _end_s: float = field(default=0.0, repr=False)  # of the last packet, sound or video

    @property
    def sound(self) -> list[AudioStream]:
        """Audio streams that can be copied."""
        return sound_streams(self.container)

    @property
    def time_base(self) -> Fraction:
        """Seconds per unit of pts."""
        return self.video.time_base or Fraction(1, 90_000)

    @property
    def rate(self) -> Fraction:
        """Average frames per second (25 if the file does not say)."""
        return self.video.average_rate or self.video.guessed_rate or Fraction(25)

    @property
    def duration_s(self) -> float | None:
        """Seconds, as the stream or else the container says."""
        if self.video.duration:
            return float(self.video.duration * self.time_base)
        return self.container.duration / av.time_base if self.container.duration else None

    @property
    def frames(self) -> int | None:
        """Number of frames as the file says, else an estimate, else None."""
        if self.video.frames:
            return self.video.frames
        return round(self.duration_s * self.rate) or None if self.duration_s else None

    @property
    def pixel_aspect(self) -> Fraction | None:
        """Width by height of one upright pixel; None if pixels are square or the file does not say."""
        aspect = self.video.sample_aspect_ratio
        if not aspect or aspect == 1:
            return None
        return 1 / aspect if self.transposed else aspect

    @property
    def frame_step(self) -> int:
        """Units of pts from one frame to the next at the average rate; at least 1."""
        return max(1, round(1 / (self.rate * self.time_base)))

    def read(self) -> Generator[DecodedFrame, None, None]:
        """Upright frames until the end, or as far as a damaged file goes."""
        # Frames decoded in several threads come late, and PyAV loses those that wait when the last one is
        # damaged. One thread does 1080p far faster than any frame is stylized.
        large = self.video.width * self.video.height > _LARGE_PX
        self.video.thread_type = ThreadType.AUTO if large else ThreadType.SLICE
        for packet in self._packets():
            if packet.stream.index == self.video.index:
                self.hidden += packet.is_discard
                yield from self._decode(cast("Packet[VideoStream]", packet))
        yield from self._decode(None)
        self.ended = True

    def _packets(self) -> Iterator[Packet[Stream]]:
        """All packets; those of sound too, which show where the file ends."""
        try:
            for packet in self.container.demux([self.video, *self.sound]):
                if packet.size:  # The empty ones at the end flush decoders; read() does that itself.
                    if packet.pts is not None:
                        end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                        self._end_s = max(self._end_s, end_s)
                    yield packet
        except av.FFmpegError:
            self.damage += 1

    def _decode(self, packet: Packet[VideoStream] | None) -> Iterator[DecodedFrame]:
        try:
            frames = self.video.decode(packet)
        except av.EOFError:
            return
        except av.FFmpegError:
            self.damage += 1
            return
        for frame in frames:
            yield self._upright(frame)

    def _upright(self, frame: VideoFrame) -> DecodedFrame:
        colour, orientation = colour_of(frame), Orientation.of(frame)
        self.decoded += 1
        self.is_hdr |= colour.is_hdr
        self.transposed = orientation.transpose
        rgb = orientation.apply(to_rgb(frame, colour))
        pts, duration = self._next_pts(frame), frame.duration or 0
        self._end_pts = pts + duration
        return DecodedFrame(rgb, pts, duration, colour, orientation)

    def _next_pts(self, frame: VideoFrame) -> int:
        """The frame's time; if it is missing or runs backwards, the next one that fits."""
        pts = frame.pts if frame.pts is not None else frame.dts
        if self._last_pts is not None:
            pts = self._last_pts + self.frame_step if pts is None else max(pts, self._last_pts + 1)
        self._last_pts = pts or 0
        return self._last_pts

    @property
    def is_short(self) -> bool:
        """After reading: True if the container announced more than came."""
        if self.video.frames:
            return self.decoded + self.hidden < self.video.frames and self._misses_frames()
        slack_s = 2 * float(self.frame_step * self.time_base)
        video_s = _matroska_end_s(self.container, self.video)
        if video_s is not None:
            return float(self._end_pts * self.time_base) + slack_s < video_s
        # Only Matroska, WebM and FLV say when the last of their streams ends; subtitles are not read.
        says = any(name in self.container.format.name for name in ("matroska", "flv"))
        if not says or not self.container.duration or self.container.streams.subtitles:
            return False
        return self._end_s + slack_s + _LAST_PACKET_S < self.container.duration / av.time_base

    def _misses_frames(self) -> bool:
        """Fewer came than the file counts; True if the missing ones should have been seen."""
        if "mp4" in self.container.format.name:
            # What an edit list hides is not in this index, or marked where it is needed for decoding.
            listed = sum(not entry.is_discard for entry in self.video.index_entries)
            return self.decoded < listed
        # AVI counts places in time, some of which may hold no frame.
        return self._end_pts < self.video.frames * self.frame_step

    def notes(self, *, stopped: bool) -> list[str]:
        """After reading: one line each on what a user may want to know about the input."""
        notes = []
        if self.damage or (not stopped and self.is_short):
            notes.append("the input is damaged or truncated; everything decodable was processed")
        if self.container.streams.subtitles:
            notes.append("subtitles were not copied")
        if sum(not _is_cover(stream) for stream in self.container.streams.video) > 1:
            notes.append("only the first video stream was used")
        if self.is_hdr:
            notes.append("HDR brightness (PQ or HLG) was used as it is, without tone mapping")
        return notes


def _matroska_end_s(container: InputContainer, video: VideoStream) -> float | None:
    """When a Matroska or WebM file by FFmpeg says that its video ends, which tags each track."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", video.metadata.get("DURATION", ""))
    if tag is None or "matroska" not in container.format.name:
        return None
    return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
