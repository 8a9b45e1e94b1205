"""The live window without a screen: pixels read back, and events."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from std_rt.core.errors import MediaError
from std_rt.media.window import overlay as overlay_module
from std_rt.media.window.overlay import Overlay, in_columns, page, printable, text_px
from std_rt.media.window.sdl import key_name, pygame
from std_rt.media.window.window import Closed, Dropped, Key, Window, layout

Frame = NDArray[np.uint8]
BACK = (10, 10, 12)
HELP = [((), "Style"), (("N", "→"), "next"), ((), "Window"), (("Esc",), "quit"), (("1", "…", "9"), "choose")]
Opener = Callable[..., Window]


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Opens windows without a screen, of a given size in pixels (H, W), and closes them."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    opened: list[Window] = []

    def open_window(h: int = 480, w: int = 640, **options: object) -> Window:
        window = Window("test", size=(h, w), **options)  # type: ignore[arg-type]
        opened.append(window)
        window._window.size = (w, h)
        window._own_size = None  # as if the user had given it this size
        pygame.event.clear()
        return window

    yield open_window
    for window in opened:
        window.close()
    assert not pygame.display.get_init()


def plain(colour: tuple[int, int, int], h: int = 64, w: int = 64) -> Frame:
    return np.full((h, w, 3), colour, np.uint8)


def pixels(window: Window) -> NDArray[np.int16]:
    """What the window shows, [H, W, 3] RGB."""
    surface = window._window.get_surface()
    return pygame.surfarray.array3d(surface).swapaxes(0, 1).astype(np.int16)


def changed(before: NDArray[np.int16], after: NDArray[np.int16]) -> tuple[int, int, int, int]:
    """Bounds of what differs: top, bottom, left, right (ends exclusive)."""
    ys, xs = np.nonzero((before != after).any(axis=2))
    return int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1


# Where pictures go

SIDE = st.integers(160, 2000)


@settings(deadline=None)
@given(h=SIDE, w=SIDE, sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=2))
def test_layout_keeps_aspects_and_fills_one_direction(h: int, w: int, sizes: list[tuple[int, int]]) -> None:
    boxes = layout((h, w), sizes)
    assert len({(y, high) for _, y, _, high in boxes}) == 1, "equally high"
    x0, y, _, high = boxes[0]
    x1 = boxes[-1][0] + boxes[-1][2]
    assert all(a[0] + a[2] == b[0] for a, b in pairwise(boxes)), "side by side"
    fills_width, fills_height = x1 - x0 == w, high == h
    assert fills_width or fills_height
    assert abs(x0 - (w - x1)) <= 1, "in the middle"
    assert abs(y - (h - y - high)) <= 1
    exact = min(h, w / sum(b / a for a, b in sizes))
    for (_, _, wide, tall), (a, b) in zip(boxes, sizes, strict=True):
        assert abs(tall - max(exact, 1)) <= 0.51
        assert abs(wide - max(exact * b / a, 1)) <= 1.51


def test_colours_are_rgb_and_bars_are_black_around_a_wide_frame(opener: Opener) -> None:
    window = opener(480, 480)
    frame = np.concatenate([plain((250, 20, 40)), plain((20, 240, 60))], axis=1)  # 2 : 1
    window.show(frame)
    shown = pixels(window)
    assert shown[240, 100].tolist() == [250, 20, 40]
    assert shown[240, 380].tolist() == [20, 240, 60]
    assert (shown[:120] == BACK).all()
    assert (shown[360:] == BACK).all()
    assert (shown[120:360, :200] == (250, 20, 40)).all()


def test_bars_left_and_right_of_a_tall_frame(opener: Opener) -> None:
    window = opener(300, 400)
    window.show(plain((9, 200, 9), 90, 60))
    shown = pixels(window)
    assert (shown[:, :100] == BACK).all()
    assert (shown[:, 300:] == BACK).all()
    assert (shown[:, 100:300] == (9, 200, 9)).all()


@pytest.mark.parametrize(("h", "w"), [(64, 80), (960, 1200), (384, 480)])
def test_scaling_shows_the_picture_enlarged_reduced_and_as_it_is(opener: Opener, h: int, w: int) -> None:
    window = opener(384, 480)
    y, x = np.mgrid[:h, :w]
    frame = np.stack([255 * y / h, 255 * x / w, 128 + 60 * np.sin(9 * x / w)], axis=2).astype(np.uint8)
    window.show(frame)
    expected = np.asarray(Image.fromarray(frame).resize((480, 384), Image.Resampling.BICUBIC), np.int16)
    assert np.abs(pixels(window) - expected).mean() < 1.5


def test_input_is_left_of_output_at_the_same_height(opener: Opener) -> None:
    window = opener(300, 900)
    window.show(plain((200, 0, 0), 32, 32), beside=plain((0, 0, 200), 100, 200))
    shown = pixels(window)
    assert (shown[:, :600] == (0, 0, 200)).all()
    assert (shown[:, 600:] == (200, 0, 0)).all()


def test_a_row_of_padding_in_the_surface_does_not_shear_the_picture(opener: Opener) -> None:
    window = opener(333, 517)
    frame = plain((0, 0, 0), 333, 517)
    frame[:, 100:110] = 255
    window.show(frame)
    assert (pixels(window)[:, 100:110] == 255).all()
    assert (pixels(window)[:, 112:] == 0).all()


def test_a_screen_of_16_bits_gets_the_same_picture(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    window = opener(90, 90)
    surface = pygame.Surface((90, 90), depth=16)
    real = window._window
    shallow = SimpleNamespace(
        get_surface=lambda: surface, flip=lambda: None, destroy=real.destroy, size=(90, 90)
    )
    monkeypatch.setattr(window, "_window", shallow)
    window.show(plain((250, 10, 20)))
    assert np.abs(pixels(window) - (250, 10, 20)).max() <= 8


def test_a_new_window_has_the_frames_aspect_and_room_for_input_beside_it(opener: Opener) -> None:
    window = opener(120, 160)
    window._own_size = window._window.size
    window.show(plain((0, 0, 0), 120, 160))
    w, h = window._window.size
    assert w / h == pytest.approx(160 / 120, abs=0.01)
    window.show(plain((0, 0, 0), 120, 160), beside=plain((0, 0, 0), 120, 160))
    w, h = window._window.size
    assert w / h == pytest.approx(320 / 120, abs=0.01)


def test_a_size_the_user_gave_stays(opener: Opener) -> None:
    window = opener(300, 300)
    window.show(plain((0, 0, 0)), beside=plain((0, 0, 0)))
    assert window._window.size == (300, 300)


# What is written over them


def test_figures_change_their_corner_only_and_are_legible_over_white(opener: Opener) -> None:
    window = opener(480, 640)
    white = plain((255, 255, 255), 48, 64)
    window.show(white)
    before = pixels(window)
    window.show(white, ["fps\t29.8", "a line of its own"])
    after = pixels(window)
    top, bottom, left, right = changed(before, after)
    assert top >= 5
    assert left >= 5
    assert bottom < 240
    assert right < 320
    panel = after[top:bottom, left:right].mean(axis=2)
    assert np.median(panel) < 100, "dark glass"
    assert panel.max() > 230, "light text"


def test_values_after_a_tab_stand_below_each_other(opener: Opener) -> None:
    window = opener(480, 640)
    window.show(plain((0, 0, 0), 48, 64), ["i\tH", "a long label\tH"])
    light = pixels(window).mean(axis=2) > 230
    rows = np.nonzero(light.any(axis=1))[0]
    upper = light[rows[0] : rows[0] + 8].any(axis=0)
    lower = light[rows[-1] - 8 : rows[-1]].any(axis=0)
    assert np.nonzero(upper)[0].min() == np.nonzero(lower)[0].min()


def test_the_message_is_at_the_bottom_and_the_red_dot_at_the_top_right(opener: Opener) -> None:
    window = opener(480, 640)
    grey = plain((120, 120, 120), 48, 64)
    window.show(grey)
    before = pixels(window)
    window.show(grey, banner="snapshot saved")
    top, bottom, left, right = changed(before, pixels(window))
    assert top > 400
    assert abs(left - (640 - right)) <= 1
    window.show(grey, recording="0:12")
    after = pixels(window)
    top, bottom, left, _ = changed(before, after)
    assert bottom < 80
    assert left > 500
    red = (after[..., 0] > 240) & (after[..., 1] < 90)
    assert 30 < red.sum() < 200
    window.show(grey)
    assert (pixels(window) == before).all(), "nothing is left behind"


def test_a_long_message_is_cut_to_the_window(opener: Opener) -> None:
    window = opener(480, 640)
    grey = plain((120, 120, 120), 48, 64)
    window.show(grey)
    before = pixels(window)
    window.show(grey, ["value\t" + "wide " * 60], banner="word " * 60)
    _, _, left, right = changed(before, pixels(window))
    assert left > 4
    assert right < 636


@pytest.mark.parametrize("text", ["", "\n\t\x00", "caf\udce9.png", "a\u202eb", "日本", "🎨" * 3])
def test_any_text_can_be_shown(opener: Opener, text: str) -> None:
    opener().show(plain((0, 0, 0)), [text, ""], banner=text, recording=text)


def test_text_is_drawn_once_while_it_stays(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    make = Overlay._make_text

    def counted(overlay: Overlay, text: str, *rest: object) -> pygame.Surface:
        drawn.append(text)
        return make(overlay, text, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Overlay, "_make_text", counted)
    window = opener()
    for fps in ("29.8", "29.8", "29.9", "29.9"):
        window.show(plain((0, 0, 0)), [f"fps\t{fps}"], banner="hello")
    assert sorted(drawn) == sorted(["fps", "29.8", "hello", "29.9"])


def test_pictures_of_the_strip_are_drawn_once_and_not_kept_for_ever(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlay_module, "_CACHED", 10)
    overlay = opener()._overlay
    frame = plain((0, 0, 250))
    assert overlay._picture(frame, 20, 3) is overlay._picture(frame, 20, 3)
    assert overlay._picture(plain((0, 0, 250)), 20, 3) is not overlay._picture(frame, 20, 3)
    for side in range(5, 45):
        overlay._picture(frame, side, 1)
    assert len(overlay._pictures) <= 11


def strip(*weights: float, chosen: int = 0) -> list[tuple[Frame, float, bool]]:
    return [(plain((0, 0, 250), 40, 60), weight, index == chosen) for index, weight in enumerate(weights)]


def test_bars_of_the_strip_are_as_long_as_the_weights(opener: Opener) -> None:
    window = opener(480, 640)
    black = plain((0, 0, 0), 48, 64)
    full = [accent_below(window, black, strip(0.0, weight)) for weight in (0.25, 0.5, 1.0)]
    assert full[0] == pytest.approx(full[2] / 4, rel=0.2)
    assert full[1] == pytest.approx(full[2] / 2, rel=0.1)


def accent_below(window: Window, frame: Frame, thumbnails: list[tuple[Frame, float, bool]]) -> int:
    """Pixels of the accent colour below the second picture."""
    window.show(frame, thumbnails=thumbnails)
    cell = window._overlay._cells[1][0]
    below = pixels(window)[cell.bottom : cell.bottom + 20, cell.left : cell.right]
    return int(((below[..., 0] > 200) & (below[..., 2] < 150)).sum())


def test_the_strip_shows_pictures_and_marks_the_chosen_one(opener: Opener) -> None:
    window = opener(480, 640)
    window.show(plain((0, 0, 0), 48, 64), thumbnails=strip(1, 0, 0, chosen=2))
    shown = pixels(window)
    cells = [cell for cell, _ in window._overlay._cells]
    assert [shown[cell.center[1], cell.center[0]].tolist() for cell in cells] == [[0, 0, 250]] * 3
    ring = [shown[cell.centery, cell.left - 1].tolist() for cell in cells]
    assert ring[2][0] > 200
    assert max(ring[0] + ring[1]) < 80


def test_a_click_on_a_style_is_the_key_of_its_number(opener: Opener) -> None:
    window = opener(480, 640)
    window.show(plain((0, 0, 0)), thumbnails=strip(1, 0, 0))
    cell = window._overlay._cells[2][0]
    post(pygame.MOUSEBUTTONDOWN, button=1, pos=cell.center)
    post(pygame.MOUSEBUTTONDOWN, button=3, pos=cell.center)
    post(pygame.MOUSEBUTTONDOWN, button=1, pos=(3, 3))
    assert window.events() == [Key("3")]


@given(count=st.integers(1, 40), chosen=st.integers(0, 39), fits=st.integers(0, 20))
def test_a_page_of_the_strip_holds_the_chosen_style(count: int, chosen: int, fits: int) -> None:
    chosen = min(chosen, count - 1)
    shown = page([index == chosen for index in range(count)], fits)
    assert chosen in shown
    assert len(shown) == min(count, max(fits, 1))
    assert shown.start >= 0
    assert shown.stop <= count


def test_the_list_of_keys_covers_the_middle_until_back(opener: Opener) -> None:
    window = opener(480, 640, help_lines=HELP)
    white = plain((255, 255, 255), 48, 64)
    window.show(white)
    assert not window.back()
    window.help_shown = True
    window.show(white, ["fps"], thumbnails=strip(1, 0))
    shown = pixels(window)
    assert shown[3, 3].max() < 140, "the picture is dimmed"
    assert shown[240, 320].max() < 60, "a card in the middle"
    assert window._overlay._cells == []
    assert window.back()
    assert not window.help_shown
    window.show(white)
    assert (pixels(window) == 255).all()


def test_the_list_of_keys_fits_small_windows(opener: Opener) -> None:
    window = opener(200, 260, help_lines=HELP * 3)
    window.help_shown = True
    window.show(plain((255, 255, 255), 20, 26))
    shown = pixels(window).max(axis=2)
    assert (shown[2] > 100).all(), "the picture is still seen above the card"
    assert (shown[:, 2] > 100).all()


def test_columns_break_at_a_heading() -> None:
    left, right = in_columns(HELP, 2)
    assert [text for _, text in left] == ["Style", "next"]
    assert [text for _, text in right] == ["Window", "quit", "choose"]
    assert in_columns(HELP, 1) == [HELP]


def test_text_grows_with_the_window_within_bounds() -> None:
    assert text_px(768, 768) == 16
    assert text_px(160, 240) == 11
    assert text_px(4320, 7680) == 40
    assert text_px(768, 1366) >= text_px(768, 768)


def test_control_characters_become_spaces() -> None:
    assert printable("a\nb\tc\x00d") == "a b c d"


# Events


def post(kind: int, **fields: object) -> None:
    pygame.event.post(pygame.Event(kind, fields))


def press(key: int, scancode: int, mod: int = 0, kind: int = pygame.KEYDOWN) -> None:
    post(kind, key=key, scancode=scancode, mod=mod, unicode="")


def test_keys_held_say_so_until_let_go(opener: Opener) -> None:
    window = opener()
    press(pygame.K_UP, pygame.KSCAN_UP)
    press(pygame.K_UP, pygame.KSCAN_UP)
    press(pygame.K_UP, pygame.KSCAN_UP, kind=pygame.KEYUP)
    press(pygame.K_UP, pygame.KSCAN_UP)
    assert window.events() == [Key("up"), Key("up", repeat=True), Key("up")]
    post(pygame.WINDOWFOCUSLOST)  # It was let go while another window had the keyboard.
    press(pygame.K_UP, pygame.KSCAN_UP)
    assert window.events() == [Key("up")]


def test_dropped_files_and_one_closed(opener: Opener, tmp_path: Path) -> None:
    window = opener()
    post(pygame.DROPFILE, file=str(tmp_path / "art.png"))
    post(pygame.WINDOWCLOSE)
    post(pygame.QUIT)
    assert window.events() == [Dropped(tmp_path / "art.png"), Closed()]
    assert window.events() == []


NONE, SHIFT, CTRL = pygame.KMOD_NONE, pygame.KMOD_LSHIFT, pygame.KMOD_RCTRL


@pytest.mark.parametrize(
    ("key", "scancode", "mod", "name"),
    [
        (pygame.K_n, pygame.KSCAN_N, NONE, "n"),
        (pygame.K_x, pygame.KSCAN_X, SHIFT, "shift+x"),
        (pygame.K_c, pygame.KSCAN_C, CTRL, "ctrl+c"),
        (pygame.K_c, pygame.KSCAN_C, CTRL | SHIFT, "ctrl+shift+c"),
        (pygame.K_RETURN, pygame.KSCAN_RETURN, pygame.KMOD_LALT, "alt+return"),
        (pygame.K_1, pygame.KSCAN_1, NONE, "1"),
        (pygame.K_1, pygame.KSCAN_1, SHIFT, "shift+1"),
        (pygame.K_AMPERSAND, pygame.KSCAN_1, NONE, "1"),  # French
        (pygame.K_MINUS, pygame.KSCAN_6, NONE, "6"),  # French
        (pygame.K_KP7, pygame.KSCAN_KP7, NONE, "7"),
        (pygame.K_EQUALS, pygame.KSCAN_EQUALS, NONE, "plus"),  # US
        (pygame.K_EQUALS, pygame.KSCAN_EQUALS, SHIFT, "plus"),  # US
        (pygame.K_PLUS, pygame.KSCAN_RIGHTBRACKET, NONE, "plus"),  # German
        (pygame.K_MINUS, pygame.KSCAN_SLASH, NONE, "minus"),  # German
        (pygame.K_KP_MINUS, pygame.KSCAN_KP_MINUS, NONE, "minus"),
        (pygame.K_LEFTBRACKET, pygame.KSCAN_LEFTBRACKET, NONE, "bracketleft"),
        (0xFC, pygame.KSCAN_LEFTBRACKET, NONE, "bracketleft"),  # German ü
        (pygame.K_SLASH, pygame.KSCAN_SLASH, SHIFT, "question"),
        (pygame.K_a, pygame.KSCAN_Q, NONE, "a"),  # French
        (0x442, pygame.KSCAN_N, NONE, "n"),  # Russian т
        (pygame.K_COMMA, pygame.KSCAN_M, NONE, None),  # French
        (pygame.K_LSHIFT, pygame.KSCAN_LSHIFT, SHIFT, None),
        (pygame.K_SPACE, pygame.KSCAN_SPACE, NONE, "space"),
        (pygame.K_F11, pygame.KSCAN_F11, NONE, "f11"),
    ],
)
def test_names_of_keys(key: int, scancode: int, mod: int, name: str | None) -> None:
    assert key_name(key, scancode, mod) == name


def test_full_screen_and_back(opener: Opener) -> None:
    now = [0.0]
    window = opener(fullscreen=True, now=lambda: now[0])
    assert window.fullscreen
    window.show(plain((9, 9, 9)))
    now[0] += 3
    window.show(plain((9, 9, 9)))
    assert not pygame.mouse.get_visible(), "an idle pointer hides"
    post(pygame.MOUSEMOTION, pos=(5, 5), rel=(1, 1), buttons=(0, 0, 0))
    window.events()
    assert pygame.mouse.get_visible()
    assert window.back()
    assert not window.fullscreen
    assert not window.back()
    window.toggle_fullscreen()
    assert window.fullscreen


def test_an_exposed_window_is_drawn_again(opener: Opener) -> None:
    window = opener()
    window.show(plain((9, 99, 9)))
    window._window.get_surface().fill((0, 0, 0))
    post(pygame.WINDOWEXPOSED)
    window.events()
    assert pixels(window)[240, 320].tolist() == [9, 99, 9]


def test_closing_twice_and_using_it_afterwards(opener: Opener) -> None:
    window = opener()
    window.close()
    window.close()
    window.show(plain((0, 0, 0)))
    window.toggle_fullscreen()
    assert window.events() == []
    assert not pygame.display.get_init()
    again = opener()
    again.show(plain((0, 0, 0)))
    again.close()
    assert not pygame.display.get_init()


def test_drawing_that_goes_on_failing_closes_with_the_reason(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = opener()

    def fail(*_: object) -> None:
        raise pygame.error("device lost")

    monkeypatch.setattr(window._overlay, "draw", fail)
    window.show(plain((0, 0, 0)))
    assert window.events() == []
    for _ in range(20):
        window.show(plain((0, 0, 0)))
    assert window.events() == [Closed("the window cannot be drawn (device lost)")]


# No screen


def test_only_the_main_thread_may_open_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    said: list[str] = []

    def other() -> None:
        with pytest.raises(RuntimeError) as error:
            Window("test")
        said.append(str(error.value))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert said == ["a Window belongs to the main thread"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="they always have a screen")
@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ({}, "neither DISPLAY nor WAYLAND_DISPLAY is set"),
        ({"DISPLAY": ":7654"}, "DISPLAY=:7654 does not answer"),
        ({"SDL_VIDEODRIVER": "telegraph"}, "SDL_VIDEODRIVER=telegraph: telegraph not available"),
    ],
)
def test_no_screen_is_one_line(
    monkeypatch: pytest.MonkeyPatch, setting: dict[str, str], found: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MediaError) as error:
        Window("test")
    assert str(error.value) == (
        f"no screen to show a window on ({found}); use --no-window (with --record out.mp4 to keep the result)"
    )
    assert not pygame.display.get_init()
    assert capfd.readouterr().err == ""
    assert os.environ.get("SDL_VIDEODRIVER") == setting.get("SDL_VIDEODRIVER")
