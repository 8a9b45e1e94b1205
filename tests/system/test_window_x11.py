"""The live window under real X servers, which go away."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

needs_xvfb = pytest.mark.skipif(
    not (shutil.which("Xvfb") and shutil.which("xdotool") and shutil.which("import")),
    reason="Xvfb, xdotool and ImageMagick's import are not all installed",
)
LIVE = """
import sys, time
from contextlib import closing
import numpy as np
from std_rt.media.window.window import Closed, Window
frame = np.full((64, 64, 3), (250, 10, 20), np.uint8)
end = time.perf_counter() + 200
try:
    with closing(Window("std-rt", size=(64, 64))) as window:
        count, closed = 0, False
        while not closed and time.perf_counter() < end:
            window.show(frame, ["fps\\t30"])
            count += 1
            if count == 3:
                print("ready", flush=True)
            for event in window.events():
                print(event, flush=True)
                closed = closed or isinstance(event, Closed)
            time.sleep(0.01)
    print("cleaned up", flush=True)
except KeyboardInterrupt:
    print("interrupted, cleaned up", flush=True)
"""


@contextmanager
def x_server() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An X server of its own, 900 x 900, and the DISPLAY that it chose."""
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "900x900x24", "-nolisten", "tcp"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    try:
        with os.fdopen(read) as pipe:
            yield server, f":{pipe.readline().strip()}"
    finally:
        server.kill()
        server.wait()


@contextmanager
def live(display: str) -> Iterator[subprocess.Popen[str]]:
    """The script above in a process of its own, once it has shown something."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("SDL_")}
    surroundings["DISPLAY"] = display
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE],
        env=surroundings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> list[str]:
    """Its last lines; it ended by itself, well, and wrote nothing to stderr."""
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    return out.splitlines()


def tool(display: str, *command: str) -> str:
    done = subprocess.run(["xdotool", *command], env={**os.environ, "DISPLAY": display}, capture_output=True)
    return done.stdout.decode()


def window_at_the_middle(display: str) -> str:
    """The number of the window under the pointer, which also gets the keys: no window manager runs."""
    tool(display, "mousemove", "450", "450")
    place = dict(line.split("=") for line in tool(display, "getmouselocation", "--shell").split())
    return place["WINDOW"]


def on_screen(display: str) -> NDArray[np.int16]:
    """A screenshot, [H, W, 3] RGB."""
    done = subprocess.run(
        ["import", "-window", "root", "png:-"], env={**os.environ, "DISPLAY": display}, capture_output=True
    )
    return np.asarray(Image.open(io.BytesIO(done.stdout)).convert("RGB"), np.int16)


@needs_xvfb
def test_x11_shows_the_frame_and_gives_keys() -> None:
    with x_server() as (_, display), live(display) as process:
        window_at_the_middle(display)
        for key in ("n", "P", "exclam", "plus", "Escape"):
            tool(display, "key", key)
        assert process.stdout
        names = ["n", "shift+p", "shift+1", "plus", "escape"]
        assert [process.stdout.readline().strip() for _ in names] == [
            f"Key(name='{name}', repeat=False)" for name in names
        ]
        shot = on_screen(display)
        red = (shot == (250, 10, 20)).all(axis=2)
        assert 0.6 < red.mean() < 0.75, "0.85 of the screen's height, squared, less the figures"
        assert red[450, 450]
        assert (shot[90:110, 90:200].mean(axis=2) < 90).any(), "the panel of the figures"
        process.send_signal(signal.SIGINT)
        assert ended(process) == ["interrupted, cleaned up"]


@needs_xvfb
@pytest.mark.parametrize("how", ["windowkill", "windowclose", "server"])
def test_x11_a_killed_window_or_server_is_a_closed_window(how: str) -> None:
    with x_server() as (server, display), live(display) as process:
        if how == "server":
            server.kill()
        else:
            tool(display, how, window_at_the_middle(display))
        lines = ended(process)
        assert lines[-2:] == ["Closed(reason='the window or its screen is gone')", "cleaned up"]
