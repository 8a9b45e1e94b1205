"""Recordings of a process that is killed, interrupted, or fills the disk."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from support.media_samples import boxes, frame_times, played

LONG_S = 60.0  # only to end a test that hangs

SESSION = """
import sys, time
from pathlib import Path
import numpy as np
from std_rt.media.video.record import Recorder

recorder = Recorder(Path(sys.argv[1]), fps=25, room=500)
noise = np.random.default_rng(1).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
try:
    for index in range(10**9):
        recorder.write(noise[index % 8], index / 25)
        while recorder.frames < index - 100:
            time.sleep(0.001)
        if index == 300:
            print("recording", flush=True)
except KeyboardInterrupt:
    recording = recorder.close()
    print(recording.frames, recording.dropped, recording.problem, flush=True)
"""


@pytest.fixture
def session(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has recorded two hundred frames, and goes on until it is ended."""
    command = [sys.executable, "-c", SESSION, str(tmp_path / "out.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "recording"
        yield process
        process.kill()


def test_killed(tmp_path: Path, session: subprocess.Popen[str]) -> None:
    session.kill()
    session.wait(LONG_S)
    times = played(tmp_path / "out.mp4")
    assert len(times) >= 200 - 26  # a second is not yet written
    assert times == [Fraction(index, 25) for index in range(len(times))]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_interrupted(tmp_path: Path, session: subprocess.Popen[str]) -> None:
    session.send_signal(signal.SIGINT)
    said, _ = session.communicate(timeout=LONG_S)
    frames, dropped = map(int, said.split())  # and no problem
    assert dropped <= 1  # the frame that was being handed over
    assert len(frame_times(tmp_path / "out.mp4")) == frames > 200
    assert b"moof" not in boxes((tmp_path / "out.mp4").read_bytes())


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from std_rt.media.video.record import Recorder

resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, -1))
noise = np.random.default_rng(1).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
for path in sys.argv[1:]:
    recorder = Recorder(Path(path), fps=25, room=500)
    for index in range(300):
        recorder.write(noise[index % 8], index / 25)
    recording = recorder.close()
    print(recording.frames, recording.dropped, recording.problem, sep="|")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes to play a full disk with")
def test_full_disk_ends_the_recording_and_keeps_it(tmp_path: Path) -> None:
    paths = [tmp_path / "out.mkv", tmp_path / "out.mp4"]
    command = [sys.executable, "-c", FULL, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, check=True)
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        frames, dropped, problem = line.split("|")
        assert len(played(path)) >= int(frames) >= 25
        assert int(frames) + int(dropped) == 300
        assert f"{path.name} stopped early" in problem
        assert "the disk is full" in problem
    assert sorted(tmp_path.iterdir()) == paths
