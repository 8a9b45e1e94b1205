"""Blind judging: a sheet whose columns are shuffled row by row, its key, and a tally of votes.

The key is a JSON file beside the sheet: for each row the labels behind the letters A, B, C, ... Votes are a
CSV file with one line per row of the sheet: its number, and the letters from best to worst, equal ones
joined by "=". Letters that are left out share the last place, so that a favourite alone is a vote, too:

    1,C>A=D>B
    2,A
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import cv2
import numpy as np

from std_rt.core.errors import MediaError, UsageError
from std_rt.core.files import check_input, write_text, writing
from std_rt.evaluation.measures import Frame
from std_rt.evaluation.picture_quality import Pair, write_sheet

__all__ = ["Tally", "check_count", "key_path", "read_key", "read_votes", "tally", "write_blind"]

Order = Sequence[str]  # labels by letter, of one row
Ranks = Mapping[str, int]  # label -> place, 0 is the best; equal ones share a place


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
    key = key_path(sheet)
    with writing(key, MediaError, "choose another place with --blind"):
        write_text(key, json.dumps({"seed": seed, "rows": orders}, indent=1) + "\n")


def _numbered(frame: Frame, number: int) -> Frame:
    marked = frame.copy()
    marked[:20, : 8 + 11 * len(str(number))] = 255
    cv2.putText(marked, str(number), (3, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return marked


def read_key(path: Path) -> list[Order]:
    """The labels behind the letters, by row. Raises UsageError."""
    check_input(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [[str(label) for label in row] for row in rows]
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"{path} is not the key of a blind sheet; it ends in .key.json") from None


def read_votes(path: Path, orders: Sequence[Order]) -> list[Ranks]:
    """The places of all candidates, one mapping per vote. Raises UsageError for a line that is no vote."""
    check_input(path)
    votes = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line in csv.reader(file):
            cells = [cell.strip() for cell in line]
            if not any(cells) or cells[0].startswith("#"):
                continue
            try:
                row, ranking = cells
                votes.append(_ranks(ranking, orders[_index(row, len(orders))]))
            except (ValueError, LookupError):
                raise UsageError(
                    f"{path}: {','.join(line)!r} is not a vote; write a row of the sheet "
                    f"(1 to {len(orders)}) and its letters from best to worst, as in 1,C>A=D>B"
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
    """Of all votes: ``best`` how often nothing was placed above it, ``place`` the mean place (1 is best, ties
    share the mean of their places), ``beside`` other label -> how often it was at least as good."""

    best: int
    place: float
    beside: dict[str, int]


def tally(votes: Iterable[Ranks]) -> dict[str, Tally]:
    """The votes counted, by label."""
    rows = list(votes)
    labels = sorted(rows[0])

    def place(label: str, row: Ranks) -> float:
        above = sum(row[other] < row[label] for other in labels)
        equal = sum(row[other] == row[label] for other in labels)
        return above + (equal + 1) / 2

    return {
        label: Tally(
            sum(row[label] == min(row.values()) for row in rows),
            float(np.mean([place(label, row) for row in rows])),
            {other: sum(row[label] <= row[other] for row in rows) for other in labels if other != label},
        )
        for label in labels
    }
