"""SDL by way of pygame-ce: how it is started, when there is no screen, and when the screen goes away.

Everything that asks for pygame asks for it here, so that it is imported quietly and with the hints below.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# SDL and pygame read these from the environment, some at import; what the user set there stays.
_HINTS = {
    "PYGAME_HIDE_SUPPORT_PROMPT": "1",  # No banner on stdout.
    "SDL_NO_SIGNAL_HANDLERS": "1",  # Ctrl-C and SIGTERM are the program's, not an SDL event.
    "SDL_VIDEO_ALLOW_SCREENSAVER": "1",  # A window that is open is no reason to keep the screen awake.
    "SDL_VIDEO_X11_NET_WM_BYPASS_COMPOSITOR": "0",  # Else the desktop's effects stop while it is open.
    "SDL_VIDEO_MINIMIZE_ON_FOCUS_LOSS": "0",  # Full screen on one monitor, work on the other.
    "SDL_WINDOWS_DPI_AWARENESS": "permonitorv2",  # Real pixels, not a picture enlarged by Windows.
    "SDL_VIDEO_X11_WMCLASS": "std-rt",
    "SDL_APP_NAME": "std-rt",
    "SDL_APP_ID": "std-rt",
}
for _name, _value in _HINTS.items():
    os.environ.setdefault(_name, _value)

import pygame  # noqa: E402

from std_rt.core.errors import MediaError  # noqa: E402

__all__ = ["keep_forever", "open_screen", "pygame", "screen_is_lost", "survive_lost_screen"]

_SCREENLESS = ("dummy", "offscreen")  # SDL's drivers that draw to memory only.
_HAS_ITS_OWN_SCREEN = ("win32", "darwin")
_lost: list[bool] = []


def open_screen() -> str:
    """Start SDL's video; returns the name of its driver ("x11", "wayland", "windows", "cocoa", ...).

    Without a screen SDL falls back silently to a driver that draws to memory: that is refused unless
    ``SDL_VIDEODRIVER`` names it. Raises MediaError where there is no screen.
    """
    if _lost:
        raise _no_screen("the X server that was there went away")
    asked = os.environ.get("SDL_VIDEODRIVER", "")
    places = [name for name in ("DISPLAY", "WAYLAND_DISPLAY") if os.environ.get(name)]
    if not asked and not places and sys.platform not in _HAS_ITS_OWN_SCREEN:
        raise _no_screen("neither DISPLAY nor WAYLAND_DISPLAY is set")
    found = " ".join(f"{name}={os.environ[name]}" for name in places)
    try:
        # Asked for X only, SDL does not go on to Wayland, whose library complains on stderr.
        with _driver("x11" if not asked and places == ["DISPLAY"] else asked):
            pygame.display.init()
    except pygame.error as error:
        answer = f"{found} does not answer" if found else str(error)
        raise _no_screen(f"SDL_VIDEODRIVER={asked}: {error}" if asked else answer) from error
    driver = str(pygame.display.get_driver())
    if driver in _SCREENLESS and driver not in asked.lower().split(","):
        pygame.display.quit()
        raise _no_screen(f"{found} does not answer" if found else "the system gave none")
    if driver == "x11":
        # Shared memory: 0.1 ms for 768 x 768 px. Through OpenGL it is 3 ms where that runs on the CPU.
        os.environ.setdefault("SDL_FRAMEBUFFER_ACCELERATION", "0")
    return driver


def _no_screen(found: str) -> MediaError:
    return MediaError(f"no screen to show a window on ({found}); use --no-window, or --record out.mp4")


@contextmanager
def _driver(name: str) -> Iterator[None]:
    """``SDL_VIDEODRIVER`` set to ``name`` (if any) while SDL reads it."""
    before = os.environ.get("SDL_VIDEODRIVER")
    if not name or name == before:
        yield
        return
    os.environ["SDL_VIDEODRIVER"] = name
    try:
        yield
    finally:
        os.environ.pop("SDL_VIDEODRIVER")
        if before is not None:
            os.environ["SDL_VIDEODRIVER"] = before


# X11: where the server ends or cuts the connection (xkill), or someone else destroys the window, Xlib calls
# exit() from wherever it is. Nothing of Python's clean-up would run: a recording would not be finished.
# Since version 1.7 Xlib lets one take these exits away. What is left is a connection on which some calls of
# SDL wait for an answer for ever, so from then on nothing may touch SDL.


class _XError(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("display", ctypes.c_void_p),
        ("resource", ctypes.c_ulong),
        ("serial", ctypes.c_ulong),
        ("code", ctypes.c_ubyte),
    )


_BAD_DRAWABLE = 9
_OnExit = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_OnLost = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_OnError = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_XError))


def _note_error(_display: int, error: Any) -> int:
    """A request failed: where it was to draw on the window, that is gone; the rest does no harm."""
    if error.contents.code == _BAD_DRAWABLE:
        _lost.append(True)
    return 0


# Xlib keeps pointers to these.
_instead_of_exit = _OnExit(lambda _display, _data: _lost.append(True))
_instead_of_text = _OnLost(lambda _display: 0)
_instead_of_end = _OnError(_note_error)


def screen_is_lost() -> bool:
    """Whether the window or its X server has gone: nothing may be asked of SDL in this process any more."""
    return bool(_lost)


def survive_lost_screen() -> None:
    """Make the end of the X server something :func:`screen_is_lost` tells, not the end of the process.

    To be called once after :func:`open_screen` gave "x11". Does nothing where Xlib is older than 1.7.
    """
    xlib = ctypes.CDLL("libX11.so.6")  # the copy that SDL has loaded
    if not hasattr(xlib, "XSetIOErrorExitHandler"):
        return
    # Only a window of pygame.display tells which connection SDL uses. It is never shown.
    pygame.display.set_mode((1, 1), pygame.HIDDEN)
    capsule = pygame.display.get_wm_info()["display"]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    xlib.XSetIOErrorExitHandler.restype = None
    xlib.XSetIOErrorExitHandler.argtypes = [ctypes.c_void_p, _OnExit, ctypes.c_void_p]
    xlib.XSetIOErrorHandler.argtypes = [_OnLost]
    xlib.XSetErrorHandler.argtypes = [_OnError]
    xlib.XSetIOErrorExitHandler(pointer(capsule, b"display"), _instead_of_exit, None)
    xlib.XSetIOErrorHandler(_instead_of_text)
    xlib.XSetErrorHandler(_instead_of_end)


def keep_forever(*things: object) -> None:
    """After a lost screen: keep these objects and SDL itself from being ended, which would never return."""
    for thing in things:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    atexit.unregister(pygame.quit)
