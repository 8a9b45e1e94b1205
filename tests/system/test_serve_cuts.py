"""Clients that come and are cut off at any moment, 200 and more: the server keeps nothing of them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest

for _package in ("starlette", "uvicorn", "websockets"):
    pytest.importorskip(_package)

from support.live_support import wait_until  # noqa: E402
from support.serve_support import HEADER, encoded, form, jpeg, next_result, next_text, send_frame  # noqa: E402
from websockets.sync.client import ClientConnection, connect  # noqa: E402

from std_rt.core.bundle import Bundle  # noqa: E402
from std_rt.media import write_picture  # noqa: E402

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read memory from"),
]

_IDLE_S = 11.0  # threads of requests go away after ten
_FRAME = jpeg(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))
# A session keeps four frames at least: decoded, 200 lost ones would be 700 MB.
_MOST_MB = 25.0
_POOLED = 6  # threads for work that waits, which are made when the others are busy, and stay


@dataclass(frozen=True)
class Running:
    """A server of this test's own."""

    port: int
    pid: int

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def memory_mb(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def sessions(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/metrics") as answer:
            lines = dict(
                line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#"
            )
        return int(lines["std_rt_sessions"])

    def raw(self, data: bytes) -> socket.socket:
        one = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        one.sendall(data)
        return one

    @contextmanager
    def session(self, path: str = "/v1/stream") -> Iterator[ClientConnection]:
        with connect(f"ws://127.0.0.1:{self.port}{path}", compression=None, max_size=None) as session:
            yield session


def cut(one: socket.socket) -> None:
    """At once, with whatever is under way: the other side sees a reset."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def cut_session(session: ClientConnection) -> None:
    """Likewise; the client's own thread, which reads, ends with it."""
    session.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    session.socket.shutdown(socket.SHUT_RDWR)


_UPGRADE = (
    b"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def before_it_has_asked(server: Running) -> None:
    cut(server.raw(_UPGRADE[:60]))


def before_it_is_answered(server: Running) -> None:
    cut(server.raw(_UPGRADE))


def once_it_has_begun(server: Running) -> None:
    with server.session() as session:
        next_text(session, "session")
        cut_session(session)


def in_the_middle_of_a_frame(server: Running) -> None:
    message = HEADER.pack(1, 0, 0.0) + _FRAME
    with server.session() as session:
        next_text(session, "session")
        head = struct.pack(">BBQ4x", 0x82, 0x80 | 127, len(message))
        session.socket.sendall(head + message[: len(message) // 2])
        cut_session(session)


def before_the_result(server: Running) -> None:
    with server.session() as session:
        send_frame(session, 1, _FRAME)
        cut_session(session)


def with_results_unread(server: Running) -> None:
    with server.session() as session:
        for number in range(1, 7):
            send_frame(session, number, _FRAME)
            time.sleep(0.02)
        cut_session(session)


def after_a_result(server: Running) -> None:
    with server.session() as session:
        send_frame(session, 1, _FRAME)
        next_result(session)


def while_looking_on(server: Running) -> None:
    with server.session() as session:
        next_text(session, "session")
        with server.session("/v1/watch") as viewer:
            next_text(viewer, "session")
            send_frame(session, 1, _FRAME)
            next_result(viewer)
            cut_session(viewer)
        cut_session(session)


def in_the_middle_of_a_picture(server: Running) -> None:
    body, kind = form([("picture", ("x.jpg", _FRAME))])
    head = f"POST /v1/stylize HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    cut(server.raw(head.encode() + body[: len(body) // 2]))


def before_the_picture_is_painted(server: Running) -> None:
    style = ("style", ("s.png", encoded(np.full((32, 32, 3), 30, np.uint8))))
    body, kind = form([("picture", ("x.jpg", _FRAME)), style])
    head = f"POST /v1/stylize HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    cut(server.raw(head.encode() + body))


def with_webrtc_under_way(server: Running) -> None:
    from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription, VideoStreamTrack

    async def run(session: ClientConnection, url: str) -> None:
        client = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        client.addTrack(VideoStreamTrack())
        await client.setLocalDescription(await client.createOffer())
        offer = json.dumps({"type": "offer", "sdp": client.localDescription.sdp}).encode()
        with await asyncio.to_thread(urllib.request.urlopen, urllib.request.Request(url, offer)) as answer:
            await client.setRemoteDescription(RTCSessionDescription(**json.load(answer)))
        await asyncio.wait_for(client.getReceivers()[0].track.recv(), 20)
        cut_session(session)
        await client.close()

    with server.session() as session:
        asyncio.run(run(session, f"http://127.0.0.1:{server.port}{next_text(session, 'webrtc')}"))


_MOMENTS = [
    before_it_has_asked,
    before_it_is_answered,
    once_it_has_begun,
    in_the_middle_of_a_frame,
    before_the_result,
    with_results_unread,
    after_a_result,
    while_looking_on,
    in_the_middle_of_a_picture,
    before_the_picture_is_painted,
]


@pytest.mark.parametrize(
    ("moments", "clients", "more_threads"),
    [
        pytest.param(_MOMENTS, 200, 0, id="anytime"),
        pytest.param([with_webrtc_under_way], 40, _POOLED, id="webrtc"),
    ],
)
def test_clients_that_are_cut_off_leave_no_memory_thread_or_file(
    handmade: Bundle,
    tmp_path: Path,
    moments: list[Callable[[Running], None]],
    clients: int,
    more_threads: int,
) -> None:
    if moments == [with_webrtc_under_way]:
        pytest.importorskip("aiortc", reason="the extra [webrtc] is not installed")
    write_picture(tmp_path / "art.png", np.full((32, 32, 3), 90, np.uint8))
    command = [sys.executable, "-m", "std_rt", "serve", "--no-open", "--port", "0", "--backend", "openvino"]
    command += ["--bundle", str(handmade.path), "-s", str(tmp_path / "art.png")]

    # glibc keeps a pool of memory for each of a few threads, and what new threads leave in these grows for a
    # while although nothing is kept.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}

    def cut_off(times: int) -> tuple[int, int, float]:
        """Threads, open files and MB afterwards, at their fewest: idle threads go after a while."""
        for moment in islice(cycle(moments), times):
            moment(server)
            wait_until(lambda: server.sessions() < 6)  # of eight, beyond which clients are refused
        wait_until(lambda: server.sessions() == 0)
        left = []
        for _ in range(8):
            time.sleep(_IDLE_S / 4)
            server.sessions()  # a request lets go of those that have been idle
            left.append((server.threads(), server.files(), server.memory_mb()))
        threads, files, memory_mb = map(min, zip(*left, strict=True))
        return int(threads), int(files), memory_mb

    log = tmp_path / "log"
    with (
        log.open("w") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline().strip().rstrip("/").rpartition(":")[2])
            server = Running(port, process.pid)
            threads, files, memory_mb = cut_off(clients // 2)
            after = cut_off(clients)
            print(f"threads {threads} -> {after[0]}, files {files} -> {after[1]}")
            print(f"memory {memory_mb:.1f} -> {after[2]:.1f} MB")
            assert after[0] <= threads + more_threads
            assert after[1] <= files
            assert after[2] < memory_mb + _MOST_MB
        finally:
            process.terminate()
            assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()
