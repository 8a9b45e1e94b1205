"""Clips drawn by chance over containers, codecs, rates, sizes, turns, sound and damage, each with its number.

``draw(seed, index)`` is a value; ``case.make(folder)`` writes the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np
from support.media_samples import Array, ClipSpec, Sound, make_clip, moving_bar

SUITE = 200  # cases of one seed that the suite runs
_T = TypeVar("_T")


@dataclass(frozen=True)
class Codec:
    """A video encoder and what it takes; sizes: (width, height) px, where it takes no others."""

    encoder: str
    formats: Sequence[str] = ("yuv420p",)
    options: dict[str, str] = field(default_factory=dict)
    reorders: bool = False  # it makes B-frames when asked
    any_rate: bool = True  # MPEG-1 and 2 know a table of rates
    short_ticks: bool = False  # MPEG-4 counts to 65535 in a second
    sizes: Sequence[tuple[int, int]] = ()


SIZES = ((64, 48), (48, 64), (80, 48), (34, 50), (16, 16))
ODD_SIZES = ((63, 47), (65, 33), (17, 71), (33, 64))
_X264 = {"preset": "ultrafast", "crf": "20"}
_X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"}
_AV1 = {"preset": "12", "svtav1-params": "lp=1"}
CODECS = {
    "h264": Codec("libx264", ("yuv420p", "yuv420p", "yuv444p", "yuv422p", "yuv420p10le"), _X264, True),
    # At widths below 64 this encoder writes outside its buffers.
    "hevc": Codec("libx265", ("yuv420p", "yuv420p10le"), _X265, True, sizes=((64, 48), (80, 48), (128, 64))),
    "mpeg4": Codec("mpeg4", reorders=True, short_ticks=True),
    "mpeg2": Codec("mpeg2video", ("yuv420p", "yuv422p"), reorders=True, any_rate=False),
    "mpeg1": Codec("mpeg1video", reorders=True, any_rate=False),
    "vp9": Codec("libvpx-vp9", ("yuv420p", "yuv444p"), {"cpu-used": "8", "deadline": "realtime"}),
    "vp8": Codec("libvpx", options={"cpu-used": "8", "deadline": "realtime", "auto-alt-ref": "0"}),
    "av1": Codec("libsvtav1", options=_AV1, sizes=((64, 64), (80, 66))),
    "mjpeg": Codec("mjpeg", ("yuvj420p", "yuvj422p", "yuvj444p")),
    "ffv1": Codec("ffv1", ("yuv420p", "yuv444p", "gray", "bgr0", "yuv422p10le")),
    "prores": Codec("prores_ks", ("yuv422p10le",)),
    "qtrle": Codec("qtrle", ("rgb24",)),
    "png": Codec("png", ("rgb24", "gray")),
    "huffyuv": Codec("huffyuv", ("yuv422p", "rgb24")),
    "rawvideo": Codec("rawvideo", ("yuv420p",)),
    "h263": Codec("h263", sizes=((128, 96), (176, 144))),
    "flv1": Codec("flv"),
    "msmpeg4": Codec("msmpeg4"),
    "wmv2": Codec("wmv2", sizes=((64, 48), (34, 50))),
    "gif": Codec("gif", ("rgb8", "bgr8")),
}
SOUNDS = {
    "aac": Sound("aac"),
    "mp3": Sound("libmp3lame"),
    "mp2": Sound("mp2"),
    "opus": Sound("libopus"),
    "vorbis": Sound("vorbis", options={"strict": "-2"}),
    "flac": Sound("flac"),
    "ac3": Sound("ac3"),
    "eac3": Sound("eac3"),
    "alac": Sound("alac"),
    "pcm16": Sound("pcm_s16le"),
    "pcm24": Sound("pcm_s24le"),
    "wma": Sound("wmav2", options={"b": "128k"}),
    "aac22": Sound("aac", rate=22_050),
    "mp344": Sound("libmp3lame", rate=44_100),
}
ONLY_STEREO = {"vorbis", "wma"}  # these encoders, or their containers, do not take one channel
# Suffix -> what FFmpeg writes into it, and reads again.
CONTAINERS: dict[str, tuple[str, str]] = {
    ".mp4": ("h264 hevc mpeg4 vp9 av1 mjpeg mpeg2", "aac mp3 opus flac ac3 eac3 alac aac22 mp344"),
    ".mov": ("h264 hevc prores mjpeg qtrle png mpeg4", "aac pcm16 pcm24 alac mp3 ac3"),
    ".mkv": (
        "h264 hevc vp9 vp8 av1 ffv1 mpeg4 mpeg2 mjpeg",
        "aac mp3 opus vorbis flac ac3 pcm16 mp2 eac3 alac",
    ),
    ".webm": ("vp9 vp8 av1", "opus vorbis"),
    ".avi": ("h264 mpeg4 mjpeg ffv1 huffyuv msmpeg4 rawvideo", "mp3 ac3 pcm16 mp2"),
    ".ts": ("h264 hevc mpeg2", "aac mp3 ac3 mp2 opus"),
    ".m4v": ("h264 mpeg4", "aac alac"),
    ".flv": ("flv1 h264", "aac mp344 aac22"),
    ".gif": ("gif", ""),
    ".3gp": ("h263 h264 mpeg4", "aac"),
    ".wmv": ("wmv2 msmpeg4", "wma mp3"),
    ".mpg": ("mpeg1 mpeg2", "mp2 ac3"),
    ".ogv": ("vp8", "vorbis opus flac"),
    ".nut": ("h264 mpeg4 ffv1", "aac flac pcm16"),
}
RATES = {
    "23.976": Fraction(24_000, 1001),
    "24": Fraction(24),
    "25": Fraction(25),
    "29.97": Fraction(30_000, 1001),
    "30": Fraction(30),
    "50": Fraction(50),
    "60": Fraction(60),
    "variable": Fraction(25),
}
TURNS = (0, 0, 0, 90, 180, 270)
# Containers that hold any time of a frame, a turn, and a start that is not zero.
ANY_TIME = {".mp4", ".mov", ".mkv", ".webm", ".m4v", ".nut", ".flv", ".ts", ".3gp"}
MP4S = {".mp4", ".mov", ".m4v", ".3gp"}
EDITS = ("none", "none", "hidden", "late")
SINKS = (".mp4", ".mp4", ".mov", ".mkv", ".m4v", ".webm")
DAMAGES = ("none",) * 7 + ("tail", "holes")
STYLES = ("same", "same", "half", "odd", "bigger")


@dataclass(frozen=True)
class Case:
    """One clip and what is done with it."""

    seed: int
    index: int
    suffix: str
    video: str
    rate: str
    spec: ClipSpec
    turn: int
    edit: str  # none, hidden (frames before time zero), late (a start after zero)
    sounds: tuple[str, ...]
    sink: str
    style: str
    damage: str
    fragmented: bool = False

    @property
    def id(self) -> str:
        """Names the draw, and says what it is."""
        sound = "+".join(self.sounds) or "silent"
        words = (self.suffix[1:], self.video, self.rate, sound, self.edit, self.damage, self.sink[1:])
        return f"{self.seed}.{self.index}-" + "-".join(word for word in words if word != "none")

    def make(self, folder: Path) -> Path:
        """Write the clip, damaged as drawn."""
        path = make_clip(folder / f"clip{self.suffix}", self.spec)
        if self.damage != "none":
            path.write_bytes(
                _damaged(path.read_bytes(), self.damage, np.random.default_rng([self.seed, self.index]))
            )
        return path

    def stylize(self, frame: Array) -> Array:
        """uint8 [H, W, 3] of the same or another size."""
        h, w = frame.shape[:2]
        if self.style == "half":
            return np.ascontiguousarray(frame[::2, ::2])
        if self.style == "odd":
            return np.ascontiguousarray(frame[: h - 1 + h % 2, : w - 1 + w % 2])
        return frame.repeat(2, axis=0).repeat(2, axis=1) if self.style == "bigger" else frame


def draw(seed: int, index: int) -> Case:
    """The case number ``index`` of ``seed``; every 14th in turn has the same container."""
    rng = np.random.default_rng([0xC11B, seed, index])
    suffix = list(CONTAINERS)[index % len(CONTAINERS)]
    videos, sounds = (text.split() for text in CONTAINERS[suffix])
    # Round after round the codecs take turns, so that none is left to chance.
    video = videos[(index // len(CONTAINERS) + seed) % len(videos)]
    codec = CODECS[video]
    rate = _one(rng, [name for name in RATES if name != "variable" or _any_time(suffix, codec)])
    edit = _one(rng, EDITS if suffix in MP4S and codec.any_rate else ("none",))
    names = _draw_sounds(rng, sounds)
    turn = _one(rng, TURNS) if suffix in MP4S | {".mkv"} else 0
    fragmented = suffix in MP4S and edit == "none" and bool(rng.integers(4) == 0)
    spec = _spec(rng, suffix, codec, rate, edit, names, turn, fragmented)
    sink, style, damage = _one(rng, SINKS), _one(rng, STYLES), _one(rng, DAMAGES)
    return Case(seed, index, suffix, video, rate, spec, turn, edit, names, sink, style, damage, fragmented)


def _any_time(suffix: str, codec: Codec) -> bool:
    return suffix in ANY_TIME and codec.any_rate


def _one(rng: np.random.Generator, values: Sequence[_T]) -> _T:
    return values[int(rng.integers(len(values)))]


def _draw_sounds(rng: np.random.Generator, known: Sequence[str]) -> tuple[str, ...]:
    count = int(rng.choice([0, 1, 2], p=[0.25, 0.55, 0.2])) if known else 0
    return tuple(_one(rng, known) for _ in range(count))


def _spec(
    rng: np.random.Generator,
    suffix: str,
    codec: Codec,
    rate: str,
    edit: str,
    names: Sequence[str],
    turn: int,
    fragmented: bool,
) -> ClipSpec:
    options, pix_fmt = dict(codec.options), _one(rng, codec.formats)
    if codec.reorders:
        options["bf"] = str(_one(rng, (0, 1, 2, 3)) if suffix not in (".flv",) else 0)
    options["g"] = str(_one(rng, (1, 3, 12)))
    pts, time_base = _times(rng, suffix, codec, rate, edit)
    width, height = _size(rng, codec, pix_fmt)
    late = int(_one(rng, (0, 0, 4800)))
    sounds = [
        Sound(
            SOUNDS[name].codec,
            2 if name in ONLY_STEREO else int(rng.integers(1, 3)),
            late,
            SOUNDS[name].rate,
            SOUNDS[name].options,
        )
        for name in names
    ]
    flags = {"movflags": "frag_keyframe+delay_moov"} if fragmented else {}
    if suffix in MP4S and not fragmented and rng.integers(2):
        flags = {"movflags": "+faststart"}
    return ClipSpec(
        pts=pts,
        time_base=time_base,
        rate=RATES[rate],
        width=width,
        height=height,
        sounds=sounds,
        codec=codec.encoder,
        pix_fmt=pix_fmt,
        options=options,
        container_options=flags,
        rotate=(turn, bool(rng.integers(2)), False) if turn else None,
        aspect=_one(rng, (None, None, None, Fraction(4, 3))) if suffix in MP4S | {".mkv"} else None,
        picture=lambda index: moving_bar(index, width, height),
    )


def _size(rng: np.random.Generator, codec: Codec, pix_fmt: str) -> tuple[int, int]:
    if codec.sizes:
        return _one(rng, codec.sizes)
    even_only = codec.encoder in ("libx264", "libx265", "rawvideo", "huffyuv") and "444" not in pix_fmt
    return _one(rng, SIZES if even_only else SIZES + ODD_SIZES)


def _times(
    rng: np.random.Generator, suffix: str, codec: Codec, rate: str, edit: str
) -> tuple[tuple[int, ...], Fraction]:
    """Times of 8 to 16 frames: steady or not, from zero, from before it or from after it."""
    count = int(rng.integers(8, 17))
    if rate == "variable":
        steps = rng.choice([1, 7, 33, 40, 125], count - 1)
        pts, base = (0, *(int(n) for n in np.cumsum(steps))), Fraction(1, 1000)
        step = 40
    else:
        ticks = (
            1
            if suffix in (".avi", ".gif") or not codec.any_rate or codec.short_ticks
            else int(_one(rng, (1, 100)))
        )
        pts, base, step = tuple(ticks * n for n in range(count)), 1 / (RATES[rate] * ticks), ticks
    shift = {"none": 0, "hidden": -3 * step, "late": 5 * step}[edit]
    return tuple(n + shift for n in pts), base


def _damaged(data: bytes, damage: str, rng: np.random.Generator) -> bytes:
    """The end cut off, or a few short stretches of other bytes behind the head."""
    if damage == "tail":
        return data[: int(len(data) * rng.uniform(0.4, 0.98))]
    holes = bytearray(data)
    for _ in range(3):
        at = int(rng.integers(len(data) // 3, len(data) - 16))
        holes[at : at + 16] = rng.bytes(16)
    return bytes(holes)
