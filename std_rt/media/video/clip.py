"""The clip reader: decodes a file into upright RGB frames with timestamps.

FFmpeg is limited to known containers: it would also play text files, and playlists that fetch other files.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.buffer import Buffer
from av.codec.context import ThreadType
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideDataContainer
from av.stream import AttachmentStream, Disposition, Stream
from av.subtitles.stream import SubtitleStream
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from std_rt.core.errors import MediaError
from std_rt.core.files import check_input, reason
from std_rt.media.video.animation import PictureClip, is_animated_picture
from std_rt.media.video.base import Clip, DecodedFrame, Tags
from std_rt.media.video.clock import may_jump, packets_of
from std_rt.media.video.colour import colour_of, format_has_alpha, to_rgb
from std_rt.media.video.deinterlacer import Deinterlacer

if TYPE_CHECKING:
    from av.container.core import Chapter

__all__ = [
    "ContainerClip",
    "VideoInfo",
    "copied_streams",
    "nothing_decoded",
    "open_clip",
    "open_container",
    "probe",
]

_CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif,apng,mxf,ivf,yuv4mpegpipe,h264,hevc,obu,nut,dv,rm,"
    "mpegvideo,m4v,mp3,wav,aac,flac,aiff"
)
_MARKS = {
    "A53_CC": "closed captions inside the picture",
    "STEREO3D": "the layout of its 3-D picture",
    "SPHERICAL": "its 360-degree projection",
    "DOVI_METADATA": "Dolby Vision",
}
_MARKED_FRAMES = 12  # captions do not come with the very first one
_LARGE_PX = 1920 * 1088
_LEAD_S = 1  # before a segment, at least: longer than any frame is held back for its order
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
            rotation=first.rotation,
            frames=clip.frames,
            average_rate=clip.average_rate,
        )


def nothing_decoded(path: Path) -> MediaError:
    """The error for a clip without a single frame that can be decoded."""
    return MediaError(f"{path} is damaged: no frame could be decoded")


@contextmanager
def open_container(path: Path, **options: str) -> Iterator[InputContainer]:
    """The container of a clip (or of sound), with options of its demuxer.

    Raises MediaError if it is not one of the known kinds.
    """
    check_input(path)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"} | options
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
    if is_animated_picture(path):
        with closing(PictureClip(path)) as animation:
            yield animation
        return
    with open_container(path) as container:
        video = next((stream for stream in container.streams.video if not _is_cover(stream)), None)
        if video is None:
            found = "only sound" if container.streams.audio else "no video"
            raise MediaError(f"{path} holds {found}; give a clip with a video stream, or a picture")
        if video.codec_context is None:
            raise MediaError(
                f"{path}: this build cannot decode its video codec; convert the clip to H.264 first"
            )
        yield ContainerClip(path, container=container, video=video)


def copied_streams(container: InputContainer) -> tuple[list[AudioStream], list[SubtitleStream]]:
    """Sound and subtitles that can be copied."""
    sounds = [stream for stream in container.streams.audio if stream.codec_context is not None]
    return sounds, [stream for stream in container.streams.subtitles if stream.codec_context is not None]


def _is_cover(stream: VideoStream) -> bool:
    """True for an album cover, which containers list as a video stream."""
    return bool(stream.disposition & Disposition.attached_pic)


def _tag(tags: Mapping[str, str], name: str) -> str | None:
    """A tag by its name, which Matroska writes in capitals."""
    return next((value for key, value in tags.items() if key.lower() == name), None)


@dataclass(kw_only=True)
class ContainerClip(Clip):
    """A clip that FFmpeg decodes, and counts of what went wrong."""

    container: InputContainer
    video: VideoStream
    damage: int = 0  # packets that could not be decoded, and reads that broke off
    hidden: int = 0  # packets an edit list keeps for decoding only
    is_hdr: bool = False
    _last_pts: int | None = field(default=None, repr=False)
    _end_pts: int = field(default=0, repr=False)  # of the last frame
    _end_s: float = field(default=0.0, repr=False)  # of the last packet, sound or video
    _deinterlacer: Deinterlacer = field(default_factory=Deinterlacer, repr=False)

    @property
    def sound(self) -> list[AudioStream]:
        """Audio streams that can be copied."""
        return copied_streams(self.container)[0]

    @property
    def subtitles(self) -> list[SubtitleStream]:
        """Subtitles that can be copied."""
        return copied_streams(self.container)[1]

    @property
    def attachments(self) -> Sequence[AttachmentStream]:
        """Files inside the file, such as fonts."""
        return self.container.streams.attachments

    @cached_property
    def covers(self) -> list[tuple[VideoStream, bytes]]:
        """Cover pictures: stream and JPEG, PNG or BMP file."""
        covers = [stream for stream in self.container.streams.video if _is_cover(stream)]
        with open_container(self.path) as again:
            pictures = [next(again.demux(again.streams[stream.index]), None) for stream in covers]
        return [(s, bytes(p)) for s, p in zip(covers, pictures, strict=True) if p is not None and p.size]

    @property
    def chapters(self) -> list[Chapter]:
        """Chapters, in the file's own time."""
        return self.container.chapters()

    @property
    def tags(self) -> Tags:
        """What the file says about itself."""
        streams: list[Stream] = [self.video, *self.container.streams.data]
        places = [*(stream.metadata for stream in streams), self.container.metadata]
        timecode = next(filter(None, (_tag(tags, "timecode") for tags in places)), None)
        return Tags(self.container.metadata, self.video.metadata, self.video.disposition, timecode)

    @property
    def time_base(self) -> Fraction:
        """Seconds per unit of pts."""
        return self.video.time_base or Fraction(1, 90_000)

    @property
    def rate(self) -> Fraction:
        """Average frames per second, or a guess."""
        return self.average_rate or self.video.guessed_rate or Fraction(25)

    @property
    def average_rate(self) -> Fraction | None:
        """Average frames per second; None if the file does not say."""
        return self.video.average_rate or None

    def start_s(self, sounds: Sequence[AudioStream], first: DecodedFrame) -> Fraction:
        """When the first of the video and ``sounds`` starts: clocks of broadcasts start anywhere.

        0 for sound that begins before zero (its encoder's delay, cut off by players), and for an MP4 whose
        edit list starts it late: that one means it.
        """
        starts = [s.start_time * s.time_base for s in sounds if s.start_time is not None and s.time_base]
        start_s = min([first.pts * self.time_base, *starts])
        if start_s <= 0:  # Or a clock that wraps.
            return start_s if may_jump(self.container) else Fraction(0)
        if "mp4" in self.container.format.name:
            with open_container(self.path, ignore_editlist="1") as unedited:
                stored = next(unedited.demux(), None)
            if stored is None or not stored.dts:  # What it stores starts at zero.
                return Fraction(0)
        return start_s

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
        seconds, start_s = self.duration_s, float((self.video.start_time or 0) * self.time_base)
        if seconds and self.container.format.name.startswith(("matroska", "asf")) and seconds > start_s:
            seconds -= start_s  # They count from zero.
        return round(seconds * self.rate) or None if seconds else None

    @property
    def pixel_aspect(self) -> Fraction | None:
        """Width by height of one upright pixel; None if pixels are square or the file does not say."""
        aspect = self.video.sample_aspect_ratio
        if not aspect or aspect == 1:
            return None
        return 1 / aspect if self.transposed else aspect

    @property
    def has_alpha(self) -> bool:
        """True if its pixels have alpha; of GIF and APNG, which always do, if any is transparent."""
        if self._alpha_decoder is not None:
            return True
        name = self.video.codec_context.pix_fmt
        if name is None or not format_has_alpha(av.VideoFormat(name, 2, 2)):
            return False
        if self.container.format.name not in ("gif", "apng"):
            return True
        with open_clip(self.path) as again, closing(again.read()) as frames:
            return any(again.laid_over_white for _ in frames)

    @property
    def _alpha_decoder(self) -> str | None:
        """The decoder that also returns the alpha of VP8 and VP9, which FFmpeg's own ones leave out."""
        known = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
        has_alpha = _tag(self.video.metadata, "alpha_mode") == "1"
        return known.get(self.video.codec_context.codec.canonical_name) if has_alpha else None

    def read(self) -> Generator[DecodedFrame, None, None]:
        """Upright frames until the end, or as far as a damaged file goes."""
        decoder = self.video.codec_context
        if self._alpha_decoder is not None:
            decoder = cast(VideoCodecContext, av.CodecContext.create(self._alpha_decoder, "r"))
            decoder.extradata = self.video.codec_context.extradata
        # Frames decoded in several threads come late, and PyAV loses those that wait when the last one is
        # damaged. One thread does 1080p far faster than any frame is stylized.
        large = self.video.width * self.video.height > _LARGE_PX
        decoder.thread_type = ThreadType.AUTO if large else ThreadType.SLICE
        for packet in self._packets():
            if packet.stream.index == self.video.index:
                self.hidden += packet.is_discard
                decoder.skip_frame = "NONREF" if self.skips else "DEFAULT"
                yield from self._decode(decoder, packet)
        yield from self._decode(decoder, None)
        for frame in self._deinterlacer.flush():
            yield self._upright(frame)
        self.ended = True

    def key_times(self) -> list[int]:
        """As `Clip.key_times`. An MP4 counts from when a frame is decoded, which may be earlier."""
        if not self.container.format.name.startswith(("mov", "matroska")):
            return []
        with open_container(self.path) as container, suppress(av.FFmpegError):
            video = container.streams[self.video.index]
            container.seek(0, stream=video)  # Matroska's index is at the end, and read when it is needed
            return sorted(entry.timestamp for entry in video.index_entries if entry.is_keyframe)
        return []

    def read_between(self, begin: int | None, end: int | None) -> Generator[DecodedFrame, None, None]:
        """`read`, but only frames with ``begin`` <= pts < ``end`` (None: all from or to there).

        It decodes from an earlier key frame: in an open group of pictures, those before its key frame need
        the group before, and what an index calls a time may be that of decoding.
        """
        if begin is not None:
            with suppress(av.FFmpegError):  # then it reads from the start
                self.container.seek(begin - round(_LEAD_S / self.time_base), stream=self.video)
        with closing(self.read()) as frames:
            for frame in frames:
                if end is not None and frame.pts >= end:
                    return
                if begin is None or frame.pts >= begin:
                    yield frame

    def _packets(self) -> Iterator[Packet[Stream]]:
        """All packets; those of sound too, which show where the file ends."""
        try:
            for packet in packets_of(self.container, [self.video, *self.sound]):
                if packet.pts is not None:
                    end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    self._end_s = max(self._end_s, end_s)
                yield packet
        except av.FFmpegError:
            self.damage += 1

    def _decode(self, decoder: VideoCodecContext, packet: Packet[Stream] | None) -> Iterator[DecodedFrame]:
        try:
            frames = decoder.decode(packet)
        except av.EOFError:
            return
        except av.FFmpegError:
            self.damage += 1
            return
        for frame in frames:
            frame.pts, frame.time_base = self._next_pts(frame), self.time_base
            for progressive in self._deinterlacer.run(frame):
                yield self._upright(progressive)

    def _upright(self, frame: VideoFrame) -> DecodedFrame:
        colour, orientation = colour_of(frame), Orientation.of(frame)
        self.decoded += 1
        self.is_hdr |= colour.is_hdr
        self.transposed = orientation.transpose
        rgb, alpha = to_rgb(frame, colour)
        rgb, alpha = self._visible(
            orientation.apply(rgb), None if alpha is None else orientation.apply(alpha)
        )
        pts, duration = frame.pts or 0, frame.duration or 0
        self._end_pts = pts + duration
        return DecodedFrame(rgb, pts, duration, colour, orientation.degrees, alpha)

    def _next_pts(self, frame: VideoFrame) -> int:
        """The frame's time; if it is missing or runs backwards, the next one that fits."""
        times = [frame.pts, frame.dts]
        if self.container.format.name == "avi":  # It stores no pts; FFmpeg's guess is wrong for H.264.
            times.reverse()
        pts = times[0] if times[0] is not None else times[1]
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

    def losses(self) -> list[str]:
        """One line each on what is in the file and never used, known before it is read."""
        streams, losses = self.container.streams, []
        if sum(not _is_cover(stream) for stream in streams.video) > 1:
            losses.append("only the first video stream is used")
        unknown = len(streams.audio) - len(self.sound) + len(streams.subtitles) - len(self.subtitles)
        if unknown:
            losses.append(f"{unknown} of its tracks (sound or subtitles in an unknown format) are not copied")
        # Chapters of an MP4 and its timecode are data streams, too, and are kept on their own.
        data = [stream for stream in streams.data if _tag(stream.metadata, "timecode") is None]
        data = [stream for stream in data if not (self.chapters and stream.name == "bin_data")]
        if data:
            names = ", ".join(sorted({stream.name or "of an unknown kind" for stream in data}))
            losses.append(f"data tracks are not copied ({names})")
        if marks := self._marks():
            losses.append(f"not kept: {', '.join(marks)}")
        return losses

    def _marks(self) -> list[str]:
        """What the first frames carry that a new encoding does not."""
        found: set[str] = set()
        with open_container(self.path) as container, suppress(av.FFmpegError):
            video = container.streams.video[self.container.streams.video.index(self.video)]
            for frame in islice(container.decode(video), _MARKED_FRAMES):
                side_data: Mapping[str, Buffer] = cast(Any, SideDataContainer)(frame)
                found |= {name for name in _MARKS if name in side_data}
        return [words for name, words in _MARKS.items() if name in found]

    def notes(self, *, stopped: bool) -> list[str]:
        """After reading: one line each on what a user may want to know about the input."""
        notes = []
        if self.damage or (not stopped and self.is_short):
            short = self.decoded + self.hidden < self.video.frames
            counts = f" ({self.decoded} of {self.video.frames} frames)" if short else ""
            notes.append(f"the input is damaged or truncated; everything decodable was processed{counts}")
        if self._deinterlacer.used:
            notes.append("it is interlaced and was deinterlaced (bwdif)")
        if self.is_hdr:
            notes.append("HDR brightness (PQ or HLG) was used as it is, without tone mapping")
        return notes


def _matroska_end_s(container: InputContainer, video: VideoStream) -> float | None:
    """When a Matroska or WebM file by FFmpeg says that its video ends, which tags each track."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", video.metadata.get("DURATION", ""))
    if tag is None or "matroska" not in container.format.name:
        return None
    return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
