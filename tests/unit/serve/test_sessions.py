"""Sessions over a WebSocket: what they paint, together and alone, and what they leave behind."""

from __future__ import annotations

import gc
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count, islice
from socket import SHUT_RDWR
from typing import Any

import numpy as np
import pytest
from support.live_support import ScriptedSource, wait_until
from support.serve_support import (
    HEADER,
    Frame,
    Site,
    decoded,
    encoded,
    end_code,
    jpeg,
    next_result,
    next_text,
    own,
    running,
    send_frame,
    soon,
    threads,
)
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from std_rt.pipeline.stylizer import Stylizer
from std_rt.serve.app import Options, Server
from std_rt.serve.limits import Limits
from std_rt.serve.protocol import Header, Look, encode_frame
from std_rt.serve.sessions import LiveSession, PushedFrames


def noise(seed: int, height: int = 64, width: int = 64) -> Frame:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def set_look(socket: ClientConnection, **asked: Any) -> dict[str, Any]:
    socket.send(json.dumps(asked))
    return next_text(socket, "look")


@contextmanager
def begun(site: Site) -> Iterator[ClientConnection]:
    """A connection whose session runs, once there is room: those that end keep their places for a moment."""
    wait_until(lambda: site.server.pool.counts()["sessions"] < site.server.limits.sessions)
    with site.connect() as socket:
        next_text(socket, "session")
        yield socket


def painted(socket: ClientConnection, number: int, data: bytes) -> bytes:
    send_frame(socket, number, data, number - 1)
    return next_result(socket)[2]


def test_a_session_paints_what_the_stylizer_paints(
    site: Site, stylizer: Stylizer, art: dict[str, Frame]
) -> None:
    data = jpeg(noise(1))
    stylizer.set_style(art["dark"])
    expected = encode_frame(stylizer.stylize(decoded(data)))
    with site.connect() as socket:
        send_frame(socket, 7, data)
        number, at_ms, result = next_result(socket)
        assert (number, at_ms) == (7, 7000.0)
        assert result == expected
        assert next_text(socket, "figures")["steps"] == 2


def test_settings_change_what_is_painted(site: Site, stylizer: Stylizer, art: dict[str, Frame]) -> None:
    ids = {style.name: style.id for style in site.server.library.all()}
    data = jpeg(noise(2, 64, 96))
    with begun(site) as socket:
        look = set_look(socket, styles={ids["dark"]: 1, ids["light"]: 3}, crossfade=0)
        assert look["styles"] == {ids["dark"]: 1, ids["light"]: 3}
        set_look(socket, size=48, steps=1, keep_colours=True, strength=0.5)
        soon(0.4)  # a change of strength fades for a quarter of a second
        result = painted(socket, 1, data)
    pairs = [(art["dark"], 1.0), (art["light"], 3.0)]
    with Stylizer.load(stylizer.bundle, backend="openvino", precision="fp32", size=48, steps=1) as alone:
        alone.set_style(pairs, 0.5, keep_colours=True)
        expected = alone.stylize(decoded(data))
    np.testing.assert_array_equal(decoded(result), decoded(encode_frame(expected)))


def test_several_sessions_paint_what_each_paints_alone(site: Site) -> None:
    """Each has its own style, size and steadiness; nothing of one gets into another."""
    ids = [style.id for style in site.server.library.all()]
    looks = [
        {"styles": {ids[0]: 1}, "size": 48},
        {"styles": {ids[1]: 1}, "temporal": "full", "keep_colours": True},
        {"styles": {ids[0]: 1, ids[1]: 1}, "steps": 1, "temporal": "noise"},
    ]
    clips = [[jpeg(noise(10 * i + k, 64, 64 + 16 * i)) for k in range(5)] for i in range(len(looks))]

    def run(i: int) -> list[bytes]:
        with begun(site) as socket:
            set_look(socket, **looks[i], crossfade=0)
            soon(0.4)
            return [painted(socket, number, data) for number, data in enumerate(clips[i], 1)]

    alone = [run(i) for i in range(len(looks))]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(run, range(len(looks))))
    assert together == alone
    assert len({results[0] for results in alone}) == len(looks)


def test_sessions_start_with_the_look_of_the_server(stylizer: Stylizer, art: dict[str, Frame]) -> None:
    look = Look(strength=0.5, stroke_size=2.0, keep_colours=True, size=48, steps=1, seed=3)
    data = jpeg(noise(2, 64, 96))
    with (
        Server(stylizer, own(art), Options(look=look)) as server,
        running(server) as site,
        begun(site) as socket,
    ):
        result = painted(socket, 1, data)
        socket.send(json.dumps({"seed": 4}))
        assert "the seed of a session is the one" in next_text(socket, "error")
    with Stylizer.load(stylizer.bundle, backend="openvino", precision="fp32", size=48, steps=1) as alone:
        alone.set_style(art["dark"], 0.5, stroke_size=2.0, keep_colours=True)
        assert result == encode_frame(alone.stylize(decoded(data), 3))


def test_styles_with_weights_are_the_blend_that_sessions_start_with(
    stylizer: Stylizer, art: dict[str, Frame]
) -> None:
    styles = [replace(style, weight=weight) for style, weight in zip(own(art), (0.25, 0.75), strict=True)]
    with Server(stylizer, styles, Options()) as server, running(server) as site, site.connect() as socket:
        assert list(next_text(socket, "look")["styles"].values()) == [0.25, 0.75]
        result = painted(socket, 1, jpeg(noise(3)))
    stylizer.set_style([(art["dark"], 0.25), (art["light"], 0.75)])
    assert result == encode_frame(stylizer.stylize(decoded(jpeg(noise(3)))))


def test_a_wrong_setting_is_told_and_nothing_changes(site: Site) -> None:
    with begun(site) as socket:
        for asked, said in [
            ({"strength": 99}, "style strength must be in"),
            ({"strength": "much"}, "strength must be a number, got 'much'"),
            ({"size": 100_000}, "works at 16 to 512 px"),
            ({"steps": 77}, "steps, not 77"),
            ({"styles": {"nobody": 1}}, "there is no style 'nobody'"),
            ({"styles": {"a": float("nan")}}, "must be a number"),
            ({"temporal": "sometimes"}, "temporal must be one of off, noise, full"),
            ({"sharpness": 1}, "there is no setting 'sharpness'; use one of styles, strength"),
        ]:
            socket.send(json.dumps(asked))
            assert said in next_text(socket, "error")
        for text in ("{", "[]", '"x"', "[" * 5000, "x" * 70_000):
            socket.send(text)
            assert "\n" not in next_text(socket, "error")
        assert painted(socket, 1, jpeg(noise(3)))


def test_the_newest_frame_wins_on_the_way_in() -> None:
    source = PushedFrames(Limits())
    for number in (1, 2, 3):
        source.push(Header(number, 0, 0.0), jpeg(np.full((8, 8, 3), 10 * number, np.uint8)))
    taken = source.read()
    assert taken is not None
    assert source.header(taken.index).number == 3
    assert abs(int(taken.frame.mean()) - 30) <= 1
    assert source.replaced == 2
    source.close()
    assert source.read() is None


def test_a_client_that_stops_reading_costs_the_engines_nothing_and_gets_no_old_frames(site: Site) -> None:
    data = jpeg(noise(4))
    with begun(site) as slow, begun(site) as other:
        numbers, before = count(1), -1
        while before != (now := site.server.pool.counts()["frames"]):  # never says what it has received
            before = now
            for last in islice(numbers, 20):
                send_frame(slow, last, data)
                soon(0.1)
            assert last < 500, "its frames still run through the engines"
        for last in islice(numbers, 28):
            send_frame(slow, last, data)
        soon(1.0)
        assert site.server.pool.counts()["frames"] == before
        assert painted(other, 1, data), "the other session is held up"
        unread = [next_result(slow)[0] for _ in range(site.server.limits.unread)]
        slow.send(json.dumps({"received": unread[-1]}))
        slow.send(json.dumps({"received": next_result(slow)[0]}))
        assert next_result(slow)[0] == last, "the newest frame is what it gets next"


def test_one_session_too_many_is_told_that_it_is_busy(site: Site) -> None:
    with ExitStack() as places:
        for _ in range(site.server.limits.sessions):
            places.enter_context(begun(site))
        with site.connect() as late:
            assert next_text(late, "error").startswith("busy: 4 sessions run")
            assert end_code(late) == 1013  # try again later
    with begun(site):  # there is room again
        pass


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"short", "a frame is a header of 16 bytes and a picture, got 5 bytes"),
        (HEADER.pack(1, 0, 0.0) + b"no jpeg", "the frame is not a JPEG, or it is damaged"),
        (HEADER.pack(1, 0, 0.0) + jpeg(noise(5))[:300], "the frame is not a JPEG, or it is damaged"),
        (HEADER.pack(1, 0, 0.0) + encoded(noise(5)), "the frame is not a JPEG"),
        (HEADER.pack(0, 0, 0.0) + jpeg(noise(5)), "frames must have rising numbers, got 0 after 0"),
    ],
)
def test_a_bad_frame_ends_its_session_with_one_line(site: Site, message: bytes, said: str) -> None:
    with begun(site) as socket, begun(site) as other:
        socket.send(message)
        assert said in next_text(socket, "error")
        assert end_code(socket) == 1008  # policy violation
        assert painted(other, 1, jpeg(noise(6)))


def test_a_bomb_is_refused_before_it_is_decoded(site: Site) -> None:
    small = bytearray(jpeg(np.zeros((8, 8, 3), np.uint8)))
    at = small.index(b"\xff\xc0")
    small[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)  # 10 GB of pixels
    with begun(site) as socket:
        socket.send(HEADER.pack(1, 0, 0.0) + bytes(small))
        assert "the frame is 60000 x 60000 px; the limit is 1.0 megapixels" in next_text(socket, "error")


def test_an_oversized_message_ends_the_connection(site: Site) -> None:
    with begun(site) as socket:
        with suppress(ConnectionClosed):  # the server may hang up before it has all of it
            socket.send(bytes(site.server.limits.frame_bytes + 100))
        assert end_code(socket) in (1009, None)  # message too big; or cut off in the middle of it
    with begun(site) as other:
        assert painted(other, 1, jpeg(noise(6)))


def test_those_who_look_on_see_the_results_and_cannot_change_them(site: Site) -> None:
    with begun(site) as owner, site.connect("/v1/watch") as viewer:
        next_text(viewer, "session")
        result = painted(owner, 1, jpeg(noise(7)))
        assert next_result(viewer)[2] == result
        viewer.send(json.dumps({"strength": 0.1}))
        assert next_text(viewer, "error") == "this connection only looks on"
        assert painted(owner, 2, jpeg(noise(7))) == result
    wait_until(lambda: not site.server.pool.counts()["sessions"])
    with site.connect("/v1/watch") as nobody:
        assert "there is no session to look at yet" in next_text(nobody, "error")


def test_the_servers_own_camera_is_shown_to_all(stylizer: Stylizer, art: dict[str, Frame]) -> None:
    source = ScriptedSource(lambda: 0.0, noise(8))
    source.is_camera = False  # type: ignore[misc]  # not mirrored
    with (
        Server(stylizer, own(art), Options(), camera=source) as server,
        running(server) as site,
        site.connect("/v1/stream?source=camera") as one,
        site.connect("/v1/stream?source=camera") as two,
    ):
        next_text(one, "session")
        next_text(two, "session")
        source.give(noise(9))
        first, second = next_result(one), next_result(two)
        while first[0] != second[0]:  # one of them came in time for the frame before
            if first[0] < second[0]:
                first = next_result(one)
            else:
                second = next_result(two)
        assert first[2] == second[2]
        one.send(HEADER.pack(1, 0, 0.0) + jpeg(noise(9)))
        assert "takes no frames" in next_text(one, "error")
        two.close()
        camera = server.camera
        assert camera is not None
        wait_until(lambda: camera.session.paused)  # nobody looks: the engines rest
        with site.connect("/v1/stream?source=camera") as three:
            next_text(three, "session")
            source.give(noise(10))
            next_result(three)
            source.end()
            assert next_text(three, "error") == "the source has ended"
        with site.connect("/v1/watch") as late:
            assert next_text(late, "error") == "the source has ended"


def test_a_server_without_a_camera_says_how_to_give_it_one(site: Site) -> None:
    with site.connect("/v1/stream?source=camera") as socket:
        assert next_text(socket, "error") == "this server has no camera; start it with --camera 0"


def cut_often(site: Site, times: int) -> None:
    data = jpeg(noise(1))
    for turn in range(times):
        with begun(site) as socket:
            send_frame(socket, 1, data)
            if turn % 3 == 0:
                next_result(socket)
            if turn % 2:
                socket.socket.shutdown(SHUT_RDWR)  # cut, without a word


def check_nothing_is_left(site: Site, times: int) -> None:
    cut_often(site, 2)
    wait_until(lambda: site.server.pool.counts()["sessions"] == 0)
    before = threads()
    cut_often(site, times)
    wait_until(lambda: site.server.pool.counts()["sessions"] == 0)
    wait_until(lambda: threads() <= before)
    gc.collect()
    left = [each for each in gc.get_objects() if type(each) is LiveSession]  # isinstance asks proxies
    assert len(left) < 4, "an idle worker thread may keep its last one, no more"


def test_connections_that_are_cut_leave_no_thread(site: Site) -> None:
    check_nothing_is_left(site, 12)


@pytest.mark.long
def test_200_connections_that_are_cut_leave_no_thread(site: Site) -> None:
    check_nothing_is_left(site, 200)


def test_an_engine_that_fails_ends_the_session_in_words(
    site: Site, stylizer: Stylizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    with begun(site) as socket:
        monkeypatch.setattr(stylizer, "submit_many", fail)
        send_frame(socket, 1, jpeg(noise(1)))
        assert next_text(socket, "error") == "the engines failed; the server's log says more"
        assert "secret detail" in caplog.text


def test_closing_the_server_ends_its_sessions_and_deletes_its_files(
    stylizer: Stylizer, art: dict[str, Frame]
) -> None:
    before = threads()
    limits = replace(Limits(), sessions=2)
    with Server(stylizer, own(art), Options(limits=limits)) as server, running(server) as site:
        folder = server.uploads.folder
        with begun(site) as socket:
            assert painted(socket, 1, jpeg(noise(1)))
            assert folder.is_dir()
    assert not folder.exists()
    wait_until(lambda: threads() <= before)
