"""Clips and pictures made by code, and ways to look into the results that share nothing with the package."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from std_rt.media import VideoReport, transcode_stream

Array = NDArray[Any]
SAMPLE_RATE = 48_000


@dataclass(frozen=True)
class Sound:
    """One audio stream of a sample clip: encoder, channels (1 or 2), first sample, samples a second."""

    codec: str
    channels: int = 1
    start: int = 0
    rate: int = SAMPLE_RATE
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClipSpec:
    """How a sample clip is made; ``pts`` are in units of ``time_base``."""

    pts: Sequence[int] = tuple(range(0, 12 * 512, 512))
    time_base: Fraction = Fraction(1, 12_800)
    rate: Fraction | int = 25  # what the container is told
    width: int = 64
    height: int = 48
    audio: str | None = None  # the encoder of one mono stream
    audio_start: int = 0
    sounds: Sequence[Sound] = ()  # more streams
    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=lambda: {"crf": "10", "bf": "2", "preset": "ultrafast"})
    container_options: dict[str, str] = field(default_factory=dict)
    rotate: tuple[float, bool, bool] | None = None
    aspect: Fraction | None = None  # of one pixel
    tags: tuple[int, int, int, int] | None = None  # colorspace, range, primaries, trc
    picture: Callable[[int], Array] | None = None  # index -> array in ``pix_fmt`` or rgb24


def moving_bar(index: int, width: int = 64, height: int = 48) -> Array:
    """A gradient with a bar that moves by three pixels a frame: uint8 [height, width, 3]."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    frame[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    frame[:, (3 * index) % width :][:, :5] = 255
    return frame


def make_clip(path: Path, spec: ClipSpec | None = None) -> Path:
    """Encode a sample clip; its sound (``spec.audio`` names the encoder) lasts as long as its frames."""
    spec = spec or ClipSpec()
    with av.open(str(path), "w", container_options=spec.container_options) as container:
        stream: Any = container.add_stream(spec.codec, rate=spec.rate, options=spec.options)
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, spec.pix_fmt
        stream.codec_context.time_base = spec.time_base
        if spec.aspect is not None:
            stream.codec_context.sample_aspect_ratio = spec.aspect
        if spec.rotate is not None:
            stream.set_display_rotation(spec.rotate[0], hflip=spec.rotate[1], vflip=spec.rotate[2])
        if spec.tags is not None:
            context = stream.codec_context
            context.colorspace, context.color_range, context.color_primaries, context.color_trc = spec.tags
        sounds = [(sound, _add_sound(container, sound)) for sound in _sounds(spec)]
        for index, pts in enumerate(spec.pts):
            container.mux(stream.encode(_frame(spec, index, pts)))
        container.mux(stream.encode(None))
        for sound, encoder in sounds:
            _write_sound(container, encoder, sound, spec)
    return path


def _frame(spec: ClipSpec, index: int, pts: int) -> av.VideoFrame:
    if spec.picture is None:
        array, given = moving_bar(index, spec.width, spec.height), "rgb24"
    else:
        array = spec.picture(index)
        given = "rgb24" if array.ndim == 3 else spec.pix_fmt
    frame = av.VideoFrame.from_ndarray(array, format=given)
    if given != spec.pix_fmt:
        frame = frame.reformat(format=spec.pix_fmt)
    if spec.tags is not None:
        frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = spec.tags
    frame.pts, frame.time_base = pts, spec.time_base
    return frame


def _sounds(spec: ClipSpec) -> list[Sound]:
    plain = [] if spec.audio is None else [Sound(spec.audio, start=spec.audio_start)]
    return [*plain, *spec.sounds]


def _add_sound(container: Any, sound: Sound) -> Any:
    encoder = container.add_stream(sound.codec, rate=sound.rate, options=sound.options)
    encoder.codec_context.layout = "mono" if sound.channels == 1 else "stereo"
    return encoder


def _write_sound(container: Any, encoder: Any, sound: Sound, spec: ClipSpec) -> None:
    """Noise, as long as the frames."""
    rng = np.random.default_rng(7)
    context = encoder.codec_context
    seconds = float((max(spec.pts) - min(spec.pts)) * spec.time_base) + 0.04
    size = context.frame_size or 1024
    for start in range(0, max(1, int(seconds * sound.rate)), size):
        noise = rng.normal(0, 0.1, (sound.channels, size))
        frame = av.AudioFrame.from_ndarray(
            _samples(noise, context.format.name), format=context.format.name, layout=context.layout.name
        )
        frame.sample_rate, frame.pts = sound.rate, start + sound.start
        frame.time_base = Fraction(1, sound.rate)
        container.mux(encoder.encode(frame))
    container.mux(encoder.encode(None))


def _samples(noise: Array, kind: str) -> Array:
    """Noise [channels, samples] about -1..1 in a sample format of FFmpeg (fltp, s16, ...)."""
    types: dict[str, tuple[type[Any], float]] = {
        "flt": (np.float32, 1),
        "dbl": (np.float64, 1),
        "s16": (np.int16, 3e4),
        "s32": (np.int32, 2e9),
        "u8": (np.uint8, 1),
    }
    kept, scale = types[kind.rstrip("p")]
    data = (np.clip(noise, -1, 1) * scale).astype(kept)
    return data if kind.endswith("p") else data.T.reshape(1, -1)


def frame_times(path: Path) -> list[Fraction]:
    """Seconds of every decoded frame."""
    with av.open(str(path)) as container:
        frames: Any = container.decode(video=0)
        return [f.pts * f.time_base for f in frames]


def frame_spans(path: Path) -> list[Fraction]:
    """Duration in seconds of every decoded frame."""
    with av.open(str(path)) as container:
        frames: Any = container.decode(video=0)
        return [f.duration * f.time_base for f in frames]


def sound_packets(path: Path) -> list[tuple[Fraction, str]]:
    """(seconds, sha256) of every packet of the first audio stream."""
    with av.open(str(path)) as container:
        packets: list[Any] = [p for p in container.demux(audio=0) if p.size]
        return [(p.pts * p.time_base, hashlib.sha256(bytes(p)).hexdigest()) for p in packets]


def rgb_frames(path: Path) -> list[Array]:
    """All frames by FFmpeg's own colours, for geometry checks: uint8 [H, W, 3] each."""
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


def played(path: Path) -> list[Fraction]:
    """Times of the frames that can be decoded before the file breaks off."""
    times: list[Fraction] = []
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(video=0):
                assert frame.pts is not None
                assert frame.time_base is not None
                times.append(frame.pts * frame.time_base)
        except av.FFmpegError:
            pass
    return times


def transcode(source: Path, sink: Path, stylize: Callable[[Array], Array], **options: Any) -> VideoReport:
    """`transcode_stream` with a function of one frame."""
    return transcode_stream(source, sink, lambda frames: map(stylize, frames), **options)


def boxes(data: bytes) -> list[bytes]:
    """The types of an MP4's outer boxes, in order."""
    found, at = [], 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        found.append(kind)
        at += size if size > 1 else struct.unpack_from(">Q", data, at + 8)[0] if size else len(data)
    return found


def yuv_planes(frame: av.VideoFrame) -> tuple[Array, Array, Array]:
    """Y, U, V of a yuv420p frame, chroma repeated to full size."""
    flat, h, w = frame.to_ndarray(), frame.height, frame.width
    chroma = flat[h:].reshape(2, h // 2, w // 2).repeat(2, axis=1).repeat(2, axis=2)
    return flat[:h], chroma[0], chroma[1]


_LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114)}


def rgb_to_yuv420(rgb: Array, matrix: int, full: bool) -> Array:
    """BT.601/709 by their definition; uint8 [H * 3 / 2, W] as PyAV lays out yuv420p."""
    kr, kb = _LUMA[matrix]
    r, g, b = np.moveaxis(rgb.astype(np.float64) / 255, 2, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    luma = 255 * y if full else 16 + 219 * y
    chroma = [128 + (255 if full else 224) * plane[::2, ::2] for plane in (u, v)]
    flat = np.concatenate([plane.ravel() for plane in (luma, *chroma)])
    return np.asarray(np.clip(np.rint(flat), 0, 255), np.uint8).reshape(rgb.shape[0] * 3 // 2, rgb.shape[1])


def yuv_to_rgb(planes: tuple[Array, Array, Array], matrix: int, full: bool) -> Array:
    """The inverse, float64 [H, W, 3] in 0..255."""
    kr, kb = _LUMA[matrix]
    y, u, v = (plane.astype(np.float64) for plane in planes)
    y = y / 255 if full else (y - 16) / 219
    u, v = ((plane - 128) / (255 if full else 224) for plane in (u, v))
    r, b = y + v * (2 - 2 * kr), y + u * (2 - 2 * kb)
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    return np.asarray(np.clip(255 * np.stack([r, g, b], axis=2), 0, 255))


SRGB_PRIMARIES = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))  # XYZ, D50


def swapped_profile() -> bytes:
    """An ICC profile like sRGB (gamma 2.2) with the red and green primaries exchanged."""
    red, green, blue = SRGB_PRIMARIES
    return matrix_profile("swapped", (green, red, blue))


Xyz = tuple[float, float, float]


def matrix_profile(name: str, primaries: tuple[Xyz, Xyz, Xyz] = SRGB_PRIMARIES, gamma: float = 2.2) -> bytes:
    """An RGB profile of that description, with XYZ (D50) of red, green and blue, and a power as its curve."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">I", 1) + struct.pack(">H", round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode("ascii") + bytes(79)
    red, green, blue = primaries
    tags = {
        b"desc": text,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(*red),
        b"gXYZ": xyz(*green),
        b"bXYZ": xyz(*blue),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    return _profile(tags)


def _profile(tags: dict[bytes, bytes]) -> bytes:
    table, body, offset = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        padded = data + bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += padded
    head = bytearray(128)
    head[8:12] = struct.pack(">I", 0x02400000)
    head[12:24] = b"mntrRGB XYZ "
    head[36:40] = b"acsp"
    head[68:80] = struct.pack(">iii", 63190, 65536, 54061)
    profile = bytes(head) + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(profile)) + profile[4:]
