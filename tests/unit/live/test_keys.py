"""The table of keys: no key twice, every action reachable, one source for loop, help and README."""

from __future__ import annotations

from collections import Counter

import pytest

from std_rt.live.keys import BINDINGS, Action, Command, command_for, help_lines, markdown_table
from std_rt.media.window.sdl import key_name, pygame


def test_no_key_is_bound_twice_and_every_action_has_one() -> None:
    names = Counter(name for binding in BINDINGS for name in binding.commands)
    assert [name for name, count in names.items() if count > 1] == []
    assert {command.action for binding in BINDINGS for command in binding.commands.values()} == set(Action)


def test_every_bound_key_is_a_name_the_window_gives() -> None:
    bound = {name for binding in BINDINGS for name in binding.commands}
    assert {name.rsplit("+", 1)[-1] for name in bound} <= _names_the_window_gives()


def _names_the_window_gives() -> set[str]:
    keys = [value for name, value in vars(pygame).items() if name.startswith("K_")]
    digits = [getattr(pygame, f"KSCAN_{digit}") for digit in range(10)]
    pressed = [(key, 0) for key in keys] + [(0, scancode) for scancode in digits]
    return {name for key, scancode in pressed if (name := key_name(key, scancode, 0))}


@pytest.mark.parametrize(
    ("key", "command"),
    [
        ("n", Command(Action.STEP_STYLE, 1)),
        ("left", Command(Action.STEP_STYLE, -1)),
        ("7", Command(Action.CHOOSE_STYLE, 7)),
        ("shift+2", Command(Action.MIX_STYLE, 2)),
        ("12", Command(Action.CHOOSE_STYLE, 12)),
        ("shift+12", Command(Action.MIX_STYLE, 12)),
        ("minus", Command(Action.WEIGHT, -0.1)),
        ("up", Command(Action.STRENGTH, 0.05)),
        ("shift+b", Command(Action.STROKES, -0.1)),
        ("k", Command(Action.COLOURS)),
        ("bracketleft", Command(Action.CROSSFADE, -0.25)),
        ("shift+x", Command(Action.CROSSFADE, -0.25)),
        ("ctrl+c", Command(Action.QUIT)),
        ("0", None),
        ("ctrl+1", None),
        ("shift+", None),
        ("²", None),
        ("y", None),
    ],
)
def test_commands_of_keys(key: str, command: Command | None) -> None:
    assert command_for(key) == command


def test_a_held_key_goes_on_only_where_it_is_gradual() -> None:
    assert command_for("up", repeat=True) == command_for("up")
    assert command_for("r", repeat=True) is None
    assert command_for("n", repeat=True) is None
    assert command_for("q", repeat=True) is None


def test_the_help_has_every_binding_below_its_groups_name() -> None:
    lines = help_lines()
    assert [text for keys, text in lines if keys] == [binding.help for binding in BINDINGS]
    groups = [text for keys, text in lines if not keys]
    assert groups == list(dict.fromkeys(binding.group for binding in BINDINGS))


def test_the_markdown_table_has_a_row_for_every_binding() -> None:
    rows = markdown_table().splitlines()
    assert len(rows) == 2 + len(BINDINGS)
    assert "| | `1` … `9` | choose; or click its picture |" in rows
    assert rows[2] == "| Style | `N` `→` | next |"
    assert all(row.count("|") == 4 for row in rows)
