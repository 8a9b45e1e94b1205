"""Clips: times, sound, colour and geometry survive; every way to break off leaves a whole file or none."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from support.media_samples import (
    Array,
    ClipSpec,
    frame_spans,
    frame_times,
    make_clip,
    moving_bar,
    rgb_frames,
    rgb_to_yuv420,
    sound_packets,
    transcode,
    yuv_planes,
    yuv_to_rgb,
)

from std_rt.core.errors import MediaError
from std_rt.media import probe
from std_rt.media.video.transcode import _DECODED_AHEAD, _STYLED_AHEAD

MS = Fraction(1, 1000)
VARIABLE = (0, 40, 55, 120, 121, 300, 333, 400, 900, 940)


def same(frame: Array) -> Array:
    """The stylizer that changes nothing."""
    return frame


def keeping(seen: list[Array]) -> Callable[[Array], Array]:
    """The same, noting what it was given."""

    def note(frame: Array) -> Array:
        seen.append(frame)
        return frame

    return note


def left_over(folder: Path, *known: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


# --- times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "out", "spec"),
    [
        ("b_frames.mp4", "out.mp4", ClipSpec()),
        ("variable.mp4", "out.mp4", ClipSpec(pts=VARIABLE, time_base=MS)),
        ("variable.mkv", "out.mkv", ClipSpec(pts=VARIABLE, time_base=MS)),
        ("variable.mkv", "out.mp4", ClipSpec(pts=VARIABLE, time_base=MS)),
        ("late.mp4", "out.mp4", ClipSpec(pts=tuple(range(5000, 5000 + 10 * 512, 512)))),
        ("late.mkv", "out.mkv", ClipSpec(pts=tuple(range(1234, 1234 + 400, 40)), time_base=MS)),
        (
            "ntsc.mov",
            "out.mov",
            ClipSpec(pts=tuple(range(0, 12 * 1001, 1001)), time_base=Fraction(1, 30_000)),
        ),
        (
            "late_ntsc.mp4",
            "out.mp4",
            ClipSpec(pts=tuple(range(1001, 12_012, 1001)), time_base=Fraction(1, 30_000)),
        ),
        (
            "vp9.webm",
            "out.webm",
            ClipSpec(pts=VARIABLE, time_base=MS, codec="libvpx-vp9", options={"cpu-used": "8"}),
        ),
        (
            "mpeg4.avi",
            "out.mp4",
            ClipSpec(codec="mpeg4", pts=tuple(range(10)), time_base=Fraction(1, 25), options={}),
        ),
        ("broadcast.ts", "out.mp4", ClipSpec()),
    ],
)
def test_frames_keep_their_number_and_times(tmp_path: Path, name: str, out: str, spec: ClipSpec) -> None:
    source = make_clip(tmp_path / name, spec)
    report = transcode(source, tmp_path / out if out != name else tmp_path / f"x{out}", same)
    expected = frame_times(source)
    if not name.endswith((".mp4", ".mov")):  # Only an edit list means a late start.
        expected = [at - expected[0] for at in expected]
    assert len(expected) == len(spec.pts)  # the sample itself is whole
    assert report.frames == len(expected)
    assert not report.stopped
    assert report.notes == ()
    assert frame_times(report.output) == expected


def test_last_frame_keeps_its_duration(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), (0, 0, 60 * i)) for i in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100, 50, 200, 700])
    transcode(tmp_path / "a.gif", tmp_path / "out.mp4", same)
    assert frame_spans(tmp_path / "out.mp4") == [Fraction(n, 100) for n in (10, 5, 20, 70)]


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_animated_pictures_go_the_video_way(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGBA", (20, 16), (200, 40 * i, 0, 255)) for i in range(5)]
    frames[0].putpixel((0, 0), (0, 0, 0, 0))
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=120)
    seen: list[Array] = []
    report = transcode(tmp_path / name, tmp_path / "out.mp4", keeping(seen))
    assert report.frames == 5
    assert frame_times(report.output) == [Fraction(12 * i, 100) for i in range(5)]
    assert seen[0][0, 0].tolist() == [255, 255, 255]  # transparent: white
    assert seen[4][8, 8].tolist() == [200, 160, 0]


def test_edit_list_hides_what_it_hides(tmp_path: Path) -> None:
    # Frames before time zero: MP4 keeps them for decoding and an edit list skips them.
    source = make_clip(tmp_path / "a.mp4", ClipSpec(pts=tuple(range(-4 * 512, 8 * 512, 512))))
    expected = frame_times(source)
    report = transcode(source, tmp_path / "out.mp4", same)
    assert report.frames == len(expected)
    assert frame_times(report.output) == expected
    assert report.notes == ()


# --- sound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "out", "audio"),
    [
        ("a.mp4", "out.mp4", "aac"),
        ("a.mov", "out.mov", "pcm_s16le"),
        ("a.mkv", "out.mkv", "flac"),
        ("a.webm", "out.webm", "libopus"),
        ("a.mkv", "out.mp4", "aac"),
    ],
)
def test_sound_is_copied_bit_by_bit(tmp_path: Path, name: str, out: str, audio: str) -> None:
    spec = (
        ClipSpec(audio=audio, codec="libvpx-vp9", options={"cpu-used": "8"})
        if audio == "libopus"
        else ClipSpec(audio=audio)
    )
    source = make_clip(tmp_path / name, spec)
    report = transcode(source, tmp_path / out, same)
    before, after = sound_packets(source), sound_packets(report.output)
    assert len(before) >= 5
    assert [packet[1] for packet in after] == [packet[1] for packet in before]
    # Matroska counts milliseconds, MP4 samples.
    assert max(abs(a[0] - b[0]) for a, b in zip(after, before, strict=True)) <= MS / 2


def test_late_sound_stays_late(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4", ClipSpec(audio="aac", audio_start=9600))
    transcode(source, tmp_path / "out.mp4", same)
    assert sound_packets(tmp_path / "out.mp4") == sound_packets(source)


def test_sound_that_does_not_fit_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4", ClipSpec(audio="aac"))
    with pytest.raises(MediaError, match=r"aac sound .* out\.mkv or --sound convert"):
        transcode(source, tmp_path / "out.webm", _never, sound="copy")
    assert left_over(tmp_path, "a.mp4") == []


def test_clip_without_sound(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4")
    transcode(source, tmp_path / "out.mp4", same)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.audio


@pytest.mark.parametrize("cover", [False, True])
def test_sound_only_is_refused(tmp_path: Path, cover: bool) -> None:
    path = _sound_file(tmp_path / "a.m4a", cover)
    with pytest.raises(MediaError, match="only sound"):
        transcode(path, tmp_path / "out.mp4", same)
    with pytest.raises(MediaError, match="only sound"):
        probe(path)


def _sound_file(path: Path, cover: bool) -> Path:
    with av.open(str(path), "w", format="mp4") as container:
        sound: Any = container.add_stream("aac", rate=48_000)
        picture: Any = container.add_stream("mjpeg", rate=1) if cover else None
        if cover:
            picture.width, picture.height, picture.pix_fmt = 16, 16, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(np.zeros((24, 16), np.uint8), format="yuvj420p")
            container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        for index in range(8):
            chunk = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            chunk.sample_rate, chunk.pts = 48_000, index * 1024
            container.mux(sound.encode(chunk))
        container.mux(sound.encode(None))
    return path


# --- geometry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_is_applied_to_the_pixels(tmp_path: Path, degrees: int, flip: bool) -> None:
    source = make_clip(
        tmp_path / "a.mp4", ClipSpec(rotate=(degrees, flip, False), picture=lambda _: moving_bar(2))
    )
    # FFmpeg turns by `degrees` counter-clockwise, then mirrors.
    upright = np.rot90(moving_bar(2), degrees // 90)
    upright = upright[:, ::-1] if flip else upright
    info = probe(source)
    assert (info.height, info.width) == upright.shape[:2]
    assert flip or info.rotation == -degrees % 360
    transcode(source, tmp_path / "out.mp4", same)
    result = rgb_frames(tmp_path / "out.mp4")[0]
    assert np.abs(result.astype(int) - upright).mean() < 6
    assert probe(tmp_path / "out.mp4").rotation == 0


@pytest.mark.parametrize("size", [(1, 1), (33, 17), (2, 3)])
def test_odd_sides_get_their_last_line_repeated(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = [Image.new("RGB", size, (0, 0, 90 * i)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    report = transcode(tmp_path / "a.gif", tmp_path / "out.mp4", same)
    assert (report.width, report.height) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    last = rgb_frames(report.output)[-1]
    np.testing.assert_allclose(last, np.broadcast_to([0, 0, 180], last.shape), atol=4)


@pytest.mark.parametrize(("degrees", "expected"), [(0, Fraction(4, 3)), (90, Fraction(3, 4))])
def test_oblong_pixels_stay_oblong(tmp_path: Path, degrees: int, expected: Fraction) -> None:
    source = make_clip(tmp_path / "a.mp4", ClipSpec(aspect=Fraction(4, 3), rotate=(degrees, False, False)))
    transcode(source, tmp_path / "out.mp4", same)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == expected


def test_stylizer_sets_the_size(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4")
    report = transcode(source, tmp_path / "out.mp4", lambda frame: frame[::2, ::2])
    assert (report.width, report.height) == (32, 24)
    assert rgb_frames(report.output)[0].shape == (24, 32, 3)


def test_size_that_changes_is_held_and_told(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4")
    sizes = iter([32, 32] + [64] * 10)
    report = transcode(source, tmp_path / "out.mp4", lambda _: np.zeros((32, next(sizes), 3), np.uint8))
    assert (report.width, report.height) == (32, 32)
    assert "10 frames were resized" in report.notes[0]


# --- colour ----------------------------------------------------------------------------------------------

CHART = np.kron(np.random.default_rng(5).integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
CHART[:8] = np.linspace(0, 255, 8).astype(np.uint8).repeat(8)[None, :, None]  # one row of greys
INSIDE = np.zeros((48, 64), bool)
INSIDE.reshape(6, 8, 8, 8)[:, 3:5, :, 3:5] = True  # away from edges, where 4:2:0 blurs


@pytest.mark.parametrize("matrix", [1, 6])
@pytest.mark.parametrize("full", [False, True])
def test_colours_come_through_and_are_tagged(tmp_path: Path, matrix: int, full: bool) -> None:
    tags = (matrix, 2 if full else 1, matrix, matrix)
    options = {"qp": "0", "preset": "ultrafast"}
    spec = ClipSpec(tags=tags, options=options, picture=lambda _: rgb_to_yuv420(CHART, matrix, full))
    source = make_clip(tmp_path / "a.mp4", spec)
    seen: list[Array] = []
    transcode(source, tmp_path / "out.mp4", keeping(seen), crf=1)
    assert np.abs(seen[0].astype(int) - CHART)[INSIDE].max() <= 4
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.color_primaries) == (matrix, 1, matrix)
        result = yuv_to_rgb(yuv_planes(frame), matrix, full=False)
    assert np.abs(result - CHART)[INSIDE].max() <= 7


def test_grey_clip_keeps_black_and_white(tmp_path: Path) -> None:
    grey = CHART[..., 0]
    spec = ClipSpec(
        codec="ffv1", pix_fmt="gray", options={}, picture=lambda _: grey, pts=(0, 40), time_base=MS
    )
    seen: list[Array] = []
    transcode(make_clip(tmp_path / "a.mkv", spec), tmp_path / "out.mp4", keeping(seen))
    assert np.abs(seen[0].astype(int) - grey[..., None]).max() <= 1


@pytest.mark.parametrize(("height", "matrix"), [(48, 6), (720, 1)])
def test_untagged_clips_are_read_as_players_do(tmp_path: Path, height: int, matrix: int) -> None:
    chart = np.kron(CHART[::8, ::8], np.ones((height // 6, height // 6, 1), np.uint8))
    flat = rgb_to_yuv420(chart, matrix, full=False)
    size = {"height": height, "width": chart.shape[1]}
    options = {"qp": "0", "preset": "ultrafast"}
    source = make_clip(
        tmp_path / "a.mp4", ClipSpec(pts=(0,), options=options, picture=lambda _: flat, **size)
    )
    seen: list[Array] = []
    transcode(source, tmp_path / "out.mp4", keeping(seen))
    cell = height // 6
    assert np.abs(seen[0].astype(int) - chart)[cell // 2 :: cell, cell // 2 :: cell].max() <= 4


# --- breaking off ----------------------------------------------------------------------------------------


def test_damaged_index_is_refused(tmp_path: Path) -> None:
    data = make_clip(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 2 // 3])  # the index is at the end
    with pytest.raises(MediaError, match=r"a\.mp4 cannot be read as a video .*index"):
        transcode(tmp_path / "a.mp4", tmp_path / "out.mp4", same)
    assert left_over(tmp_path, "a.mp4") == []


@pytest.mark.parametrize("flags", ["faststart", "frag_keyframe+empty_moov"])
def test_missing_end_is_done_as_far_as_it_goes(tmp_path: Path, flags: str) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    options = {"crf": "20", "g": "4", "bf": "0", "preset": "ultrafast"}
    spec = ClipSpec(
        pts=tuple(range(0, 20 * 512, 512)),
        options=options,
        container_options={"movflags": flags},
        picture=lambda index: np.asarray(noise[index]),
    )
    data = make_clip(tmp_path / "a.mp4", spec).read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 2 // 3])
    report = transcode(tmp_path / "a.mp4", tmp_path / "out.mp4", same)
    assert 5 < report.frames < 20
    assert len(frame_times(report.output)) == report.frames
    if flags == "faststart":  # A fragmented file does not say how long it was.
        told = "the input is damaged or truncated; everything decodable was processed"
        assert report.notes == (f"{told} ({report.frames} of 20 frames)",)


def test_a_clip_that_another_program_made_meanwhile_stays(tmp_path: Path) -> None:
    source, sink = make_clip(tmp_path / "a.mp4", ClipSpec()), tmp_path / "out.mp4"
    (tmp_path / "out_2.mp4").write_bytes(b"and this one")

    def beside(done: int, total: int | None) -> None:
        sink.write_bytes(b"another's")

    report = transcode(source, sink, same, progress=beside)
    assert (sink.read_bytes(), report.output) == (b"another's", tmp_path / "out_2_2.mp4")
    assert (tmp_path / "out_2.mp4").read_bytes() == b"and this one"
    assert len(frame_times(report.output)) == report.frames
    assert transcode(source, sink, same, progress=beside, overwrite=True).output == sink
    assert left_over(tmp_path) == ["a.mp4", "out.mp4", "out_2.mp4", "out_2_2.mp4"]


@pytest.mark.parametrize("audio", [None, "aac"])
def test_matroska_without_its_end_is_told_too(tmp_path: Path, audio: str | None) -> None:
    source = make_clip(tmp_path / "a.mkv", ClipSpec(pts=tuple(range(0, 60 * 512, 512)), audio=audio))
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 3])
    report = transcode(source, tmp_path / "out.mkv", same)
    assert 0 < report.frames < 60
    assert any("truncated" in note for note in report.notes)


@pytest.mark.parametrize("content", [b"", b"text " * 99, bytes(4000)])
def test_things_that_are_no_clip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(MediaError) as caught:
        transcode(tmp_path / "a.mp4", tmp_path / "out.mp4", same)
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path, "a.mp4") == []


def test_playlists_and_text_are_not_opened_as_video(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n", encoding="utf-8")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {clip.name}\n", encoding="utf-8")
    (tmp_path / "art.ans").write_text("text art\n" * 50, encoding="utf-8")
    for name in ("list.m3u8", "list.ffconcat", "art.ans"):
        with pytest.raises(MediaError):
            probe(tmp_path / name)


def test_stopping_leaves_a_playable_file(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4", ClipSpec(pts=tuple(range(0, 40 * 512, 512)), audio="aac"))
    done: list[tuple[int, int | None]] = []
    report = transcode(
        source,
        tmp_path / "out.mp4",
        same,
        progress=lambda frames, total: done.append((frames, total)),
        should_stop=lambda: len(done) == 7,
    )
    assert report.stopped
    assert report.frames == 7
    assert done[-1] == (7, 40)
    assert frame_times(report.output) == frame_times(source)[:7]
    assert 0 < len(sound_packets(report.output)) <= len(sound_packets(source))
    assert left_over(tmp_path, "a.mp4") == ["out.mp4"]


def test_stopping_keeps_a_finished_clip_that_was_to_be_replaced(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4", ClipSpec(pts=tuple(range(0, 40 * 512, 512))))
    (tmp_path / "out.mp4").write_bytes(b"whole")
    done: list[int] = []
    report = transcode(
        source,
        tmp_path / "out.mp4",
        same,
        overwrite=True,
        progress=lambda frames, total: done.append(frames),
        should_stop=lambda: len(done) == 7,
    )
    assert (report.stopped, report.output) == (True, tmp_path / "out_stopped.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == b"whole"
    assert frame_times(report.output) == frame_times(source)[:7]
    assert left_over(tmp_path) == ["a.mp4", "out.mp4", "out_stopped.mp4"]


def test_stopping_at_once_leaves_nothing(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4")
    (tmp_path / "out.mp4").write_bytes(b"older")
    report = transcode(source, tmp_path / "out.mp4", same, should_stop=lambda: True, overwrite=True)
    assert report.stopped
    assert report.frames == 0
    assert (tmp_path / "out.mp4").read_bytes() == b"older"
    assert left_over(tmp_path) == ["a.mp4", "out.mp4"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failing_stylizer_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    source = make_clip(tmp_path / "a.mp4", ClipSpec(audio="aac"))
    calls: list[int] = []

    def fail(frame: Array) -> Array:
        calls.append(1)
        if len(calls) == 6:
            raise error("broken on purpose")
        return frame

    with pytest.raises(error, match="on purpose"):
        transcode(source, tmp_path / "out.mp4", fail)
    assert left_over(tmp_path, "a.mp4") == []


# --- where it is written ---------------------------------------------------------------------------------


def _never(frame: Array) -> Array:
    raise AssertionError("work was done before the output was checked")


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4")
    (tmp_path / "out.mp4").write_bytes(b"older")
    with pytest.raises(MediaError, match="--overwrite"):
        transcode(source, tmp_path / "out.mp4", _never)
    assert transcode(source, tmp_path / "out.mp4", same, overwrite=True).frames == 12


def test_output_on_the_input_is_refused(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4")
    (tmp_path / "sub").mkdir()
    with pytest.raises(MediaError, match="input itself"):
        transcode(source, tmp_path / "sub" / ".." / "a.mp4", _never, overwrite=True)


@pytest.mark.parametrize("out", ["file/out.mp4", "folder", "out.xyz", "out.gif"])
def test_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path, out: str) -> None:
    source = make_clip(tmp_path / "a.mp4")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(MediaError):
        transcode(source, tmp_path / out, _never)
    assert left_over(tmp_path, "a.mp4", "file", "folder") == []


@pytest.mark.parametrize("name", ["%d.mp4", "-i.mp4", "a:b.mp4", "käse 雪.mp4", "x" * 240 + ".mp4"])
def test_odd_names_are_only_names(tmp_path: Path, name: str) -> None:
    if sys.platform == "win32" and ":" in name:
        pytest.skip("not a name on Windows")
    source = make_clip(tmp_path / "plain.mp4", ClipSpec(pts=(0, 512)))
    named = source.rename(tmp_path / name)
    assert transcode(named, tmp_path / "out" / name, same).frames == 2


def test_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4", ClipSpec(pts=(0, 512)))
    with pytest.raises(MediaError, match="cannot be written"):
        transcode(source, tmp_path / ("x" * 300 + ".mp4"), _never)


def test_unknown_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="libx264"):
        transcode(make_clip(tmp_path / "a.mp4"), tmp_path / "out.mp4", _never, codec="nonsense")


# --- memory ----------------------------------------------------------------------------------------------


def test_memory_stays_flat(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "a.mp4", ClipSpec(pts=tuple(range(0, 60 * 512, 512)), audio="aac"))
    given: list[weakref.ref[Array]] = []
    results: list[weakref.ref[Array]] = []
    most = 0

    def watch(frame: Array) -> Array:
        nonlocal most
        result = frame.copy()
        given.append(weakref.ref(frame))
        results.append(weakref.ref(result))
        most = max(most, *(sum(ref() is not None for ref in refs) for refs in (given, results)))
        return result

    assert transcode(source, tmp_path / "out.mp4", watch).frames == 60
    assert 1 <= most <= _DECODED_AHEAD + _STYLED_AHEAD + 2  # those in the hands of the threads


def test_probe_tells_what_is_in_a_clip(tmp_path: Path) -> None:
    info = probe(make_clip(tmp_path / "a.mp4", ClipSpec(audio="aac")))
    assert (info.width, info.height, info.rotation, info.frames) == (64, 48, 0, 12)
    assert info.average_rate == 25
