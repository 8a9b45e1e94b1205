"""Hostile clients: each is refused in one line, and nobody else notices."""

from __future__ import annotations

import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from support.serve_support import Frame, Site, encoded, form, jpeg, next_result, own, running, send_frame
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


@pytest.mark.parametrize("count", [10, pytest.param(85, marks=pytest.mark.long)])  # 75 requests, and 300
def test_bad_pictures_are_refused_in_one_line(site: Site, count: int) -> None:
    """Bombs, truncated files, other kinds and random bytes, as picture and as style."""
    rng = np.random.default_rng(0)
    whole = encoded(noise(1))
    bad = [bomb(100_000), bomb(2_000), b"", b"GIF89a", b"%PDF-1.7", b"<svg/>", b"#EXTM3U\nhttp://127.0.0.1/x"]
    bad += [whole[: len(whole) * share // 10] for share in range(1, 9)]
    bad += [rng.bytes(int(size)) for size in rng.integers(1, 2000, count)]
    for data in bad:
        for path, parts in (
            ("/v1/stylize", [("picture", ("x.png", data)), style_of(site)]),
            ("/v1/stylize", [("picture", ("x.png", whole)), ("style", ("s.png", data))]),
            ("/v1/styles", [("picture", ("x.png", data))]),
        ):
            answer = site.post(path, *parts)
            assert answer.status == 400, (data[:20], answer)
            assert str(site.server.uploads.folder) not in answer.error
    assert "the limit is 1 megapixels" in site.post("/v1/styles", ("picture", ("x", bomb(2_000)))).error
    assert not list(site.server.uploads.folder.iterdir())


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
        ([("picture", 0), ("style", 0), ("upscale", "perhaps")], "upscale must be true or false"),
        ([("picture", 0), ("style", 0), ("__proto__", "1")], "there is no setting '__proto__'"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(site: Site, parts: list[tuple[str, object]], said: str) -> None:
    png = ("x.png", encoded(noise(1)))
    filled = [(name, png if value == 0 else value) for name, value in parts]
    answer = site.post("/v1/stylize", *filled)
    assert answer.status == (404 if said.startswith("there is no style") else 400)
    assert said in answer.error


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


def test_a_body_that_comes_too_slowly_is_given_up(stylizer: Stylizer, art: dict[str, Frame]) -> None:
    limits = Limits(idle_s=0.3, body_s=1.0)
    with Server(stylizer, own(art), Options(limits=limits)) as server, running(server) as site:
        for drip_s in (10.0, 0.1):  # one that stands still, and one that drips
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
                assert b"408" in answer
                assert b"came too slowly" in answer


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
