"""`std-rt serve`: the page and the API, until Ctrl-C; `std-rt app`: the page in its own window."""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import socket
import subprocess
import webbrowser
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer import Option

from std_rt.cli.options import StylizerFlags, parse_size
from std_rt.cli.styles import expand_styles
from std_rt.cli.stylize import describe, open_stylizer
from std_rt.cli.terminal import builds_shown, note
from std_rt.core.errors import UsageError
from std_rt.core.machine import require
from std_rt.core.signals import ended_as_by_ctrl_c

if TYPE_CHECKING:
    from std_rt.media.camera.frame_source import Source
    from std_rt.pipeline.stylizer import Stylizer
    from std_rt.serve.app import Options, OwnStyle, Server

__all__ = ["ServeRequest", "app", "serve"]

_OPEN_AFTER_S = 0.5
_SHORTEST_TOKEN = 12
_BROWSERS = (  # those that show a page as a window of its own
    *("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome", "brave-browser"),
    *("microsoft-edge", "msedge", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"),
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)

Show = Callable[[str, Callable[[], None]], None]  # of a link, until it returns, and what ends the server


@dataclass(frozen=True, kw_only=True)
class ServeRequest(StylizerFlags):
    """What ``std-rt serve`` was asked to do. Raises UsageError for flags that do not fit together."""

    style: Annotated[
        list[str] | None,
        Option(
            "--style",
            "-s",
            metavar="PICTURE[:WEIGHT]|FOLDER",
            help="Styles that are there from the start; repeatable. With weights, starts with a blend. "
            "Default: the example styles.",
        ),
    ] = None
    host: Annotated[
        str,
        Option(metavar="ADDRESS", help="127.0.0.1: this machine only. 0.0.0.0: the network, with a token."),
    ] = "127.0.0.1"
    port: Annotated[int, Option(min=0, max=65535, help="0: any that is free.")] = 8765
    open_page: Annotated[bool, Option("--open/--no-open", help="Open the page in a browser.")] = True
    token: Annotated[
        str | None,
        Option(
            envvar="STD_RT_TOKEN",
            help="What clients must know. Default: none on this machine, a new one for others.",
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="A name that clients may call the server by; repeatable."),
    ] = None
    cert: Annotated[Path | None, Option(metavar="FILE", help="Certificate for https, with --key; PEM.")] = (
        None
    )
    key: Annotated[Path | None, Option(metavar="FILE", help="The certificate's private key.")] = None
    camera: Annotated[
        str | None,
        Option("--camera", "-c", metavar="N|DEVICE|FILE", help="A camera of the server's, for all to see."),
    ] = None
    max_sessions: Annotated[
        int, Option(min=1, max=64, help="Live sessions at once; further ones are told that it is busy.")
    ] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.cert is None) != (self.key is None):
            raise UsageError("--cert and --key belong together; give both")
        if self.token is not None and (len(self.token) < _SHORTEST_TOKEN or not self.token.isascii()):
            raise UsageError(
                f"--token needs at least {_SHORTEST_TOKEN} ASCII characters; leave it out for a new one"
            )


def serve(request: ServeRequest) -> None:
    """Stylize in the browser, and through an API, until Ctrl-C.

    std-rt serve

    std-rt serve -s paintings/ --host 0.0.0.0 --cert cert.pem --key key.pem
    """

    def show(link: str, end: Callable[[], None]) -> None:
        webbrowser.open(link)

    _serve(request, show if request.open_page else None)


def app(request: ServeRequest) -> None:
    """The page of std-rt serve in a window of its own; closing it ends the program.

    std-rt app
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise UsageError(
            "std-rt app needs Chrome, Chromium, Edge or Brave; std-rt serve opens the page in any browser"
        )
    with ExitStack() as stack:
        profile = stack.enter_context(TemporaryDirectory(prefix="std-rt-app-", ignore_cleanup_errors=True))

        def show(link: str, end: Callable[[], None]) -> None:
            command = [browser, f"--app={link}", f"--user-data-dir={profile}", "--no-first-run"]
            window = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(_closed, window)
            window.wait()
            end()

        _serve(request, show)


def _closed(window: subprocess.Popen[bytes]) -> None:
    window.terminate()
    window.wait()


def _serve(request: ServeRequest, show: Show | None) -> None:
    require("std-rt serve", "serve", "starlette", "uvicorn", "websockets", "python_multipart")
    console = Console(stderr=True)
    styles = _styles(request)
    _check_certificate(request)
    with ExitStack() as stack:
        listening = stack.enter_context(closing(_listen(request.host, request.port)))
        stack.enter_context(ended_as_by_ctrl_c("SIGTERM", "SIGHUP"))
        stylizer = stack.enter_context(open_stylizer(request, console))
        stylizer.bundle.check_single_frames("std-rt serve")
        if request.prompt is not None:
            stylizer.set_prompt(request.prompt, request.negative_prompt)
        with builds_shown(console, stylizer.backend):
            server = stack.enter_context(_server(request, stylizer, styles))
        note(console, describe(stylizer))
        link = _say_links(request, server, listening.getsockname()[1], console)
        with suppress(KeyboardInterrupt):  # the usual end
            _run(request, server, listening, None if show is None else partial(show, link))
        note(console, "stopped")


def _styles(request: ServeRequest) -> list[OwnStyle]:
    from std_rt import examples
    from std_rt.serve.app import OwnStyle

    if request.style:
        return [OwnStyle(path, weight=weight) for path, weight in expand_styles(request.style)]
    return [OwnStyle(frame, name.replace("_", " ")) for name, frame in examples.styles().items()]


def _check_certificate(request: ServeRequest) -> None:
    if request.cert is None or request.key is None:
        return
    import ssl

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(request.cert, request.key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--cert {request.cert} and --key {request.key} cannot be used: {error}") from error


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is told before engines open."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"--host {host} is no address of this machine ({error.strerror})") from error
    try:
        if os.name == "posix":  # on Windows, it would share the port with another server
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # who follows the link at once waits for the engines, and is not refused
    except OSError as error:
        listening.close()
        advice = "give another with --port, or --port 0 for any" if port else "give another --host"
        raise UsageError(f"{host} port {port} cannot be used ({error.strerror}); {advice}") from error
    return listening


def _server(request: ServeRequest, stylizer: Stylizer, styles: list[OwnStyle]) -> Server:
    from std_rt.media.camera.camera import open_source
    from std_rt.serve.app import Server

    source: Source | None = None
    if request.camera is not None:
        source = open_source(request.camera)
        if source.first_frame() is None:
            source.close()
            raise UsageError(f"{source.name} delivers no frames; name another camera with --camera")
    return Server(stylizer, styles, _options(request, len(styles)), camera=source)


def _options(request: ServeRequest, styles: int) -> Options:
    from std_rt.serve.app import Options
    from std_rt.serve.limits import Limits
    from std_rt.serve.protocol import Look
    from std_rt.serve.security import Rules, is_loopback

    token = request.token
    if token is None and not is_loopback(request.host):
        token = secrets.token_urlsafe(18)
    look = Look(
        strength=request.style_strength,
        stroke_size=1.0 if request.stroke_size is None else request.stroke_size,
        keep_colours=request.keep_colours,
        size=parse_size(request.size),
        steps=request.steps,
        temporal=request.temporal,
        seed=request.seed,
    )
    hosts = tuple(name.lower() for name in request.allow_host or ())
    limits = Limits(sessions=request.max_sessions)
    return Options(Rules(token, hosts), replace(limits, styles=limits.styles + styles), look)


def _say_links(request: ServeRequest, server: Server, port: int, console: Console) -> str:
    """Print the link to the page; returns it."""
    from std_rt.serve.security import is_loopback

    scheme = "http" if request.cert is None else "https"
    is_local = is_loopback(request.host)
    everywhere = request.host in ("0.0.0.0", "::")
    host = socket.gethostname() if everywhere else request.host
    shown = f"[{host}]" if ":" in host else host
    token = server.rules.token
    link = f"{scheme}://{shown}:{port}/{f'?token={token}' if token else ''}"
    typer.echo(link)
    if not is_local and request.cert is None:
        note(
            console,
            "note: browsers give no camera to pages without https from another machine; start with --cert "
            f"FILE --key FILE, put a proxy with TLS in front, or: ssh -L {port}:127.0.0.1:{port} {host}",
        )
    return link


def _run(
    request: ServeRequest,
    server: Server,
    listening: socket.socket,
    show: Callable[[Callable[[], None]], None] | None,
) -> None:
    import uvicorn

    from std_rt.serve.app import uvicorn_config

    # What is here now stays: without it to walk through, Python collects what sessions leave sooner, and with
    # a shorter pause.
    gc.collect()
    gc.freeze()
    config = uvicorn_config(server, ssl_certfile=request.cert, ssl_keyfile=request.key)
    served, opener = uvicorn.Server(config), None
    if show is not None:
        opener = Timer(_OPEN_AFTER_S, show, (lambda: setattr(served, "should_exit", True),))
        opener.daemon = True
        opener.start()
    try:
        served.run(sockets=[listening])
    finally:
        if opener is not None:
            opener.cancel()
