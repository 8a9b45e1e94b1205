"""The keys of the live window: one table shared by the presenter, the help and the README.

`std_rt.media.window.window` names a pressed key, `command_for` finds its command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

__all__ = ["BINDINGS", "Action", "Binding", "Command", "command_for", "help_lines", "markdown_table"]


class Action(StrEnum):
    """What a user can do while a session runs."""

    STEP_STYLE = "step style"  # to the next (amount 1) or previous one (-1)
    CHOOSE_STYLE = "choose style"  # amount: its number, from 1
    MIX_STYLE = "mix style"  # into the blend or out of it; amount: its number, from 1
    WEIGHT = "weight"  # of the style chosen or mixed in last; amount is added
    STRENGTH = "strength"  # of all style; amount is added
    STROKES = "strokes"  # stroke size; amount is added
    COLOURS = "colours"  # the camera's, or those of the style
    CROSSFADE = "crossfade"  # duration in seconds; amount is added
    COMPARE = "compare"
    MIRROR = "mirror"
    PAUSE = "pause"
    SNAPSHOT = "snapshot"
    RECORD = "record"
    FIGURES = "figures"
    STRIP = "strip"
    HELP = "help"
    FULLSCREEN = "fullscreen"
    BACK = "back"  # close the help, else leave full screen, else quit
    QUIT = "quit"


_REPEATING = frozenset(
    {Action.WEIGHT, Action.STRENGTH, Action.STROKES, Action.CROSSFADE}
)  # while the key is held


@dataclass(frozen=True)
class Command:
    """One thing to do; amount: the step, direction or number its action needs, else 0."""

    action: Action
    amount: float = 0.0


@dataclass(frozen=True)
class Binding:
    """One line of the table: keys as printed on a keyboard, what they do, and their commands by key name."""

    group: str
    help: str
    printed: tuple[str, ...]
    commands: Mapping[str, Command]


def _any(action: Action, amount: float, *names: str) -> dict[str, Command]:
    """The same command for each of these keys."""
    return dict.fromkeys(names, Command(action, amount))


def _steps(action: Action, step: float, more: tuple[str, ...], less: tuple[str, ...]) -> dict[str, Command]:
    up, down = Command(action, step), Command(action, -step)
    return {**dict.fromkeys(more, up), **dict.fromkeys(less, down)}


def _numbers(action: Action, prefix: str = "") -> dict[str, Command]:
    return {f"{prefix}{number}": Command(action, number) for number in range(1, 10)}


BINDINGS: tuple[Binding, ...] = (
    Binding("Style", "next", ("N", "→"), _any(Action.STEP_STYLE, 1, "n", "right")),
    Binding("Style", "previous", ("P", "←"), _any(Action.STEP_STYLE, -1, "p", "left")),
    Binding("Style", "choose; or click its picture", ("1", "…", "9"), _numbers(Action.CHOOSE_STYLE)),
    Binding("Style", "blend in, take out", ("Shift+1", "…", "9"), _numbers(Action.MIX_STYLE, "shift+")),
    Binding(
        "Style", "its weight in the blend", ("+", "−"), _steps(Action.WEIGHT, 0.1, ("plus",), ("minus",))
    ),
    Binding("Style", "strength", ("↑", "↓"), _steps(Action.STRENGTH, 0.05, ("up",), ("down",))),
    Binding(
        "Style",
        "strokes: larger, smaller",
        ("B", "Shift+B"),
        _steps(Action.STROKES, 0.1, ("b",), ("shift+b",)),
    ),
    Binding("Style", "keep the camera's colours", ("K",), _any(Action.COLOURS, 0, "k")),
    Binding(
        "Style",
        "crossfade: longer, shorter",
        ("X", "Shift+X"),
        _steps(Action.CROSSFADE, 0.25, ("x", "bracketright"), ("shift+x", "bracketleft")),
    ),
    Binding("Style", "drop a picture on the window to add a style", ("Drop",), {}),
    Binding("Picture", "input next to output", ("C",), _any(Action.COMPARE, 0, "c")),
    Binding("Picture", "mirror", ("M",), _any(Action.MIRROR, 0, "m")),
    Binding("Picture", "pause", ("Space",), _any(Action.PAUSE, 0, "space")),
    Binding("Save", "save a snapshot", ("S",), _any(Action.SNAPSHOT, 0, "s")),
    Binding("Save", "record: start, stop", ("R",), _any(Action.RECORD, 0, "r")),
    Binding("Window", "statistics: fps, latency …", ("I",), _any(Action.FIGURES, 0, "i")),
    Binding("Window", "pictures of the styles", ("T",), _any(Action.STRIP, 0, "t")),
    Binding("Window", "full screen", ("F",), _any(Action.FULLSCREEN, 0, "f", "f11", "alt+return")),
    Binding("Window", "this list of keys", ("H",), _any(Action.HELP, 0, "h", "f1", "question")),
    Binding("Window", "back, or quit", ("Esc",), _any(Action.BACK, 0, "escape")),
    Binding("Window", "quit", ("Q",), _any(Action.QUIT, 0, "q", "ctrl+c", "ctrl+q", "ctrl+w")),
)

_COMMANDS = {name: command for binding in BINDINGS for name, command in binding.commands.items()}


def command_for(key: str, repeat: bool = False) -> Command | None:
    """The command of a key by its name; None for a key without one.

    repeat: the key is being held down, which only gradual commands follow. A number above 9 is not a key; the
    window gives it for a click on the thumbnail of that style.
    """
    command, number = _COMMANDS.get(key), key.removeprefix("shift+")
    if command is None and number.isascii() and number.isdecimal() and int(number):
        command = Command(Action.CHOOSE_STYLE if number == key else Action.MIX_STYLE, int(number))
    return None if command is None or (repeat and command.action not in _REPEATING) else command


def help_lines() -> list[tuple[tuple[str, ...], str]]:
    """Lines of the help: (keys as printed, what they do); each group starts with its name, without keys."""
    lines: list[tuple[tuple[str, ...], str]] = []
    for group, bindings in groupby(BINDINGS, lambda binding: binding.group):
        lines += [((), group), *((binding.printed, binding.help) for binding in bindings)]
    return lines


def markdown_table() -> str:
    """The help as a Markdown table, for the README."""
    rows, group = ["| | Key | What it does |", "|---|---|---|"], ""
    for binding in BINDINGS:
        first = f"{binding.group} " if binding.group != group else ""
        group = binding.group
        keys = " ".join(key if key == "…" else f"`{key}`" for key in binding.printed)
        rows.append(f"| {first}| {keys} | {binding.help} |")
    return "\n".join(rows) + "\n"
