"""Who may ask, and how much: hosts, origins, tokens, and the size and time of a body.

A page of another site can send requests to a server on this machine, or point its own name at 127.0.0.1 (DNS
rebinding). The first carries its Origin, the second its Host: both are refused here, for WebSockets too.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from std_rt.serve.limits import Limits

__all__ = ["Guard", "Rules", "is_loopback", "patient_for"]

_PAGES = ("/", "/output", "/watch")
_SMALL_BODY = 64 << 10
_REFUSED = 1008  # WebSocket: policy violation

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Rules:
    """``token``: None where none is needed. ``hosts``: names that clients may call the server by.

    Without a token only loopback names count. With one, any IP address and this machine's own name count
    too: a name that rebinds does not know the token.
    """

    token: str | None = None
    hosts: Collection[str] = ()

    def knows_host(self, header: str) -> bool:
        """Whether a Host header names this server."""
        name = (urlsplit(f"//{header}").hostname or "").lower()
        if is_loopback(name) or name in self.hosts:
            return True
        if self.token is None:
            return False
        own = socket.gethostname().lower()
        return name in (own, f"{own}.local") or _is_address(name)

    def knows_token(self, given: str | None) -> bool:
        """Whether ``given`` is the token, or none is needed."""
        return self.token is None or hmac.compare_digest((given or "").encode(), self.token.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware: refuses, in one line, what `Rules` and `Limits` do not allow."""

    def __init__(self, app: ASGIApp, rules: Rules, limits: Limits) -> None:
        self._app, self._rules, self._limits = app, rules, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None and self._has_link_token(scope):
            await self._remember_token(scope, receive, send)
        elif refusal is None:
            await self._run(scope, self._bounded(scope, headers, receive), _with_headers(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": _REFUSED, "reason": refusal[1][:120]})
        else:
            await JSONResponse({"error": refusal[1]}, refusal[0])(scope, receive, _with_headers(send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # the server ends, and has waited for its requests
            if scope["type"] == "http":
                with suppress(RuntimeError):  # the answer has begun
                    await JSONResponse({"error": "the server has ended"}, 503)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Status and line, or None."""
        host = headers.get("host", "")
        try:
            known = self._rules.knows_host(host)
            origin = headers.get("origin")
            foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        except ValueError:  # no host at all, such as an unclosed bracket
            known = foreign = False
        if not known:
            return 421, "this server does not go by that name; start it with --allow-host NAME to let it"
        if foreign:
            return 403, "requests of pages of other sites are refused"
        if not self._rules.knows_token(_token_of(scope, headers)):
            return 401, "the token is missing or wrong; use the link that std-rt serve printed"
        try:
            length = int(headers.get("content-length") or 0)
        except ValueError:
            return 400, "Content-Length is not a number"
        if length > self._most(scope)[0]:
            return 413, f"the request is larger than {_megabytes(self._most(scope)[0])}, which is the limit"
        return None

    def _most(self, scope: Scope) -> tuple[int, float]:
        """Bytes and seconds of a body."""
        limits, path = self._limits, scope["path"]
        if path == "/v1/jobs":
            return limits.clip_bytes, limits.clip_body_s
        if path in ("/v1/stylize", "/v1/styles"):
            return limits.picture_bytes, limits.body_s
        return _SMALL_BODY, limits.body_s

    def _bounded(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """``receive`` of a body that may be neither too large nor too slow."""
        if scope["type"] != "http":
            return receive
        most, seconds = self._most(scope)
        ends = asyncio.get_running_loop().time() + seconds
        taken, complete = 0, False

        async def bounded() -> Message:
            nonlocal taken, complete
            if complete:  # what comes now is the end of the connection, whenever that is
                return await receive()
            left = min(self._limits.idle_s, ends - asyncio.get_running_loop().time())
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.01))
            except TimeoutError:
                raise HTTPException(408, "the request came too slowly and was given up") from None
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > most:
                raise HTTPException(413, f"the request is larger than {_megabytes(most)}, which is the limit")
            return message

        return bounded

    def _has_link_token(self, scope: Scope) -> bool:
        is_page = scope["type"] == "http" and scope["path"] in _PAGES
        return is_page and self._rules.token is not None and _from_query(scope) is not None

    async def _remember_token(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a link with a token by a cookie, so that the token does not stay in the address bar."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        kept = "&".join(f"session={value}" for value in query.get("session", []) if value.isalnum())
        answer = RedirectResponse(scope["path"] + (f"?{kept}" if kept else ""), 303)
        is_secure = scope.get("scheme") in ("https", "wss")
        answer.set_cookie(
            _cookie_name(scope),
            str(self._rules.token),
            httponly=True,
            samesite="strict",
            secure=is_secure,
            path="/",
        )
        await answer(scope, receive, _with_headers(send))


def patient_for(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, but a connection whose headers do not come in time is closed.

    uvicorn itself waits without end for the headers of a request whose first byte has come (slowloris).
    """

    class Patient(H11Protocol):
        _due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._due = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            asks = self.cycle is not None and not self.cycle.response_complete
            if asks or self.transport.get_protocol() is not self:  # a request, or a WebSocket
                self._stop()
            elif self._due is None:
                self._due = self.loop.call_later(seconds, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _stop(self) -> None:
            if self._due is not None:
                self._due.cancel()
                self._due = None

    return Patient


def _token_of(scope: Scope, headers: Headers) -> str | None:
    """From the header, the link, or the cookie that came of it."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    if (linked := _from_query(scope)) is not None:
        return linked
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(_cookie_name(scope))
    except CookieError:
        return None
    return None if cookie is None else cookie.value


def _cookie_name(scope: Scope) -> str:
    """With the port: cookies are a host's, and another server may run there."""
    return f"std_rt_token_{scope['server'][1]}"


def _from_query(scope: Scope) -> str | None:
    found = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token")
    return found[0] if found else None


def _with_headers(send: Send) -> Callable[[Message], Awaitable[None]]:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            present: list[Any] = list(message.get("headers", []))
            names = {name.lower() for name, _ in present}
            added = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in names]
            message = {**message, "headers": present + added}
        await send(message)

    return sending


def _megabytes(count: int) -> str:
    return f"{count / 2**20:g} MB" if count >= 2**20 else f"{count / 2**10:g} kB"
