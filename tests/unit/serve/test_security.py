"""Hostile clients: each is refused in one line, and nobody else notices: a session that paints all along."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.live_support import wait_until
from support.media_samples import make_clip
from support.serve_support import (
    Frame,
    Site,
    Streaming,
    encoded,
    end_code,
    form,
    jpeg,
    next_result,
    next_text,
    own,
    running,
    send_frame,
    streaming,
)
from websockets.exceptions import InvalidStatus

from std_rt.pipeline.stylizer import Stylizer
from std_rt.serve.app import Options, Server
from std_rt.serve.limits import Limits
from std_rt.serve.security import Rules, is_loopback

TOKEN = "a-token-of-this-test"


def noise(seed: int, height: int = 64, width: int = 64) -> Frame:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def style_of(site: Site) -> tuple[str, str]:
    return "style", site.server.library.all()[0].id


@pytest.fixture(scope="module")
def bystander(site: Site) -> Iterator[Streaming]:
    """A session that paints while all tests of this file run."""
    with streaming(site) as session:
        yield session


@pytest.fixture(autouse=True)
def _undisturbed(bystander: Streaming) -> Iterator[None]:
    with bystander.undisturbed():
        yield


@pytest.fixture(scope="module")
def guarded(stylizer: Stylizer, art: dict[str, Frame]) -> Iterator[Site]:
    options = Options(Rules(TOKEN, ("paint.example",)))
    with Server(stylizer, own(art), options) as server, running(server) as site:
        yield site


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[", "", "192.168.1.9"]
)
def test_a_foreign_host_is_refused(site: Site, host: str) -> None:
    """DNS rebinding: the name of another site that points here."""
    answer = site.get("/v1/info", Host=host)
    assert answer.status == 421
    assert "does not go by that name" in answer.error
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert site.get("/v1/stream", Host=host, **upgrade, **key).status == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]:80", "LOCALHOST:1"])
def test_this_machine_goes_by_its_names(site: Site, host: str) -> None:
    assert site.get("/v1/info", Host=host).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://127.0.0.1"])
def test_a_page_of_another_site_is_refused(site: Site, origin: str) -> None:
    body, kind = form([("picture", ("x", encoded(noise(1)))), style_of(site)])
    answer = site.ask("POST", "/v1/stylize", body, {"Content-Type": kind, "Origin": origin})
    assert (answer.status, answer.error) == (403, "requests of pages of other sites are refused")
    with pytest.raises(InvalidStatus) as refused, site.connect(origin=origin):
        pass
    assert refused.value.response.status_code == 403


def test_the_page_itself_is_let_in(site: Site) -> None:
    assert site.get("/v1/styles", Origin=f"http://{site.host}").status == 200
    with site.connect(origin=f"http://{site.host}"):
        pass


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer x"}, {"Cookie": "std_rt_token_PORT=x"}, {"Cookie": "="}]
)
def test_without_the_token_nothing_is_answered(guarded: Site, headers: dict[str, str]) -> None:
    headers = {name: value.replace("PORT", str(guarded.port)) for name, value in headers.items()}
    for path in ("/", "/v1/info", "/v1/metrics", "/static/page.js", "/nothing"):
        assert guarded.get(path, **headers).status == 401
    with pytest.raises(InvalidStatus), guarded.connect(additional_headers=headers):
        pass
    assert guarded.get("/v1/info?token=wrong").status == 401


def test_the_link_becomes_a_cookie_that_other_sites_cannot_use(guarded: Site) -> None:
    answer = guarded.get(f"/?token={TOKEN}")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    kept = cookie.split(";")[0]
    assert guarded.get("/v1/info", Cookie=kept).status == 200
    assert guarded.get("/v1/info", Authorization=f"Bearer {TOKEN}").status == 200
    with guarded.connect(f"/v1/stream?token={TOKEN}") as session:
        send_frame(session, 1, jpeg(noise(1)))
        next_result(session)


def test_with_a_token_addresses_and_given_names_count_as_this_server(guarded: Site) -> None:
    allowed = {"Authorization": f"Bearer {TOKEN}"}
    for host in ("192.168.1.9:8765", "paint.example", socket.gethostname()):
        assert guarded.get("/v1/info", Host=host, **allowed).status == 200
    assert guarded.get("/v1/info", Host="evil.example", **allowed).status == 421


def bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that claims to be ``side`` px a side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def claiming(kind: str, at: int, layout: str) -> bytes:
    """A small picture whose header says that it has 60,000 px a side."""
    data = bytearray(encoded(noise(1, 16, 16), kind))
    struct.pack_into(layout, data, at, 60_000, 60_000)
    return bytes(data)


def bad_files(count: int = 7) -> dict[str, list[bytes]]:
    """Files that are no picture, style or clip, by what is wrong with them; ``count`` of each random kind."""
    rng = np.random.default_rng(0)
    picture = noise(1)
    whole = {kind: encoded(picture, kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")}
    jpeg_size = encoded(noise(1, 16, 16), "JPEG").index(b"\xff\xc0") + 5
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n"
    header = b'{"style_tokens": {"dtype": "F32", "shape": [1, 2, 4], "data_offsets": [0, 999999]}}'
    return {
        "bomb": [
            bomb(100_000),
            bomb(2_000),  # within what a picture may be, and above this server's limit
            claiming("JPEG", jpeg_size, ">HH"),
            claiming("GIF", 6, "<HH"),
            claiming("BMP", 18, "<ii"),
            b"YUV4MPEG2 W60000 H60000 F25:1 Ip A1:1 C420\nFRAME\n",
        ],
        "truncated": [
            data[: len(data) * share // 10]
            for data in whole.values()
            for share in range(1, 9, 8 // min(count, 8))
        ],
        "other kind": [
            *(
                b"",
                b"%PDF-1.7\n",
                b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                b"<!doctype html>",
                b"\x7fELF",
            ),
            *(b"PK\x03\x04", b"\x80\x04\x95", b"RIFF\x24\x00\x00\x00WAVEfmt ", b"ID3\x04", b"\x1f\x8b\x08"),
            b"1\n00:00:01,000 --> 00:00:02,000\nwords\n",
        ],
        "reads others": [  # of this machine, or of others
            *(
                text.encode()
                for text in (playlist, playlist.replace("http://127.0.0.1:1/a.ts", "/etc/passwd"))
            ),
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 1 RTP/AVP 96\n",
            b"<MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><Period><BaseURL>http://127.0.0.1:1</BaseURL></Period></MPD>",
        ],
        "style file": [
            struct.pack("<Q", 1 << 60) + b"{}",
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", len(header)) + header,
            struct.pack("<Q", 9000) + b"{" * 9000,
            struct.pack("<Q", 40) + b"{" + rng.bytes(100),
        ],
        "random": [rng.bytes(int(rng.integers(1, 3000))) for _ in range(count)],
        "random after a true start": [
            data[:12] + rng.bytes(int(rng.integers(1, 3000))) for data in [*whole.values()] * count
        ][:count],
    }


_PLACES = {
    "picture": "/v1/stylize",
    "style": "/v1/stylize",
    "style that is kept": "/v1/styles",
    "clip": "/v1/jobs",
    "style of a clip": "/v1/jobs",
}


def test_these_are_300_uploads_and_more() -> None:
    assert sum(map(len, bad_files().values())) * len(_PLACES) > 300


@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("kind", bad_files())
def test_bad_uploads_are_refused_in_one_line(site: Site, kind: str, place: str) -> None:
    whole, style = ("picture", ("x.png", encoded(noise(1)))), style_of(site)
    for data in bad_files()[kind]:
        parts = {
            "picture": [("picture", ("x.png", data)), style],
            "style": [whole, ("style", ("s.png", data))],
            "style that is kept": [("picture", ("x.png", data))],
            "clip": [("clip", ("c.mp4", data)), style],
            "style of a clip": [("clip", ("c.mp4", b"")), ("style", ("s.png", data))],
        }[place]
        answer = site.post(_PLACES[place], *parts)
        assert answer.status == 400, (data[:20], answer)
        assert str(site.server.uploads.folder) not in answer.error
        assert "/etc/passwd" not in answer.error
    assert not list(site.server.uploads.folder.iterdir())


def test_a_picture_above_the_limit_is_told_the_limit(site: Site) -> None:
    assert "the limit is 1 megapixels" in site.post("/v1/styles", ("picture", ("x", bomb(2_000)))).error


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "send a file called picture"),
        ([("picture", "text")], "send a file called picture"),
        ([("picture", 0)], "a style is needed"),
        ([("picture", 0), ("style", "nobody")], "there is no style 'nobody'"),
        ([("picture", 0), ("style", "a:b")], "a style is ID or ID:WEIGHT"),
        ([("picture", 0), ("style", 0), ("weights", "1,2")], "give one weight a style"),
        ([("picture", 0), *[("style", 0)] * 17], "at most 16 styles are blended, got 17"),
        ([("picture", 0), ("style", 0), ("weights", "x")], "weights must be numbers"),
        ([("picture", 0), ("style", 0), ("strength", "x")], "strength must be a number"),
        ([("picture", 0), ("style", 0), ("strength", "1e999")], "strength must be a number"),
        ([("picture", 0), ("style", 0), ("size", "-5")], "size must be a whole number"),
        ([("picture", 0), ("style", 0), ("size", "99999")], "16 to 512 px"),
        ([("picture", 0), ("style", 0), ("steps", "0")], "steps, not 0"),
        ([("picture", 0), ("style", 0), ("format", "exe")], "format must be one of png, jpg, webp"),
        (
            [("picture", 0), ("style", 0), ("size", "64by48")],
            "'64by48' is not a size; use pixels such as 512",
        ),
        ([("picture", 0), ("style", 0), ("size", "64x9999")], "16 to 512 px"),
        *(
            ([("picture", 0), ("style", 0), (name, 0)], f"{name} takes a value, not a file")
            for name in ("strength", "upscale", "format")
        ),
        *(
            ([("picture", 0), ("style", 0), (name, text)], f"{name} must be true or false (or 1/0, {shown}")
            for name in ("keep_colours", "upscale")
            for text, shown in (
                ("perhaps", "yes/no, on/off), got 'perhaps'"),
                ("2", "yes/no, on/off), got '2'"),
            )
        ),
        ([("picture", 0), ("style", 0), ("__proto__", "1")], "there is no field '__proto__' here"),
        ([("picture", 0), ("style", 0), ("clip", 0)], "there is no field 'clip' here"),
        ([("picture", 0), ("picture", 0), ("style", 0)], "got 2 fields called picture; send one per request"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(site: Site, parts: list[tuple[str, object]], said: str) -> None:
    png = ("x.png", encoded(noise(1)))
    filled = [(name, png if value == 0 else value) for name, value in parts]
    answer = site.post("/v1/stylize", *filled)
    assert answer.status == (404 if said.startswith("there is no style") else 400)
    assert said in answer.error


@pytest.mark.parametrize("path", ["/v1/stylize", "/v1/jobs", "/v1/styles"])
@pytest.mark.parametrize("name", ["strokes", "styles", "crossfade", ""])
def test_a_field_that_is_not_known_is_told_those_of_its_form(site: Site, path: str, name: str) -> None:
    described = site.get("/v1/openapi.json").json["paths"][path]["post"]["requestBody"]["content"]
    fields = described["multipart/form-data"]["schema"]["properties"]
    file = next(iter(fields)), ("x", encoded(noise(1)))
    answer = site.post(path, (name, "1"), file)
    assert answer.status == 400
    assert answer.error == f"there is no field '{name}' here; use {', '.join(fields)}"


def test_a_clip_takes_no_format_and_comes_alone(site: Site, tmp_path: Path) -> None:
    clip, style = ("clip", ("c.mp4", make_clip(tmp_path / "c.mp4").read_bytes())), style_of(site)
    for parts, said in (
        ((clip, style, ("format", "avi")), "there is no field 'format' here"),
        ((clip, clip, style), "got 2 fields called clip; send one per request"),
    ):
        answer = site.post("/v1/jobs", *parts)
        assert answer.status == 400
        assert said in answer.error
    assert not list(site.server.uploads.folder.iterdir())


def test_bodies_that_are_no_forms_are_refused(site: Site) -> None:
    multipart = {"Content-Type": "multipart/form-data; boundary=edge"}
    for body, headers in [
        (b"x", {}),
        (b"x", {"Content-Type": "multipart/form-data"}),
        (b"--edge\r\nnonsense", multipart),
        (b"--edge\r\nContent-Disposition: form-data\r\n\r\nx\r\n--edge--\r\n", multipart),
        (form([(f"field{i}", "x") for i in range(100)])[0], multipart),
        (form([("picture", (f"{i}.png", b"x")) for i in range(100)])[0], multipart),
    ]:
        for path in ("/v1/stylize", "/v1/styles", "/v1/jobs"):
            answer = site.ask("POST", path, body, headers)
            assert answer.status == 400, (body[:40], answer)
            assert answer.error
    picture = ("picture", ("x.png", encoded(noise(1))))
    assert "there is no field 'colour'" in site.post("/v1/styles", picture, ("colour", "red")).error
    for body in (b"{", b"[1]", b'{"name": "x", "colour": "red"}', b"\xff\xfe", b"[" * 9000):
        answer = site.ask("PATCH", "/v1/styles/x", body)
        assert answer.status in (400, 404)
        assert answer.error


def test_a_body_that_is_too_large_is_refused_with_or_without_its_length(site: Site) -> None:
    most = site.server.limits.picture_bytes
    said = "the request is larger than 2 MB, which is the limit"
    answer = site.ask("POST", "/v1/styles", b"x", {"Content-Length": str(most + 1)})
    assert (answer.status, answer.error) == (413, said)
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as raw:
        head = "POST /v1/styles HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        raw.sendall(f"{head}Content-Type: multipart/form-data; boundary=edge\r\n\r\n".encode())
        part = b'--edge\r\nContent-Disposition: form-data; name="picture"; filename="x"\r\n\r\n'
        raw.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        with pytest.MonkeyPatch.context():
            sent = 0
            try:
                while sent < 4 * most:  # an endless stream
                    raw.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
                    sent += 65536
            except OSError:
                return  # the server has hung up
        assert b"413" in raw.recv(4096)


def test_bodies_that_come_too_slowly_are_given_up(stylizer: Stylizer, art: dict[str, Frame]) -> None:
    def given_up(site: Site, drip_s: float) -> bool:
        with socket.create_connection(("127.0.0.1", site.port), timeout=20) as raw:
            head = "POST /v1/styles HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            raw.sendall(f"{head}Content-Type: multipart/form-data; boundary=edge\r\n\r\n".encode())
            raw.sendall(b'--edge\r\nContent-Disposition: form-data; name="picture"; filename="x"\r\n\r\n')
            raw.settimeout(drip_s)
            began, answer = time.monotonic(), b""
            while b"slowly" not in answer and time.monotonic() - began < 10:
                try:
                    answer += raw.recv(4096)
                except TimeoutError:
                    raw.sendall(b"x")
            return b"408" in answer and b"came too slowly" in answer

    limits = Limits(idle_s=0.3, body_s=1.0)
    with (
        Server(stylizer, own(art), Options(limits=limits)) as server,
        running(server) as site,
        streaming(site) as session,
        session.undisturbed(),
        ThreadPoolExecutor() as pool,
    ):
        # Half of them stand still, and half drip.
        assert all(pool.map(given_up, [site] * 20, [10.0, 0.1] * 10))


def test_headers_that_come_too_slowly_are_given_up(stylizer: Stylizer, art: dict[str, Frame]) -> None:
    """Slowloris: a connection that never finishes its request, at once or after one that it did finish."""
    limits = Limits(headers_s=0.5)
    whole = b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with (
        Server(stylizer, own(art), Options(limits=limits)) as server,
        running(server) as site,
        site.connect() as session,
    ):
        for before in (b"", whole):
            with socket.create_connection(("127.0.0.1", site.port), timeout=20) as raw:
                raw.sendall(before)
                while before and b"ok" not in raw.recv(4096):
                    pass
                raw.sendall(b"GET / HT")
                began = time.monotonic()
                while raw.recv(4096):  # until the server hangs up
                    pass
                assert time.monotonic() - began < 4, "uvicorn's own limit, of a connection at rest, is 5 s"
        send_frame(session, 1, jpeg(noise(1)))  # a WebSocket has asked already, however quiet it is
        next_result(session)


def masked(first: int, data: bytes, length: int | None = None) -> bytes:
    """A frame as a client sends it. ``first``: its first byte. ``length``: what it says that it has."""
    return struct.pack(">BBQ4x", first, 0x80 | 127, len(data) if length is None else length) + data


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (masked(0x82, b"", 1 << 62), 1009),
        (masked(0x02, bytes(1 << 20)) + 5 * masked(0x00, bytes(1 << 20)), 1009),  # a message without an end
        (masked(0x81, bytes(5 << 20)), 1009),
        (masked(0x81, b"\xff\xfe"), 1007),
        (masked(0x83, b"x"), 1002),  # of no kind
        (masked(0xC2, b"x"), 1002),  # compressed, which was not agreed upon
        (masked(0x89, bytes(200)), 1002),  # a ping that is too long
        (b"\x82\x01x", 1002),  # not masked
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 1002),
        (masked(0x82, b"short"), 1008),
        (masked(0x82, struct.pack("<IId", 1, 0, 0.0) + bomb(100_000)), 1008),
    ],
    ids=range(11),
)
def test_what_is_no_message_ends_its_own_session_only(site: Site, data: bytes, code: int) -> None:
    with site.connect() as session:
        next_text(session, "session")
        with suppress(OSError):  # the server may hang up before it has all of it
            session.socket.sendall(data)
        assert end_code(session) == code
    wait_until(lambda: site.server.pool.counts()["sessions"] == 1)  # the one that paints all along


def test_paths_do_not_lead_out_of_the_static_files(site: Site) -> None:
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static/..%2fapp.py"):
        answer = site.get(path)
        assert answer.status == 404
        assert answer.error
    assert site.get("/v1/nothing").error == "Not Found"
    assert site.ask("POST", "/v1/health").status == 405


def test_a_failure_says_nothing_of_the_inside(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(site.server.library, "sweep", fail)
    answer = site.get("/v1/styles")
    assert (answer.status, answer.error) == (500, "the server has failed; its log says more")


def test_the_end_of_the_server_is_no_failure(
    stylizer: Stylizer,
    art: dict[str, Frame],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It waits three seconds for what is being painted."""
    begun, over = threading.Event(), threading.Event()

    def paint(*_: object) -> None:
        begun.set()
        over.wait(20)

    with Server(stylizer, own(art), Options()) as server, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(server, "_painted", paint)
        try:
            with running(server) as site:
                asked = pool.submit(site.post, "/v1/stylize", ("picture", ("x", b"")))
                assert begun.wait(20)
            answer = asked.result()
        finally:
            over.set()
    assert (answer.status, answer.error) == (503, "the server has ended")
    assert not [record for record in caplog.records if record.exc_info]


def test_several_pictures_at_once_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.server, "_pictures", site.server.limits.pictures)
    answer = site.post("/v1/stylize", ("picture", ("x", encoded(noise(1)))), style_of(site))
    assert answer.status == 503
    assert answer.error.startswith("busy: 4 pictures are being painted")


def test_the_styles_of_clients_are_bounded(stylizer: Stylizer, art: dict[str, Frame]) -> None:
    limits = Limits(styles=3)
    with Server(stylizer, own(art), Options(limits=limits)) as server, running(server) as site:
        assert site.post("/v1/styles", ("picture", ("x", encoded(noise(1))))).status == 201
        assert "which is the limit" in site.post("/v1/styles", ("picture", ("x", encoded(noise(2))))).error


def test_uploads_lie_in_a_folder_of_this_user_only(site: Site) -> None:
    if os.name == "posix":
        assert site.server.uploads.folder.stat().st_mode & 0o077 == 0


def test_what_counts_as_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.9", "a.example", "")))
