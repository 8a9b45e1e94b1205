"""The server: routes of the page and the API, and the two WebSockets.

    with Server(stylizer, styles, Options()) as server:
        uvicorn.Server(uvicorn_config(server)).run()

Engines, codecs and files are used in worker threads, never in the event loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from std_rt import __version__
from std_rt.core.arrays import Frame, parse_size
from std_rt.core.bundle import Bundle, list_bundles
from std_rt.core.errors import StdRtError, UsageError, one_line
from std_rt.core.machine import peak_memory_mb
from std_rt.media.camera.frame_source import Source
from std_rt.media.image import write_picture
from std_rt.pipeline.style_file import StyleFile, blend_files
from std_rt.pipeline.stylizer import Stylizer
from std_rt.serve.library import Library, Style, Uploads
from std_rt.serve.limits import BusyError, ConflictError, Limits, MissingError
from std_rt.serve.painting import ClipJobs, paint_picture
from std_rt.serve.protocol import MOST_STYLES, Look, encode_frame
from std_rt.serve.security import Guard, Rules, patient_for
from std_rt.serve.sessions import SessionPool
from std_rt.serve.sockets import Sockets

if TYPE_CHECKING:
    from std_rt.serve.webrtc import Peers

__all__ = ["Options", "OwnStyle", "Server", "uvicorn_config"]

_FORMATS = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
_STATUS = {BusyError: 503, ConflictError: 409, MissingError: 404}  # of a refusal; 400 otherwise
_MOST_PARTS = 32
_FRAME_HEADER_ROOM = 64
_CONNECTIONS = 256
_SHUTDOWN_S = 3


@dataclass(frozen=True, eq=False)
class OwnStyle:
    """A style of the server's: a path, or a frame uint8 [H, W, 3].

    Sessions start with the blend of those that have a ``weight``, or with the first.
    """

    source: Path | Frame
    name: str | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Options:
    """``look``: what sessions start with, apart from the styles."""

    rules: Rules = field(default_factory=Rules)
    limits: Limits = field(default_factory=Limits)
    look: Look = field(default_factory=Look)


class Server:
    """Everything behind the routes; closing it ends all threads and deletes uploads and results."""

    def __init__(
        self,
        stylizer: Stylizer,
        styles: Sequence[OwnStyle],
        options: Options,
        *,
        camera: Source | None = None,
    ) -> None:
        """``styles``: those that are there from the start, one at least.

        ``camera``: the server's own, shown to all. Raises StdRtError for a style that cannot be read.
        """
        self.stylizer, self.limits, self.rules = stylizer, options.limits, options.rules
        self._pictures, self.peers = 0, _peers(self.limits)
        with ExitStack() as stack:
            self.uploads = stack.enter_context(closing(Uploads()))
            self.library = Library(stylizer, self.uploads, self.limits)
            own = {self.library.add_own(style.source, style.name): style.weight for style in styles}
            shown = {key: weight for key, weight in own.items() if weight} or {next(iter(own)): 1.0}
            look = replace(options.look, styles=shown)
            self.pool = SessionPool(stylizer, self.library, self.limits, look)
            self.jobs = stack.enter_context(closing(ClipJobs(stylizer, self.uploads, self.limits)))
            stack.callback(self.pool.close_all)
            self.camera = None if camera is None else self.pool.open(camera, owned=False)
            self._stack = stack.pop_all()
        handlers: dict[Any, Any] = {
            HTTPException: _http_error,
            StdRtError: _user_error,
            ClientDisconnect: _nobody,
            Exception: _failure,
        }
        app = Starlette(routes=self._routes(), exception_handlers=handlers)
        self.app: ASGIApp = Guard(app, options.rules, self.limits)

    def _routes(self) -> list[BaseRoute]:
        sockets = Sockets(self.pool, self.camera, self.peers)
        return [
            *(Route(path, self._page) for path in ("/", "/output", "/watch")),
            Mount("/static", StaticFiles(packages=[("std_rt.serve", "static")])),
            Route("/v1/health", self._health),
            Route("/v1/info", self._info),
            Route("/v1/metrics", self._metrics),
            Route("/v1/bundles", self._bundles),
            Route("/v1/styles", self._styles, methods=["GET", "POST"]),
            Route("/v1/styles/{id}", self._change_style, methods=["PATCH", "DELETE"]),
            Route("/v1/styles/{id}/thumbnail", self._thumbnail),
            Route("/v1/style-file", self._style_file),
            Route("/v1/stylize", self._stylize, methods=["POST"]),
            Route("/v1/jobs", self._add_job, methods=["POST"]),
            Route("/v1/jobs/{id}", self._job, methods=["GET", "DELETE"]),
            Route("/v1/jobs/{id}/result", self._job_result),
            Route("/v1/webrtc/{key}", self._webrtc, methods=["POST"]),
            Route("/v1/openapi.json", self._openapi),
            WebSocketRoute("/v1/stream", sockets.stream),
            WebSocketRoute("/v1/watch", sockets.watch),
        ]

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # The page

    async def _page(self, request: Request) -> Response:
        return Response(_static("index.html"), media_type="text/html")

    async def _openapi(self, request: Request) -> Response:
        """The description of the API, with what this server has and can, and whether it wants a token."""
        described, bundle = json.loads(_static("openapi.json")), self.stylizer.bundle
        schemas = described["components"]["schemas"]
        schemas["Size"] |= dict(zip(("minimum", "maximum"), bundle.size_range, strict=True))
        schemas["Steps"]["enum"] = list(bundle.steps_allowed)
        schemas["Strength"] |= dict(zip(("minimum", "maximum"), bundle.strength_range, strict=True))
        schemas["StyleHere"]["examples"] = [style.id for style in self.library.all()]
        return JSONResponse(described | {"security": [] if self.rules.token is None else [{"token": []}]})

    # What there is

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": __version__})

    async def _info(self, request: Request) -> Response:
        """What the page needs to know at its start."""
        bundle = self.stylizer.bundle
        return JSONResponse(
            {
                "version": __version__,
                "bundle": bundle.name,
                "backend": self.stylizer.backend,
                "size_range": list(bundle.size_range),
                "size": _side(self.pool.look.size or self.stylizer.size),
                "steps_allowed": list(bundle.steps_allowed),
                "steps": self.pool.look.steps or self.stylizer.steps,
                "strength_range": list(bundle.strength_range),
                "camera": self.camera is not None,
                "look": self.pool.look.described(),
                "limits": self.limits.__dict__,
            }
        )

    async def _metrics(self, request: Request) -> Response:
        counts = await _in_thread(self.pool.counts)
        values = {
            "std_rt_sessions": ("gauge", counts["sessions"]),
            "std_rt_sessions_opened_total": ("counter", counts["sessions_opened"]),
            "std_rt_sessions_refused_total": ("counter", counts["sessions_refused"]),
            "std_rt_frames_total": ("counter", counts["frames"]),
            "std_rt_drops_total": ("counter", counts["drops"]),
            "std_rt_styles": ("gauge", len(self.library.all())),
            "std_rt_peak_memory_bytes": ("gauge", int((peak_memory_mb() or 0) * 2**20)),
        }
        lines = [f"# TYPE {name} {kind}\n{name} {value}" for name, (kind, value) in values.items()]
        lines.append("# TYPE std_rt_jobs gauge")
        lines += [f'std_rt_jobs{{state="{state}"}} {count}' for state, count in self.jobs.counts().items()]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def _bundles(self, request: Request) -> Response:
        found = await _in_thread(list_bundles)
        bundles = [
            {"name": each.name, "steps": list(each.steps_allowed), "size_range": list(each.size_range)}
            for each in found
            if isinstance(each, Bundle)
        ]
        return JSONResponse({"open": self.stylizer.bundle.name, "bundles": bundles})

    # Styles

    async def _styles(self, request: Request) -> Response:
        if request.method == "POST":
            return await self._add_style(request)
        await _in_thread(self.library.sweep)
        return JSONResponse({"styles": [_described(style) for style in self.library.all()]})

    async def _add_style(self, request: Request) -> Response:
        async with request.form(max_files=1, max_fields=4) as form:
            _check_fields(form, ("picture", "name"))
            file, name = form.get("picture"), form.get("name")
            if not isinstance(file, UploadFile):
                raise UsageError("send the style as a file called picture: curl -F picture=@art.png ...")
            called = name if isinstance(name, str) and name else file.filename or "style"
            style = await _in_thread(self.library.add, file.file, called)
        return JSONResponse(_described(style), 201)

    async def _change_style(self, request: Request) -> Response:
        key = request.path_params["id"]
        if request.method == "DELETE":
            await _in_thread(self.library.delete, key)
            return Response(status_code=204)
        found = await _json(request)
        name = found.get("name")
        if not isinstance(name, str) or not name.strip() or len(found) > 1:
            raise UsageError('send the new name as JSON: {"name": "waves"}')
        return JSONResponse(_described(await _in_thread(self.library.rename, key, name)))

    async def _thumbnail(self, request: Request) -> Response:
        style = self.library.get(request.path_params["id"])
        return Response(await _in_thread(encode_frame, style.thumbnail), media_type="image/jpeg")

    async def _style_file(self, request: Request) -> Response:
        query = request.query_params
        weights = dict(_weighted(text) for text in query.getlist("style"))
        if not weights:
            raise UsageError("name the styles to save: /v1/style-file?style=ID:0.7&style=ID:0.3")
        look = Look().changed(
            {"styles": weights, "stroke_size": _value(query.get("stroke_size", "1"))}, self.stylizer
        )
        name = query.get("name") or "style"
        data = await _in_thread(self.library.style_file, look.styles, look.stroke_size, name)
        return Response(data, media_type="application/octet-stream", headers=_as_file("style.safetensors"))

    # Pictures and clips

    async def _stylize(self, request: Request) -> Response:
        if self._pictures >= self.limits.pictures:
            raise BusyError(f"busy: {self._pictures} pictures are being painted; try again later")
        self._pictures += 1
        try:
            async with request.form(max_files=_MOST_PARTS, max_fields=_MOST_PARTS) as form:
                answer: Response = await _in_thread(self._painted, form)
                return answer
        finally:
            self._pictures -= 1

    def _painted(self, form: FormData) -> Response:
        _check_fields(form, _PICTURE_FIELDS)
        suffix = str(form.get("format") or "png")
        if suffix not in _FORMATS:
            raise UsageError(f"format must be one of {', '.join(_FORMATS)}, got {suffix[:40]!r}")
        picture = self.uploads.picture(_file(form, "picture"), self.limits.picture_px)
        look, style, upscale = self._asked(form)
        done = paint_picture(self.stylizer, picture, look, style, upscale=upscale)
        path = self.uploads.new(f".{suffix}")
        try:
            write_picture(path, done.frame, done.alpha, exif=done.exif)
            return Response(
                path.read_bytes(), media_type=_FORMATS[suffix], headers=_as_file(f"styled.{suffix}")
            )
        finally:
            path.unlink(missing_ok=True)

    async def _add_job(self, request: Request) -> Response:
        self.jobs.check_room()
        async with request.form(max_files=_MOST_PARTS, max_fields=_MOST_PARTS) as form:
            job = await _in_thread(self._submitted, form)
        return JSONResponse(job.described(), 202, headers={"location": f"/v1/jobs/{job.id}"})

    def _submitted(self, form: FormData) -> Any:
        _check_fields(form, _CLIP_FIELDS)
        clip = _file(form, "clip")
        look, style, upscale = self._asked(form, temporal="full")
        return self.jobs.submit(self.uploads.store(clip), look, style, upscale=upscale)

    async def _job(self, request: Request) -> Response:
        key = request.path_params["id"]
        if request.method == "DELETE":
            await _in_thread(self.jobs.delete, key)
            return Response(status_code=204)
        return JSONResponse(self.jobs.get(key).described())

    async def _job_result(self, request: Request) -> Response:
        path = self.jobs.result(request.path_params["id"])
        # Without a name, which would win over the one that the page gives it.
        return FileResponse(path, media_type="video/mp4", headers={"content-disposition": "attachment"})

    # Live

    async def _webrtc(self, request: Request) -> Response:
        found = await _json(request)
        if not isinstance(found.get("sdp"), str) or found.get("type") != "offer":
            raise UsageError('send an offer as JSON: {"type": "offer", "sdp": "v=0 ..."}')
        if self.peers is None:
            raise MissingError("this server has no WebRTC; its extra [webrtc] is not installed")
        local, remote = (str((request.scope.get(end) or ("",))[0]) for end in ("server", "client"))
        sdp = await self.peers.answer(request.path_params["key"], found["sdp"], local, remote)
        return JSONResponse({"type": "answer", "sdp": sdp})

    def _asked(self, form: FormData, **defaults: Any) -> tuple[Look, StyleFile, bool]:
        """Look, style and ``upscale`` of a form. Raises UsageError for a wrong value."""
        styles, weights = form.getlist("style"), _numbers(form.get("weights"))
        fields = {key: _setting(key, str(value)) for key, value in form.items() if key in _SETTINGS}
        upscale = _switch("upscale", str(form.get("upscale") or "false"))
        base = Look(size=self.pool.look.size, steps=self.pool.look.steps)
        look = base.changed({**defaults, **fields}, self.stylizer)
        if not styles:
            raise UsageError("a style is needed: -F style=@art.png, or -F style=ID of one that is here")
        if len(styles) > MOST_STYLES:
            raise UsageError(f"at most {MOST_STYLES} styles are blended, got {len(styles)}")
        if weights and len(weights) != len(styles):
            raise UsageError(f"got {len(styles)} styles and {len(weights)} weights; give one weight a style")
        parts = [self._part(style, look.stroke_size) for style in styles]
        pairs = [
            (part, weight) for (part, _), weight in zip(parts, weights or [w for _, w in parts], strict=True)
        ]
        return look, pairs[0][0] if len(pairs) == 1 else blend_files(pairs, "blend"), upscale

    def _part(self, style: UploadFile | str, stroke_size: float) -> tuple[StyleFile, float]:
        """One style of a form, and its weight."""
        if isinstance(style, str):
            key, weight = _weighted(style)
            return self.library.encoded({key: 1.0}, stroke_size), weight
        return self.library.read(style.file, style.filename or "style", stroke_size), 1.0


_FILES = frozenset({"picture", "clip", "style"})  # fields that hold one
_SETTINGS = ("strength", "stroke_size", "keep_colours", "size", "steps", "temporal", "seed")
_CLIP_FIELDS = ("clip", "style", "weights", *_SETTINGS, "upscale")
_PICTURE_FIELDS = ("picture", *_CLIP_FIELDS[1:], "format")
_SWITCH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def uvicorn_config(server: Server, **options: Any) -> uvicorn.Config:
    """How a server is run; ``options`` are uvicorn's, such as those for TLS."""
    return uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        http=patient_for(server.limits.headers_s),
        ws="websockets-sansio",
        ws_max_size=server.limits.frame_bytes + _FRAME_HEADER_ROOM,
        ws_per_message_deflate=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        **options,
    )


@cache
def _static(name: str) -> str:
    """A file of the package that many requests ask for."""
    return resources.files("std_rt.serve").joinpath("static", name).read_text(encoding="utf-8")


def _peers(limits: Limits) -> Peers | None:
    """None without the extra [webrtc]."""
    if find_spec("aiortc") is None:
        return None
    from std_rt.serve.webrtc import Peers

    return Peers(limits)


async def _in_thread(work: Callable[..., Any], *values: Any) -> Any:
    return await anyio.to_thread.run_sync(work, *values)


async def _json(request: Request) -> dict[str, Any]:
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError("the request's body must be a JSON object")
    return found


def _file(form: FormData, name: str) -> Any:
    file = form.get(name)
    if not isinstance(file, UploadFile):
        raise UsageError(f"send a file called {name}: curl -F {name}=@FILE ...")
    if len(form.getlist(name)) > 1:
        raise UsageError(f"got {len(form.getlist(name))} fields called {name}; send one per request")
    return file.file


def _check_fields(form: FormData, known: Sequence[str]) -> None:
    for name, value in form.multi_items():
        if name not in known:
            raise UsageError(f"there is no field {name[:40]!r} here; use {', '.join(known)}")
        if not isinstance(value, str) and name not in _FILES:
            raise UsageError(f"{name} takes a value, not a file: curl -F {name}=VALUE ...")


def _setting(name: str, value: str) -> Any:
    """What the text of a form's field spells, for `Look.changed`."""
    if name == "keep_colours":
        return _switch(name, value)
    found = _value(value)
    return parse_size(found) if name == "size" and isinstance(found, str) else found


def _switch(name: str, text: str) -> bool:
    found = _SWITCH.get(text.strip().lower())
    if found is None:
        raise UsageError(f"{name} must be true or false (or 1/0, yes/no, on/off), got {text[:40]!r}")
    return found


def _value(text: str) -> Any:
    """A form's text as the number or truth value that it spells, else itself."""
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, bool | int | float):
            return found
    return text


def _numbers(text: Any) -> list[float]:
    try:
        return [float(part) for part in str(text).split(",")] if text else []
    except ValueError:
        raise UsageError("weights must be numbers with commas, such as 0.7,0.3") from None


def _weighted(text: str) -> tuple[str, float]:
    """``id`` or ``id:0.7``."""
    key, colon, weight = text.rpartition(":")
    try:
        return (key, float(weight)) if colon else (text, 1.0)
    except ValueError:
        raise UsageError(f"a style is ID or ID:WEIGHT, got {text[:40]!r}") from None


def _described(style: Style) -> dict[str, Any]:
    return {
        "id": style.id,
        "name": style.name,
        "uploaded": style.uploaded,
        "has_picture": style.picture is not None,
        "thumbnail": f"/v1/styles/{style.id}/thumbnail",
    }


def _side(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else round((size[0] * size[1]) ** 0.5)


def _as_file(name: str) -> dict[str, str]:
    return {"content-disposition": f'attachment; filename="{name}"'}


async def _user_error(request: Request, error: StdRtError) -> Response:
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 400)
    return JSONResponse({"error": one_line(error)}, status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _nobody(request: Request, error: ClientDisconnect) -> Response:
    """The client hung up in the middle of its body: no failure, and no answer that anybody reads."""
    return Response(status_code=400)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server has failed; its log says more"}, 500)
