"""`std-rt tally`: votes on a blind sheet or voting page of `std-rt evaluate`, counted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from std_rt.cli.terminal import print_table

if TYPE_CHECKING:
    from std_rt.evaluation.statistics import Estimate

__all__ = ["tally"]


def tally(
    key: Annotated[Path, Argument(metavar="KEY", help="The .key.json beside the sheet or the page.")],
    votes: Annotated[list[Path], Argument(metavar="VOTES...", help="Files of votes, one a voter.")],
) -> None:
    """Count blind votes: who was preferred, how often, and how sure that is.

    std-rt tally protocol/vote.key.json votes-ann.csv votes-bob.csv

    Votes are lines of a row's number and its letters from best to worst: 1,C>A=D>B, or the best alone: 2,A.
    """
    from std_rt.evaluation.blind import read_key, read_votes
    from std_rt.evaluation.blind import tally as count

    known = read_key(key)
    cast = [vote for path in votes for vote in read_votes(path, known)]
    counted = count(cast)
    titles = [f"of {len(cast)} votes", "best", "place", "preferred", *(f"to {label}" for label in counted)]
    rows = [
        [
            *(label, f"{one.best} of {one.votes}", f"{one.place:.2f}", _percent(one.preferred)),
            *(_percent(one.beside.get(other)) for other in counted),
        ]
        for label, one in sorted(counted.items(), key=lambda item: item[1].place)
    ]
    print_table(rows, titles, numeric=True)


def _percent(share: Estimate | None) -> str:
    """``62 % (51-72)``; a star where the interval does not hold an even match."""
    if share is None or share.low is None or share.high is None:
        return "-"
    mark = "*" if share.low > 0.5 or share.high < 0.5 else ""
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f}-{100 * share.high:.0f}){mark}"
