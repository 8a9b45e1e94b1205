"""Blind sheets: what is behind a letter is what the key says, and votes are counted as cast."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from std_rt.core.errors import UsageError
from std_rt.evaluation.blind import Key, check_count, key_path, read_key, read_votes, tally, write_blind
from std_rt.evaluation.statistics import wilson
from std_rt.media import read_picture

Frame = NDArray[np.uint8]
LEVELS = {"a": 40, "b": 80, "c": 120}  # the grey of each candidate
PX, ROWS = 32, 12


def _flat(level: int) -> Frame:
    return np.full((PX, PX, 3), level, np.uint8)


def _write(sheet: Path, seed: int = 0) -> list[list[int]]:
    """The greys on a sheet, row by row."""
    pairs = [(_flat(0), _flat(10))] * ROWS
    write_blind(sheet, pairs, {name: [_flat(level)] * ROWS for name, level in LEVELS.items()}, seed)
    frame, step = read_picture(sheet).frame, PX + 4
    top = frame.shape[0] - ROWS * step  # under the header
    return [
        [int(frame[top + y * step + PX // 2, x * step + PX // 2, 0]) for x in (2, 3, 4)] for y in range(ROWS)
    ]


def test_the_key_says_what_is_on_the_sheet(tmp_path: Path) -> None:
    sheet = tmp_path / "blind.png"
    shown = _write(sheet)
    orders = read_key(key_path(sheet)).rows
    assert shown == [[LEVELS[label] for label in order] for order in orders]
    assert len({tuple(row) for row in shown}) > 3  # each row has an order of its own
    assert shown == _write(tmp_path / "again.png")
    assert shown != _write(tmp_path / "other.png", seed=1)


def test_a_voter_who_knows_what_he_likes_wins_every_row(tmp_path: Path) -> None:
    """Votes cast by looking at the sheet alone, counted with the key."""
    shown = _write(tmp_path / "blind.png")
    lines = ["# mine"]
    for number, row in enumerate(shown, 1):
        c, a, b = ("ABC"[row.index(LEVELS[name])] for name in "cab")
        lines.append(f"{number}, {c}>{a}={b}" if number > 1 else f"{number},{c.lower()}")
    votes = tmp_path / "votes.csv"
    votes.write_text("\n".join(lines), encoding="utf-8")
    counted = tally(read_votes(votes, read_key(key_path(tmp_path / "blind.png"))))
    assert {name: one.best for name, one in counted.items()} == {"a": 0, "b": 0, "c": ROWS}
    assert [counted[name].place for name in "abc"] == [2.5, 2.5, 1]
    assert counted["a"].beside == {"b": wilson(0.5, ROWS), "c": wilson(0, ROWS)}
    assert counted["c"].beside == {"a": wilson(1, ROWS), "b": wilson(1, ROWS)}
    assert counted["c"].preferred == wilson(1, ROWS)
    assert counted["a"].preferred == wilson(0.25, ROWS)


def test_rows_of_two_and_several_voters(tmp_path: Path) -> None:
    """By hand: a beat b on row 1 for both voters, lost on row 2 for one of two, and drew with c on row 3."""
    key = Key([["a", "b"], ["b", "a"], ["c", "a"]], "this")
    for name, lines in (("ann", "# run this, voter ann\n1,A>B\n2,A>B\n3,A=B\n"), ("bob", "1,A\n2,B\n")):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    counted = tally([vote for name in ("ann", "bob") for vote in read_votes(tmp_path / name, key)])
    assert counted["a"].beside == {"b": wilson((1 + 0.5) / 2, 2), "c": wilson(0.5, 1)}
    assert counted["a"].preferred == wilson((1 + 0.5 + 0.5) / 3, 3)
    assert (counted["a"].best, counted["a"].votes, counted["a"].place) == (4, 5, (1 + 2 + 1.5 + 1 + 1) / 5)
    assert (counted["c"].votes, counted["c"].beside.keys()) == (1, {"a"})
    with pytest.raises(UsageError, match="votes of page this, but the key is of other"):
        read_votes(tmp_path / "ann", key._replace(run="other"))


@pytest.mark.parametrize("line", ["13,A", "0,A", "1", "1,D", "1,A>A", "one,A", "1,A,B", "1,A>"])
def test_a_line_that_is_no_vote_is_named(tmp_path: Path, line: str) -> None:
    votes = tmp_path / "votes.csv"
    votes.write_text(f"1,A>B>C\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(f"'{line}' is not a vote")):
        read_votes(votes, Key([list("abc")] * ROWS))


def test_no_votes_and_no_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UsageError, match="holds no votes"):
        read_votes(tmp_path / "file", Key([list("abc")]))
    with pytest.raises(UsageError, match="not the key"):
        read_key(tmp_path / "file")


def test_one_candidate_is_no_choice() -> None:
    check_count(2)
    for count in (1, 27):
        with pytest.raises(UsageError, match="2 to 26"):
            check_count(count)
