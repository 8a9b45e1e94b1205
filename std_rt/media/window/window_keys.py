"""Names of keys, the same on every keyboard layout where it matters.

Letters are what the key says (on layouts without Latin letters: what it would say on a US keyboard), the
row of digits counts by position (on a French keyboard it gives digits only with shift), brackets too.
"""

from __future__ import annotations

import string

from std_rt.media.window.sdl import pygame

__all__ = ["key_name"]

_NAMED = {
    pygame.K_LEFT: "left",
    pygame.K_RIGHT: "right",
    pygame.K_UP: "up",
    pygame.K_DOWN: "down",
    pygame.K_SPACE: "space",
    pygame.K_ESCAPE: "escape",
    pygame.K_RETURN: "return",
    pygame.K_KP_ENTER: "return",
    pygame.K_TAB: "tab",
    pygame.K_BACKSPACE: "backspace",
    pygame.K_DELETE: "delete",
    pygame.K_HOME: "home",
    pygame.K_END: "end",
    pygame.K_PAGEUP: "pageup",
    pygame.K_PAGEDOWN: "pagedown",
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


_MODIFIERS = (
    (pygame.KMOD_CTRL, "ctrl"),
    (pygame.KMOD_ALT | pygame.KMOD_MODE, "alt"),
    (pygame.KMOD_META, "meta"),
    (pygame.KMOD_SHIFT, "shift"),
)


def _sign(key: int, scancode: int, mod: int) -> str | None:
    if scancode in _ROW_OF_DIGITS:
        return None
    if key == pygame.K_SLASH and mod & pygame.KMOD_SHIFT:
        return "question"
    return _SIGNS.get(key) or (_BRACKETS.get(scancode) if key > _LAST_ASCII else None)
