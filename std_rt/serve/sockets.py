"""The WebSockets: a session with its client, and those who look on."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from std_rt.core.errors import StdRtError, UsageError, one_line
from std_rt.serve.limits import BusyError, Limits
from std_rt.serve.protocol import Header, Look, parse_message
from std_rt.serve.sessions import LiveSession, PushedFrames, Result, SessionPool

if TYPE_CHECKING:
    from std_rt.serve.webrtc import Peers

__all__ = ["Sockets"]

_FIGURES_EVERY_S = 1.0
_TRY_AGAIN, _REFUSED, _FAILED = 1013, 1008, 1011

_log = logging.getLogger(__name__)


class _Outbox:
    """The newest result for one client, and how many it has left unread. `put` is for any thread."""

    def __init__(self, unread: int, taken: Callable[[], None]) -> None:
        """``taken`` is called when the newest result is on its way, and there is room for another."""
        self._taken = taken
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._most, self._unread = unread, deque[int]()
        self.newest: tuple[Header, bytes] | None = None

    def put(self, result: tuple[Header, bytes]) -> None:
        """Replace the newest result."""
        self.newest = result
        self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop has ended, and the server with it
            self._loop.call_soon_threadsafe(self._news.set)

    async def get(self) -> tuple[Header, bytes]:
        """The newest result, once there is one and the client has read those before."""
        while self.newest is None or len(self._unread) >= self._most:
            self._news.clear()
            await self._news.wait()
        result, self.newest = self.newest, None
        self._unread.append(result[0].number)
        self._taken()
        return result

    def read(self, number: int) -> None:
        """The client has the result of this number, and so all before it."""
        while self._unread and self._unread[0] <= number:
            self._unread.popleft()
        self._news.set()


class Sockets:
    """The two WebSocket endpoints."""

    def __init__(self, pool: SessionPool, camera: LiveSession | None, peers: Peers | None) -> None:
        """``peers``: None without WebRTC."""
        self._pool, self._limits, self._camera, self._peers = pool, pool.limits, camera, peers
        self._viewers = 0

    async def stream(self, socket: WebSocket) -> None:
        """``/v1/stream``: frames and settings in, results out; ``?source=camera`` is the server's own."""
        await socket.accept()
        if socket.query_params.get("source") == "camera":
            await self._with(socket, self._camera, "this server has no camera; start it with --camera 0")
            return
        try:
            live = await anyio.to_thread.run_sync(self._pool.open, PushedFrames(self._limits))
        except StdRtError as error:
            await _refuse(socket, error)
            return
        try:
            invitation = None if self._peers is None else f"/v1/webrtc/{self._peers.invite(live)}"
            await _Connection(socket, live, self._limits, controls=True, invitation=invitation).run()
        finally:
            with anyio.CancelScope(shield=True):  # its threads end, whatever ends the connection
                if self._peers is not None:
                    await self._peers.leave(live)
                await anyio.to_thread.run_sync(self._pool.close, live)

    async def watch(self, socket: WebSocket) -> None:
        """``/v1/watch``: the results of a session (``?session=ID``; else the last one opened)."""
        await socket.accept()
        try:
            live = self._pool.find(socket.query_params.get("session") or None)
        except StdRtError as error:
            await _refuse(socket, error)
            return
        await self._with(socket, live, "", controls=False)

    async def _with(
        self, socket: WebSocket, live: LiveSession | None, without: str, *, controls: bool = True
    ) -> None:
        """Join a session that goes on without this client."""
        if live is None:
            await _refuse(socket, UsageError(without))
        elif self._viewers >= self._limits.viewers:
            await _refuse(socket, BusyError(f"busy: {self._viewers} look on, which is the limit"))
        else:
            self._viewers += 1
            try:
                await _Connection(socket, live, self._limits, controls=controls).run()
            finally:
                self._viewers -= 1


async def _refuse(socket: WebSocket, error: StdRtError) -> None:
    with suppress(RuntimeError, WebSocketDisconnect):
        await socket.send_json({"error": one_line(error)})
        await socket.close(_TRY_AGAIN if isinstance(error, BusyError) else _REFUSED, one_line(error)[:120])


class _Connection:
    """One client of one session."""

    def __init__(
        self,
        socket: WebSocket,
        live: LiveSession,
        limits: Limits,
        *,
        controls: bool,
        invitation: str | None = None,
    ) -> None:
        """``invitation``: where the client may offer WebRTC."""
        self._socket, self._live, self._limits, self._controls = socket, live, limits, controls
        self._invitation = invitation
        source = live.source
        wake = source.wake if isinstance(source, PushedFrames) else lambda: None
        self._outbox = _Outbox(limits.unread, wake)
        self._loop = asyncio.get_running_loop()
        self._over = self._loop.create_future()
        self._asked: dict[str, Any] = {}
        self._asked_news = asyncio.Event()
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Until either side ends."""
        live = self._live
        live.join(self._put, self._end)
        if self._owns and isinstance(live.source, PushedFrames):
            live.source.rests = lambda: self._outbox.newest is not None
        parts: list[Callable[[], Awaitable[None]]] = [self._receive, self._send, self._change, self._report]
        tasks = [asyncio.ensure_future(part()) for part in parts]
        try:
            await asyncio.wait([*tasks, self._over], return_when=asyncio.FIRST_COMPLETED)
        finally:
            live.leave(self._put, self._end)
            for task in tasks:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
        await self._close(found)

    def _put(self, result: Result) -> None:
        """Encode a result (in the session's thread) and have it sent, unless WebRTC takes it."""
        if not (self._owns and self._live.by_webrtc):
            self._outbox.put((result.header, result.jpeg))

    @property
    def _owns(self) -> bool:
        """Whether the session's frames come from this client."""
        return self._controls and self._live.owned

    def _end(self, reason: str) -> None:
        """The session is over (called in its thread)."""

        def told() -> None:
            if not self._over.done():
                self._over.set_result(reason)

        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(told)

    async def _close(self, found: list[Any]) -> None:
        errors = [each for each in found if isinstance(each, StdRtError)]
        gone = (WebSocketDisconnect, RuntimeError, OSError)  # the client is: no failure
        others = [each for each in found if isinstance(each, Exception) and not isinstance(each, gone)]
        reason = one_line(errors[0]) if errors else self._over.result() if self._over.done() else ""
        code = _REFUSED if reason else 1000
        if others and not errors:
            _log.error("a connection has failed", exc_info=others[0])
            reason, code = "the server has failed; its log says more", _FAILED
        if self._socket.client_state is not WebSocketState.CONNECTED:
            return
        with suppress(RuntimeError, WebSocketDisconnect, OSError):
            if reason:
                await self._tell(error=reason)
            await self._socket.close(code, reason[:120])

    async def _tell(self, **message: Any) -> None:
        async with self._sending:
            await self._socket.send_json(message)

    async def _send(self) -> None:
        quality = self._live.look.described()
        await self._tell(
            session=self._live.id, look=quality, unread=self._limits.unread, webrtc=self._invitation
        )
        while True:
            header, data = await self._outbox.get()
            async with self._sending:
                await self._socket.send_bytes(header.pack(data))

    async def _receive(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1006))
            if (data := message.get("bytes")) is not None:
                self._take_frame(data)
            else:
                await self._take_text(message.get("text") or "")

    def _take_frame(self, data: bytes) -> None:
        source = self._live.source
        if not (self._owns and isinstance(source, PushedFrames)):
            raise UsageError("this connection takes no frames; connect to /v1/stream")
        if len(data) > self._limits.frame_bytes:
            raise UsageError(f"a frame has {len(data)} bytes; the limit is {self._limits.frame_bytes}")
        header, picture = Header.unpack(data)
        if self._live.by_webrtc:  # it was sent before the client could know
            return
        if header.number <= source.number:
            raise UsageError(f"frames must have rising numbers, got {header.number} after {source.number}")
        self._outbox.read(header.received)
        source.push(header, picture)

    async def _take_text(self, text: str) -> None:
        try:
            if len(text) > self._limits.message_bytes:
                raise UsageError(
                    f"a message has {len(text)} characters; the limit is {self._limits.message_bytes}"
                )
            asked = parse_message(text)
            received = asked.pop("received", 0)
            if not isinstance(received, int):
                raise UsageError("received must be the number of a result")
        except StdRtError as error:
            await self._tell(error=one_line(error))
            return
        self._outbox.read(received)
        if asked and not self._controls:
            await self._tell(error="this connection only looks on")
        elif asked:
            self._asked |= asked  # a slider's newest value wins
            self._asked_news.set()

    async def _change(self) -> None:
        """Settings, one change after the other: new styles take a moment to encode."""
        while True:
            await self._asked_news.wait()
            self._asked_news.clear()
            asked, self._asked = self._asked, {}
            try:
                look: Look = await anyio.to_thread.run_sync(self._live.apply, asked)
            except StdRtError as error:
                await self._tell(error=one_line(error))
            else:
                await self._tell(look=look.described())

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_FIGURES_EVERY_S)
            await self._tell(figures=self._live.figures())
            while self._live.mixer.problems:
                await self._tell(error=self._live.mixer.problems.popleft())
