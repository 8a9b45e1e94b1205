"""Text, round shapes and small pictures as SDL surfaces, drawn once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.media.window.sdl import pygame

__all__ = ["Colour", "DrawingKit"]

Frame = NDArray[np.uint8]  # [H, W, 3] RGB
Colour = tuple[int, int, int]
Made = TypeVar("Made")

_FINER = 4
_KEPT = 500  # drawn things; a screenful with the list of keys is fewer than 150


class DrawingKit:
    """Makes surfaces to blit; the same request gives the same surface, so nobody draws on one.

    Not for several threads. The newest 500 are kept.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, object] = OrderedDict()

    def keep(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` gave for this key last time, or gives now."""
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return cast(Made, self._kept[key])

    def text(self, text: str, px: int, colour: Colour, room: int | None = None) -> pygame.Surface:
        """One line of text ``px`` high, cut with an ellipsis where it is wider than ``room`` px."""
        return self.keep(("text", text, px, colour, room), lambda: self._set(text, px, colour, room))

    def shape(self, w: int, h: int, radius: int, colour: Colour, opacity: int = 255) -> pygame.Surface:
        """A rectangle of ``w`` x ``h`` px with round, smooth corners; opacity 0..255."""
        return self.keep(
            ("shape", w, h, radius, colour, opacity), lambda: _fill(w, h, radius, colour, opacity)
        )

    def picture(self, frame: Frame, side: int, radius: int) -> pygame.Surface:
        """The middle square of a picture at ``side`` px, with round corners."""
        # The array is kept with its surface, so that its id is not given to another one meanwhile.
        key = ("picture", id(frame), side, radius)
        return self.keep(key, lambda: (frame, _square(frame, side, radius)))[1]

    def arrow(self, towards: str, px: int, colour: Colour) -> pygame.Surface:
        """A triangle for one of ← ↑ → ↓, which the font does not have, as high as a small letter."""
        return self.keep(("arrow", towards, px, colour), lambda: _triangle(towards, px, colour))

    def _set(self, text: str, px: int, colour: Colour, room: int | None) -> pygame.Surface:
        # Set large and made small: at 16 px the font's own grid makes letters stand unevenly.
        large = _FINER * px
        font = self.keep(("font", large), lambda: pygame.font.Font(pygame.font.get_default_font(), large))
        shown = printable(text)
        if room is not None and font.size(shown)[0] > _FINER * room:
            length = len(shown)
            while length and font.size(shown[:length].rstrip() + "…")[0] > _FINER * room:
                length -= 1
            shown = shown[:length].rstrip() + "…"
        words = font.render(shown, True, colour)
        w, h = words.get_size()
        return pygame.transform.smoothscale(words, (-(-w // _FINER), -(-h // _FINER)))


def printable(text: str) -> str:
    """``text`` as one line a font can draw: names of files may hold anything."""
    one_line = "".join(char if char.isprintable() else " " for char in text)
    return one_line.encode("utf-8", "replace").decode("utf-8")


def _coverage(h: int, w: int, radius: int) -> NDArray[np.float32]:
    """How much of each pixel, 0..1, a rectangle with round corners covers; [h, w]."""
    r = min(radius, h // 2, w // 2)
    y = np.abs(np.arange(h, dtype=np.float32) - (h - 1) / 2) - (h / 2 - r)
    x = np.abs(np.arange(w, dtype=np.float32) - (w - 1) / 2) - (w / 2 - r)
    # Distance to the edge of a round box: the box of the corners' centres, grown by the radius.
    outside = np.hypot(np.maximum(x, 0)[None, :], np.maximum(y, 0)[:, None])
    distance = outside + np.minimum(np.maximum(x[None, :], y[:, None]), 0) - r
    return np.asarray(np.clip(0.5 - distance, 0, 1), np.float32)


def _fill(w: int, h: int, radius: int, colour: Colour, opacity: int) -> pygame.Surface:
    pixels = np.empty((h, w, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = np.rint(_coverage(h, w, radius) * opacity)
    return _surface(pixels)


def _triangle(towards: str, px: int, colour: Colour) -> pygame.Surface:
    side = round(0.66 * px)
    large = np.zeros((_FINER * side, _FINER * side), np.uint8)
    far = _FINER * side - 1
    # Towards the right, three quarters as deep as high.
    corners = np.array([[far // 8, 0], [far - far // 8, far // 2], [far // 8, far]], np.int32)
    cv2.fillConvexPoly(large, corners, 255)
    small = cv2.resize(large, (side, side), interpolation=cv2.INTER_AREA)
    pixels = np.empty((side, side, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = np.rot90(small, "→↑←↓".index(towards))
    return _surface(pixels)


def _square(frame: Frame, side: int, radius: int) -> pygame.Surface:
    h, w = frame.shape[:2]
    edge = min(h, w)
    middle = frame[(h - edge) // 2 :, (w - edge) // 2 :][:edge, :edge]
    method = cv2.INTER_AREA if edge > side else cv2.INTER_CUBIC
    pixels = np.empty((side, side, 4), np.uint8)
    pixels[..., :3] = cv2.resize(np.ascontiguousarray(middle), (side, side), interpolation=method)
    pixels[..., 3] = np.rint(_coverage(side, side, radius) * 255)
    return _surface(pixels)


def _surface(pixels: NDArray[np.uint8]) -> pygame.Surface:
    """RGBA pixels [h, w, 4] as a surface of its own memory."""
    h, w = pixels.shape[:2]
    # In the order of the window's bytes, for which SDL has fast ways to blend.
    return pygame.image.frombytes(pixels[..., [2, 1, 0, 3]].tobytes(), (w, h), "BGRA")
