"""Clips as people have them: late clocks, rare sound, chapters and fonts, alpha, interlacing, animations."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.codec.context import Flags
from av.stream import Disposition
from PIL import Image
from support.media_samples import (
    Array,
    ClipSpec,
    Sound,
    frame_spans,
    frame_times,
    make_clip,
    moving_bar,
    rgb_to_yuv420,
    sound_packets,
    transcode,
)

from std_rt.core.errors import UsageError
from std_rt.media.sources import media_kind
from std_rt.media.video.clip import open_clip
from std_rt.media.video.deinterlacer import Deinterlacer

TICK = Fraction(1, 25)
STEADY = ClipSpec(codec="mpeg4", options={}, pts=range(15), time_base=TICK)


def same(frame: Array) -> Array:
    return frame


def never(frame: Array) -> Array:
    raise AssertionError("work was done before the input was checked")


def announced(source: Path, sink: Path, **options: Any) -> list[str]:
    """The lines that come before the first frame."""
    lines: list[str] = []
    before: list[str] = []

    def first(frame: Array) -> Array:
        before[:] = before or lines
        return frame

    report = transcode(source, sink, first, announce=lines.append, **options)
    assert lines == before == list(report.notes[: len(lines)])
    return lines


# --- clocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset_s", ["0", "95000", "95443.5"])  # the last wraps in MPEG's 33 bits
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("a.ts", ClipSpec(pts=tuple(range(0, 15 * 512, 512)), audio="aac")),
        ("a.mpg", replace(STEADY, codec="mpeg2video", audio="mp2")),
        ("a.mkv", replace(STEADY, audio="aac")),
        ("a.flv", replace(STEADY, codec="flv", audio="aac")),
        ("a.wmv", replace(STEADY, codec="msmpeg4", audio="libmp3lame")),
    ],
)
def test_a_clock_that_starts_late_starts_at_zero(
    tmp_path: Path, name: str, spec: ClipSpec, offset_s: str
) -> None:
    source = make_clip(tmp_path / name, replace(spec, container_options={"output_ts_offset": offset_s}))
    for sink in ("out.mp4", "out.mkv"):
        transcode(source, tmp_path / sink, same)
        with av.open(str(tmp_path / sink)) as container:
            assert container.start_time == 0
            assert container.duration is not None
            assert 0.55 < container.duration / av.time_base < 0.75
        assert abs(_lag_s(tmp_path / sink) - _lag_s(source)) <= Fraction(1, 1000)
        steps = np.diff([float(at) for at in frame_times(tmp_path / sink)])
        np.testing.assert_allclose(steps, 0.04, atol=0.0011)


def _lag_s(path: Path) -> Fraction:
    """How long after the sound the picture starts."""
    return frame_times(path)[0] - sound_packets(path)[0][0]


def test_a_segment_of_a_stream_starts_at_zero(tmp_path: Path) -> None:
    # Its fragments say when they are due in the whole stream; there is no edit list.
    options = {"preset": "ultrafast", "bf": "0"}
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    source = make_clip(tmp_path / "a.mp4", ClipSpec(options=options, container_options=flags))
    data = bytearray(source.read_bytes())
    at = data.index(b"tfdt") + 4
    assert data[at] == 1  # 64 bits
    struct.pack_into(">Q", data, at + 4, 500 * 12_800)
    source.write_bytes(data)
    assert frame_times(source)[0] == 500
    transcode(source, tmp_path / "out.mp4", same)
    assert frame_times(tmp_path / "out.mp4") == [Fraction(n, 25) for n in range(12)]


@pytest.mark.parametrize("offset_s", ["0", "5000"])
@pytest.mark.parametrize("first", ["early", "late"])
@pytest.mark.parametrize("suffix", [".ts", ".mpg"])
def test_joined_recordings_play_one_after_the_other(
    tmp_path: Path, suffix: str, first: str, offset_s: str
) -> None:
    spec = ClipSpec(pts=tuple(range(0, 50 * 512, 512)), audio="aac")
    if suffix == ".mpg":
        spec = replace(STEADY, codec="mpeg2video", audio="mp2", pts=range(50))
    parts = [
        make_clip(tmp_path / f"{name}{suffix}", replace(spec, container_options={"output_ts_offset": offset}))
        for name, offset in (("early", "0"), ("late", offset_s))
    ]
    joined = tmp_path / f"joined{suffix}"
    joined.write_bytes(b"".join(part.read_bytes() for part in (parts if first == "early" else parts[::-1])))
    report = transcode(joined, tmp_path / "out.mkv", same)
    assert report.frames == 100
    times, sounds = frame_times(report.output), sound_packets(report.output)
    assert times[0] <= Fraction(1, 25)
    np.testing.assert_allclose(np.diff([float(at) for at in times]), 0.04, atol=0.041)
    assert abs(times[-1] - Fraction(99, 25)) < Fraction(1, 5)
    steps = np.diff([float(at) for at, _ in sounds])
    assert steps.max() < 0.15
    lost = 2 * len(sound_packets(parts[0])) - len(sounds)
    assert lost <= 4
    assert abs(sounds[-1][0] - times[-1]) < Fraction(1, 5)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mjpeg"])
def test_frames_of_an_avi_are_steady(tmp_path: Path, codec: str) -> None:
    # With B-frames, whose times an AVI does not store.
    options = {"libx264": {"bf": "2", "preset": "ultrafast"}, "mpeg4": {"bf": "2"}}.get(codec, {})
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    source = make_clip(tmp_path / "a.avi", replace(STEADY, codec=codec, options=options, pix_fmt=pix_fmt))
    transcode(source, tmp_path / "out.mp4", same)
    assert frame_times(tmp_path / "out.mp4") == [Fraction(n, 25) for n in range(15)]


# --- sound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mkv", ".mov", ".mp4"])
def test_packets_shorter_than_a_millisecond_are_all_kept(tmp_path: Path, suffix: str) -> None:
    # As in TrueHD: 1200 packets a second in a container that counts milliseconds.
    source = _tiny_packets(tmp_path / "a.mkv", 2400, 40)
    times = [at for at, _ in sound_packets(source)]
    assert len(times) == 2400
    assert len(set(times)) < 2100
    report = transcode(source, tmp_path / f"out{suffix}", same, sound="copy")
    assert report.notes == ()
    if suffix == ".mkv":
        assert sound_packets(report.output) == sound_packets(source)
    assert _pcm(report.output) == _pcm(source)


def _tiny_packets(path: Path, count: int, samples: int) -> Path:
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=25)
        video.width, video.height = 64, 48
        sound: Any = container.add_stream("pcm_s16le", rate=48_000)
        sound.codec_context.layout = "stereo"
        for index in range(50):
            frame = av.VideoFrame.from_ndarray(moving_bar(index))
            frame.pts, frame.time_base = index, TICK
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for index in range(count):
            data = np.full((1, 2 * samples), index, np.int16)
            chunk = av.AudioFrame.from_ndarray(data, format="s16", layout="stereo")
            chunk.sample_rate, chunk.pts, chunk.time_base = 48_000, index * samples, Fraction(1, 48_000)
            container.mux(sound.encode(chunk))
    return path


def _pcm(path: Path) -> bytes:
    with av.open(str(path)) as container:
        return b"".join(bytes(packet) for packet in container.demux(audio=0))


def codecs(path: Path) -> list[str]:
    with av.open(str(path)) as container:
        return [stream.codec_context.codec.canonical_name for stream in container.streams.audio]


def heard(path: Path) -> Array:
    """The first sound's first channel at 48 kHz, from its first sample."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("fltp", "mono", 48_000)
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray()[0] for frame in frames])


@pytest.mark.parametrize(
    ("name", "sound", "sink", "codec", "way_out"),
    [
        ("a.avi", Sound("adpcm_ms", 2), "out.mp4", "aac", None),
        ("a.wmv", Sound("wmav2", 2, options={"b": "128k"}), "out.mkv", "aac", None),
        ("a.mkv", Sound("pcm_s16le"), "out.mp4", "aac", "--sound copy"),
        ("a.mkv", Sound("vorbis", 2, options={"strict": "-2"}), "out.mp4", "aac", "--sound copy"),
        ("a.avi", Sound("pcm_mulaw", rate=8000), "out.mp4", "aac", "-o out.mov"),
        ("a.mp4", Sound("aac"), "out.webm", "opus", "-o out.mkv"),
        ("a.mkv", Sound("flac"), "out.mov", "aac", "-o out.mkv"),
    ],
)
def test_sound_that_does_not_fit_is_converted_with_a_note(
    tmp_path: Path, name: str, sound: Sound, sink: str, codec: str, way_out: str | None
) -> None:
    spec = replace(STEADY, codec="wmv2" if name == "a.wmv" else "mpeg4", sounds=[sound])
    source = make_clip(tmp_path / name, spec)
    (line,) = announced(source, tmp_path / sink)
    assert f"converted to {'AAC' if codec == 'aac' else 'Opus'}" in line
    assert (way_out in line) if way_out else line.endswith(("AAC", "Opus"))
    assert codecs(tmp_path / sink) == [codec]
    before, after = heard(source), heard(tmp_path / sink)
    assert abs(len(before) - len(after)) < 0.05 * 48_000


def test_converted_sound_is_the_same_sound_at_the_same_time(tmp_path: Path) -> None:
    source = _clicks(tmp_path / "a.mkv", (0.2, 0.9, 1.7))
    transcode(source, tmp_path / "out.mp4", same, sound="convert")
    assert codecs(tmp_path / "out.mp4") == ["aac"]
    for path in (source, tmp_path / "out.mp4"):
        np.testing.assert_allclose(_loud_s(path), (0.2, 0.9, 1.7), atol=0.005)


def _clicks(path: Path, at_s: Sequence[float]) -> Path:
    """Silence with a short tone at each of these seconds; a gap of half a second follows the first second."""
    tone = np.sin(np.arange(480) * 0.3) * 0.8
    samples = np.zeros(2 * 48_000)
    for start_s in at_s:
        samples[int(start_s * 48_000) :][:480] = tone
    data = (samples * 32_767).astype(np.int16)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=25)
        video.width, video.height = 64, 48
        sound: Any = container.add_stream("pcm_s16le", rate=48_000)
        sound.codec_context.layout = "mono"
        for index in range(50):
            frame = av.VideoFrame.from_ndarray(moving_bar(index))
            frame.pts, frame.time_base = index, TICK
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for start in range(0, len(data), 480):
            if 48_000 <= start < 72_000:
                continue
            chunk = av.AudioFrame.from_ndarray(data[None, start : start + 480], format="s16", layout="mono")
            chunk.sample_rate, chunk.pts, chunk.time_base = 48_000, start, Fraction(1, 48_000)
            container.mux(sound.encode(chunk))
    return path


def _loud_s(path: Path) -> list[float]:
    """When each tone begins, by the times of the decoded frames."""
    starts: list[float] = []
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            level = np.abs(
                frame.to_ndarray().astype(float).ravel() / (1 if "flt" in frame.format.name else 32_768)
            )
            for index in np.flatnonzero(level > 0.3)[:1]:
                assert frame.time is not None
                at_s = frame.time + index / 48_000
                if not starts or at_s > starts[-1] + 0.1:
                    starts.append(at_s)
    return starts


@pytest.mark.parametrize("channels", ["3.0", "quad", "5.1", "7.1"])
def test_sound_of_many_channels_is_converted(tmp_path: Path, channels: str) -> None:
    source = make_clip(tmp_path / "v.avi", STEADY)
    count = av.AudioLayout(channels).nb_channels
    with av.open(str(source)) as video, av.open(str(tmp_path / "a.mkv"), "w") as container:
        copy = container.add_stream_from_template(video.streams.video[0], opaque=True)
        sound: Any = container.add_stream("pcm_s16le", rate=48_000)
        sound.codec_context.layout = channels
        for packet in video.demux(video=0):
            if packet.size:
                packet.stream = copy
                container.mux(packet)
        chunk = av.AudioFrame.from_ndarray(
            np.zeros((1, count * 28_800), np.int16), format="s16", layout=channels
        )
        chunk.sample_rate, chunk.pts = 48_000, 0
        container.mux(sound.encode(chunk))
    (line,) = announced(tmp_path / "a.mkv", tmp_path / "out.mp4")
    assert ("mixed down to stereo" in line) == (count in (3, 4))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec_context.channels == (2 if count in (3, 4) else count)


def test_sound_whose_channels_change_is_converted(tmp_path: Path) -> None:
    plain = ClipSpec(pts=tuple(range(0, 50 * 512, 512)))
    parts = [
        make_clip(tmp_path / f"{count}.ts", replace(plain, sounds=[Sound("ac3", count)])) for count in (1, 2)
    ]
    (tmp_path / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    report = transcode(tmp_path / "a.ts", tmp_path / "out.mp4", same, sound="convert")
    assert (report.frames, report.notes) == (100, ())
    samples = heard(report.output)
    assert abs(len(samples) - 4 * 48_000) < 0.15 * 48_000
    loud = np.abs(samples[: len(samples) // 4800 * 4800].reshape(-1, 4800)).mean(axis=1)
    assert np.median(loud[:20]) > 0.02
    assert np.median(loud[20:]) > 0.02


def test_sound_can_be_dropped(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mkv", replace(STEADY, audio="aac"))
    report = transcode(source, tmp_path / "out.mp4", same, sound="drop")
    assert (codecs(report.output), report.notes) == ([], ())


def test_a_sound_mode_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"auto, copy, convert, drop, got 'loud'"):
        transcode(make_clip(tmp_path / "a.mkv", STEADY), tmp_path / "out.mp4", never, sound="loud")


# --- everything else in the file -------------------------------------------------------------------------


def _rich(path: Path) -> Path:
    """A clip with two sounds (the second plays by default), chapters, a timecode and, in Matroska, a font."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=25)
        video.width, video.height = 64, 48
        video.metadata["timecode"] = "10:20:30:04"
        sounds: list[Any] = [container.add_stream("aac", rate=48_000) for _ in range(2)]
        sounds[0].disposition, sounds[1].disposition = Disposition.comment, Disposition.default
        parts = ((0, 300, "One"), (300, 600, "Two"))
        container.set_chapters(
            [
                {
                    "id": number,
                    "start": start,
                    "end": end,
                    "time_base": Fraction(1, 1000),
                    "metadata": {"title": title},
                }
                for number, (start, end, title) in enumerate(parts, 1)
            ]
        )
        if path.suffix == ".mkv":
            container.add_attachment("Font.ttf", "font/ttf", b"glyphs" * 20)
        for index in range(15):
            frame = av.VideoFrame.from_ndarray(moving_bar(index))
            frame.pts, frame.time_base = index, TICK
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for sound in sounds:
            for start in range(0, 28_800, 1024):
                chunk = av.AudioFrame.from_ndarray(
                    np.zeros((2, 1024), np.float32), format="fltp", layout="stereo"
                )
                chunk.sample_rate, chunk.pts = 48_000, start
                container.mux(sound.encode(chunk))
            container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov"])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov", ".webm"])
def test_chapters_timecode_flags_and_fonts_are_kept_or_named(tmp_path: Path, name: str, suffix: str) -> None:
    source = _rich(tmp_path / name)
    lines = [line for line in announced(source, tmp_path / f"out{suffix}") if "converted" not in line]
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        chapters = [
            (
                chapter["metadata"]["title"],
                chapter["start"] * chapter["time_base"],
                chapter["end"] * chapter["time_base"],
            )
            for chapter in container.chapters()
        ]
        assert chapters == [("One", 0, Fraction(3, 10)), ("Two", Fraction(3, 10), Fraction(6, 10))]
        tags = {key.lower(): value for key, value in container.streams.video[0].metadata.items()}
        assert tags["timecode"] == "10:20:30:04"
        first, second = (stream.disposition & Disposition.default for stream in container.streams.audio)
        assert (bool(first), bool(second)) == (False, True)
        fonts = [(stream.name, stream.data) for stream in container.streams.attachments]
    has_font, keeps_it = name == "a.mkv", suffix == ".mkv"
    assert fonts == ([("Font.ttf", b"glyphs" * 20)] if has_font and keeps_it else [])
    lost = ["its attachments (Font.ttf) are not copied; -o out.mkv keeps them"]
    assert lines == (lost if has_font and not keeps_it else [])


def test_chapters_move_with_the_clock(tmp_path: Path) -> None:
    source = _rich(tmp_path / "a.mkv")
    late = tmp_path / "late.mkv"
    with av.open(str(source)) as before, av.open(str(late), "w") as after:
        after.set_chapters(
            [
                {**one, "start": one["start"] + 7 * 10**9, "end": one["end"] + 7 * 10**9}
                for one in before.chapters()
            ]
        )
        streams = {
            s.index: after.add_stream_from_template(s, opaque=True)
            for s in before.streams
            if s.type != "attachment"
        }
        for packet in before.demux(list(before.streams.video) + list(before.streams.audio)):
            if packet.size:
                packet.pts, packet.dts = packet.pts + 7000, packet.dts + 7000
                packet.stream = streams[packet.stream.index]
                after.mux(packet)
    transcode(late, tmp_path / "out.mkv", same)
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert [one["start"] * one["time_base"] for one in container.chapters()] == [0, Fraction(3, 10)]


@pytest.mark.parametrize(("sink", "kept"), [("out.mkv", True), ("out.mp4", False)])
def test_subtitles_are_copied_or_named(tmp_path: Path, sink: str, kept: bool) -> None:
    source = _with_subtitles(tmp_path / "a.mkv")
    lines = announced(source, tmp_path / sink)
    assert lines == ([] if kept else ["its subtitles (subrip) are not copied; -o out.mkv keeps them"])
    with av.open(str(tmp_path / sink)) as container:
        texts = (
            [bytes(packet) for packet in container.demux(*container.streams.subtitles) if packet.size]
            if kept
            else []
        )
        assert len(container.streams.subtitles) == kept
    assert texts == ([b"Hello", b"Again"] if kept else [])


def _with_subtitles(path: Path) -> Path:
    text = path.with_suffix(".srt")
    text.write_text(
        "1\n00:00:00,100 --> 00:00:00,200\nHello\n\n2\n00:00:00,300 --> 00:00:00,500\nAgain\n",
        encoding="utf-8",
    )
    plain = make_clip(path.with_name("plain.mkv"), replace(STEADY, audio="aac"))
    with av.open(str(plain)) as clip, av.open(str(text)) as words, av.open(str(path), "w") as both:
        streams: dict[int, Any] = {
            s.index: both.add_stream_from_template(s, opaque=True) for s in clip.streams
        }
        subtitles: Any = both.add_stream_from_template(words.streams.subtitles[0])
        for packet in words.demux():
            if packet.size:
                packet.stream = subtitles
                both.mux(packet)
        for packet in clip.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                both.mux(packet)
    return path


def test_closed_captions_and_3d_layouts_are_named_before_work(tmp_path: Path) -> None:
    plain = {"preset": "ultrafast", "bf": "0"}
    flat = make_clip(tmp_path / "flat.h264", ClipSpec(options=plain))
    assert announced(flat, tmp_path / "flat.mp4") == []
    options = plain | {"x264-params": "frame-packing=3"}
    stereo = make_clip(tmp_path / "3d.mp4", ClipSpec(options=options))
    assert announced(stereo, tmp_path / "x.mp4") == ["not kept: the layout of its 3-D picture"]
    # ATSC A/53 part 4: one pair of bytes in each picture, in front of its slice.
    captions = b"\xb5\x00\x31GA94\x03\xc1\xff\xfc\x94\x20\xff"
    message = b"\x00\x00\x01\x06\x04" + bytes([len(captions)]) + captions + b"\x80"
    data = flat.read_bytes()
    for slice_start in (b"\x00\x00\x01\x65", b"\x00\x00\x01\x41"):
        data = data.replace(slice_start, message + slice_start)
    (tmp_path / "cc.h264").write_bytes(data)
    lines = announced(tmp_path / "cc.h264", tmp_path / "cc.mp4")
    assert lines == ["not kept: closed captions inside the picture"]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_a_cover_is_kept_or_named(tmp_path: Path, name: str, suffix: str) -> None:
    source = _with_cover(tmp_path / "a.mp4")
    if name != source.name:
        source = transcode(source, tmp_path / name, same).output
    lost = ["its cover picture is not copied; -o out.mkv keeps it"]
    assert announced(source, tmp_path / f"out{suffix}") == (lost if suffix in (".webm", ".mov") else [])
    assert len(frame_times(tmp_path / f"out{suffix}")) == 5
    found = _covers(tmp_path / f"out{suffix}")
    assert found == ([] if suffix in (".webm", ".mov") else _covers(source))


def _covers(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        covers = [
            stream for stream in container.streams.video if stream.disposition & Disposition.attached_pic
        ]
        return [bytes(next(container.demux(stream))) for stream in covers]


def _with_cover(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=25)
        video.width, video.height = 64, 48
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(np.zeros((24, 16), np.uint8), format="yuvj420p")
        container.mux([*cover.encode(image), *cover.encode(None)])
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(moving_bar(index))
            frame.pts, frame.time_base = index, TICK
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    assert len(_covers(path)) == 1
    return path


def test_data_tracks_are_named_before_work(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.ts"), "w") as container:
        video: Any = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.width, video.height = 64, 48
        data: Any = container.add_data_stream("klv")
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(moving_bar(index))
            frame.pts, frame.time_base = index, TICK
            container.mux(video.encode(frame))
            packet: Any = av.Packet(b"position")
            packet.stream, packet.pts, packet.dts, packet.time_base = data, index, index, TICK
            container.mux(packet)
        container.mux(video.encode(None))
    assert announced(tmp_path / "a.ts", tmp_path / "out.mp4") == ["data tracks are not copied (klv)"]


# --- transparency ----------------------------------------------------------------------------------------

RED, GREEN = (200, 0, 0), (0, 255, 0)


def see_through(index: int = 0) -> Array:
    """uint8 [48, 64, 4]: red, half transparent in the middle; on the left green that is hidden."""
    pixels = np.empty((48, 64, 4), np.uint8)
    pixels[...] = (*RED, 255)
    pixels[:, :20] = (*GREEN, 0)
    pixels[:, 20:40, 3] = 128
    pixels[40:, 40 + index] = 255
    return pixels


def _encoded(path: Path, codec: str, pix_fmt: str, options: dict[str, str] | None = None) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for index in range(4):
            frame = av.VideoFrame.from_ndarray(see_through(index), format="rgba").reformat(format=pix_fmt)
            frame.pts, frame.time_base = index, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _animated(path: Path, **options: Any) -> Path:
    frames = [Image.fromarray(see_through(index)) for index in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 50, 200, 700], **options)
    return path


WITH_ALPHA: dict[str, Callable[[Path], Path]] = {
    "vp9.webm": lambda path: _encoded(path, "libvpx-vp9", "yuva420p", {"cpu-used": "8", "crf": "4"}),
    "vp8.webm": lambda path: _encoded(
        path, "libvpx", "yuva420p", {"auto-alt-ref": "0", "crf": "4", "b": "5M"}
    ),
    "prores.mov": lambda path: _encoded(path, "prores_ks", "yuva444p10le"),
    "qtrle.mov": lambda path: _encoded(path, "qtrle", "argb"),
    "png.mov": lambda path: _encoded(path, "png", "rgba"),
    "ffv1.mkv": lambda path: _encoded(path, "ffv1", "yuva420p"),
    "a.webp": lambda path: _animated(path, lossless=True),
    "a.avif": lambda path: _animated(path, quality=100),
    "a.png": _animated,
}


def alpha_frames(path: Path) -> list[Array]:
    """uint8 [H, W, 4] each; the alpha of VP9 by the one decoder that has it."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoder: Any = stream.codec_context
        if {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1":
            decoder = av.CodecContext.create("libvpx-vp9", "r")
            decoder.extradata = stream.codec_context.extradata
        frames = [
            frame for packet in container.demux(stream) if packet.size for frame in decoder.decode(packet)
        ]
        return [frame.to_ndarray(format="rgba") for frame in [*frames, *decoder.decode(None)]]


@pytest.mark.parametrize("name", WITH_ALPHA)
def test_transparency_lies_over_white_where_the_output_has_none(tmp_path: Path, name: str) -> None:
    source = WITH_ALPHA[name](tmp_path / name)
    seen: list[Array] = []

    def see(frame: Array) -> Array:
        seen.append(frame)
        return frame

    report = transcode(source, tmp_path / "out.mp4", see)
    assert report.notes == (
        "transparent parts are laid over white; -o out.webm or out.mov keeps them transparent",
    )
    _check_columns(seen[0], (255, 255, 255), (227, 127, 127), RED)
    result = alpha_frames(report.output)
    assert len(result) == 4
    _check_columns(result[0], (255, 255, 255, 255), (227, 127, 127, 255), (*RED, 255))


@pytest.mark.parametrize("name", WITH_ALPHA)
@pytest.mark.parametrize("sink", ["out.webm", "out.mov", "out.mkv"])
def test_transparency_is_kept_where_the_output_has_it(tmp_path: Path, name: str, sink: str) -> None:
    source = WITH_ALPHA[name](tmp_path / name)
    report = transcode(source, tmp_path / sink, lambda frame: frame.repeat(2, axis=0).repeat(2, axis=1))
    assert report.notes == ()
    result = alpha_frames(report.output)
    assert len(result) == 4
    assert result[0].shape == (96, 128, 4)
    for frame in result:
        _check_columns(frame[::2, ::2], (255, 255, 255, 0), (*RED, 128), (*RED, 255))


def _check_columns(frame: Array, left: Sequence[int], middle: Sequence[int], right: Sequence[int]) -> None:
    found = np.stack([frame[4:36, at].mean(axis=0) for at in (8, 30, 52)])
    np.testing.assert_allclose(found, [left, middle, right], atol=8)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.avif"])
def test_an_opaque_animation_needs_no_alpha_and_no_note(tmp_path: Path, name: str) -> None:
    frames = [Image.fromarray(moving_bar(index)) for index in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    for sink in ("out.mp4", "out.webm"):
        assert transcode(tmp_path / name, tmp_path / sink, same).notes == ()
        with av.open(str(tmp_path / sink)) as container:
            assert "alpha_mode" not in {key.lower() for key in container.streams.video[0].metadata}


# --- animated pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.avif"])
def test_animated_pictures_are_clips_all_alike(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (33, 16), (200, 40 * i, 0)) for i in range(5)]
    lasts_ms = [100, 50, 200, 300, 700]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=lasts_ms)
    assert media_kind(tmp_path / name) == "video"
    seen: list[Array] = []

    def see(frame: Array) -> Array:
        seen.append(frame)
        return frame

    report = transcode(tmp_path / name, tmp_path / "out.mp4", see)
    assert (report.frames, report.notes) == (5, ())
    assert frame_spans(report.output) == [Fraction(ms, 1000) for ms in lasts_ms]
    for index, frame in enumerate(seen):
        np.testing.assert_allclose(frame[8, 16], (200, 40 * index, 0), atol=6)


@pytest.mark.parametrize("name", ["a.webp", "a.avif"])
def test_a_still_picture_stays_a_picture(tmp_path: Path, name: str) -> None:
    Image.fromarray(moving_bar(0)).save(tmp_path / name)
    assert media_kind(tmp_path / name) == "picture"


def test_a_damaged_animation_is_done_as_far_as_it_goes(tmp_path: Path) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    path = tmp_path / "a.avif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, quality=80)
    data = bytearray(path.read_bytes())
    at = len(data) * 2 // 3
    data[at : at + 4000] = bytes(4000)
    path.write_bytes(data)
    report = transcode(path, tmp_path / "out.mp4", same)
    assert 0 < report.frames < 6
    assert "damaged or truncated" in report.notes[0]


# --- interlacing -----------------------------------------------------------------------------------------


def _interlaced(path: Path, codec: str, **options: str) -> Path:
    """A bar that moves four pixels from field to field, the upper one first."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
        stream.codec_context.flags |= Flags.interlaced_dct | Flags.interlaced_me
        for index in range(8):
            rgb = np.zeros((64, 96, 3), np.uint8)
            for field in range(2):
                left = 8 + 4 * (2 * index + field)
                rgb[field::2, left : left + 16] = 255
            frame = av.VideoFrame.from_ndarray(rgb).reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = index, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _combing(frame: Array) -> float:
    """Mean difference of a line to the one below less that to the one after: above 0 for doubled edges."""
    grey = frame[..., 1].astype(float)
    return float(np.abs(grey[1:-1] - grey[:-2]).mean() - np.abs(grey[2:] - grey[:-2]).mean())


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"preset": "ultrafast", "crf": "4", "x264-params": "tff=1"}),
        ("a.mkv", "mpeg2video", {"field_order": "tt", "q": "2"}),
        ("a.mov", "prores_ks", {"field_order": "tt"}),
    ],
)
def test_interlaced_clips_come_out_without_doubled_edges(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    source = _interlaced(tmp_path / name, codec, **options)
    seen: list[Array] = []

    def see(frame: Array) -> Array:
        seen.append(frame)
        return frame

    report = transcode(source, tmp_path / "out.mp4", see)
    assert report.notes == ("it is interlaced and was deinterlaced (bwdif)",)
    assert frame_times(report.output) == frame_times(source)
    with av.open(str(source)) as container:
        before = [_combing(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert min(before) > 5
    assert max(_combing(frame) for frame in seen[1:]) < 1


def test_rotation_range_and_matrix_survive_deinterlacing(tmp_path: Path) -> None:
    tags = (1, 2, 1, 1)  # BT.709, full range
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        options = {"preset": "ultrafast", "crf": "4", "x264-params": "tff=1"}
        stream: Any = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(90, hflip=False, vflip=False)
        context = stream.codec_context
        context.flags |= Flags.interlaced_dct
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = tags
        rgb = np.full((64, 96, 3), (200, 60, 30), np.uint8)
        for index in range(4):
            planes = rgb_to_yuv420(rgb, matrix=1, full=True)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = tags
            frame.pts, frame.time_base = index, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with open_clip(tmp_path / "a.mp4") as clip:
        frames = list(clip.read())
        assert "deinterlaced" in clip.notes(stopped=False)[0]
    for one in frames:
        assert (one.rgb.shape, one.rotation) == ((96, 64, 3), 270)
        np.testing.assert_allclose(one.rgb.mean(axis=(0, 1)), (200, 60, 30), atol=3)


def test_progressive_clips_are_not_touched(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4")
    with open_clip(source) as clip, av.open(str(source)) as container:
        for ours, frame in zip(clip.read(), container.decode(video=0), strict=True):
            assert np.abs(ours.rgb.astype(int) - frame.to_ndarray(format="rgb24")).mean() < 2
        assert clip.notes(stopped=False) == []


def test_progressive_frames_of_an_interlaced_clip_are_not_touched(tmp_path: Path) -> None:
    spec = ClipSpec(
        width=96, height=64, options={"preset": "ultrafast", "bf": "0"}, pts=range(8), time_base=TICK
    )
    clips = (
        _interlaced(tmp_path / "a.mp4", "libx264", preset="ultrafast"),
        make_clip(tmp_path / "b.mp4", spec),
    )
    deinterlacer, done = Deinterlacer(), []
    with av.open(str(clips[0])) as first, av.open(str(clips[1])) as second:
        frames = [*first.decode(video=0), *second.decode(video=0)]
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = index, TICK
            done += deinterlacer.run(frame)
        done += deinterlacer.flush()
    assert [frame.pts for frame in done] == list(range(16))
    for before, after in zip(frames[8:], done[8:], strict=True):
        np.testing.assert_array_equal(before.to_ndarray(), after.to_ndarray())
