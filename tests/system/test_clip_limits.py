"""Clips against the limits of the machine: memory that must not grow with the clip, disks full and slow."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support.cli_support import picture
from support.handmade import write_handmade
from support.media_samples import (
    SAMPLE_RATE,
    Array,
    ClipSpec,
    Sound,
    frame_times,
    make_clip,
    moving_bar,
    sound_packets,
    transcode,
)

from std_rt.media.video.encoder import VideoTrack

LONG_S = 120.0  # only to end a test that hangs

MEMORY = """
import sys
from pathlib import Path
from std_rt.media import transcode_stream

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

marks = {}
peak = resident_mb()

def note(done, total):
    global peak
    marks[done] = resident_mb()
    peak = max(peak, marks[done])

start = peak
transcode_stream(Path(sys.argv[1]), Path(sys.argv[2]), lambda frames: frames, progress=note)
frames = max(marks)
print(frames, marks[max(1, frames // 5)], marks[frames], max(peak, resident_mb()) - start)
"""


def run(script: str, *arguments: object) -> list[str]:
    """The words that a new interpreter prints."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, check=True)
    return done.stdout.split("\n")


def linux_only(test: Any) -> Any:
    return pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read memory from")(
        test
    )


# --- memory ----------------------------------------------------------------------------------------------


@pytest.mark.long  # That no frames are kept, tests/unit/media/test_video.py sees too.
@linux_only
def test_a_long_clip_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    # An MP4 keeps an index, of some 100 bytes a packet, until its end; Matroska writes as it goes.
    spec = ClipSpec(
        codec="mpeg4",
        options={},
        pts=range(400),
        time_base=Fraction(1, 25),
        width=128,
        height=96,
        audio="aac",
    )
    source = make_clip(tmp_path / "a.mkv", spec)
    words = run(MEMORY, source, tmp_path / "out.mkv")[0].split()
    frames, early_mb, late_mb = int(words[0]), float(words[1]), float(words[2])
    assert frames == 400
    assert late_mb - early_mb < 4  # 320 frames of 37 KB are 12 MB


@linux_only
@pytest.mark.parametrize(("pictures", "name"), [("late", "out.mov"), ("early", "out.mkv")])
def test_sound_without_pictures_does_not_wait_in_memory(tmp_path: Path, pictures: str, name: str) -> None:
    source = _mostly_sound(tmp_path / "a.mkv", 200, pictures == "late")
    assert source.stat().st_size > 38e6
    words = run(MEMORY, source, tmp_path / name)[0].split()
    assert int(words[0]) == 10
    assert float(words[3]) < 25
    assert _samples(tmp_path / name) == _samples(source)


def _samples(path: Path) -> str:
    """Of PCM, which MOV gives in other packets."""
    digest = hashlib.sha256()
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0):
            digest.update(bytes(packet))
    return digest.hexdigest()


def _mostly_sound(path: Path, seconds: int, late: bool) -> Path:
    """Ten frames, at the beginning or at the end of PCM sound."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=25)
        video.width, video.height = 64, 48
        sound: Any = container.add_stream("pcm_s16le", rate=SAMPLE_RATE)
        sound.codec_context.layout = "stereo"
        packets = []
        for index in range(10):
            frame = av.VideoFrame.from_ndarray(moving_bar(index), format="rgb24")
            frame.pts = index + (25 * seconds if late else 0)
            packets += video.encode(frame)
        packets += video.encode(None)
        if not late:
            container.mux(packets)
        data = np.zeros((1, 2 * SAMPLE_RATE // 4), np.int16)
        for index in range(4 * seconds):
            data[0, 0] = index
            chunk = av.AudioFrame.from_ndarray(data, format="s16", layout="stereo")
            chunk.sample_rate, chunk.pts = SAMPLE_RATE, index * SAMPLE_RATE // 4
            container.mux(sound.encode(chunk))
        if late:
            container.mux(packets)
    return path


@pytest.mark.long
@linux_only
def test_three_thousand_frames_in_windows_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    """Video-to-video, with a cut in the middle: all frames at their times, and none kept."""
    pytest.importorskip("onnx")
    count, size, cut = 3000, (256, 192), 1501  # 147 kB a frame, 37 kB a result

    def moving(index: int) -> Array:
        frame = moving_bar(index, *size)
        return frame if index < cut else 255 - frame

    times = [512 * index + 100 * (index % 3) for index in range(count)]
    clip = make_clip(
        tmp_path / "clip.mp4", ClipSpec(pts=times, width=size[0], height=size[1], picture=moving)
    )
    bundle = write_handmade(tmp_path / "v2v", window=(8, 2)).path
    art, out = picture(tmp_path / "art.png", 32, 32), tmp_path / "out.mp4"
    flags = ("--style", art, "--bundle", bundle, "--size", "128x96", "--steps", 2, "-o", out)
    command = [sys.executable, "-m", "std_rt", "stylize", *map(str, (clip, *flags))]
    resident_mb = []
    with subprocess.Popen(command) as running:
        while running.poll() is None:
            pages = int(Path(f"/proc/{running.pid}/statm").read_text(encoding="ascii").split()[1])
            resident_mb.append(pages * 4096 / 1e6)
            time.sleep(0.1)
    assert running.returncode == 0
    assert frame_times(out) == pytest.approx(frame_times(clip))
    assert len(frame_times(out)) == count
    # Kept results alone would add some 50 MB between the two, kept frames some 200.
    early, late = resident_mb[: len(resident_mb) // 3], resident_mb[-len(resident_mb) // 4 :]
    assert np.median(late) - max(early) < 20


# --- disks -----------------------------------------------------------------------------------------------

FULL = """
import resource, sys
from pathlib import Path
from std_rt.core.errors import MediaError
from std_rt.media import transcode_stream

source, *jobs = sys.argv[1:]
for sink, limit in zip(jobs[::2], jobs[1::2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
    try:
        transcode_stream(Path(source), Path(sink), lambda frames: frames)
        print("written")
    except MediaError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes to play a full disk with")
@pytest.mark.parametrize(
    ("sound", "names"), [("aac", ["out.mp4", "out.mov", "out.mkv"]), ("libopus", ["out.webm"])]
)
def test_full_disk_is_one_line_and_no_half_file(tmp_path: Path, sound: str, names: list[str]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
    source = make_clip(
        tmp_path / "a.mkv",
        ClipSpec(
            pts=range(0, 40 * 512, 512),
            sounds=[Sound(sound)],
            picture=lambda index: np.asarray(noise[index % 8]),
        ),
    )
    jobs: list[tuple[Path, int]] = []
    for name in names:
        whole = transcode(source, tmp_path / f"whole{Path(name).suffix}", _same).output
        size = whole.stat().st_size
        whole.unlink()
        jobs += [(tmp_path / name, limit) for limit in (0, 3000, size // 3, size - 1)]
    lines = run(FULL, source, *(word for job in jobs for word in job))
    assert lines.pop() == ""
    for line, (sink, _) in zip(lines, jobs, strict=True):
        assert line.startswith(f"{sink} cannot be written: the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def _same(frame: Array) -> Array:
    return frame


def test_slow_disk_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_frame = VideoTrack.encode

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.004)  # longer than a frame takes in the other threads
        return encode_frame(*args, **options)

    monkeypatch.setattr(VideoTrack, "encode", slow)
    source = make_clip(tmp_path / "a.mp4", ClipSpec(pts=range(0, 30 * 512, 512), audio="aac"))
    transcode(source, tmp_path / "out.mp4", _same)
    assert frame_times(tmp_path / "out.mp4") == frame_times(source)
    assert sound_packets(tmp_path / "out.mp4") == sound_packets(source)
