"""Recordings: the session's own times, never in its way, and whole up to the last second whatever happens."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
from support.media_samples import Array, boxes, frame_spans, frame_times, moving_bar, played, rgb_frames

from std_rt.core.errors import MediaError
from std_rt.media.video import record
from std_rt.media.video.record import Recorder, Recording, numbered

SUFFIXES = [".mp4", ".mov", ".m4v", ".mkv", ".webm"]
MS = Fraction(1, 1000)
LONG_S = 60.0  # only to end a test that hangs


def record_frames(sink: Path, at: list[float], **options: Any) -> Recording:
    """A recording of moving bars at these times, closed."""
    recorder = Recorder(sink, fps=25, room=len(at), **options)
    for index, at_s in enumerate(at):
        recorder.write(moving_bar(index), at_s)
    return recorder.close()


def wait_for(recorder: Recorder, frames: int) -> None:
    """Until the recorder has encoded that many; it holds the newest back."""
    end = time.monotonic() + LONG_S
    while recorder.frames < frames:
        assert time.monotonic() < end, f"{recorder.frames} of {frames} frames after {LONG_S} s"
        time.sleep(0.005)


def steady(count: int, fps: float = 25) -> list[float]:
    return [index / fps for index in range(count)]


class Fragment(NamedTuple):
    """A fragment or cluster: frames in it and the offset where it ends, bytes."""

    frames: int
    end: int


def fragments(path: Path) -> list[Fragment]:
    """What begins with a key frame and plays alone."""
    found: list[Fragment] = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.size:
                assert packet.pos is not None
                end = packet.pos + packet.size
                frames = 1 if packet.is_keyframe else found.pop().frames + 1
                found.append(Fragment(frames, end))
    return found


def packet_hashes(path: Path) -> list[str]:
    with av.open(str(path)) as container:
        return [hashlib.sha256(bytes(p)).hexdigest() for p in container.demux(video=0) if p.size]


class Recorded(NamedTuple):
    """A recording of a hundred frames: as it was on the disk while it was recorded, and closed."""

    live: Path
    closed: Path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Recorded]:
    """Recordings by suffix, made once; tests only read them."""

    @cache
    def make(suffix: str) -> Recorded:
        folder = tmp_path_factory.mktemp("recorded")
        recorder = Recorder(folder / f"closed{suffix}", fps=25, room=100)
        for index, at_s in enumerate(steady(100)):
            recorder.write(moving_bar(index), at_s)
        wait_for(recorder, 99)
        live = Path(shutil.copy(recorder.path, folder / f"live{suffix}"))
        return Recorded(live, recorder.close().path)

    return make


# --- times and pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_frames_have_the_times_of_the_session_and_its_stall_stays(tmp_path: Path, suffix: str) -> None:
    at = [0.0, 0.04, 0.083, 0.12, 7.5, 7.52, 7.6]
    recording = record_frames(tmp_path / f"out{suffix}", [1000.7 + at_s for at_s in at])
    assert recording == Recording(tmp_path / f"out{suffix}", 7, 0, pytest.approx(7.64))
    assert [float(at_s) for at_s in frame_times(recording.path)] == pytest.approx(at, abs=6e-4)
    spans = [*np.diff(at), 0.04]
    assert [float(span) for span in frame_spans(recording.path)] == pytest.approx(spans, abs=1.1e-3)


def test_times_rise_whatever_the_clock_does(tmp_path: Path) -> None:
    recording = record_frames(tmp_path / "out.mp4", [5.0, 5.1, 5.1, 4.0, 5.2])
    times = frame_times(recording.path)
    assert len(times) == 5
    assert times == sorted(set(times))
    assert times[-1] == Fraction(2, 10)


def test_a_pause_of_two_days(tmp_path: Path) -> None:
    recording = record_frames(tmp_path / "out.mp4", [0.0, 0.04, 172_800.0])
    assert recording.problem == ""
    assert frame_times(recording.path)[-1] == 172_800


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_pictures_and_their_tags(tmp_path: Path, suffix: str) -> None:
    recording = record_frames(tmp_path / f"out{suffix}", steady(4))
    for index, frame in enumerate(rgb_frames(recording.path)):
        assert np.abs(frame.astype(int) - moving_bar(index)).mean() < 12
    with av.open(str(recording.path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.format.name) == (1, 1, "yuv420p")


def test_the_first_frame_sets_the_size(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "out.mp4", fps=25)
    for index, (h, w) in enumerate([(47, 63), (96, 128), (30, 30)]):
        recorder.write(np.full((h, w, 3), 80 * index, np.uint8), index / 25)
    frames = rgb_frames(recorder.close().path)
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 3
    assert [frame.mean() for frame in frames] == pytest.approx([0, 80, 160], abs=3)


# --- never in the way ------------------------------------------------------------------------------------


def test_a_slow_encoder_costs_frames_not_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    encode = record.VideoTrack.encode

    def slow(*args: Any, **options: Any) -> Any:
        assert go_on.wait(LONG_S)
        return encode(*args, **options)

    recorder = Recorder(tmp_path / "out.mp4", fps=25, room=4)
    monkeypatch.setattr(record.VideoTrack, "encode", slow)
    for index, at_s in enumerate(steady(50)):
        recorder.write(moving_bar(index), at_s)  # a write that waits would wait for ever: go_on comes later
    assert recorder.dropped >= 50 - 4 - 2  # four wait; one is held back and one in the encoder
    go_on.set()
    recording = recorder.close()
    assert recording.frames + recording.dropped == 50
    assert recording.problem == ""
    times = frame_times(recording.path)
    assert len(times) == recording.frames >= 4
    assert set(times) <= {Fraction(index, 25) for index in range(50)}  # those that are in it, at their times


def test_nothing_that_is_given_makes_write_raise(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "out.mp4", fps=25)
    odd: list[Any] = [
        None,
        "frame",
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ]
    for thing in odd:
        recorder.write(thing, 0.0)
    recorder.write(moving_bar(0), float("nan"))
    for index in range(3):
        recorder.write(moving_bar(index), float(index))
    recording = recorder.close()
    recorder.write(moving_bar(9), 9.0)
    assert (recording.frames, recording.dropped, recording.problem) == (3, 6, "")
    assert recorder.dropped == 7
    assert recorder.close() is recording


def test_without_a_frame_there_is_no_file(tmp_path: Path) -> None:
    assert Recorder(tmp_path / "out.mp4", fps=30).close() == Recording(tmp_path / "out.mp4", 0, 0, 0.0)
    assert list(tmp_path.iterdir()) == []


# --- never lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_it_plays_while_it_is_recorded(recorded: Callable[[str], Recorded], suffix: str) -> None:
    copy = recorded(suffix).live
    times = frame_times(copy)
    # 99 of 100 are encoded; at most the second that is not complete is missing.
    assert 73 <= len(times) <= 100
    assert times == [Fraction(index, 25) for index in range(len(times))]
    assert max(piece.frames for piece in fragments(copy)) <= 26


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_cut_anywhere_every_whole_fragment_plays(
    tmp_path: Path, recorded: Callable[[str], Recorded], suffix: str
) -> None:
    copy = recorded(suffix).live
    whole, data = fragments(copy), copy.read_bytes()
    rng = np.random.default_rng(3)
    cut = tmp_path / f"cut{suffix}"
    for end in rng.integers(whole[0].end, len(data), 25):
        cut.write_bytes(data[:end])
        due = sum(piece.frames for piece in whole if piece.end <= end)
        assert due > 0
        assert len(played(cut)) >= due


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").symlink_to("/dev/full")
    recording = record_frames(tmp_path / "out.mp4", steady(10), overwrite=True)
    assert (recording.frames, recording.dropped) == (0, 10)
    assert "the disk is full" in recording.problem
    assert "\n" not in recording.problem


# --- the plain file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".m4v"])
def test_a_clean_close_makes_it_plain(recorded: Callable[[str], Recorded], suffix: str) -> None:
    fragmented, plain = recorded(suffix)
    assert b"moof" in boxes(fragmented.read_bytes())
    kinds = boxes(plain.read_bytes())
    assert b"moof" not in kinds
    assert kinds.index(b"moov") < kinds.index(b"mdat")
    before, after = packet_hashes(fragmented), packet_hashes(plain)
    assert after[: len(before)] == before  # copied, not encoded again
    assert len(after) == 100
    with av.open(str(plain)) as container:
        assert container.streams.video[0].frames == 100


@pytest.mark.parametrize("failure", ["no room", "while copying"])
def test_where_there_is_no_room_for_it_the_fragments_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    if failure == "no room":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(record.shutil, "disk_usage", lambda _: usage._replace(free=100))
    else:
        monkeypatch.setattr(record, "_copy_plain", _disk_full)
    recording = record_frames(tmp_path / "out.mp4", steady(60))
    assert "out.mp4 is complete but still fragmented" in recording.problem
    assert "\n" not in recording.problem
    assert len(frame_times(recording.path)) == recording.frames == 60
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def _disk_full(path: Path, plain: Path) -> int:
    plain.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_broken_off_while_it_is_made_plain_it_stays_in_fragments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, plain: Path) -> int:
        raise KeyboardInterrupt

    copy = record._copy_plain
    monkeypatch.setattr(record, "_copy_plain", interrupted)
    recorder = Recorder(tmp_path / "out.mp4", fps=25, room=60)
    for index, at_s in enumerate(steady(60)):
        recorder.write(moving_bar(index), at_s)
    with pytest.raises(KeyboardInterrupt):
        recorder.close()
    assert len(frame_times(tmp_path / "out.mp4")) == 60
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    monkeypatch.setattr(record, "_copy_plain", copy)
    assert recorder.close().frames == 60


# --- names and refusals ----------------------------------------------------------------------------------


def test_numbered(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    for name in ("out.mp4", "out-2.mp4", "out-3.mp4"):
        assert numbered(path) == tmp_path / name
        numbered(path).touch()


def test_two_sessions_with_one_name_make_two_files(tmp_path: Path) -> None:
    sessions = [Recorder(tmp_path / "out.mp4", fps=25) for _ in range(2)]
    for at_s in steady(5):
        for recorder in sessions:
            recorder.write(moving_bar(0), at_s)
    recordings = [recorder.close() for recorder in sessions]
    assert sorted(recording.path.name for recording in recordings) == ["out-2.mp4", "out.mp4"]
    assert [len(frame_times(recording.path)) for recording in recordings] == [5, 5]


def test_overwriting_waits_for_the_first_frame(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"older")
    assert Recorder(tmp_path / "out.mp4", fps=25, overwrite=True).close().frames == 0
    assert (tmp_path / "out.mp4").read_bytes() == b"older"
    assert record_frames(tmp_path / "out.mp4", steady(3), overwrite=True).frames == 3
    assert len(frame_times(tmp_path / "out.mp4")) == 3


@pytest.mark.parametrize(
    ("name", "codec", "says"),
    [
        ("out.gif", None, r"out\.gif: cannot write a clip as '\.gif'; use one of \.m4v"),
        ("out", None, "cannot write a clip as 'a name without suffix'"),
        ("there.mp4", None, "exists already"),
        ("folder", None, "cannot write a clip"),
        ("there.mp4/out.mp4", None, "cannot be written"),
        ("out.mp4", "nonsense", "this FFmpeg has no video encoder 'nonsense'"),
        ("out.webm", "libx264", r"'libx264' does not work for \.webm here .*; use libvpx-vp9"),
        ("out.mp4", "prores_ks", "'prores_ks' does not work"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_the_session(
    tmp_path: Path, name: str, codec: str | None, says: str
) -> None:
    (tmp_path / "there.mp4").touch()
    (tmp_path / "folder").mkdir()
    threads = threading.enumerate()
    with pytest.raises(MediaError, match=says) as caught:
        Recorder(tmp_path / name, fps=25, codec=codec)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "there.mp4"]
    assert set(threading.enumerate()) <= set(threads)  # others may end meanwhile


def test_many_frames_leave_nothing_behind(tmp_path: Path) -> None:
    kept: list[weakref.ref[Array]] = []
    recorder = Recorder(tmp_path / "out.mp4", fps=25, room=8)
    most = 0
    for index in range(200):
        frame = moving_bar(index)
        kept.append(weakref.ref(frame))
        recorder.write(frame, index / 25)
        del frame
        most = max(most, sum(ref() is not None for ref in kept))
    recorder.close()
    assert most <= 8 + 3  # room, held back, in the encoder
    assert not any(ref() is not None for ref in kept)
