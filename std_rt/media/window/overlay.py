"""The overlay of the live window: statistics, a message, style thumbnails, the list of keys.

All sizes follow the height of the text, which follows the size of the window. What does not change from
one frame to the next is drawn once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import sqrt
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from std_rt.core.arrays import Frame
from std_rt.media.fit import resize
from std_rt.media.window.sdl import pygame

__all__ = ["HelpLine", "Overlay", "Scene", "Thumbnail", "icon", "text_px"]

Colour = tuple[int, int, int]
Thumbnail = tuple[Frame, float, bool]
"""A style in the strip: its picture, its weight 0..1 in the blend, and whether it is selected."""
HelpLine = tuple[Sequence[str], str]
"""Keys as printed on a keyboard, and what they do; without keys: a heading."""

_INK: Colour = (248, 247, 244)
_DIM: Colour = (172, 175, 183)
_PANEL: Colour = (21, 22, 28)
_CAP: Colour = (56, 59, 69)
_ACCENT: Colour = (255, 190, 84)
_RED: Colour = (255, 66, 56)
_ARROWS = ("←", "↑", "→", "↓")
_GLASS = 190  # opacity of panels: text stays legible over white
_FINER = 4
_CACHED = 300  # surfaces of a kind; a screenful with the list of keys is fewer than 150


def text_px(h: int, w: int) -> int:
    """Height of the text for a window of ``h`` x ``w`` px: 16 at 768 x 768, never below 11 or above 40."""
    short = min(h, w)
    return int(np.clip(round(max(short / 48, min(sqrt(h * w) / 56, short / 28))), 11, 40))


@dataclass(frozen=True, eq=False)
class Scene:
    """What to draw; see ``Window.show``."""

    lines: Sequence[str] = ()
    banner: str = ""
    recording: str | None = None
    thumbnails: Sequence[Thumbnail] = ()
    help_shown: bool = False


class Overlay:
    """Draws a :class:`Scene` over a picture. For one thread."""

    def __init__(self, help_lines: Sequence[HelpLine] = ()) -> None:
        """``help_lines``: the list of keys, shown while the scene asks for it."""
        self._help = [(tuple(keys), text) for keys, text in help_lines]
        self._cells: list[tuple[pygame.Rect, int]] = []
        # Caches of this overlay and not of the process: fonts end with the window. Nobody draws on a surface
        # that comes out of one.
        self._font = lru_cache(_CACHED)(pygame.font.Font)
        self._text = lru_cache(_CACHED)(self._make_text)
        self._shape = lru_cache(_CACHED)(_shape)
        self._arrow = lru_cache(_CACHED)(_arrow)
        self._panel = lru_cache(_CACHED)(self._make_panel)
        self._pill = lru_cache(_CACHED)(self._make_pill)
        self._card = lru_cache(_CACHED)(self._make_card)
        self._pictures: dict[tuple[int, int], tuple[Frame, pygame.Surface]] = {}

    def draw(self, canvas: pygame.Surface, scene: Scene) -> None:
        """Draw over what is already on ``canvas``."""
        w, h = canvas.get_size()
        px = text_px(h, w)
        room, bottom = w - 2 * px, h - px
        self._cells = []
        if scene.recording is not None:
            pill = self._pill(scene.recording, px, w // 2, dot=True)
            canvas.blit(pill, (w - px - pill.get_width(), px))
        if scene.help_shown:
            card = self._card(px, w, h)
            canvas.blit(card, card.get_rect(center=(w // 2, h // 2)))
        else:
            if scene.lines:
                canvas.blit(self._panel(tuple(scene.lines), px, room), (px, px))
            if scene.thumbnails:
                bottom = self._strip(canvas, scene.thumbnails, px, bottom) - px // 2
        if scene.banner:
            pill = self._pill(scene.banner, px, room)
            canvas.blit(pill, ((w - pill.get_width()) // 2, bottom - pill.get_height()))

    def thumbnail_at(self, x: int, y: int) -> int | None:
        """Index of the style whose picture, as last drawn, is at this pixel, or None."""
        return next((index for cell, index in self._cells if cell.collidepoint(x, y)), None)

    def _make_text(self, text: str, px: int, colour: Colour, room: int | None = None) -> pygame.Surface:
        """One line of text ``px`` high, cut with an ellipsis if it is wider than ``room`` px."""
        # Rendered large and scaled down: at 16 px the font's own grid makes letters stand unevenly.
        font = self._font(pygame.font.get_default_font(), _FINER * px)
        shown = printable(text)
        if room is not None and font.size(shown)[0] > _FINER * room:
            length = len(shown)
            while length and font.size(shown[:length].rstrip() + "…")[0] > _FINER * room:
                length -= 1
            shown = shown[:length].rstrip() + "…"
        words = font.render(shown, True, colour)
        w, h = words.get_size()
        return pygame.transform.smoothscale(words, (-(-w // _FINER), -(-h // _FINER)))

    def _picture(self, frame: Frame, side: int, radius: int) -> pygame.Surface:
        """The middle square of a picture at ``side`` px, with round corners."""
        key = (id(frame), side)
        if key not in self._pictures:
            if len(self._pictures) > _CACHED:
                self._pictures.clear()
            h, w = frame.shape[:2]
            edge = min(h, w)
            middle = frame[(h - edge) // 2 :, (w - edge) // 2 :][:edge, :edge]
            alpha = np.rint(_coverage(side, side, radius) * 255)
            surface = _surface(resize(middle, (side, side)), alpha)
            # The array is kept with its surface, so that its id is not given to another one meanwhile.
            self._pictures[key] = (frame, surface)
        return self._pictures[key][1]

    def _make_panel(self, lines: tuple[str, ...], px: int, room: int) -> pygame.Surface:
        """Lines on glass; a tab separates a dim label from its value, and values are aligned."""
        pad, step = round(0.75 * px), round(1.4 * px)
        space = max(room - 2 * pad, px)
        rows = [
            (label if tab else "", value if tab else label)
            for label, tab, value in (line.partition("\t") for line in lines)
        ]
        labels = [self._text(label, px, _DIM, space // 2) for label, _ in rows]
        column = max(label.get_width() for label in labels)
        indents = [column + px if label else 0 for label, _ in rows]
        values = [
            self._text(value, px, _INK, space - indent)
            for (_, value), indent in zip(rows, indents, strict=True)
        ]
        wide = max(indent + value.get_width() for indent, value in zip(indents, values, strict=True))
        # In steps of two characters: a figure that gains a digit does not make the panel tremble.
        wide = min(-(-wide // px) * px, space)
        panel = self._shape(wide + 2 * pad, step * len(rows) + round(1.3 * pad), px // 2, _PANEL, _GLASS)
        panel = panel.copy()
        for row, (label, indent, value) in enumerate(zip(labels, indents, values, strict=True)):
            y = round(0.65 * pad) + row * step + (step - value.get_height()) // 2
            panel.blits([(label, (pad, y)), (value, (pad + indent, y))])
        return panel

    def _make_pill(self, text: str, px: int, room: int, dot: bool = False) -> pygame.Surface:
        """One line on glass, with a red dot before it while recording."""
        high, pad, size = round(2.1 * px), round(0.9 * px), round(0.8 * px) if dot else 0
        indent = size + (px // 2 if dot and text else 0)
        words = self._text(text, px, _INK, room - 2 * pad - indent)
        wide = words.get_width() + indent + 2 * pad
        pill = self._shape(wide, high, high // 2, _PANEL, _GLASS).copy()
        if dot:
            pill.blit(self._shape(size, size, size // 2, _RED), (pad, (high - size) // 2))
        pill.blit(words, (pad + indent, (high - words.get_height()) // 2))
        return pill

    def _strip(self, canvas: pygame.Surface, thumbnails: Sequence[Thumbnail], px: int, bottom: int) -> int:
        """Small pictures in a row, each with its number and the bar of its weight; returns the top's y."""
        side, gap, pad, bar = round(3.9 * px), round(0.5 * px), round(0.7 * px), max(3, px // 5)
        fits = (canvas.get_width() - 2 * px - 2 * pad + gap) // (side + gap)
        shown = page([active for _, _, active in thumbnails], fits)
        wide, high = len(shown) * (side + gap) - gap + 2 * pad, side + bar + px // 2 + 2 * pad
        left, top = (canvas.get_width() - wide) // 2, bottom - high
        canvas.blit(self._shape(wide, high, px // 2, _PANEL, _GLASS), (left, top))
        for place, index in enumerate(shown):
            cell = pygame.Rect(left + pad + place * (side + gap), top + pad, side, side)
            self._cell(canvas, cell, thumbnails[index], index + 1, px)
            canvas.blit(self._shape(side, bar, bar // 2, _CAP), (cell.x, cell.bottom + px // 2))
            filled = round(side * min(max(thumbnails[index][1], 0.0), 1.0))
            if filled:
                done = self._shape(max(filled, bar), bar, bar // 2, _ACCENT)
                canvas.blit(done, (cell.x, cell.bottom + px // 2))
            self._cells.append((cell, index))
        return top

    def _cell(
        self, canvas: pygame.Surface, cell: pygame.Rect, thumbnail: Thumbnail, number: int, px: int
    ) -> None:
        picture, _, active = thumbnail
        edge = max(2, px // 6) if active else 0
        ring = cell.inflate(2 * edge, 2 * edge)
        if active:
            canvas.blit(self._shape(*ring.size, px // 3 + edge, _ACCENT), ring)
        canvas.blit(self._picture(picture, cell.w, px // 3), cell)
        label = self._text(str(number), round(0.75 * px), _PANEL if active else _INK)
        high = round(1.15 * px)
        tag = pygame.Rect(cell.x + px // 4, cell.y + px // 4, max(high, label.get_width() + px // 2), high)
        canvas.blit(self._shape(*tag.size, high // 2, _ACCENT if active else _PANEL, 255), tag)
        canvas.blit(label, label.get_rect(center=tag.center))

    def _make_card(self, px: int, w: int, h: int) -> pygame.Surface:
        """The list of keys, in the largest text up to ``px`` in which it fits; in one column or two."""
        room = h - (7 * px if h > 35 * px else px)  # with room for a message below, but in small windows
        for size in range(px, 7, -1):
            for columns in (1, 2):
                card = self._set_card(size, columns)
                if card.get_width() <= w - px and card.get_height() <= room:
                    return card
        return card  # A window this small shows the middle of it.

    def _set_card(self, px: int, columns: int) -> pygame.Surface:
        blocks = [self._block(rows, px) for rows in in_columns(self._help, columns)]
        pad, gap = round(1.6 * px), round(2.5 * px)
        wide = sum(block.get_width() + gap for block in blocks) - gap + 2 * pad
        high = max(block.get_height() for block in blocks) + 2 * pad
        card = self._shape(wide, high, px, _PANEL, 238).copy()
        x = pad
        for block in blocks:
            card.blit(block, (x, pad))
            x += block.get_width() + gap
        return card

    def _block(self, rows: Sequence[HelpLine], px: int) -> pygame.Surface:
        """One column: the keys, each with its description."""
        step, above = round(1.85 * px), round(0.9 * px)
        caps = [self._caps(keys, px) for keys, _ in rows]
        column = max(cap.get_width() for cap in caps) + px
        texts = [self._text(text, px, _INK if keys else _ACCENT) for keys, text in rows]
        indents = [column if keys else 0 for keys, _ in rows]
        wide = max(text.get_width() + indent for text, indent in zip(texts, indents, strict=True))
        heights = [step if keys or not row else step + above for row, (keys, _) in enumerate(rows)]
        block = pygame.Surface((wide, sum(heights)), pygame.SRCALPHA)
        for text, cap, indent, bottom in zip(texts, caps, indents, accumulate(heights), strict=True):
            middle = bottom - step // 2
            block.blit(cap, (0, middle - cap.get_height() // 2))
            block.blit(text, (indent, middle - text.get_height() // 2))
        return block

    def _caps(self, keys: Sequence[str], px: int) -> pygame.Surface:
        """The keys of one line side by side; empty for a heading."""
        high, gap = round(1.5 * px), px // 3
        labels = [
            self._arrow(key, px, _INK) if key in _ARROWS else self._text(key, round(0.85 * px), _INK)
            for key in keys
        ]
        widths = [max(high, label.get_width() + round(0.8 * px)) for label in labels]
        caps = pygame.Surface((sum(widths) + gap * max(len(keys) - 1, 0), high), pygame.SRCALPHA)
        x = 0
        for key, label, wide in zip(keys, labels, widths, strict=True):
            if key != "…":
                caps.blit(self._shape(wide, high, px // 3, _CAP), (x, 0))
            caps.blit(label, label.get_rect(center=(x + wide // 2, high // 2)))
            x += wide + gap
        return caps


def page(active: Sequence[bool], fits: int) -> range:
    """Indices of the (at most ``fits``) styles to show, around the first active one."""
    count = max(1, min(fits, len(active)))
    chosen = next((index for index, is_active in enumerate(active) if is_active), 0)
    first = min(max(chosen - count // 2, 0), len(active) - count)
    return range(first, first + count)


def in_columns(rows: Sequence[HelpLine], columns: int) -> list[Sequence[HelpLine]]:
    """The rows in one or two columns; the second begins at the heading nearest to the middle."""
    heads = [index for index, (keys, _) in enumerate(rows) if index and not keys]
    if columns == 1 or not heads:
        return [rows]
    cut = min(heads, key=lambda index: abs(index - len(rows) / 2))
    return [rows[:cut], rows[cut:]]


def icon() -> pygame.Surface:
    """The window's icon, 64 x 64 px: one picture seen twice."""
    picture = _shape(64, 64, 15, _PANEL)
    picture.blit(_shape(34, 34, 17, _INK), (8, 15))
    picture.blit(_shape(34, 34, 17, _ACCENT, 235), (22, 15))
    return picture


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


def _shape(w: int, h: int, radius: int, colour: Colour, opacity: int = 255) -> pygame.Surface:
    """A rectangle of ``w`` x ``h`` px with round, smooth corners; opacity 0..255."""
    return _surface(colour, np.rint(_coverage(h, w, radius) * opacity))


def _arrow(towards: str, px: int, colour: Colour) -> pygame.Surface:
    """A triangle for one of ← ↑ → ↓, which the font does not have, as high as a small letter."""
    side = round(0.66 * px)
    large = np.zeros((_FINER * side, _FINER * side), np.uint8)
    far = _FINER * side - 1
    # Towards the right, three quarters as deep as high.
    corners = np.array([[far // 8, 0], [far - far // 8, far // 2], [far // 8, far]], np.int32)
    cv2.fillConvexPoly(large, corners, 255)
    small = cv2.resize(large, (side, side), interpolation=cv2.INTER_AREA)
    return _surface(colour, np.rot90(small, "→↑←↓".index(towards)))


def _surface(rgb: Frame | Colour, alpha: NDArray[Any]) -> pygame.Surface:
    """A surface of one colour or of pixels [h, w, 3], with the opacity ``alpha`` [h, w], 0..255."""
    h, w = alpha.shape
    # In the order of the window's bytes, for which SDL has fast ways to blend.
    bgra = np.empty((h, w, 4), np.uint8)
    bgra[..., 2::-1], bgra[..., 3] = rgb, alpha
    return pygame.image.frombytes(bgra.tobytes(), (w, h), "BGRA")
