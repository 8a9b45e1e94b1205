"""Chromium without a window, driven over its DevTools protocol, with a camera that shows a test picture."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_SOON_S = 60.0  # a browser starts slowly where others work too
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--remote-debugging-port=0"),
    *("--disable-background-networking", "--disable-component-update", "--mute-audio", "--hide-scrollbars"),
)


def _wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + _SOON_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


class Page:
    """One page. ``said``: what its console said, and errors nobody caught. ``downloads``: what it saved."""

    def __init__(self, socket: ClientConnection, downloads: Path) -> None:
        self._socket, self._ids, self.downloads = socket, itertools.count(1), downloads
        self.said: list[str] = []
        self.requested: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> Any:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": values}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        values = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.said.append(str(values["exceptionDetails"].get("exception", values)))
            case "Log.entryAdded" if values["entry"]["level"] == "error":
                self.said.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requested.append(values["request"]["url"])
            case "Network.webSocketCreated":
                self.requested.append(values["url"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, script: str) -> None:
        _wait_until(lambda: self.run(script))

    def click(self, css: str) -> None:
        self.run(f"document.querySelector({css!r}).click()")

    def put_file(self, css: str, path: Path) -> None:
        """What choosing a file does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=css)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def size(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, full: bool = False) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(*flags: str) -> Iterator[Page]:
    """A browser with one empty page; the folder ``downloads`` takes what it saves. ``flags``: more."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, *_FLAGS, *flags, f"--user-data-dir={folder}", "about:blank"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                port = Path(folder) / "DevToolsActivePort"
                _wait_until(lambda: port.exists() and port.read_text().count("\n"))
                yield from _page(port.read_text().split("\n")[0], Path(folder))
            finally:
                process.terminate()


def _page(port: str, folder: Path) -> Iterator[Page]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
        target = next(each for each in json.load(answer) if each["type"] == "page")
    with connect(
        target["webSocketDebuggerUrl"], max_size=None, compression=None, ping_interval=None
    ) as socket:
        page = Page(socket, folder / "downloads")
        page.downloads.mkdir()
        page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(page.downloads))
        yield page
