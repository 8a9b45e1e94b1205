"""The page of `std-rt serve` in Chromium, with a camera that shows a test picture. Skipped without it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _package in ("starlette", "uvicorn", "websockets"):
    pytest.importorskip(_package)

from support.live_support import wait_until  # noqa: E402
from support.media_samples import ClipSpec, make_clip  # noqa: E402
from support.serve_support import own, running  # noqa: E402

from std_rt.core.bundle import Bundle  # noqa: E402
from std_rt.media import write_picture  # noqa: E402
from std_rt.pipeline.stylizer import Stylizer  # noqa: E402
from std_rt.serve.app import Options, Server  # noqa: E402
from tools.browser import CHROMIUM, Page, browser  # noqa: E402

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

# The picture changes: the sum of all pixels differs from the one before.
_SUM = """(() => { const c = document.getElementById('canvas');
  return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.reduce((a, b) => a + b); })()"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def serving(bundle: Bundle, folder: Path, port: int) -> Iterator[str]:
    """`std-rt serve` on two grey styles; the link that it prints."""
    for name, value in (("dark", 40), ("light", 220)):
        write_picture(folder / f"{name}.png", np.full((32, 32, 3), value, np.uint8))
    command = [sys.executable, "-m", "std_rt", "serve", "--no-open", "--port", str(port)]
    command += ["--bundle", str(bundle.path), "--backend", "openvino", "-s", str(folder)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0


@pytest.fixture
def page() -> Iterator[Page]:
    with browser() as page:
        page.size(1280, 850)
        yield page


def changed_from(page: Page, before: object) -> None:
    wait_until(lambda: page.run(_SUM) != before)


def names(page: Page) -> list[str]:
    found = page.run("[...document.querySelectorAll('#styles .name')].map((each) => each.textContent)")
    return list(found)


def test_camera_styles_snapshot_record_phone_and_restart(
    handmade: Bundle, tmp_path: Path, page: Page
) -> None:
    styles, port = tmp_path / "styles", free_port()
    styles.mkdir()
    with serving(handmade, styles, port) as link:
        page.open(link)
        page.until("document.querySelectorAll('#styles li').length === 2")
        page.click("#camera")
        page.until("document.getElementById('p50').textContent !== '–'")
        before = page.run(_SUM)
        page.click("#styles li:nth-child(2) .pick")
        changed_from(page, before)
        page.click("#styles li:nth-child(1) .mix input")
        page.until("document.querySelectorAll('#styles input[type=range]').length === 2")
        # A style is added, as a drop does.
        write_picture(tmp_path / "added.png", np.full((40, 40, 3), 128, np.uint8))
        page.put_file("#style-input", tmp_path / "added.png")
        page.until("document.querySelectorAll('#styles li').length === 3")
        assert names(page)[2] == "added"
        # What is saved arrives.
        page.click("#snapshot")
        wait_until(lambda: list(page.downloads.glob("*.png")))
        page.click("#record")
        page.until("document.getElementById('record').textContent === 'Stop recording'")
        page.run("new Promise((done) => setTimeout(done, 1500))")
        page.click("#record")
        wait_until(lambda: [*page.downloads.glob("*.webm"), *page.downloads.glob("*.mp4")])
        page.size(390, 844, phone=True)
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), (
            "the page is wider than a phone"
        )
        assert not page.said
    page.until("document.getElementById('status').textContent.includes('trying again')")
    page.said.clear()  # of connections that were refused
    with serving(handmade, styles, port):
        page.until("document.getElementById('status').textContent === 'Connected'")
        assert names(page)[2] == "added", "a style that was sent is sent again"
        changed_from(page, page.run(_SUM))
        foreign = [url for url in page.requested if f"127.0.0.1:{port}" not in url and "data:" not in url]
        assert not [url for url in foreign if not url.startswith(("blob:", "about:"))]


def test_a_still_picture_is_painted_anew_however_long_its_style_takes(
    handmade: Bundle, tmp_path: Path, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent for three seconds after a change only, since nothing changes by itself."""
    art = {name: np.full((32, 32, 3), value, np.uint8) for name, value in (("dark", 40), ("light", 220))}
    write_picture(tmp_path / "photo.png", np.full((60, 90, 3), 90, np.uint8))
    with (
        Stylizer.load(handmade, backend="openvino", precision="fp32", steps=2) as stylizer,
        Server(stylizer, own(art), Options()) as server,
        running(server) as site,
    ):
        page.open(f"http://{site.host}/")
        page.until("document.querySelectorAll('#styles li').length === 2")
        page.put_file("#file-input", tmp_path / "photo.png")
        page.until("document.getElementById('empty').hidden")
        encode, before = stylizer.encode_style, page.run(_SUM)

        def slowly(*given: Any, **more: Any) -> Any:
            time.sleep(5)
            return encode(*given, **more)

        monkeypatch.setattr(stylizer, "encode_style", slowly)
        for live in server.pool._sessions.values():
            monkeypatch.setattr(live.mixer, "_encode", slowly)
        page.click("#styles li:nth-child(2) .pick")
        changed_from(page, before)


def by(page: Page, transport: str) -> None:
    """Wait until the session uses a transport, and paints by it."""
    page.until(f"document.getElementById('transport').textContent === {transport!r}")
    page.click("#styles li:nth-child(1) .pick")
    before = page.run(_SUM)
    page.click("#styles li:nth-child(2) .pick")
    changed_from(page, before)


def test_the_camera_goes_by_webrtc_and_falls_back(handmade: Bundle, tmp_path: Path, page: Page) -> None:
    pytest.importorskip("aiortc", reason="the extra [webrtc] is not installed")
    styles, port = tmp_path / "styles", free_port()
    styles.mkdir()
    with serving(handmade, styles, port) as link:
        page.open(link)
        page.until("document.querySelectorAll('#styles li').length === 2")
        page.run("window.made = []; window.Native = RTCPeerConnection; 0")
        page.run(
            "window.RTCPeerConnection = class extends Native"
            " { constructor(...given) { super(...given); made.push(this); } }; 0"
        )
        page.click("#camera")
        by(page, "WebRTC")
        page.until("document.getElementById('p50').textContent.startsWith('≥')")
        # Without it, a slow network has Chromium send frames of half the size and less.
        assert page.run("made[0].getSenders()[0].track.contentHint") == "detail"
        # It ends, and the page notices by itself.
        page.run("made[0].close()")
        by(page, "WebSocket")
        # Nor does the page need it.
        page.run("window.RTCPeerConnection = undefined; 0")
        page.click("#camera")
        by(page, "WebSocket")
        assert page.run("made.length") == 1
        assert page.run("made[0].getConfiguration().iceServers.length") == 0
        assert not page.said


def test_a_picture_is_painted_whole_and_the_other_pages_look_on(
    handmade: Bundle, tmp_path: Path, page: Page
) -> None:
    styles = tmp_path / "styles"
    styles.mkdir()
    with serving(handmade, styles, free_port()) as link:
        page.open(link)
        page.until("document.querySelectorAll('#styles li').length === 2")
        for name, kind in (("no.png", "shown"), ("no.mp4", "played")):
            (tmp_path / name).write_bytes(b"nothing")
            page.put_file("#file-input", tmp_path / name)
            page.until(f"document.getElementById('status').textContent.startsWith('{name} cannot be {kind}')")
            page.run("new Promise((done) => setTimeout(done, 1000))")
            assert "cannot be" in page.run("document.getElementById('status').textContent"), (
                "it is still told"
            )
        write_picture(tmp_path / "photo.png", np.full((60, 90, 3), 90, np.uint8))
        page.put_file("#file-input", tmp_path / "photo.png")
        page.until("document.getElementById('empty').hidden")
        page.click("#whole-start")
        page.until("document.getElementById('whole-text').textContent === 'Done'")
        wait_until(lambda: list(page.downloads.glob("photo_styled.png")))
        clip = make_clip(tmp_path / "clip.mp4", ClipSpec(audio="aac"))
        page.put_file("#file-input", clip)
        page.until("!document.getElementById('figures').hidden")
        page.click("#whole-start")
        page.until("document.getElementById('whole-text').textContent.startsWith('Done')")
        wait_until(lambda: list(page.downloads.glob("clip_styled.mp4")))
        # Every control has a name, and is reached by the keyboard.
        unnamed = page.run(
            "[...document.querySelectorAll('button, input, select')].filter((each) => !each.labels?.length"
            " && !each.ariaLabel && !each.getAttribute('aria-label') && !each.textContent.trim())"
            ".map((each) => each.outerHTML)"
        )
        assert unnamed == []
        with browser() as other:
            other.open(f"{link}output")
            page.click("#styles li:nth-child(2) .pick")
            other.until("document.getElementById('empty').hidden")
            assert not other.said
