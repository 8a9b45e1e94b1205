"""`std-rt` as processes: how soon it answers, and sessions that a signal ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.cli_support import picture
from support.media_samples import ClipSpec, frame_times, make_clip

from std_rt.core.bundle import Bundle


@pytest.fixture
def command(handmade: Bundle, tmp_path: Path) -> list[str]:
    """``std-rt live`` on a clip of ten frames that plays again and again, with ``tmp_path / art.png``."""
    clip = make_clip(tmp_path / "clip.mp4", ClipSpec(pts=tuple(range(0, 10 * 512, 512))))
    art = picture(tmp_path / "art.png", 32, 32, seed=1)
    flags = ("--style", art, "--camera", clip, "--no-window", "--bundle", handmade.path, "--size", "64x48")
    return [sys.executable, "-m", "std_rt", "live", *map(str, flags)]


def _report(out: str) -> dict[str, Any]:
    return dict(json.loads(out.splitlines()[-1]))


def test_help_takes_little_time() -> None:
    """Three times what importing Typer does, at most six: that is as slow on an old or a busy machine."""

    def processor_s(*arguments: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = os.times()
        spent = after.children_user - before.children_user + after.children_system - before.children_system
        return spent + 1 / 100  # of which it is a multiple

    ours, typers = (
        min(processor_s(*arguments) for _ in range(3))
        for arguments in (("-m", "std_rt", "--help"), ("-c", "import typer"))
    )
    assert ours < 6 * typers


@contextmanager
def _started(command: Iterable[object]) -> Iterator[subprocess.Popen[str]]:
    """A process that a failing test does not leave behind, or wait for."""
    words, pipe = [str(word) for word in command], subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _when_it_runs(process: subprocess.Popen[str], metrics: Path) -> None:
    """Until frames are presented."""
    end = time.monotonic() + 120
    while '"frames": ' not in (text := metrics.read_text(encoding="utf-8") if metrics.exists() else "") or (
        '"frames": 0,' in text.splitlines()[-1]
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_the_recording_plays(
    command: list[str], tmp_path: Path, kind: signal.Signals
) -> None:
    metrics, recording = tmp_path / "m.jsonl", tmp_path / "out.mp4"
    command += ["--metrics", str(metrics), "--record", str(recording)]
    with _started(command) as process:
        _when_it_runs(process, metrics)
        (tmp_path / "art.png").unlink()  # it was read, and is not needed any more
        end = time.monotonic() + 120
        while recording.read_bytes().count(b"moof") < 2:  # until a piece of the recording is complete
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(kind)
        out, err = process.communicate(timeout=240)
    assert len(frame_times(recording)) > 5
    if kind == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 0, err
    if "Exception ignored" not in err:  # the signal may meet a library's own hook, which Python only reports
        assert "Traceback" not in err
    assert _report(out)["frames"] == len(frame_times(recording))


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])  # the latter does not exist on Windows
def test_a_clip_that_a_signal_ends_is_kept(handmade: Bundle, tmp_path: Path, name: str) -> None:
    clip = make_clip(tmp_path / "clip.mp4", ClipSpec(pts=tuple(range(0, 4000 * 512, 512))))
    art = picture(tmp_path / "art.png", 32, 32, seed=1)
    flags = ("-s", art, "--bundle", handmade.path, "--size", "64x48", "-o", tmp_path / "out.mkv")
    command = [sys.executable, "-m", "std_rt", "stylize", clip, *flags]
    with _started(command) as process:
        end = time.monotonic() + 300
        while sum(part.stat().st_size for part in tmp_path.glob(".out.*")) < 5000:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "stopped early, playable" in out
    assert 0 < len(frame_times(tmp_path / "out.mkv")) < 4000
    assert {path.name for path in tmp_path.iterdir()} >= {"clip.mp4", "art.png", "out.mkv"}
    assert not list(tmp_path.glob(".*"))


def test_two_sessions_at_once(command: list[str]) -> None:
    command += ["--duration", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert _report(out)["frames"] > 0
