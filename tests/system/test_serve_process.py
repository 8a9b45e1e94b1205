"""`std-rt serve` as a process: it answers, ends on a signal with code 0, and leaves no files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from std_rt.core.bundle import Bundle
from std_rt.media import write_picture

pytest.importorskip("starlette")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.name != "posix", reason="signals are POSIX"),
]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_nothing_left(handmade: Bundle, tmp_path: Path, kind: signal.Signals) -> None:
    write_picture(tmp_path / "art.png", np.full((32, 32, 3), 90, np.uint8))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "std_rt", "serve", "--no-open", "--port", "0", "--backend", "openvino"]
    command += ["--bundle", str(handmade.path), "-s", str(tmp_path / "art.png")]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        link = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{link}v1/health") as answer:
            assert json.load(answer)["status"] == "ok"
        assert [path.name for path in temporary.glob("std-rt-serve-*")]
        process.send_signal(kind)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in said
    assert not list(temporary.glob("std-rt-serve-*"))


def test_the_end_of_the_window_is_the_end_of_the_program(handmade: Bundle, tmp_path: Path) -> None:
    write_picture(tmp_path / "art.png", np.full((32, 32, 3), 90, np.uint8))
    seen = tmp_path / "seen.json"
    browser = tmp_path / "google-chrome"
    browser.write_text(
        f"""#!{sys.executable}
import sys, urllib.request
link = sys.argv[1].removeprefix("--app=")
open({str(seen)!r}, "wb").write(urllib.request.urlopen(link + "v1/health").read())
"""
    )
    browser.chmod(0o755)
    command = [sys.executable, "-m", "std_rt", "app", "--port", "0", "--backend", "openvino"]
    command += ["--bundle", str(handmade.path), "-s", str(tmp_path / "art.png")]
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, text=True, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(seen.read_bytes())["status"] == "ok"
