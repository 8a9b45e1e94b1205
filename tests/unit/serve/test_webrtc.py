"""Frames by WebRTC, with aiortc as the client: what is painted, what is refused, what is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from support.live_support import wait_until
from support.serve_support import Site, next_text, own, running
from websockets.asyncio.client import ClientConnection, connect

pytest.importorskip("aiortc", reason="the extra [webrtc] is not installed")

from aiortc import (
    RTCConfiguration,
    RTCPeerConnection,
    RTCSessionDescription,
    VideoStreamTrack,
)
from aiortc.sdp import SessionDescription
from av import VideoFrame
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from std_rt.pipeline.stylizer import Stylizer
from std_rt.serve.app import Options, Server
from std_rt.serve.limits import Limits

_LONGEST_S = 120.0


class Camera(VideoStreamTrack):
    """A picture that is dark on the left and light on the right, 30 times a second."""

    def __init__(self, height: int = 64, width: int = 96) -> None:
        super().__init__()
        self._picture = np.full((height, width, 3), 60, np.uint8)
        self._picture[:, width // 2 :] = 200

    async def recv(self) -> VideoFrame:
        frame = VideoFrame.from_ndarray(self._picture, format="rgb24")
        frame.pts, frame.time_base = await self.next_timestamp()
        return frame


async def offer_of(client: RTCPeerConnection) -> dict[str, str]:
    await client.setLocalDescription(await client.createOffer())
    return {"type": "offer", "sdp": client.localDescription.sdp}


async def post(site: Site, path: str, offer: dict[str, str], **headers: str) -> Any:
    body = json.dumps(offer).encode()
    return await asyncio.to_thread(site.ask, "POST", path, body, headers)


async def text(socket: ClientConnection, key: str) -> Any:
    """The value of the next text message that has ``key``."""
    while True:
        message = await socket.recv()
        if isinstance(message, str) and key in (found := json.loads(message)):
            return found[key]


def with_client(
    site: Site, work: Callable[[ClientConnection, str, RTCPeerConnection], Awaitable[None]]
) -> None:
    """Run ``work`` with a session's WebSocket, where it may offer WebRTC, and a client for it."""

    async def run() -> None:
        client = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        try:
            async with asyncio.timeout(_LONGEST_S), connect(f"ws://{site.host}/v1/stream") as socket:
                await work(socket, await text(socket, "webrtc"), client)
        finally:
            await client.close()

    asyncio.run(run())


async def connected(site: Site, path: str, client: RTCPeerConnection, camera: Camera) -> str:
    """Offer a camera's track; returns the answer's SDP."""
    client.addTrack(camera)
    answer = await post(site, path, await offer_of(client))
    assert answer.status == 200, answer
    await client.setRemoteDescription(RTCSessionDescription(**answer.json))
    return str(answer.json["sdp"])


def decoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "video-decoder"]


def test_a_track_is_painted_as_frames_of_the_websocket_are(
    site: Site, stylizer: Stylizer, art: dict[str, np.ndarray]
) -> None:
    camera = Camera()
    stylizer.set_style(art["light"])
    expected = stylizer.stylize(camera._picture).astype(float)
    stylizer.set_style(art["dark"])
    other = stylizer.stylize(camera._picture).astype(float)
    light = next(style.id for style in site.server.library.all() if style.name == "light")

    async def work(socket: ClientConnection, path: str, client: RTCPeerConnection) -> None:
        sdp = await connected(site, path, client, camera)
        found = SessionDescription.parse(sdp).media[0].ice_candidates
        assert [each.ip for each in found] == ["127.0.0.1"], "it listens where the page is served, only"
        # Settings go over the WebSocket.
        await socket.send(json.dumps({"styles": {light: 1}, "crossfade": 0}))
        while (await text(socket, "figures"))["transport"] != "webrtc":
            pass
        track = client.getReceivers()[0].track
        frame = other
        while near(frame, expected) >= 0.5 * near(frame, other):  # until the style that was asked for comes
            frame = (await track.recv()).to_ndarray(format="rgb24").astype(float)
            assert frame.shape == expected.shape
        for _ in range(3):
            assert isinstance(await socket.recv(), str), "a result went over the WebSocket too"

    with_client(site, work)
    wait_until(lambda: not decoders())
    wait_until(lambda: site.server.pool.counts()["sessions"] == 0)


def test_with_its_session_a_connection_is_freed_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when Python collects next: until then its encoder keeps threads and memory."""
    made: list[weakref.ref[RTCPeerConnection]] = []

    def make(configuration: RTCConfiguration) -> RTCPeerConnection:
        connection = RTCPeerConnection(configuration)
        made.append(weakref.ref(connection))
        return connection

    monkeypatch.setattr("std_rt.serve.webrtc.RTCPeerConnection", make)

    async def work(socket: ClientConnection, path: str, client: RTCPeerConnection) -> None:
        await connected(site, path, client, Camera())
        while (await text(socket, "figures"))["transport"] != "webrtc":
            pass
        assert [each() is None for each in made] == [False]

    gc.disable()
    try:
        with_client(site, work)
        wait_until(lambda: [each() is None for each in made] == [True])
    finally:
        gc.enable()


def near(frame: np.ndarray, expected: np.ndarray) -> float:
    """Mean distance, over what compression leaves as it is."""
    return float(np.abs(frame - expected).mean())


def test_the_websocket_goes_on_when_the_track_ends(site: Site) -> None:
    async def work(socket: ClientConnection, path: str, client: RTCPeerConnection) -> None:
        await connected(site, path, client, Camera())
        while (await text(socket, "figures"))["transport"] != "webrtc":
            pass
        await client.close()
        while (await text(socket, "figures"))["transport"] != "websocket":
            pass
        await asyncio.to_thread(wait_until, lambda: not decoders())  # it ends a moment later

    with_client(site, work)


def test_a_frame_that_is_too_large_ends_the_session_in_one_line(
    stylizer: Stylizer, art: dict[str, np.ndarray]
) -> None:
    async def work(socket: ClientConnection, path: str, client: RTCPeerConnection) -> None:
        await connected(site, path, client, Camera(128, 128))
        assert await text(socket, "error") == "the frame is 128 x 128 px; the limit is 0.0 megapixels"

    limits = Limits(frame_px=100 * 100)
    with Server(stylizer, own(art), Options(limits=limits)) as server, running(server) as site:
        with_client(site, work)
        wait_until(lambda: not decoders())


def test_an_offer_needs_a_session_and_the_rules_of_all_requests(site: Site) -> None:
    async def work(socket: ClientConnection, path: str, client: RTCPeerConnection) -> None:
        client.addTrack(Camera())
        offer = await offer_of(client)
        wrong = await post(site, f"/v1/webrtc/{'0' * 32}", offer)
        assert wrong.status == 404
        assert "there is no such session" in wrong.error
        assert (await post(site, path, offer, Origin="http://elsewhere")).status == 403
        assert (await post(site, path, offer, Host="elsewhere")).status == 421
        large = {**offer, "sdp": offer["sdp"] + "a=x\r\n" * 20_000}
        assert (await post(site, path, large)).status == 413
        assert "offer as JSON" in (await post(site, path, {"type": "answer", "sdp": "v=0"})).error

    with_client(site, work)


def test_those_who_look_on_are_not_invited(site: Site) -> None:
    with site.connect() as socket:
        assert next_text(socket, "webrtc") is not None
        with site.connect("/v1/watch") as watching:
            assert next_text(watching, "webrtc") is None


def test_what_is_offered_beside_one_track_both_ways_is_refused(site: Site) -> None:
    async def work(socket: ClientConnection, path: str, client: RTCPeerConnection) -> None:
        client.addTrack(Camera())
        sdp = (await offer_of(client))["sdp"]
        for wrong, said in (
            (sdp.replace("a=sendrecv", "a=recvonly"), "one video track"),
            (sdp + sdp[sdp.index("m=video") :], "one video track"),
            ("v=0\r\n", "one video track"),
            ("\r\n".join(line for line in sdp.split("\r\n") if "candidate" not in line), "no ICE candidates"),
            (sdp.replace("VP8", "VPX").replace("H264", "X264").replace("AV1", "AVX"), "cannot be answered"),
            ("m=video nonsense", "not an SDP"),
        ):
            answer = await post(site, path, {"type": "offer", "sdp": wrong})
            assert answer.status == 400
            assert said in answer.error
        assert not decoders()

    with_client(site, work)


def test_the_addresses_of_an_offer_are_not_asked(site: Site) -> None:
    """Else an offer would have the server send packets to any address, or ask the network for a name."""
    from std_rt.serve.webrtc import _checked

    async def work(socket: ClientConnection, path: str, client: RTCPeerConnection) -> None:
        client.addTrack(Camera())
        sdp = (await offer_of(client))["sdp"]
        lines = [line for line in sdp.split("\r\n") if line.startswith("a=candidate")]
        parts = lines[0].split()
        for address in ("192.0.2.99", "0b27a4f4.local"):
            forged = sdp.replace(lines[0], " ".join([*parts[:4], address, *parts[5:]]))
            media = SessionDescription.parse(_checked(forged, "127.0.0.1").sdp).media[0]
            assert {each.ip for each in media.ice_candidates} == {"127.0.0.1"}

    with_client(site, work)


def test_damaged_offers_are_refused_in_one_line(site: Site) -> None:
    async def work(socket: ClientConnection, path: str, client: RTCPeerConnection) -> None:
        client.addTrack(Camera())
        sdp = (await offer_of(client))["sdp"]
        spans = st.tuples(*[st.integers(0, len(sdp))] * 2, st.text(max_size=8))

        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(spans)
        @example((sdp.index("c=IN IP4") + 9, 1, "?"))  # an address that is none
        def damaged(span: tuple[int, int, str]) -> None:
            start, length, put = span
            body = json.dumps({"type": "offer", "sdp": sdp[:start] + put + sdp[start + length % 40 :]})
            answer = site.ask("POST", path, body.encode())
            assert answer.status in (200, 400)
            if answer.status != 200:
                assert answer.error

        await asyncio.to_thread(damaged)

    with_client(site, work)
    wait_until(lambda: not decoders())
