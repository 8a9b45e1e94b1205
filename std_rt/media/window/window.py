"""The live window: shows a picture, or input next to output, with an overlay; reports keys and dropped files.

Everything here must be called from the main thread: SDL (and macOS behind it) insists. On Windows, while
the user drags or resizes the window, the system holds the main thread; the other threads go on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from std_rt.core.arrays import Frame
from std_rt.core.errors import MediaError
from std_rt.media.window.overlay import HelpLine, Overlay, Scene, Thumbnail, icon
from std_rt.media.window.sdl import keep_forever, key_name, open_screen, pygame, screen_is_lost

__all__ = ["Box", "Closed", "Dropped", "Event", "Key", "Window", "layout"]

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels of the window."""

_BACK = (10, 10, 12)
_BGRX = (0xFF0000, 0xFF00, 0xFF, 0)  # masks of a little-endian surface whose bytes are B, G, R, unused
_FAILURES_AT_MOST = 10
_SHARE_OF_SCREEN = 0.85
_DIMMED = 0.5  # brightness of the picture behind the list of keys
_OPENS_AT_PX = 768  # a smaller frame is enlarged until its shorter side has this
_HIDE_POINTER_S = 2.0


@dataclass(frozen=True)
class Key:
    """A key was pressed: "n", "left", "space", "plus", "3", "shift+3" ...; repeat: it is being held."""

    name: str
    repeat: bool = False


@dataclass(frozen=True)
class Dropped:
    """A file was dropped on the window."""

    path: Path


@dataclass(frozen=True)
class Closed:
    """The window was closed, or is gone; reason: "" or why, in one short line."""

    reason: str = ""


Event = Key | Dropped | Closed


class Window:
    """A resizable window; one at a time in a process, and in its main thread only.

    ``title`` is shown by the system, ``size`` is (H, W) of the frames to come: the window opens with their
    aspect, enlarged. ``help_lines`` is the list of keys, shown while :attr:`help_shown` is set.
    :attr:`fullscreen` says whether it covers its whole screen.
    Raises MediaError if there is no screen, RuntimeError outside the main thread.
    """

    def __init__(
        self,
        title: str,
        *,
        size: tuple[int, int] = (768, 768),
        fullscreen: bool = False,
        help_lines: Sequence[HelpLine] = (),
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a Window belongs to the main thread")
        self.help_shown = False
        self._now, self._pointer_s = now, now()
        self._open, self._stale, self.fullscreen = True, False, fullscreen
        self._lost, self._failures = "", 0  # why nothing can be shown any more; draws that failed in a row
        self._pictures: list[Frame] = []
        self._scene = Scene()
        self._held: set[int] = set()
        self._overlay, self._has_help = Overlay(help_lines), bool(help_lines)
        self._window = _open_window(title, size, fullscreen)
        self._own_size = None if fullscreen else self._window.size

    def show(
        self,
        frame: Frame,
        lines: Sequence[str] = (),
        beside: Frame | None = None,
        banner: str = "",
        *,
        recording: str | None = None,
        thumbnails: Sequence[Thumbnail] = (),
    ) -> None:
        """Draw ``frame`` (uint8 [H, W, 3] RGB) as large as the window allows, its aspect kept.

        lines: statistics at the top left; a tab separates a dim label from its value ("fps\\t29.8").
        beside: the input, shown to the left of ``frame`` at equal height.
        banner: a message at the bottom. recording: None, or the text next to the red dot ("0:12", "").
        thumbnails: a strip of the styles; a click on the third is the key "3".
        Does nothing once the window is closed or gone, which :meth:`events` reports.
        """
        if not self._alive():
            return
        pictures = [frame] if beside is None else [beside, frame]
        if len(pictures) != len(self._pictures):
            self._make_room(pictures)
        self._pictures = pictures
        self._scene = Scene(tuple(lines), banner, recording, tuple(thumbnails))
        if self.fullscreen and self._now() - self._pointer_s > _HIDE_POINTER_S:
            pygame.mouse.set_visible(False)
        self._draw()

    def events(self) -> list[Event]:
        """What happened since the last call, in order. Call it ten times a second or more.

        Once the screen is gone (its X server ended) every call returns :class:`Closed` with the reason.
        """
        happened: list[Event] = []
        if self._alive():
            for raw in pygame.event.get():
                event = self._event(raw)
                # SDL reports twice that the only window was closed.
                if event is not None and not (event == Closed() and event in happened):
                    happened.append(event)
        if self._open and not self._alive():
            happened.append(Closed(self._lost))
        if self._stale and self._pictures and self._alive():
            self._draw()
        return happened

    def toggle_fullscreen(self) -> None:
        """Cover the whole screen, or be a window again."""
        if not self._alive():
            return
        self.fullscreen = not self.fullscreen
        self._pointer_s = self._now()
        if self.fullscreen:
            self._window.set_fullscreen(desktop=True)
        else:
            self._window.set_windowed()
            pygame.mouse.set_visible(True)
            if self._own_size is None and self._pictures:  # It opened as full screen.
                self._own_size = self._window.size
                self._make_room(self._pictures)

    def back(self) -> bool:
        """Close the list of keys, else leave full screen; False if there was neither."""
        if self.help_shown:
            self.help_shown = False
        elif self.fullscreen:
            self.toggle_fullscreen()
        else:
            return False
        return True

    def close(self) -> None:
        """Close the window; may be called again."""
        if self._alive():
            pygame.event.pump()  # A lost screen is noticed here, not in a call that would wait for it.
            self._alive()
        if self._open and not screen_is_lost():
            self._window.destroy()
            pygame.font.quit()
            pygame.display.quit()
        self._open = False

    def _alive(self) -> bool:
        """Whether something can still be shown; notes when the screen was lost."""
        if screen_is_lost() and not self._lost:
            self._lost = "the window or its screen is gone"
            keep_forever(self._window)
        return self._open and not self._lost

    def _event(self, raw: pygame.Event) -> Event | None:
        match raw.type:
            case pygame.KEYDOWN:
                return self._key(raw)
            case pygame.KEYUP:
                self._held.discard(raw.scancode)
            case pygame.WINDOWFOCUSLOST:
                self._held.clear()
            case pygame.DROPFILE:
                return Dropped(Path(raw.file))
            case pygame.QUIT | pygame.WINDOWCLOSE:
                return Closed()
            case pygame.MOUSEMOTION:
                self._pointer_s = self._now()
                pygame.mouse.set_visible(True)
            case pygame.MOUSEBUTTONDOWN:
                return self._click(raw)
            case pygame.WINDOWEXPOSED | pygame.WINDOWSIZECHANGED | pygame.WINDOWRESTORED:
                self._stale = True
        return None

    def _key(self, raw: pygame.Event) -> Key | None:
        held = raw.scancode in self._held
        self._held.add(raw.scancode)
        name = key_name(raw.key, raw.scancode, raw.mod)
        return None if name is None else Key(name, held)

    def _click(self, raw: pygame.Event) -> Key | None:
        if raw.button != pygame.BUTTON_LEFT:
            return None
        (w, h), (wide, high) = self._window.size, self._window.get_surface().get_size()
        chosen = self._overlay.thumbnail_at(raw.pos[0] * wide // w, raw.pos[1] * high // h)
        if chosen is None:
            return None
        shift = "shift+" if pygame.key.get_mods() & pygame.KMOD_SHIFT else ""
        return Key(f"{shift}{chosen + 1}")

    def _draw(self) -> None:
        """The whole last scene, from the pictures up."""
        self._stale = False
        try:
            screen = self._window.get_surface()
            is_bgrx = sys.byteorder == "little" and screen.get_masks() == _BGRX
            canvas = screen if is_bgrx else pygame.Surface(screen.get_size(), depth=32, masks=_BGRX)
            helping = self.help_shown and self._has_help
            _paste(canvas, self._pictures, _DIMMED if helping else 1.0)
            self._overlay.draw(canvas, replace(self._scene, help_shown=helping))
            if canvas is not screen:
                screen.blit(canvas, (0, 0))
            self._window.flip()
            self._failures = 0
        except pygame.error as error:
            self._failures += 1  # One may fail while the system changes the screen.
            if self._failures >= _FAILURES_AT_MOST:
                self._lost = f"the window cannot be drawn ({error})"

    def _make_room(self, pictures: Sequence[Frame]) -> None:
        """Resize to fit the pictures, around the same centre, unless the user gave the window a size."""
        if not self.fullscreen and self._window.size == self._own_size:
            (x, y), (was_w, was_h) = self._window.position, self._window.size
            self._window.size = w, h = _window_size([_hw(picture) for picture in pictures])
            self._own_size = w, h
            if (w, h) != (was_w, was_h):
                self._window.position = x + (was_w - w) // 2, y + (was_h - h) // 2


def _open_window(title: str, size: tuple[int, int], fullscreen: bool) -> pygame.Window:
    open_screen()
    pygame.font.init()
    try:
        # Of the screen's size from the start, it covers the screen even without a window manager.
        opens = pygame.display.get_desktop_sizes()[0] if fullscreen else _window_size([size])
        window = pygame.Window(
            title, opens, resizable=True, allow_high_dpi=True, fullscreen_desktop=fullscreen
        )
    except pygame.error as error:
        pygame.display.quit()
        raise MediaError(f"the window cannot be opened ({error}); use --no-window") from error
    window.minimum_size = (240, 160)
    window.set_icon(icon())
    pygame.key.stop_text_input()  # Keys are keys, not what an input method makes of them.
    pygame.key.set_repeat(400, 60)
    return window


def _window_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Width and height, in the system's units, to open with for pictures of these (H, W) side by side."""
    aspect = sum(w / h for h, w in sizes)
    high = max(_OPENS_AT_PX * max(sizes[0][0] / sizes[0][1], 1.0), *(h for h, _ in sizes))
    screen_w, screen_h = pygame.display.get_desktop_sizes()[0]
    high = min(high, _SHARE_OF_SCREEN * screen_h, _SHARE_OF_SCREEN * screen_w / aspect)
    return max(240, round(high * aspect)), max(160, round(high))


def _hw(picture: Frame) -> tuple[int, int]:
    return picture.shape[0], picture.shape[1]


def layout(room: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[Box]:
    """Where pictures of these (H, W) go in a window of ``room`` = (H, W): side by side, equally high.

    As large as fits with their aspects kept (to the pixel), centred.
    """
    h, w = room
    aspects = [wide / high for high, wide in sizes]
    exact = min(h, w / sum(aspects))
    high, total = max(1, round(exact)), max(len(sizes), round(exact * sum(aspects)))
    top, left = (h - high) // 2, (w - total) // 2
    # Edges are rounded, not widths: neighbours share an edge, and the last one is the end.
    edges = [left + round(total * sum(aspects[:count]) / sum(aspects)) for count in range(len(sizes) + 1)]
    return [(x, top, max(1, end - x), high) for x, end in pairwise(edges)]


def _paste(canvas: pygame.Surface, pictures: Sequence[Frame], brightness: float) -> None:
    """Scale each picture straight into the canvas's memory."""
    w, h = canvas.get_size()
    canvas.fill(_BACK)
    # The surface is locked for as long as this view of its memory lives.
    pixels = pygame.surfarray.pixels2d(canvas).T.view(np.uint8).reshape(h, w, 4)
    for picture, (x, y, wide, high) in zip(pictures, layout((h, w), list(map(_hw, pictures))), strict=True):
        target = pixels[y : y + high, x : x + wide]
        shrinks = wide * high < picture.shape[0] * picture.shape[1]
        small = cv2.resize(picture, (wide, high), interpolation=cv2.INTER_AREA) if shrinks else picture
        bgrx = cv2.cvtColor(small, cv2.COLOR_RGB2BGRA)
        if brightness < 1:
            bgrx = cv2.convertScaleAbs(bgrx, alpha=brightness)
        cv2.resize(bgrx, (wide, high), dst=target, interpolation=cv2.INTER_CUBIC)
