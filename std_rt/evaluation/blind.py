"""Blind judging: a sheet whose columns are shuffled row by row, its key, and a tally of votes.

The key is a JSON file beside the sheet, or the voting page (`evaluation.voting`): for each row the labels
behind the letters A, B, C, ... Votes are a CSV file with one line per row: its number, and the letters from
best to worst, equal ones joined by "=". Letters that are left out share the last place, so that a favourite
alone is a vote, too:

    1,C>A=D>B
    2,A
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import cv2
import numpy as np

from std_rt.core.errors import MediaError, UsageError
from std_rt.core.files import check_input, write_text, writing
from std_rt.evaluation.measures import Frame
from std_rt.evaluation.picture_quality import Pair, write_sheet
from std_rt.evaluation.statistics import Estimate, wilson

__all__ = [
    "Key", "Tally", "Vote", "check_count", "key_path", "read_key", "read_votes", "tally", "write_blind",
    "write_key",
]  # fmt: skip

Order = Sequence[str]  # labels by letter, of one row
Ranks = Mapping[str, int]  # label -> place, 0 is the best; equal ones share a place


class Key(NamedTuple):
    """What is behind the letters of each row; ``run`` names a voting page, whose votes name it, too."""

    rows: Sequence[Order]
    run: str = ""


class Vote(NamedTuple):
    """One voter's places on one row."""

    row: int
    ranks: Ranks


def key_path(sheet: Path) -> Path:
    """Where the key of a sheet is: ``blind.png`` -> ``blind.key.json``."""
    return sheet.with_suffix(".key.json")


def check_count(candidates: int) -> None:
    """Raise UsageError for fewer than two candidates, or more than there are letters."""
    if not 2 <= candidates <= len(ascii_uppercase):
        raise UsageError(
            f"--blind compares 2 to {len(ascii_uppercase)} candidates, got {candidates}; "
            "add --peer NAME=FOLDER, another --bundle or more --steps"
        )


def write_blind(
    sheet: Path, pairs: Sequence[Pair], outputs: Mapping[str, Sequence[Frame]], seed: int
) -> None:
    """Write the sheet and its key: content and style, then ``outputs`` in an order drawn for each row.

    At most as many candidates as `check_count` allows.
    """
    labels = list(outputs)
    rng = np.random.default_rng(seed)
    orders = [[labels[k] for k in rng.permutation(len(labels))] for _ in pairs]
    rows = [
        [_numbered(content, i + 1), style, *(outputs[label][i] for label in order)]
        for i, ((content, style), order) in enumerate(zip(pairs, orders, strict=True))
    ]
    write_sheet(sheet, rows, names=dict(enumerate(["content", "style", *ascii_uppercase[: len(labels)]])))
    write_key(key_path(sheet), orders, "choose another place with --blind", seed=seed)


def write_key(path: Path, rows: Sequence[Order], advice: str, **more: Any) -> None:
    """Write the key of a sheet or page. Raises MediaError with ``advice``."""
    with writing(path, MediaError, advice):
        write_text(path, json.dumps({**more, "rows": rows}, indent=1) + "\n")


def _numbered(frame: Frame, number: int) -> Frame:
    marked = frame.copy()
    marked[:20, : 8 + 11 * len(str(number))] = 255
    cv2.putText(marked, str(number), (3, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return marked


def read_key(path: Path) -> Key:
    """The labels behind the letters, by row. Raises UsageError."""
    check_input(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Key([[str(label) for label in row] for row in found["rows"]], str(found.get("run", "")))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UsageError(f"{path} is not the key of a blind sheet or page; it ends in .key.json") from None


def read_votes(path: Path, key: Key) -> list[Vote]:
    """All votes of a file. Raises UsageError for a line that is no vote, and for votes of another page."""
    check_input(path)
    votes = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line in csv.reader(file):
            cells = [cell.strip() for cell in line]
            if not any(cells) or cells[0].startswith("#"):
                named = re.match(r"# run (\w+)", cells[0]) if cells else None
                if named and key.run and named[1] != key.run:
                    raise UsageError(f"{path} holds votes of page {named[1]}, but the key is of {key.run}")
                continue
            try:
                row, ranking = cells
                index = _index(row, len(key.rows))
                votes.append(Vote(index, _ranks(ranking, key.rows[index])))
            except (ValueError, LookupError):
                raise UsageError(
                    f"{path}: {','.join(line)!r} is not a vote; write a row "
                    f"(1 to {len(key.rows)}) and its letters from best to worst, as in 1,C>A=D>B"
                ) from None
    if not votes:
        raise UsageError(f"{path} holds no votes; write lines such as 1,C>A=D>B")
    return votes


def _index(row: str, count: int) -> int:
    number = int(row)
    if not 1 <= number <= count:
        raise ValueError
    return number - 1


def _ranks(ranking: str, order: Order) -> Ranks:
    """Raises ValueError or LookupError for a letter that is unknown or there twice."""
    groups = [[letter.strip() for letter in group.split("=")] for group in ranking.upper().split(">")]
    known = dict(zip(ascii_uppercase, order, strict=False))
    named = [known[letter] for group in groups for letter in group]
    if len(set(named)) < len(named):
        raise ValueError
    places = {known[letter]: place for place, group in enumerate(groups) for letter in group}
    return {label: places.get(label, len(groups)) for label in order}


@dataclass(frozen=True)
class Tally:
    """Of the votes on a candidate: ``best`` how often nothing was placed above it, ``votes`` their number,
    ``place`` the mean place (1 is best, ties share the mean of their places), ``preferred`` the share of
    comparisons that it won (ties count half), ``beside`` the same against each other one it was shown with.

    Intervals are Wilson's for as many votes as there are rows: votes of several people on one row are not
    independent, so they make a row's share more exact, but not another row.
    """

    best: int
    votes: int
    place: float
    preferred: Estimate
    beside: dict[str, Estimate]


def tally(votes: Iterable[Vote]) -> dict[str, Tally]:
    """The votes counted, by label. Rows may show different candidates."""
    cast = list(votes)
    labels = sorted({label for vote in cast for label in vote.ranks})
    return {label: _counted(label, [vote for vote in cast if label in vote.ranks]) for label in labels}


def _counted(label: str, votes: Sequence[Vote]) -> Tally:
    won: dict[str, dict[int, list[float]]] = {}  # other label -> row -> 1 won, 1/2 equal, 0 lost
    places = []
    for row, ranks in votes:
        mine = ranks[label]
        others = {other: place for other, place in ranks.items() if other != label}
        for other, place in others.items():
            won.setdefault(other, {}).setdefault(row, []).append((float(np.sign(place - mine)) + 1) / 2)
        above, equal = (sum(test(p) for p in others.values()) for test in (mine.__gt__, mine.__eq__))
        places.append(1 + above + equal / 2)
    by_row: dict[int, list[float]] = {}
    for rows in won.values():
        for row, shares in rows.items():
            by_row.setdefault(row, []).extend(shares)
    best = sum(vote.ranks[label] == min(vote.ranks.values()) for vote in votes)
    beside = {other: _share(won[other]) for other in sorted(won)}
    return Tally(best, len(votes), float(np.mean(places)), _share(by_row), beside)


def _share(rows: Mapping[int, Sequence[float]]) -> Estimate:
    """Mean of the rows' means, with the interval for their number."""
    return wilson(float(np.mean([np.mean(shares) for shares in rows.values()])), len(rows))
