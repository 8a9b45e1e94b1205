"""A server in a thread, and a plain client: http.client for requests, websockets for sessions."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from PIL import Image
from support.live_support import wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from std_rt.serve.app import OwnStyle, Server, uvicorn_config

Frame = NDArray[np.uint8]
HEADER = struct.Struct("<IId")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        assert self.status >= 400, self
        found = self.json
        assert list(found) == ["error"]
        assert "Traceback" not in found["error"]
        assert "\n" not in found["error"]
        return str(found["error"])


@dataclass(frozen=True)
class Site:
    """A running server."""

    port: int
    server: Server

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, *parts: tuple[str, Any], **headers: str) -> Answer:
        """A form; parts are (name, text) or (name, (file name, bytes))."""
        body, kind = form(parts)
        return self.ask("POST", path, body, {"Content-Type": kind, **headers})

    @contextmanager
    def connect(self, path: str = "/v1/stream", **options: Any) -> Iterator[ClientConnection]:
        options = {"compression": None, "max_size": None, "open_timeout": 60, "close_timeout": 5} | options
        with connect(f"ws://{self.host}{path}", **options) as socket:
            yield socket


def own(art: Mapping[str, Frame]) -> list[OwnStyle]:
    """Frames as the styles of a server."""
    return [OwnStyle(frame, name) for name, frame in art.items()]


@contextmanager
def running(server: Server) -> Iterator[Site]:
    """The server, as `std-rt serve` runs it."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    served = uvicorn.Server(uvicorn_config(server))
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listening]}, name="test-server")
    thread.start()
    try:
        wait_until(lambda: served.started)
        yield Site(listening.getsockname()[1], server)
    finally:
        served.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


def form(parts: Sequence[tuple[str, Any]]) -> tuple[bytes, str]:
    """Body and Content-Type of a multipart form."""
    lines = b""
    for name, value in parts:
        if isinstance(value, tuple):
            head, data = f'name="{name}"; filename="{value[0]}"', value[1]
        else:
            head, data = f'name="{name}"', str(value).encode()
        lines += f"--edge\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
    return lines + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def encoded(frame: Frame, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Frame:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def jpeg(frame: Frame) -> bytes:
    return encoded(frame, "JPEG", quality=95, subsampling=0)


def send_frame(socket: ClientConnection, number: int, data: bytes, received: int = 0) -> None:
    socket.send(HEADER.pack(number, received, 1000.0 * number) + data)


def next_result(socket: ClientConnection) -> tuple[int, float, bytes]:
    """Number, the client's time and the JPEG of the next result; texts are skipped."""
    while True:
        message = socket.recv(timeout=60)
        if isinstance(message, bytes):
            number, _, at_ms = HEADER.unpack_from(message)
            return number, at_ms, message[HEADER.size :]
        assert "error" not in json.loads(message), message


def next_text(socket: ClientConnection, key: str) -> Any:
    """The value of the next text message that has ``key``."""
    while True:
        message = socket.recv(timeout=60)
        if isinstance(message, str) and key in (found := json.loads(message)):
            return found[key]


@dataclass
class Streaming:
    """A session that sends a frame, waits for its result, sends the next, ... in a thread of its own."""

    invitation: str | None
    """Where it may offer WebRTC."""
    results: int = 0
    longest_gap_s: float = 0.0
    over: bool = False

    def run(self, socket: ClientConnection) -> None:
        """Until ``over``: ten frames a second, which is little work for two cores that test other things."""
        data, before_s = jpeg(np.full((64, 64, 3), 99, np.uint8)), time.monotonic()
        while not self.over:
            send_frame(socket, self.results + 1, data, self.results)
            assert next_result(socket)[0] == self.results + 1
            now_s = time.monotonic()
            self.longest_gap_s, before_s = max(self.longest_gap_s, now_s - before_s), now_s
            self.results += 1
            time.sleep(0.1)

    @contextmanager
    def undisturbed(self, most_s: float = 5.0) -> Iterator[None]:
        """It gets results during the block, and after it; never later than ``most_s`` after one another."""
        self.longest_gap_s = 0.0
        yield
        before = self.results
        wait_until(lambda: self.results > before)
        assert self.longest_gap_s < most_s


@contextmanager
def streaming(site: Site, path: str = "/v1/stream") -> Iterator[Streaming]:
    """A session that goes on all along; the block fails if it does."""
    with site.connect(path) as socket, ThreadPoolExecutor(1) as pool:
        session = Streaming(next_text(socket, "webrtc"))
        running = pool.submit(session.run, socket)
        try:
            wait_until(lambda: session.results or running.done())
            yield session
        finally:
            session.over = True
            running.result()


def end_code(socket: ClientConnection) -> int | None:
    """The code that the server ends the connection with."""
    try:
        while True:
            socket.recv(timeout=60)
    except ConnectionClosed as closed:
        return None if closed.rcvd is None else closed.rcvd.code


def threads() -> set[str]:
    """Names of this package's threads that run now."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("std-rt")}


def soon(seconds: float = 0.2) -> None:
    time.sleep(seconds)
