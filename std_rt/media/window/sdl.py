"""SDL through pygame-ce: starting it, living without a screen or losing it, and the names of keys.

pygame is imported only here, so that it is imported quietly and with the hints below.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import string
import sys
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

__all__ = ["keep_forever", "key_name", "open_screen", "pygame", "screen_is_lost"]

_SCREENLESS = ("dummy", "offscreen")  # SDL's drivers that draw to memory only.
_ALWAYS_A_SCREEN = ("win32", "darwin")
_lost: list[bool] = []


def open_screen() -> None:
    """Start SDL's video. Raises MediaError if there is no screen.

    Without a screen SDL falls back silently to a driver that draws to memory: that is refused unless
    ``SDL_VIDEODRIVER`` names it.
    """
    if _lost:
        raise _no_screen("the X server that was there went away")
    asked = os.environ.get("SDL_VIDEODRIVER", "")
    places = [name for name in ("DISPLAY", "WAYLAND_DISPLAY") if os.environ.get(name)]
    if not asked and not places and sys.platform not in _ALWAYS_A_SCREEN:
        raise _no_screen("neither DISPLAY nor WAYLAND_DISPLAY is set")
    found = " ".join(f"{name}={os.environ[name]}" for name in places)
    if not asked and places == ["DISPLAY"]:
        # Asked for X only, SDL does not go on to Wayland, whose library complains on stderr.
        os.environ["SDL_VIDEODRIVER"] = "x11"
    try:
        pygame.display.init()
    except pygame.error as error:
        answer = f"{found} does not answer" if found else str(error)
        raise _no_screen(f"SDL_VIDEODRIVER={asked}: {error}" if asked else answer) from error
    finally:
        if not asked:
            os.environ.pop("SDL_VIDEODRIVER", None)
    driver = str(pygame.display.get_driver())
    if driver in _SCREENLESS and driver not in asked.lower().split(","):
        pygame.display.quit()
        raise _no_screen(f"{found} does not answer" if found else "the system gave none")
    if driver == "x11":
        # Shared memory: 0.1 ms for 768 x 768 px. Through OpenGL it is 3 ms if that runs on the CPU.
        os.environ.setdefault("SDL_FRAMEBUFFER_ACCELERATION", "0")
        _survive_lost_screen()


def _no_screen(found: str) -> MediaError:
    return MediaError(
        f"no screen to show a window on ({found}); use --no-window (with --record out.mp4 to keep the result)"
    )


# X11: if the server ends or cuts the connection (xkill), or someone else destroys the window, Xlib calls
# exit() from wherever it is. None of Python's clean-up would run: a recording would not be finished. Since
# version 1.7 Xlib lets a program replace these exits. What is left is a connection on which some calls of SDL
# wait for an answer for ever, so from then on nothing may touch SDL.


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
    """A request failed: if it was to draw on the window, the window is gone; others do no harm."""
    if error.contents.code == _BAD_DRAWABLE:
        _lost.append(True)
    return 0


# Xlib keeps pointers to these.
_on_exit = _OnExit(lambda _display, _data: _lost.append(True))
_on_lost = _OnLost(lambda _display: 0)  # in place of a message
_on_error = _OnError(_note_error)


def screen_is_lost() -> bool:
    """Whether the window or its X server has gone: nothing may be asked of SDL in this process any more."""
    return bool(_lost)


def _survive_lost_screen() -> None:
    """Make the end of the X server something that :func:`screen_is_lost` reports, not the end of the process.

    Does nothing if Xlib is older than 1.7.
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
    xlib.XSetIOErrorExitHandler(pointer(capsule, b"display"), _on_exit, None)
    xlib.XSetIOErrorHandler(_on_lost)
    xlib.XSetErrorHandler(_on_error)


def keep_forever(*things: object) -> None:
    """After a lost screen: keep these objects and SDL itself from being ended, which would never return."""
    for thing in things:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    atexit.unregister(pygame.quit)


# Names of keys, the same on every keyboard layout where it matters. Letters are what the key says (without
# Latin letters: what it would say on a US keyboard), the row of digits counts by position (on a French
# keyboard it gives digits only with shift), brackets too.

_SAME_NAME = (
    *(
        "left",
        "right",
        "up",
        "down",
        "space",
        "escape",
        "return",
        "tab",
        "backspace",
        "delete",
        "home",
        "end",
    ),
    *("pageup", "pagedown"),
)
_NAMED = {
    **{getattr(pygame, f"K_{name.upper()}"): name for name in _SAME_NAME},
    pygame.K_KP_ENTER: "return",
    **{getattr(pygame, f"K_F{number}"): f"f{number}" for number in range(1, 13)},
    **{getattr(pygame, f"K_{letter}"): letter for letter in string.ascii_lowercase},
    **{getattr(pygame, f"K_KP{digit}"): str(digit) for digit in range(10)},
}
_SIGNS = {
    pygame.K_PLUS: "plus",
    pygame.K_EQUALS: "plus",  # The same key on a US keyboard; + needs shift there, and need not here.
    pygame.K_KP_PLUS: "plus",
    pygame.K_MINUS: "minus",
    pygame.K_UNDERSCORE: "minus",
    pygame.K_KP_MINUS: "minus",
    pygame.K_LEFTBRACKET: "bracketleft",
    pygame.K_RIGHTBRACKET: "bracketright",
    pygame.K_QUESTION: "question",
}
_ROW_OF_DIGITS = {getattr(pygame, f"KSCAN_{digit}"): str(digit) for digit in range(10)}
_BY_POSITION = {getattr(pygame, f"KSCAN_{letter.upper()}"): letter for letter in string.ascii_lowercase}
_BRACKETS = {pygame.KSCAN_LEFTBRACKET: "bracketleft", pygame.KSCAN_RIGHTBRACKET: "bracketright"}
_LAST_ASCII = 127
_MODIFIERS = (
    (pygame.KMOD_CTRL, "ctrl"),
    (pygame.KMOD_ALT | pygame.KMOD_MODE, "alt"),
    (pygame.KMOD_META, "meta"),
    (pygame.KMOD_SHIFT, "shift"),
)


def key_name(key: int, scancode: int, mod: int) -> str | None:
    """The name of a pressed key, with "ctrl+", "alt+", "meta+" and "shift+" before it; None: no name.

    ``key``, ``scancode`` and ``mod`` are those of a pygame KEYDOWN event. Signs ("plus", "minus",
    "bracketleft", "bracketright", "question") never have "shift+": whether they need it is the layout's.
    """
    sign = _sign(key, scancode, mod)
    name = sign or _ROW_OF_DIGITS.get(scancode) or _NAMED.get(key)
    if name is None and key > _LAST_ASCII:
        name = _BY_POSITION.get(scancode)
    if name is None:
        return None
    held = [word for bit, word in _MODIFIERS if mod & bit and not (sign and word == "shift")]
    return "+".join([*held, name])


def _sign(key: int, scancode: int, mod: int) -> str | None:
    if scancode in _ROW_OF_DIGITS:
        return None
    if key == pygame.K_SLASH and mod & pygame.KMOD_SHIFT:
        return "question"
    return _SIGNS.get(key) or (_BRACKETS.get(scancode) if key > _LAST_ASCII else None)
