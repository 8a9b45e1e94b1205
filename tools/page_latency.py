"""Latency through the page of `std-rt serve` beside `std-rt live`, in one run, from the same clip at 30 fps.

    python -m tools.page_latency                      # one after the other, a minute each, std-tiny at 256 px
    python -m tools.page_latency --flat-minutes 20    # and then the page alone, its memory and latency

The page runs in Chromium without a window, whose camera shows the clip; frames go over the WebSocket, as
they carry a clock there. Two latencies of the page are told: that of its own figures, from when it takes a
frame of its camera until the result is on its canvas, and another from when the browser has that frame
until the screen is drawn anew with the result. `live` counts from its camera too, until it presents. Prints
tables, and one line of JSON. Needs the extra [serve], and Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from std_rt.core.machine import describe_machine
from std_rt.examples import moving, styles, write_moving
from std_rt.media import write_picture
from tools.browser import Page, browser

_FRAMES, _FPS = 150, 30
_BAR_MS = 35.0
_WARM_UP_S = 5.0
_EVERY_S = 120.0

# Before the page's own script: when each frame was captured, taken and painted, by the header of its message.
_WATCH = """
window.RTCPeerConnection = undefined;
window.seen = [];
{
  let captured = NaN, sent = new Map(), last = null;
  const play = HTMLVideoElement.prototype.play;
  HTMLVideoElement.prototype.play = function () {
    const note = (_, { captureTime }) => { captured = captureTime; this.requestVideoFrameCallback(note); };
    this.requestVideoFrameCallback(note);
    return play.call(this);
  };
  const send = WebSocket.prototype.send;
  WebSocket.prototype.send = function (data) {
    if (data instanceof ArrayBuffer) {
      const header = new DataView(data);
      sent.set(header.getUint32(0, true), { captured: taken, taken: header.getFloat64(8, true) });
    }
    return send.call(this, data);
  };
  let taken = NaN;
  const getImage = CanvasRenderingContext2D.prototype.drawImage;
  CanvasRenderingContext2D.prototype.drawImage = function (image, ...where) {
    const drawn = getImage.call(this, image, ...where);
    if (image instanceof HTMLVideoElement) taken = captured;
    if (this.canvas.id === "canvas" && image.header) {
      const { number } = image.header, times = sent.get(number), painted = performance.now();
      for (const key of sent.keys()) if (key <= number) sent.delete(key);
      if (times) requestAnimationFrame(() => requestAnimationFrame(() =>
        window.seen.push([times.captured, times.taken, painted, performance.now()])));
    }
    return drawn;
  };
  const make = window.createImageBitmap;
  window.createImageBitmap = async (source, ...rest) => {
    const header = source instanceof Blob ? last : null;
    return Object.assign(await make(source, ...rest), { header });
  };
  const Native = WebSocket;
  window.WebSocket = class extends Native {
    constructor(...given) {
      super(...given);
      this.addEventListener("message", ({ data }) => {
        if (typeof data !== "string") last = { number: new DataView(data).getUint32(0, true) };
      });
    }
  };
}
"""


@dataclass(frozen=True)
class Setting:
    """What both are measured with. ``clip`` and ``camera`` hold the same frames."""

    clip: Path
    camera: Path
    style: Path
    bundle: str
    size: int
    seconds: float

    @property
    def flags(self) -> list[str]:
        """Those that `live` and `serve` have in common."""
        return ["--style", str(self.style), "--bundle", self.bundle, "--size", str(self.size)]


def write_camera(path: Path) -> None:
    """The clip of `live` as Chromium's camera reads it (YUV4MPEG2)."""
    import av

    frames = list(moving(_FRAMES, 640, 480))
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W640 H480 F{_FPS}:1 Ip A1:1 C420jpeg\n".encode())
        for frame in frames:
            planes = av.VideoFrame.from_ndarray(frame, format="rgb24").to_ndarray(format="yuv420p")
            file.write(b"FRAME\n" + planes.tobytes())


def live(setting: Setting) -> dict[str, Any]:
    """p50 and p95 in ms, and the frame rate, of `std-rt live`."""
    command = [sys.executable, "-m", "std_rt", "live", "--no-window", "-c", str(setting.clip), *setting.flags]
    command += ["--duration", str(setting.seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    return {"fps": report["fps"], **{key: report["latency_ms"][key] for key in ("p50", "p95")}}


@contextmanager
def page_of(setting: Setting) -> Iterator[tuple[Page, int]]:
    """The page, which paints its camera, and the id of the server's process."""
    command = [sys.executable, "-m", "std_rt", "serve", "--no-open", "--port", "0", *setting.flags]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server,
        browser(f"--use-file-for-fake-video-capture={setting.camera}") as page,
    ):
        assert server.stdout is not None
        try:
            page.size(1280, 850)
            page.call("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)
            page.open(server.stdout.readline().strip())
            page.until("document.querySelectorAll('#styles li').length > 0")
            page.click("#camera")
            page.until("seen.length > 3")
            yield page, server.pid
        finally:
            server.terminate()


def seen(page: Page, seconds: float) -> dict[str, Any]:
    """What the page has painted in this time from now on: rate, and both latencies in ms."""
    page.run("seen.length = 0")
    began = time.perf_counter()
    time.sleep(seconds)
    captured, taken, painted, shown = np.array(page.run("seen.splice(0)"), float).T
    took = time.perf_counter() - began

    def shares(latency: Any) -> dict[str, float]:
        return {f"p{share}": round(float(np.nanpercentile(latency, share)), 1) for share in (50, 95)}

    return {
        "fps": round(len(painted) / took, 1),
        **shares(painted - taken),
        "camera_to_screen": shares(shown - captured),
    }


def memory_mb(pid: int) -> float:
    """Of a process, now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def flat(page: Page, server: int, minutes: float) -> Iterator[dict[str, Any]]:
    """Memory of server and page, and latency, every two minutes."""
    for begin_s in np.arange(0, 60 * minutes, _EVERY_S):
        row = seen(page, min(_EVERY_S, 60 * minutes - begin_s))
        heap = page.run("performance.memory.usedJSHeapSize / 2 ** 20")
        yield {"from_s": float(begin_s), **row, "server_mb": memory_mb(server), "page_mb": round(heap, 1)}


def compare(setting: Setting) -> dict[str, Any]:
    """Both, one after the other."""
    found: dict[str, Any] = {"live": live(setting)}
    with page_of(setting) as (page, _):
        time.sleep(_WARM_UP_S)
        found["page"] = seen(page, setting.seconds)
    print(f"{'':28} {'fps':>6} {'p50 ms':>7} {'p95 ms':>7}")
    whole = {"fps": found["page"]["fps"], **found["page"]["camera_to_screen"]}
    rows = {"std-rt live": found["live"], "page": found["page"], "page, camera to screen": whole}
    for name, row in rows.items():
        print(f"{name:28} {row['fps']:6} {row['p50']:7} {row['p95']:7}")
    more = {key: round(found["page"][key] - found["live"][key], 1) for key in ("p50", "p95")}
    print(f"the page takes {more['p50']} ms more (p95 {more['p95']}); the bar is {_BAR_MS:g} ms")
    return found | {"more_ms": more}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", default="std-tiny")
    parser.add_argument("--size", type=int, default=256, help="px a side")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two")
    parser.add_argument("--flat-minutes", type=float, default=0.0, help="then the page alone, for so long")
    options = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        clip, camera, style = (Path(folder) / name for name in ("clip.mp4", "clip.y4m", "style.png"))
        setting = Setting(clip, camera, style, options.bundle, options.size, options.seconds)
        write_moving(setting.clip, _FRAMES, fps=_FPS)
        write_camera(setting.camera)
        write_picture(setting.style, styles()["ink"])
        found = compare(setting)
        if options.flat_minutes:
            found["flat"] = []
            with page_of(setting) as (page, server):
                time.sleep(_WARM_UP_S)
                for row in flat(page, server, options.flat_minutes):
                    found["flat"].append(row)
                    print(row, flush=True)
    print(json.dumps(found | {"machine": str(describe_machine())}))


if __name__ == "__main__":
    main()
