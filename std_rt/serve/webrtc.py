"""Frames by WebRTC beside a session's WebSocket: the extra ``[webrtc]``, which is aiortc.

    peers = Peers(limits)
    key = peers.invite(live)                            # told to the session's own client
    answer = await peers.answer(key, offer, local, remote)
    await peers.leave(live)

The session and its WebSocket are there first, and settings stay on it. From the first frame that comes by
WebRTC, the session's frames are those, and its results go back the same way; when the connection ends, the
WebSocket takes over again. Call everything in the event loop; aiortc decodes and encodes in threads.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import time
from contextlib import suppress
from functools import partial
from typing import Any

from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import VIDEO_CLOCK_RATE, VIDEO_TIME_BASE, MediaStreamError
from aiortc.sdp import SessionDescription
from av import VideoFrame

from std_rt.core.arrays import Frame
from std_rt.core.errors import UsageError
from std_rt.serve.limits import Limits, MissingError
from std_rt.serve.protocol import Header, check_frame_size
from std_rt.serve.sessions import LiveSession, PushedFrames, Result

__all__ = ["Peers"]

_CONNECT_S = 20.0  # from the answer to the first frame
_MOST_CANDIDATES = 8
_MOST_UNDECODED = 60  # frames: two seconds

_log = logging.getLogger(__name__)


class _Painted(MediaStreamTrack):
    """The results of a session as a video track; the newest wins. `put` is for the session's thread."""

    kind = "video"

    def __init__(self, source: PushedFrames) -> None:
        super().__init__()
        self._source, self._here = source, asyncio.get_running_loop()
        self._news, self._start_s = asyncio.Event(), time.monotonic()
        self.newest: VideoFrame | None = None

    def put(self, result: Result) -> None:
        """Replace the newest result."""
        frame = VideoFrame.from_ndarray(result.frame, format="rgb24")
        frame.pts = int((time.monotonic() - self._start_s) * VIDEO_CLOCK_RATE)
        frame.time_base = VIDEO_TIME_BASE
        self.newest = frame
        with suppress(RuntimeError):  # the loop has ended, and the server with it
            self._here.call_soon_threadsafe(self._news.set)

    async def recv(self) -> VideoFrame:
        """The newest result, once there is one; aiortc asks when it has sent the one before."""
        while self.newest is None:
            self._news.clear()
            await self._news.wait()
        frame, self.newest = self.newest, None
        self._source.wake()
        return frame


class _Peer:
    """The connection of one session."""

    def __init__(self, live: LiveSession, source: PushedFrames, limits: Limits) -> None:
        self._live, self._source, self._max_pixels = live, source, limits.frame_px
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))  # else it asks Google's STUN
        self._results = _Painted(source)
        self._connection.addTrack(self._results)
        self._running: asyncio.Task[None] | None = None

    async def answer(self, offer: RTCSessionDescription, local: str) -> str:
        """The SDP of the answer; frames are taken from now on."""
        connection = self._connection
        await connection.setRemoteDescription(offer)
        _listen_at(connection, local)
        await connection.setLocalDescription(await connection.createAnswer())
        self._running = asyncio.ensure_future(self._run())
        return str(connection.localDescription.sdp)

    async def _run(self) -> None:
        """Until either side ends."""
        receiver = self._connection.getReceivers()[0]
        live, source, rests = self._live, self._source, self._source.rests
        with suppress(MediaStreamError, TimeoutError):
            frame = await asyncio.wait_for(receiver.track.recv(), _CONNECT_S)
            live.join(self._results.put, _say_nothing)
            live.by_webrtc, source.rests = True, lambda: self._results.newest is not None
            try:
                while True:
                    decode = partial(_decoded, frame, self._max_pixels)
                    source.push(Header(source.number + 1, 0, 0.0), decode)
                    if _undecoded(receiver) > _MOST_UNDECODED:
                        _log.warning("a client sends frames by WebRTC faster than they can be decoded")
                        break
                    frame = await receiver.track.recv()
            finally:
                live.by_webrtc, source.rests = False, rests
                live.leave(self._results.put, _say_nothing)
                source.wake()
        await asyncio.shield(self._connection.close())  # half closed, it could not be closed again

    async def close(self) -> None:
        """End it; returns when its threads have ended."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._connection.close()


class Peers:
    """The WebRTC connections of a server, one a session at most."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._invited: dict[str, LiveSession] = {}
        self._peers: dict[str, _Peer] = {}

    def invite(self, live: LiveSession) -> str:
        """The key that an offer for this session must name."""
        key = secrets.token_hex(16)
        self._invited[key] = live
        return key

    async def answer(self, key: str, offer: str, local: str, remote: str) -> str:
        """Answer an offer. ``local`` and ``remote``: the addresses that it came to, and from.

        Raises MissingError for a wrong key, and UsageError for an offer that cannot be taken.
        """
        live = self._invited.get(key)
        if live is None or not isinstance(live.source, PushedFrames):
            raise MissingError("there is no such session; connect to /v1/stream first")
        checked = _checked(offer, remote)
        while key in self._peers:  # another offer may come meanwhile
            await self._end(key)
        if key not in self._invited:
            raise MissingError("the session has ended")
        peer = self._peers[key] = _Peer(live, live.source, self._limits)
        try:
            return await peer.answer(checked, local)
        except Exception as error:
            await self._end(key)
            raise UsageError("the offer cannot be answered; send what RTCPeerConnection makes") from error

    async def leave(self, live: LiveSession) -> None:
        """End what there is of a session."""
        for key in [key for key, each in self._invited.items() if each is live]:
            del self._invited[key]
            await self._end(key)

    async def _end(self, key: str) -> None:
        if key in self._peers:
            await self._peers.pop(key).close()
            # aiortc's objects refer to each other, and its encoder keeps threads and memory until they are
            # collected, which Python puts off. 6 ms in `std-rt serve`, where all that was there at its start
            # is frozen.
            gc.collect()


def _checked(offer: str, remote: str) -> RTCSessionDescription:
    """An offer of one video track both ways, with candidates of the machine that sends it only."""
    try:
        description = SessionDescription.parse(offer)
        kinds = [(media.kind, media.direction) for media in description.media]
        candidates = [each for media in description.media for each in media.ice_candidates]
        str(description)  # addresses are read only when they are written
    except Exception as error:  # whatever a damaged line leads to
        raise UsageError("the offer is not an SDP that can be read") from error
    if kinds != [("video", "sendrecv")]:
        raise UsageError("offer one video track that is sent and received, and nothing else")
    candidates = [each for each in candidates if each.protocol == "udp"][:_MOST_CANDIDATES]
    if not candidates:
        raise UsageError("the offer has no ICE candidates of UDP; send it when they are gathered")
    for each in candidates:
        each.ip = remote  # so that nobody has this server send packets to others, or ask for .local names
    description.media[0].ice_candidates = candidates
    return RTCSessionDescription(str(description), "offer")


def _say_nothing(reason: str) -> None:
    """Why a session ends is told over its WebSocket, whose end is the peer's."""


def _listen_at(connection: RTCPeerConnection, address: str) -> None:
    """Have ICE listen at one address: by itself it takes all of this machine, except loopback."""
    ice: Any = connection.getTransceivers()[0].sender.transport.transport.iceGatherer._connection
    gather = ice.get_component_candidates

    async def at_address(component: int, addresses: list[str]) -> Any:
        return await gather(component, [address])

    ice.get_component_candidates = at_address


def _undecoded(receiver: Any) -> int:
    """How many frames wait for aiortc's decoder, whose queue has no limit."""
    return int(receiver._RTCRtpReceiver__decoder_queue.qsize())


def _decoded(frame: Any, max_pixels: int) -> Frame:
    check_frame_size(frame.width, frame.height, max_pixels)
    pixels: Frame = frame.to_ndarray(format="rgb24")
    return pixels
